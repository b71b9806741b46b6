"""Truths about readers: what is prepared is what was published, and no file of a stranger does more than be read."""
import json
import os
import pickle
import shutil
import subprocess
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import error, inline
from PIL import Image
from raw import KINDS, episodes, film, lerobot, load_split, tiny_vae, write_video

from configurator import UserError
from metrics import psnr
from readers import fill, list_episodes
from recordings import Episode, read_actions, read_episode, read_frames, resize

for package in ('h5py', 'pyarrow', 'av'):
    pytest.importorskip(package)


def command(kind, root, out, size=64):
    name = ['--name=mine'] if kind in ('clips', 'lerobot') else []
    return ['data.py', kind, f'--root={root}', f'--out={out}', '--latents=False', '--workers=0',
            f'--image_size={size}', *name]


def open_lerobot(root, image_key='observation.images.image'):
    return list_episodes(dict(what='lerobot', root=str(root), episodes=0, image_key=image_key))


def assert_prepared(out, truth, lossless, size):
    """Both splits together hold these (frames, actions), in any order."""
    found = []
    for split in ('train', 'val'):
        frames, actions, rows = load_split(out, split)
        found += zip(np.split(frames, rows[1:-1]), np.split(actions, rows[1:-1]), strict=True)
    assert sorted(len(f) for f, _ in found) == sorted(len(f) for f, _ in truth)
    for frames, actions in truth:
        match = [f for f, a in found if a.shape == actions.shape and (a == actions.astype(np.float32)).all()]
        assert len(match) == 1
        want = torch.from_numpy(np.stack([resize(frame, (size, size)) for frame in frames])).float() / 255
        have = torch.from_numpy(match[0]).float() / 255
        if lossless:
            assert torch.equal(want, have)
        else:
            assert psnr(want, have).min() > 35


@pytest.mark.parametrize('kind', KINDS)
def test_prepared_frames_and_actions_are_those_of_the_source(kind, tmp_path):
    write, video, _ = KINDS[kind]
    truth = write(str(tmp_path / 'raw'))
    size = 160 if kind == 'rt1' else 64
    inline(*command(kind, tmp_path / 'raw', tmp_path / 'out', size))
    assert_prepared(tmp_path / 'out', truth, lossless=not video, size=size)


@pytest.mark.parametrize('version', ['2.0', '3.0'])
def test_other_versions_of_lerobot_read_alike(version, tmp_path):
    truth = lerobot(str(tmp_path / 'raw'), version)
    inline(*command('lerobot', tmp_path / 'raw', tmp_path / 'out', 160))
    assert_prepared(tmp_path / 'out', truth, lossless=False, size=160)


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


def test_the_published_csgo_split_and_starts_are_used(tmp_path):
    truth = KINDS['csgo'][0](str(tmp_path / 'raw'))
    (tmp_path / 'train.txt').write_text('1-200/hdf5_dm_july2021_200.hdf5\nhdf5_dm_july2021_199.hdf5\n')
    (tmp_path / 'val.txt').write_text('hdf5_dm_july2021_201\n')
    np.save(tmp_path / 'starts.npy', np.array([5]))
    inline(*command('csgo', tmp_path / 'raw', tmp_path / 'out'), f'--train_list={tmp_path / "train.txt"}',
           f'--val_list={tmp_path / "val.txt"}', f'--val_starts={tmp_path / "starts.npy"}')
    assert load_split(tmp_path / 'out', 'train')[2].tolist() == [0, 30, 61]
    assert (load_split(tmp_path / 'out', 'val')[1] == truth[2][1][5:]).all()  # validation begins where it says
    with open(tmp_path / 'out' / 'meta.json') as f:
        assert json.load(f)['fixed_starts']


# -----------------------------------------------------------------------------
# what strangers' files must not do

class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ['BOMB'], 'ran'),)


@pytest.mark.parametrize('name', ['seq_lengths.pkl', 'rel_actions.pth'])
def test_strange_pickles_are_refused_and_never_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path))
    KINDS['dino_pusht'][0](str(tmp_path / 'raw'))
    path = tmp_path / 'raw' / 'pusht_noise' / 'train' / name
    if name.endswith('.pkl'):
        path.write_bytes(pickle.dumps([1, Bomb()]))
    else:
        torch.save(Bomb(), path)
    assert name in error(*command('dino_pusht', tmp_path / 'raw', tmp_path / 'out'))
    assert not os.path.exists(tmp_path / 'ran')


