"""Truths about sampling for less: the cached path, the second-order solver, the grids, and bench.py."""
import math
from types import SimpleNamespace

import pytest
import torch
from test_diffusion import PREDS
from test_model import tiny

from diffusion import SCHEDULES, Diffusion
from model import INJECTIONS


def roll(model, d, cache, num_frames=4, context=1, steps=3, seed=0, **options):
    """A rollout of two clips whose every draw comes from `seed`."""
    g = torch.Generator().manual_seed(seed)
    x, action = torch.randn(2, num_frames, 3, 8, 12, generator=g), torch.randn(2, num_frames, 3, generator=g)
    torch.manual_seed(seed)
    return d.sample(model, x[:, :context], action, num_frames, steps, noise=x.flip(0), cache=cache, **options)


def assert_cached_equals_plain(model, d, **options):
    cached, plain = (roll(model, d, cache, **options) for cache in (True, False))
    assert torch.isfinite(plain).all() and not torch.equal(cached, plain)  # it did take another way
    assert (cached - plain).abs().max() <= 1e-4 * plain.abs().max().clamp(min=1)


@pytest.mark.parametrize('pred', PREDS)
@pytest.mark.parametrize('injection', INJECTIONS)
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_cached_equals_plain(schedule, injection, pred):
    assert_cached_equals_plain(tiny(injection=injection), Diffusion(pred), schedule=schedule, num_frames=5)


@pytest.mark.parametrize('options', [
    dict(context=2), dict(context=3), dict(num_frames=9, history=1), dict(num_frames=9, history=2),
    dict(num_frames=7, context=5), dict(stabilization=0.0), dict(stabilization=0.3), dict(eta=1.0),
    dict(schedule='pyramid', eta=0.5, num_frames=6), dict(steps=1), dict(solver='dpmpp', steps=5),
    dict(solver='dpmpp', grid='logsnr', schedule='pyramid', num_frames=6)], ids=str)
@pytest.mark.parametrize('injection', ['additive', 'cross_attention'])
def test_cached_equals_plain_under(options, injection):
    assert_cached_equals_plain(tiny(injection=injection), Diffusion('v'), **options)


@pytest.mark.parametrize('context', [4, 5])
def test_cached_equals_plain_when_frames_enter_a_few_at_a_time(monkeypatch, context):
    model = tiny(injection='cross_attention', num_frames=7)
    monkeypatch.setattr('cache.CPU_PATCHES', 2 * 2 * model.pos_embed.shape[1])  # two frames of two clips
    assert_cached_equals_plain(model, Diffusion('v'), num_frames=11, context=context)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_cached_equals_plain_when_a_grid_is_finer_than_the_timesteps(schedule):
    assert_cached_equals_plain(tiny(), Diffusion('v', num_timesteps=5), schedule=schedule, steps=8, eta=1.0)


@pytest.mark.parametrize('context', [1, 2])
def test_a_shared_context_equals_a_repeated_one(context):
    model, d = tiny(injection='cross_attention'), Diffusion('x')
    x, action = torch.randn(3, 6, 3, 8, 12), torch.randn(3, 6, 3)
    x[:, :context], action[:, :context - 1] = x[:1, :context], action[:1, :context - 1]
    dream = lambda rows, cache: d.sample(model, x[:rows, :context], action, 6, 3, noise=x, cache=cache,  # noqa: E731
                                         context_noise=x)
    repeated = dream(3, False)
    for cache in (True, False):
        assert torch.allclose(dream(1, cache), repeated, atol=1e-4)
    if context > 1:
        action[1, 0] += 1
        with pytest.raises(ValueError, match='shared'):
            dream(1, True)


@pytest.mark.parametrize('schedule, seen, moved', [
    # three new frames of three steps, one given; then each of two more in a window that slid, after three known ones
    ('sequential', 1 + 2 + 2 * 3, 9 + 2 * 3), ('full_sequence', 1 + 2 * 3, 9 + 2 * 3),
    ('pyramid', 1 + 2 + 2 * 3, 9 + 2 * 3)])
