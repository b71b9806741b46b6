"""Any Gymnasium environment as a dataset of frames and actions.

    python data.py gym --env=CarRacing-v3 --name=carracing --repeat=2 --policy=policies.py:drive
    python data.py gym --env=PongNoFrameskip-v4 --import=ale_py --name=pong --repeat=4

The picture is the observation where that is one, as in CarRacing and Atari, and else what the
environment renders as rgb_array. An action is flattened to numbers: a Box is itself, a choice among
n is one-hot. An episode depends on its seed alone: its environment and its policy draw from that.
"""
import functools
import os
import runpy

import numpy as np

from configurator import UserError, extra

MEANINGS = {  # of the numbers of an action, for environments that do not say themselves
    'CarRacing': ['steer, from -1 left to 1 right', 'gas', 'brake'],
    'LunarLander': ['nothing', 'left engine', 'main engine', 'right engine'],
}
KEYS = {  # that a player holds for what an action means; others are digits
    'LEFT': 'ArrowLeft', 'RIGHT': 'ArrowRight', 'UP': 'ArrowUp', 'DOWN': 'ArrowDown',
    'FIRE': 'Space', 'left engine': 'ArrowLeft', 'right engine': 'ArrowRight',
    'main engine': 'ArrowUp',
}


class Gym:
    """What data.py asks of it, as of the worlds in envs.py."""
    about = 'any Gymnasium environment, --env='
    episodes, image_size = 300, 64


def make(name, module, **options):
    """An environment that this module registers. Raises UserError."""
    os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')  # pygame draws without a screen
    os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
    gymnasium = extra('gymnasium')
    if not name:
        raise UserError('which environment? Say --env=CarRacing-v3, or another of Gymnasium')
    try:
        register(module)
        return gymnasium.make(name, disable_env_checker=True, **options)
    except UserError:
        raise
    except Exception as e:  # an environment may raise anything; gymnasium says what is missing
        message = ' '.join(str(e).split())
        raise UserError(f'{name}: {type(e).__name__}: {message}') from e


def make_seen(name, module):
    """An environment, and whether its observations are its pictures. Raises UserError."""
    env = make(name, module)
    space = env.observation_space
    if space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3:
        return env, True
    env.close()
    return make(name, module, render_mode='rgb_array'), False


@functools.cache  # once in each process
def register(module):
    """Import the module, or run the file of yours, that registers environments."""
    if module.endswith('.py'):
        run_file('import', module)
    elif module:
        extra(module)


def run_file(setting, path):
    """What a file of the user's defines, by name. Raises UserError."""
    try:
        return runpy.run_path(path)
    except Exception as e:
        raise UserError(f'{setting}={path}: {type(e).__name__}: {e}') from e


def load_policy(text):
    """The function of 'file.py:function'. Raises UserError."""
    path, _, name = text.rpartition(':')
    if not path.endswith('.py') or not os.path.isfile(path):
        raise UserError(f'policy={text}: expected a file and a function of it, my_file.py:function')
    functions = run_file('policy', path)
    if not callable(functions.get(name)):
        raise UserError(f'policy={text}: {path} has no function {name}(observation, rng)')
    return functions[name]


def play(settings, seed):
    """(frames [T] of uint8 [H,W,3], actions float32 [T-1,A]) of one episode.

    It ends when the environment says so, or with `steps` frames. Raises ValueError if that was
    before `shortest`.
    """
    env, observed = make_seen(settings['env'], settings['import_'])  # anew: some remember episodes
    env.action_space.seed(seed)
    flatten = extra('gymnasium').spaces.flatten
    rng = np.random.default_rng([seed, 1])  # not the environment's own stream
    policy = load_policy(settings['policy']) if settings['policy'] else None

    observation, _ = env.reset(seed=seed)
    frames, actions = [], []
    over = False
    while True:
        seen = observation if observed else env.render()
        frames.append(np.array(seen))
        if over or len(frames) == settings['steps']:
            break
        if policy:
            action = policy(observation, rng)
        elif not actions or rng.random() < 1 / settings['hold']:
            # held for a while, it is a movement one can see; drawn at every step they cancel out
            action = env.action_space.sample()
        actions.append(flatten(env.action_space, action).astype(np.float32))
        for _ in range(settings['repeat']):
            observation, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            if over:
                break
    if len(frames) < settings['shortest']:
        raise ValueError(f'it ended after {len(frames)} frames, of at least '
                         f'--shortest={settings["shortest"]}')
    return frames, actions


# -----------------------------------------------------------------------------
# what the numbers of an action mean

def describe(settings):
    """What meta.json says about the actions: {'action_names': [A], 'controls': see controls.py}."""
    env, _ = make_seen(settings['env'], settings['import_'])
    spaces = extra('gymnasium').spaces
    try:
        count = spaces.flatdim(env.action_space)
    except ValueError as e:  # of a Sequence or a Graph
        raise UserError(f'{settings["env"]}: its actions are not always as many numbers ({e})') from e
    names = [f'number {i}' for i in range(count)]
    known = MEANINGS.get(env.spec.name)
    if hasattr(env.unwrapped, 'get_action_meanings'):  # Atari's
        known = env.unwrapped.get_action_meanings()
    if known and len(known) == len(names):
        names = list(known)
    controls = None  # of a Box, play.py finds its own: the arrows, and sliders
    if isinstance(env.action_space, spaces.Discrete):
        controls = discrete_controls(names)
    elif env.spec.name == 'CarRacing':
        keys = {'ArrowLeft': [-1, 0, 0], 'ArrowRight': [1, 0, 0], 'ArrowUp': [0, 1, 0],
                'ArrowDown': [0, 0, 1]}
        controls = dict(rest=[0, 0, 0], keys=keys)
    return dict(action_names=names, controls=controls)


def discrete_controls(names):
    """Keys for a choice among names: arrows and Space where these say so, digits for the others."""
    hot = np.eye(len(names))
    keys, captions = {}, {}
    for i, name in enumerate(names[1:], start=1):  # the first is to do nothing
        if name in KEYS or i < 10:
            key = KEYS.get(name, f'Digit{i}')
            keys[key] = (hot[i] - hot[0]).tolist()  # instead of resting
            captions[key] = name.lower()
    return dict(rest=hot[0].tolist(), keys=keys, captions=captions)
