"""What people see: dreams as videos and contact sheets, numbers as curves."""
import functools
import io
import math

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configurator import extra
from machine import write_whole

RED, GREY, DARK = (230, 60, 50), (160, 160, 160), (40, 40, 40)
LABEL, GAP, BAR = 72, 4, 4  # pixels: of a row's label, between frames, below each frame
DASHES = ('solid', 'dashed', 'dotted', 'dashdot')
say_once = functools.cache(print)


def to_pixels(frames, vae=None):
    """Frames [...,C,H,W] in [-1, 1], or latents with their VAE -> uint8 [...,H,W,3] on the CPU."""
    if vae:
        frames = vae.decode(frames)
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(-3, -1).cpu().numpy()


def strip(label, frames, num_given, min_size):
    """A labelled row of frames uint8 [n,h,w,3], enlarged to at least min_size, without smoothing.

    Of a row named dream, dream 1, dream 2, ... those that are not given have a red bar.
    """
    scale = math.ceil(min_size / min(frames.shape[1:3]))
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = frames.shape
    row = Image.new('RGB', (LABEL + n * (w + GAP), h + BAR + GAP), 'white')
    font = ImageFont.load_default(14)
    ImageDraw.Draw(row).text((4, h / 2), label, fill=DARK, font=font, anchor='lm')
    row = np.array(row)
    for i, frame in enumerate(frames):
        left = LABEL + i * (w + GAP)
        dreamed = label.startswith('dream') and i >= num_given
        row[:h, left:left + w] = frame
        row[h:h + BAR, left:left + w] = RED if dreamed else GREY
    return row


def side_by_side(rows, num_context, min_size=96):
    """Video uint8 [T,H',W',3] of {label: uint8 [B,T,h,w,3]}: a row each, a column for each clip."""
    num_clips, num_frames = next(iter(rows.values())).shape[:2]
    video = []
    for t in range(num_frames):
        given = num_clips if t < num_context else 0
        strips = [strip(label, clips[:, t], given, min_size) for label, clips in rows.items()]
        video.append(np.concatenate(strips))
    return np.stack(video)


def contact_sheet(rows, num_context, min_size=64):
    """Picture uint8 [H',W',3] of {label: uint8 [B,T,h,w,3]}: clip by clip, a strip of frames each."""
    num_clips = len(next(iter(rows.values())))
    strips = []
    for i in range(num_clips):
        strips += [strip(label, clips[i], num_context, min_size) for label, clips in rows.items()]
        strips.append(np.full_like(strips[-1][:2 * GAP], 255))  # some air between clips
    return np.concatenate(strips[:-1])


def write_picture(path, picture):
    """Write uint8 [H,W,3] as PNG."""
    write_whole(path, iio.imwrite('<bytes>', picture, extension='.png'))


def gif_bytes(video, milliseconds):
    """uint8 [T,H,W,3] as the bytes of a looping GIF. No viewer shows more than 50 frames a second."""
    return iio.imwrite('<bytes>', video, extension='.gif', duration=max(20, milliseconds), loop=0)


def write_video(path, video, fps):
    """Write uint8 [T,H,W,3] as a looping GIF, or as MP4 if the name says so. Raises UserError."""
    if not path.endswith('.mp4'):
        write_whole(path, gif_bytes(video, 1000 / fps))
        return
    extra('imageio_ffmpeg')
    height, width = video.shape[1:3]
    video = video[:, :height // 2 * 2, :width // 2 * 2]  # H.264 wants even sides
    iio.imwrite(path, video, fps=fps, codec='libx264', plugin='FFMPEG', macro_block_size=1)


def plot(path, panels, xlabel='', log_ticks=False):
    """Draw curves to a PNG; where matplotlib is missing, say so and go on.

    panels: {title: {label: {x: a number, or a pair of a mean and its +-}}}, one below the other.
    Where x are names, points are side by side. A label that is a pair (target, solver) has its
    colour by the first and its dash by the second.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say_once(f'no {path}: plots need matplotlib: pip install matplotlib')
        return
    figure = Figure(figsize=(8, 3.8 * len(panels)), layout='constrained')
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        ticks = list(next(iter(curves.values())))
        draw(ax, curves, ticks)
        if log_ticks:
            ax.set_xscale('log')
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()
        ax.set(title=title, xlabel=xlabel)
        ax.grid(axis='y', alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    write_whole(path, png.getvalue())


def draw(ax, curves, ticks):
    colours, dashes = {}, {}  # of each name seen so far
    named = isinstance(ticks[0], str)
    if named:
        ax.set_xticks(range(len(ticks)), [tick.replace('_', '\n') for tick in ticks])
    else:
        ax.xaxis.get_major_locator().set_params(integer=True)
    for i, (label, points) in enumerate(curves.items()):
        names = label if isinstance(label, tuple) else (label,)
        colour = colours.setdefault(names[0], f'C{len(colours)}')
        dash = dashes.setdefault(names[1:], DASHES[len(dashes) % len(DASHES)])
        x = list(points)
        if named:  # side by side, so that no error bar hides another
            x = np.arange(len(ticks)) + 0.1 * (i - (len(curves) - 1) / 2)
            dash = 'none'
        values = np.array(list(points.values()), dtype=float)  # what nobody knows, None, is a gap
        values = values.reshape(len(points), -1)
        mean, error = values[:, 0], values[:, 1:].sum(axis=1)  # without an error its bar is 0 high
        ax.errorbar(x, mean, error, color=colour, linestyle=dash, marker='o', markersize=4,
                    label=', '.join(names))
