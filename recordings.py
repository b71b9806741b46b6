"""Your own recordings: frames and actions out of ordinary files, which the readers of published datasets use too.

    name.mp4, name.gif, name.npy [T,H,W,3] or a folder of pictures, name/
    name.npy or name.csv beside it: a row of numbers for each frame

Frames come one at a time, uint8 [H,W,3], so that a minute of 1080p video is never in memory as a whole.
"""
import csv
import glob
import os
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from configurator import UserError

VIDEO = ('.mp4', '.mkv', '.webm', '.mov', '.avi')
PICTURE = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')


class Episode(NamedTuple):
    """read() gives its frames, any iterable of uint8 [H,W,3], and its actions [T,A]; it travels to other processes."""
    name: str  # how a person would find it again: a path, or a path and a number
    read: Callable
    split: str = ''  # train or val; '' if the publisher does not say
    start: int = -1  # the published first frame of its fixed validation clip
    num_frames: int = 0  # of the stretch that is taken, from that frame or in the middle; 0 is the whole episode


def clips(root, settings):
    """The Episodes of a folder of recordings. Raises UserError."""
    if not os.path.isdir(root):
        raise UserError(f'{root}: no such folder')
    episodes, owner = [], {}
    for name in sorted(os.listdir(root), key=natural):
        path = os.path.join(root, name)
        if name.startswith('.') or not is_clip(path):
            continue
        stem, ending = os.path.splitext(path)
        if os.path.isdir(path):
            stem = path
        candidates = [f'{stem}.npy', f'{stem}.csv']
        if ending.lower() == '.npy':
            candidates = [f'{stem}.csv']
        if stem in owner:
            raise UserError(f'{path} and {owner[stem]} have one name, and so the same actions: rename one')
        owner[stem] = path
        actions = [candidate for candidate in candidates if os.path.exists(candidate)]
        if not actions:
            raise UserError(f'{path} has no actions beside it: '
                            f'expected {" or ".join(candidates)}, a row for each frame')
        episodes.append(Episode(path, partial(read_clip, path, actions[0])))
    if not episodes:
        raise UserError(f'{root}: no clips there; looked for {", ".join(VIDEO)}, .gif, .npy and folders of pictures')
    return episodes


def is_clip(path):
    """Is it something that read_frames reads? An .npy may just as well hold the actions of another file."""
    stem, ending = os.path.splitext(path)
    if os.path.isdir(path):
        return bool(pictures(path))
    if ending.lower() != '.npy':
        return ending.lower() in (*VIDEO, '.gif')
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False).ndim >= 3
    except (OSError, EOFError, ValueError):
        return os.path.exists(f'{stem}.csv')  # a clip then, though a broken one: reading it says so by name


def read_clip(path, actions):
    return read_frames(path), read_actions(actions)


def read_frames(path):
    """The frames of a video, GIF, folder of pictures or .npy [T,H,W,3], one after the other."""
    if os.path.isdir(path):
        return map(read_picture, pictures(path))
    if path.lower().endswith('.npy'):
        return np.load(path, mmap_mode='r', allow_pickle=False)
    if path.lower().endswith('.gif'):
        return iio.imiter(path, plugin='pillow', mode='RGB')
    return read_video(path)


def read_video(path, start=0.0):
    """Yield the frames of a video from `start` seconds on, turned upright."""
    with extra('av').open(path) as f:
        stream = f.streams.video[0]
        stream.thread_type = 'SLICE'  # threads over frames would swallow the error of a file cut short
        if start > 0:
            f.seek(int(start / stream.time_base), stream=stream)  # to the key frame before it
        for frame in f.decode(stream):
            if start > 0 and frame.time < start - 0.5 / stream.average_rate:
                continue
            # a telephone held upright records a picture on its side, and by how much to turn it
            yield np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)


def read_picture(file):
    """A picture file, by its path or open, as uint8 [H,W,3]."""
    with Image.open(file) as image:
        if image.mode.startswith('I'):
            raise ValueError(f'{file} has 16 bits or more; expected 8')
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))


def pictures(folder):
    """The picture files of a folder, in order."""
    paths = glob.glob(f'{glob.escape(folder)}/*')
    return sorted((path for path in paths if path.lower().endswith(PICTURE)), key=natural)


def read_actions(path):
    """[T,A] of an .npy, or of a .csv with or without a line of names."""
    if path.endswith('.npy'):
        values = np.load(path, allow_pickle=False)
    else:
        with open(path, newline='', encoding='utf-8-sig') as f:  # a spreadsheet's byte-order mark is no header
            rows = [row for row in csv.reader(f) if row]
        if not any(map(is_number, rows[0])):
            rows = rows[1:]
        values = np.array(rows, dtype=np.float32)
    return values.reshape(len(values), -1)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def natural(text):
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', text)]


def extra(module, package=None):
    """Import a module that only some datasets need."""
    try:
        return __import__(module, fromlist=['_'])
    except ImportError as e:
        raise UserError(f'reading this dataset needs {module}: pip install {package or module}') from e
