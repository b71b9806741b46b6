"""Where episodes come from: the worlds of envs.py, published datasets, and your own recordings.

Each reader lists the episodes of one kind of folder; prepare.py does the rest. To add a dataset,
write such a function and give it a row in DATASETS, at the end. The files come from strangers:
nothing in them is run, and nothing that they say makes us read a file elsewhere.
"""
import glob
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np

import envs
import gym_worlds
from configurator import UserError, extra
from pickles import load_array
from recordings import Episode, clips, natural, ordinary, read_video


def list_episodes(settings):
    """The Episodes of the world or dataset that prepare.py's settings name. Raises UserError."""
    what, count = settings['what'], settings['episodes']
    if what == 'gym' or what in envs.WORLDS:
        return played(settings)
    root = os.path.abspath(settings['root'])
    try:
        episodes = DATASETS[what].reader(root, settings)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        # whatever a stranger's metadata lacks or holds instead; a KeyError says only the key
        raise UserError(f'{root}: its metadata is not as {what} has it '
                        f'({type(e).__name__}: {e})') from e
    if 0 < count < len(episodes):  # from the first to the last, so that no split is left out
        chosen = np.linspace(0, len(episodes) - 1, count).astype(int)
        episodes = [episodes[i] for i in chosen]
    return episodes


def start_worker(_):
    """What a worker of a DataLoader does first: leave Ctrl-C to its parent, and end with it."""
    def end_with_parent():  # else it waits forever for a parent that was killed
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def find(root, pattern):
    """The files under root that match the pattern, in order. Raises UserError if there are none."""
    found = glob.glob(os.path.join(glob.escape(root), pattern), recursive=True)
    if not found:
        raise UserError(f'{root}: found no {pattern} there')
    return sorted(found, key=natural)


# -----------------------------------------------------------------------------
# worlds: here reading is playing. Every episode has a seed of its own; the last tenth validates

