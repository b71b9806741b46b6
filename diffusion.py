"""Diffusion with one noise level per frame: noising, the loss, and turning noise into video.

For every prediction target the path is  x_t = alpha_t * x0 + sigma_t * eps  and the network is asked
for  a * x0 + b * eps, so noising, target, inversion and step are each written once. Timesteps run
from 0 (almost clean) to T-1 (noise); -1 is exactly clean. Every frame of a clip has its own.

Read `Diffusion.loss`, then `Diffusion.sample` and the loop in `Diffusion.denoise`.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn

from cache import CachedModel, PlainModel
from configurator import UserError, check_choice
from dpmpp import dpmpp_step, log_snr_grid

# -----------------------------------------------------------------------------
# noise schedules: how much signal and how much noise there is at each timestep


def variance_preserving(beta, zero_terminal_snr):
    """(alpha, sigma) [T] with alpha^2 + sigma^2 = 1, from the noise beta [T] each timestep adds."""
    alpha = torch.cumprod(1 - beta, dim=0).sqrt()
    if zero_terminal_snr:  # keeps alpha[0], moves alpha[-1] to 0 (Lin et al. 2023, algorithm 1)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha, (1 - alpha ** 2).sqrt()


def linear(T, zero_terminal_snr):
    """Ho et al. 2020."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return variance_preserving(beta, zero_terminal_snr)


def squared_cosine(T, zero_terminal_snr):
    """Nichol & Dhariwal 2021."""
    s = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return variance_preserving(beta, zero_terminal_snr)


def straight(T, zero_terminal_snr):
    """Flow matching (Lipman et al. 2023): a straight line from data to noise, which is at T-1."""
    sigma = torch.arange(1, T + 1, dtype=torch.float64) / T
    return 1 - sigma, sigma


NOISE_SCHEDULES = {'linear': linear, 'squaredcos_cap_v2': squared_cosine, 'straight': straight}


class Target(NamedTuple):
    """What the network predicts, and with which noise."""
    coefficients: Callable  # (alpha, sigma) -> (a, b): it is asked for a * x0 + b * eps
    noise_schedule: str  # its native one
    zero_terminal_snr: bool  # natively
    fixed: bool = False  # it works with the native ones only
    min_snr: bool = True  # the loss is weighted by min(SNR, gamma) / SNR


TARGETS = {  # alpha * b - sigma * a must not be 0 where there is noise: x0 and eps are recovered from it
    'epsilon': Target(lambda alpha, sigma: (0, 1), 'linear', False, fixed=True),
    'x': Target(lambda alpha, sigma: (1, 0), 'squaredcos_cap_v2', True),
    'v': Target(lambda alpha, sigma: (-sigma, alpha), 'squaredcos_cap_v2', True),
    'flow': Target(lambda alpha, sigma: (1, -1), 'straight', False, min_snr=False),
}

TIMESTEP_SAMPLING = ('logit_normal', 'uniform')

# -----------------------------------------------------------------------------
# sampling schedules: which frame is denoised when

SCHEDULES = ('sequential', 'full_sequence', 'pyramid')


def schedule_matrix(schedule, num_frames, num_context, grid):
    """Timesteps [rows, num_frames]; each denoising step goes from one row to the next.

    full_sequence denoises all frames together, sequential one after the other; in pyramid each frame
    is one step behind the one before it. One context frame, two dreamed, the grid (999, 499, -1):

        pyramid    -1  999  999        sequential    -1  999  999
                   -1  499  999                      -1  499  999
                   -1   -1  499                      -1   -1  999
                   -1   -1   -1                      -1   -1  499
                                                     -1   -1   -1
    """
    num_steps = len(grid) - 1
    delay = {'full_sequence': 0, 'pyramid': 1, 'sequential': num_steps}[schedule]
    start = delay * torch.arange(num_frames - num_context)  # the row in which each frame begins
    steps_taken = torch.arange(num_steps + int(start[-1]) + 1)[:, None] - start
    matrix = torch.full((len(steps_taken), num_frames), -1)
    matrix[:, num_context:] = grid[steps_taken.clamp(0, num_steps)]
    return matrix


