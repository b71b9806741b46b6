"""Prepare a dataset once, then read it memory-mapped.

    python data.py wall                     # collect episodes of the wall world into data/wall
    python data.py pusht --image_size=96    # the same with the PushT simulator, larger

A prepared dataset is a folder with meta.json and, for each split, three arrays:

    {train,val}/frames.npy      uint8 [N,C,H,W] pixels, or float16 latents; all episodes one after the other
    {train,val}/actions.npy     float32 [N,A]; actions[i] is what was done at frames[i]
    {train,val}/episodes.npy    int64 [E+1]; episode e is rows episodes[e] to episodes[e+1]
"""
import json
import multiprocessing
import os
import shutil
import sys

import numpy as np
import torch
from tqdm import tqdm

import envs

FILES = ('frames', 'actions', 'episodes')


class Clips:
    """Clips of `num_frames` frames, `frame_interval` apart, that never cross an episode.

    The actions between two kept frames are concatenated, so a clip's action is [F, frame_interval * A]. `normalize`
    standardises each of the A numbers: True by the training split's (mean, std), or give a pair, as a checkpoint does.
    len() counts every possible start.
    """

    def __init__(self, root, split, num_frames, frame_interval=1, normalize=False):
        root = os.path.normpath(root)
        folder = os.path.join(root, split)
        try:
            self.frames, self.actions, self.episodes = (
                np.load(os.path.join(folder, f'{name}.npy'), mmap_mode='r') for name in FILES)
            with open(os.path.join(root, 'meta.json')) as f:
                self.meta = json.load(f)
        except (OSError, ValueError) as e:
            name = os.path.basename(root)
            how = f'make it with python data.py {name}' if name in envs.WORLDS else 'README.md says what belongs there'
            raise SystemExit(f'no prepared dataset at {folder} ({e}): {how}') from e
        self.num_frames, self.interval = num_frames, frame_interval
        self.action_dim = frame_interval * self.actions.shape[1]
        if normalize is True:
            if not {'action_mean', 'action_std'} <= self.meta.keys():
                raise SystemExit(f'{root}/meta.json: normalising needs action_mean and action_std, A numbers each')
            normalize = self.meta['action_mean'], self.meta['action_std']
        self.mean, self.std = (np.float32(s) for s in normalize or (0, 1))
        self.std = np.where(self.std == 0, np.float32(1), self.std)  # a number that never changes
        # a clip is numbered by its start; episodes too short for one have none
        starts = np.diff(self.episodes) - (num_frames - 1) * frame_interval
        self.cumulative = np.concatenate([[0], np.cumsum(np.maximum(starts, 0))])
        if len(self) == 0:
            raise SystemExit(f'{folder}: no episode has {(num_frames - 1) * frame_interval + 1} frames, which '
                             f'num_frames={num_frames} at frame_interval={frame_interval} needs; lower one of them')

    def __len__(self):
        return int(self.cumulative[-1])

    def batch(self, clips):
        """Clips by number [B] -> frames [B,F,C,H,W] as stored, action float32 [B,F,frame_interval*A]."""
        clips = np.asarray(clips)
        episode = np.searchsorted(self.cumulative, clips, side='right') - 1
        first = self.episodes[episode] + clips - self.cumulative[episode]
        rows = first[:, None] + np.arange(self.num_frames * self.interval)
        frames = self.frames[rows[:, ::self.interval]]
        # rows past the end of the episode belong to the last frame's action, which no frame of the clip depends on
        rows = np.minimum(rows, self.episodes[episode + 1][:, None] - 1)
        actions = (self.actions[rows] - self.mean) / self.std
        return torch.from_numpy(frames), torch.from_numpy(actions.reshape(len(rows), self.num_frames, -1))

    def fixed(self, count, seed=42):
        """Numbers of `count` clips (all, if there are fewer), the same for every run with this seed."""
        return np.random.default_rng(seed).permutation(len(self))[:count]


class RandomClips:
    """Random numbers with the interface of Clips: an endless dataset of no size, for benchmarks and trying configs.

    frame_shape (C,H,W): 3 channels make uint8 pixels, others normal latents as float16. A clip is a window of one pool.
    """
    mean, std = np.float32(0), np.float32(1)
    fixed = Clips.fixed

    def __init__(self, frame_shape, num_frames, action_dim, count=64):
        rng = np.random.default_rng(0)
        shape = (count + num_frames - 1, *frame_shape)
        frames = (rng.integers(256, size=shape, dtype=np.uint8) if frame_shape[0] == 3 else
                  rng.standard_normal(shape, np.float32).astype(np.float16))
        self.frames, self.actions = frames, rng.standard_normal((len(frames), action_dim), np.float32)
        self.num_frames, self.action_dim, self.count = num_frames, action_dim, count

    def __len__(self):
        return self.count

    def batch(self, clips):
        """Clips by number [B] -> frames [B,F,C,H,W], action float32 [B,F,A]."""
        rows = np.asarray(clips)[:, None] + np.arange(self.num_frames)
        return torch.from_numpy(self.frames[rows]), torch.from_numpy(self.actions[rows])


