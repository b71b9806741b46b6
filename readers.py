"""Published datasets as they are on disk: each reader lists the episodes of a folder and reads one at a time.

    rt1, lerobot                      LeRobot v2.0, v2.1 and v3.0: parquet and video
    csgo                              Counter-Strike deathmatch (Pearce & Zhu 2021): HDF5
    dino_point_maze, dino_wall, ...   the five DINO-WM sets (Zhou et al. 2024): .pth, .pkl and video
    clips                             your own recordings: a folder of clips with their actions beside them
    wall, pusht                       the worlds of envs.py: here reading is playing

A reader returns a Source. These files come from strangers: nothing in them is ever run. `data.py` does the rest.
"""
import bisect
import contextlib
import csv
import functools
import glob
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import envs

ROOTS = {'rt1': 'RT1_DATA_ROOT', 'csgo': 'CSGO_DATA_DIR'}  # where a reader looks without --root
DINO_WM = {'point_maze': 'point_maze', 'wall': 'wall_single', 'pusht': 'pusht_noise',
           'rope': 'deformable/rope', 'granular': 'deformable/granular'}
ROOTS |= {f'dino_{name}': 'DATASET_DIR' for name in DINO_WM}
VIDEO = ('.mp4', '.mkv', '.webm', '.mov', '.avi')
IMAGE = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')


class Episode(NamedTuple):
    name: str  # how a person would find it again: a path, or a path and a number
    length: int  # frames
    key: tuple  # what `read` needs
    split: str = ''  # train or val; '' if the publisher does not say
    start: int = -1  # the published first frame of its fixed validation clip


class Source(NamedTuple):
    """Episodes, numbers per action, and read(key) -> frames uint8 [T,H,W,3], actions float [T,A] (to be pickled)."""
    episodes: list
    action_dim: int
    read: Callable


class Missing(Exception):
    """The folder is not what the reader expects, or a package is not installed: one line to show."""


def open_source(settings):
    """The Source that data.py's settings name; read_episode then reads from it. Raises Missing."""
    what, root, episodes = settings['what'], os.path.expanduser(settings['root']), settings['episodes']
    if what in envs.WORLDS:
        source = world(what, episodes, settings['image_size'], settings['seed'])
    elif what == 'clips':
        source = clips(root)
    elif what == 'csgo':
        source = csgo(root, settings['train_list'], settings['val_list'], settings['val_starts'])
    elif what in ('rt1', 'lerobot'):
        source = lerobot(root, settings['image_key'])
    else:
        source = dino_wm(root, what.removeprefix('dino_'), settings['relative_actions'])
    if 0 < episodes < len(source.episodes):  # spread over all of them, with at least one of each split
        chosen = {int(i * len(source.episodes) / episodes) for i in range(episodes)}
        split = [e.split for e in source.episodes]
        chosen |= {split.index(s) for s in set(split) - {split[i] for i in chosen}}
        source = source._replace(episodes=[source.episodes[i] for i in sorted(chosen)])
    opened[:] = [source]
    return source


opened = []  # the Source that this process reads