@dataclass
class Sampler:
    """How to get from noise to video: the options of Diffusion.sample."""
    num_steps: int  # per frame
    schedule: str = 'sequential'  # one of SCHEDULES
    stabilization: float = 0.02  # how noisy context is shown, as a share of the timesteps
    solver: str = 'ddim'  # one of SOLVERS
    eta: float = 0.0  # of ddim: 0 is deterministic, 1 is DDPM
    grid: str = 'linear'  # a frame's timesteps: evenly spaced in t, or in log-SNR (logsnr)
    history: int = 0  # frames kept as context when the window slides; 0 is all but one
    cache: bool = True  # remember finished frames; False runs the whole window at every step
    progress: Callable = None  # called after every denoising step

    def __post_init__(self):
        check_choice('schedule', self.schedule, SCHEDULES)
        check_choice('solver', self.solver, SOLVERS)
        check_choice('grid', self.grid, ('linear', 'logsnr'))
        if not 0 <= self.stabilization <= 1:
            raise UserError(f'stabilization={self.stabilization}: expected 0 to 1')
        if self.eta and self.solver != 'ddim':
            raise UserError(f'solver={self.solver!r}, eta={self.eta}: only ddim can add noise')

    def kept(self, window):
        """How many frames stay as context when the window slides. Raises UserError."""
        history = self.history or window - 1
        if not 1 <= history < window:
            raise UserError(f'history={history}: expected 1 to {window - 1}, '
                            f'as the model sees {window} frames')
        return history


# -----------------------------------------------------------------------------