@pytest.fixture
def robot(tmp_path):
    """A LeRobot folder, and a secret beside it."""
    lerobot(str(tmp_path / 'raw'), '2.1')
    shutil.copy(tmp_path / 'raw/data/chunk-000/episode_000001.parquet', tmp_path / 'secret.parquet')
    return tmp_path / 'raw'


def change(robot, **values):
    info = robot / 'meta' / 'info.json'
    info.write_text(json.dumps(json.loads(info.read_text()) | values))


def why_broken(episode):
    return read_episode(episode, (64, 64))[2]


def test_a_path_that_leads_out_of_the_folder_is_refused(robot):
    change(robot, data_path='../secret.parquet')
    assert 'leads out of the folder' in why_broken(open_lerobot(robot)[1])


def test_a_link_that_leads_out_of_the_folder_is_refused(robot):
    path = robot / 'data/chunk-000/episode_000001.parquet'
    path.unlink()
    path.symlink_to(robot.parent / 'secret.parquet')
    assert 'leads out of the folder' in why_broken(open_lerobot(robot)[1])


def test_a_pipe_is_not_waited_for(robot):
    path = robot / 'data/chunk-000/episode_000001.parquet'
    path.unlink()
    os.mkfifo(path)
    assert 'a pipe or a device' in why_broken(open_lerobot(robot)[1])


@pytest.mark.parametrize('field', ['{i:2000000000d}', '{i.__class__}', '{i!r:>999999999}', '{'])
def test_a_template_can_ask_for_a_number_of_a_few_digits_only(field):
    assert fill(f'{{i:03d}}/{field}', dict(i=3), 'data') == f'003/{field}'


@pytest.mark.parametrize('values, line', [
    (dict(features={}), 'its cameras are none'),
    (dict(chunks_size=0), 'ZeroDivisionError'),
    (dict(chunks_size='1000'), 'TypeError'),
    (dict(data_path='data/{episode}.parquet'), "KeyError: 'episode'"),
    (dict(data_path='data/{video_key:06d}'), 'ValueError'),
])
def test_metadata_that_is_wrong_is_one_line(values, line, robot, tmp_path):
    change(robot, **values)
    assert line in error(*command('lerobot', robot, tmp_path / 'out'))


def test_a_camera_that_is_not_there_is_named_with_those_that_are(robot, tmp_path):
    line = error(*command('lerobot', robot, tmp_path / 'out'), '--image_key=wrist')
    assert 'wrist' in line and 'observation.images.image' in line and '--image_key=' in line


@pytest.mark.parametrize('length', [-14, 13, 15])
def test_a_length_that_the_table_does_not_have_is_seen(length, robot):
    path = robot / 'meta' / 'episodes.jsonl'
    path.write_text(path.read_text().replace('"length": 14', f'"length": {length}'))
    assert f'expected {length}' in why_broken(open_lerobot(robot)[1])


def test_an_episode_that_is_listed_twice_is_seen(robot, tmp_path):
    path = robot / 'meta' / 'episodes.jsonl'
    path.write_text(path.read_text() + path.read_text().splitlines()[1])
    assert 'episode 1 is listed more than once' in error(*command('lerobot', robot, tmp_path / 'out'))


def test_rows_in_another_order_are_seen(robot):
    import pyarrow.parquet as parquet
    path = robot / 'data/chunk-000/episode_000001.parquet'
    table = parquet.read_table(path)
    parquet.write_table(table.take(list(range(len(table)))[::-1]), path)
    assert 'not in the order of frames' in why_broken(open_lerobot(robot)[1])


def test_a_video_that_is_a_list_of_other_files_is_not_followed(robot):
    folder = robot / 'videos/chunk-000/observation.images.image'
    (folder / 'secret.txt').symlink_to(shutil.copy(folder / 'episode_000000.mp4', robot.parent / 'secret.mp4'))
    (folder / 'episode_000001.mp4').write_text('ffconcat version 1.0\nfile secret.txt\n')
    assert 'episode_000001.mp4' in why_broken(open_lerobot(robot)[1])


def open_csgo(root, **settings):
    empty = dict(what='csgo', root=str(root), episodes=0, train_list='', val_list='', val_starts='')
    return list_episodes(empty | settings)


