"""Truths about training and the scripts around it, from the command line as a person would."""
import json
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

from checkpoint import load_model


def steps_of(out):
    with open(os.path.join(out, 'log.jsonl')) as f:
        return [json.loads(line)['step'] for line in f]


def assert_same(a, b, **tolerance):
    a, b = (load_file(os.path.join(folder, 'latest.safetensors')) for folder in (a, b))
    assert a.keys() == b.keys()
    for k in a:
        assert torch.allclose(a[k], b[k], **tolerance) if tolerance else torch.equal(a[k], b[k]), k


def test_a_run_leaves_what_it_promises(trained):
    files = set(os.listdir(trained))
    assert {'latest.safetensors', 'step_0000008.safetensors', 'config.json', 'log.jsonl', 'dream_0000008.png'} <= files
    assert not [f for f in files if f.endswith('.tmp')]
    with open(os.path.join(trained, 'config.json')) as f:
        assert json.load(f)['hidden_size'] == 32
    model, meta = load_model(trained)
    assert meta['step'] == 8 and model.config.action_dim == 2


def test_kill_9_and_resume_equals_the_uninterrupted_run(wall, tmp_path):
    options = [*TRAIN, f'--dataset={wall}', '--max_steps=400', '--latest_every=20', '--log_every=20']
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
    for rate, every in (('1e38', '5'), ('1e999', '1')):  # found in a loss, or in weights whose loss was still finite
        assert 'holds the last good step' in error(*options, '--resume=True', f'--learning_rate={rate}',
                                                   f'--latest_every={every}', f'--log_every={every}')
    after = load_file(os.path.join(out, 'latest.safetensors'))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_all_that_can_be_switched_trains(wall, tmp_path):
    for i, options in enumerate([('--pred_name=flow', '--injection=film', '--timestep_sampling=uniform'),
                                 ('--pred_name=epsilon', '--injection=adaln', '--dtype=bf16', '--ema_decay=0'),
                                 ('--pred_name=v', '--injection=adaln_fuse', '--timestep_per_clip=True',
                                  '--causal=False', '--grad_accum=2', '--gradient_clip_norm=0')]):
        out = str(tmp_path / str(i))
        run(*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=2', *options)
        run(*TRAIN, f'--dataset={wall}', f'--out_dir={out}', '--max_steps=3', *options, '--resume=True')
        assert load_model(out)[1]['step'] == 3


def test_each_mistake_gets_one_clear_line(wall, trained, tmp_path):
    out = f'--out_dir={tmp_path / "run"}'
    config = tmp_path / 'mine.py'
    config.write_text("pred_nam = 'x'\n")
    assert "mine.py: unknown key 'pred_nam'; did you mean 'pred_name'?" in error('train.py', str(config))
    assert "command line: unknown key 'batchsize'; did you mean 'batch_size'?" in error('train.py', '--batchsize=3')
    assert "max_steps='1.5' is of the wrong type; expected int" in error('train.py', '--max_steps=1.5')
    assert "compile='yes' is of the wrong type; expected bool" in error('train.py', '--compile=yes')
    assert 'no such config file' in error('train.py', 'config/nothing.py')
    assert 'expected a config file' in error('train.py', 'wall')
    assert 'python data.py wall' in error('train.py', f'--dataset={tmp_path}/wall', out)
    options = [*TRAIN, f'--dataset={wall}', out]
    assert 'context_frames=4: expected 1 to num_frames - 1' in error(*options, '--context_frames=4')
    assert 'batch_size=0: expected 1 or more' in error(*options, '--batch_size=0')
    assert "timestep_sampling='normal'" in error(*options, '--timestep_sampling=normal')
    assert "device='tpu' is not available here" in error(*options, '--device=tpu')
    assert "injection='add'" in error(*options, '--injection=add')
    assert 'epsilon needs noise_schedule=linear' in error(*options, '--pred_name=epsilon', '--zero_terminal_snr=true')
    assert 'does not divide into patches' in error(*options, '--patch_size=5')
    assert 'no checkpoint at' in error(*options, '--resume=True')
    assert 'no checkpoint at' in error('sample.py', f'--ckpt={tmp_path}')
    assert 'history=9: expected 1 to 3' in error('sample.py', f'--ckpt={trained}', '--history=9')
    assert 'expected gif or mp4' in error('sample.py', f'--ckpt={trained}', '--format=avi')
    assert 'not a readable .npy file' in error('sample.py', f'--ckpt={trained}', f'--actions={config}')
    for split in ('train', 'val'):
        (tmp_path / 'big' / split).mkdir(parents=True)
        for name, array in (('frames', np.zeros((9, 3, 20, 20), np.uint8)), ('actions', np.zeros((9, 2), np.float32)),
                            ('episodes', np.array([0, 9]))):
            np.save(tmp_path / 'big' / split / f'{name}.npy', array)
    (tmp_path / 'big' / 'meta.json').write_text('{}')
    other = [f'--ckpt={trained}', f'--dataset={tmp_path / "big"}', '--num_frames=4']
    for script in ('sample.py', 'evaluate.py'):
        assert 'do not fit the model' in error(script, *other)
    wide = [*TRAIN, f'--dataset={wall}', f'--out_dir={trained}', '--resume=True', '--hidden_size=64']
    assert 'does not fit this model' in error(*wide)
    corrupt = tmp_path / 'corrupt.safetensors'
    corrupt.write_bytes(b'not a checkpoint')
    assert 'not a readable safetensors file' in error('evaluate.py', f'--ckpt={corrupt}')
    assert load_model(trained)[1]['step'] == 8  # and nothing was lost


def test_help_prints_every_key_with_its_comment():
    for script, line in (('train.py', '--gradient_clip_norm=0.1'), ('sample.py', '--num_clips=6'),
                         ('evaluate.py', '--num_clips=256'), ('data.py', '--episodes=0')):
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
        assert image.n_frames == 6
    np.save(npy, np.zeros((6, 3)))
    said = error('sample.py', f'--ckpt={trained}', f'--actions={npy}')
    assert 'has shape [6, 3]: expected [1 * num_frames, 2]' in said
    if pytest.importorskip('imageio_ffmpeg'):
        run('sample.py', f'--ckpt={trained}', f'--out={mp4}', '--num_frames=3', '--num_clips=1')
        assert os.path.getsize(mp4) > 500