def test_no_frame_runs_more_often_than_it_must(schedule, seen, moved):
    model, runs = tiny(), []

    def count(module, args, kwargs):
        runs.append((len(args[0][0]), kwargs['skip']))

    model.register_forward_pre_hook(count, with_kwargs=True)
    roll(model, Diffusion('v'), True, num_frames=6, schedule=schedule)
    assert sum(skip for _, skip in runs) == seen  # a frame that is done only enters the cache, once a window
    assert sum(n - skip for n, skip in runs) == moved  # a frame that is not runs once a step


@pytest.mark.parametrize('pred', PREDS)
def test_dpmpp_is_of_second_order(pred):
    """On Gaussian data, where the best denoiser and the way from noise to x0 are known in closed form."""
    d, std, T = Diffusion(pred, num_timesteps=100_000).double(), 0.5, 100_000  # so fine that rounding t spoils nothing
    if pred != 'flow':
        angle = torch.arange(T + 1) / (T + 1) * math.pi / 2
        d.alpha, d.sigma = angle.double().cos(), angle.double().sin()

    def model(x, t, action):
        alpha, sigma = d.path(t)
        x0 = alpha * std ** 2 / (alpha ** 2 * std ** 2 + sigma ** 2) * x
        return d.target(x0, t, (x - alpha * x0) / sigma)

    model.config = SimpleNamespace(num_frames=2, causal=False)
    noise = torch.ones(1, 2, 1, 1, 1, dtype=torch.float64)
    exact = std / (d.alpha[-1] ** 2 * std ** 2 + d.sigma[-1] ** 2).sqrt()
    error = lambda solver, steps: (d.sample(model, 0 * noise[:, :1], None, 2, steps, noise=noise,  # noqa: E731
                                            solver=solver, grid='logsnr')[0, 1] - exact).abs().item()
    assert 1.8 < error('ddim', 64) / error('ddim', 128) < 2.2
    assert 3.5 < error('dpmpp', 64) / error('dpmpp', 128) < 4.5
    assert error('dpmpp', 1) == pytest.approx(error('ddim', 1))  # one step has no step before it


@pytest.mark.parametrize('pred', PREDS)
def test_grids_fall_from_noise_to_clean(pred):
    d = Diffusion(pred)
    for grid in ('linear', 'logsnr'):
        for steps in (1, 2, 3, 7, 50, 999, 1000):
            t = d.timesteps(steps, grid)
            assert len(t) == steps + 1 and t[0] == 999 and t[-1] == -1 and (t.diff() < 0).all()


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match='grid'):
        roll(tiny(), Diffusion('v'), True, grid='cosine')


def test_a_model_that_sees_the_future_takes_the_plain_way():
    model, d = tiny(causal=False), Diffusion('v')
    assert torch.equal(roll(model, d, True, num_frames=6), roll(model, d, False, num_frames=6))


def test_an_unknown_solver_is_refused():
    for options in (dict(solver='heun'), dict(solver='dpmpp', eta=1.0)):
        with pytest.raises(ValueError, match='solver'):
            roll(tiny(), Diffusion('v'), True, **options)


@pytest.mark.parametrize('injection', INJECTIONS)
def test_no_linear_layer_is_given_a_view_of_patches(monkeypatch, injection):
    """Without gradients it would multiply every row by a copy of its weight, and in bf16 take three times as long."""
    seen, linear = [], torch.nn.functional.linear

    def watched(x, *parameters):
        if x.ndim == 4:  # patches: the others are small
            seen.append(x.is_contiguous())
        return linear(x, *parameters)

    monkeypatch.setattr(torch.nn.functional, 'linear', watched)
    with torch.no_grad():
        roll(tiny(injection=injection), Diffusion('x'), cache=True, num_frames=6)
    assert seen
    assert all(seen)


def test_a_compiled_model_dreams_the_same():
    model, d = tiny(), Diffusion('x')
    compiled = torch.compile(model, backend='eager')  # traced, but not translated to C++: that takes minutes
    with torch.no_grad():
        dreams = [roll(m, d, cache=True, num_frames=6) for m in (model, compiled)]
    assert torch.allclose(*dreams, atol=1e-5)