@pytest.mark.parametrize('kind', ['external', 'link', 'pipe', 'huge'])
def test_hdf5_reads_no_other_file_and_no_endless_zeros(kind, tmp_path):
    import h5py
    KINDS['csgo'][0](str(tmp_path / 'raw'))
    secret = tmp_path / 'secret'
    secret.write_bytes(b'secret' * 1000)
    path = tmp_path / 'raw' / '1-200' / 'hdf5_dm_july2021_199.hdf5'
    with h5py.File(path, 'a') as f:
        del f['frame_3_y']
        if kind == 'external':
            f.create_dataset('frame_3_y', (51,), 'f8', external=[(str(secret), 0, 408)])
        elif kind == 'link':
            f['frame_3_y'] = h5py.ExternalLink('hdf5_dm_july2021_200.hdf5', 'frame_3_y')
        elif kind == 'pipe':  # who opens it waits for a writer
            os.mkfifo(tmp_path / 'pipe')
            f['frame_3_y'] = h5py.ExternalLink(str(tmp_path / 'pipe'), 'frame_3_y')
        else:
            f.create_dataset('frame_3_y', (2 ** 40,), 'f8', chunks=(51,))
    assert 'frame_3_y' in why_broken(open_csgo(tmp_path / 'raw')[0])


def test_a_frame_that_is_missing_in_the_middle_is_seen(tmp_path):
    import h5py
    KINDS['csgo'][0](str(tmp_path / 'raw'))
    with h5py.File(tmp_path / 'raw' / '1-200' / 'hdf5_dm_july2021_199.hdf5', 'a') as f:
        del f['frame_7_x']
    assert 'frame_7_x' in why_broken(open_csgo(tmp_path / 'raw')[0])


@pytest.mark.parametrize('starts', [[np.nan], [-5], [1.5], [1, 2], ['a']], ids=str)
def test_starts_that_are_none_are_refused(starts, tmp_path):
    KINDS['csgo'][0](str(tmp_path / 'raw'))
    (tmp_path / 'val.txt').write_text('hdf5_dm_july2021_201')
    np.save(tmp_path / 'starts.npy', starts)
    with pytest.raises(UserError, match='not as csgo has it'):
        open_csgo(tmp_path / 'raw', val_list=str(tmp_path / 'val.txt'), val_starts=str(tmp_path / 'starts.npy'))


@pytest.mark.parametrize('lengths', [[-3, 20, 24], [22, 20, 99], [22, 20, np.nan], [22.5, 20, 24], [22, 20]], ids=str)
def test_lengths_that_the_actions_do_not_have_are_refused(lengths, tmp_path):
    KINDS['dino_point_maze'][0](str(tmp_path / 'raw'))
    torch.save(torch.tensor(lengths), tmp_path / 'raw' / 'point_maze' / 'seq_lengths.pth')
    assert 'not as dino_point_maze has it' in error(*command('dino_point_maze', tmp_path / 'raw', tmp_path / 'out'))


@pytest.mark.parametrize('least, greatest', [(0, 1), (0, 400), (-50, 150), (np.nan, np.nan)])
def test_pixels_that_would_wrap_round_are_seen(least, greatest, tmp_path):
    KINDS['dino_rope'][0](str(tmp_path / 'raw'))
    torch.save(torch.linspace(least, greatest, 12 * 8 * 8 * 3).reshape(12, 8, 8, 3),
               tmp_path / 'raw/deformable/rope/000000/obses.pth')
    episodes = list_episodes(dict(what='dino_rope', root=str(tmp_path / 'raw'), episodes=0))
    assert 'expected 0 to 255' in why_broken(episodes[0])


# -----------------------------------------------------------------------------
# folders and recordings with a fault

@pytest.mark.parametrize('kind, wanted', [
    ('rt1', 'meta/info.json'), ('csgo', 'hdf5_dm_july2021_'), ('dino_rope', 'actions.pth'),
    ('dino_pusht', 'rel_actions.pth'), ('clips', '.mp4')])
def test_a_folder_of_the_wrong_kind_says_what_was_looked_for(kind, wanted, tmp_path):
    (tmp_path / 'holiday.jpg').write_bytes(b'')
    line = error(*command(kind, tmp_path, tmp_path / 'out'))
    assert wanted in line and str(tmp_path) in line
    assert not os.path.exists(f'{tmp_path / "out"}.partial')