def start_worker(source):
    """What a reading process does first: it leaves when its parent does, even by kill -9 or Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()
    torch.set_num_threads(1)
    opened[:] = [source]


def read_episode(number, size):
    """(pixels uint8 [T,3,size,size], actions [T,A], None), or (None, None, why it is broken)."""
    source, episode = opened[0], opened[0].episodes[number]
    try:
        frames, actions = source.read(episode.key)
        want = episode.length, source.action_dim
        if not episode.length:
            raise ValueError('it has no frames')
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f'frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T,H,W,3]')
        if len(frames) != episode.length or actions.shape != want:
            raise ValueError(f'{len(frames)} frames and actions {list(actions.shape)}; expected {want[0]} frames and '
                             f'{want[1]} numbers for each')
        if not np.isfinite(actions).all():
            raise ValueError('some actions are not finite')
        return resize(frames, size), actions, None
    except Exception as e:  # whatever is wrong with one episode, the others go on
        return None, None, f'{type(e).__name__}: {e}'


def resize(frames, size):
    """uint8 [T,H,W,3] -> uint8 [T,3,size,size], stretched (bilinear, anti-aliased)."""
    x = torch.from_numpy(np.require(frames, requirements=['C', 'W'])).permute(0, 3, 1, 2)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x.float(), (size, size), mode='bilinear', antialias=True).round().clamp(0, 255).byte()
    return x.numpy()


def extra(module, package=None):
    """Import a module that only this dataset needs."""
    try:
        return __import__(module, fromlist=['_'])
    except ImportError as e:
        raise Missing(f'reading this dataset needs {module}: pip install {package or module}') from e


def one_of(root, *patterns):
    """The first file that matches one of the patterns under root."""
    for pattern in patterns:
        if found := sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True)):
            return found[0]
    there = ', '.join(sorted(os.listdir(root))[:8]) or 'nothing' if os.path.isdir(root) else 'no such folder'
    raise Missing(f'{root}: looked there for {" or ".join(patterns)} and found {there}')


def read_video(path, first, count):
    """Frames first to first + count as uint8 [count,H,W,3]; seeks once, then decodes in order."""
    frames = []
    with iio.imopen(path, 'r', plugin='pyav') as f:
        try:
            for i in range(first, first + count):
                frames.append(f.read(index=i, thread_type='SLICE'))
        except (StopIteration, EOFError, IndexError):
            raise ValueError(f'{os.path.basename(path)} ends at frame {first + len(frames)}, '
                             f'before {first + count}') from None
    return np.stack(frames)


# -----------------------------------------------------------------------------
# LeRobot

def lerobot(root, image_key, action_key='action'):
    """meta/info.json says where episodes are: each in files of its own (v2), or many in one (v3). Raises Missing."""
    parquet = extra('pyarrow.parquet', 'pyarrow')
    with open(one_of(root, 'meta/info.json')) as f:
        info = json.load(f)
    features = info['features']
    cameras = [k for k, v in features.items() if v['dtype'] in ('video', 'image')]
    if action_key not in features:
        raise Missing(f'{root}/meta/info.json: no feature {action_key!r}, but {", ".join(features)}')
    if image_key not in cameras:
        raise Missing(f'{root}/meta/info.json: no camera {image_key!r}; '
                      f'its cameras are {", ".join(cameras) or "none"}: choose one with --image_key=')
    packed = not info['codebase_version'].startswith('v2')  # v3.0 keeps many episodes in one file
    if packed:
        one_of(root, 'meta/episodes/*/*.parquet')
        rows = [row for path in sorted(glob.glob(f'{glob.escape(root)}/meta/episodes/*/*.parquet'))
                for row in parquet.read_table(path, columns=[
                    c for c in parquet.read_schema(path).names if not c.startswith('stats/')]).to_pylist()]
    else:
        with open(one_of(root, 'meta/episodes.jsonl')) as f:
            rows = [json.loads(line) for line in f if line.strip()]

    def place(row):
        """(data file, video file, first frame in the video) of an episode."""
        i = row['episode_index']
        if not packed:
            names = dict(episode_index=i, episode_chunk=i // info['chunks_size'], video_key=image_key)
            return info['data_path'].format(**names), (info.get('video_path') or '').format(**names), 0
        prefix = f'videos/{image_key}'
        video = info['video_path'] and info['video_path'].format(
            video_key=image_key, chunk_index=row.get(f'{prefix}/chunk_index', 0),
            file_index=row.get(f'{prefix}/file_index', 0))
        return (info['data_path'].format(chunk_index=row['data/chunk_index'], file_index=row['data/file_index']),
                video, round(row.get(f'{prefix}/from_timestamp', 0) * info['fps']))

    as_video = features[image_key]['dtype'] == 'video'
    as_video and extra('av')  # says now, not for every episode, if it is missing
    columns = ('episode_index', action_key) if as_video else ('episode_index', action_key, image_key)
    splits = {k: [int(n) for n in v.split(':')] for k, v in info.get('splits', {}).items() if k in ('train', 'val')}
    splits = splits if 'val' in splits else {}  # most have one for training only

    def split(i):
        return next((k for k, (first, end) in splits.items() if first <= i < end), '')

    episodes = [Episode(f'{root} episode {r["episode_index"]}', r['length'],
                        (r['episode_index'], r['length'], *place(r)), split(r['episode_index'])) for r in rows]
    return Source(episodes, int(np.prod(features[action_key]['shape'])),
                  functools.partial(read_lerobot, root, columns))


@functools.lru_cache(maxsize=1)  # the next episode is in the same file
def parquet_table(path, columns):
    table = extra('pyarrow.parquet', 'pyarrow').read_table(path, columns=list(columns))
    return table['episode_index'].to_numpy(), table


def read_lerobot(root, columns, key):
    i, length, data, video, first = key
    index, table = parquet_table(os.path.join(root, data), columns)
    rows = np.flatnonzero(index == i)
    if len(rows) != length:
        raise ValueError(f'{data} has {len(rows)} rows of it, not {length}')
    table = table.slice(rows[0], length)
    if len(columns) == 2:
        frames = read_video(os.path.join(root, video), first, length)
    else:  # pictures in the table
        frames = np.stack([np.asarray(Image.open(io.BytesIO(x['bytes'])).convert('RGB'))
                           for x in table[columns[2]].to_pylist()])
    return frames, np.array(table[columns[1]].to_pylist()).reshape(length, -1)


# -----------------------------------------------------------------------------
# CSGO

def csgo(root, train_list='', val_list='', val_starts=''):
    """The published split is two text files, a file name in each line, and an .npy with a start for each of val's."""
    h5py = extra('h5py')
    one_of(root, '**/hdf5_dm_july2021_*.hdf5')
    found = glob.glob(f'{glob.escape(root)}/**/hdf5_dm_july2021_*.hdf5', recursive=True)
    found = {os.path.basename(p): p for p in sorted(found, key=natural) if re.search(r'july2021_\d+\.hdf5$', p)}
    if val_starts and not val_list or bool(train_list) != bool(val_list):
        raise Missing('the published split is --train_list= and --val_list= together, and --val_starts= goes with them')
    split, start = {}, {}
    for name, path in (('train', train_list), ('val', val_list)):
        if path:
            with open(path) as f:
                listed = [os.path.splitext(os.path.basename(line.strip()))[0] + '.hdf5' for line in f if line.strip()]
            split |= dict.fromkeys(listed, name)
            if name == 'val' and val_starts:
                starts = np.load(val_starts, allow_pickle=False).ravel()
                if len(starts) != len(listed) or (starts < 0).any() or (starts % 1).any():
                    raise Missing(f'{val_starts} has {len(starts)} starts; expected a whole number of 0 or more for '
                                  f'each of the {len(listed)} files of {path}')
                start = dict(zip(listed, starts.astype(int).tolist(), strict=True))
    if split:
        absent = [name for name in split if name not in found]
        if absent:
            print(f'{root}: {len(absent)} of the {len(split)} listed files are not there, {absent[0]} for one')
        found = {name: path for name, path in found.items() if name in split}

    def length(path):
        try:
            with h5py.File(path) as f:
                return bisect.bisect_left(range(1000), True, key=lambda i: f'frame_{i}_x' not in f)
        except OSError:
            return 1000  # broken: reading it will say so by name

    episodes = []
    for name, path in tqdm(found.items(), desc='looking into files', unit='file', leave=False,
                           disable=int(os.environ.get('RANK', 0)) > 0):
        n = length(path)
        if start.get(name, -1) >= n:
            raise Missing(f'{val_starts}: start {start[name]} of {path}, which has {n} frames')
        episodes.append(Episode(path, n, (path, n), split.get(name, ''), start.get(name, -1)))
    return Source(episodes, 51, read_csgo)


