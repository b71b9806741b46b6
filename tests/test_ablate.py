"""Truths about ablate.py."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, error, inline

from checkpoint import read_checkpoint

TINY = dict(device='cpu', patch_size=4, hidden_size=32, depth=2, num_heads=2, batch_size=4, pred_name='x',
            num_val_clips=2, sample_steps=1, max_steps=4, warmup_steps=1, learning_rate=1e-2)
CROSS = 'x-cross_attention-32x2-seed'
ZERO = 'x-cross_attention_double_zero-32x2-seed'


class InProcess:
    """Takes the place of subprocess.Popen: runs the script here, and notes (script, arm, resumed?)."""
    calls = []
    stop_at = None  # an arm whose training is stopped after half its steps

    def __init__(self, command, **options):
        script = os.path.basename(command[1])
        folder = next(o.split('=')[1] for o in command if o.startswith(('--out_dir', '--ckpt')))
        arm = os.path.basename(folder)
        self.calls.append((script, arm, '--resume=True' in command))
        self.stopped = script == 'train.py' and arm == self.stop_at
        inline(script, *command[2:], *['--max_steps=2'] * self.stopped)

    def wait(self):
        return int(self.stopped)


@pytest.fixture
def base(wall, tmp_path):
    path = tmp_path / 'tiny.py'
    path.write_text('\n'.join(f'{k} = {v!r}' for k, v in {**TINY, 'dataset': wall}.items()))
    return path


@pytest.fixture
def options(base, tmp_path):
    return ['ablate.py', base, f'--out_dir={tmp_path}/out', f'--results_dir={tmp_path}/results',
            '--eval_options=--num_clips=3 --metrics= --device=cpu']


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(InProcess, 'calls', [])
    monkeypatch.setattr(InProcess, 'stop_at', None)
    monkeypatch.setattr(subprocess, 'Popen', InProcess)
    return InProcess.calls


def figures(folder):
    with open(folder / 'metrics.json') as f:
        return json.load(f)


@pytest.mark.slow
def test_an_ablation_is_interrupted_resumed_and_skips_what_is_done(options, calls, tmp_path):
    options += ['--axis=injection', '--only=cross_attention,cross_attention_double_zero', '--seeds=0,1']
    InProcess.stop_at = f'{ZERO}1'
    assert 'ended with 1; the same ablate.py command goes on' in error(*options)
    before = len(calls)
    InProcess.stop_at = None
    inline(*options)
    assert calls[before:] == [('train.py', f'{ZERO}1', True), ('evaluate.py', f'{ZERO}1', False)]
    assert read_checkpoint(str(tmp_path / 'out' / 'tiny' / f'{ZERO}1'))[2]['step'] == 4
    inline(*options)
    assert len(calls) == before + 2

    # the arm whose gate and projection both start at zero never learns to listen; the others do
    arms = tmp_path / 'out' / 'tiny'
    assert all(figures(arms / f'{ZERO}{seed}')['means']['gap_psnr'] == 0 for seed in (0, 1))
    assert all(figures(arms / f'{CROSS}{seed}')['means']['gap_psnr'] != 0 for seed in (0, 1))
    text = (tmp_path / 'results' / 'injection_tiny.md').read_text()
    assert '| cross_attention_double_zero | 0.0' in text
    assert '0.00 ± 0.00 | 0.00 to 0.00 | 0.00, 0.00 |' in text
    assert '| copy |  |  | ' in text
    assert (tmp_path / 'results' / 'injection_tiny.png').exists()


def test_the_steps_axis_trains_once_and_compares_solvers_and_steps(options, calls, tmp_path):
    inline(*options, '--axis=steps', '--only=x', '--seeds=0', '--solvers=ddim', '--steps=1,3')
    assert [script for script, *_ in calls] == ['train.py'] + ['evaluate.py'] * 3
    lines = (tmp_path / 'results' / 'steps_tiny.md').read_text().splitlines()
    row = next(line for line in lines if line.startswith('| x |'))
    mean = figures(tmp_path / 'out' / 'tiny' / 'x-additive-32x2-seed0' / 'ddim-3')['means']['psnr']
    assert row.startswith(f'| x | {mean:.2f} [')
    assert row.endswith(('| 1 |', '| 3 |'))  # the last number of steps is in its own interval
    assert (tmp_path / 'results' / 'steps_tiny.png').exists()

    (tmp_path / 'out').rename(tmp_path / 'moved')
    options[2] = f'--out_dir={tmp_path}/moved'
    before = len(calls)
    inline(*options, '--axis=steps', '--only=x', '--seeds=0', '--solvers=ddim', '--steps=1,3')
    assert len(calls) == before  # all is found where it is now


def test_arms_measured_on_different_clips_are_not_compared(options, calls):
    options += ['--axis=target', '--only=x']
    inline(*options, '--seeds=0')
    options[4] = '--eval_options=--num_clips=4 --metrics= --device=cpu'
    assert 'x-additive-32x2-seed0 were measured on different clips' in error(*options, '--seeds=0,1')


@pytest.mark.parametrize('option, said', [
    ('--axis=size', "axis='size': expected one of target, injection, scale, steps"),
    ('--only=w', "only='w': expected one of epsilon, x, v, flow"),
    ('--solvers=heun', "solvers='heun'"),
    ('--steps=0', "steps='0': expected different numbers, 1 or more"),
    ('--seeds=0,0', "seeds='0,0': expected different numbers"),
    ('--seeds=one', "seeds='one'"),
    ('--only=x,x', "only='x,x': expected different ones"),
    ("--launch='torchrun", 'No closing quotation'),
    ("--train_options=--a='b", 'No closing quotation'),
    ('--train_options=--max_steps=3 --pred_name=flow', 'train_options: the arms set pred_name'),
    ('--eval_options=--ckpt=out/wall', 'eval_options: the arms set ckpt'),
    ('--results_dir=README.md', 'cannot write to README.md'),
    ('--out_dir=README.md', 'README.md'),
    ('--base=config/none.py', 'config/none.py: no such config file'),
])
def test_a_mistake_ends_in_one_line_before_any_training(option, said, options, calls):
    assert said in error(*options, option)
    assert not calls


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_which_saves_before_ablate_ends(signum, base, tmp_path):
    trainer = tmp_path / 'trainer.py'  # stands in for train.py
    trainer.write_text(f"""
import signal, sys, time
def save(signum, frame):
    time.sleep(0.5)
    open({str(tmp_path / 'saved')!r}, 'w').close()
    sys.exit(128 + signum)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
open({str(tmp_path / 'started')!r}, 'w')
time.sleep(60)
""")
    command = [sys.executable, os.path.join(ROOT, 'ablate.py'), str(base), f'--out_dir={tmp_path}/out',
               f'--launch={sys.executable} {trainer}']
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as ablate:  # from another folder
        while not (tmp_path / 'started').exists() and ablate.poll() is None:
            time.sleep(0.05)
        ablate.send_signal(signum)
        said = ablate.stderr.read()
    assert said.strip() == 'interrupted; the same ablate.py command goes on'
    assert ablate.returncode == 1
    assert (tmp_path / 'saved').exists()
