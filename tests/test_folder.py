"""Truths about a run's folder: who may write to it, what a run goes on from, and what it keeps."""
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAIN, error, inline, run
from safetensors.torch import save_file
from test_train import assert_same, steps_of

import folder
from checkpoint import load_model, read_meta
from configurator import UserError
from logger import Logger, lines_until
from machine import write_whole

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@pytest.fixture(scope='module')
def options(wall):
    return [*TRAIN, f'--dataset={wall}', '--max_steps=6', '--keep_every=2', '--log_every=1', '--val_every=3']


@pytest.fixture(scope='module')
def whole(options, tmp_path_factory):
    """The folder of a run of 6 steps, with checkpoints of 2, 4 and 6."""
    out = str(tmp_path_factory.mktemp('whole') / 'run')
    inline(*options, f'--out_dir={out}')
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, str(tmp_path / 'run'))


def step_of(path):
    return read_meta(path)['step']


def test_a_run_goes_back_to_one_of_its_checkpoints(options, whole, copy):
    inline(*options, f'--out_dir={copy}', f'--resume={copy}/step_0000002.safetensors', '--max_steps=4')
    assert steps_of(copy) == [1, 2, 3, 3, 4, 4]  # what the log said of later steps is gone; 3 and 4 are validated
    assert step_of(f'{copy}/latest.safetensors') == 4
    assert step_of(f'{copy}/step_0000006.safetensors') == 6  # until the run comes by again
    inline(*options, f'--out_dir={copy}', '--resume=True', '--learning_rate=1')  # another learning rate from there
    inline(*options, f'--out_dir={copy}', f'--resume={copy}/step_0000002.safetensors')
    assert_same(whole, copy)
    assert steps_of(copy) == steps_of(whole)


def test_going_back_replaces_latest_before_the_first_step(options, copy):
    job = [*options, f'--out_dir={copy}', f'--resume={copy}/step_0000002.safetensors', '--learning_rate=1e38']
    assert 'latest.safetensors holds the last good step' in error(*job)
    assert step_of(f'{copy}/latest.safetensors') in (2, 3)


def test_a_run_goes_on_in_another_folder(options, whole, tmp_path, monkeypatch):
    monkeypatch.setenv('RESULTS_DIR', str(tmp_path))
    shutil.copytree(whole, tmp_path / 'out' / 'first')
    inline(*options, '--out_dir=out/second', '--resume=out/first/step_0000004.safetensors')
    assert_same(whole, tmp_path / 'out' / 'second')
    assert steps_of(tmp_path / 'out' / 'second') == [5, 6, 6]
    assert 'holds a run already' in error(*options, '--out_dir=out/second', '--resume=out/first')


@pytest.mark.parametrize('option, said', [
    ('--pred_name=v', "pred_name='v', not 'x'"),
    ('--injection=film', "injection='film', not 'additive'"),
    ('--causal=False', 'causal=False, not True'),
    ('--noise_schedule=linear', "noise_schedule='linear', not None"),
    ('--hidden_size=64', 'hidden_size=64, not 32'),
    ('--normalize_action=True', 'a dataset whose actions have another mean and std'),
    ('--seed=1', 'seed=1, not 3407'),
    ('--batch_size=2', '2 clips a step, not 4'),
    ('--dataset=nowhere', 'no prepared dataset'),
    ('--resume=nowhere', 'no checkpoint at nowhere: check --resume'),
])
def test_what_must_not_change_is_named(option, said, options, copy):
    before = step_of(f'{copy}/latest.safetensors')
    assert said in error(*options, f'--out_dir={copy}', '--resume=True', '--max_steps=8', option)
    assert step_of(f'{copy}/latest.safetensors') == before


def test_another_dataset_is_refused_and_the_same_by_another_path_is_not(options, wall, copy, tmp_path):
    job = [*options, f'--out_dir={copy}', '--resume=True', '--max_steps=8']
    os.symlink(wall, tmp_path / 'link')
    inline(*job, f'--dataset={tmp_path}/link/')
    shutil.copytree(wall, tmp_path / 'other')
    assert f"dataset='{tmp_path}/other', not " in error(*job, f'--dataset={tmp_path}/other')


