"""Truths about sample.py: what is done at which frame, which actions are known, and what the pictures show."""
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import error, inline, run
from PIL import Image
from test_model import tiny

from checkpoint import read_checkpoint, save_checkpoint
from controls import KNOWN, beyond, legend
from data import Clips, action_range
from diffusion import Diffusion
from pictures import GAP, LABEL
from run import load_run
from sample import dream

RANGES = [[-1.0, -0.5, 0.5, 1.0], [0.0, 0.0, 2.0, 2.0]]


@pytest.fixture
def dreams(monkeypatch):
    """The actions [B,F,A] of every dream, and what was dreamed."""
    calls, sample = [], Diffusion.sample

    def spy(self, model, context, action, *args, **options):
        out = sample(self, model, context, action, *args, **options)
        calls.append((action, out))
        return out

    monkeypatch.setattr(Diffusion, 'sample', spy)
    return calls


def pixels(path, frame=0):
    with Image.open(path) as image:
        image.seek(frame)
        return np.asarray(image.convert('RGB'))


def test_right_and_wrong_actions_are_dreamed_from_the_same_noise():
    """Also from what eta draws on the way."""
    deaf, d = tiny(action_dim=0), Diffusion('v')
    frames = torch.rand(2, 4, 3, 8, 12)
    one, other = (dream(deaf, d, frames, None, 1, 3, seed=5, eta=1.0) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, dream(deaf, d, frames, None, 1, 3, seed=6, eta=1.0))


@pytest.mark.parametrize('context', [1, 3])
def test_own_actions_begin_where_the_dream_begins(context, trained, wall, tmp_path, dreams):
    own = np.random.default_rng(0).uniform(-0.1, 0.1, (5, 2)).astype(np.float32)
    np.save(tmp_path / 'own.npy', own)
    run('sample.py', f'--ckpt={trained}', f'--actions={tmp_path}/own.npy', f'--out={tmp_path}/a.gif', '--num_clips=2',
        f'--context_frames={context}')
    action, out = dreams[0]
    clips = Clips(wall, 'val', context)
    assert out.shape[:2] == (2, context + 5)  # a row of actions for each frame that is dreamed
    assert torch.equal(action[0, context - 1:-1], torch.from_numpy(own))
    assert torch.equal(action[:, :context - 1], clips.batch(clips.fixed(2, seed=0))[1][:, :-1])


def test_where_a_recording_ends_its_actions_begin_again(trained, wall, tmp_path, dreams):
    run('sample.py', f'--ckpt={trained}', f'--out={tmp_path}/a.gif', '--num_frames=130', '--num_clips=2')
    action, _ = dreams[0]
    recorded = Clips(wall, 'val', 60).batch([0])[1][0, :59]
    assert any(torch.equal(torch.cat([recorded] * 3)[:130], done) for done in action)
    truth = slice(0, 96), slice(LABEL, LABEL + 96)
    assert pixels(tmp_path / 'a.gif', 59)[truth].min() < 200
    assert (pixels(tmp_path / 'a.gif', 129)[truth] == 255).all()  # nobody knows it


def test_a_recording_of_one_frame_shortens_no_others_truth(trained, wall, tmp_path, dreams):
    root = shutil.copytree(wall, tmp_path / 'wall')
    *starts, end = np.load(root / 'val' / 'episodes.npy')
    np.save(root / 'val' / 'episodes.npy', np.array([*starts, end - 1, end]))
    run('sample.py', f'--ckpt={trained}', f'--dataset={root}', f'--out={tmp_path}/a.gif', '--num_frames=16')
    action, _ = dreams[0]
    assert len(action) == 6 and action[:, :15].std(dim=1).min() > 0
    assert (pixels(tmp_path / 'a.gif', 15)[:96, LABEL:LABEL + 96] < 200).any()


def test_several_dreams_of_one_start_differ_by_their_noise(trained, tmp_path, dreams):
    options = ['sample.py', f'--ckpt={trained}', '--num_clips=2', '--num_frames=4', f'--out={tmp_path}/a.png']
    run(*options)
    run(*options, '--samples=3')
    (_, alone), *several = dreams
    assert torch.equal(alone, several[0][1]) and len(several) == 3
    for first, second in ((0, 1), (1, 2)):
        (action, one), (same_action, other) = several[first], several[second]
        assert torch.equal(action, same_action) and torch.equal(one[:, 0], other[:, 0])
        assert not torch.equal(one[:, 1:], other[:, 1:])
    height, width, _ = pixels(tmp_path / 'a.png').shape
    strip = 64 + 2 * GAP
    assert (height, width) == (8 * strip + 2 * GAP, LABEL + 4 * (64 + GAP))  # two starts; truth and three dreams


