"""Truths about pictures: pixels stay pixels, bars mark what is dreamed, and plots are an extra."""
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from pictures import BAR, GAP, GREY, LABEL, RED, contact_sheet, plot, side_by_side, to_pixels, write_video

FRAMES = np.random.default_rng(0).integers(256, size=(2, 3, 5, 7, 3), dtype=np.uint8)  # not square
ROWS = {'truth': FRAMES, 'dream': 255 - FRAMES}


def test_minus_one_is_black_and_one_is_white_and_what_lies_beyond_is_cut():
    frames = torch.tensor([-3.0, -1, 0, 1, 3])[:, None, None, None].expand(5, 3, 2, 4)
    pixels = to_pixels(frames)
    assert pixels.shape == (5, 2, 4, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_frames_are_enlarged_without_smoothing():
    video = side_by_side(ROWS, num_context=1, min_size=10)
    enlarged = FRAMES[:, 2].repeat(2, axis=1).repeat(2, axis=2)
    for i, left in enumerate((LABEL, LABEL + 14 + GAP)):
        assert np.array_equal(video[2, :10, left:left + 14], enlarged[i])


def test_in_a_video_only_dreamed_frames_carry_a_red_bar():
    video = side_by_side(ROWS, num_context=1, min_size=5)
    under_truth, under_dream = 5, 5 + BAR + GAP + 5
    assert [tuple(c) for c in video[:, under_truth, LABEL]] == [GREY, GREY, GREY]
    assert [tuple(c) for c in video[:, under_dream, LABEL]] == [GREY, RED, RED]


def test_on_a_contact_sheet_only_dreamed_frames_carry_a_red_bar():
    sheet = contact_sheet(ROWS, num_context=2, min_size=5)
    under_dream = 5 + BAR + GAP + 5
    colours = [tuple(sheet[under_dream, LABEL + i * (7 + GAP)]) for i in range(3)]
    assert colours == [GREY, GREY, RED]


@pytest.mark.parametrize('name', ['a.gif', 'a.mp4'])
def test_a_video_has_every_frame(name, tmp_path):
    if name.endswith('.mp4'):
        pytest.importorskip('imageio_ffmpeg')
    video = np.stack([np.full((33, 35, 3), level, np.uint8) for level in (0, 100, 250)])  # odd sides
    write_video(str(tmp_path / name), video, fps=4)
    seen = iio.imread(tmp_path / name)
    assert [abs(int(frame[9, 9, 0]) - level) < 9 for frame, level in zip(seen, (0, 100, 250), strict=True)]


def test_curves_points_and_error_bars_are_drawn(tmp_path):
    pytest.importorskip('matplotlib')
    lines = {('x', 'ddim'): {1: 1, 2: 2, 250: 3}, ('x', 'dpmpp'): {1: (1, 0.1), 2: (2, 0.1), 250: (3, 0.2)}}
    plot(str(tmp_path / 'lines.png'), {'PSNR, dB': lines, 'SSIM': lines}, 'steps', log_ticks=True)
    plot(str(tmp_path / 'points.png'), {'PSNR, dB': {'dream': {'adaln': (1, 0.2), 'film': (2, 0)}}})
    plot(str(tmp_path / 'gap.png'), {'IoU': {'block': {1: 0.5, 2: None}, 'never seen': {1: None, 2: None}}})
    plot(str(tmp_path / 'own.png'), {'loss': {'training': {10: 3, 20: 2}, 'held-out clips': {20: 2}}})
    assert {path.name for path in tmp_path.iterdir()} == {'lines.png', 'points.png', 'gap.png', 'own.png'}


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    for _ in range(2):
        plot(str(tmp_path / 'a.png'), {'loss': {'training': {0: 1, 1: 2}}})
    assert capsys.readouterr().out.count('pip install matplotlib') == 1
    assert not list(tmp_path.iterdir())
