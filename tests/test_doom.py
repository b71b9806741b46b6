"""Truths about Doom."""
import numpy as np
import pytest
from conftest import run

pytest.importorskip('vizdoom')

import envs  # noqa: E402


@pytest.fixture(scope='module')
def doom():
    return envs.make_world('doom')


def walk(doom, action, steps=8):
    doom.reset(0)
    start = doom.pos[1]
    for _ in range(steps):
        doom.step(action)
    return doom.pos[1] - start


def test_it_takes_seeds_of_any_size(doom):
    doom.reset(5_000_000_000)
    state = doom.get_state()
    doom.set_state(state)
    assert doom.get_state()[0] == state[0] == 5_000_000_000


def test_its_buttons_step_left_and_right_and_both_together_cancel(doom):
    left, right = walk(doom, [1, 0]), walk(doom, [0, 1])
    assert left > 50 and np.isclose(left, -right, rtol=0.1)
    assert abs(walk(doom, [0, 0])) < 1
    assert abs(walk(doom, [1, 1])) < 1


def test_an_episode_is_over_when_the_player_is_dead_and_then_stays_as_it_was(doom):
    doom.reset(0)
    for _ in range(2000):
        hit = doom.step([0, 0])
        if doom.over:
            break
    assert doom.over and hit
    last = doom.render(64)
    doom.step([1, 0])
    assert (doom.render(64) == last).all()


def test_its_explorer_lives_longer_than_one_who_stands_still(doom):
    def lifetime(explores, seed):
        doom.reset(seed)
        rng = np.random.default_rng(seed)
        for steps in range(doom.steps):
            if doom.over:
                return steps
            doom.step(doom.explore(rng) if explores else [0, 0])
        return doom.steps

    lifetimes = np.array([[lifetime(explores, seed) for seed in range(12)] for explores in (0, 1)])
    assert lifetimes[1].mean() > 1.3 * lifetimes[0].mean()


def test_data_py_collects_episodes_that_end_when_they_do(tmp_path):
    out = str(tmp_path / 'doom')
    run('data.py', 'doom', f'--out={out}', '--episodes=8', '--workers=0', '--image_size=16')
    lengths = np.diff(np.load(f'{out}/train/episodes.npy'))
    frames = np.load(f'{out}/train/frames.npy', mmap_mode='r')
    assert frames.shape == (lengths.sum(), 3, 16, 16)
    assert lengths.min() < lengths.max() <= 200
