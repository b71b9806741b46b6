"""Diffusion with one noise level per frame: noising, the loss, and turning noise into video.

Every target is one affine path  x_t = alpha_t * x0 + sigma_t * eps  and one linear read-out  out = a * x0 + b * eps:

    pred_name   alpha, sigma                    a        b        native noise schedule
    epsilon     sqrt(ab), sqrt(1 - ab)          0        1        linear
    x           sqrt(ab), sqrt(1 - ab)          1        0        squaredcos_cap_v2, zero terminal SNR
    v           sqrt(ab), sqrt(1 - ab)         -sigma    alpha    squaredcos_cap_v2, zero terminal SNR
    flow        tau, 1 - tau; tau=1-(t+1)/T     1       -1        none: its path is a straight line

so noising, the target, its inversion and the sampler's step are each written once. Timesteps run from 0 (almost
clean) to T-1 (noise); -1 is exactly clean.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SCHEDULES = ('sequential', 'full_sequence', 'pyramid')
CPU_PATCHES = 1024  # so many at a time of finished frames: on a CPU, what fits its own cache is a sixth faster


def alpha_bar_table(noise_schedule, zero_terminal_snr, num_timesteps=1000):
    """Cumulative signal power ab_t, float64 [T]: Ho et al. 2020 (linear), Nichol & Dhariwal 2021 (squaredcos)."""
    if noise_schedule == 'linear':
        beta = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
    elif noise_schedule == 'squaredcos_cap_v2':
        s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        ab = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - ab[1:] / ab[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f'noise_schedule={noise_schedule!r}: expected linear or squaredcos_cap_v2')
    ab = torch.cumprod(1 - beta, dim=0)
    if zero_terminal_snr:  # the last step is pure noise, as sampling assumes (Lin et al. 2023, algorithm 1)
        root = ab.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        ab = root ** 2
    return ab


def linear_grid(num_steps, num_timesteps=1000):
    """Timesteps [num_steps + 1] from num_timesteps - 1 down to -1, evenly spaced."""
    if num_steps < 1:
        raise ValueError(f'num_steps={num_steps}: expected 1 or more')
    return torch.linspace(-1, num_timesteps - 1, num_steps + 1, dtype=torch.float64).long().flip(0)


def schedule_matrix(schedule, num_frames, num_context, num_steps, num_timesteps=1000, grid=None):
    """Who is denoised when: timesteps [rows, num_frames]; each sampler step goes from one row to the next.

    full_sequence denoises all frames together, sequential one after the other, and in pyramid each frame is one step
    behind the one before. Context columns are -1 throughout. grid: the timesteps of one frame; None is linear_grid's.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule={schedule!r}: expected one of {", ".join(SCHEDULES)}')
    grid = linear_grid(num_steps, num_timesteps) if grid is None else grid
    delay = {'full_sequence': 0, 'pyramid': 1, 'sequential': num_steps}[schedule]
    delays = delay * torch.arange(num_frames - num_context)
    step = torch.arange(num_steps + int(delays[-1]) + 1)[:, None] - delays  # steps frame f has taken in each row
    matrix = torch.full((len(step), num_frames), -1)
    matrix[:, num_context:] = grid[step.clamp(0, num_steps)]
    return matrix


