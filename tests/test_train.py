"""Truths about training and the scripts around it, from the command line as a person would."""
import glob
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, error, run
from PIL import Image
from safetensors.torch import load_file

import configurator
import run as run_module
from checkpoint import load_model, read_checkpoint
from diffusion import Diffusion
from model import build_model
from random_data import random_dataset


def steps_of(out):
    with open(os.path.join(out, 'log.jsonl')) as f:
        return [json.loads(line)['step'] for line in f]


def assert_same(a, b, **tolerance):
    a, b = (load_file(os.path.join(folder, 'latest.safetensors')) for folder in (a, b))
    assert a.keys() == b.keys()
    for k in a:
        assert torch.allclose(a[k], b[k], **tolerance) if tolerance else torch.equal(a[k], b[k]), k


def test_a_run_leaves_what_it_promises(trained):
    pytest.importorskip('matplotlib')
    files = set(os.listdir(trained))
    assert {'latest.safetensors', 'step_0000008.safetensors', 'config.json', 'log.jsonl', 'loss.png',
            'dream_0000008.png'} <= files
    assert not [f for f in files if f.endswith('.tmp')]
    with open(os.path.join(trained, 'config.json')) as f:
        assert json.load(f)['hidden_size'] == 32
    model, meta = load_model(trained)
    assert meta['step'] == 8 and model.config.action_dim == 2


@pytest.mark.slow
@pytest.mark.parametrize('muon', [False, True])
def test_kill_9_and_resume_equals_the_uninterrupted_run(wall, tmp_path, muon):
    options = [*TRAIN, f'--dataset={wall}', '--max_steps=400', '--latest_every=20', '--log_every=20', f'--muon={muon}']
    whole, killed = str(tmp_path / 'whole'), str(tmp_path / 'killed')
    run(*options, f'--out_dir={whole}')
    job = subprocess.Popen([sys.executable, *options, f'--out_dir={killed}'], cwd=ROOT, stderr=subprocess.DEVNULL)
    latest = os.path.join(killed, 'latest.safetensors')
    while not os.path.exists(latest) and job.poll() is None:
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert load_model(killed)[1]['step'] < 400
    assert 'add --resume=True' in error(*options, f'--out_dir={killed}')
    run(*options, f'--out_dir={killed}', '--resume=True')
    assert_same(whole, killed)
    assert steps_of(whole) == steps_of(killed)


