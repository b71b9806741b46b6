"""Draw docs/frames_by_noise.png: which frame is how noisy, in training and while dreaming.

    pip install matplotlib && python docs/frames_by_noise.py

Every cell is one frame as the model is shown it. The colour around it is its noise level, on one scale for both halves.
"""
import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

plt.switch_backend('Agg')

HERE = os.path.dirname(os.path.abspath(__file__))
FRAMES, STEPS, LAST = 4, 2, 999  # frames of a clip, denoising steps a frame, the timestep of pure noise
ALMOST_CLEAN = 20  # how known frames are shown: 2 % of the way to noise
COLOURS = plt.get_cmap('Blues')
PICTURE = 0.7  # side of a picture, of a cell's
rng = np.random.default_rng(5)


def scene(frame, clip):
    """A red disc on its way past a wall, [48,48,3] in [0, 1]: one picture of a clip."""
    x, y = np.meshgrid(np.linspace(0, 1, 48), np.linspace(0, 1, 48))
    door = (0.5, 0.35, 0.65, 0.45, 0.6, 0.4, 0.5)[clip]
    picture = np.full((48, 48, 3), 0.93)
    picture[(abs(x - 0.5) < 0.05) & (abs(y - door) > 0.19)] = 0.25, 0.3, 0.38
    along = frame / (FRAMES - 1)
    if clip % 2:
        along = 1 - along
    at_x, at_y = 0.16 + 0.68 * along, door + 0.06 * np.sin(6 * along + clip)
    picture[np.hypot(x - at_x, y - at_y) < 0.12] = 0.87, 0.2, 0.18
    return picture


def noised(picture, t):
    """alpha * picture + sigma * noise, on the cosine schedule."""
    angle = np.pi / 2 * t / LAST
    x = np.cos(angle) * (2 * picture - 1) + np.sin(angle) * rng.standard_normal(picture.shape)
    return np.clip((x + 1) / 2, 0, 1)


def cell(ax, row, frame, picture, t, text, pale=False):
    """A frame on the colour of its noise level, with a line of text below."""
    colour, ink, strength = COLOURS(t / LAST), 'black', 1
    if t > LAST / 2:
        ink = 'white'
    if pale:
        ink, strength = 'dimgrey', 0.2
    ax.add_patch(Rectangle((frame - 0.47, row - 0.47), 0.94, 0.94, color=colour, alpha=strength, lw=0))
    left, top = frame - PICTURE / 2, row - 0.41
    ax.imshow(noised(picture, t), extent=(left, left + PICTURE, top + PICTURE, top), alpha=strength, zorder=2)
    ax.text(frame, row + 0.38, text, ha='center', va='center', fontsize=11, color=ink)


def panel(ax, title, rows, row_names):
    ax.set_xlim(-0.55, FRAMES - 0.45)
    ax.set_ylim(rows - 0.45, -0.95)
    ax.set_xticks([])
    ax.set_yticks(range(rows), row_names, fontsize=12)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=15, loc='left', pad=8)
    for frame in range(FRAMES):
        ax.text(frame, -0.62, f'frame {frame}', ha='center', fontsize=12)
    for frame in range(FRAMES - 1):
        ax.add_patch(FancyArrowPatch((frame + 0.32, -0.68), (frame + 0.68, -0.68), arrowstyle='->', mutation_scale=14))
        ax.text(frame + 0.5, -0.8, f'action {frame}', ha='center', fontsize=10)


grid = np.linspace(-1, LAST, STEPS + 1).astype(int)[::-1]  # a frame's timesteps, from noise to clean (-1)
calls = STEPS * (FRAMES - 1)
rows = calls + 1
figure, (training, rollout) = plt.subplots(1, 2, figsize=(12.6, 12), layout='constrained')

panel(training, 'Training: all frames of a clip at once', rows, [f'clip {i + 1}' for i in range(rows)])
levels = rng.integers(0, LAST + 1, size=(rows, FRAMES))
levels[0] = 30, 90, 960, 520
levels[3] = 10, 40, 60, 985
for row in range(rows):
    for frame in range(FRAMES):
        t = levels[row, frame]
        cell(training, row, frame, scene(frame, row), t, f't = {t}')
training.set_xlabel('Every frame of every clip gets its own noise level, at random.\n'
                    'The model cleans all frames; each sees itself and the past.\n'
                    'Clip 4 happens to look just like step 5 of a dream.', fontsize=12, labelpad=12)

panel(rollout, 'Dreaming: one frame after the other', rows, [f'step {i + 1}' for i in range(calls)] + ['the dream'])
for row in range(rows):
    for frame in range(FRAMES):
        step = min(max(row - STEPS * (frame - 1), 0), STEPS)
        t = max(grid[step], 0)
        if frame == 0:
            t = ALMOST_CLEAN
        waits = row < STEPS * (frame - 1)
        text = 'waits' if waits else f't = {t}'
        if row == calls:
            t = 0
            text = 'given' if frame == 0 else 'dreamed'
        cell(rollout, row, frame, scene(frame, 0), t, text, pale=waits)
for row in range(calls):
    frame = 1 + row // STEPS
    rollout.add_patch(Rectangle((frame - 0.47, row - 0.47), 0.94, 0.94, fill=False, ec='crimson', lw=3, zorder=3))
    rollout.add_patch(FancyArrowPatch((frame + 0.41, row + 0.3), (frame + 0.41, row + 0.72), arrowstyle='-|>',
                                      mutation_scale=18, color='crimson', lw=3, zorder=4))
rollout.set_xlabel(f'Frame 0 is given. The next starts as pure noise, and {STEPS} steps\n'
                   '(red) clean it: it sees the past and the action that leads to it.\n'
                   'Then it belongs to the past, and the next frame starts.', fontsize=12, labelpad=12)

scale = plt.cm.ScalarMappable(plt.Normalize(0, LAST), COLOURS)
bar = figure.colorbar(scale, ax=[training, rollout], location='bottom', shrink=0.5, aspect=40, pad=0.02)
bar.set_ticks([0, 250, 500, 750, LAST])
bar.set_label('noise level t of a frame: 0 is almost clean, 999 is nothing but noise', fontsize=12)
figure.savefig(os.path.join(HERE, 'frames_by_noise.png'), dpi=80)