def test_what_may_change_is_named_and_goes_on(options, copy):
    said = inline(*options, f'--out_dir={copy}', '--resume=True', '--max_steps=8', '--batch_size=2', '--grad_accum=2')
    assert 'latest.safetensors goes on with batch_size=2, not 4; grad_accum=2, not 1; max_steps=8, not 6' in said
    assert step_of(f'{copy}/latest.safetensors') == 8


@pytest.mark.parametrize('name', ['m.safetensors', 'm.pt'])
def test_only_a_training_goes_on(name, options, tmp_path):
    save_file({'x_embedder.proj.weight': torch.zeros(1)}, tmp_path / name)
    job = [*options, f'--out_dir={tmp_path}/new', f'--resume={tmp_path}/{name}']
    assert 'start from it with --init_from, not --resume' in error(*job)


def test_weights_to_start_from_may_lie_under_results_dir(options, whole, tmp_path, monkeypatch):
    monkeypatch.setenv('RESULTS_DIR', str(tmp_path))
    shutil.copytree(whole, tmp_path / 'out' / 'first')
    inline(*options, '--out_dir=out/second', '--init_from=out/first', '--max_steps=1')


def test_one_training_at_a_time_and_a_killed_one_leaves_no_lock(options, tmp_path):
    out = str(tmp_path / 'run')
    program = f'import folder, time; kept = folder.claim({out!r}); print("locked", flush=True); time.sleep(600)'
    with subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        assert error(*options, f'--out_dir={out}').endswith('is at work there; choose another --out_dir')
        first.kill()
    inline(*options, f'--out_dir={out}', '--max_steps=1')


def test_a_restart_does_not_take_up_another_run(options, copy):
    said = run(*TORCHRUN[:-1], '--max_restarts=1', *options, f'--out_dir={copy}', '--max_steps=9', code=1)
    assert 'add --resume=True to go on, or choose another' in said
    assert step_of(f'{copy}/latest.safetensors') == 6


@pytest.mark.parametrize('launch, goes_on', [(['a', 'b'], True), (['c'], False), ([], False)])
def test_a_restart_goes_on_with_what_any_node_of_its_launch_saved(launch, goes_on, whole, monkeypatch):
    monkeypatch.setattr(folder, 'RESTARTS', 1)
    saved = read_meta(f'{whole}/latest.safetensors')
    monkeypatch.setattr(folder, 'read_meta', lambda path: saved | {'launch': ['b', 'd']})
    if goes_on:
        assert folder.starting_point(whole, False, saved | {'launch': launch}) == f'{whole}/latest.safetensors'
    else:
        with pytest.raises(UserError, match='is there already'):
            folder.starting_point(whole, False, saved | {'launch': launch})


def test_only_the_last_checkpoints_are_kept(options, copy, tmp_path):
    inline(*options, f'--out_dir={tmp_path}/new', '--keep_last=2')
    kept = sorted(name for name in os.listdir(tmp_path / 'new') if name.startswith('step_'))
    assert kept == ['step_0000004.safetensors', 'step_0000006.safetensors']
    folder.drop_old(copy, 4, 1)  # a run that went back to step 2 and is at 4: later ones are not its own
    assert not os.path.exists(f'{copy}/step_0000002.safetensors')
    assert load_model(f'{copy}/step_0000004.safetensors') and load_model(f'{copy}/step_0000006.safetensors')


def test_a_run_without_its_latest_is_not_written_over_and_goes_on_from_its_last_numbered_one(options, whole, copy):
    for name in ('latest', 'step_0000006'):
        os.remove(f'{copy}/{name}.safetensors')
    assert 'step_0000004.safetensors is there already: add --resume=True' in error(*options, f'--out_dir={copy}')
    assert 'holds a run already' in error(*options, f'--out_dir={copy}', f'--resume={whole}')
    inline(*options, f'--out_dir={copy}', '--resume=True')
    assert_same(whole, copy)


