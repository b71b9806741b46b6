"""Truths about sampling for less: the cached path, the second-order solver, the grids, and bench.py."""
import json

import pytest
import torch
from conftest import run
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
    assert_cached_equals_plain(tiny(injection=injection), Diffusion(pred), schedule=schedule, num_frames=6)


@pytest.mark.parametrize('options', [
    dict(context=2), dict(context=3), dict(num_frames=9, history=1), dict(num_frames=9, history=2),
    dict(num_frames=7, context=5), dict(stabilization=0.0), dict(stabilization=0.3), dict(eta=1.0),
    dict(schedule='pyramid', eta=0.5, num_frames=6), dict(steps=1), dict(solver='dpmpp', steps=5),
    dict(solver='dpmpp', grid='logsnr', schedule='pyramid', num_frames=6), dict(steps=1003, num_frames=2)], ids=str)
@pytest.mark.parametrize('injection', ['additive', 'cross_attention'])
def test_cached_equals_plain_under(options, injection):
    assert_cached_equals_plain(tiny(injection=injection), Diffusion('v'), **options)