def recordings(root, names, length=20):
    """Clips as arrays, with their actions; {name: (frames, actions)}."""
    root.mkdir()
    truth = dict(zip(names, episodes([length] * len(names), 2), strict=True))
    for name, (frames, actions) in truth.items():
        np.save(root / f'{name}.npy', frames)
        np.savetxt(root / f'{name}.csv', actions, delimiter=',')
    return truth


def test_a_recording_without_actions_is_named(tmp_path):
    recordings(tmp_path / 'raw', 'abc')
    os.remove(tmp_path / 'raw' / 'b.csv')
    assert 'b.npy has no actions beside it' in error(*command('clips', tmp_path / 'raw', tmp_path / 'out'))


def test_two_recordings_of_one_name_are_refused(tmp_path):
    recordings(tmp_path / 'raw', 'abc')
    for ending in ('mp4', 'gif'):
        (tmp_path / 'raw' / f'b.{ending}').write_bytes(b'')
    assert 'are two recordings of one name' in error(*command('clips', tmp_path / 'raw', tmp_path / 'out'))


def test_actions_may_lie_in_any_order_of_memory(tmp_path):
    truth = recordings(tmp_path / 'raw', 'abc')
    for name, (frames, actions) in truth.items():
        os.remove(tmp_path / 'raw' / f'{name}.csv')
        (tmp_path / 'raw' / name).mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / 'raw' / name / f'{i}.png')
        np.save(tmp_path / 'raw' / f'{name}.npy', np.asfortranarray(actions))
    inline(*command('clips', tmp_path / 'raw', tmp_path / 'out'))
    written = np.concatenate([np.load(tmp_path / 'out' / split / 'actions.npy') for split in ('train', 'val')])
    assert len(written) == 60
    for _, actions in truth.values():
        assert any(np.allclose(actions, written[i:i + 20]) for i in (0, 20, 40))


@pytest.mark.parametrize('name', ['b.csv', 'b.npy', 'c.mp4', 'd/1.png'])
def test_a_pipe_among_recordings_is_not_waited_for(name, tmp_path):
    recordings(tmp_path / 'raw', 'abc')
    (tmp_path / 'raw' / 'd').mkdir()
    (tmp_path / 'raw' / 'd.csv').write_text('1,2')
    (tmp_path / 'raw' / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / 'raw' / name)
    episodes = list_episodes(dict(what='clips', root=str(tmp_path / 'raw'), episodes=0))
    assert [why for why in map(why_broken, episodes) if 'a pipe or a device' in why]


@pytest.mark.parametrize('actions', [np.zeros((9, 2), complex), np.zeros((9, 2), 'M8[s]'), np.full((9, 2), '1'),
                                     np.float32(3), np.full((9, 2), 1e300)], ids=lambda actions: actions.dtype.str)
def test_actions_that_are_no_numbers_are_seen(actions, tmp_path):
    (tmp_path / 'raw').mkdir()
    write_video(str(tmp_path / 'raw' / 'a.mp4'), film(9))
    np.save(tmp_path / 'raw' / 'a.npy', actions)
    assert why_broken(list_episodes(dict(what='clips', root=str(tmp_path / 'raw'), episodes=0))[0])


def write_actions(actions, path):
    np.savetxt(path.with_suffix('.csv'), actions, delimiter=',')


