"""Prepare a dataset once, as the memory-mapped arrays that data.py reads.

    python data.py wall                           # collect episodes of the wall world in data/wall
    python data.py gym --env=CarRacing-v3 --name=carracing     # or of any Gymnasium environment
    python data.py rt1 --root=path/to/fractal     # or convert a published dataset to latents
    python data.py clips --root=path --name=mine --latents=False --image_size=64     # or your own

Every episode becomes a part, a file in <out>.partial that gets its name when it is whole. So a
preparation may be killed at any moment and go on, with any number of processes, to the same bytes.
In the end the parts are joined: the disk must hold the result twice.
"""
import fcntl
import json
import os
import re
import shutil
import statistics
import sys
import zipfile
from collections import ChainMap
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import controls
import envs
import gym_worlds
import machine
import readers
import recordings
from configurator import UserError, check_choice, configure
from data import action_range, to_model
from vae import load_vae

# settings ---------------------------------------------------------------------
what = 'wall'  # a world or a dataset: one of the names above
out = ''  # where to; '' is data/<name>
image_size = ''  # 64, or height,width as in 320,512; '' is the world's own, or 256
resize = 'stretch'  # pictures of another shape; or pad (black borders) or crop (the middle)
episodes = 0  # at most so many; 0 is as many as the world says, or all there are [0 to 1000000]
seed = 0  # [>= 0]
workers = os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # that read; 0: none [0 to 256]
policy = ''  # of a world: my_file.py:function, see policies.py; '' is its explorer, gym's is random
# of gym, see gym_worlds.py
env = ''  # id of a registered Gymnasium environment
import_ = ''  # --import=ale_py: a module or file that registers more
repeat = 1  # steps of the environment for each action [>= 1]
hold = 4.0  # steps that a random action is held for, on average [>= 1]
steps = 200  # frames of the longest episode [>= 2]
shortest = 16  # episodes of fewer frames are dropped [>= 2]
# of datasets
root = ''  # the files; '' is where the environment variable says
name = ''  # of the new dataset, also of gym's; '' is what it is
latents = True  # encode the frames; False keeps pixels
vae = ''  # folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
device = ''  # that encodes: cpu, cuda, mps; '' is the best there is
val_share = 0.1  # of the episodes for validation, if the publisher has no split [0 to 1]
val_clips = 256  # latents: from so many episodes validation takes a stretch of frames [>= 1]
val_frames = 100  # longest such stretch [>= 1]
image_key = 'observation.images.image'  # the camera, of lerobot
train_list = ''  # text file that names the training files, of csgo
val_list = ''
val_starts = ''  # .npy with the first frame of each validation file's fixed clip
# ------------------------------------------------------------------------------


def plan(episodes, folder, settings):
    """{path of the part, without its ending: Episode}, training first. Raises UserError.

    Latents, and data with published starts, are validated on a stretch each of some episodes:
    metrics compare with the original pixels, which are kept of these stretches only.
    """
    rng = np.random.default_rng(settings['seed'])
    num_val = max(1, round(settings['val_share'] * len(episodes)))
    held_out = set(rng.permutation(len(episodes))[:num_val].tolist())
    parts = {'train': {}, 'val': {}}
    for i, episode in enumerate(episodes):
        split = episode.split or ('val' if i in held_out else 'train')
        parts[split][f'{folder}/{i:06d}'] = episode._replace(split=split)
    train, val = parts.values()
    if not train or not val:
        raise UserError(f'{len(episodes)} episodes: expected at least one for training '
                        'and one for validation')
    if settings['latents'] or any(episode.start >= 0 for episode in episodes):
        chosen = sorted(rng.permutation(list(val))[:settings['val_clips']].tolist())
        val = {path: val[path]._replace(num_frames=settings['val_frames']) for path in chosen}
    return train | val


def write_part(path, pixels, actions, vae, keep_pixels):
    arrays = dict(frames=pixels, actions=actions)
    if vae:
        device = vae.quant_conv.weight.device
        some = torch.from_numpy(pixels).split(64)  # as floats all of a long recording may not fit
        latents = torch.cat([vae.encode(to_model(frames, device)).cpu() for frames in some])
        arrays['frames'] = latents.numpy().astype(np.float16)
        if keep_pixels:
            arrays['pixels'] = pixels
    with open(f'{path}.tmp', 'wb') as f:
        np.savez(f, **arrays)
    os.replace(f'{path}.tmp', f'{path}.npz')


def begin(path, settings):
    """Note what is being prepared, or compare with what was begun. Raises UserError."""
    settings = json.loads(json.dumps(settings))  # as it would be read
    if os.path.exists(path):
        try:
            with open(path) as f:
                begun = dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise UserError(f'{path} is broken ({e}): delete {os.path.dirname(path)}') from e
        changed = [key for key in settings if settings[key] != begun.get(key)]
        if changed:
            raise UserError(f'{os.path.dirname(path)} was begun with other settings '
                            f'({", ".join(changed)}): use those again, or delete it')
    machine.write_whole(path, json.dumps(settings))