class Diffusion(nn.Module):
    """A prediction target with its noise schedule. Holds two tables, alpha and sigma, and no weights.

    pred_name: epsilon, x, v or flow. noise_schedule, zero_terminal_snr: None for the target's native ones.
    snr_gamma: the loss weight is min(SNR, gamma) / SNR; 0 turns it off, and flow never uses it.
    """

    def __init__(self, pred_name='v', noise_schedule=None, zero_terminal_snr=None, num_timesteps=1000, snr_gamma=5.0):
        super().__init__()
        if pred_name not in ('epsilon', 'x', 'v', 'flow'):
            raise ValueError(f'pred_name={pred_name!r}: expected epsilon, x, v or flow')
        noise_schedule = noise_schedule or ('linear' if pred_name == 'epsilon' else 'squaredcos_cap_v2')
        if zero_terminal_snr is None:
            zero_terminal_snr = pred_name in ('x', 'v')
        if pred_name == 'epsilon' and (zero_terminal_snr or noise_schedule != 'linear'):
            raise ValueError('pred_name=epsilon needs noise_schedule=linear and zero_terminal_snr=False: '
                             'where no signal is left, x0 cannot be recovered from the noise')
        self.pred_name, self.num_timesteps = pred_name, num_timesteps
        self.snr_gamma = 0.0 if pred_name == 'flow' else snr_gamma
        self.alphas_cumprod = alpha_bar_table(noise_schedule, zero_terminal_snr, num_timesteps)
        if pred_name == 'flow':
            tau = 1 - torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
            alpha, sigma = tau, 1 - tau
        else:
            alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        one = torch.ones(1, dtype=torch.float64)  # entry 0 of the tables is t = -1: clean
        self.register_buffer('alpha', torch.cat([one, alpha]).float(), persistent=False)
        self.register_buffer('sigma', torch.cat([0 * one, sigma]).float(), persistent=False)

    def path(self, t):
        """alpha, sigma [B,F,1,1,1] at integer timesteps t [B,F]."""
        i = (t + 1)[..., None, None, None]
        return self.alpha[i], self.sigma[i]

    def readout(self, alpha, sigma):
        """(a, b) of the network's output a * x0 + b * eps."""
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return {'epsilon': (zero, one), 'x': (one, zero), 'v': (-sigma, alpha), 'flow': (one, -one)}[self.pred_name]

    def add_noise(self, x0, t, noise):
        """x_t: frames x0 [B,F,...] at timesteps t [B,F]."""
        alpha, sigma = self.path(t)
        return alpha * x0 + sigma * noise

    def target(self, x0, t, noise):
        """What the network should say."""
        a, b = self.readout(*self.path(t))
        return a * x0 + b * noise

    def invert(self, x_t, t, out):
        """(x0, eps) from x_t and the network's output: the 2x2 system of the path and the read-out, solved.

        Two entries divide by what could be 0: alpha at T-1 for epsilon (refused above: its schedule keeps some signal)
        and sigma at -1 for x (a clean frame is read as t=0, as the model is shown it).
        """
        alpha, sigma = self.path(t.clamp(min=0))
        a, b = self.readout(alpha, sigma)
        det = alpha * b - sigma * a
        return (b * x_t - sigma * out) / det, (alpha * out - a * x_t) / det

    def sample_timesteps(self, shape, sampling='logit_normal', mean=0.0, std=1.0, per_clip=False, generator=None):
        """Training timesteps [B,F], drawn for each frame, or one per clip.

        logit_normal is floor(sigmoid(N(mean, std)) * T) (Esser et al. 2024); a std of 2.5 or more favours both ends:
        clean pasts and noisy presents, which is what a rollout shows the model.
        """
        if sampling not in ('logit_normal', 'uniform'):
            raise ValueError(f'timestep_sampling={sampling!r}: expected logit_normal or uniform')
        draw = (shape[0], 1) if per_clip else shape
        device = self.alpha.device
        if sampling == 'uniform':
            u = torch.rand(draw, device=device, generator=generator)
        else:
            u = torch.sigmoid(torch.randn(draw, device=device, generator=generator) * std + mean)
        return (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1).expand(shape)

    def loss(self, model, x0, action=None, t=None, noise=None):
        """Mean squared error of the target, each frame weighted by min(SNR, gamma) / SNR of its own timestep.

        Hang et al. 2023 use that weight for epsilon and others for x and v; with zero terminal SNR theirs would be zero
        at T-1, where sampling starts, so all targets share it here.
        x0 [B,F,C,H,W], action [B,F,A]; t [B,F] and noise like x0 are drawn when not given. Returns a scalar.
        """
        t = self.sample_timesteps(x0.shape[:2]) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        out = model(self.add_noise(x0, t, noise), t, action)
        mse = F.mse_loss(out.float(), self.target(x0, t, noise), reduction='none').mean(dim=(2, 3, 4))  # [B,F]
        if self.snr_gamma:
            alpha, sigma = (z[..., 0, 0, 0] for z in self.path(t))
            mse = mse * (self.snr_gamma * sigma ** 2 / alpha.clamp(min=1e-8) ** 2).clamp(max=1)
        return mse.mean()

    def timesteps(self, num_steps, grid='linear'):
        """A frame's way from noise to clean: integers [num_steps + 1] from T-1 down to -1.

        linear: evenly spaced in t. logsnr: strictly decreasing and evenly spaced in lambda = log(alpha / sigma), from
        that of T-1 (or minus that of t=0, if later: without any signal lambda is -inf) to that of t=0, taken as clean.
        """
        if grid == 'linear':
            return linear_grid(num_steps, self.num_timesteps)
        if grid != 'logsnr' or not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f'grid={grid!r}, num_steps={num_steps}: expected linear, or logsnr and 1 to '
                             f'{self.num_timesteps} steps')
        lam = (self.alpha / self.sigma).log()[1:].double().cpu()  # decreasing
        wanted = torch.linspace(max(lam[-1], -lam[0]), lam[0], num_steps + 1, dtype=torch.float64)
        t = [(lam - w).abs().argmin().item() for w in wanted]
        t[0], t[-1] = self.num_timesteps - 1, -1
        for i in range(1, num_steps):  # rounding may let two meet: leave room for those that follow
            t[i] = max(min(t[i], t[i - 1] - 1), num_steps - 1 - i)
        return torch.tensor(t)

    def step(self, x, t, s, out, eta=0.0, noise=None, before=None, x0_before=None):
        """One step of every frame from timestep t [B,F] to s: DDIM (Song et al. 2021), which for flow is Euler's.

        Frames with t == s stay as they are. eta adds fresh `noise` (eq. 16, in alpha and sigma so that it serves flow).
        before, x0_before: timestep and x0 of each frame's step before this one (before == t if there was none) make it
        DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): DDIM with x0 extrapolated in lambda =
        log(alpha / sigma), D = x0 + h / (2 h_before) (x0 - x0_before). x0_before becomes this step's x0, in place.
        """
        x0, eps = self.invert(x, t, out)
        alpha, sigma = self.path(s)
        alpha_t, sigma_t = self.path(t.clamp(min=0))
        if x0_before is not None:
            lam, lam_t, lam_before = ((z[0] / z[1]).log() for z in ((alpha, sigma), (alpha_t, sigma_t),
                                                                    self.path(before)))
            # first order where h or h_before is infinite (to clean, from pure noise) and where there was no step before
            ratio = ((lam - lam_t) / (lam_t - lam_before) / 2).nan_to_num(0, 0, 0)
            change = ratio * (x0 - x0_before)
            x0_before.copy_(x0)
            x0, eps = x0 + change, eps - alpha_t / sigma_t * change
        new = alpha * x0 + sigma * eps
        if eta:
            fresh = eta * sigma / sigma_t * (sigma_t ** 2 - (alpha_t / alpha * sigma) ** 2).clamp(min=0).sqrt()
            new = alpha * x0 + (sigma ** 2 - fresh ** 2).clamp(min=0).sqrt() * eps + fresh * noise
        return torch.where((t != s)[..., None, None, None], new, x)

    @torch.no_grad()
    def sample(self, model, context, action, num_frames, num_steps, schedule='sequential', stabilization=0.02, eta=0.0,
               noise=None, context_noise=None, history=None, progress=None, cache=True, solver='ddim', grid='linear'):
        """Dream: continue context [B,K,C,H,W] to num_frames frames under action [B,num_frames,A] (or None).

        Frames beyond the model's window slide it: the last `history` frames (default: all but one of the window)
        become the context of one new frame, whatever the schedule. Known frames are shown slightly noised, to timestep
        round(stabilization * (T-1)), so that small errors of the dream look like noise to the model.
        A context of one row is shared by all rows of action (equal as far as they lead to it, action[:, :K-1]).
        noise, context_noise: like the output, drawn when not given (context_noise may cover the context only).
        progress: called once per network evaluation. solver: ddim, or dpmpp, which is of second order.
        grid: `timesteps`'. Returns [B,num_frames,C,H,W], the context untouched.

        cache=True gives the same frames for less: in a causal model a finished frame looks the same for good, so a step
        runs only the frames it moves, and before them those just finished, once, to remember their keys and values. A
        window that slid starts anew: its frames have other places, and the oldest they saw is gone. cache=False, and
        any model that sees the future, runs the whole window at every step.
        """
        B = max(len(context), 1 if action is None else len(action))
        K, window, shared = context.shape[1], model.config.num_frames, len(context) < B
        history = history or window - 1
        if not 1 <= history < window:
            raise ValueError(f'history={history}: expected 1 to {window - 1}, as the model sees {window} frames')
        if not 0 <= stabilization <= 1:
            raise ValueError(f'stabilization={stabilization}: expected 0 to 1, a share of the timesteps')
        if solver not in ('ddim', 'dpmpp') or solver == 'dpmpp' and eta:
            raise ValueError(f'solver={solver!r}, eta={eta}: expected ddim, or dpmpp with eta=0')
        if shared and not (action[:, :K - 1] == action[:1, :K - 1]).all():
            raise ValueError('a context of one row is shared: action[:, :K-1], which leads to it, must be too')
        x = torch.randn(B, num_frames, *context.shape[2:], device=context.device) if noise is None else noise.clone()
        fixed = torch.randn_like(x)  # a frame that became context is noised once, always with the same noise
        if context_noise is not None:
            fixed[:, :context_noise.shape[1]] = context_noise
        if shared:
            fixed[:, :K] = fixed[:1, :K]
        x[:, :K] = context
        cache = model.new_cache(B) if cache and model.config.causal else None
        level = round(stabilization * (self.num_timesteps - 1)) if stabilization else -1
        grid = self.timesteps(num_steps, grid)
        while K < num_frames:
            start = 0 if K < window else K - history
            end = min(window, num_frames) if K < window else K + 1
            # without a cache the model also sees the window's frames whose turn has not come
            frames = slice(start, end if cache else min(start + window, num_frames))
            matrix = schedule_matrix(schedule, end - start, K - start, num_steps, self.num_timesteps, grid)
            matrix = F.pad(matrix, (0, frames.stop - end), value=self.num_timesteps - 1)
            x[:, K:end] = self._denoise(model, x[:, frames].clone(), fixed[:, frames],
                                        action if action is None else action[:, frames], K - start, matrix, level, eta,
                                        solver, cache, shared, progress)[:, K - start:end - start]
            K, shared = end, False
        return x

    def _denoise(self, model, x, fixed, action, known, matrix, level, eta, solver, cache, shared, progress):
        """Denoise the frames of one window after its first `known`, following the rows of a schedule matrix."""
        rows, places = matrix.to(x.device), torch.arange(x.shape[1], device=x.device)
        shown = rows.clone()
        shown[:, :known] = level
        x[:, :known] = self.add_noise(x[:, :known], shown[:1, :known], fixed[:, :known])
        x0 = torch.zeros_like(x) if solver == 'dpmpp' else None
        done = 0  # so many frames are in the cache as they will stay
        few = len(places)
        if cache and x.device.type == 'cpu':
            few = max(1, CPU_PATCHES // (len(x) * math.prod(model.config.grid)))
        if cache and shared:
            one, done = model.new_cache(1), known
            model(x[:1, :known], shown[:1, :known], action[:1], one, places[:known], skip=known)
            for all_rows, row in zip(sum(cache, []), sum(one, []), strict=True):
                all_rows.copy_(row)
        for i, (t, s) in enumerate(zip(matrix, matrix[1:], strict=False)):
            if torch.equal(t, s):  # there are more steps than timesteps
                continue
            low, high = int((t >= 0).nonzero()[0]), int((t != s).nonzero()[-1]) + 1  # clean | these move | not yet
            move, now, after = slice(low, high), rows[i:i + 1], rows[i + 1:i + 2]
            if cache:
                while low - done > few:
                    run, done = slice(done, done + few), done + few
                    model(x[:, run], shown[i:i + 1, run], action, cache, places[run], skip=few)
                run = slice(done, high)
                out = model(x[:, run], shown[i:i + 1, run], action, cache, places[run], skip=low - done)
                done = low
            else:
                out = model(x, shown[i:i + 1].expand(len(x), -1), action)[:, move]
            x[:, move] = self.step(x[:, move], now[:, move], after[:, move], out.float(), eta,
                                   torch.randn_like(x[:, move]) if eta else None,
                                   rows[max(i - 1, 0)][None, move], x0 if x0 is None else x0[:, move])
            if progress:
                progress()
        return x
