"""Prepare a dataset once, then read it memory-mapped.

    python data.py wall                           # collect episodes of the wall world into data/wall
    python data.py rt1 --root=path/to/fractal     # or convert a published dataset to latents (README.md lists them)
    python data.py clips --root=path --name=mine --latents=False --image_size=64     # or your own recordings

A prepared dataset is a folder with meta.json and, for each split, three arrays:

    {train,val}/frames.npy      uint8 [N,C,H,W] pixels, or float16 latents; all episodes one after the other
    {train,val}/actions.npy     float32 [N,A]; actions[i] is what was done at frames[i]
    {train,val}/episodes.npy    int64 [E+1]; episode e is rows episodes[e] to episodes[e+1]; or [E,2], first and end row

Latents come with the original pixels of the frames that validation clips are then taken from:

    val/fixed.npy               int64 [S,3]: stretch s is rows fixed[s,0] to fixed[s,1]
    val/pixels.npy              uint8 [M,3,H,W]; stretch s begins at its row fixed[s,2]
"""
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import envs
import readers
from vae import load_vae

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
            known = name in envs.WORLDS or name in readers.ROOTS
            how = f'make it with python data.py {name}' if known else 'README.md says what belongs there'
            raise SystemExit(f'no prepared dataset at {folder} ({e}): {how}') from e
        if self.episodes.ndim == 1:
            self.episodes = np.stack([self.episodes[:-1], self.episodes[1:]], axis=1)
        self.stretches = self.original = None
        if split == 'val' and os.path.exists(f'{folder}/fixed.npy'):
            self.stretches = np.load(f'{folder}/fixed.npy')
        if split == 'val' and os.path.exists(f'{folder}/pixels.npy'):
            self.original = np.load(f'{folder}/pixels.npy', mmap_mode='r')
        N, shape, last = len(self.frames), self.frames.shape[1:], self.episodes.max(initial=0)
        right = self.frames.dtype == (np.uint8 if shape[:1] == (3,) else np.float16) and len(shape) == 3
        if not right or self.actions.ndim != 2 or len(self.actions) != N or last > N:
            raise SystemExit(f'{folder}: expected frames uint8 [N,3,H,W] or latents float16 [N,C,H,W], actions [N,A] '
                             f'and episodes up to row N; found {self.frames.dtype} {list(self.frames.shape)}, '
                             f'{list(self.actions.shape)} and {last}')
        self.num_frames, self.interval = num_frames, frame_interval
        self.action_dim = frame_interval * self.actions.shape[1]
        if normalize is True:
            if not {'action_mean', 'action_std'} <= self.meta.keys():
                raise SystemExit(f'{root}/meta.json: normalising needs action_mean and action_std, A numbers each')
            normalize = self.meta['action_mean'], self.meta['action_std']
        self.mean, self.std = (np.float32(s) for s in normalize or (0, 1))
        self.std = np.where(self.std == 0, np.float32(1), self.std)  # a number that never changes
        # a clip is numbered by its start; episodes too short for one have none
        starts = self.episodes[:, 1] - self.episodes[:, 0] - (num_frames - 1) * frame_interval
        self.cumulative = np.concatenate([[0], np.cumsum(np.maximum(starts, 0))])
        if len(self) == 0:
            raise SystemExit(f'{folder}: no episode has {(num_frames - 1) * frame_interval + 1} frames, which '
                             f'num_frames={num_frames} at frame_interval={frame_interval} needs; lower one of them')

    def __len__(self):
        return int(self.cumulative[-1])

    def first_rows(self, clips):
        """(row of the first frame, end row of the episode) of clips by number."""
        episode = np.searchsorted(self.cumulative, clips, side='right') - 1
        first, end = self.episodes[episode].T
        return first + clips - self.cumulative[episode], end

    def batch(self, clips):
        """Clips by number [B] -> frames [B,F,C,H,W] as stored, action float32 [B,F,frame_interval*A]."""
        first, end = self.first_rows(np.asarray(clips))
        rows = first[:, None] + np.arange(self.num_frames * self.interval)
        frames = self.frames[rows[:, ::self.interval]]
        # rows past the end of the episode belong to the last frame's action, which no frame of the clip depends on
        rows = np.minimum(rows, end[:, None] - 1)
        actions = (self.actions[rows] - self.mean) / self.std
        return torch.from_numpy(frames), torch.from_numpy(actions.reshape(len(rows), self.num_frames, -1))

    def fixed(self, count, seed=42):
        """Numbers of `count` clips (all, if there are fewer), the same for every run with this seed.

        Where the dataset fixes stretches of validation frames, clips lie inside them, or begin where they begin if
        those are published starts.
        """
        choices = np.arange(len(self))
        if self.stretches is not None:
            choices = []
            for first, end, _ in self.stretches:
                episode = np.searchsorted(self.episodes[:, 0], first, side='right') - 1
                n = end - first - (self.num_frames - 1) * self.interval
                n = min(n, 1) if self.meta.get('fixed_starts') else n
                choices.extend(self.cumulative[episode] + first - self.episodes[episode, 0] + np.arange(max(n, 0)))
            if not choices:
                raise SystemExit(f'no fixed stretch of validation frames is as long as num_frames={self.num_frames} at '
                                 f'frame_interval={self.interval} needs; convert again with a larger --val_frames')
        return np.random.default_rng(seed).permutation(choices)[:count]

    def pixels(self, clips):
        """The original frames of clips, uint8 [B,F,3,H,W]; beside latents, only those of `fixed` clips are kept."""
        rows = self.first_rows(np.asarray(clips))[0][:, None] + np.arange(self.num_frames) * self.interval
        if self.frames.dtype == np.uint8:
            return torch.from_numpy(self.frames[rows])
        if self.original is None:
            raise SystemExit(f'{self.meta.get("name", "this dataset")}: val/pixels.npy is missing; metrics need the '
                             'original pixels beside the latents, which python data.py keeps')
        s = np.searchsorted(self.stretches[:, 0], rows, side='right') - 1
        return torch.from_numpy(self.original[self.stretches[s, 2] + rows - self.stretches[s, 0]])


