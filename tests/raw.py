"""Small datasets in the published formats, written by each format's own library; and a tiny VAE to encode them."""
import csv
import json
import os
import pickle
import shutil

import imageio.v3 as iio
import numpy as np
import torch
from safetensors.torch import save_file

from vae import VAE

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'golden', 'lerobot')


def film(length, height=64, width=64, seed=0):
    """Smooth moving colours, uint8 [T,H,W,3]: something a video codec can keep."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, 3), rng.uniform(0.1, 0.3, 3)
    y, x = np.mgrid[:height, :width] / 40
    t = np.arange(length)[:, None, None, None]
    wave = np.sin(x[..., None] + phase + speed * t) * np.cos(y[..., None] - phase)
    return np.uint8(127 + 100 * wave)


def episodes(lengths, action_dim, **size):
    rng = np.random.default_rng(len(lengths))
    return [(film(n, seed=i, **size), rng.normal(size=(n, action_dim)).astype(np.float32))
            for i, n in enumerate(lengths)]


def load_split(out, split):
    """(frames, actions, rows at which episodes begin and the last one ends) of a prepared dataset."""
    return [np.load(f'{out}/{split}/{name}.npy') for name in ('frames', 'actions', 'episodes')]


def tiny_vae(folder):
    torch.manual_seed(0)
    os.makedirs(folder)
    save_file(VAE((32, 32, 32, 32)).state_dict(), f'{folder}/diffusion_pytorch_model.safetensors')
    return str(folder)


def write_video(path, frames, codec='libx264'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with iio.imopen(path, 'w', plugin='pyav') as f:
        f.write(frames, codec=codec, fps=10)


def lerobot(root, version):
    """The official writer's samples; v2.0 is v2.1 with one statistics file for all episodes."""
    shutil.copytree(os.path.join(GOLDEN, 'lerobot_v30' if version == '3.0' else 'lerobot_v21'), root)
    truth = np.load(f'{root}/truth.npz')
    if version == '2.0':
        with open(f'{root}/meta/info.json') as f:
            info = json.load(f) | {'codebase_version': 'v2.0'}
        with open(f'{root}/meta/info.json', 'w') as f:
            json.dump(info, f)
        os.remove(f'{root}/meta/episodes_stats.jsonl')
        with open(f'{root}/meta/stats.json', 'w') as f:
            json.dump({'action': {'mean': [0.0] * 7, 'std': [1.0] * 7}}, f)
    cuts = np.cumsum(truth['lengths'])[:-1]
    return list(zip(np.split(truth['frames'], cuts), np.split(truth['actions'], cuts), strict=True))


def csgo(root):
    import h5py
    truth = episodes([30, 31, 32], 51)
    for i, (frames, actions) in enumerate(truth, start=199):  # across two folders, and 200 sorts after 199 and not 20
        folder = f'{root}/{"1-200" if i <= 200 else "201-400"}'
        os.makedirs(folder, exist_ok=True)
        with h5py.File(f'{folder}/hdf5_dm_july2021_{i}.hdf5', 'w') as f:
            for j, (x, y) in enumerate(zip(frames, actions, strict=True)):
                f[f'frame_{j}_x'], f[f'frame_{j}_y'] = x[..., ::-1], y.astype(np.float64)
    return truth


def save_pth(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(value, path)


def padded(actions, T):
    return torch.stack([torch.from_numpy(np.pad(a, ((0, T - len(a)), (0, 0)))) for a in actions])


def point_maze(root):
    truth, root = episodes([22, 20, 24], 2), f'{root}/point_maze'
    save_pth(f'{root}/states.pth', torch.zeros(3, 24, 4))
    save_pth(f'{root}/actions.pth', padded([a for _, a in truth], 24))
    save_pth(f'{root}/seq_lengths.pth', torch.tensor([len(a) for _, a in truth]))
    for i, (frames, _) in enumerate(truth):
        save_pth(f'{root}/obses/episode_{i:03d}.pth', torch.from_numpy(frames))
    return truth


def wall(root):
    truth, root = episodes([21, 21, 21], 2), f'{root}/wall_single'
    save_pth(f'{root}/actions.pth', torch.stack([torch.from_numpy(a) for _, a in truth]))
    for i, (frames, _) in enumerate(truth):
        save_pth(f'{root}/obses/episode_{i:03d}.pth', frames)  # a numpy array inside
    return truth


def pusht(root):
    truth, root = episodes([24, 20, 22], 2), f'{root}/pusht_noise'
    for split, part in (('train', truth[:2]), ('val', truth[2:])):
        save_pth(f'{root}/{split}/rel_actions.pth', padded([a * 100 for _, a in part], 24))
        with open(f'{root}/{split}/seq_lengths.pkl', 'wb') as f:
            pickle.dump([len(a) for _, a in part], f)
        for i, (frames, _) in enumerate(part):
            write_video(f'{root}/{split}/obses/episode_{i:03d}.mp4', frames)
    return [(frames, np.float32(a * 100) / 100) for frames, a in truth]


def deformable(root, name):
    truth, root = episodes([12, 12, 12], 4), f'{root}/deformable/{name}'
    save_pth(f'{root}/actions.pth', torch.stack([torch.from_numpy(a) for _, a in truth]))
    for i, (frames, _) in enumerate(truth):
        save_pth(f'{root}/{i:06d}/obses.pth', torch.from_numpy(frames).float() if name == 'rope' else frames)
    return truth


def clips(root):
    """One of each way to bring a recording: video, GIF, array and folder of images; .csv and .npy actions."""
    os.makedirs(root)
    truth = episodes([12, 11, 10, 12], 3)
    palette = np.uint8(truth[1][0] // 86 * 86)  # few enough colours for a GIF
    truth[1] = palette, truth[1][1]
    write_video(f'{root}/run1.mp4', truth[0][0])
    iio.imwrite(f'{root}/run2.gif', palette)
    np.save(f'{root}/run3.npy', truth[2][0])
    os.makedirs(f'{root}/run10')
    for j, image in enumerate(truth[3][0]):
        iio.imwrite(f'{root}/run10/{j}.png', image)
    for name, actions in (('run1', truth[0][1]), ('run3', truth[2][1])):
        with open(f'{root}/{name}.csv', 'w', newline='') as f:
            csv.writer(f).writerows([['x', 'y', 'z'], *[[repr(float(v)) for v in row] for row in actions]])
    np.save(f'{root}/run2.npy', truth[1][1])
    np.save(f'{root}/run10.npy', truth[3][1][:-1])  # nothing done at the last frame
    truth[3][1][-1] = truth[3][1][-2]
    return truth


KINDS = {  # name on the command line -> (writer, video codec in the way, config of its run)
    'rt1': (lambda root: lerobot(root, '2.1'), True, 'rt1_b2'),
    'csgo': (csgo, False, 'csgo_l2'),
    'dino_point_maze': (point_maze, False, 'dino_point_maze_b2'),
    'dino_wall': (wall, False, 'dino_wall_b2'),
    'dino_pusht': (pusht, True, 'dino_pusht_b2'),
    'dino_rope': (lambda root: deformable(root, 'rope'), False, 'dino_rope_b2'),
    'dino_granular': (lambda root: deformable(root, 'granular'), False, 'dino_granular_b2'),
    'clips': (clips, True, 'rt1_b2'),
}
