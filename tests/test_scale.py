"""Truths about many processes, shards, restarts and random data: however a run is spread, it is the same run."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, error, run
from PIL import Image
from test_train import assert_same, steps_of
from torch import nn

import machine
from checkpoint import load_model

CLOSE = dict(rtol=1e-4, atol=1e-6)
ONE = ['--batch_size=8']  # the global batch of two processes with TWO
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
TWO = ['--batch_size=2', '--grad_accum=2']
FSDP = [*TWO, '--fsdp=True']


def test_a_compiled_model_that_is_sharded_is_not_wrapped_in_ddp(monkeypatch):
    monkeypatch.setattr(machine, 'WORLD_SIZE', 2)
    monkeypatch.setattr(machine, 'FSDPModule', nn.Linear)  # stands for one, which takes two processes to make
    net = torch.compile(nn.Linear(2, 2))
    assert machine.distributed(net, 'cpu') is net


@pytest.fixture(scope='module')
def spread(wall, tmp_path_factory):
    """Options of a run of 6 steps, and its folders: in one process, and sharded over two."""
    out = str(tmp_path_factory.mktemp('spread'))
    options = [*TRAIN, f'--dataset={wall}', '--max_steps=6', '--keep_every=3', '--val_every=1', '--num_val_clips=3',
               '--injection=cross_attention', '--depth=3']
    run(*options, *ONE, f'--out_dir={out}/one')
    run(*TORCHRUN, *options, *FSDP, f'--out_dir={out}/fsdp')
    return options, f'{out}/one', f'{out}/fsdp'


def test_fsdp_equals_one_process_with_the_same_global_batch(spread):
    _, one, fsdp = spread
    assert_same(one, fsdp, **CLOSE)
    logs = [[json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))] for out in (one, fsdp)]
    for a, b in zip(*logs, strict=True):  # and what validates is the EMA of now
        assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a if k not in ('clips_per_s', 'mfu'))
    a, b = (np.asarray(Image.open(os.path.join(out, 'dream_0000006.png')), int) for out in (one, fsdp))
    assert abs(a - b).max() <= 1


def test_a_checkpoint_goes_on_under_fsdp_or_without_whoever_wrote_it(spread, tmp_path):
    options, one, fsdp = spread
    for writer, reader in ((one, [*TORCHRUN, *options, *FSDP]), (fsdp, [*options, *ONE])):
        out = tmp_path / os.path.basename(writer)
        out.mkdir()
        shutil.copy(os.path.join(writer, 'step_0000003.safetensors'), out / 'latest.safetensors')
        run(*reader, f'--out_dir={out}', '--resume=True')
        assert_same(one, out, **CLOSE)


def test_recomputing_activations_changes_nothing(spread, tmp_path):
    options, one, _ = spread
    run(*options, *ONE, f'--out_dir={tmp_path}/run', '--grad_checkpoint=True')
    assert_same(one, tmp_path / 'run')


def test_a_worker_killed_under_torchrun_goes_on_by_itself(spread, tmp_path, monkeypatch):
    options, one, _ = spread
    suicide = tmp_path / 'suicide.py'
    suicide.write_text(f"""
import os, runpy, sys
def replace_and_die(old, new, replace=os.replace):
    replace(old, new)
    if new.endswith('latest.safetensors'):
        os.kill(os.getpid(), 9)
if os.environ['RANK'] == os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    os.replace = replace_and_die
sys.argv, sys.path[0] = sys.argv[1:], {ROOT!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')  # else torchrun hands out the dead worker's address
    out = run(*TORCHRUN, '--max_restarts=1', str(suicide), *options, *TWO, f'--out_dir={tmp_path}/killed')
    assert 'exitcode: -9' in out
    assert_same(one, tmp_path / 'killed', **CLOSE)
    assert set(steps_of(tmp_path / 'killed')) == set(steps_of(one))


def test_processes_ask_each_other_to_stop_by_the_clock_and_not_in_every_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(machine, 'WORLD_SIZE', 2)
    monkeypatch.setattr(machine.time, 'perf_counter', lambda: now[0])
    asked = []
    monkeypatch.setattr(machine.dist, 'all_reduce', lambda numbers, op: asked.append(step))
    monkeypatch.setattr(machine.signal, 'signal', lambda signum, handler: None)
    interrupt = machine.Interrupt(step=1000)
    for step in range(1001, 1030):  # steps of half a second, then of ten
        now[0] += 0.5 if step <= 1015 else 10
        if step == 1025:
            interrupt.on_signal(15, None)
        assert interrupt.agreed(step, 'cpu') == (step >= 1025)
    assert asked == [1001, 1011, 1021, *range(1022, 1030)]


def test_random_data_needs_no_dataset(tmp_path):
    out = f'--out_dir={tmp_path}/run'
    options = [*TRAIN, '--real_data=False', '--frame_interval=2', '--max_steps=1', '--dataset=nowhere']
    run(*options, '--frame_shape=(4,8,16)', out)
    config = load_model(tmp_path / 'run')[0].config
    assert (config.in_channels, config.input_size, config.action_dim) == (4, (8, 16), 14)
    assert steps_of(tmp_path / 'run') == [1, 1]  # the loss, and the validation loss
    assert 'frame_shape=(8, 16), action_dim=7: expected' in error(*options, '--frame_shape=(8,16)')
