"""Fewer denoising steps for the same video: DPM-Solver++(2M), and the grid of timesteps that suits it.

Lu et al. 2022 (arXiv 2211.01095). Both reckon in lambda = log(alpha / sigma), half the log-SNR, in
which the path from noise to data is smooth. `diffusion` is a Diffusion.
"""
import torch

from configurator import UserError


def log_snr(diffusion, t):
    """lambda [B,F,1,1,1] at timesteps t [B,F]; infinite at -1, where nothing is noise."""
    alpha, sigma = diffusion.path(t)
    return (alpha / sigma).log()


def dpmpp_step(diffusion, x, t, s, out, previous, eta=0.0):
    """From timesteps t [B,F] to lower s, of second order (algorithm 2). Returns (x_s, x0) as ddim_step.

    It is DDIM with x0 extrapolated: D = x0 + h / (2 h_before) (x0 - x0_before), h a step in lambda.
    previous: (timesteps, x0) of each frame's step before this one; timesteps == t if there was none.
    """
    x0, eps = diffusion.invert(x, t, out)
    t_before, x0_before = previous
    shown = t.clamp(min=0)
    h = log_snr(diffusion, s) - log_snr(diffusion, shown)
    h_before = log_snr(diffusion, shown) - log_snr(diffusion, t_before)
    # first order where a step is infinite (to clean, from pure noise) or none came before
    ratio = (h / h_before / 2).nan_to_num(0, 0, 0)
    change = ratio * (x0 - x0_before)
    alpha_t, sigma_t = diffusion.path(shown)
    alpha, sigma = diffusion.path(s)
    return alpha * (x0 + change) + sigma * (eps - alpha_t / sigma_t * change), x0


def log_snr_grid(diffusion, num_steps):
    """Timesteps [num_steps + 1] from T-1 down to -1, strictly decreasing, evenly spaced in lambda.

    They go from the lambda of T-1 (or minus that of t=0, if later: without any signal it is -inf)
    to that of t=0, which is taken as clean.
    """
    T = diffusion.num_timesteps
    if not 1 <= num_steps <= T:
        raise UserError(f'num_steps={num_steps}: grid=logsnr has 1 to {T}')
    lam = (diffusion.alpha / diffusion.sigma).log()[1:].double().cpu()  # decreasing
    wanted = torch.linspace(max(lam[-1], -lam[0]), lam[0], num_steps + 1, dtype=torch.float64)
    t = [(lam - w).abs().argmin().item() for w in wanted]
    t[0], t[-1] = T - 1, -1
    for i in range(1, num_steps):  # rounding may let two meet: leave room for those that follow
        t[i] = max(min(t[i], t[i - 1] - 1), num_steps - 1 - i)
    return torch.tensor(t)
