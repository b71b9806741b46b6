"""A prepared dataset of random numbers, to try a config or to measure speed without data."""
import json
import os

import numpy as np

from configurator import UserError


def random_dataset(folder, frame_shape, action_dim, rows=256):
    """frame_shape (C,H,W): 3 channels make uint8 pixels, others normal latents. Returns the folder."""
    positive = [type(n) is int and n > 0 for n in frame_shape]
    if len(positive) != 3 or not all(positive) or action_dim < 0:
        raise UserError(f'frame_shape={frame_shape}, action_dim={action_dim}: expected '
                        '(channels, height, width), and 0 or more')
    rng = np.random.default_rng(0)
    shape = (rows, *frame_shape)
    if frame_shape[0] == 3:
        frames = rng.integers(256, size=shape, dtype=np.uint8)
    else:
        frames = rng.standard_normal(shape, np.float32).astype(np.float16)
    for split in ('train', 'val'):
        os.makedirs(f'{folder}/{split}')
        np.save(f'{folder}/{split}/frames.npy', frames)
        actions = rng.standard_normal((rows, action_dim), np.float32)
        np.save(f'{folder}/{split}/actions.npy', actions)
        np.save(f'{folder}/{split}/episodes.npy', np.array([0, rows]))
    with open(f'{folder}/meta.json', 'w') as f:
        json.dump({'action_mean': [0.0] * action_dim, 'action_std': [1.0] * action_dim}, f)
    return str(folder)
