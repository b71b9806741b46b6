"""Plays in Chromium: makes docs/play_wide.png, play_narrow.png, play_dark.png and play.gif, and says how fast it was.

    pip install playwright && apt-get install chromium
    PYTHONPATH=. python docs/playing.py --ckpt=out/wall
    PYTHONPATH=. python docs/playing.py --ckpt=out/pusht_tiny --pictures=False
"""
import io
import os
import shutil
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import play as play_module
import run
from configurator import configure
from machine import autocast, name_of, seconds
from play import Server

OUT = os.path.dirname(os.path.abspath(__file__))


def open_page(chromium, server, width=1100, height=860, scheme='light'):
    """The page, which waits, and the session that it plays."""
    page = chromium.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
    page.goto(server.url)
    while not page.evaluate('about !== null && lastAge >= 0'):
        page.wait_for_timeout(50)
    page.evaluate('paused = true')
    return page, server.sessions[page.evaluate('about.dream')]


def play(page, session, num_frames):
    """Hold what the world's own explorer would, frame by frame; yields after each."""
    page.evaluate('restart("/truth")')
    rng = np.random.default_rng(0)
    for _ in range(num_frames):
        action = session.world.explore(rng)
        for key, change in session.world.KEYS.items():
            wanted = np.dot(action, change) > 0.3 * np.dot(change, change)
            held = page.evaluate(f'held.includes("{key}")')
            if wanted and not held:
                page.keyboard.down(key)
            elif held and not wanted:
                page.keyboard.up(key)
        page.evaluate('command(step)')
        yield


def small(pictures):
    """PNGs in 64 colours of the last one's, which a GIF stores well."""
    pictures = [Image.open(io.BytesIO(png)).convert('RGB') for png in pictures]
    palette = pictures[-1].quantize(64)
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


def make_pictures(chromium, server):
    for name, width, scheme in (('wide', 1100, 'light'), ('narrow', 390, 'light'), ('dark', 1100, 'dark')):
        page, session = open_page(chromium, server, width, 780 if width < 400 else 860, scheme)
        for _ in play(page, session, 14):
            pass
        page.screenshot(path=f'{OUT}/play_{name}.png')
        page.close()
    page, session = open_page(chromium, server, 640, 560)
    film = small([page.screenshot() for _ in play(page, session, frames)])
    film[0].save(f'{OUT}/play.gif', save_all=True, append_images=film[1:], duration=1000 / fps, loop=0)
    page.close()


def rate_of_page(server, truth):
    """Frames a second that a player sees without a limit, in a browser that nothing else listens to."""
    page = Path(play_module.__file__).with_name('play.html').read_text()
    page = page.replace('<option selected>10', '<option>10').replace('<option value="0"', '<option value="0" selected')
    if not truth:
        page = page.replace('id="show-truth" checked', 'id="show-truth"')
    server.page = page.encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen([shutil.which('chromium'), '--headless', '--no-sandbox', '--window-size=1100,860',
                                    f'--user-data-dir={profile}', '--remote-debugging-port=0', server.url],
                                   stderr=subprocess.DEVNULL)
        while not server.sessions:
            time.sleep(0.1)
        (name, session), = server.sessions.items()
        time.sleep(3)
        begun, first = time.perf_counter(), session.dream.age
        time.sleep(duration)
        rate = (session.dream.age - first) / (time.perf_counter() - begun)
        browser.terminate()
        browser.wait()
    server.sessions.pop(name, None)
    return rate


def rate_of_sample(opened):
    """Frames a second of Diffusion.sample, after a window that is full: bench.py's one_frame."""
    config = opened.model.config
    past = opened.sampler['history'] or config.num_frames - 1
    context = torch.randn(1, past, config.in_channels, *config.input_size, device=opened.device)
    action = torch.randn(1, past + 1, config.action_dim, device=opened.device)
    frame = partial(opened.diffusion.sample, opened.model, context, action, past + 1, opened.num_steps,
                    **opened.sampler)
    with autocast(opened.device, opened.dtype):
        frame()
        begun, times = time.perf_counter(), []
        while time.perf_counter() - begun < duration:
            times.append(seconds(frame, opened.device))
    return 1 / np.median(times)


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    pictures = True  # make them
    frames = 60  # of the GIF [>= 1]
    fps = 8.0  # of the GIF [> 0]
    duration = 5  # seconds that each rate is measured for [>= 1]
    rounds = 5  # of measuring [>= 1]
    # --------------------------------------------------------------------------
    opened = run.open_run(configure(globals(), shared=run))
    server = Server('127.0.0.1', 0, opened)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which('chromium'))
        if pictures:
            make_pictures(chromium, server)
            print(f'{OUT}/play.gif: {os.path.getsize(f"{OUT}/play.gif") / 1e6:.2f} MB')
        chromium.close()
    server.sessions.clear()
    rates = {
        'Diffusion.sample': partial(rate_of_sample, opened),
        'the page, dream alone': partial(rate_of_page, server, truth=False),
        'the page, beside truth': partial(rate_of_page, server, truth=True)}
    measured = {label: [] for label in rates}
    for _ in range(rounds):  # in turn, because a machine's speed changes
        for label, rate in rates.items():
            measured[label].append(rate())
    print(f'{opened.ckpt} on {name_of(opened.device)}, frames a second, median of {rounds}')
    for label, figures in measured.items():
        print(f'    {label:24} {np.median(figures):8.1f}', flush=True)
    os._exit(0)
