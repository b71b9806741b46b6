"""Truths about playing: what the server answers and refuses, and, in a browser, what the page does."""
import builtins
import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, error, run
from PIL import Image
from test_dream import opened_run
from test_model import tiny

import controls
import envs
from diffusion import Diffusion
from play import HEAD, MAX_BODY, MAX_FRAMES, Server
from random_data import random_dataset
from run import OpenedRun
from session import MAX_FILM, Session, gif

SAMPLER = dict(schedule='sequential', stabilization=0.02, solver='ddim', eta=0.0, grid='linear', history=0, cache=True)


def open_tiny(dataset, context_frames=1, frame_interval=1, action_dim=2, input_size=(16, 16)):
    """An OpenedRun of a tiny model with random weights."""
    config = dict(dataset=dataset, frame_interval=frame_interval, action_scale=(0.0, 1.0))
    model = tiny(input_size=input_size, action_dim=action_dim * frame_interval, hidden_size=16)
    return OpenedRun('out/tiny', model, Diffusion('v'), config, None, 'cpu', 'fp32', dataset, context_frames, 1,
                     SAMPLER)


@contextmanager
def serving(opened, **options):
    server = Server('127.0.0.1', 0, opened, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05))
    thread.start()
    try:
        yield server
    finally:  # else a test that fails leaves a thread that never ends
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(wall):
    with serving(open_tiny(wall)) as server:
        yield server


def ask(server, path, body=b'', method='POST', **headers):
    """(status, headers, body) of the answer; keep_alive=connection asks over an open one."""
    headers = {'Content-Type': 'application/json', **{k.replace('_', '-'): v for k, v in headers.items()}}
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def begin(server):
    status, _, body = ask(server, '/new', {})
    assert status == 200, body
    return json.loads(body)


def step(server, dream, action=(0.1, 0.0), truth=True, **fields):
    return ask(server, '/step', {'dream': dream, 'action': list(action), 'truth': truth} | fields)


def age_of(answer):
    status, _, body = answer
    assert status == 200, body
    return HEAD.unpack_from(body)[0]


# -----------------------------------------------------------------------------
# what is played

def test_a_tab_gets_frame_after_frame(server):
    about = begin(server)
    assert (about['height'], about['width'], about['truth']) == (16, 16, True)
    answer = ask(server, '/start', {'dream': about['dream']})
    frames = answer[2][HEAD.size:]
    assert age_of(answer) == 0 and len(frames) == 2 * 3 * 16 * 16
    assert frames[:768] == frames[768:]  # the dream starts from the truth
    for age in range(1, 7):  # longer than the model's window
        _, _, body = answer = step(server, about['dream'])
        assert age_of(answer) == age and len(body) == HEAD.size + 2 * 3 * 16 * 16
        _, milliseconds, over = HEAD.unpack_from(body)
        assert milliseconds > 0 and not over
    assert len(step(server, about['dream'], truth=False)[2]) == HEAD.size + 3 * 16 * 16


def test_several_frames_of_one_request_are_those_of_as_many(wall):
    with serving(open_tiny(wall)) as server:
        one, other = (begin(server)['dream'] for _ in range(2))
        for session in server.sessions.values():  # alike
            session.dream.reset(np.zeros((1, 3, 16, 16), np.uint8), seed=0)
        size = HEAD.size + 3 * 16 * 16
        body = step(server, one, truth=False, frames=5)[2]
        assert len(body) == 5 * size
        for i in range(5):
            frame = body[i * size:][:size]
            assert HEAD.unpack_from(frame)[0] == i + 1
            assert frame[HEAD.size:] == step(server, other, truth=False)[2][HEAD.size:]


def test_an_action_counts_for_frames_that_were_asked_for_before(server):
    dream = begin(server)['dream']
    session = server.sessions[dream]
    done = []

    def move(action, show_truth):
        done.append(action)
        if len(done) == 1:
            assert ask(server, '/act', {'dream': dream, 'action': [0, 0.1]})[0] == 200
        return Session.step(session, action, show_truth)

    session.step = move
    assert step(server, dream, frames=3)[0] == 200
    assert done == [[0.1, 0.0], [0, 0.1], [0, 0.1]]