def read_csgo(key):
    path, length = key
    with extra('h5py').File(path) as f:
        frames = np.stack([f[f'frame_{i}_x'][:] for i in range(length)])
        return frames[..., ::-1], np.stack([f[f'frame_{i}_y'][:] for i in range(length)])  # stored as BGR


# -----------------------------------------------------------------------------
# DINO-WM

class PlainUnpickler(pickle.Unpickler):
    """Lists, numbers and numpy arrays; anything else in the file is refused before it can do something."""
    ALLOWED = {'_reconstruct', '_frombuffer', 'ndarray', 'dtype', 'scalar'}

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'it holds a {module}.{name}; only lists, numbers and arrays are read')


def load_plain(path):
    """The numbers in a .pkl, or the tensor or array in a .pth, as an array."""
    rebuild = np.zeros(0).__reduce__()[0]  # numpy's own, wherever this version keeps it and older files look for it
    names = [(rebuild, f'numpy.{m}.multiarray._reconstruct') for m in ('core', '_core')]
    dtypes = [type(np.dtype(d)) for d in ('u1', 'i4', 'i8', 'f4', 'f8')]
    try:
        if path.endswith('.pkl'):
            with open(path, 'rb') as f:
                return np.asarray(PlainUnpickler(f).load())
        with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *dtypes]):
            return np.asarray(torch.load(path, map_location='cpu', weights_only=True))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as e:
        raise Missing(f'{path} cannot be read: {str(e).splitlines()[0]}') from e


