"""Truths about clips: what is cut out of the arrays is what was put in."""
import json
import os

import numpy as np
import pytest
import torch

from configurator import UserError
from data import Clips, to_model
from random_data import random_dataset


def test_clips_are_cut_from_one_episode_with_their_own_actions(wall):
    clips = Clips(wall, 'train', num_frames=3, frame_interval=2)
    assert len(clips) == 18 * (60 - 4) and clips.action_dim == 4
    frames, action = clips.batch(np.arange(len(clips)))
    for i in (0, 55, 56, len(clips) - 1):
        first = i // 56 * 60 + i % 56
        assert (frames[i].numpy() == clips.frames[[first, first + 2, first + 4]]).all()
        assert (action[i, 0].numpy() == clips.actions[first:first + 2].reshape(-1)).all()
        assert (action[i, 1].numpy() == clips.actions[first + 2:first + 4].reshape(-1)).all()
    x = to_model(frames)
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1


def test_normalised_actions_have_no_mean_and_unit_variance(wall):
    clips = Clips(wall, 'train', 4, normalize=True)
    _, action = clips.batch(np.arange(len(clips)))
    assert action.mean((0, 1)).abs().max() < 0.1 and (action.std((0, 1)) - 1).abs().max() < 0.1


def test_an_action_that_never_changes_is_left_alone(wall):
    _, action = Clips(wall, 'train', 4, normalize=([0.5, 0.0], [0.0, 1.0])).batch([3])
    raw = Clips(wall, 'train', 4).batch([3])[1]
    assert torch.allclose(action, raw - torch.tensor([0.5, 0.0]))


def test_fixed_validation_clips_are_fixed(wall):
    clips = Clips(wall, 'val', 4)
    assert (clips.fixed(16) == Clips(wall, 'val', 4).fixed(16)).all() and len(set(clips.fixed(16))) == 16
    assert len(clips.fixed(10 ** 6)) == len(clips)


def test_latents_and_their_pixels_share_rows(tmp_path):
    root = random_dataset(tmp_path / 'latents', (4, 2, 3), action_dim=2, rows=20)
    pixels = np.arange(20 * 3 * 16 * 24, dtype=np.uint32).astype(np.uint8).reshape(20, 3, 16, 24)
    np.save(f'{root}/val/pixels.npy', pixels)
    clips = Clips(root, 'val', 3, frame_interval=2)
    assert (clips.pixels([5])[0].numpy() == pixels[[5, 7, 9]]).all()


def test_published_starts_are_where_episodes_begin(tmp_path):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    np.save(f'{root}/val/episodes.npy', np.array([0, 12, 14, 20]))
    with open(f'{root}/meta.json', 'w') as f:
        json.dump({'fixed_starts': True}, f)
    clips = Clips(root, 'val', 4)
    assert sorted(clips.first_rows(clips.fixed(9))[0]) == [0, 14]  # two frames are too few for a clip


def test_random_data_looks_like_real_data(tmp_path):
    for channels, dtype in ((3, torch.uint8), (4, torch.float16)):
        root = random_dataset(tmp_path / str(channels), (channels, 8, 16), action_dim=2)
        frames, action = Clips(root, 'train', 3, normalize=True).batch([0, 63])
        assert frames.dtype == dtype and frames.shape == (2, 3, channels, 8, 16) and action.shape == (2, 3, 2)


def test_a_missing_dataset_names_the_command_that_makes_it():
    with pytest.raises(UserError, match='no prepared dataset at nowhere/wall/train.*python data.py wall'):
        Clips('nowhere/wall', 'train', 4)


def test_episodes_that_are_too_short_say_so(wall):
    with pytest.raises(UserError, match='no episode has 121 frames'):
        Clips(wall, 'train', num_frames=5, frame_interval=30)


@pytest.mark.parametrize('dtype', [np.float64, np.int64, np.float16])
def test_actions_may_be_of_any_type_of_number(tmp_path, dtype):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    actions = np.arange(40).reshape(20, 2).astype(dtype)
    np.save(f'{root}/train/actions.npy', actions)
    action = Clips(root, 'train', 2).batch([3])[1]
    assert action.dtype == torch.float32 and action.tolist() == [actions[3:5].tolist()]


def hide(root):
    os.remove(f'{root}/train/frames.npy')
    os.mkfifo(f'{root}/train/frames.npy')  # to read it would take for ever