# who am I among the processes that torchrun started?
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(k, d)) for k, d in
                                (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def pick_device(name=''):
    """The device of that name, or the best there is (under torchrun the process's own); ends with one line if it is not
    there."""
    best = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    name = name or best
    try:
        if name == 'cuda':
            torch.cuda.set_device(LOCAL_RANK)
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError, AttributeError):
        sys.exit(f'device={name!r} is not available here; try --device={best}')


DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def pick_dtype(name, device):
    """The name of the dtype to compute in: '' is bf16 on CUDA, else fp32. Ends with one line if it is none."""
    name = name or ('bf16' if torch.device(device).type == 'cuda' else 'fp32')
    return name if name in DTYPES else sys.exit(f'dtype={name!r}: expected {", ".join(DTYPES)}')


def autocast(device, dtype):
    """The context to compute in: products in `dtype`, weights in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # no cache: a weight is used once a pass, and copies would add up to a whole model where FSDP holds a part of one
    return torch.autocast(torch.device(device).type, DTYPES[dtype], dtype != 'fp32', False)


class RandomClips:
    """Random numbers with the interface of Clips: for train.py's real_data=False.

    frame_shape (C,H,W): 3 channels make uint8 pixels, others normal latents as float16. A clip is a window of one pool.
    """
    mean, std, stretches = np.float32(0), np.float32(1), None
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
# preparing: the lengths are known beforehand, so every episode has its rows before the first is read. Processes write
# only into the rows of their own episodes, note each finished one in a journal, and go on from it after a kill.

def plan(source, size, vae, val_share, val_clips, val_frames, seed):
    """Where everything goes.

    Returns {path: (dtype, shape)}, jobs [(episode number, split, row, length)], stretches [(row, end row, pixel row)].
    """
    rng = np.random.default_rng(seed)
    held_out = set(rng.permutation(len(source.episodes))[:max(1, round(val_share * len(source.episodes)))])
    split_known = any(e.split for e in source.episodes)
    rows, jobs = {'train': 0, 'val': 0}, []
    for i, e in enumerate(source.episodes):
        split = (e.split or 'train') if split_known else 'val' if i in held_out else 'train'
        jobs.append((i, split, rows[split], e.length))
        rows[split] += e.length
    if not all(rows.values()):
        raise readers.Missing(f'{len(jobs)} episodes: training and validation need at least one each, with frames')
    stretches, pixel = [], 0
    starts_known = any(e.start >= 0 for e in source.episodes)
    chosen = [job for job in jobs if job[1] == 'val' and job[3]] if vae or starts_known else []
    for i, _, row, length in sorted(chosen[j] for j in rng.permutation(len(chosen))[:val_clips]):
        start = source.episodes[i].start
        start = start if start >= 0 else int(rng.integers(max(0, length - val_frames) + 1))
        n = min(length - start, val_frames)
        if n > 0:
            stretches.append((row + start, row + start + n, pixel))
            pixel += n
    frame = (np.float16, (4, size // 8, size // 8)) if vae else (np.uint8, (3, size, size))
    files = {f'{s}/frames.npy': (frame[0], (n, *frame[1])) for s, n in rows.items()}
    files |= {f'{s}/actions.npy': (np.float32, (n, source.action_dim)) for s, n in rows.items()}
    if vae:
        files['val/pixels.npy'] = np.uint8, (pixel, 3, size, size)
    return files, jobs, stretches


def write_rows(path, row, values):
    """Put values into an .npy file from that row on, without mapping it: other processes write there too."""
    array = np.load(path, mmap_mode='r')
    with open(path, 'r+b') as f:
        f.seek(array.offset + row * array.strides[0])
        f.write(np.ascontiguousarray(values, dtype=array.dtype))


def prepare(out, settings, vae=None, workers=0):
    """Write the episodes of a dataset into `out`, as pixels or with a VAE as latents; `out` appears when complete.

    settings: those of this file that say what to write. Resumes from out.partial. Under torchrun each process does
    every WORLD_SIZE-th episode; each reads ahead with so many workers (0: in this process). Raises readers.Missing.
    """
    source, device = readers.open_source(settings), next(vae.parameters()).device if vae else None
    if WORLD_SIZE > 1:
        dist.init_process_group('gloo', timeout=timedelta(days=30))
    partial = f'{out}.partial'
    files, jobs, stretches = plan(source, settings['image_size'], vae, *(settings[k] for k in (
        'val_share', 'val_clips', 'val_frames', 'seed')))
    weights = vae and vae.quant_conv.weight.sum().item()  # tells one autoencoder from another
    begun = json.dumps([settings, weights, [e[:2] for e in source.episodes]])
    if RANK == 0 and not os.path.exists(f'{partial}/begun.json'):
        shutil.rmtree(partial, ignore_errors=True)
        for path, (dtype, shape) in files.items():
            os.makedirs(os.path.dirname(f'{partial}/{path}'), exist_ok=True)
            np.lib.format.open_memmap(f'{partial}/{path}', mode='w+', dtype=dtype, shape=shape)
        with open(f'{partial}/begun.json.tmp', 'w') as f:
            f.write(begun)
        os.rename(f'{partial}/begun.json.tmp', f'{partial}/begun.json')
    if WORLD_SIZE > 1:
        dist.barrier()
    with open(f'{partial}/begun.json') as f:
        if f.read() != begun:
            raise readers.Missing(f'{partial} was begun from other files or with other settings: '
                                  'use those again, or delete it')

    def journals():
        """{episode number: None, or why it is broken} of all processes, this run's and a killed one's."""
        outcomes = {}
        for name in os.listdir(partial):
            if name.startswith('journal'):
                with open(f'{partial}/{name}') as f:
                    for i, error in (json.loads(line) for line in f if line.endswith(']\n')):
                        outcomes[i] = None if error is None else outcomes.get(i, error)
        return outcomes

    done = {i for i, error in journals().items() if error is None}
    todo = [job for job in jobs[RANK::WORLD_SIZE] if job[0] not in done]
    journal = open(f'{partial}/journal.{RANK}', 'a')
    journal.write('\n')  # after a line that a kill cut short
    bar = tqdm(total=len(jobs[RANK::WORLD_SIZE]), initial=len(jobs[RANK::WORLD_SIZE]) - len(todo), unit='episode',
               desc=f'preparing {os.path.basename(out)}', disable=RANK > 0)
    if workers:
        pool = ProcessPoolExecutor(min(workers, len(todo) or 1), multiprocessing.get_context('spawn'),
                                   readers.start_worker, (source,))
    else:
        pool = ThreadPoolExecutor(1)
    with pool:  # the next episodes are read while this one is encoded
        reading = (pool.submit(readers.read_episode, job[0], settings['image_size']) for job in todo)
        ahead = deque(itertools.islice(reading, workers + 1))
        for i, split, row, length in todo:
            pixels, actions, error = ahead.popleft().result()
            ahead.extend(itertools.islice(reading, 1))
            if error is None:
                latents = vae.encode(to_model(torch.from_numpy(pixels), device)).cpu().numpy() if vae else pixels
                write_rows(f'{partial}/{split}/frames.npy', row, latents)
                write_rows(f'{partial}/{split}/actions.npy', row, actions)
                for first, end, pixel in stretches if vae and split == 'val' else ():
                    if row <= first < row + length:
                        write_rows(f'{partial}/val/pixels.npy', pixel, pixels[first - row:end - row])
            else:
                bar.write(f'skipped {source.episodes[i].name}: {error}')
            journal.write(json.dumps([i, error]) + '\n')
            journal.flush()
            bar.update()
    bar.close()
    journal.close()
    if WORLD_SIZE > 1:
        dist.barrier()
    if RANK == 0:
        finish(source, out, settings, jobs, stretches, journals(), vae)
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()


def finish(source, out, settings, jobs, stretches, outcomes, vae):
    """Say which rows hold episodes, leave out the broken ones, and let the folder appear under its name."""
    partial = f'{out}.partial'
    broken = {source.episodes[i].name: error for i, error in sorted(outcomes.items()) if error}
    spans = {'train': [], 'val': []}
    for i, split, row, length in jobs:
        if outcomes[i] is None:
            spans[split].append((row, row + length))
    if not all(map(len, spans.values())):
        raise readers.Missing(f'{out}: {len(broken)} of {len(jobs)} episodes could not be read and nothing is left for '
                              f'{" and ".join(s for s, x in spans.items() if not len(x))}')
    for split, span in spans.items():
        np.save(f'{partial}/{split}/episodes.npy', np.array(span))
    if stretches:
        good = [s for s in stretches if any(first <= s[0] < end for first, end in spans['val'])]
        if not good:
            raise readers.Missing(f'{out}: no episode that fixed clips were to come from could be read; delete '
                                  f'{partial} and try another --seed or more --val_clips')
        np.save(f'{partial}/val/fixed.npy', np.array(good).reshape(-1, 3))
    actions = np.load(f'{partial}/train/actions.npy', mmap_mode='r')
    count = sum(int(b - a) for a, b in spans['train'])
    mean = sum(actions[a:b].sum(axis=0, dtype=np.float64) for a, b in spans['train']) / count
    var = sum(((actions[a:b] - mean) ** 2).sum(axis=0) for a, b in spans['train']) / count
    meta = settings | dict(action_mean=mean.tolist(), action_std=np.sqrt(var).tolist(), broken=broken,
                           fixed_starts=any(e.start >= 0 for e in source.episodes))
    with open(f'{partial}/meta.json', 'w') as f:
        json.dump(meta, f, indent=1)
    for name in os.listdir(partial):
        if name.startswith(('journal', 'begun')):
            os.remove(f'{partial}/{name}')
    os.rename(partial, out)
    print(f'{out}: {len(spans["train"])} episodes for training, {len(spans["val"])} for validation, '
          f'{len(broken)} broken ones skipped')


if __name__ == '__main__':
    from configurator import configure
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        sys.argv[1] = f'--what={sys.argv[1]}'  # python data.py wall
    # settings -----------------------------------------------------------------
    what = 'wall'  # a world: wall, pusht; published: rt1, csgo, dino_...; any: lerobot, clips
    out = ''  # where to; '' is data/<name>, under $RESULTS_DIR for what is converted
    image_size = 0  # pixels, square; 0 is 32 for wall, 64 for pusht, 256 for what is converted
    episodes = 0  # 0 is 2000 for wall, 1200 for pusht (a tenth for validation), all for what is converted
    seed = 0
    workers = os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # that play or read; 0 is none but this one
    # converting
    root = ''  # the files; '' is $RT1_DATA_ROOT, $CSGO_DATA_DIR or $DATASET_DIR
    name = ''  # of the new dataset; '' is what it is
    latents = True  # encode the frames; False keeps pixels
    vae = ''  # folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
    device = ''  # that encodes: cpu, cuda, mps; '' is the best there is
    val_share = 0.1  # of the episodes, where the publisher has no split
    val_clips = 256  # stretches of validation frames that clips for metrics come from
    val_frames = 100  # longest such stretch
    image_key = 'observation.images.image'  # the camera, of lerobot
    relative_actions = True  # of dino_pusht; False takes abs_actions.pth
    train_list = ''  # text file that names the training files, of csgo
    val_list = ''
    val_starts = ''  # .npy with the first frame of each validation file's fixed clip
    # --------------------------------------------------------------------------
    configure(globals())
    if what not in (*envs.WORLDS, *readers.ROOTS, 'lerobot', 'clips'):
        sys.exit(f'{what!r}: unknown dataset; expected one of '
                 f'{", ".join((*envs.WORLDS, *readers.ROOTS, "lerobot", "clips"))}')
    if what in ('lerobot', 'clips') and not (root and name):
        sys.exit(f'{what} needs --root=<folder of the files> and --name=<name of the new dataset>')
    name, results = name or what, os.environ.get('RESULTS_DIR', '')
    if what in envs.WORLDS:
        latents, results = False, ''
        episodes = episodes or {'wall': 2000, 'pusht': 1200}[what]
        image_size = image_size or {'wall': 32, 'pusht': 64}[what]
    else:
        variable, image_size = readers.ROOTS.get(what, ''), image_size or 256
        root = os.path.normpath(root or os.environ.get(variable) or sys.exit(
            f'where are the files of {what}? Say --root=<folder>, or set {variable}'))
    if image_size < 8 or latents and image_size % 8:
        sys.exit(f'image_size={image_size}: expected 8 or more, and for latents a multiple of 8')
    if not 0 < val_share < 1 or min(val_clips, val_frames) < 1 or min(workers, episodes, seed) < 0:
        sys.exit(f'val_share={val_share}, val_clips={val_clips}, val_frames={val_frames}, workers={workers}, '
                 f'episodes={episodes}, seed={seed}: expected a share between 0 and 1, 1 or more, 1 or more, and no '
                 'negative numbers')
    out = os.path.normpath(out or os.path.join(results, 'data', name))
    if os.path.exists(out):
        sys.exit(f'{out} is there already; delete it to make it again, or choose another --out')
    settings = dict(name=name, what=what, root=root, episodes=episodes, seed=seed, image_size=image_size,
                    latents=latents, val_share=val_share, val_clips=val_clips, val_frames=val_frames,
                    image_key=image_key, relative_actions=relative_actions, train_list=train_list, val_list=val_list,
                    val_starts=val_starts)
    try:
        prepare(out, settings, load_vae(vae, pick_device(device)) if latents else None, workers)
    except (readers.Missing, OSError, ValueError) as e:
        sys.exit(str(e) + ('; --latents=False keeps pixels' if 'sd-vae' in str(e) else ''))
    except KeyboardInterrupt:
        sys.exit(f'interrupted; the same command goes on from {out}.partial')
    except BrokenProcessPool:
        sys.exit(f'a process that reads has died, of too little memory? The same command with --workers={workers // 2} '
                 f'goes on from {out}.partial')
