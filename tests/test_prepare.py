"""Truths about preparing: whatever happens on the way, and whoever does it, the bytes are the same."""
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, error, inline, run
from PIL import Image
from raw import KINDS, film, load_split, save_pth, tiny_vae

import envs
from checkpoint import read_checkpoint
from configurator import UserError
from pictures import GAP, LABEL
from prepare import parse_size


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture
def latent_wall(tmp_path, monkeypatch):
    """The command that prepares 40 episodes of a DINO-WM set, of which one is broken, as latents of a tiny VAE."""
    save_pth(f'{tmp_path}/wall_single/actions.pth', torch.randn(40, 24, 2))
    for i in range(40):
        save_pth(f'{tmp_path}/wall_single/obses/episode_{i:03d}.pth', torch.from_numpy(film(24, seed=i)))
    (tmp_path / 'wall_single' / 'obses' / 'episode_007.pth').write_bytes(b'not a tensor')
    monkeypatch.setenv('VAE_MODEL_PATH', tiny_vae(tmp_path / 'vae'))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # the same bytes need the same order of sums
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ['data.py', 'dino_wall', f'--root={tmp_path}', '--image_size=32', '--val_clips=3', '--val_frames=9']
    torch.set_num_threads(before)


def test_collection_does_not_depend_on_the_number_of_workers(wall, tmp_path):
    root = str(tmp_path / 'wall')
    inline('data.py', 'wall', f'--out={root}', '--episodes=20', '--image_size=16', '--workers=0')
    for split in ('train', 'val'):
        for name in ('frames', 'actions', 'episodes'):
            with open(f'{wall}/{split}/{name}.npy', 'rb') as a, open(f'{root}/{split}/{name}.npy', 'rb') as b:
                assert a.read() == b.read()
    assert not os.path.exists(root + '.partial')


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / 'wall').mkdir()
    line = error('data.py', 'wall', f'--out={tmp_path / "wall"}', '--episodes=2')
    assert 'is there already' in line
    assert not os.path.exists(f'{tmp_path / "wall"}.partial')


def test_pusht_is_collected(tmp_path):
    pytest.importorskip('gym_pusht')
    inline('data.py', 'pusht', f'--out={tmp_path / "pusht"}', '--episodes=4', '--image_size=32', '--workers=0')
    frames, actions, rows = load_split(tmp_path / 'pusht', 'train')
    assert frames.shape == (600, 3, 32, 32) and actions.shape == (600, 2)
    assert rows.tolist() == [0, 200, 400, 600]


class Pendulum(envs.Wall):
    about, steps, action_dim = 'a world with one number an action', 7, 1

    def explore(self, rng):
        return super().explore(rng)[:1]

    def step(self, action):
        return super().step([*action, 0])


def test_a_world_is_one_class_in_one_table(tmp_path, monkeypatch):
    monkeypatch.setitem(envs.WORLDS, 'pendulum', Pendulum)
    inline('data.py', 'pendulum', f'--out={tmp_path / "out"}', '--episodes=3', '--image_size=16', '--workers=0')
    frames, actions, rows = load_split(tmp_path / 'out', 'train')
    assert frames.shape == (14, 3, 16, 16) and actions.shape == (14, 1) and rows.tolist() == [0, 7, 14]
    assert 'pendulum' in error('data.py', 'pong')


def test_a_policy_of_ones_own_acts_in_a_world(tmp_path):
    (tmp_path / 'mine.py').write_text('def upwards(world, rng):\n    return [0, -world.pos[1] / 10]\n')
    command = ['data.py', 'wall', f'--out={tmp_path / "out"}', '--episodes=2', '--workers=0']
    inline(*command, f'--policy={tmp_path / "mine.py"}:upwards')
    actions = load_split(tmp_path / 'out', 'train')[1]
    assert (actions[:, 0] == 0).all() and (actions[:, 1] < 0).all()
    assert 'no function sideways' in error(*command, f'--policy={tmp_path / "mine.py"}:sideways')


