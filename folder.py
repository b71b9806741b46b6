"""The folder of a training: one training at a time, what it goes on from, and what it keeps.

--resume=True goes on from the folder's latest checkpoint, --resume=path from any other of a
training: of this folder or, into a new one, of another. Who goes back in the same folder has what
came after undone: latest is replaced at once, the log's later lines go, and later numbered
checkpoints are written over when the run comes by again.
"""
import fcntl
import glob
import json
import math
import os
import shutil

from checkpoint import choose, find, read_meta
from configurator import UserError
from machine import LAUNCH, RANK, RESTARTS, gather, under_results
from run import make_folder

# settings that may differ when a run goes on; the others have to be what they were
MAY_CHANGE = (
    # where and how it is computed; the clips of a step have to stay as many
    'out_dir', 'resume', 'init_from', 'device', 'dtype', 'compile', 'fsdp', 'grad_checkpoint',
    'batch_size', 'grad_accum', 'num_workers',
    # how long it goes on, and how fast: what one changes when a loss was not finite
    'max_steps', 'learning_rate', 'min_lr', 'warmup_steps', 'weight_decay', 'gradient_clip_norm',
    'gradient_clip_start',
    # what is looked at and kept
    'log_every', 'val_every', 'latest_every', 'keep_every', 'keep_last', 'num_val_clips',
    'metrics_every', 'metrics', 'num_metric_clips', 'context_frames', 'sample_steps', 'vae',
    'wandb', 'wandb_project',
)


def claim(out_dir):
    """Make the folder, and keep other trainings out of it as long as this process lives.

    Returns a file to be kept open. Raises UserError, on every process.
    """
    file = error = None
    make_folder(out_dir)
    if RANK == 0:
        try:
            file = open(os.path.join(out_dir, 'lock'), 'w')
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = f'{out_dir}: another training is at work there; choose another --out_dir'
        except OSError as e:  # some network file systems have no locks
            print(f'{out_dir} cannot be locked ({e.strerror}): start no second training there')
    error = gather(error)[0]
    if error:
        raise UserError(error)
    return file


def about(config, batch, action_scale):
    """What the checkpoints of a training say of it. Every process has to call it.

    batch: clips of a step, in all processes.
    """
    launch = sorted({name for name in gather(LAUNCH) if name})  # one for each node
    text = json.dumps(dict(train=config, batch=batch, action_scale=action_scale, launch=launch))
    return json.loads(text)  # as it will be read, without tuples


def latest_of(out_dir):
    """The checkpoint that a run in this folder goes on from, '' if it holds none.

    A kill before the second of two writes leaves a numbered one and no latest.
    """
    paths = glob.glob(f'{glob.escape(out_dir)}/latest.safetensors')
    return choose(paths + glob.glob(f'{glob.escape(out_dir)}/step_*.safetensors'))


def starting_point(out_dir, resume, now):
    """The checkpoint that training goes on from, '' if it begins. Every process has to call it.

    now: what about() says. When a process dies torchrun starts all of them again. Then they go on
    by themselves, but only from what this launch has saved. Raises UserError.
    """
    latest = latest_of(out_dir)
    start, launches = '', []
    if max(gather(RESTARTS)) > 0 and latest:
        launches = read_meta(latest).get('launch', [])
    if set(launches) & set(now['launch']):
        start = latest
    elif isinstance(resume, str) and resume:
        start = named_checkpoint(under_results(resume), out_dir)
    elif resume and latest:
        start = latest
    elif resume:
        raise UserError(f'no checkpoint at {out_dir}/latest.safetensors: leave out --resume, '
                        'or check --out_dir')
    elif latest:
        raise UserError(f'{latest} is there already: add --resume=True to go on, '
                        'or choose another --out_dir')
    if start:
        compare(start, read_meta(start), now)
    return start


def named_checkpoint(path, out_dir):
    """The file that --resume=path means. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f'no checkpoint at {path}: check --resume')
    path = find(path)
    elsewhere = os.path.realpath(os.path.dirname(path)) != os.path.realpath(out_dir)
    if elsewhere and latest_of(out_dir):
        raise UserError(f'{out_dir} holds a run already: to go on from {path}, '
                        'choose another --out_dir')
    return path


def compare(path, before, now):
    """Say in which settings a run that goes on differs. Raises UserError if it must not."""
    old, new = before['train'], now['train']
    changed = {}
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            changed[key] = f'{key}={new[key]!r}, not {old[key]!r}'
    if 'dataset' in changed:
        places = {os.path.realpath(under_results(config['dataset'])) for config in (old, new)}
        if len(places) == 1:  # the same by another path
            del changed['dataset']
    wrong = [text for key, text in changed.items() if key not in MAY_CHANGE]
    if before.get('batch', now['batch']) != now['batch']:
        wrong.append(f'{now["batch"]} clips a step, not {before["batch"]}')
    if before.get('action_scale', now['action_scale']) != now['action_scale']:
        wrong.append('a dataset whose actions have another mean and std')
    if wrong:
        raise UserError(f'{path} was trained with other settings: {"; ".join(wrong)}. Use those '
                        'again, or begin with its weights: --init_from, and another --out_dir')
    said = [text for key, text in changed.items() if key not in ('out_dir', 'resume', 'init_from')]
    if said and RANK == 0:
        print(f'{path} goes on with {"; ".join(said)}')


def drop_old(out_dir, step, keep_last):
    """Delete the numbered checkpoints up to `step` but for the last few; 0 keeps all."""
    if keep_last and RANK == 0:
        names = sorted(glob.glob('step_*.safetensors', root_dir=out_dir))
        past = [name for name in names if name <= f'step_{step:07d}.safetensors']
        for name in past[:-keep_last]:
            os.remove(os.path.join(out_dir, name))


def disk_space(out_dir, size, config):
    """A line on what a training's checkpoints of `size` bytes will take on the disk."""
    count = 0
    if config['keep_every']:
        count = math.ceil(config['max_steps'] / config['keep_every'])  # the last step is kept, too
    if config['keep_last']:
        count = min(count, config['keep_last'])
    free = shutil.disk_usage(out_dir).free
    return (f'checkpoints: {count} numbered and latest, {size / 1e9:.3g} GB each, are '
            f'{(count + 1) * size / 1e9:.3g} GB; {free / 1e9:.3g} GB are free')