class Diffusion(nn.Module):
    """A prediction target with its noise schedule: two tables, alpha and sigma, and no weights.

    pred_name: one of TARGETS. noise_schedule, zero_terminal_snr: None for the target's native ones.
    snr_gamma: the loss weight is min(SNR, gamma) / SNR; 0 turns it off, and flow never uses it.
    """

    def __init__(self, pred_name='v', noise_schedule=None, zero_terminal_snr=None,
                 num_timesteps=1000, snr_gamma=5.0):
        super().__init__()
        check_choice('pred_name', pred_name, TARGETS)
        target = TARGETS[pred_name]
        noise_schedule = noise_schedule or target.noise_schedule
        check_choice('noise_schedule', noise_schedule, NOISE_SCHEDULES)
        if zero_terminal_snr is None:
            zero_terminal_snr = target.zero_terminal_snr
        native = target.noise_schedule, target.zero_terminal_snr
        if target.fixed and (noise_schedule, zero_terminal_snr) != native:
            raise UserError(f'pred_name={pred_name} needs noise_schedule={native[0]} and '
                            f'zero_terminal_snr={native[1]}: where next to no signal is left, '
                            'x0 cannot be recovered from the noise')
        if target.noise_schedule == 'straight':
            noise_schedule = 'straight'  # flow is its path, whatever else is asked for
        self.num_timesteps = num_timesteps
        self.coefficients = target.coefficients
        self.snr_gamma = snr_gamma if target.min_snr else 0.0
        alpha, sigma = NOISE_SCHEDULES[noise_schedule](num_timesteps, zero_terminal_snr)
        self.alphas_cumprod = alpha ** 2
        # entry 0 of the tables is t = -1: all signal and no noise
        alpha, sigma = nn.functional.pad(alpha, (1, 0), value=1.0), nn.functional.pad(sigma, (1, 0))
        self.register_buffer('alpha', alpha.float(), persistent=False)
        self.register_buffer('sigma', sigma.float(), persistent=False)

    # the path and the target

    def path(self, t):
        """alpha, sigma [B,F,1,1,1] at integer timesteps t [B,F]."""
        i = (t + 1)[..., None, None, None]
        return self.alpha[i], self.sigma[i]

    def add_noise(self, x0, t, noise):
        """x_t: frames x0 [B,F,...] at timesteps t [B,F]."""
        alpha, sigma = self.path(t)
        return alpha * x0 + sigma * noise

    def target(self, x0, t, noise):
        """What the network should say."""
        a, b = self.coefficients(*self.path(t))
        return a * x0 + b * noise

    def invert(self, x_t, t, out):
        """(x0, eps) from x_t = alpha x0 + sigma eps and the network's out = a x0 + b eps.

        A clean frame is read as t=0, as the model is shown it: so the x target divides by no zero.
        """
        alpha, sigma = self.path(t.clamp(min=0))
        a, b = self.coefficients(alpha, sigma)
        det = alpha * b - sigma * a  # epsilon: alpha, x: -sigma, flow: -1, v: 1 (alpha^2 + sigma^2)
        return (b * x_t - sigma * out) / det, (alpha * out - a * x_t) / det

    # training

    def sample_timesteps(self, shape, sampling='logit_normal', mean=0.0, std=1.0, per_clip=False,
                         generator=None):
        """Training timesteps [B,F], drawn for each frame, or one per clip.

        logit_normal is floor(sigmoid(N(mean, std)) * T) (Esser et al. 2024); with a std of 2.5 or
        more most frames are almost clean or almost noise, as in a rollout.
        """
        check_choice('timestep_sampling', sampling, TIMESTEP_SAMPLING)
        draw = (shape[0], 1) if per_clip else shape
        device = self.alpha.device
        if sampling == 'uniform':
            u = torch.rand(draw, device=device, generator=generator)
        else:
            u = torch.sigmoid(torch.randn(draw, device=device, generator=generator) * std + mean)
        t = (u * self.num_timesteps).long()
        return t.clamp(max=self.num_timesteps - 1).expand(shape)

    def with_clean_history(self, t, share, max_level, generator=None):
        """Timesteps t [B,F] in which a share of the clips begin with an almost clean history.

        Their first 1 to F-1 frames get timesteps below max_level * T, as in a rollout. Drawn frame by
        frame, a longer history is hardly ever clean as a whole.
        """
        B, F = t.shape
        known = torch.randint(1, F, (B, 1), device=t.device, generator=generator)
        chosen = torch.rand(B, 1, device=t.device, generator=generator) < share
        clean = torch.rand(B, F, device=t.device, generator=generator) * max_level * self.num_timesteps
        history = torch.arange(F, device=t.device) < known
        return torch.where(chosen & history, clean.long(), t)

    def loss(self, model, x0, action=None, t=None, noise=None):
        """Mean squared error of the target, each frame weighted by its own timestep.

        x0 [B,F,C,H,W], action [B,F,A]; t [B,F] and noise like x0 are drawn when not given.
        """
        if t is None:
            t = self.sample_timesteps(x0.shape[:2])
        if noise is None:
            noise = torch.randn_like(x0)
        out = model(self.add_noise(x0, t, noise), t, action)
        error = (out.float() - self.target(x0, t, noise)) ** 2
        return (error.mean(dim=(2, 3, 4)) * self.loss_weight(t)).mean()

    def loss_weight(self, t):
        """min(SNR, gamma) / SNR at timesteps t [B,F]: less for frames that are almost clean anyway.

        Hang et al. 2023 use this weight for epsilon only. Theirs for v is 0 at T-1, where every rollout
        starts (zero terminal SNR), so we use this one for all.
        """
        if not self.snr_gamma:
            return torch.ones_like(t)
        alpha, sigma = self.alpha[t + 1], self.sigma[t + 1]
        return (self.snr_gamma * sigma ** 2 / alpha.clamp(min=1e-8) ** 2).clamp(max=1)

    # sampling

    def timesteps(self, num_steps, grid='linear'):
        """A frame's way from noise to clean: num_steps + 1 integers from T-1 down to -1, T + 1 at most."""
        if grid == 'logsnr':
            return log_snr_grid(self, num_steps)
        if num_steps < 1:
            raise UserError(f'num_steps={num_steps}: expected 1 or more')
        even = torch.linspace(-1, self.num_timesteps - 1, num_steps + 1, dtype=torch.float64)
        return even.long().unique().flip(0)

    def ddim_step(self, x, t, s, out, previous=None, eta=0.0):
        """From timesteps t [B,F] to s: DDIM (Song et al. 2021), for flow Euler's step. Returns (x_s, x0).

        The network's guess of x0 is mixed again with its guess of the noise, at the lower level s; the
        next guess is better. eta replaces some of that noise by fresh (eq. 16, in alpha and sigma).
        """
        x0, eps = self.invert(x, t, out)
        alpha, sigma = self.path(s)
        x_s = alpha * x0 + sigma * eps
        if eta:
            alpha_t, sigma_t = self.path(t.clamp(min=0))
            removed = (sigma_t ** 2 - (alpha_t / alpha * sigma) ** 2).clamp(min=0).sqrt()
            fresh = eta * sigma / sigma_t * removed
            old = (sigma ** 2 - fresh ** 2).clamp(min=0).sqrt()
            x_s = alpha * x0 + old * eps + fresh * torch.randn_like(x)
        stays = (t == s)[..., None, None, None]
        return torch.where(stays, x, x_s), x0

    @torch.no_grad()
    def sample(self, model, context, action, num_frames, num_steps, noise=None, context_noise=None,
               **options):
        """Dream: continue context [B,K,C,H,W] to num_frames frames under action [B,num_frames,A].

        Beyond the model's window of F frames, the last `history` frames become the context of one new
        frame, again and again, whatever the schedule (F = 4, one context frame, history 3):

            frames 0-3: c d d d     frames 1-4: c c c d     frames 2-5: c c c d     ...

        A context of one row may serve many rows of action, which are then equal as far as they lead
        to it. action may be None. noise, context_noise: like the output, drawn when not given
        (context_noise may cover the context only). options: Sampler's. Returns [B,num_frames,C,H,W],
        the context untouched.
        """
        sampler = Sampler(num_steps, **options)
        batch = len(context) if action is None else max(len(context), len(action))
        known, window = context.shape[1], model.config.num_frames
        history = sampler.kept(window)
        shared = len(context) < batch
        if shared and not (action[:, :known - 1] == action[:1, :known - 1]).all():
            raise UserError('a context of one row is shared: the actions that lead to it, '
                            'action[:, :K-1], must be too')

        if noise is None:
            noise = torch.randn(batch, num_frames, *context.shape[2:], device=context.device)
        x = noise.clone()
        x[:, :known] = context
        # a frame has the same noise in every window of which it is context
        context_noises = torch.randn_like(x)
        if context_noise is not None:
            context_noises[:, :context_noise.shape[1]] = context_noise
        if shared:
            context_noises[:, :known] = context_noises[:1, :known]

        cached = sampler.cache and model.config.causal
        net = CachedModel(model, shared) if cached else PlainModel(model)
        while known < num_frames:
            if known < window:  # the first window: all that fits is dreamed
                frames = slice(0, min(window, num_frames))
            else:  # it slides: the last frames, and one new
                frames = slice(known - history, known + 1)
            num_context = known - frames.start
            acted = None if action is None else action[:, frames]
            levels = self.context_levels(num_context, sampler)
            net.new_window()
            clip = self.denoise(net, x[:, frames], acted, levels, context_noises[:, frames], sampler)
            x[:, known:frames.stop] = clip[:, num_context:]
            known = frames.stop
        return x

    def context_levels(self, num_context, sampler):
        """Timesteps [1,K] at which context is shown: slightly noised, and the model is told so.

        What was dreamed before the window slid is not quite right; this makes its faults look like
        noise. Frames dreamed in the window itself are shown as they are, as the reference does.
        """
        level = -1
        if sampler.stabilization:
            level = round(sampler.stabilization * (self.num_timesteps - 1))
        return torch.full((1, num_context), level, device=self.alpha.device)

    def denoise(self, net, x, action, levels, context_noise, sampler):
        """Denoise the frames of one window x [B,F,C,H,W] after its K context frames.

        net: a PlainModel or CachedModel. levels: timesteps [1,K] at which the context is shown.
        context_noise [B,K or more,C,H,W]: what it is noised with. Returns all F, the context noised.
        """
        K = levels.shape[1]
        grid = self.timesteps(sampler.num_steps, sampler.grid)
        matrix = schedule_matrix(sampler.schedule, x.shape[1], K, grid)
        timesteps = matrix.to(x.device)  # matrix stays on the CPU, where reading it waits for nothing
        shown = timesteps.clone()  # what the model is told: its context is slightly noised
        shown[:, :K] = levels
        context = self.add_noise(x[:, :K], levels, context_noise[:, :K])
        x = torch.cat([context, x[:, K:]], dim=1)
        x0 = torch.zeros_like(x)
        step = SOLVERS[sampler.solver]
        for i in range(len(matrix) - 1):
            moves = (matrix[i] != matrix[i + 1]).nonzero()  # frames neither clean nor waiting
            moving = slice(int(moves[0]), int(moves[-1]) + 1)
            t, s = timesteps[i:i + 1, moving], timesteps[i + 1:i + 2, moving]
            out = net(x, shown[i:i + 1], action, moving).float()
            before = max(i - 1, 0)
            previous = timesteps[before:before + 1, moving], x0[:, moving]
            x[:, moving], x0[:, moving] = step(self, x[:, moving], t, s, out, previous, sampler.eta)
            if sampler.progress:
                sampler.progress()
        return x


# (diffusion, x, t, s, out, previous, eta) -> (x_s, x0)
# previous: each frame's timestep [1,F] and x0 [B,F,C,H,W] one step ago, which ddim has no use for
SOLVERS = {'ddim': Diffusion.ddim_step, 'dpmpp': dpmpp_step}
