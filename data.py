"""Clips of frames and actions, cut from arrays that stay on disk.

    python data.py wall           # makes data/wall; prepare.py says what else it can make

A prepared dataset is a folder with meta.json and, for each split, arrays that are memory-mapped:

    {train,val}/frames.npy      uint8 [N,3,H,W] pixels, or float16 [N,C,H,W] latents, of all episodes
    {train,val}/actions.npy     float32 or other numbers [N,A]; actions[i] is done at frames[i]
    {train,val}/episodes.npy    int64 [E+1]; episode e is rows episodes[e] to episodes[e+1]
    val/pixels.npy              uint8 [N,3,H,W], with latents: the original pixels of the same rows
"""
import json
import os
import runpy
from functools import cached_property

import numpy as np
import torch

from configurator import UserError

UNREADABLE = (OSError, ValueError, EOFError, OverflowError, RecursionError)  # what a broken array or JSON raises


class Clips:
    """Clips of `num_frames` frames, `frame_interval` apart, that never cross an episode.

    The actions between two kept frames are concatenated, so a clip's action is [F, frame_interval * A].
    `normalize` standardises each of the A numbers: True by the training split's (mean, std), or give a
    pair, as a checkpoint does. A clip is numbered by its start; len() counts every possible one.
    Raises UserError.
    """

    def __init__(self, root, split, num_frames, frame_interval=1, normalize=False):
        self.num_frames, self.interval = num_frames, frame_interval
        self.root, self.split = os.path.normpath(root), split
        self.folder = os.path.join(self.root, split)
        try:
            self.frames = self.load('frames')
            self.actions = self.load('actions')
            self.episodes = self.load('episodes')
            with open(os.path.join(self.root, 'meta.json')) as f:
                self.meta = json.load(f)
        except UNREADABLE as e:
            name = os.path.basename(self.root)
            raise UserError(f'no prepared dataset at {self.folder} ({e}): make it with '
                            f'python data.py {name}, or see docs/datasets.md for its format') from e
        self.check()
        self.action_dim = frame_interval * self.actions.shape[1]
        self.mean, self.std = self.action_scale(normalize)

        span = (num_frames - 1) * frame_interval
        starts = np.maximum(np.diff(self.episodes) - span, 0)  # an episode that is too short has none
        self.cumulative = np.concatenate([[0], np.cumsum(starts)])
        if len(self) == 0:
            raise UserError(f'{self.folder}: no episode has {span + 1} frames, which num_frames='
                            f'{num_frames} at frame_interval={frame_interval} needs; lower one of them')

    def load(self, name, split=''):
        path = os.path.join(self.root, split or self.split, f'{name}.npy')
        if not os.path.isfile(path):  # to open a pipe would block for ever
            raise FileNotFoundError(f'no file {name}.npy')
        return np.lib.format.open_memmap(path, mode='r')

    def check(self):
        """Raises UserError if the arrays are not what the top of this file says."""
        frames, actions, episodes = self.frames, self.actions, self.episodes
        pixels = frames.dtype == np.uint8 and frames.shape[1:2] == (3,)
        latents = frames.dtype == np.float16 and frames.shape[1:2] != (3,)  # 3 channels mean pixels
        fit = frames.ndim == 4 and frames.size > 0 and (pixels or latents)
        fit = fit and actions.ndim == 2 and actions.dtype.kind in 'fiu' and len(actions) == len(frames)
        fit = fit and episodes.ndim == 1 and episodes.dtype.kind in 'iu' and len(episodes) > 1
        if fit:
            self.actions = np.asarray(actions, np.float32)  # stays on the disk if it is float32
            self.episodes = np.asarray(episodes, np.int64)
            rising = (np.diff(self.episodes) >= 0).all()
            fit = rising and self.episodes[0] == 0 and self.episodes[-1] == len(frames)
        if not fit:
            found = ', '.join(f'{x.dtype} {list(x.shape)}' for x in (frames, actions, episodes))
            raise UserError(f'{self.folder}: expected frames uint8 [N,3,H,W] or latents float16 '
                            '[N,C,H,W], actions float32 [N,A], episodes rising from 0 to N; '
                            f'found {found}')
        if self.split == 'val' and os.path.isfile(f'{self.root}/train/frames.npy'):
            try:
                train = self.load('frames', 'train').shape[1:], self.load('actions', 'train').shape[1:]
            except UNREADABLE as e:
                raise UserError(f'{self.root}/train is incomplete or broken ({e}): '
                                'make the dataset again') from e
            if train != (frames.shape[1:], actions.shape[1:]):
                raise UserError(f'{self.folder}: frames {frames.shape[1:]} and actions {actions.shape[1:]}'
                                f' are not of the size of those for training, {train[0]} and {train[1]}')
        if not isinstance(self.meta, dict) or not isinstance(self.meta.get('what', ''), str):
            raise UserError(f'{self.root}/meta.json: expected what docs/datasets.md says of it')

    def action_scale(self, normalize):
        """(mean, std) float32 of the A numbers; (0, 1) leaves them as they are. Raises UserError."""
        own, numbers = normalize is True, self.actions.shape[1]
        if own:
            normalize = self.meta.get('action_mean'), self.meta.get('action_std')
        try:
            mean, std = np.float32(normalize or (0, 1))
        except (TypeError, ValueError):
            mean = std = np.float32('nan')
        fits = mean.shape in ((), (numbers,))
        if not fits and not own:
            raise UserError(f'{self.folder}: actions have {numbers} numbers there, and {mean.size} where '
                            'the model was trained; choose another dataset')
        usable = np.isfinite(mean) & np.isfinite(std) & (std >= 0)
        if not fits or not usable.all():
            raise UserError(f'{self.folder}: normalising needs mean and std of {numbers} numbers, '
                            'action_mean and action_std in meta.json')
        std = np.where(std == 0, np.float32(1), std)  # a number that never changes is only shifted
        return mean, std

    def standardise(self, actions):
        """Raw actions [...,A] as the model sees them."""
        return (actions - self.mean) / self.std

    @cached_property
    def action_meta(self):
        """What checkpoints keep of the actions: some entries of meta.json, and always action_range
        [A,4]: the least, 1st percentile, 99th percentile and greatest of each number."""
        known = ('what', 'controls', 'action_names', 'action_range')
        about = {key: self.meta[key] for key in known if key in self.meta}
        if 'action_range' not in about:
            about['action_range'] = action_range(self.actions)
        return about

    def __len__(self):
        return int(self.cumulative[-1])

    def first_rows(self, clips):
        """(row of the first frame, end row of the episode) of clips by number."""
        clips = np.asarray(clips)
        episode = np.searchsorted(self.cumulative, clips, side='right') - 1
        return self.episodes[episode] + clips - self.cumulative[episode], self.episodes[episode + 1]

    def batch(self, clips):
        """Clips with numbers [B] -> frames [B,F,C,H,W] as stored, action float32 [B,F,interval*A]."""
        first, end = self.first_rows(clips)
        rows = first[:, None] + np.arange(self.num_frames * self.interval)
        frames = self.frames[rows[:, ::self.interval]]
        # only the clip's last action can lie past the episode's end, and the model never uses that one
        rows = np.minimum(rows, end[:, None] - 1)
        actions = self.standardise(self.actions[rows]).reshape(len(rows), self.num_frames, -1)
        if not np.isfinite(actions).all():
            raise UserError(f'{self.folder}/actions.npy: some numbers are not finite')
        return torch.from_numpy(frames), torch.from_numpy(actions)

    def fixed(self, count, seed=42):
        """Numbers of `count` clips (or all there are), the same for every run with this seed.

        With fixed_starts in meta.json, validation episodes begin where published clips do, and
        only an episode's first clip is drawn.
        """
        choices = np.arange(len(self))
        if self.meta.get('fixed_starts') and self.split == 'val':
            choices = self.cumulative[:-1][np.diff(self.cumulative) > 0]
        return np.random.default_rng(seed).permutation(choices)[:count]

    def pixels(self, clips):
        """The original frames of clips by number, uint8 [B,F,3,H,W]."""
        source = self.frames
        if source.dtype != np.uint8:
            try:
                source = self.load('pixels')
            except UNREADABLE as e:
                raise UserError(f'{self.folder}/pixels.npy is missing or broken ({e}): metrics compare '
                                'with the original pixels, which python data.py keeps') from e
            N, _, h, w = self.frames.shape
            if source.dtype != np.uint8 or source.shape != (N, 3, 8 * h, 8 * w):
                raise UserError(f'{self.folder}/pixels.npy is {source.dtype} {list(source.shape)}: '
                                f'expected uint8 {[N, 3, 8 * h, 8 * w]}')
        rows = self.first_rows(clips)[0][:, None] + np.arange(self.num_frames) * self.interval
        return torch.from_numpy(source[rows])


def to_model(frames, device='cpu'):
    """Stored frames on `device` as float32: uint8 pixels become [-1, 1], latents stay."""
    if torch.device(device).type == 'cuda':
        frames = frames.pin_memory()  # without it non_blocking is of no use
    frames = frames.to(device, non_blocking=True)
    if frames.dtype == torch.uint8:
        return frames.float() / 127.5 - 1
    return frames.float()


def action_range(actions):
    """[A,4] of actions [N,A]: least, 1st percentile, 99th percentile, greatest."""
    return [np.percentile(numbers, (0, 1, 99, 100)).tolist() for numbers in actions.T]


if __name__ == '__main__':  # making a dataset is the work of prepare.py
    here = os.path.dirname(os.path.abspath(__file__))
    runpy.run_path(os.path.join(here, 'prepare.py'), run_name='__main__')