def played(settings):
    name, count, (height, width) = settings['what'], settings['episodes'], settings['image_size']
    if name == 'gym':
        name, play_it = settings['env'], partial(gym_worlds.play, settings)
    else:
        play_it = partial(play, name, height, settings['policy'])
        simulator(name)  # says now if it is not installed
        if height != width:
            raise UserError(f'image_size={height},{width}: {name} draws square pictures')
    num_train = count - max(1, count // 10)
    episodes = []
    for i in range(count):
        split = 'train' if i < num_train else 'val'
        read = partial(play_it, settings['seed'] * 1_000_000 + i)
        episodes.append(Episode(f'{name} {i}', read, split))
    return episodes


simulator = cache(envs.make_world)  # one for all episodes of this process


def play(name, size, policy, seed):
    env = simulator(name)
    act = gym_worlds.load_policy(policy) if policy else type(env).explore
    rng = np.random.default_rng([seed, 1])  # not reset's own stream
    env.reset(seed)
    frames, actions = [], []
    for _ in range(env.steps):
        frames.append(env.render(size).transpose(1, 2, 0))
        actions.append(act(env, rng))
        env.step(actions[-1])
        if getattr(env, 'over', False):  # Doom's player is dead
            break
    return frames, actions


# -----------------------------------------------------------------------------
# LeRobot v2.0, v2.1 and v3.0: actions in parquet, and video; meta/info.json has templates of paths

FIELD = re.compile(r'\{(\w+):?((?:\d{1,2}d)?)\}')


def lerobot(root, settings):
    parquet = extra('pyarrow.parquet')
    extra('av')  # says now, not for every episode, if it is missing
    with open(inside(root, find(root, 'meta/info.json')[0])) as f:
        info = json.load(f)
    camera = settings['image_key']
    cameras = [key for key, feature in info['features'].items() if feature['dtype'] == 'video']
    if camera not in cameras:
        raise UserError(f'{root}/meta/info.json: no video of a camera {camera!r}; its cameras '
                        f'are {", ".join(cameras) or "none"}: choose one with --image_key=')

    rows = []
    if os.path.exists(f'{root}/meta/episodes.jsonl'):  # v2
        with open(inside(root, 'meta/episodes.jsonl')) as f:
            rows = [json.loads(line) for line in f if line.strip()]
    else:
        for path in find(root, 'meta/episodes/*/*.parquet'):
            names = parquet.read_schema(inside(root, path)).names
            columns = [name for name in names if not name.startswith('stats/')]
            rows += parquet.read_table(path, columns=columns).to_pylist()

    listed = Counter(row['episode_index'] for row in rows)
    if listed and max(listed.values()) > 1:  # it could train and validate
        raise ValueError(f'episode {listed.most_common(1)[0][0]} is listed more than once')
    episodes = []
    for row in rows:
        number, length = row['episode_index'], int(row['length'])
        videos = f'videos/{camera}'
        row = row | dict(episode_chunk=number // info['chunks_size'], video_key=camera)
        data = fill(info['data_path'], row, 'data')
        video = fill(info['video_path'], row, videos)
        start = row.get(f'{videos}/from_timestamp', 0.0)
        read = partial(read_lerobot, root, number, length, data, video, start)
        episodes.append(Episode(f'{root} episode {number}', read, length=length))
    return episodes


def fill(template, row, prefix):
    """The path that a template means for an episode; v3 has its fields under `prefix`.

    Not by str.format: a stranger's width of 10^9 would take gigabytes.
    """
    def value(field):
        name, width = field.groups()
        if f'{prefix}/{name}' in row:
            name = f'{prefix}/{name}'
        return format(row[name], width)

    return FIELD.sub(value, template)


def inside(root, path):
    """root/path, made sure to be an ordinary file that lies under root."""
    real_root, real = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([real_root, real]) != real_root:
        raise ValueError(f'{path} leads out of the folder, where nothing is read')
    return ordinary(real)


@lru_cache(maxsize=1)  # the next episode is in the same file
def read_table(path):
    columns = ['episode_index', 'frame_index', 'action']
    return extra('pyarrow.parquet').read_table(path, columns=columns)


def read_lerobot(root, number, length, data, video, start):
    table = read_table(inside(root, data))
    rows = np.flatnonzero(table['episode_index'].to_numpy() == number)
    if len(rows) != length:
        raise ValueError(f'{data} has {len(rows)} rows of it; expected {length}')
    if (table['frame_index'].take(rows).to_numpy() != np.arange(length)).any():
        raise ValueError(f'{data}: its rows are not in the order of frames')
    actions = np.array(table['action'].take(rows).to_pylist()).reshape(length, -1)
    return islice(read_video(inside(root, video), start), length), actions


# -----------------------------------------------------------------------------
# Counter-Strike deathmatch (Pearce & Zhu 2021): HDF5

def csgo(root, settings):
    """Its published split is two lists of files, and the first frame of each validation clip."""
    extra('h5py')
    if bool(settings['val_list']) != bool(settings['train_list']):
        raise ValueError('train_list and val_list go together: a file in neither is left out')
    val = listed(settings['val_list'])
    split = dict.fromkeys(listed(settings['train_list']), 'train') | dict.fromkeys(val, 'val')
    start = {}
    if settings['val_starts']:
        numbers = np.load(settings['val_starts'], allow_pickle=False)
        start = dict(zip(val, whole_numbers(numbers, 999), strict=True))
    episodes = []
    for path in find(root, '**/hdf5_dm_july2021_[0-9]*.hdf5'):
        name = os.path.basename(path).removesuffix('.hdf5')
        if name in split or not split:
            read = partial(read_csgo, path)
            episodes.append(Episode(path, read, split.get(name, ''), start.get(name, -1),
                                    length=1000))
    return episodes


def listed(path):
    """The file names in a text file, without their folders and endings."""
    if not path:
        return []
    with open(path) as f:
        return [os.path.basename(name).removesuffix('.hdf5') for name in f.read().split()]


def whole_numbers(array, most):
    """The array as a list of ints, from 0 to `most`. Raises ValueError."""
    if not np.isin(array, np.arange(most + 1)).all():
        raise ValueError(f'expected whole numbers from 0 to {most}')
    return array.ravel().astype(int).tolist()


def read_csgo(path):
    f = extra('h5py').File(ordinary(path))  # open until the last frame is taken
    count = sum(name.endswith('_x') for name in f)  # a number that is missing is seen below
    frames = (own_array(f, f'frame_{i}_x')[..., ::-1] for i in range(count))  # stored as BGR
    return frames, [own_array(f, f'frame_{i}_y') for i in range(count)]


def own_array(f, name):
    """An array that lies in this HDF5 file; one could also point to any file of the machine."""
    elsewhere = ValueError(f'{name} lies in another file')
    if not isinstance(f.get(name, getlink=True), extra('h5py').HardLink):
        raise elsewhere  # a link is not followed, even to look
    array = f[name]
    if array.is_virtual or array.external:
        raise elsewhere
    if array.nbytes > 2 ** 26:  # a 4K frame is 2^25; a few bytes can promise any number of zeros
        raise ValueError(f'{name} is {list(array.shape)}, which is no frame')
    return array[:]


# -----------------------------------------------------------------------------
# the DINO-WM sets (Zhou et al. 2024): actions [N,T,A], padded; a file of frames for each episode

def dino(folder, frames_file, root, settings, actions_file='actions.pth'):
    folder = f'{root}/{folder}'
    actions = load_array(find(folder, actions_file)[0])
    lengths = [actions.shape[1]] * len(actions)
    found = glob.glob(f'{glob.escape(folder)}/seq_lengths.p*')  # none where all are equally long
    if found:
        lengths = whole_numbers(load_array(found[0]), actions.shape[1])
    episodes = []
    for i, (length, padded) in enumerate(zip(lengths, actions, strict=True)):
        path = os.path.join(folder, frames_file.format(i))
        read = partial(read_dino, path, padded[:length])
        episodes.append(Episode(path, read, length=length))
    return episodes


def dino_pusht(root, settings):
    """It comes with a split, as video."""
    extra('av')
    episodes = []
    for split in ('train', 'val'):
        for episode in dino(f'pusht_noise/{split}', 'obses/episode_{:03d}.mp4', root, settings,
                            actions_file='rel_actions.pth'):
            episodes.append(episode._replace(split=split))
    return episodes


def read_dino(path, actions):
    if path.endswith('.mp4'):  # PushT, whose actions are pixels: they become hundredths
        return islice(read_video(path), len(actions)), actions.astype(np.float32) / 100
    frames = load_array(path)[:len(actions)]
    if frames.dtype != np.uint8:  # Rope and Granular have 0 to 255 as floats
        least, greatest = frames.min(), frames.max()
        if not (0 <= least and 1 < greatest <= 255):
            raise ValueError(f'pixels from {least} to {greatest}; expected 0 to 255')
        frames = frames.round().astype(np.uint8)
    return frames, actions


# -----------------------------------------------------------------------------

MAZE, ROPE = 'obses/episode_{:03d}.pth', '{:06d}/obses.pth'  # where DINO-WM has frames


class Dataset(NamedTuple):
    reader: Callable  # (root, settings) -> Episodes
    variable: str  # of the environment, that says where the files are; '' is none
    about: str  # for --help


DATASETS = {
    'rt1': Dataset(lerobot, 'RT1_DATA_ROOT', 'RT-1, a robot arm'),
    'csgo': Dataset(csgo, 'CSGO_DATA_DIR', 'Counter-Strike deathmatch'),
    'dino_point_maze': Dataset(partial(dino, 'point_maze', MAZE), 'DATASET_DIR', 'DINO-WM'),
    'dino_wall': Dataset(partial(dino, 'wall_single', MAZE), 'DATASET_DIR', 'DINO-WM'),
    'dino_pusht': Dataset(dino_pusht, 'DATASET_DIR', 'DINO-WM'),
    'dino_rope': Dataset(partial(dino, 'deformable/rope', ROPE), 'DATASET_DIR', 'DINO-WM'),
    'dino_granular': Dataset(partial(dino, 'deformable/granular', ROPE), 'DATASET_DIR', 'DINO-WM'),
    'lerobot': Dataset(lerobot, '', 'any LeRobot dataset with video, v2.0 to v3.0'),
    'clips': Dataset(clips, '', 'your videos, GIFs, arrays or folders of pictures, and actions'),
}