@pytest.mark.parametrize('context, interval', [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_the_truth_does_what_the_dream_is_told(wall, context, interval):
    session = Session(open_tiny(wall, context, interval))
    twin = envs.Wall()
    dreamed, truth = session.new_start()
    assert (dreamed == truth).all() and session.dream.known == context
    twin.set_state(session.world.get_state())
    for action in ([0.1, 0], [0, -0.1], [9.0, 0]):
        _, truth = session.step(action)
        for _ in range(interval):  # a held key is its action, repeated
            twin.step(np.clip(np.float32(action), session.least, session.greatest))
        assert (truth == twin.render(16)).all()
        assert session.dream.actions[0, session.dream.known - 2].tolist() == pytest.approx(
            np.tile(np.clip(np.float32(action), session.least, session.greatest), interval))
    dreamed, truth = session.back_to_truth()
    assert (dreamed == truth).all() and (truth == twin.render(16)).all()
    assert session.dream.age == 0 and session.dream.known == context
    if context > 1:  # the frames and the actions that lead there are those of the simulator
        before = session.dream.actions[0, context - 2].tolist()
        assert before == pytest.approx(np.tile(session.greatest * [1, 0], interval))


def test_what_the_data_never_shows_is_not_asked_of_the_dream(wall):
    one, other = (Session(open_tiny(wall)) for _ in range(2))
    for session in (one, other):
        session.dream.reset(np.zeros((1, 3, 16, 16), np.uint8))
    assert (one.step([99.0, -99.0])[0] == other.step([one.greatest[0], one.least[1]])[0]).all()


def test_a_dataset_without_a_simulator_begins_from_its_recordings(tmp_path):
    opened = open_tiny(random_dataset(tmp_path, (3, 16, 24), 3, rows=40), 2, action_dim=3, input_size=(16, 24))
    session = Session(opened)
    dreamed, truth = session.new_start()
    assert truth is None and dreamed.shape == (3, 16, 24)
    assert any((frame == dreamed).all() for frame in session.clips.frames)
    with pytest.raises(ValueError, match='nobody knows the truth'):
        session.back_to_truth()


def test_latents_begin_from_the_encoded_truth(wall):
    class Halved(torch.nn.Module):
        """An autoencoder that is easy to check: it halves each side."""

        def encode(self, frames):
            return torch.nn.functional.avg_pool2d(frames, 2)

        def decode(self, latents):
            return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)

    opened = open_tiny(wall, input_size=(8, 8))
    opened.vae = Halved()
    opened.held_out = open_tiny(wall).held_out
    dreamed, truth = Session(opened).new_start()
    assert dreamed.shape == truth.shape == (3, 16, 16)
    halved = opened.vae.decode(opened.vae.encode(torch.from_numpy(truth).float()))
    assert abs(dreamed - halved.numpy()).max() <= 1


def test_settings_change_while_it_runs(server):
    dream = begin(server)['dream']
    sampler = server.sessions[dream].dream
    assert ask(server, '/settings', {'dream': dream, 'num_steps': 3})[0] == 200
    assert ask(server, '/settings', {'dream': dream, 'solver': 'dpmpp', 'stabilization': 0.1})[0] == 200
    assert (sampler.sampler.num_steps, sampler.sampler.solver, sampler.sampler.stabilization) == (3, 'dpmpp', 0.1)
    for wrong in (dict(num_steps=0), dict(num_steps=10 ** 9), dict(num_steps=2.5), dict(solver='euler'),
                  dict(solver=['ddim']), dict(stabilization=2), dict(stabilization=float('nan')),
                  dict(stabilization='0'), dict(history=2), dict(progress=1)):
        status, _, line = ask(server, '/settings', {'dream': dream, **wrong})
        assert status == 400 and line.count(b'\n') == 1
    assert sampler.sampler.num_steps == 3
    for _ in range(6):
        assert step(server, dream)[0] == 200


def test_a_film_is_a_gif_of_both_worlds(server):
    dream = begin(server)['dream']
    assert ask(server, '/record', {'dream': dream, 'on': False})[::2] == (400, b'nothing was recorded\n')
    ask(server, '/record', {'dream': dream, 'on': True})
    for _ in range(5):
        step(server, dream)
    status, headers, body = ask(server, '/record', {'dream': dream, 'on': False})
    assert (status, headers['Content-Type']) == (200, 'image/gif')
    film = Image.open(io.BytesIO(body))
    assert film.n_frames == 5 and film.height > film.width  # one above the other
    assert server.sessions[dream].film is None


def test_a_film_keeps_the_last_frames_only(wall):
    session = Session(open_tiny(wall))
    session.record()
    for _ in range(MAX_FILM + 5):
        session.film.append((0.0, np.zeros((3, 8, 8), np.uint8), None))
    film = session.end_film()
    assert len(film) == MAX_FILM
    assert Image.open(io.BytesIO(gif(list(film)[:3]))).height < 300  # no truth, so no row for it


# -----------------------------------------------------------------------------
# controls

def test_every_world_names_keys_that_fit_its_actions():
    for name, world in envs.WORLDS.items():
        held = controls.controls_of({'what': name})
        assert held['keys'] and held['rest'] == [0.0] * world.action_dim
        assert all(len(action) == world.action_dim for action in held['keys'].values())


def test_a_dataset_that_does_not_know_its_keys_gets_sliders_and_arrows():
    ranges = [[-9, -1, 1, 9], [2, 2, 4, 4], [-3, -3, -1, 0]]  # the sliders leave out the last hundredths
    held = controls.controls_of({'action_range': ranges})
    assert held['rest'] == [0, 2, -1] and held['sliders'] == [[-1, 2, -3], [1, 4, -1]]
    assert held['keys'] == {'ArrowLeft': [-1, 0, 0], 'ArrowRight': [1, 0, 0], 'ArrowUp': [0, 0, 0],
                            'ArrowDown': [0, 2, 0]}
    assert list(controls.controls_of({'action_range': ranges[:1]})['keys']) == ['ArrowLeft', 'ArrowRight']


def test_csgo_is_51_numbers_one_for_each_key_and_one_hot_ones_for_the_mouse():
    held = controls.controls_of({'controls': controls.KNOWN['csgo']})
    rest = np.array(held['rest'])
    assert len(rest) == 51 and rest.nonzero()[0].tolist() == [13 + 11, 36 + 7]  # the middle bins: it stays
    for key, number in (('KeyW', 0), ('KeyD', 3), ('KeyR', 10), ('Mouse2', 12)):
        assert np.nonzero(held['keys'][key])[0].tolist() == [number]
    for key, change in held['keys'].items():
        action = rest + change
        assert set(action) == {0, 1} and action[13:36].sum() == action[36:].sum() == 1, key
    assert len(held['mouse']['x'][1]) == 23 and len(held['mouse']['y'][1]) == 15


# -----------------------------------------------------------------------------
# tabs

def test_tabs_have_a_dream_each_up_to_a_limit(wall):
    with serving(open_tiny(wall), tabs=2) as server:
        first, second = begin(server)['dream'], begin(server)['dream']
        step(server, second)
        assert age_of(step(server, first)) == 1  # the other one's frame does not count
        status, _, line = ask(server, '/new', {})
        assert status == 503 and b'2 dreams are being played' in line
        ask(server, '/end', {'dream': first})
        begin(server)


def test_a_tab_that_falls_silent_is_forgotten(wall):
    with serving(open_tiny(wall), silence=0.6) as server:
        silent, alive = begin(server)['dream'], begin(server)['dream']
        for _ in range(30):
            assert step(server, alive)[0] == 200
            time.sleep(0.05)
        assert list(server.sessions) == [alive]
        assert step(server, silent)[0] == 410


def test_frames_asked_for_at_once_come_one_after_the_other(server):
    dream, ages = begin(server)['dream'], []
    threads = [threading.Thread(target=lambda: ages.append(age_of(step(server, dream)))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ages) == list(range(1, 13))


# -----------------------------------------------------------------------------
# who may not

BAD_BODIES = {
    'nothing': b'', 'no JSON': b'{', 'not UTF-8': b'\xff\xfe{}', 'a list': b'[]', 'a number': b'7', 'null': b'null',
    'deep': b'[' * 60_000, 'no dream': b'{"action": [0, 0]}'}
BAD_ACTIONS = {
    'none': None, 'text': 'left', 'too short': [0.1], 'too long': [0.1] * 3, 'empty': [], 'text in it': [0.1, '0'],
    'true': [True, 0.1], 'NaN': [float('nan'), 0], 'infinite': [float('inf'), 0], 'a list in it': [[0.1], 0.1],
    'huge': [10 ** 400, 0], 'an object': {'0': 0.1, '1': 0.1}, 'null in it': [None, 0.1]}


def malformed(server, dream):
    """(what is wrong, status) of a hundred requests, of more than twenty kinds."""
    for _ in range(3):
        for kind, body in BAD_BODIES.items():
            yield kind, ask(server, '/step', body)[0]
        for kind, action in BAD_ACTIONS.items():
            yield kind, ask(server, '/step', {'dream': dream, 'action': action})[0]
            yield kind, ask(server, '/act', {'dream': dream, 'action': action})[0]
        for count in (0, -1, 1.5, True, '2', None, MAX_FRAMES + 1, 10 ** 400):
            yield f'{count!r:.9} frames', step(server, dream, frames=count)[0]
        for name in ('', 'x' * 100, None, 3, [], {}, '../..', dream.lower() + '\n'):
            yield f'dream {name!r}', ask(server, '/step', {'dream': name, 'action': [0, 0]})[0]
        yield 'oversized', ask(server, '/step', b' ' * (MAX_BODY + 1))[0]
        yield 'of another type', ask(server, '/step', {'dream': dream}, Content_Type='text/plain')[0]
        for length in ('-1', 'ten', '1e3', '9' * 5000, '٣'.encode()):
            yield f'length {length[:9]!r}', ask(server, '/step', b'', Content_Length=length)[0]


def test_a_hundred_malformed_requests_are_refused_and_the_dream_lives_on(server):
    dream = begin(server)['dream']
    answers = list(malformed(server, dream))
    assert len(answers) >= 100 and len({kind for kind, _ in answers}) >= 20
    assert all(400 <= status < 500 for _, status in answers), answers
    assert age_of(step(server, dream)) == 1


@pytest.mark.parametrize('text', [
    b'\r\n\r\n', b'GET\r\n\r\n', b'POST /step HTTP/9.9\r\n\r\n', b'\x16\x03\x01\x02\x00\r\n\r\n',
    b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n',
    b'POST /step HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}',
    b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 200 + b'\r\n', b'GET /' + b'a' * 70_000 + b' HTTP/1.1\r\n\r\n',
    b'POST /step HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\nContent-Type: application/json\r\n\r\n{"dre'],
    ids=lambda text: str(text[:30]))
def test_what_is_not_http_is_refused_too(server, text):
    dream = begin(server)['dream']
    with socket.create_connection(('127.0.0.1', server.server_port), timeout=20) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        assert b'200' not in connection.recv(12)
    assert step(server, dream)[0] == 200


@pytest.mark.parametrize('host', ['evil.example', 'evil.example:8000', '', 'localhost.evil.example', '169.254.1.1'])
def test_a_foreign_host_is_refused(server, host):
    assert ask(server, '/', method='GET', Host=host)[0] == 421
    assert ask(server, '/new', {}, Host=host)[0] == 421
    assert not server.sessions


def test_its_own_names_are_not(server):
    for host in (f'127.0.0.1:{server.server_port}', f'localhost:{server.server_port}', 'localhost:9000'):  # ssh -L
        assert ask(server, '/', method='GET', Host=host)[0] == 200
        assert ask(server, '/new', {}, Host=host, Origin=f'http://{host}')[0] == 200


@pytest.mark.parametrize('origin', ['http://evil.example', 'null', 'https://127.0.0.1', 'http://127.0.0.1:1', ''])
def test_a_page_of_another_origin_may_not_play(server, origin):
    dream = begin(server)['dream']
    status, headers, _ = ask(server, '/step', {'dream': dream, 'action': [0, 0]}, Origin=origin)
    assert status == 403 and 'Access-Control-Allow-Origin' not in headers
    assert server.sessions[dream].dream.age == 0


def test_nothing_is_read_but_the_page(server, monkeypatch):
    page = ask(server, '/', method='GET')
    assert page[0] == 200 and b'<canvas id="dream"' in page[2]
    assert "frame-ancestors 'none'" in page[1]['Content-Security-Policy']
    opened = []

    def watch(path, *args, **kwargs):
        opened.append(path)
        raise PermissionError(path)

    monkeypatch.setattr(builtins, 'open', watch)
    monkeypatch.setattr(io, 'open', watch)
    for path in ('/play.py', '/play.html', '/../../etc/passwd', '/%2e%2e/etc/passwd', '//etc/passwd', '/?a=b', '/.',
                 '/favicon.ico', 'http://evil.example/', '*', '/step', '/new'):
        assert ask(server, path, method='GET')[0] in (404, 421)
        if path not in ('/step', '/new'):
            assert ask(server, path, {})[0] in (404, 421)
    for method in ('PUT', 'DELETE', 'OPTIONS', 'TRACE', 'HEAD'):
        assert ask(server, '/', method=method)[0] == 501
    assert not opened


# -----------------------------------------------------------------------------
# the command

def start_playing(trained):
    command = [sys.executable, 'play.py', f'--ckpt={trained}', '--device=cpu', '--port=0', '--browser=False']
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_it_at_once_even_while_it_dreams(trained):
    process = start_playing(trained)
    url = process.stdout.readline().split()[0]
    port = int(url.rpartition(':')[2])
    connection = http.client.HTTPConnection('127.0.0.1', port)

    def post(path, **fields):
        connection.request('POST', path, json.dumps(fields), {'Content-Type': 'application/json'})

    post('/new')
    about = json.loads(connection.getresponse().read())
    post('/settings', dream=about['dream'], num_steps=250)
    connection.getresponse().read()
    post('/step', dream=about['dream'], action=[0, 0])  # which takes a while
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
    assert process.stderr.read() == ''


def test_a_port_in_use_is_one_line(trained, server):
    line = error('play.py', f'--ckpt={trained}', f'--port={server.server_port}', '--device=cpu', '--browser=False')
    assert line == f'port={server.server_port} is in use: try --port={server.server_port + 1}'


# -----------------------------------------------------------------------------
# the page, in a browser

@pytest.fixture(scope='session')
def chromium():
    api = pytest.importorskip('playwright.sync_api', reason='no playwright: pip install playwright')
    path = shutil.which('chromium') or shutil.which('google-chrome')
    if not path:
        pytest.skip('no chromium: apt-get install chromium')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(server) opens the page in a tab of its own; a complaint in its console fails the test."""
    complaints, contexts = [], []

    def heard(line):
        if 'getImageData' not in line.text:  # `pixels` below reads the canvas, which is slow
            complaints.append(line.text)

    def open_tab(server, width=1100, height=800):
        context = chromium.new_context(viewport=dict(width=width, height=height), accept_downloads=True)
        page = context.new_page()
        page.on('pageerror', lambda problem: complaints.append(str(problem)))
        page.on('console', heard)
        page.goto(server.url)
        until(page, 'about !== null && lastAge >= 0')
        contexts.append(context)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not complaints


def until(page, condition):
    """Wait for a condition in JavaScript. (wait_for_function wants eval, which the page's policy forbids.)"""
    for _ in range(400):
        if page.evaluate(condition):
            return
        time.sleep(0.05)
    raise AssertionError(condition)


def pause(page):
    page.click('#pause')
    until(page, 'onTheWay.length === 0 && !gate && newest === null')  # what came is painted


def age(page):
    return page.evaluate('lastAge')


def one_step(page):
    before = age(page)
    page.click('#one')
    until(page, f'lastAge > {before} && newest === null')


def pixels(page, canvas):
    script = 'id => { const c = at(id); return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data] }'
    height, width = page.evaluate('[about.height, about.width]')
    until(page, 'newest === null')  # what came is painted
    return np.array(page.evaluate(script, canvas)).reshape(height, width, 4)[..., :3]


def where(page, canvas):
    """How far to the right the red agent is, in pixels."""
    frame = pixels(page, canvas)
    red = np.clip(frame[..., 0] - frame[..., 1] - 40, 0, None).sum(axis=0)
    return (red * np.arange(len(red))).sum() / max(1, red.sum())


def test_the_page_plays(server, visit):
    page = visit(server)
    until(page, 'lastAge >= 8')  # it goes on by itself
    until(page, '/^[0-9.]+ fps · [0-9.]+ ms a frame$/.test(at("fps").textContent)')
    pause(page)
    until(page, 'at("age").textContent === `last true ${lastAge} frames ago`')
    assert pixels(page, 'dream').std() > 1 and pixels(page, 'truth').std() > 1
    name = page.evaluate('about.dream')
    page.close(run_before_unload=True)
    for _ in range(100):  # a tab that is closed says so
        if name not in server.sessions:
            break
        time.sleep(0.05)
    assert name not in server.sessions


def test_pause_step_new_start_and_back_to_the_truth(server, visit):
    page = visit(server)
    until(page, 'lastAge >= 3')
    pause(page)
    stopped = age(page)
    page.wait_for_timeout(400)
    assert age(page) == stopped
    one_step(page)
    one_step(page)
    assert age(page) == stopped + 2 and page.evaluate('paused')

    truth = pixels(page, 'truth')
    assert (pixels(page, 'dream') != truth).any()
    page.click('#back')
    until(page, 'lastAge === 0')
    assert (pixels(page, 'dream') == truth).all() and (pixels(page, 'truth') == truth).all()
    until(page, 'at("age").textContent === "true"')
    page.click('#start')
    page.wait_for_timeout(500)
    assert (pixels(page, 'truth') != truth).any() and (pixels(page, 'dream') == pixels(page, 'truth')).all()
    page.click('#pause')  # again, and it goes on
    until(page, 'lastAge >= 2')


def test_record_makes_a_gif_that_opens(server, visit):
    page = visit(server)
    page.click('#record')
    until(page, 'recording')
    assert page.inner_text('#record') == 'Stop'
    first = age(page)
    until(page, f'lastAge >= {first} + 4')
    with page.expect_download() as download:
        page.click('#record')
    assert download.value.suggested_filename == 'dream.gif'
    assert Image.open(download.value.path()).n_frames >= 4
    assert page.inner_text('#record') == 'Record'


def test_a_key_held_drawn_clicked_or_focused_is_the_same_action(server, visit):
    page = visit(server)
    right = page.locator('.key[data-key=ArrowRight]')
    assert page.evaluate('action()') == [0, 0]

    page.keyboard.down('ArrowRight')
    assert page.evaluate('action()') == [0.1, 0] and right.get_attribute('aria-pressed') == 'true'
    page.keyboard.down('ArrowUp')
    assert page.evaluate('action()') == [0.1, -0.1]
    page.keyboard.down('ArrowLeft')  # against ArrowRight: the last one counts
    assert page.evaluate('action()') == [-0.1, -0.1]
    for key in ('ArrowLeft', 'ArrowUp', 'ArrowRight'):
        page.keyboard.up(key)
    assert page.evaluate('action()') == [0, 0] and right.get_attribute('aria-pressed') == 'false'

    right.hover()
    page.mouse.down()
    assert page.evaluate('action()') == [0.1, 0] and right.get_attribute('aria-pressed') == 'true'
    page.mouse.up()
    assert page.evaluate('action()') == [0, 0]

    right.focus()
    page.keyboard.down('Space')
    assert page.evaluate('action()') == [0.1, 0]
    page.keyboard.up('Space')
    assert page.evaluate('action()') == [0, 0]
    page.keyboard.down('ArrowRight')
    page.evaluate('dispatchEvent(new Event("blur"))')  # nobody holds a key in a window that lost the focus
    assert page.evaluate('action()') == [0, 0]


def test_two_fingers_on_drawn_keys_hold_both(server, chromium):
    page = chromium.new_context(viewport=dict(width=390, height=780), has_touch=True, is_mobile=True).new_page()
    page.goto(server.url)
    until(page, 'about !== null && lastAge >= 0')
    touch = page.context.new_cdp_session(page)
    points = []
    for i, key in enumerate(('ArrowRight', 'ArrowDown')):
        box = page.locator(f'.key[data-key={key}]').bounding_box()
        points.append(dict(x=box['x'] + 9, y=box['y'] + 9, id=i))
        touch.send('Input.dispatchTouchEvent', dict(type='touchStart', touchPoints=points))
    assert page.evaluate('action()') == [0.1, 0.1]
    touch.send('Input.dispatchTouchEvent', dict(type='touchEnd', touchPoints=[]))
    assert page.evaluate('action()') == [0, 0]
    page.context.close()


def test_a_second_tab_does_not_disturb_the_first(server, visit):
    first, second = visit(server), visit(server)
    pause(first)
    before, picture = age(first), pixels(first, 'dream')
    second.keyboard.down('ArrowRight')
    until(second, 'lastAge >= 5')
    second.click('#start')
    assert len(server.sessions) == 2
    assert age(first) == before and (pixels(first, 'dream') == picture).all()
    one_step(first)
    assert age(first) == before + 1


def test_settings_reach_the_dream(server, visit):
    page = visit(server)
    sampler = server.sessions[page.evaluate('about.dream')].dream
    page.fill('#num_steps', '2')
    page.press('#num_steps', 'Enter')
    page.select_option('#solver', 'dpmpp')
    until(page, '!gate')
    assert (sampler.sampler.num_steps, sampler.sampler.solver) == (2, 'dpmpp')
    page.uncheck('#show-truth')
    assert not page.is_visible('#truth') and page.is_visible('#dream')
    page.select_option('#cap', '0')
    seen = age(page)
    until(page, f'lastAge > {seen} + 20')


def test_a_setting_that_is_refused_is_said_on_the_page(server, chromium):
    page = chromium.new_page()
    page.goto(server.url)
    until(page, 'lastAge >= 0')
    page.fill('#num_steps', '999')
    page.press('#num_steps', 'Enter')
    until(page, 'at("message").textContent.includes("1 to 250")')
    until(page, f'lastAge > {age(page) + 3}')  # and frames that come do not take it away
    assert '1 to 250' in page.inner_text('#message')
    pause(page)
    page.click('#record')
    page.click('#record')  # of no frame
    until(page, 'at("message").textContent.includes("nothing was recorded")')
    assert page.inner_text('#record') == 'Record'
    page.close()


@pytest.mark.parametrize('width, height', [(360, 740), (820, 500)])
def test_a_narrow_window_shows_everything(server, visit, width, height):
    page = visit(server, width, height)
    until(page, 'at("fps").textContent.includes("fps")')  # before the first frame it is a dash
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    for part in ('dream', 'truth', 'fps', 'age', 'start', 'back', 'pause', 'one', 'record', 'num_steps', 'solver',
                 'stabilization', 'cap', 'show-truth'):
        box = page.locator(f'#{part}').bounding_box()
        assert box['width'] > 8 and box['x'] >= 0 and box['x'] + box['width'] <= width, part
    assert page.locator('#dream').bounding_box()['width'] >= 140
    assert page.locator('.key').count() == 4


def test_a_forgotten_tab_begins_a_new_dream(server, chromium):
    page = chromium.new_page()
    page.goto(server.url)
    until(page, 'lastAge >= 2')
    name = page.evaluate('about.dream')
    server.sessions.clear()
    until(page, f'about && about.dream !== "{name}" && lastAge >= 2')
    page.close()


def test_sliders_act_where_no_keys_are_known(tmp_path, visit):
    with serving(open_tiny(random_dataset(tmp_path, (3, 16, 16), 3, rows=40), action_dim=3)) as server:
        page = visit(server)
        assert page.locator('#sliders input').count() == 3 and not page.is_visible('#truth')
        low, high = page.evaluate('about.controls.sliders')
        page.locator('#sliders input').nth(2).fill(str(high[2]))
        page.locator('#sliders input').nth(2).blur()
        assert page.evaluate('action()')[2] == pytest.approx(high[2], abs=0.1)
        page.keyboard.down('ArrowLeft')
        assert page.evaluate('action()')[0] == pytest.approx(low[0], abs=0.1)


def test_csgo_is_played_with_keys_and_mouse(tmp_path, visit):
    data = tmp_path / 'csgo'
    random_dataset(data, (3, 16, 16), 51, rows=40)
    meta = json.loads((data / 'meta.json').read_text()) | {'controls': controls.KNOWN['csgo']}
    (data / 'meta.json').write_text(json.dumps(meta))
    with serving(open_tiny(str(data), action_dim=51)) as server:
        page = visit(server, 420, 900)
        assert page.evaluate('document.documentElement.scrollWidth') <= 420
        pause(page)

        def hot():
            action = page.evaluate('action()')
            assert set(action) == {0, 1}
            return np.nonzero(action)[0].tolist()

        assert hot() == [24, 43]
        page.keyboard.down('KeyW')
        page.keyboard.down('Space')
        assert hot() == [0, 4, 24, 43]
        page.evaluate('moved.x = -55; moved.y = 9')  # as pointermove would
        assert hot() == [0, 4, 13 + 5, 36 + 10]  # -60 and 10 are the nearest bins
        assert hot() == [0, 4, 24, 43]  # moved once
        page.keyboard.down('ArrowRight')
        page.evaluate('moved.x = -55')
        assert hot() == [0, 4, 13 + 5, 43]  # the mouse goes before the arrows
        page.locator('.key[data-key=Mouse0]').hover()
        page.mouse.down()
        assert 11 in hot()
        page.mouse.up()
        page.keyboard.up('KeyW')
        page.keyboard.up('Space')
        page.keyboard.up('ArrowRight')

        # on the dream itself, once the page has the pointer (there is none to lock here)
        page.evaluate("Object.defineProperty(document, 'pointerLockElement', {value: at('dream')})")
        page.locator('#dream').hover()
        page.evaluate('moved.x = moved.y = 0')
        for button in ('left', 'right'):
            page.mouse.down(button=button)
        assert hot() == [11, 12, 24, 43]
        page.mouse.up(button='left')
        assert hot() == [12, 24, 43]
        page.mouse.up(button='right')
        assert hot() == [24, 43]


@pytest.fixture(scope='session')
def player(tmp_path_factory):
    """A model of the wall at 16x16 that has learned what actions do: half a minute."""
    folder = tmp_path_factory.mktemp('player')
    run('data.py', 'wall', f'--out={folder}/wall', '--episodes=300', '--image_size=16', '--workers=2')
    run(*TRAIN, f'--dataset={folder}/wall', f'--out_dir={folder}/run', '--max_steps=400', '--hidden_size=64',
        '--depth=4', '--batch_size=12', '--muon=True', '--learning_rate=5e-3', '--warmup_steps=50',
        '--gradient_clip_norm=1.0', '--ema_decay=0.98', '--normalize_action=True', '--injection=adaln',
        '--clean_history=1', '--timestep_mean=2', '--timestep_std=4', '--val_every=0')
    return f'{folder}/run'


@pytest.mark.slow
def test_a_held_arrow_moves_the_agent_in_the_dream_and_in_the_truth(player, visit):
    with serving(opened_run(player)) as server:
        page = visit(server)
        pause(page)
        while not 0 < where(page, 'truth') < 4:  # far from the wall
            page.click('#start')
            until(page, '!gate')
        begun = where(page, 'truth')
        page.keyboard.down('ArrowRight')
        for _ in range(3):
            one_step(page)
        page.keyboard.up('ArrowRight')
        assert where(page, 'truth') > begun + 1
        assert where(page, 'dream') > begun + 1