def dino_wm(root, name, relative_actions=True):
    """actions.pth [N,T,A] (pusht: rel_actions.pth or abs_actions.pth) with obses/episode_000.pth or .mp4; in the
    deformable sets 000000/obses.pth. pusht's actions are pixels and become hundredths. Raises Missing."""
    for folder in (os.path.join(root, DINO_WM[name]), root):  # the folder of all sets, or this one
        if os.path.isdir(folder):
            root = folder
            break
    episodes, actions = [], {}
    parts = {'train': f'{root}/train', 'val': f'{root}/val'} if name == 'pusht' else {'': root}
    for split, part in parts.items():
        stem = {True: 'rel_actions', False: 'abs_actions'}[relative_actions] if name == 'pusht' else 'actions'
        actions[split] = load_plain(one_of(part, f'{stem}.pth')).astype(np.float32)
        if name == 'pusht':
            actions[split] = actions[split] / 100  # from pixels of its 512-wide table
        if actions[split].ndim != 3:
            raise Missing(f'{part}/{stem}.pth is {list(actions[split].shape)}; expected [episodes, steps, numbers]')
        N, T = actions[split].shape[:2]
        lengths = [T] * N
        if name in ('point_maze', 'wall', 'pusht'):
            files = glob.glob(f'{glob.escape(part)}/seq_lengths.p*')  # where all are equally long there may be none
            lengths = [int(n) for n in load_plain(files[0]).ravel()] if files else lengths
            if len(lengths) != N:
                raise Missing(f'{files[0]} has {len(lengths)} lengths for the {N} episodes of {stem}.pth')
            one_of(part, 'obses/episode_*.*')
            name == 'pusht' and extra('av')
            paths = [f'{part}/obses/episode_{i:03d}.{"mp4" if name == "pusht" else "pth"}' for i in range(N)]
        else:
            one_of(part, '[0-9]*/obses.pth')
            paths = [f'{part}/{i:06d}/obses.pth' for i in range(N)]
        episodes += [Episode(path, lengths[i], (path, split, i, lengths[i]), split) for i, path in enumerate(paths)]

    return Source(episodes, next(iter(actions.values())).shape[2], functools.partial(read_dino_wm, actions))


def read_dino_wm(actions, key):
    path, split, i, length = key
    frames = read_video(path, 0, length) if path.endswith('mp4') else load_plain(path)[:length]
    if frames.dtype != np.uint8:  # some were saved as float
        frames = (frames * (255 if frames.max() <= 1 else 1)).round().astype(np.uint8)
    return frames, actions[split][i, :length]


# -----------------------------------------------------------------------------
# worlds: every episode has a seed of its own; the last tenth is for validation