def pack(root):
    with open(f'{root}/train/frames.npy', 'wb') as f:
        np.savez(f, frames=np.zeros((20, 3, 8, 8), np.uint8))


def empty(root):
    open(f'{root}/train/actions.npy', 'w').close()


def shrink_to_nothing(root):
    with open(f'{root}/train/frames.npy', 'wb') as f:
        header = dict(descr='|u1', fortran_order=False, shape=(-20, 3, 8, 8))
        np.lib.format.write_array_header_1_0(f, header)


def enlarge(root):
    np.save(f'{root}/val/frames.npy', np.zeros((20, 3, 16, 16), np.uint8))


def drop_a_number(root):
    np.save(f'{root}/train/actions.npy', np.full((20, 2), np.nan, np.float32))


def shorten_pixels(root):
    for split in ('train', 'val'):
        np.save(f'{root}/{split}/frames.npy', np.zeros((20, 4, 8, 8), np.float16))
    np.save(f'{root}/val/pixels.npy', np.zeros((19, 3, 64, 64), np.uint8))


def shrink_pixels(root):
    shorten_pixels(root)
    np.save(f'{root}/val/pixels.npy', np.zeros((20, 3, 48, 48), np.uint8))


@pytest.mark.parametrize('damage, line', [
    (hide, 'no file frames.npy'), (pack, 'no prepared dataset'), (empty, 'no prepared dataset'),
    (shrink_to_nothing, 'no prepared dataset'), (enlarge, 'not of the size of those for training'),
    (drop_a_number, 'actions.npy: some numbers are not finite'), (shorten_pixels, r'expected uint8 \[20, 3, 64, 64\]'),
    (shrink_pixels, r'expected uint8 \[20, 3, 64, 64\]')])
def test_damage_to_a_dataset_gets_one_line(damage, line, tmp_path):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    damage(root)
    with pytest.raises(UserError, match=line):
        for split in ('train', 'val'):
            clips = Clips(root, split, 2)
            clips.batch([0])
        clips.pixels([0])


def test_validation_names_a_training_split_that_is_broken(tmp_path):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    with open(f'{root}/train/frames.npy', 'wb') as f:
        f.write(b'junk')
    with pytest.raises(UserError, match='data/train is incomplete or broken'):
        Clips(root, 'val', 2)


@pytest.mark.parametrize('text', [
    '', '[]', 'null', '[' * 100_000, '{}', '{"action_mean": [0, 0]}', '{"action_mean": [0], "action_std": [1]}',
    '{"action_mean": "zero", "action_std": [1, 1]}', '{"action_mean": [0, 0], "action_std": [NaN, 1]}',
    '{"action_mean": [0, 0], "action_std": [-1, 1]}',
    '{"action_mean": [0, 0], "action_std": [Infinity, 1]}', '{"action_mean": [0, 0], "action_std": null}',
    '{"action_mean": [0, 0], "action_std": [1, 1], "what": [1]}'], ids=lambda text: text[:60])
def test_metadata_that_is_wrong_gets_one_line(text, tmp_path):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    (tmp_path / 'data' / 'meta.json').write_text(text)
    with pytest.raises(UserError):
        Clips(root, 'train', 2, normalize=True)


def test_actions_of_another_width_than_the_models_are_named(tmp_path):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    with pytest.raises(UserError, match='actions have 2 numbers there, and 3 where the model was trained'):
        Clips(root, 'val', 2, normalize=([0, 0, 0], [1, 1, 1]))


@pytest.mark.parametrize('name, array', [
    ('frames', np.zeros((20, 3, 8, 8), np.float32)), ('frames', np.zeros((20, 3, 8, 8), np.float16)),
    ('frames', np.zeros((20, 3, 8), np.uint8)),
    ('actions', np.full((20, 2), 'a')), ('actions', np.zeros((19, 2), np.float32)),
    ('frames', np.zeros((20, 3, 8, 0), np.uint8)), ('episodes', np.array([0, 15, 10, 20], np.uint64)),
    ('episodes', np.array([0.0, 20.0])),
    ('episodes', np.array([0, 30])), ('episodes', np.array([0, 15, 10, 20])), ('episodes', np.array([]))], ids=str)
def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path, name, array):
    root = random_dataset(tmp_path / 'data', (3, 8, 8), action_dim=2, rows=20)
    np.save(f'{root}/train/{name}.npy', array)
    with pytest.raises(UserError, match='expected frames uint8'):
        Clips(root, 'train', 2)
