"""Truths about worlds."""
import numpy as np
import pytest

from configurator import UserError
from doom import Doom
from envs import WORLDS, Wall, make_world
from policies import linger

# packages that may be absent
SIMULATORS = {'pusht': 'gym_pusht', 'two_room': 'stable_worldmodel',
              'swm_pusht': 'stable_worldmodel', 'doom': 'vizdoom'}


@pytest.fixture(params=WORLDS)
def world(request):
    if request.param in SIMULATORS:
        pytest.importorskip(SIMULATORS[request.param])
    return make_world(request.param)


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
    assert (first == play(3)).all()
    assert (first != play(4)).any()
    assert (first[0] != first[-1]).any()


def test_what_follows_a_state_depends_on_it_alone(world):
    other, rng = type(world)(), np.random.default_rng(0)
    world.reset(1)
    other.reset(2)
    for _ in range(30):
        world.step(world.explore(rng))
    state = world.get_state()
    world.set_state(state)
    other.set_state(state)
    for _ in range(10):
        action = rng.uniform(-0.1, 0.1, world.action_dim)
        assert world.step(action) == other.step(action)
        assert (world.get_state() == other.get_state()).all()
    assert (world.render(32) == other.render(32)).all()


def test_actions_have_the_width_that_the_world_says(world):
    world.reset(0)
    action = world.explore(np.random.default_rng(0))
    assert action.shape == (world.action_dim,) and action.dtype == np.float32


def test_explorers_touch_things(world):
    if isinstance(world, Doom):
        pytest.skip('its explorer runs from what would touch it')
    contacts = []
    for seed in range(4):
        world.reset(seed)
        rng = np.random.default_rng([seed, 1])
        contacts += [world.step(world.explore(rng)) for _ in range(world.steps)]
    assert np.mean(contacts) > 0.15


def test_an_unknown_world_is_refused_by_name():
    with pytest.raises(UserError, match="'pong'.*wall"):
        make_world('pong')


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
    assert not any([env.step([0.1, 0.0]) for _ in range(4)])
    assert np.isclose(env.pos[0], 0.7)


def test_who_left_the_door_at_its_edge_may_come_back():
    env = Wall()
    for door in np.random.default_rng(0).uniform(0.2, 0.8, 20):
        env.set_state([0.5, door, door])
        for action in 2 * [[0.0, 0.1]] + 3 * [[0.1, 0.0]]:
            env.step(action)
        assert not any([env.step([-0.1, 0.0]) for _ in range(3)])


def test_rendering_is_anti_aliased_and_the_same_picture_at_any_size():
    env = Wall()
    env.set_state([0.3, 0.52, 0.5])
    big, small = env.render(128), env.render(32)
    pooled = big.reshape(3, 32, 4, 32, 4).mean((2, 4))
    assert np.abs(pooled - small).mean() < 1.5
    assert len(np.unique(small[2])) > 8  # edges are blended


def test_who_lingers_tries_the_doors_edge_more_often_than_the_explorer():
    def tries(policy):
        """Steps towards the door from outside it, within 0.01 of its edge."""
        world, count = Wall(), 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            world.reset(seed)
            for _ in range(world.steps):
                (x, y), action = world.pos, policy(world, rng)
                outside = abs(x - 0.5) >= world.REACH > abs(x + action[0] - 0.5)
                count += outside and abs(abs(y - world.door) - world.GAP) < 0.01
                world.step(action)
        return count

    assert tries(linger) > 3 * tries(Wall.explore) > 0
