"""Truths about diffusion: inverses, weights, timestep distributions, and rollouts of any length."""
import pytest
import torch
from test_model import inputs, tiny

from diffusion import SCHEDULES, Diffusion

PREDS = ('epsilon', 'x', 'v', 'flow')


@pytest.mark.parametrize('pred', PREDS)
def test_inversion_recovers_x0_and_eps_from_the_target(pred):
    d = Diffusion(pred)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1, 1000, 3, 4, 4, generator=g), torch.randn(1, 1000, 3, 4, 4, generator=g)
    t = torch.arange(1000)[None]
    x_t = d.add_noise(x0, t, eps)
    x0_hat, eps_hat = d.invert(x_t, t, d.target(x0, t, eps))
    alpha, sigma = d.path(t)
    # a recovered value is as exact as float32 leaves it after division by what there was of it
    assert ((x0_hat - x0).abs() * alpha).max() < 1e-5 and ((eps_hat - eps).abs() * sigma).max() < 1e-5


def test_clean_is_exactly_clean_and_zero_terminal_snr_is_exactly_noise():
    d = Diffusion('v')
    x0, eps = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    x_t = d.add_noise(x0, torch.tensor([[-1, 999]]), eps)
    assert torch.equal(x_t[:, 0], x0[:, 0]) and torch.equal(x_t[:, 1], eps[:, 1])


def test_epsilon_without_terminal_signal_is_refused():
    for options in (dict(noise_schedule='squaredcos_cap_v2'), dict(zero_terminal_snr=True)):
        with pytest.raises(ValueError, match='epsilon needs noise_schedule=linear'):
            Diffusion('epsilon', **options)


def test_each_frame_is_weighted_by_its_own_snr():
    d = Diffusion('v', snr_gamma=5.0)
    x0, t = torch.zeros(1, 2, 1, 2, 2), torch.tensor([[3, 900]])
    noise = torch.ones_like(x0)
    model = lambda x, t, a: torch.zeros_like(x)  # noqa: E731
    ab = d.alphas_cumprod[t[0]]
    snr = ab / (1 - ab)
    want = (ab * torch.clamp(snr, max=5) / snr).mean()  # the error of v is alpha * noise
    assert torch.allclose(d.loss(model, x0, t=t, noise=noise).double(), want)


def test_timestep_samplers():
    d = Diffusion('v')
    uniform = d.sample_timesteps((4000, 4), 'uniform').float()
    normal = d.sample_timesteps((4000, 4)).float()
    wide = d.sample_timesteps((4000, 4), std=2.5)
    clip = d.sample_timesteps((50, 4), per_clip=True)
    assert abs(uniform.mean() - 500) < 15 and abs(uniform.std() - 289) < 10
    assert abs(normal.mean() - 500) < 15 and abs(normal.std() - 208) < 10  # of a logit-normal (0, 1)
    assert wide.min() >= 0 and wide.max() <= 999 and wide.float().std() > 330
    assert (clip == clip[:, :1]).all() and not (normal == normal[:, :1]).all()
    with pytest.raises(ValueError, match='timestep_sampling'):
        d.sample_timesteps((1, 1), 'normal')


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('num_frames', [3, 9])
def test_a_rollout_is_determined_by_its_noise(schedule, num_frames):
    model, d = tiny(), Diffusion('v')
    x = torch.randn(2, num_frames, 3, 8, 12)
    action = torch.randn(2, num_frames, 3)
    roll = lambda **o: d.sample(model, x[:, :2], action, num_frames, 3, schedule=schedule, noise=x, context_noise=x,  # noqa: E731
                                **o)
    first = roll()
    assert first.shape == x.shape and torch.equal(first[:, :2], x[:, :2]) and torch.isfinite(first).all()
    assert torch.equal(first, roll())
    assert not torch.allclose(first, roll(history=2)) or num_frames == 3
    assert torch.isfinite(roll(eta=1.0)).all()


def test_a_sliding_window_starts_like_the_short_rollout():
    model, d = tiny(), Diffusion('x')
    x, action = torch.randn(2, 7, 3, 8, 12), torch.randn(2, 7, 3)
    long = d.sample(model, x[:, :1], action, 7, 3, noise=x, context_noise=x)
    short = d.sample(model, x[:, :1], action[:, :4], 4, 3, noise=x[:, :4], context_noise=x[:, :4])
    assert torch.equal(long[:, :4], short)


def test_a_perfect_model_is_sampled_perfectly():
    truth = torch.randn(2, 4, 3, 8, 12)
    for pred in PREDS:
        d = Diffusion(pred)
        oracle = tiny()
        # an oracle that knows x0 says the target that goes with the frames it is shown
        oracle.forward = lambda x, t, a, d=d: d.target(
            truth[:, :x.shape[1]], t, (x - d.path(t)[0] * truth[:, :x.shape[1]]) / d.path(t)[1])
        out = d.sample(oracle, truth[:, :1], None, 4, 8, stabilization=0.0, cache=False)
        assert torch.allclose(out, truth, atol=1e-3), pred


def test_bad_names_are_refused():
    model, d, x = tiny(), Diffusion('v'), torch.randn(1, 1, 3, 8, 12)
    with pytest.raises(ValueError, match='pred_name'):
        Diffusion('velocity')
    with pytest.raises(ValueError, match='schedule'):
        d.sample(model, x, None, 4, 2, schedule='parallel')
    with pytest.raises(ValueError, match='history'):
        d.sample(model, x, None, 9, 2, history=4)
    with pytest.raises(ValueError, match='history'):
        d.sample(tiny(num_frames=1), x, None, 3, 2)  # no frame to go on from
    with pytest.raises(ValueError, match='num_steps'):
        d.timesteps(0)


def test_a_model_overfits_one_clip():
    model, d = tiny(randomise=False), Diffusion('x')
    x0, t, action = (z[:1] for z in inputs())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        t = d.sample_timesteps(x0.shape[:2], generator=g)
        loss = d.loss(model, x0, action, t, torch.randn(x0.shape, generator=g))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


@pytest.mark.parametrize('pred', PREDS)
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_a_ddim_step_keeps_the_marginal_variance_whatever_eta(pred, eta):
    """With x0 and eps known, x_s has signal alpha_s and noise of variance sigma_s^2."""
    d = Diffusion(pred)
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)  # of the fresh noise
    eps = torch.randn(1, 1, 1, 200, 500, generator=g)
    x0, t, s = torch.ones_like(eps), torch.tensor([[700]]), torch.tensor([[300]])
    x_s, _ = d.ddim_step(d.add_noise(x0, t, eps), t, s, d.target(x0, t, eps), eta=eta)
    alpha, sigma = d.path(s)
    assert abs(x_s.mean() - alpha.item()) < 0.01 and abs(x_s.std() / sigma.item() - 1) < 0.01