def test_a_checkpoint_knows_how_far_its_actions_go(trained, wall, tmp_path):
    actions = Clips(wall, 'train', 1).actions
    known = load_run(trained, 'cpu')[2]['action_meta']
    assert known['what'] == 'wall' and known['action_range'] == action_range(actions)
    state, config, meta = read_checkpoint(trained)
    del meta['action_meta']  # as train.py once wrote it: the dataset tells
    save_checkpoint(f'{tmp_path}/old.safetensors', state, config, **meta)
    for ckpt in (trained, f'{tmp_path}/old.safetensors'):
        np.save(tmp_path / 'far.npy', np.tile([1, 0], (3, 1)))
        said = inline('sample.py', f'--ckpt={ckpt}', f'--actions={tmp_path}/far.npy', f'--out={tmp_path}/a.gif')
        assert 'actions[:, 0]: -0.14 to 0.14, 98 % of them -0.14 to 0.14; ArrowLeft -0.1; ArrowRight +0.1\n' in said
        assert 'far.npy: actions[:, 0] goes from 1 to 1, the data from -0.14 to 0.14; there' in said


RANGE = [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize('forged, line', [
    (dict(train=[]), 'not as train.py writes it'), (dict(train={}), 'not as train.py writes it'),
    (dict(action_scale=['a', 'b']), 'needs mean and std'),
    (dict(action_scale=[[0] * 3, [1] * 3]), 'actions have 2 numbers there, and 3'),
    (dict(action_meta=[1]), 'action_range of 2'), (dict(action_meta={'what': 'wall'}), 'action_range of 2'),
    (dict(action_meta={'action_range': RANGE[:1]}), 'action_range of 2'),
    (dict(action_meta={'action_range': RANGE, 'what': [1]}), 'action_range of 2'),
    (dict(action_meta={'action_range': RANGE, 'action_names': ['x']}), 'action_range of 2'),
    (dict(action_meta={'action_range': RANGE, 'controls': 'arrows'}), 'action_range of 2'),
    (dict(action_meta={'action_range': RANGE, 'controls': {'rest': [0, 0], 'keys': {'KeyW': [1]}}}),
     'action_range of 2')], ids=str)
def test_metadata_that_train_did_not_write_gets_one_line(forged, line, trained, tmp_path):
    state, config, meta = read_checkpoint(trained)
    save_checkpoint(f'{tmp_path}/forged.safetensors', state, config, **meta | forged)
    np.save(tmp_path / 'own.npy', np.zeros((3, 2)))
    assert line in error('sample.py', f'--ckpt={tmp_path}/forged.safetensors', f'--actions={tmp_path}/own.npy')


@pytest.mark.parametrize('content, line', [
    (None, 'a pipe or a device'), (np.zeros((3, 2), complex), 'it holds complex128'),
    (np.zeros((3, 2), 'M8[s]'), 'it holds datetime64[s]'), (np.full((3, 2), 'left'), 'it holds <U4'),
    (np.full((3, 2), np.nan), 'not finite'), (np.full((3, 2), 1e300), 'not finite'), (np.zeros(2), 'has shape [2]'),
    (np.zeros((0, 2)), 'has shape [0, 2]')], ids=str)
def test_own_actions_that_are_none_get_one_line(content, line, trained, tmp_path):
    if content is None:
        os.mkfifo(tmp_path / 'own.npy')
    else:
        np.save(tmp_path / 'own.npy', content)
    assert line in error('sample.py', f'--ckpt={trained}', f'--actions={tmp_path}/own.npy')


def test_what_leaves_the_range_is_named_in_one_line():
    about = {'action_range': RANGES}
    assert beyond(about, np.float32([[-1, 0], [1, 2]])) == ''
    assert beyond(about, np.float32([[0, 0], [0, 2.5]])) == 'actions[:, 1] goes from 0 to 2.5, the data from 0 to 2'
    many = beyond({'action_range': RANGES * 10}, np.full((2, 20), 9, np.float32))
    assert many.endswith('; and 18 more numbers of it') and '\n' not in many


def test_names_and_keys_of_the_numbers_are_told():
    assert legend({'action_range': RANGES, 'action_names': ['gas', 'brake']}) == [
        'actions[:, 0]: -1 to 1, 98 % of them -0.5 to 0.5; gas', 'actions[:, 1]: 0 to 2, 98 % of them 0 to 2; brake']
    lines = legend({'action_range': [[0, 0, 1, 1]] * 51, 'controls': KNOWN['csgo']})
    assert lines[0].endswith('; KeyW +1') and lines[5].endswith('; crouch +1') and len(lines) == 51
