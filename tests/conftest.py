"""What the command-line tests share: a small collected world, a short training run, and a way to run a script."""
import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys

import pytest
from torch import library

from configurator import UserError

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # built for another torch, which misses its operators: lpips and diffusers import it but use none
    for name in ('nms', 'qnms'):
        library.define(f'torchvision::{name}', '(Tensor x) -> Tensor')

# a shell that starts the tests in the background ignores Ctrl-C, and so would every process they start
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = ['train.py', '--device=cpu', '--patch_size=4', '--hidden_size=32', '--depth=2', '--num_heads=2',
         '--batch_size=4', '--pred_name=x', '--num_val_clips=4', '--sample_steps=2', '--warmup_steps=2']


def run(*args, code=0):
    """Run a script from the repository's root; returns its output after checking the exit code."""
    if args[0] in ('train.py', 'sample.py', 'evaluate.py'):
        return inline(*args, code=code)
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def inline(*args, code=0):
    """What `run` does, in this process, which saves starting one (but collecting data needs a program of its own)."""
    out, handlers = io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    before, sys.argv = (sys.argv, os.getcwd()), [os.path.join(ROOT, args[0]), *map(str, args[1:])]
    message = None
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as e:
        message = e.code
    except UserError as e:  # what sys.excepthook makes one line of
        message = str(e)
    finally:
        sys.argv, folder = before
        os.chdir(folder)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    text = out.getvalue() + (message if isinstance(message, str) else '')
    assert (1 if isinstance(message, str) else message or 0) == code, text
    return text


def error(*args):
    """Run a script that must fail with one line, not with a traceback; returns the line."""
    return (inline if args[0].endswith('.py') else run)(*args, code=1).splitlines()[-1]


@pytest.fixture(scope='session')
def wall(tmp_path_factory):
    """A small prepared wall dataset."""
    root = str(tmp_path_factory.mktemp('data') / 'wall')
    run('data.py', 'wall', f'--out={root}', '--episodes=20', '--image_size=16', '--workers=2')
    return root


@pytest.fixture(scope='session')
def trained(wall, tmp_path_factory):
    """The run folder of 8 training steps on it."""
    out = str(tmp_path_factory.mktemp('out') / 'run')
    run(*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=8', '--latest_every=4')
    return out