def cut_short(path):
    frames = np.load(path)
    path.unlink()
    write_video(str(path.with_suffix('.mkv')), frames)
    whole = path.with_suffix('.mkv').read_bytes()
    path.with_suffix('.mkv').write_bytes(whole[:len(whole) * 2 // 3])


DAMAGE = {
    'channels first': lambda path: np.save(path, np.load(path).transpose(0, 3, 1, 2)),
    'floats': lambda path: np.save(path, np.load(path) / 255),
    'empty': lambda path: path.write_bytes(b''),
    'one number more': partial(write_actions, np.zeros((20, 3))),
    'few actions': partial(write_actions, np.zeros((4, 2))),
    'not finite': partial(write_actions, np.full((20, 2), np.nan)),
    'cut short': cut_short,
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_that_would_go_unseen_is_seen(damage, tmp_path):
    truth = recordings(tmp_path / 'raw', 'abcd')
    DAMAGE[damage](tmp_path / 'raw' / 'b.npy')
    said = inline(*command('clips', tmp_path / 'raw', tmp_path / 'out'), '--val_share=0.4')
    assert 'skipped' in said and f'{tmp_path / "raw"}/b.' in said
    assert_prepared(tmp_path / 'out', [truth[name] for name in 'acd'], lossless=True, size=64)


def test_actions_may_have_a_line_of_names_or_a_spreadsheets_mark(tmp_path):
    plain = tmp_path / 'plain.csv'
    plain.write_text('1,2\n3,4\n')
    (tmp_path / 'names.csv').write_text('a0,a1\n1,2\n3,4\n')
    (tmp_path / 'mark.csv').write_bytes(b'\xef\xbb\xbf' + plain.read_bytes())
    for name in ('plain', 'names', 'mark'):
        assert read_actions(str(tmp_path / f'{name}.csv')).tolist() == [[1, 2], [3, 4]]


def test_a_first_row_of_another_length_is_not_taken_for_names(tmp_path):
    (tmp_path / 'ragged.csv').write_text('1,2,3\n1,2\n3,4\n')
    with pytest.raises(ValueError):
        read_actions(str(tmp_path / 'ragged.csv'))


def test_a_picture_of_another_shape_is_stretched_padded_or_cropped():
    frame = np.zeros((20, 40, 3), np.uint8) + np.uint8([10, 20, 30])
    frame[:, 20:] = 200
    for how, columns in (('stretch', [10, 200]), ('crop', [10, 200]), ('pad', [10, 200])):
        small = resize(frame, (16, 16), how)
        assert small.shape == (3, 16, 16) and small[0, 8, [0, 15]].tolist() == columns, how
    assert (resize(frame, (16, 16))[0, :, 0] == 10).all()
    padded = resize(frame, (16, 16), 'pad')[0]
    assert (padded[:4] == 0).all() and (padded[4:12] > 0).all() and (padded[12:] == 0).all()  # twice as wide as high
    frame[:, :10] = frame[:, 30:] = 255
    assert (resize(frame, (16, 16), 'crop') < 255).all()  # what was left and right of the middle is gone
    for shape, size in (((7, 300), (16, 8)), ((300, 7), (8, 16)), ((1, 1000), (8, 8))):
        for how in ('stretch', 'pad', 'crop'):
            assert resize(np.full((*shape, 3), 9, np.uint8), size, how).shape == (3, *size)


@pytest.mark.parametrize('turn', ['90', '180', '270'])
def test_a_video_of_a_telephone_held_upright_stands_upright(turn, tmp_path):
    ffmpeg = pytest.importorskip('imageio_ffmpeg').get_ffmpeg_exe()
    flat, turned = str(tmp_path / 'flat.mp4'), str(tmp_path / 'turned.mp4')
    write_video(flat, film(4, 32, 48))
    subprocess.run([ffmpeg, '-v', 'error', '-display_rotation', turn, '-i', flat, '-c', 'copy', turned], check=True)
    upright = np.stack(list(iio.imiter(turned, plugin='FFMPEG')))  # it turns by itself
    want, have = (torch.from_numpy(f).movedim(3, 1) / 255 for f in (upright, np.stack(list(read_frames(turned)))))
    assert psnr(want, have).min() > 35


def test_a_picture_of_a_telephone_held_upright_stands_upright(tmp_path):
    picture, exif = film(1, 32, 48)[0], Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(picture).save(tmp_path / '0.png', exif=exif)
    assert (next(read_frames(str(tmp_path))) == np.rot90(picture, -1)).all()


def test_frames_are_made_small_as_they_are_decoded():
    """A minute of 1080p is 11 GB as decoded; at most one frame is held before it is resized."""
    alive = []

    class Frame(np.ndarray):
        def __del__(self):
            alive.pop()

    def frames():
        for _ in range(10):
            frame = np.zeros((64, 64, 3), np.uint8).view(Frame)
            alive.append(1)
            assert len(alive) <= 2
            yield frame

    pixels, _, error = read_episode(Episode('film', lambda: (frames(), np.zeros((10, 1)))), (8, 8))
    assert not error and pixels.shape == (10, 3, 8, 8)