def to_model(frames, device='cpu'):
    """Stored frames on `device` as float32: uint8 pixels become [-1, 1], latents stay as they are."""
    if torch.device(device).type == 'cuda':
        frames = frames.pin_memory()  # only such a copy runs beside the computation
    frames = frames.to(device, non_blocking=True)
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float()


# -----------------------------------------------------------------------------
# collecting: every episode has its own seed and its own rows, so workers write straight into the final arrays

def collect_episode(job):
    """Play one scripted episode into its rows of the arrays; returns the number of steps with contact."""
    world, folder, row, steps, size, seed = job
    if world not in worlds:
        worlds[world] = envs.WORLDS[world]()
    env, rng = worlds[world], np.random.default_rng([seed, 1])  # not reset's own stream
    frames, actions = (np.load(os.path.join(folder, f'{name}.npy'), mmap_mode='r+') for name in FILES[:2])
    env.reset(seed)
    contacts = 0
    for i in range(row, row + steps):
        frames[i] = env.render(size)
        actions[i] = env.explore(rng)
        contacts += env.step(actions[i])
    return contacts


worlds = {}  # each worker process makes its simulator once


def collect(world, root, episodes, size, seed, workers):
    """Collect `episodes` episodes (a tenth of them for validation) into `root`, which appears when it is complete."""
    steps, partial = envs.EPISODE_STEPS[world], f'{root}.partial'
    envs.WORLDS[world]()  # a missing simulator says so here, once
    shutil.rmtree(partial, ignore_errors=True)
    num_val = max(1, episodes // 10)
    jobs = []
    for split, first, count in (('train', 0, episodes - num_val), ('val', episodes - num_val, num_val)):
        folder = os.path.join(partial, split)
        os.makedirs(folder)
        new = np.lib.format.open_memmap
        new(f'{folder}/frames.npy', mode='w+', dtype=np.uint8, shape=(count * steps, 3, size, size))
        new(f'{folder}/actions.npy', mode='w+', dtype=np.float32, shape=(count * steps, 2))
        np.save(f'{folder}/episodes.npy', np.arange(count + 1) * steps)
        jobs += [(world, folder, i * steps, steps, size, seed * 1_000_000 + first + i) for i in range(count)]
    with multiprocessing.get_context('spawn').Pool(workers) as pool:
        contacts = list(tqdm(pool.imap(collect_episode, jobs, chunksize=4), total=len(jobs), unit='episode',
                             desc=f'collecting {world}'))
    actions = np.load(f'{partial}/train/actions.npy', mmap_mode='r')
    meta = dict(name=world, episodes=episodes, steps_per_episode=steps, image_size=size, seed=seed,
                action_mean=actions.mean(axis=0).tolist(), action_std=actions.std(axis=0).tolist(),
                contact_share=sum(contacts) / (episodes * steps))
    with open(f'{partial}/meta.json', 'w') as f:
        json.dump(meta, f, indent=1)
    os.rename(partial, root)
    print(f'{root}: {episodes} episodes of {steps} frames at {size}x{size}, contact in '
          f'{meta["contact_share"]:.0%} of the steps')


if __name__ == '__main__':
    from configurator import configure
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        sys.argv[1] = f'--world={sys.argv[1]}'  # python data.py wall
    # settings -----------------------------------------------------------------
    world = 'wall'  # which: wall or pusht
    root = ''  # where to; '' is data/<world>
    episodes = 0  # a tenth of them are for validation; 0 is 2000 for wall and 1200 for pusht
    image_size = 0  # pixels, square; 0 is 32 for wall and 64 for pusht
    seed = 0
    workers = os.cpu_count()
    # --------------------------------------------------------------------------
    configure(globals())
    if world not in envs.WORLDS:
        sys.exit(f'{world!r}: unknown dataset; expected {" or ".join(envs.WORLDS)}')
    defaults = {'wall': (2000, 32), 'pusht': (1200, 64)}[world]
    episodes, image_size = episodes or defaults[0], image_size or defaults[1]
    if episodes < 2 or workers < 1:
        sys.exit(f'episodes={episodes}, workers={workers}: expected 2 (one is for validation) and 1, or more')
    root = os.path.normpath(root or f'data/{world}')
    if os.path.exists(root):
        sys.exit(f'{root} is there already; delete it to collect again, or choose another --root')
    collect(world, root, episodes, image_size, seed, workers)
