"""Truths about worlds and datasets."""
import os

import numpy as np
import pytest
import torch
from conftest import error, run

from data import Clips, to_model
from envs import EPISODE_STEPS, WORLDS, Wall


@pytest.fixture(params=['wall', 'pusht'])
def world(request):
    if request.param == 'pusht':
        pytest.importorskip('gym_pusht')
    return WORLDS[request.param]()


def test_the_same_seed_is_the_same_episode(world):
    def play(seed):
        rng = np.random.default_rng(seed)
        world.reset(seed)
        frames = []
        for _ in range(10):
            frames.append(world.render(24))
            world.step(world.explore(rng))
        return np.stack(frames)
    first = play(3)
    assert first.dtype == np.uint8 and first.shape == (10, 3, 24, 24)
    assert (first == play(3)).all() and (first != play(4)).any() and (first[0] != first[-1]).any()


def test_what_follows_a_state_depends_on_it_alone(world):
    other, rng = type(world)(), np.random.default_rng(0)
    world.reset(1), other.reset(2)
    for _ in range(30):
        world.step(world.explore(rng))
    state = world.get_state()
    world.set_state(state), other.set_state(state)
    for _ in range(10):
        action = rng.uniform(-0.1, 0.1, 2)
        assert world.step(action) == other.step(action)
        assert (world.get_state() == other.get_state()).all()
    assert (world.render(32) == other.render(32)).all()


def test_wall_and_border_stop_the_agent_and_the_door_does_not():
    env = Wall()
    env.set_state([0.3, 0.2, 0.7])  # door far below
    assert not env.step([0.05, 0.0])
    assert any([env.step([0.1, 0.0]) for _ in range(4)])
    assert np.isclose(env.pos[0], 0.5 - env.HALF_WALL - env.RADIUS)
    for _ in range(10):
        env.step([0.0, -0.1])
    assert np.isclose(env.pos[1], env.RADIUS)
    env.set_state([0.3, 0.7, 0.7])
    assert not any([env.step([0.1, 0.0]) for _ in range(4)]) and np.isclose(env.pos[0], 0.7)


def test_rendering_is_anti_aliased_and_the_same_picture_at_any_size():
    env = Wall()
    env.set_state([0.3, 0.52, 0.5])
    big, small = env.render(128), env.render(32)
    pooled = big.reshape(3, 32, 4, 32, 4).mean((2, 4))
    assert np.abs(pooled - small).mean() < 1.5
    assert len(np.unique(small[2])) > 8  # edges are blended


def test_clips_are_cut_from_one_episode_with_their_own_actions(wall):
    clips = Clips(wall, 'train', num_frames=3, frame_interval=2)
    assert len(clips) == 18 * (60 - 4) and clips.action_dim == 4
    frames, action = clips.batch(np.arange(len(clips)))
    for i in (0, 55, 56, len(clips) - 1):
        first = i // 56 * 60 + i % 56
        assert (frames[i].numpy() == clips.frames[[first, first + 2, first + 4]]).all()
        assert (action[i, 0].numpy() == clips.actions[first:first + 2].reshape(-1)).all()
        assert (action[i, 1].numpy() == clips.actions[first + 2:first + 4].reshape(-1)).all()
    x = to_model(frames)
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1


def test_normalised_actions_have_no_mean_and_unit_variance(wall):
    clips = Clips(wall, 'train', 4, normalize=True)
    _, action = clips.batch(np.arange(len(clips)))
    assert action.mean((0, 1)).abs().max() < 0.1 and (action.std((0, 1)) - 1).abs().max() < 0.1


def test_an_action_that_never_changes_is_left_alone(wall):
    _, action = Clips(wall, 'train', 4, normalize=([0.5, 0.0], [0.0, 1.0])).batch([3])
    raw = Clips(wall, 'train', 4).batch([3])[1]
    assert torch.allclose(action, raw - torch.tensor([0.5, 0.0]))


def test_fixed_validation_clips_are_fixed(wall):
    clips = Clips(wall, 'val', 4)
    assert (clips.fixed(16) == Clips(wall, 'val', 4).fixed(16)).all() and len(set(clips.fixed(16))) == 16
    assert len(clips.fixed(10 ** 6)) == len(clips)


def test_collection_does_not_depend_on_the_number_of_workers(wall, tmp_path):
    root = str(tmp_path / 'wall')
    run('data.py', 'wall', f'--out={root}', '--episodes=20', '--image_size=16', '--workers=0')
    for split in ('train', 'val'):
        for name in ('frames', 'actions', 'episodes'):
            a, b = (open(os.path.join(r, split, f'{name}.npy'), 'rb').read() for r in (wall, root))
            assert a == b
    assert not os.path.exists(root + '.partial')
    assert 'is there already' in error('data.py', 'wall', f'--out={root}')


def test_explorers_touch_things():
    for name, share in (('wall', 0.15), ('pusht', 0.4)):
        if name == 'pusht':
            pytest.importorskip('gym_pusht')
        env, contacts = WORLDS[name](), []
        for seed in range(4):
            env.reset(seed)
            rng = np.random.default_rng([seed, 1])
            contacts += [env.step(env.explore(rng)) for _ in range(EPISODE_STEPS[name])]
        assert np.mean(contacts) > share


def test_pusht_is_collected(tmp_path):
    pytest.importorskip('gym_pusht')
    root = str(tmp_path / 'pusht')
    run('data.py', 'pusht', f'--out={root}', '--episodes=4', '--image_size=32', '--workers=2')
    frames, action = Clips(root, 'train', 4, frame_interval=5, normalize=True).batch([0, 1])
    assert frames.shape == (2, 4, 3, 32, 32) and action.shape == (2, 4, 10)


def test_a_missing_or_too_short_dataset_says_so(wall):
    with pytest.raises(SystemExit, match='no prepared dataset at nowhere/wall/train.*python data.py wall'):
        Clips('nowhere/wall', 'train', 4)
    with pytest.raises(SystemExit, match='no episode has 121 frames'):
        Clips(wall, 'train', num_frames=5, frame_interval=30)
    assert 'unknown dataset' in error('data.py', 'pong')