def world(name, episodes, size, seed):
    """So many episodes of envs.WORLDS[name], rendered at size x size. Raises Missing."""
    simulator(name)  # says now if it is not installed
    if episodes < 2:
        raise Missing(f'episodes={episodes}: expected 2 or more, one is for validation')
    steps, num_val = envs.EPISODE_STEPS[name], max(1, episodes // 10)
    return Source([Episode(f'{name} {i}', steps, (seed * 1_000_000 + i,), 'train' if i < episodes - num_val else 'val')
                   for i in range(episodes)], 2, functools.partial(play, name, steps, size))


@functools.cache
def simulator(name):
    try:
        return envs.WORLDS[name]()
    except SystemExit as e:
        raise Missing(str(e)) from e


def play(name, steps, size, key):
    env, rng = simulator(name), np.random.default_rng([*key, 1])  # not reset's own stream
    frames, actions = np.empty((steps, size, size, 3), np.uint8), np.empty((steps, 2), np.float32)
    env.reset(*key)
    for i in range(steps):
        frames[i] = env.render(size).transpose(1, 2, 0)
        actions[i] = env.explore(rng)
        env.step(actions[i])
    return frames, actions


# -----------------------------------------------------------------------------
# your own recordings

def clips(root):
    """name.mp4 (or .gif, .npy [T,H,W,3], a folder of images), with name.npy or name.csv: a row of numbers per frame.

    Raises Missing.
    """
    if not os.path.isdir(root):
        raise Missing(f'{root}: no such folder; expected clips (name.mp4, name.gif, name.npy or a folder of images) '
                      'with their actions in name.npy or name.csv')
    episodes, widths, taken = [], [], {}
    for name in sorted(os.listdir(root), key=natural):
        path, (stem, ext) = os.path.join(root, name), os.path.splitext(os.path.join(root, name))
        video = ext.lower() in (*VIDEO, '.gif') or os.path.isdir(path) and images(path)
        if name.startswith('.') or not video and ext.lower() != '.npy':
            continue
        stem, length = path if os.path.isdir(path) else stem, 0
        try:
            if not video and np.load(path, mmap_mode='r', allow_pickle=False).ndim < 3:
                continue  # actions
            length = count_frames(path)
        except Missing:
            raise
        except Exception:  # reading it will say why, by name
            pass
        if stem in taken:
            raise Missing(f'{path} and {taken[stem]} have one name, and so the same actions: rename one')
        beside = [p for p in (f'{stem}.npy', f'{stem}.csv') if os.path.exists(p) and p != path]
        if not beside and (video or length):
            wanted = f'{stem}.csv' if not video else f'{stem}.npy or {stem}.csv'
            raise Missing(f'{path} has no actions beside it: expected {wanted}, a row for each frame')
        if beside:
            taken[stem] = path
            with contextlib.suppress(Exception):
                widths.append(load_actions(beside[0]).shape[1])
            episodes.append(Episode(path, length or 1, (path, beside[0])))
    if not episodes:
        raise Missing(f'{root}: no clips there; looked for {", ".join(VIDEO)}, .gif, .npy and folders of images')
    return Source(episodes, max(set(widths or [0]), key=widths.count), read_clip)


def natural(s):
    """A key that sorts 2 before 10."""
    return [int(x) if x.isdecimal() else x for x in re.split(r'(\d+)', s)]


def images(folder):
    return sorted((p for p in glob.glob(f'{glob.escape(folder)}/*') if p.lower().endswith(IMAGE)), key=natural)


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def load_actions(path):
    """[T,A] of an .npy, or of a .csv with or without a line of names."""
    if path.endswith('.npy'):
        values = np.load(path, allow_pickle=False)
    else:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = [row for row in csv.reader(f) if row]
        if not any(map(is_number, rows[0])):
            rows = rows[1:]
        values = np.array(rows, dtype=np.float32)
    return values.reshape(len(values), -1)


def load_image(path):
    with Image.open(path) as image:
        if image.mode.startswith('I'):
            raise ValueError(f'{os.path.basename(path)} has 16 bits or more; expected 8')
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))


def load_frames(path):
    if os.path.isdir(path):
        return np.stack([load_image(p) for p in images(path)])
    if path.lower().endswith('.npy'):
        return np.load(path, mmap_mode='r', allow_pickle=False)
    if path.lower().endswith('.gif'):
        return iio.imread(path, plugin='pillow', mode='RGB', index=None)
    with extra('av').open(path) as f:
        f.streams.video[0].thread_type = 'SLICE'  # threads over frames would swallow the error of a file cut short
        return np.stack([np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)  # a telephone held upright
                         for frame in f.decode(video=0)])


def count_frames(path):
    if os.path.isdir(path):
        return len(images(path))
    if path.lower().endswith(VIDEO):  # its packets, as the header of a trimmed video counts what is not shown
        with extra('av').open(path) as f:
            return sum(p.size > 0 and not p.is_discard for p in f.demux(video=0))
    return len(load_frames(path))


def read_clip(key):
    path, beside = key
    frames, values = load_frames(path), load_actions(beside)
    if len(values) == len(frames) - 1:  # nothing was done at the last frame
        values = np.concatenate([values, values[-1:]])
    if len(frames) != len(values):
        raise ValueError(f'{len(frames)} frames, but {len(values)} actions in {os.path.basename(beside)}')
    return np.asarray(frames), values
