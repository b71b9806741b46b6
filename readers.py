"""Where episodes come from: the worlds of envs.py, published datasets as they are on disk, and your own recordings.

Each reader lists the episodes of one kind of folder, and each episode knows how to read itself; prepare.py does the
rest. To add a dataset, write such a function and give it a row in DATASETS, at the end. These files come from
strangers: nothing in them is run, and nothing they say makes us read a file elsewhere.
"""
import glob
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from functools import cache, lru_cache, partial
from io import BytesIO
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import envs
from configurator import UserError
from machine import RANK
from pickles import load_array
from recordings import Episode, clips, extra, natural, read_picture, read_video


def list_episodes(settings):
    """The Episodes of the world or dataset that prepare.py's settings name. Raises UserError."""
    what, count = settings['what'], settings['episodes']
    if what in envs.WORLDS:
        return world(settings)
    root = os.path.expanduser(settings['root'])
    try:
        episodes = DATASETS[what].reader(root, settings)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        # whatever a stranger's metadata lacks or holds instead; a KeyError says no more than the key
        raise UserError(f'{root}: its metadata is not as {what} has it ({type(e).__name__}: {e})') from e
    if 0 < count < len(episodes):  # spread over all of them, with at least one of each split
        chosen = {i * len(episodes) // count for i in range(count)}
        splits = [episode.split for episode in episodes]
        chosen |= {splits.index(split) for split in ('train', 'val', '') if split in splits}
        episodes = [episodes[i] for i in sorted(chosen)]
    return episodes


def read_episode(episode, size):
    """(pixels uint8 [T,3,*size], actions float32 [T,A], ''), or (None, None, why the episode cannot be read)."""
    try:
        frames, actions = episode.read()
        pixels = [resize(frame, size) for frame in frames]  # one at a time: only the small ones are kept
        actions = np.asarray(actions, dtype=np.float32)
        if not pixels:
            raise ValueError('it has no frames')
        if len(actions) == len(pixels) - 1:  # nothing was done at the last frame
            actions = np.concatenate([actions, actions[-1:]])
        if len(actions) != len(pixels) or actions.ndim != 2:
            raise ValueError(f'{len(pixels)} frames, but actions {list(actions.shape)}')
        if not np.isfinite(actions).all():
            raise ValueError('some actions are not finite')
        first, end = 0, len(pixels)
        if episode.num_frames:
            first = episode.start
            if first < 0:
                first = max(0, (len(pixels) - episode.num_frames) // 2)  # from the middle
            end = first + episode.num_frames
        if first >= len(pixels):
            raise ValueError(f'its published start is frame {first} of {len(pixels)}')
        return np.stack(pixels[first:end]), actions[first:end], ''
    except Exception as e:  # whatever is wrong with one episode, the others go on
        return None, None, f'{type(e).__name__}: {e}'


def resize(frame, size):
    """uint8 [H,W,3] -> uint8 [3,*size], stretched (bilinear, anti-aliased)."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f'a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H,W,3]')
    x = torch.from_numpy(np.require(frame, requirements=['C', 'W'])).permute(2, 0, 1)
    if x.shape[1:] != size:
        x = F.interpolate(x[None].float(), size, mode='bilinear', antialias=True)[0]
        x = x.round().clamp(0, 255).byte()
    return x.numpy()


def start_worker(_):
    """What a worker of a DataLoader does first."""
    def leave_with_parent():  # even one that was killed: else a worker waits forever for its result to be taken
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=leave_with_parent, daemon=True).start()


def one_of(root, pattern):
    """The first file under root that matches the pattern."""
    found = sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True))
    if found:
        return found[0]
    there = 'no such folder'
    if os.path.isdir(root):
        there = ', '.join(sorted(os.listdir(root))[:8]) or 'nothing'
    raise UserError(f'{root}: looked there for {pattern} and found {there}')


# -----------------------------------------------------------------------------
# worlds: here reading is playing. Every episode has a seed of its own; the last tenth is for validation

def world(settings):
    name, count, (height, width) = settings['what'], settings['episodes'], settings['image_size']
    simulator(name)  # says now if it is not installed
    if count < 2:
        raise UserError(f'episodes={count}: expected 2 or more, one is for validation')
    if height != width:
        raise UserError(f'image_size={height},{width}: {name} draws square pictures; expected one number')
    num_train = count - max(1, count // 10)
    episodes = []
    for i in range(count):
        split = 'train' if i < num_train else 'val'
        play_it = partial(play, name, height, settings['seed'] * 1_000_000 + i)
        episodes.append(Episode(f'{name} {i}', play_it, split))
    return episodes


simulator = cache(envs.make_world)  # one for all episodes of this process


def play(name, size, seed):
    env = simulator(name)
    rng = np.random.default_rng([seed, 1])  # not reset's own stream
    env.reset(seed)
    frames, actions = [], []
    for _ in range(env.steps):
        frames.append(env.render(size).transpose(1, 2, 0))
        actions.append(env.explore(rng))
        env.step(actions[-1])
    return frames, actions


# -----------------------------------------------------------------------------
# LeRobot v2.0, v2.1 and v3.0: parquet and video. meta/info.json says where, by templates of paths

FIELD = re.compile(r'\{\w+(:\d{1,2}d)?\}')


def lerobot(root, settings):
    parquet = extra('pyarrow.parquet', 'pyarrow')
    with open(inside(root, one_of(root, 'meta/info.json'))) as f:
        info = json.load(f)
    camera, features = settings['image_key'], info['features']
    cameras = [key for key, feature in features.items() if feature['dtype'] in ('video', 'image')]
    if 'action' not in features:
        raise UserError(f'{root}/meta/info.json: no feature action, but {", ".join(features)}')
    if camera not in cameras:
        raise UserError(f'{root}/meta/info.json: no camera {camera!r}; '
                        f'its cameras are {", ".join(cameras) or "none"}: choose one with --image_key=')
    if features[camera]['dtype'] == 'video':
        extra('av')  # says now, not for every episode, if it is missing

    if os.path.exists(f'{root}/meta/episodes.jsonl'):  # v2
        with open(inside(root, 'meta/episodes.jsonl')) as f:
            rows = [json.loads(line) for line in f if line.strip()]
    else:
        rows = []
        one_of(root, 'meta/episodes/*/*.parquet')
        for path in sorted(glob.glob(f'{glob.escape(root)}/meta/episodes/*/*.parquet')):
            columns = [c for c in parquet.read_schema(inside(root, path)).names if not c.startswith('stats/')]
            rows += parquet.read_table(path, columns=columns).to_pylist()

    episodes = []
    for row in rows:
        i, split = row['episode_index'], ''
        if 'val' in info.get('splits', {}):  # most have one for training only
            first, end = map(int, info['splits']['val'].split(':'))
            split = 'val' if first <= i < end else 'train'
        read = partial(read_lerobot, root, camera, (i, row['length']), *locate(info, camera, row))
        episodes.append(Episode(f'{root} episode {i}', read, split))
    return episodes


def locate(info, camera, row):
    """(data file, video file or '', seconds into the video) of an episode.

    v2 gives each episode files of its own; v3 packs many into one file, and their rows of metadata say into which.
    """
    def fields(prefix):
        return {key: row[f'{prefix}/{key}'] for key in ('chunk_index', 'file_index') if f'{prefix}/{key}' in row}

    i, videos = row['episode_index'], f'videos/{camera}'
    names = dict(episode_index=i, episode_chunk=i // info['chunks_size'], video_key=camera)
    data = fill(info['data_path'], names | fields('data'))
    if info['features'][camera]['dtype'] != 'video':
        return data, '', 0.0
    return data, fill(info['video_path'], names | fields(videos)), row.get(f'{videos}/from_timestamp', 0.0)


def fill(template, names):
    """The path that a template means. Only fields like {episode_index:06d}: a width of 10^9 would take gigabytes."""
    if set('{}') & set(FIELD.sub('', template)):
        raise ValueError(f'path {template!r}: expected no other fields than such as {{episode_index:06d}}')
    return template.format(**names)


def inside(root, path):
    """root/path, made sure to be an ordinary file that lies under root."""
    real_root, real = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([real_root, real]) != real_root:
        raise ValueError(f'{path} leads out of the folder, where nothing is read')
    if not os.path.isfile(real):
        raise ValueError(f'{path}: no such file')
    return real


@lru_cache(maxsize=1)  # the next episode is in the same file
def parquet_table(path, columns):
    table = extra('pyarrow.parquet', 'pyarrow').read_table(path, columns=list(columns))
    return table['episode_index'].to_numpy(), table


def read_lerobot(root, camera, episode, data, video, start):
    number, length = episode
    columns = ('episode_index', 'action') if video else ('episode_index', 'action', camera)
    index, table = parquet_table(inside(root, data), columns)
    rows = np.flatnonzero(index == number)
    if len(rows) != length or length == 0 or rows[-1] - rows[0] != length - 1:
        raise ValueError(f'{data} has {len(rows)} rows of it; expected {length}, one after the other')
    table = table.slice(rows[0], length)
    actions = np.array(table['action'].to_pylist()).reshape(length, -1)
    if video:
        return islice(read_video(inside(root, video), start), length), actions
    return (read_picture(BytesIO(cell['bytes'])) for cell in table[camera].to_pylist()), actions


# -----------------------------------------------------------------------------
# Counter-Strike deathmatch (Pearce & Zhu 2021): HDF5

def csgo(root, settings):
    extra('h5py')
    one_of(root, '**/hdf5_dm_july2021_*.hdf5')
    found = glob.glob(f'{glob.escape(root)}/**/hdf5_dm_july2021_*.hdf5', recursive=True)
    split, start = csgo_split(settings['train_list'], settings['val_list'], settings['val_starts'])
    episodes = []
    for path in sorted(found, key=natural):
        name = os.path.basename(path)
        if re.search(r'july2021_\d+\.hdf5$', name) and (name in split or not split):
            episodes.append(Episode(path, partial(read_csgo, path), split.get(name, ''), start.get(name, -1)))
    if len(episodes) < len(split) and RANK == 0:
        print(f'{root}: {len(split) - len(episodes)} of the {len(split)} listed files are not there')
    return episodes


def csgo_split(train_list, val_list, val_starts):
    """{file name: train or val}, {file name: first frame}: of two lists with a file name in each line, and an .npy with
    a number for each line of the second."""
    if bool(train_list) != bool(val_list) or val_starts and not val_list:
        raise UserError('the published split is --train_list= and --val_list= together; --val_starts= goes with them')
    split, names = {}, []
    for part, path in (('train', train_list), ('val', val_list)):
        if path:
            with open(path) as f:
                stems = [os.path.splitext(os.path.basename(line.strip()))[0] for line in f if line.strip()]
            names = [f'{stem}.hdf5' for stem in stems]
            split |= dict.fromkeys(names, part)
    if not val_starts:
        return split, {}
    starts = np.load(val_starts, allow_pickle=False).ravel()
    if len(starts) != len(names) or (starts < 0).any() or (starts % 1).any():
        raise UserError(f'{val_starts} has {len(starts)} starts; expected a whole number of 0 or more for each of '
                        f'the {len(names)} files of {val_list}')
    return split, dict(zip(names, starts.astype(int).tolist(), strict=True))


def read_csgo(path):
    count = 0
    with extra('h5py').File(path) as f:
        while f'frame_{count}_x' in f:
            count += 1
        actions = [own_array(f, f'frame_{i}_y') for i in range(count)]
    return csgo_frames(path, count), actions


def csgo_frames(path, count):
    with extra('h5py').File(path) as f:
        for i in range(count):
            yield own_array(f, f'frame_{i}_x')[..., ::-1]  # stored as BGR


def own_array(f, name):
    """An array that lies in this HDF5 file itself: one could also point to any other file of the machine."""
    array = f[name]
    own = isinstance(f.get(name, getlink=True), extra('h5py').HardLink)
    if not own or array.is_virtual or array.external:
        raise ValueError(f'{name} lies in another file')
    if array.nbytes > 2 ** 26:  # a 4K frame is 2^25; a few bytes can promise any number of zeros
        raise ValueError(f'{name} is {list(array.shape)}, which is no frame')
    return array[:]


# -----------------------------------------------------------------------------
# the DINO-WM sets (Zhou et al. 2024): actions.pth [N,T,A], padded; a file with the frames of each episode

def dino_wm(folder, frames_file, root, settings):
    root = dino_folder(root, folder)
    return dino_episodes(root, load_array(one_of(root, 'actions.pth')), frames_file)


def dino_pusht(root, settings):
    """It comes with a split, as video, and with actions in pixels of its table, which become hundredths."""
    extra('av')
    root = dino_folder(root, 'pusht_noise')
    name = 'rel_actions.pth' if settings['relative_actions'] else 'abs_actions.pth'
    episodes = []
    for split in ('train', 'val'):
        folder = os.path.join(root, split)
        actions = load_array(one_of(folder, name)).astype(np.float32) / 100
        for episode in dino_episodes(folder, actions, 'obses/episode_{:03d}.mp4'):
            episodes.append(episode._replace(split=split))
    return episodes


def dino_folder(root, folder):
    """root may be the folder of all sets, or this one's."""
    path = os.path.join(root, folder)
    return path if os.path.isdir(path) else root


def dino_episodes(root, actions, frames_file):
    if actions.ndim != 3:
        raise UserError(f'{root}: its actions are {list(actions.shape)}; expected [episodes, steps, numbers]')
    count, steps, _ = actions.shape
    lengths = np.full(count, steps)
    found = glob.glob(f'{glob.escape(root)}/seq_lengths.p*')  # where all are equally long there may be none
    if found:
        lengths = load_array(found[0]).ravel().astype(int)
    if len(lengths) != count or lengths.min() < 1 or lengths.max() > steps:
        raise UserError(f'{root}: expected a length of 1 to {steps} for each of its {count} episodes in seq_lengths')
    one_of(root, re.sub('{.*}', '*', frames_file))
    episodes = []
    for i, length in enumerate(lengths):
        path = os.path.join(root, frames_file.format(i))
        episodes.append(Episode(path, partial(read_dino_wm, path, actions[i, :length])))
    return episodes


def read_dino_wm(path, actions):
    if path.endswith('.mp4'):
        return islice(read_video(path), len(actions)), actions
    frames = load_array(path)[:len(actions)]
    if frames.dtype != np.uint8:  # some were saved as float
        scale = 255 if frames.max() <= 1 else 1
        frames = (frames * scale).round().astype(np.uint8)
    return frames, actions


# -----------------------------------------------------------------------------

class Dataset(NamedTuple):
    reader: Callable  # (root, settings) -> Episodes
    variable: str  # of the environment, that says where the files are; '' where --root and --name have to
    about: str  # for --help


DINO_PTH = 'obses/episode_{:03d}.pth'

DATASETS = {
    'rt1': Dataset(lerobot, 'RT1_DATA_ROOT', 'RT-1, a robot arm'),
    'csgo': Dataset(csgo, 'CSGO_DATA_DIR', 'Counter-Strike deathmatch'),
    'dino_point_maze': Dataset(partial(dino_wm, 'point_maze', DINO_PTH), 'DATASET_DIR', 'of DINO-WM'),
    'dino_wall': Dataset(partial(dino_wm, 'wall_single', DINO_PTH), 'DATASET_DIR', 'of DINO-WM'),
    'dino_pusht': Dataset(dino_pusht, 'DATASET_DIR', 'of DINO-WM'),
    'dino_rope': Dataset(partial(dino_wm, 'deformable/rope', '{:06d}/obses.pth'), 'DATASET_DIR', 'of DINO-WM'),
    'dino_granular': Dataset(partial(dino_wm, 'deformable/granular', '{:06d}/obses.pth'), 'DATASET_DIR', 'of DINO-WM'),
    'lerobot': Dataset(lerobot, '', 'any LeRobot dataset, v2.0 to v3.0'),
    'clips': Dataset(clips, '', 'your recordings: videos, GIFs, arrays or folders of pictures, and their actions'),
}