@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_before_leaving(wall, tmp_path, sig):
    out = str(tmp_path / 'run')
    job = subprocess.Popen([sys.executable, *TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=100000',
                            '--latest_every=100000'], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    log = os.path.join(out, 'log.jsonl')
    while not (os.path.exists(log) and os.path.getsize(log)) and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(sig)
    assert b'go on with --resume=True' in job.communicate(timeout=60)[0]
    assert job.returncode == 128 + sig and load_model(out)[1]['step'] >= 10


def test_two_processes_equal_one_with_the_same_global_batch(wall, tmp_path):
    options = [*TRAIN, f'--dataset={wall}', '--max_steps=6', '--injection=cross_attention']
    one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
    run(*options, f'--out_dir={one}', '--batch_size=8')
    run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *options, f'--out_dir={two}',
        '--batch_size=2', '--grad_accum=2')
    assert_same(one, two, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_step(wall, tmp_path):
    out = str(tmp_path / 'run')
    options = [*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=30', '--latest_every=5', '--log_every=5']
    run(*options, '--max_steps=5')
    before = load_file(os.path.join(out, 'latest.safetensors'))
    for every in (5, 1):  # found in a loss, or in weights whose loss was still finite
        assert 'holds the last good step' in error(*options, '--resume=True', '--learning_rate=1e38',
                                                   f'--latest_every={every}', f'--log_every={every}')
    after = load_file(os.path.join(out, 'latest.safetensors'))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_all_that_can_be_switched_trains(wall, tmp_path):
    for i, options in enumerate([('--pred_name=flow', '--injection=film', '--timestep_sampling=uniform'),
                                 ('--pred_name=epsilon', '--injection=adaln', '--dtype=bf16', '--ema_decay=0'),
                                 ('--muon=True', '--clean_history=0.5', '--val_every=1'),
                                 ('--pred_name=v', '--injection=adaln_fuse', '--timestep_per_clip=True',
                                  '--causal=False', '--grad_accum=2', '--gradient_clip_norm=0')]):
        out = str(tmp_path / str(i))
        run(*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=2', *options)
        run(*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=3', *options, '--resume=True')
        assert load_model(out)[1]['step'] == 3


@pytest.mark.parametrize('option, line', [
    ('--context_frames=4', 'context_frames=4: expected fewer than num_frames=4'),
    ('--batch_size=0', 'command line: batch_size=0: expected >= 1'),
    ('--snr_gamma=-1', 'snr_gamma=-1.0: expected >= 0'),
    ('--gradient_clip_norm=-0.1', 'gradient_clip_norm=-0.1: expected >= 0'),
    ('--ema_decay=nan', "expected float"),
    ('--timestep_std=1e999', 'timestep_std=inf: expected a finite number'),
    ('--learning_rate=1' + 400 * '0', 'expected at most 1e+15'),
    ('--seed=-1', 'seed=-1: expected 0 to 1e12'),
    ('--seed={[]}', "seed='{[]}' is of the wrong type"),
    ('--sample_steps=20000', 'sample_steps=20000: expected 1 to 1000'),
    ('--timestep_sampling=normal', "timestep_sampling='normal'"),
    ('--metrics=psnr', "metrics='psnr': expected one of lpips, fid, fvd"),
    ('--device=tpu', "device='tpu' is not available here"),
    ('--dtype=fp16', 'dtype=fp16 is for GPUs'),
    ('--injection=add', "injection='add'"),
    ('--pred_name=w', "pred_name='w'"),
    ('--model_size=M', "model_size='M': expected one of S, B, L, XL"),
    ('--patch_size=5', 'does not divide into patches'),
    ('--fsdp=True', 'start them with torchrun'),
    ('--resume=True', 'no checkpoint at'),
    ('--init_from=nowhere', 'no checkpoint at'),
    ('--dataset=nowhere/wall', 'python data.py wall'),
    ('--max_steps=1.5', 'max_steps=1.5 is of the wrong type; expected int'),
    ('--resume=3', 'no checkpoint at 3: check --resume'),
    ('--num_workers=0', 'num_workers=0: expected 1 to 256'),
    ('--keep_last=-1', 'keep_last=-1: expected >= 0'),
    ('--compile=yes', "compile='yes' is of the wrong type; expected bool"),
    ('--batchsize=3', "command line: unknown key 'batchsize'; did you mean 'batch_size'?"),
    ('config/nothing.py', 'config/nothing.py: no such config file'),
    ('wall', "'wall': expected a config file"),
])
def test_a_wrong_setting_gets_one_line(wall, tmp_path, option, line):
    assert line in error(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path / "run"}', option)


def test_epsilon_refuses_a_schedule_it_cannot_work_with(wall, tmp_path):
    options = [*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path / "run"}', '--pred_name=epsilon']
    assert 'epsilon needs noise_schedule=linear' in error(*options, '--zero_terminal_snr=true')


def test_a_mistake_in_a_config_file_names_the_file(tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text("pred_nam = 'x'\n")
    assert "mine.py: unknown key 'pred_nam'; did you mean 'pred_name'?" in error('train.py', str(config))


def test_a_tilde_means_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/x')
    settings = configurator.read_settings(train_namespace())
    for key in ('out_dir', 'resume'):
        assert configurator.parse('~/runs/1', settings[key]) == '/home/x/runs/1'


def test_a_setting_of_two_types_takes_both_and_no_third(tmp_path):
    settings = configurator.read_settings(train_namespace())
    for text, value in (('True', True), ('false', False), ('a/3.safetensors', 'a/3.safetensors'), ('3', '3')):
        assert configurator.parse(text, settings['resume']) == value
    config = tmp_path / 'mine.py'
    config.write_text('resume = 3\n')
    assert 'mine.py: resume=3 is of the wrong type; expected bool | str' in error('train.py', str(config))


def test_a_script_prints_a_mistake_as_one_line():
    done = subprocess.run([sys.executable, 'train.py', '--batch_size=0'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == 'command line: batch_size=0: expected >= 1\n'


@pytest.mark.parametrize('option, line', [
    ('--history=9', 'history=9: expected 1 to 3'),
    ('--format=avi', "format='avi': expected one of gif, mp4"),
    ('--actions=sample.py', 'not a readable .npy file'),
    ('--num_frames=1', 'num_frames=1: expected 2 to 100000'),
    ('--context_frames=20', 'context_frames=20: expected fewer than num_frames=16'),
    ('--schedule=diagonal', "schedule='diagonal': expected one of sequential"),
    ('--ckpt=nowhere', 'no checkpoint at'),
])
def test_sample_says_what_is_wrong(trained, tmp_path, option, line):
    assert line in error('sample.py', f'--ckpt={trained}', f'--out={tmp_path}/a.gif', option)


@pytest.mark.parametrize('script', ['sample.py', 'evaluate.py'])
def test_a_dataset_of_another_size_is_refused(trained, tmp_path, script):
    other = random_dataset(tmp_path / 'big', (3, 20, 20), action_dim=2, rows=9)
    assert 'do not fit the model' in error(script, f'--ckpt={trained}', f'--dataset={other}', '--num_frames=4')


def test_help_prints_every_key_with_its_comment():
    for script, line in (('train.py', '--gradient_clip_norm=0.1'), ('sample.py', '--num_clips=6'),
                         ('sample.py', '--stabilization=0.02'), ('evaluate.py', '--num_clips=256'),
                         ('data.py', '--episodes=0')):
        assert line in run(script, '--help')


def test_config_files_then_keys_and_the_later_wins(wall, tmp_path):
    out = str(tmp_path / 'run')
    run(*TRAIN, 'config/wall.py', f'--dataset={wall}', '--hidden_size=32', '--depth=2', '--num_heads=2',
        '--max_steps=1', '--learning_rate=1', f'--out_dir={out}')
    with open(os.path.join(out, 'config.json')) as f:
        config = json.load(f)
    assert config['batch_size'] == 24 and config['hidden_size'] == 32 and config['learning_rate'] == 1.0


def test_sample_writes_a_video_of_any_length(trained, tmp_path):
    gif, mp4, npy = (str(tmp_path / f'a.{kind}') for kind in ('gif', 'mp4', 'npy'))
    run('sample.py', f'--ckpt={trained}', f'--out={gif}', '--num_frames=9', '--num_clips=2')
    with Image.open(gif) as image:
        assert image.n_frames == 9
    np.save(npy, np.random.default_rng(0).uniform(-0.1, 0.1, (6, 2)))
    run('sample.py', f'--ckpt={trained}', f'--out={gif}', f'--actions={npy}', '--num_clips=2')
    with Image.open(gif) as image:
        assert image.n_frames == 7
    np.save(npy, np.zeros((6, 3)))
    said = error('sample.py', f'--ckpt={trained}', f'--actions={npy}')
    assert 'has shape [6, 3]: expected [1 * steps, 2]' in said
    if pytest.importorskip('imageio_ffmpeg'):
        run('sample.py', f'--ckpt={trained}', f'--out={mp4}', '--num_frames=3', '--num_clips=1')
        assert os.path.getsize(mp4) > 500


# -----------------------------------------------------------------------------
# formulas and configs

def test_the_learning_rate_warms_up_and_follows_a_cosine(wall, tmp_path):
    run(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}', '--max_steps=12', '--warmup_steps=4', '--log_every=1',
        '--learning_rate=1e-3', '--min_lr=1e-4', '--val_every=0')
    with open(tmp_path / 'log.jsonl') as f:
        rates = [json.loads(line)['lr'] for line in f]
    warm = [1e-3 * n / 4 for n in (1, 2, 3, 4)]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert rates == pytest.approx(warm + cosine)


def test_the_average_follows_its_formula(wall, tmp_path):
    options = [*TRAIN, f'--dataset={wall}', '--max_steps=3', '--keep_every=1', '--val_every=0']
    run(*options, f'--out_dir={tmp_path}/run')
    steps = [read_checkpoint(f'{tmp_path}/run/step_{n:07d}.safetensors', train=True)[0] for n in (1, 2, 3)]
    for before, after, n in zip(steps, steps[1:], (1, 2), strict=False):
        decay = min(0.999, (1 + n) / (10 + n))
        for k in (k for k in after if not k.startswith('train.')):
            want = decay * before[k] + (1 - decay) * after[f'train.model.{k}']
            assert torch.allclose(after[k], want, atol=1e-6), k


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))), ids=os.path.basename)
def test_every_config_loads_and_builds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = configurator.read_settings(train_namespace())
    values = {key: setting.default for key, setting in defaults.items()}
    for key, value in configurator.run_config_file(path).items():
        values[key] = configurator.checked(key, value, defaults, path)
    shape = values['frame_shape'] if values['model_size'] else (3, 64, 64)
    with torch.device('meta'):
        build_model(values, shape, values['action_dim'] * values['frame_interval'])
    Diffusion(values['pred_name'], values['noise_schedule'], values['zero_terminal_snr'])


def train_namespace():
    """train.py's settings with nothing run: the globals that its settings block alone makes."""
    path = os.path.join(ROOT, 'train.py')
    with open(path) as f:
        block = configurator.BLOCK.search(f.read())[1]
    namespace = {'__file__': path}
    exec(block, namespace)
    return namespace


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', 'published', '*.py'))),
                         ids=os.path.basename)
def test_every_published_checkpoint_says_what_its_file_cannot(path):
    values = configurator.run_config_file(path)
    settings = configurator.read_settings(vars(run_module))
    for key, value in values.items():
        configurator.checked(key, value, settings, path)
    assert {'ckpt', 'dataset', 'pred_name', 'frame_interval', 'context_frames', 'num_steps'} <= values.keys()