def say_cost(episodes, vae, size):
    """Print how long it will take all processes to encode the episodes, before they begin."""
    device = str(vae.quant_conv.weight.device)
    batch = torch.zeros(1 if device == 'cpu' else 32, 3, *size, device=device)
    vae.encode(batch)  # the first time is slower
    rate = machine.WORLD_SIZE * len(batch) / machine.seconds(lambda: vae.encode(batch), device)
    lengths = [min(e.length, e.num_frames or e.length) for e in episodes if e.length > 0]
    frames, whose = 1000, 'each 1,000'
    if lengths:
        frames = round(len(episodes) * statistics.mean(lengths))
        whose = f'about {frames:,}'
    print(f'encoding {whose} frames of {size[0]}x{size[1]} takes {frames / rate / 3600:.2f} hours, '
          f'at {rate:.1f} a second ({machine.WORLD_SIZE} x {machine.name_of(device)}); '
          '--episodes= tries a few')


def prepare(out, settings, vae=None, workers=0):
    """Write the episodes of a dataset into the folder `out`, as pixels or as latents of a VAE.

    Under torchrun each process does its share, with so many workers of its own that read ahead.
    Raises UserError.
    """
    episodes = readers.list_episodes(settings)
    parts = plan(episodes, f'{out}.partial', settings)
    if os.path.exists(out):
        raise UserError(f'{out} is there already; delete it to make it again, '
                        'or choose another --out')
    machine.join_processes(timeout=timedelta(days=30))
    if machine.RANK == 0:
        os.makedirs(f'{out}.partial', exist_ok=True)
        lock = open(f'{out}.partial/lock', 'w')  # closed by the end of this process, of any kind
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f'{out} is being prepared by another process') from e
        weights = vae and vae.quant_conv.weight.sum().item()  # tells one autoencoder from another
        files = [episode.name for episode in episodes]
        begin(f'{out}.partial/begun.json', settings | dict(vae=weights, files=files))
    machine.barrier()
    mine = list(parts)[machine.RANK::machine.WORLD_SIZE]
    todo = [path for path in mine if not os.path.exists(f'{path}.npz')]
    if machine.RANK == 0 and vae and todo:
        left = [parts[path] for path in parts if not os.path.exists(f'{path}.npz')]
        say_cost(left, vae, settings['image_size'])
    reading = DataLoader(
        [parts[path] for path in todo], batch_size=None, num_workers=min(workers, len(todo)),
        multiprocessing_context='spawn' if workers and todo else None,
        worker_init_fn=readers.start_worker,
        collate_fn=partial(recordings.read_episode, size=settings['image_size'],
                           how=settings['resize']))
    errors = {}
    with tqdm(desc=f'preparing {os.path.basename(out)}', unit='episode', total=len(mine),
              initial=len(mine) - len(todo), disable=machine.RANK > 0) as bar:
        for path, (pixels, actions, error) in zip(todo, reading, strict=True):
            if error:
                bar.write(f'skipped {parts[path].name}: {error}')
                errors[path] = error
            else:
                write_part(path, pixels, actions, vae, keep_pixels=parts[path].split == 'val')
            bar.update()
    errors = ChainMap(*machine.gather(errors))
    if machine.RANK == 0:
        assemble(out, parts, errors, settings)
        lock.close()
    machine.barrier()
    machine.leave_processes()


# -----------------------------------------------------------------------------
# putting the parts together