@pytest.mark.parametrize('by', [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_that_is_killed_goes_on_to_the_same_bytes(by, latent_wall, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    said = inline(*latent_wall, f'--out={whole}', '--workers=0')
    assert 'episode_007.pth' in said and '1 broken' in said
    job = subprocess.Popen([sys.executable, *latent_wall, f'--out={killed}', '--workers=1'], cwd=ROOT,
                           stderr=subprocess.PIPE, text=True)

    def parts():
        partial = f'{killed}.partial'
        return [name for name in os.listdir(partial) if name.endswith('.npz')] if os.path.isdir(partial) else []

    while job.poll() is None and len(parts()) < 3:
        time.sleep(0.002)
    job.send_signal(by)
    _, last_words = job.communicate(timeout=60)
    assert 3 <= len(parts()) < 38 and not os.path.exists(killed)
    if by == signal.SIGINT:
        assert last_words.splitlines()[-1].startswith('interrupted; the same command goes on from')
    # two processes go on, with another share each
    run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *latent_wall, f'--out={killed}')
    assert contents(whole) == contents(killed)


def test_a_kill_while_the_parts_are_joined_loses_nothing(latent_wall, tmp_path, monkeypatch):
    inline(*latent_wall, f'--out={tmp_path / "whole"}', '--workers=0')

    def die(*_):
        raise OSError('no space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, 'write_array_header_1_0', die)
        with pytest.raises(OSError, match='no space left'):
            inline(*latent_wall, f'--out={tmp_path / "killed"}', '--workers=0')
    inline(*latent_wall, f'--out={tmp_path / "killed"}', '--workers=0')
    assert contents(tmp_path / 'whole') == contents(tmp_path / 'killed')


@pytest.mark.parametrize('changed', ['--seed=1', '--val_frames=8'])
def test_a_preparation_goes_on_with_the_same_settings_only(changed, latent_wall, tmp_path):
    (tmp_path / 'out.partial').mkdir()
    (tmp_path / 'out.partial' / 'begun.json').write_text('{"seed": 0, "val_frames": 9}')
    assert changed.strip('-').split('=')[0] in error(*latent_wall, f'--out={tmp_path / "out"}', changed)


def test_the_second_of_two_preparations_at_once_is_refused(latent_wall, tmp_path):
    (tmp_path / 'out.partial').mkdir()
    with open(tmp_path / 'out.partial' / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'being prepared by another process' in error(*latent_wall, f'--out={tmp_path / "out"}')


def test_validation_of_latents_is_cut_to_stretches_with_their_pixels(latent_wall, tmp_path):
    inline(*latent_wall, f'--out={tmp_path / "out"}', '--workers=0')
    frames, actions, rows = load_split(tmp_path / 'out', 'val')
    pixels = np.load(tmp_path / 'out' / 'val' / 'pixels.npy')
    assert frames.shape == (27, 4, 4, 4) and frames.dtype == np.float16
    assert pixels.shape == (27, 3, 32, 32) and pixels.dtype == np.uint8
    assert rows.tolist() == [0, 9, 18, 27] and rows.dtype == np.int64
    frames, _, rows = load_split(tmp_path / 'out', 'train')
    assert set(np.diff(rows)) == {24} and len(frames) == rows[-1]


def test_means_and_deviations_of_actions_are_those_of_training(latent_wall, tmp_path):
    inline(*latent_wall, f'--out={tmp_path / "out"}', '--workers=0', '--latents=False')
    actions = load_split(tmp_path / 'out', 'train')[1].astype(np.float64)
    with open(tmp_path / 'out' / 'meta.json') as f:
        meta = json.load(f)
    assert np.allclose(meta['action_mean'], actions.mean(0)) and np.allclose(meta['action_std'], actions.std(0))
    assert list(meta['broken']) == [f'{tmp_path}/wall_single/obses/episode_007.pth']


@pytest.mark.parametrize('latents', [True, False])
def test_frames_need_not_be_square_from_their_files_to_the_scores(latents, tmp_path, monkeypatch):
    KINDS['dino_wall'][0](str(tmp_path / 'raw'))
    monkeypatch.setenv('VAE_MODEL_PATH', tiny_vae(tmp_path / 'vae'))
    inline('data.py', 'dino_wall', f'--root={tmp_path / "raw"}', f'--out={tmp_path / "out"}', f'--latents={latents}',
           '--image_size=16,32', '--workers=0', '--resize=pad')
    frames = load_split(tmp_path / 'out', 'train')[0]
    assert frames.shape[1:] == ((4, 2, 4) if latents else (3, 16, 32))
    run(*TRAIN, f'--dataset={tmp_path / "out"}', f'--out_dir={tmp_path / "run"}', '--max_steps=1', '--patch_size=2')
    with Image.open(tmp_path / 'run' / 'dream_0000001.png') as sheet:
        assert sheet.width == LABEL + 4 * (128 + GAP)  # each frame four times as large, and twice as wide as high
    run('evaluate.py', f'--ckpt={tmp_path / "run"}', '--num_clips=4', '--num_steps=1')
    assert np.isfinite(json.loads((tmp_path / 'run' / 'metrics.json').read_text())['means']['ssim'])
    run('sample.py', f'--ckpt={tmp_path / "run"}', '--num_clips=2', '--num_steps=1')
    # the same weights without what train.py says of them
    torch.save(read_checkpoint(str(tmp_path / 'run'))[0], tmp_path / 'bare.pt')
    size = '2,4' if latents else '16,32'
    run('sample.py', f'--ckpt={tmp_path / "bare.pt"}', f'--input_size={size}', f'--dataset={tmp_path / "out"}',
        '--pred_name=x', '--frame_interval=1', '--context_frames=1', '--num_clips=2', '--num_steps=1')
    with Image.open(tmp_path / 'rollout.gif') as gif, Image.open(tmp_path / 'run' / 'rollout.gif') as own:
        assert gif.size == own.size == (LABEL + 2 * (192 + GAP), 2 * (96 + 2 * GAP))
        assert gif.tobytes() == own.tobytes()


@pytest.mark.parametrize('text', ['7', 'big', '64,', '64,64,3', '-64', '6.4'])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match='image_size='):
        parse_size(text)


def test_a_few_episodes_keep_some_of_each_published_split(tmp_path):
    pytest.importorskip('av')
    KINDS['dino_pusht'][0](str(tmp_path / 'raw'))
    inline('data.py', 'dino_pusht', f'--root={tmp_path / "raw"}', f'--out={tmp_path / "out"}', '--latents=False',
           '--image_size=64', '--workers=0', '--episodes=2')
    assert [len(load_split(tmp_path / 'out', split)[0]) for split in ('train', 'val')] == [24, 22]


@pytest.mark.parametrize('arguments, line', [
    (['rt1'], 'set RT1_DATA_ROOT'),
    (['clips'], '--root=<folder>'),
    (['wall', '--image_size=16,24'], 'square'),
    (['clips', '--root=.', '--resize=fit'], "resize='fit': expected one of stretch, pad, crop"),
    (['wall', '--episodes=1'], 'at least one for training'),
    (['clips', '--root=.', '--image_size=60'], 'multiples of 8'),
    (['clips', '--root=.', '--vae=nowhere'], '; --latents=False keeps pixels'),
])
def test_what_cannot_be_prepared_is_refused_in_one_line(arguments, line, monkeypatch, tmp_path):
    monkeypatch.delenv('RT1_DATA_ROOT', raising=False)
    assert line in error('data.py', *arguments, f'--out={tmp_path / "out"}')
    assert not os.path.exists(tmp_path / 'out')


def test_what_encoding_costs_is_said_before_it_begins(latent_wall, tmp_path):
    said = inline(*latent_wall, f'--out={tmp_path / "out"}', '--workers=0')
    frames = 36 * 24 + 3 * 9  # of episodes of 24, and of three of them a stretch of 9 for validation
    assert re.search(rf'encoding about {frames} frames of 32x32 takes 0\.\d\d hours, at [\d.]+ a second', said)
    assert 'hours' not in inline(*latent_wall, f'--out={tmp_path / "pixels"}', '--workers=0', '--latents=False')