def test_the_space_that_checkpoints_will_take_is_said(options, tmp_path):
    config = dict(max_steps=300_000, keep_every=10_000, keep_last=0)
    line = folder.disk_space(str(tmp_path), 16 * 158.6e6, config)  # B/2
    assert line.startswith('checkpoints: 30 numbered and latest, 2.54 GB each, are 78.7 GB; ')
    assert '2 numbered' in folder.disk_space(str(tmp_path), 1, config | dict(keep_last=2))
    said = inline(*options, f'--out_dir={tmp_path}/new', '--max_steps=5')
    size = os.path.getsize(tmp_path / 'new' / 'latest.safetensors')
    assert float(said.split('3 numbered and latest, ')[1].split()[0]) == pytest.approx(size / 1e9, rel=0.2)


def test_workers_change_neither_the_batches_nor_their_order(options, whole, tmp_path):
    inline(*options, f'--out_dir={tmp_path}/new', '--num_workers=3')
    assert_same(whole, tmp_path / 'new')


SLOW = """
import os, runpy, sys, time
import torch
def slow(*args, clip=torch.nn.utils.clip_grad_norm_):
    time.sleep(2)
    open({path!r}, 'w').close()
    return clip(*args)
torch.nn.utils.clip_grad_norm_ = slow
sys.argv, sys.path[0] = sys.argv[1:], {root!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_processes_that_hardly_ever_log_save_when_torchrun_is_told_to_stop(options, tmp_path):
    script, stepping, out = tmp_path / 'slow.py', tmp_path / 'stepping', str(tmp_path / 'run')
    script.write_text(SLOW.format(path=str(stepping), root=ROOT))
    rare = [f'--{key}=100000' for key in ('max_steps', 'log_every', 'val_every', 'keep_every', 'latest_every')]
    command = [sys.executable, *TORCHRUN, str(script), *options, *rare, f'--out_dir={out}']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        while not stepping.exists() and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        said = job.communicate()[0].decode()
    assert 'go on with --resume=True' in said and step_of(f'{out}/latest.safetensors') < 100


def test_whatever_a_log_holds_its_good_lines_stay(options, copy):
    with open(f'{copy}/log.jsonl', 'rb') as f:
        good = f.read()
    with open(f'{copy}/log.jsonl', 'wb') as f:
        f.write(b'{bad\n[]\n3\nnull\n{"step": "x"}\n{"loss": 1}\n\xff\xfe\x00\n')
        f.write(100_000 * b'[' + b'\n' + good + b'{"step": 6, "lo')
    assert lines_until(f'{copy}/log.jsonl', 6) == good.decode()


def test_a_run_that_is_done_says_so(options, copy):
    said = inline(*options, f'--out_dir={copy}', '--resume=True')
    assert f'{copy}/latest.safetensors has done its max_steps=6 already' in said


@pytest.mark.parametrize('name', ['config.json', 'loss.png', 'dream_0000003.png'])
def test_a_folder_in_a_files_place_gets_one_line(name, options, tmp_path):
    (tmp_path / name).mkdir()
    job = [sys.executable, *options, f'--out_dir={tmp_path}', '--max_steps=3']
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and name in done.stderr


def test_a_full_disk_is_said_with_the_file_and_leaves_the_old_one(tmp_path):
    (tmp_path / 'config.json').write_text('old')
    (tmp_path / 'config.json.tmp').symlink_to('/dev/full')
    with pytest.raises(UserError, match='^cannot write .*/config.json: No space left on device$'):
        write_whole(tmp_path / 'config.json', 'new')
    assert (tmp_path / 'config.json').read_text() == 'old'


def test_runs_of_one_name_are_runs_of_their_own_to_wandb(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **options: begun.append(options)))
    for parent, step in (('a', 0), ('a', 5), ('b', 0), ('a', 0)):
        os.makedirs(tmp_path / parent / 'wall', exist_ok=True)
        Logger(str(tmp_path / parent / 'wall'), {}, step, wandb_project='nanowm')
    ids = [options['id'] for options in begun]
    assert ids[0] == ids[1] and len(set(ids)) == 3  # it was resumed once
    assert {options['name'] for options in begun} == {'wall'}


def test_a_log_that_cannot_be_written_names_itself(tmp_path):
    log = Logger(str(tmp_path), {}, step=0)
    (tmp_path / 'log.jsonl').unlink()
    (tmp_path / 'log.jsonl').symlink_to('/dev/full')
    with pytest.raises(UserError, match='^cannot write .*/log.jsonl: No space left on device; go on with --resume'):
        log.log(1, loss=0.5)