def assemble(out, parts, errors, settings):
    """Join the parts in a folder beside them, which gets its name when it is whole."""
    whole = f'{out}.partial/whole'
    shutil.rmtree(whole, ignore_errors=True)  # what a killed run joined
    done = [path for path in parts if path not in errors]
    if not done:
        shutil.rmtree(f'{out}.partial')  # or it would only refuse other settings
    shapes = {path: read_part(path, 'actions').shape for path in done}
    width = statistics.mode([shape[1] for shape in shapes.values()] or [0])  # the usual one
    good, broken = {'train': [], 'val': []}, {}
    for path, episode in parts.items():
        if path in errors:
            broken[episode.name] = errors[path]
        elif shapes[path][1] != width:
            broken[episode.name] = f'{shapes[path][1]} numbers an action, where others have {width}'
            print(f'skipped {episode.name}: {broken[episode.name]}')
        else:
            good[episode.split].append(path)
    for split, paths in good.items():
        if not paths:
            raise UserError(f'{out}: {len(broken)} of {len(parts)} episodes cannot be used, '
                            f'and nothing is left for {split}')
        os.makedirs(f'{whole}/{split}')
        rows = np.cumsum([0, *(shapes[path][0] for path in paths)])
        np.save(f'{whole}/{split}/episodes.npy', rows)
        for array in np.load(f'{paths[0]}.npz').files:
            join(f'{whole}/{split}/{array}.npy', paths, array, int(rows[-1]))
    actions = np.load(f'{whole}/train/actions.npy', mmap_mode='r')
    meta = settings | dict(
        action_mean=actions.mean(axis=0, dtype=np.float64).tolist(),
        action_std=actions.std(axis=0, dtype=np.float64).tolist(),
        action_range=action_range(actions),
        # what a player holds; None: nobody knows
        controls=settings.get('controls') or controls.KNOWN.get(settings['what']),
        broken=broken,
        fixed_starts=any(episode.start >= 0 for episode in parts.values()))
    with open(f'{whole}/meta.json', 'w') as f:
        json.dump(meta, f, indent=1)
    os.rename(whole, out)
    shutil.rmtree(f'{out}.partial', ignore_errors=True)
    print(f'{out}: {len(good["train"])} episodes for training, {len(good["val"])} for validation, '
          f'{len(broken)} broken ones skipped')


def read_part(path, array):
    """An array of a part. Raises UserError."""
    try:
        return np.load(f'{path}.npz')[array]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f'{path}.npz is broken ({e}): delete it, and the same command makes it '
                        'again') from e


def join(target, parts, array, rows):
    """Write an array of all parts, one after the other, as one .npy file of so many rows."""
    first = read_part(parts[0], array)
    header = dict(descr=first.dtype.str, fortran_order=False, shape=(rows, *first.shape[1:]))
    with open(target, 'wb') as f:  # on a full disk, a mapped file would kill the process
        np.lib.format.write_array_header_1_0(f, header)
        for path in parts:
            f.write(np.ascontiguousarray(read_part(path, array)))


# -----------------------------------------------------------------------------
# what is asked for

WORLDS = envs.WORLDS | {'gym': gym_worlds.Gym}


def parse_size(text):
    """(height, width) of '64' or '320,512'. Raises UserError."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split(',')]
    if len(sides) > 2 or min(sides) < 8:
        raise UserError(f'image_size={text}: expected a number like 64, or height,width like '
                        '320,512, of 8 or more')
    return sides[0], sides[-1]


def complete(settings):
    """The settings that decide what is written, with nothing left empty. Raises UserError."""
    where = ('out', 'workers', 'vae', 'device')
    settings = {key: value for key, value in settings.items() if key not in where}
    what, size = settings['what'], settings['image_size']
    check_choice('what', what, WORLDS | readers.DATASETS)
    check_choice('resize', settings['resize'], recordings.RESIZE)
    if what in WORLDS:
        settings['latents'] = False
        settings['episodes'] = settings['episodes'] or WORLDS[what].episodes
        size = size or str(WORLDS[what].image_size)
        if settings['policy']:
            gym_worlds.load_policy(settings['policy'])  # says now if something is wrong with it
    else:
        variable = readers.DATASETS[what].variable
        settings['root'] = os.path.expanduser(settings['root'] or os.environ.get(variable, ''))
        if not settings['root']:
            instead = f', or set {variable}' if variable else ''
            raise UserError(f'where are the files of {what}? Say --root=<folder>{instead}')
        if not os.path.isdir(settings['root']):
            raise UserError(f'root={settings["root"]}: no such folder')
    if what == 'gym':
        settings |= gym_worlds.describe(settings)
    settings['name'] = settings['name'] or what
    settings['image_size'] = parse_size(size or '256')
    if settings['latents'] and any(side % 8 for side in settings['image_size']):
        raise UserError(f'image_size={size}: expected multiples of 8 for latents; '
                        '--latents=False keeps pixels')
    return settings


if __name__ == '__main__':
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith('-'):
        arguments[0] = f'--what={arguments[0]}'  # python data.py wall
    __doc__ += '\nWorlds and datasets:\n\n'
    for known, row in (WORLDS | readers.DATASETS).items():
        __doc__ += f'    {known:18}{row.about}\n'
    # `import` cannot be the name of a setting in Python
    arguments = [re.sub('^--import=', '--import_=', argument) for argument in arguments]
    settings = complete(configure(globals(), argv=arguments))
    out = machine.under_results(out or f'data/{settings["name"]}')
    encoder = None
    if settings['latents']:
        device = machine.pick_device(device)
        try:
            encoder = load_vae(vae, device)
        except UserError as e:
            raise UserError(f'{e}; --latents=False keeps pixels') from e
    try:
        prepare(out, settings, encoder, workers)
    except KeyboardInterrupt as e:
        raise UserError(f'interrupted; the same command goes on from {out}.partial') from e
