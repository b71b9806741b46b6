"""Truths about episodes of Gymnasium environments."""
import json

import numpy as np
import pytest
from conftest import error, run

import gym_worlds
from configurator import UserError

pytest.importorskip('gymnasium')
# the room's file registers them, and has policies too: it is run twice
pytestmark = pytest.mark.filterwarnings('ignore:.*Overriding environment')

ROOM = '''
import gymnasium
import numpy as np
from gymnasium import spaces

class Room(gymnasium.Env):
    """A white column that an action moves; it ends at the border. What it observes is no picture."""
    observation_space = spaces.Box(0, 48, (1,))
    metadata = {'render_modes': ['rgb_array']}
    def __init__(self, space, render_mode=None):
        self.action_space, self.render_mode = space, render_mode
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = int(self.np_random.integers(10, 38)), 0
        return np.float32([self.x]), {}
    def step(self, action):
        self.x += int(np.sum(action)) - 1
        self.steps += 1
        return np.float32([self.x]), 0.0, not 0 < self.x < 47, False, {}
    def render(self):
        frame = np.zeros((48, 40, 3), np.uint8)
        frame[self.x] = 255
        return frame

class Seen(Room):
    """The same, and the picture is what it observes."""
    observation_space = spaces.Box(0, 255, (48, 40, 3), np.uint8)
    def reset(self, seed=None, options=None):
        super().reset(seed, options)
        return 255 - self.render(), {}
    def step(self, action):
        _, *rest = super().step(action)
        return 255 - self.render(), *rest

SPACES = {'Choice': spaces.Discrete(3), 'Choices': spaces.MultiDiscrete([2, 3]),
          'Number': spaces.Box(0, 2, (1,)), 'Many': spaces.Sequence(spaces.Discrete(2))}
for name, space in SPACES.items():
    gymnasium.register(name + '-v0', entry_point=Room, kwargs={'space': space})
gymnasium.register('Seen-v0', entry_point=Seen, kwargs={'space': spaces.Discrete(3)})

def downwards(observation, rng):
    return 2

def observed(observation, rng):
    return int(observation[0] < 24)
'''
SETTINGS = dict(env='Choice-v0', policy='', hold=4, repeat=1, steps=12, shortest=2, seed=0, episodes=10)


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    path = tmp_path_factory.mktemp('room') / 'room.py'
    path.write_text(ROOM)
    return str(path)


def play(room, seed=3, **changes):
    frames, actions = gym_worlds.play(SETTINGS | {'import_': room} | changes, seed)
    return np.stack(frames), np.stack(actions)


def where(frames):
    return frames[:, :, 0, 0].argmax(axis=1)


def test_an_episode_depends_on_its_seed_alone(room):
    frames, actions = play(room, 3)
    play(room, 4)
    again, actions_again = play(room, 3)
    other, _ = play(room, 5)
    assert frames.shape == again.shape and (frames == again).all() and (actions == actions_again).all()
    assert frames.shape != other.shape or (frames != other).any()


@pytest.mark.parametrize('env, width', [('Choice-v0', 3), ('Choices-v0', 5), ('Number-v0', 1)])
def test_choices_become_one_hot_and_numbers_stay_and_each_has_a_meaning(room, env, width):
    _, actions = play(room, env=env)
    assert actions.shape[1] == width and actions.dtype == np.float32
    if env != 'Number-v0':
        assert set(actions.ravel()) == {0, 1}
        assert (actions.sum(axis=1) == {3: 1, 5: 2}[width]).all()
    about = gym_worlds.describe(SETTINGS | dict(env=env, import_=room))
    assert len(about['action_names']) == width


def test_an_action_leads_from_its_frame_to_the_next(room):
    frames, actions = play(room)
    assert len(frames) == len(actions) + 1
    assert (np.diff(where(frames)) == actions @ [-1, 0, 1]).all()


def test_repeat_takes_so_many_steps_of_the_simulator_for_an_action(room):
    frames, actions = play(room, repeat=3, policy=f'{room}:downwards', steps=4)
    assert (np.diff(where(frames)) == 3).all() and (actions == [0, 0, 1]).all()


def test_a_random_action_is_held_for_the_steps_that_are_asked_for(room):
    actions = np.concatenate([play(room, seed, hold=5, steps=100)[1] for seed in range(40)])
    changes = (np.diff(actions, axis=0) != 0).any(axis=1).mean()
    assert 0.5 * (2 / 3) / 5 < changes < 2 * (2 / 3) / 5  # a third of the new actions are the old ones


def test_an_episode_ends_with_its_environment_and_too_short_a_one_is_dropped(room):
    frames, _ = play(room, policy=f'{room}:downwards', steps=100)
    assert where(frames)[-1] == 47 and len(frames) < 40
    with pytest.raises(ValueError, match='ended after'):
        play(room, policy=f'{room}:downwards', steps=100, shortest=40)


def test_a_picture_observation_is_the_picture(room):
    assert play(room, env='Seen-v0')[0].mean() > 200
    assert play(room, env='Choice-v0')[0].mean() < 50


def test_a_policy_sees_the_observation(room):
    _, actions = play(room, policy=f'{room}:observed')
    assert actions.shape[1] == 3


def test_data_py_collects_them_like_any_other_world(room, tmp_path):
    out = str(tmp_path / 'room')
    args = ['data.py', 'gym', '--env=Choice-v0', f'--import={room}', '--episodes=10', '--steps=20',
            '--shortest=5', '--image_size=16']
    assert 'nothing is left for train' in error(*args, f'--out={out}', '--workers=0', '--shortest=15', '--steps=10')
    run(*args, f'--out={out}', '--workers=0')
    run(*args, f'--out={out}2', '--workers=2')
    frames = np.load(f'{out}/train/frames.npy')
    assert frames.shape[1:] == (3, 16, 16)
    assert (frames == np.load(f'{out}2/train/frames.npy')).all()
    with open(f'{out}/meta.json') as f:
        meta = json.load(f)
    assert len(meta['action_names']) == len(meta['controls']['rest']) == 3


@pytest.mark.parametrize('args, message', [
    ([], '--env='),
    (['--env=NoSuchWorld-v0'], 'NoSuchWorld'),
    (['--env=CartPole-v1', '--import=no_such_package'], 'pip install no_such_package'),
    (['--env=CartPole-v1', '--policy=absent.py:act'], 'my_file.py:function'),
])
def test_each_mistake_is_one_line(args, message, tmp_path):
    assert message in error('data.py', 'gym', f'--out={tmp_path}/x', *args)


def test_actions_of_no_fixed_width_are_refused_in_words(room):
    with pytest.raises(UserError, match='Many-v0: its actions are not always as many numbers'):
        gym_worlds.describe(SETTINGS | {'env': 'Many-v0', 'import_': room})


def test_a_policy_that_is_not_in_its_file_is_named(room):
    with pytest.raises(UserError, match='no function upwards'):
        gym_worlds.load_policy(f'{room}:upwards')
