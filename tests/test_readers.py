"""Truths about published datasets: what is prepared is what was published, whatever happens on the way."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, error, inline, run
from PIL import Image
from raw import KINDS, episodes, film, lerobot, save_pth, write_video

from data import Clips
from evaluate import psnr
from readers import load_frames, resize
from vae import VAE

for package in ('h5py', 'pyarrow', 'av'):
    pytest.importorskip(package)


def command(kind, root, out, size=64):
    return ['data.py', kind, f'--root={root}', f'--out={out}', '--latents=False', '--workers=0', f'--image_size={size}',
            *(['--name=mine'] if kind == 'clips' else [])]


def prepared(out):
    """[(frames, actions), ...] of both splits of a prepared folder, in no known order."""
    found = []
    for split in ('train', 'val'):
        frames, actions, spans = (np.load(f'{out}/{split}/{name}.npy') for name in ('frames', 'actions', 'episodes'))
        found += [(frames[a:b], actions[a:b]) for a, b in spans]
    return found


def assert_equal(out, truth, lossless, size):
    found = prepared(out)
    assert sorted(len(f) for f, _ in found) == sorted(len(f) for f, _ in truth)
    for frames, actions in truth:
        match = [f for f, a in found if a.shape == actions.shape and (a == actions.astype(np.float32)).all()]
        assert len(match) == 1
        want = torch.from_numpy(resize(frames, size)).float() / 255
        have = torch.from_numpy(match[0]).float() / 255
        assert torch.equal(want, have) if lossless else psnr(want, have).min() > 35


@pytest.mark.parametrize('kind', KINDS)
def test_prepared_frames_and_actions_are_those_of_the_source(kind, tmp_path):
    write, video, _ = KINDS[kind]
    truth = write(str(tmp_path / 'raw'))
    size = 160 if kind == 'rt1' else 64
    inline(*command(kind, tmp_path / 'raw', tmp_path / 'out', size))
    assert_equal(tmp_path / 'out', truth, lossless=not video, size=size)


@pytest.mark.parametrize('version', ['2.0', '3.0'])
def test_other_versions_of_lerobot_read_alike(version, tmp_path):
    truth = lerobot(str(tmp_path / 'raw'), version)
    inline('data.py', 'lerobot', f'--root={tmp_path / "raw"}', '--name=robot', f'--out={tmp_path / "out"}',
           '--latents=False', '--image_size=160', '--workers=0')
    assert_equal(tmp_path / 'out', truth, lossless=False, size=160)


def tiny_vae(folder):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    os.makedirs(folder)
    save_file(VAE((32, 32, 32, 32)).state_dict(), f'{folder}/diffusion_pytorch_model.safetensors')
    return str(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_each_run_goes_from_raw_files_to_a_rollout(kind, tmp_path, monkeypatch):
    write, _, config = KINDS[kind]
    write(str(tmp_path / 'raw'))
    monkeypatch.setenv('RESULTS_DIR', str(tmp_path))
    monkeypatch.setenv('VAE_MODEL_PATH', tiny_vae(tmp_path / 'vae'))
    name = 'mine' if kind == 'clips' else kind
    inline('data.py', kind, f'--root={tmp_path / "raw"}', '--image_size=64', f'--name={name}', '--val_clips=2',
           '--workers=0')
    small = ['--model_size=', '--hidden_size=32', '--depth=2', '--num_heads=2', '--compile=False', '--max_steps=20',
             '--num_val_clips=4', '--sample_steps=2', '--batch_size=2', '--device=cpu']
    inline('train.py', f'config/{config}.py', f'--dataset={tmp_path / "data" / name}', *small,
           f'--out_dir={tmp_path / "run"}')
    with open(tmp_path / 'run' / 'log.jsonl') as f:
        log = [json.loads(line) for line in f]
    assert all(np.isfinite(entry.get('loss', 0)) for entry in log) and log[-1]['step'] == 20
    assert os.path.exists(tmp_path / 'run' / 'dream_0000020.png')
    inline('sample.py', f'--ckpt={tmp_path / "run"}', '--num_clips=2', '--num_steps=1',
           f'--num_frames={18 if kind == "csgo" else 4}')
    assert os.path.getsize(tmp_path / 'run' / 'rollout.gif') > 1000
    if kind == 'rt1':
        inline('evaluate.py', f'--ckpt={tmp_path / "run"}', '--num_clips=4', '--num_steps=1')
        clips = Clips(tmp_path / 'data' / name, 'val', 4)
        numbers = clips.fixed(4)
        original = clips.pixels(numbers)
        assert clips.batch(numbers)[0].shape[2:] == (4, 8, 8) and original.shape[2:] == (3, 64, 64)
        copied = psnr(original[:, :1].float() / 255, original[:, 1:].float() / 255).mean()
        with open(tmp_path / 'run' / 'metrics.json') as f:
            means = json.load(f)['means']
        assert abs(means['copy_psnr'] - copied) < 1e-3  # against the original pixels, not the VAE's
        assert means.keys() == {f'{who}_{metric}' for who in ('copy', 'wrong', 'vae', 'gap')
                                for metric in ('psnr', 'ssim')} | {'psnr', 'ssim'} == {*log[-1]} - {'step'}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_kill_9_in_the_middle_of_a_conversion_and_going_on_gives_the_same_bytes(tmp_path, monkeypatch):
    save_pth(f'{tmp_path}/wall_single/actions.pth', torch.randn(60, 24, 2))
    for i in range(60):
        save_pth(f'{tmp_path}/wall_single/obses/episode_{i:03d}.pth', torch.from_numpy(film(24, seed=i)))
    (tmp_path / 'wall_single' / 'obses' / 'episode_007.pth').write_bytes(b'not a tensor')
    monkeypatch.setenv('VAE_MODEL_PATH', tiny_vae(tmp_path / 'vae'))
    go = ['data.py', 'dino_wall', f'--root={tmp_path}', '--image_size=32', '--val_clips=3', '--val_frames=9']
    assert 'skipped' in inline(*go, f'--out={tmp_path / "whole"}')
    killed = tmp_path / 'killed'
    job = subprocess.Popen([sys.executable, *go, f'--out={killed}'], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal = f'{killed}.partial/journal.0'
    while job.poll() is None and not (os.path.exists(journal) and os.path.getsize(journal) > 60):
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    with open(journal) as f:
        done = f.read().count('null')
    assert 0 < done < 59 and not os.path.exists(killed)
    assert 'other settings' in error(*go, f'--out={killed}', '--seed=1')
    # two processes go on, with another share each
    out = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *go, f'--out={killed}')
    assert 'episode_007.pth' in out and '1 broken' in out
    assert contents(tmp_path / 'whole') == contents(killed)
    clips = Clips(killed, 'val', 4, frame_interval=2)
    assert len(clips.stretches) == 3 and clips.pixels(clips.fixed(5)).shape == (5, 4, 3, 32, 32)


def test_the_published_csgo_split_and_starts_are_used(tmp_path):
    KINDS['csgo'][0](str(tmp_path / 'raw'))
    (tmp_path / 'train.txt').write_text('1-200/hdf5_dm_july2021_200.hdf5\nhdf5_dm_july2021_199.hdf5\n')
    (tmp_path / 'val.txt').write_text('hdf5_dm_july2021_201\n')
    np.save(tmp_path / 'starts.npy', np.array([5]))
    inline(*command('csgo', tmp_path / 'raw', tmp_path / 'out'), f'--train_list={tmp_path / "train.txt"}',
           f'--val_list={tmp_path / "val.txt"}', f'--val_starts={tmp_path / "starts.npy"}')
    clips = Clips(tmp_path / 'out', 'val', 16)
    assert clips.fixed(10).tolist() == [5] and len(Clips(tmp_path / 'out', 'train', 16)) == 15 + 16


def test_strange_pickles_are_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    KINDS['dino_pusht'][0](str(tmp_path / 'raw'))
    lengths = tmp_path / 'raw' / 'pusht_noise' / 'train' / 'seq_lengths.pkl'
    for value in (Bomb(), [1, Bomb()]):
        lengths.write_bytes(pickle.dumps(value))
        assert 'only lists, numbers and arrays are read' in error(*command('dino_pusht', tmp_path / 'raw',
                                                                           tmp_path / 'out'))
    lengths.write_bytes(pickle.dumps([np.int64(24), 20]))
    torch.save(Bomb(), tmp_path / 'raw' / 'pusht_noise' / 'train' / 'rel_actions.pth')
    assert 'rel_actions.pth' in error(*command('dino_pusht', tmp_path / 'raw', tmp_path / 'out'))
    assert not os.path.exists(tmp_path / 'ran')


def test_a_folder_of_the_wrong_kind_says_what_was_looked_for(tmp_path, monkeypatch):
    (tmp_path / 'holiday.jpg').write_bytes(b'')
    for kind, wanted in (('rt1', 'meta/info.json'), ('csgo', 'hdf5_dm_july2021_'), ('dino_rope', 'actions.pth'),
                         ('dino_pusht', 'rel_actions.pth'), ('clips', '.mp4')):
        line = error(*command(kind, tmp_path, tmp_path / 'out'))
        assert wanted in line and str(tmp_path) in line
    monkeypatch.delenv('RT1_DATA_ROOT', raising=False)
    assert 'set RT1_DATA_ROOT' in error('data.py', 'rt1')
    assert '--name' in error('data.py', 'clips', f'--root={tmp_path}')
    shutil.copytree(os.path.join(ROOT, 'tests/golden/lerobot/lerobot_v21'), tmp_path / 'robot')
    assert '--image_key' in error(*command('lerobot', tmp_path / 'robot', tmp_path / 'out'), '--name=x',
                                  '--image_key=wrist')
    monkeypatch.setenv('VAE_MODEL_PATH', str(tmp_path / 'nowhere'))
    line = error('data.py', 'rt1', f'--root={tmp_path / "robot"}', f'--out={tmp_path / "out"}')
    assert 'nowhere' in line and '--latents=False' in line
    assert not os.path.exists(tmp_path / 'out') and not os.path.exists(f'{tmp_path / "out"}.partial')


def test_own_recordings_with_a_fault_are_named(tmp_path):
    root = tmp_path / 'raw'
    root.mkdir()
    for i, (frames, actions) in enumerate(episodes([9, 9, 9], 2)):
        np.save(root / f'{i}.npy', frames)
        np.savetxt(root / f'{i}.csv', actions, delimiter=',')
    np.savetxt(root / '1.csv', np.zeros((4, 2)), delimiter=',')
    assert '1.npy: ValueError: 9 frames, but 4 actions in 1.csv' in inline(*command('clips', root, tmp_path / 'out'))
    assert len(prepared(tmp_path / 'out')) == 2
    os.remove(root / '2.csv')
    assert '2.npy has no actions beside it' in error(*command('clips', root, tmp_path / 'again'))


def test_what_a_telephone_held_upright_records_stands_upright(tmp_path):
    ffmpeg = pytest.importorskip('imageio_ffmpeg').get_ffmpeg_exe()
    picture = film(4, 32, 48)
    write_video(flat := tmp_path / 'flat.mp4', picture)
    for turn in ('90', '180', '270'):
        path = str(tmp_path / f'{turn}.mp4')
        subprocess.run([ffmpeg, '-v', 'error', '-display_rotation', turn, '-i', flat, '-c', 'copy', path], check=True)
        upright = np.stack(list(iio.imiter(path, plugin='FFMPEG')))  # it turns by itself
        want, have = (torch.from_numpy(f).movedim(3, 1) / 255 for f in (upright, load_frames(path)))
        assert psnr(want, have).min() > 35
    image, exif = Image.fromarray(picture[0]), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / '0.png', exif=exif)
    assert (load_frames(str(tmp_path))[0] == np.rot90(picture[0], -1)).all()


def test_damage_that_would_go_unseen_is_seen(tmp_path):
    root, names = tmp_path / 'raw', 'abcdefg'
    root.mkdir()
    truth = dict(zip(names, episodes([20] * len(names), 2), strict=True))
    for name, (frames, actions) in truth.items():
        np.save(root / f'{name}.npy', frames)
        np.savetxt(root / f'{name}.csv', actions, delimiter=',')
    np.save(root / 'a.npy', truth['a'][0].transpose(0, 3, 1, 2))  # channels first
    np.save(root / 'b.npy', truth['b'][0] / 255)  # floats
    os.remove(root / 'c.npy')
    write_video(str(root / 'c.mkv'), truth['c'][0])
    whole = (root / 'c.mkv').read_bytes()
    (root / 'c.mkv').write_bytes(whole[:len(whole) * 2 // 3])  # cut short
    (root / 'd.csv').write_bytes(b'\xef\xbb\xbf' + (root / 'd.csv').read_bytes())  # a spreadsheet's mark, not a header
    (root / 'e.csv').write_text('a0,a1\n' + (root / 'e.csv').read_text())
    (root / 'f.npy').write_bytes(b'')
    (root / '._g.npy').write_bytes(b'\x80')
    said = inline(*command('clips', root, tmp_path / 'out'), '--val_share=0.4')
    assert [n for n in names if f'{n}.npy: ' in said or f'{n}.mkv: ' in said] == ['a', 'b', 'c', 'f']
    assert_equal(tmp_path / 'out', [truth[n] for n in 'deg'], lossless=True, size=64)


def test_a_few_episodes_keep_some_of_each_published_split(tmp_path):
    KINDS['dino_pusht'][0](str(tmp_path / 'raw'))
    inline(*command('dino_pusht', tmp_path / 'raw', tmp_path / 'out'), '--episodes=1')
    assert sorted(len(f) for f, _ in prepared(tmp_path / 'out')) == [22, 24]
