"""Truths about the engine for playing: frame by frame, it dreams what Diffusion.sample dreams."""
import resource

import numpy as np
import pytest
import torch
from test_model import tiny

import run
from configurator import UserError
from controls import limits
from diffusion import Diffusion, Sampler
from dream import Dream, open_dream, recorded_start
from pictures import to_pixels
from vae import VAE

FRAMES = 10  # the window of `tiny` has 4: it slides six times


def drawn(seed, num_frames):
    """(noise, context noise), each [1,N,3,8,12], as a Dream draws them."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(2, 3, 8, 12, generator=generator) for _ in range(num_frames)]
    return torch.stack(draws, dim=1)[:, None]


def start(context):
    g = torch.Generator().manual_seed(1)
    return torch.rand(context, 3, 8, 12, generator=g) * 2 - 1, torch.randn(FRAMES, 3, generator=g).numpy()


def dreamed(dream, frames, actions):
    """The video that a Dream makes of all actions, uint8 [N,3,H,W]."""
    context = len(frames)
    video = [dream.reset(frames, actions[:context - 1], seed=3)]
    for action in actions[context - 1:-1]:
        video.append(dream.step(action))
    return np.stack(video)


@pytest.mark.parametrize('options', [
    dict(), dict(solver='dpmpp', num_steps=5), dict(grid='logsnr'), dict(history=1), dict(history=2),
    dict(stabilization=0.0), dict(stabilization=0.3), dict(cache=False), dict(schedule='full_sequence')], ids=str)
@pytest.mark.parametrize('context', [1, 2, 4, 6])
def test_frame_for_frame_it_is_the_rollout_of_sample(context, options):
    model, d = tiny(), Diffusion('v')
    options = dict(num_steps=3) | options
    frames, actions = start(context)
    noise, context_noise = drawn(3, FRAMES)
    expected = d.sample(model, frames[None], torch.from_numpy(actions)[None], FRAMES, noise=noise,
                        context_noise=context_noise, **options | dict(schedule='sequential'))
    video = dreamed(Dream(model, d, Sampler(**options)), frames, actions)
    pixels = to_pixels(expected[0, context - 1:]).transpose(0, 3, 1, 2)
    assert len(np.unique(pixels)) > 50
    assert abs(video.astype(int) - pixels).max() <= 1  # cached and plain sums differ in the seventh digit


@pytest.mark.parametrize('injection', ['cross_attention', 'adaln'])
@pytest.mark.parametrize('causal', [True, False])
def test_so_it_is_for_every_kind_of_model(injection, causal):
    model, d = tiny(injection=injection, causal=causal), Diffusion('x')
    frames, actions = start(2)
    noise, context_noise = drawn(3, FRAMES)
    expected = d.sample(model, frames[None], torch.from_numpy(actions)[None], FRAMES, 3, noise=noise,
                        context_noise=context_noise)
    video = dreamed(Dream(model, d, Sampler(3)), frames, actions)
    if causal:  # one that sees the future sees less of it here, until the window is full
        assert abs(video - to_pixels(expected[0, 1:]).transpose(0, 3, 1, 2).astype(int)).max() <= 1
    assert video.shape == (FRAMES - 1, 3, 8, 12) and video.dtype == np.uint8


def test_actions_are_scaled_as_in_training_and_held_for_a_frame_interval():
    model, d = tiny(action_dim=6), Diffusion('v')
    frames, _ = start(1)
    scale = [1.0, 2.0], [0.5, 4.0]
    raw = Dream(model, d, Sampler(2), action_scale=scale, interval=3)
    scaled = Dream(model, d, Sampler(2), interval=3)
    for action in ([3.0, 2.0], [0.0, -6.0]):
        raw.reset(frames)
        scaled.reset(frames)
        by_hand = (np.float32(action) - scale[0]) / scale[1]
        assert (raw.step(action) == scaled.step(np.tile(by_hand, (3, 1)))).all()
    for wrong in (1.0, [1.0], [1.0] * 3, [1.0] * 4, [1.0] * 7, [[1.0, 1.0]]):
        for dream in (raw, scaled):
            with pytest.raises(UserError, match=r'expected \[2\] or \[3, 2\]'):
                dream.step(wrong)


@pytest.mark.parametrize('count', [None, 0, 1, 3])
def test_it_starts_from_an_action_between_each_frame_and_the_next(count):
    frames, actions = start(3)
    with pytest.raises(UserError, match='expected an action between'):
        Dream(tiny(), Diffusion('v'), Sampler(2)).reset(frames, None if count is None else actions[:count])


def test_a_model_without_actions_dreams_on():
    dream = Dream(tiny(action_dim=0), Diffusion('v'), Sampler(2))
    dream.reset(start(1)[0])
    assert dream.step([]).shape == (3, 8, 12)


def test_latents_are_decoded_on_the_way():
    torch.manual_seed(0)
    vae = VAE(widths=(32, 32, 32, 32)).eval()
    dream = Dream(tiny(in_channels=4), Diffusion('v'), Sampler(2), vae)
    latents = torch.randn(1, 4, 8, 12)
    frame = dream.reset(latents.numpy().astype(np.float16))
    assert frame.shape == (3, 64, 96)
    assert (frame == to_pixels(latents.half().float(), vae)[0].transpose(2, 0, 1)).all()
    assert dream.step([0, 0, 0]).shape == (3, 64, 96)


def test_two_dreams_of_one_model_do_not_disturb_each_other():
    model, d = tiny(), Diffusion('v')
    frames, actions = start(1)
    alone = dreamed(Dream(model, d, Sampler(2)), frames, actions)
    one, other = Dream(model, d, Sampler(2)), Dream(model, d, Sampler(2))
    one.reset(frames, seed=3)
    other.reset(-frames, seed=4)
    for i, action in enumerate(actions[:-1]):
        frame = one.step(action)
        other.step(-action)
        assert (frame == alone[i + 1]).all()


def test_a_history_that_the_window_cannot_hold_is_refused():
    with pytest.raises(UserError, match='history=4'):
        Dream(tiny(), Diffusion('v'), Sampler(2, history=4)).reset(start(1)[0])


def test_nothing_grows():
    """Memory after many frames is what it was when the window first slid."""
    dream = Dream(tiny(hidden_size=8, num_heads=2, depth=2), Diffusion('v'), Sampler(1))
    dream.reset(start(1)[0])

    def held(frames):
        for _ in range(frames):
            dream.step([0.1, 0.2, 0.3])
        buffers = [b for m in dream.net.cache if m for b in (m.k, m.v)]
        buffers += [dream.frames, dream.noise, dream.actions, dream.levels]
        return sum(b.untyped_storage().nbytes() for b in buffers)

    assert held(10) == held(100)


@pytest.mark.slow
def test_ten_thousand_frames_need_the_memory_of_a_hundred():
    dream = Dream(tiny(hidden_size=8, num_heads=2, depth=2), Diffusion('v'), Sampler(1))
    dream.reset(start(1)[0])
    peak = {}
    for frame in range(1, 10_001):
        picture = dream.step([0.1, 0.2, 0.3])
        peak[frame] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert dream.age == 10_000 and picture.any()
    assert peak[10_000] - peak[1000] < 2048  # KiB: not one frame in ten could have been kept


def opened_run(ckpt):
    return run.open_run(vars(run) | dict(ckpt=ckpt, device='cpu'))


def test_a_trained_run_is_dreamed_from_recorded_starts(trained):
    opened = opened_run(trained)
    clips = opened.held_out(2)
    frames, actions = recorded_start(clips, 5)
    recorded, scaled = clips.batch([5])
    assert (frames == recorded[0].numpy()).all()
    assert np.allclose((actions.reshape(1, -1) - clips.mean) / clips.std, scaled[0, :1])
    dream = open_dream(opened, num_steps=1)
    assert (dream.reset(frames, actions) == frames[-1]).all()
    assert dream.sampler.num_steps == 1 and dream.step([0.1, 0]).shape == (3, 16, 16)


def test_an_agent_can_be_trained_in_it(trained):
    checker = pytest.importorskip('gymnasium.utils.env_checker')
    from dream_env import DreamEnv
    opened = opened_run(trained)
    env = DreamEnv(opened)
    checker.check_env(env, skip_render_check=True)
    first, _ = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    assert (first == again).all() and first.shape == env.observation_space.shape == (16, 16, 3)
    least, _, _, greatest = limits(opened.config['action_meta'])
    assert (env.action_space.low == least).all() and (env.action_space.high == greatest).all()
    frame, reward, terminated, truncated, info = env.step(greatest)
    env.reset(seed=1)
    assert (env.step(greatest + 100)[0] == frame).all()  # never asked for what no data has shown
    assert (reward, terminated, truncated) == (0.0, False, False) and (env.render() == frame).all()
