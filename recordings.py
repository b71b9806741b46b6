"""Your own recordings: frames and actions out of ordinary files.

    name.mp4, name.gif, name.npy [T,H,W,3] or a folder of pictures, name/
    name.csv or name.npy beside it: a row of numbers for each frame

Frames come one at a time, uint8 [H,W,3]: a minute of 1080p video would take 11 GB of memory.
"""
import glob
import os
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from configurator import UserError, extra

VIDEO = ('.mp4', '.mkv', '.webm', '.mov', '.avi', '.gif')
CONTAINERS = 'mov,mp4,matroska,webm,avi,gif'  # others, like concat, can be lists of any files
PICTURE = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')


class Episode(NamedTuple):
    """Where one episode is read; it travels to other processes."""
    name: str  # how a person would find it again: a path, or a path and a number
    read: Callable  # () -> frames, any iterable of uint8 [H,W,3], and actions [T,A]
    split: str = ''  # train or val; '' if the publisher does not say
    start: int = -1  # the published first frame of its fixed validation clip
    num_frames: int = 0  # of the stretch to take, from there or in the middle; 0 is the whole
    length: int = 0  # the frames of the whole, where that is known before it is read


def read_episode(episode, size, how='stretch'):
    """(pixels uint8 [T,3,*size], actions float32 [T,A], ''), or (None, None, what is wrong)."""
    try:
        frames, actions = episode.read()
        pixels = [resize(frame, size, how) for frame in frames]  # only the small ones are kept
        actions = np.asarray(actions)
        if actions.dtype.kind not in 'fiub':
            raise ValueError(f'actions are {actions.dtype}; expected numbers')
        actions = actions.astype(np.float32)
        if len(actions) == len(pixels) - 1:  # nothing was done at the last frame
            actions = np.concatenate([actions, actions[-1:]])
        if len(actions) != len(pixels) or actions.ndim != 2:
            raise ValueError(f'{len(pixels)} frames, but actions {list(actions.shape)}')
        if not np.isfinite(actions).all():
            raise ValueError('some actions are not finite')
        first, count = episode.start, episode.num_frames or len(pixels)
        if first < 0:
            first = max(0, (len(pixels) - count) // 2)  # from the middle
        pixels, actions = pixels[first:first + count], actions[first:first + count]
        if not pixels:
            raise ValueError('it has no frames, or none where its validation clip begins')
        return np.stack(pixels), actions, ''
    except Exception as e:  # whatever is wrong with one episode, the others go on
        return None, None, f'{type(e).__name__}: {e}'


RESIZE = {  # a picture of another shape: the whole between black borders, or its middle
    'stretch': Image.Image.resize, 'pad': ImageOps.pad, 'crop': ImageOps.fit}


def resize(frame, size, how='stretch'):
    """uint8 [H,W,3] -> uint8 [3,*size], bilinear and anti-aliased."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f'a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H,W,3]')
    picture = Image.fromarray(np.ascontiguousarray(frame))
    picture = RESIZE[how](picture, size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def clips(root, settings):
    """The Episodes of a folder of recordings. Raises UserError."""
    recordings, arrays = {}, {}  # {path without its ending: path}
    for path in glob.glob(f'{glob.escape(root)}/*'):
        stem, ending = os.path.splitext(path)
        if pictures(path):
            stem = path
        elif ending == '.npy':
            arrays[stem] = path
            continue
        elif ending.lower() not in VIDEO:
            continue
        if stem in recordings:
            raise UserError(f'{recordings[stem]} and {path} are two recordings of one name: '
                            'rename one of them')
        recordings[stem] = path
    recordings = arrays | recordings  # beside another recording, an array is its actions
    episodes = []
    for stem in sorted(recordings, key=natural):
        path = recordings[stem]
        beside = [f'{stem}.csv', f'{stem}.npy']
        actions = [file for file in beside if file != path and os.path.exists(file)]
        if not actions:
            raise UserError(f'{path} has no actions beside it: expected {stem}.csv or .npy, '
                            'a row of numbers for each frame')
        episodes.append(Episode(path, partial(read_clip, path, actions[0])))
    if not episodes:
        raise UserError(f'{root}: no clips there; looked for {", ".join(VIDEO)}, .npy '
                        'and folders of pictures')
    return episodes


def read_clip(path, actions):
    return read_frames(path), read_actions(actions)


def read_frames(path):
    """The frames of a video, GIF, folder of pictures or .npy [T,H,W,3], one after the other."""
    if os.path.isdir(path):
        return map(read_picture, pictures(path))
    if path.endswith('.npy'):
        return np.load(ordinary(path), mmap_mode='r', allow_pickle=False)
    return read_video(path)


def ordinary(path):
    """The path, made sure to be one of a file: to open a pipe could take for ever."""
    if not os.path.isfile(path):
        raise ValueError(f'{path} is missing, a folder, a pipe or a device')
    return path


def read_video(path, start=0.0):
    """Yield the frames of a video from `start` seconds on, turned upright."""
    with extra('av').open(ordinary(path), options={'format_whitelist': CONTAINERS}) as f:
        stream = f.streams.video[0]
        # threads over frames would swallow the error of a file that was cut short
        stream.thread_type = 'SLICE'
        if start > 0:
            f.seek(int(start / stream.time_base), stream=stream)  # to the key frame before it
        for frame in f.decode(stream):
            if start > 0 and frame.time < start - 0.5 / stream.average_rate:
                continue
            # a telephone held upright records a picture on its side, and how much to turn it
            yield np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)


def read_picture(path):
    with Image.open(ordinary(path)) as image:
        if image.mode.startswith('I'):
            raise ValueError(f'{path} has 16 bits or more; expected 8')
        return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))


def pictures(folder):
    """The picture files of a folder, in order."""
    paths = glob.glob(f'{glob.escape(folder)}/*')
    return sorted((path for path in paths if path.lower().endswith(PICTURE)), key=natural)


def read_actions(path):
    """[T,A] of an .npy, or of a .csv with or without a line of names."""
    if path.endswith('.npy'):
        values = np.load(ordinary(path), allow_pickle=False)
        return values.reshape(len(values), -1)
    path = ordinary(path)
    rows = np.loadtxt(path, dtype=str, delimiter=',', comments=None, quotechar='"', ndmin=2,
                      encoding='utf-8-sig')  # spreadsheets begin with a mark
    try:
        float(rows[0, 0])
    except ValueError:  # it begins with names
        rows = rows[1:]
    return rows.astype(np.float32)


def natural(text):
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', text)]
