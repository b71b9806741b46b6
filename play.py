"""Play: step into the dream, in a browser. Where there is a simulator, the truth runs beside it.

    python play.py --ckpt=out/wall                  # opens http://127.0.0.1:8000
    python play.py --ckpt=out/doom --num_steps=1    # faster than its four; the page can change it
    ssh -L 8000:localhost:8000 machine              # plays here what --browser=False dreams there

The page (play.html) asks for one frame at a time, with the action that leads to it; without a limit
to the rate, for a few at once, and says when the action changes. Each tab has a dream of its own.
"""
import errno
import json
import os
import re
import secrets
import signal
import struct
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import util
from pathlib import Path

import torch

import run
from configurator import UserError, configure
from session import Session, gif

MAX_BODY = 2 ** 16  # bytes of a request
MAX_FRAMES = 16  # of a request
PATIENCE = 5  # seconds that a frame may take to be read
HEAD = struct.Struct('<If?xxx')  # of a frame: its age, milliseconds, whether the true episode is over
TEXT = 'text/plain; charset=utf-8'
PAGE_HEADERS = {  # it loads nothing, and no other page may frame it
    'Content-Security-Policy': "default-src 'none'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"}


class Refused(Exception):
    """Answered with a status and one line; whatever is being played goes on."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Server(ThreadingHTTPServer):
    """Its threads read requests; one other thread dreams for all tabs, in the order asked for, and
    sends the frames itself. If each dreamed for itself, each would start a pool of torch's threads.
    """

    def __init__(self, host, port, opened, tabs=8, silence=300.0):
        self.host, self.opened, self.tabs, self.silence = host, opened, tabs, silence
        self.page = Path(__file__).with_name('play.html').read_bytes()
        self.sessions = {}  # by names that nobody can guess
        self.worker = ThreadPoolExecutor(max_workers=1)
        # the browser draws on the same processor: leave it a core (PushT on two: 20 -> 25 fps)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() - 1)))
        # Python's default lets a thread that reads a request keep the dream waiting for 5 ms
        sys.setswitchinterval(1e-4)
        try:
            super().__init__((host, port), Handler)
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                raise UserError(f'port={port} is in use: try --port={port + 1}') from e
            raise UserError(f'host={host!r}, port={port}: {e.strerror}') from e

    @property
    def url(self):
        return f'http://{self.host}:{self.server_port}'

    def compute(self, function, *args):
        return self.worker.submit(function, *args).result()

    def open_session(self):
        if len(self.sessions) >= self.tabs:
            raise Refused(503, f'{self.tabs} dreams are being played: close a tab, or raise --tabs')
        name = secrets.token_urlsafe()
        self.sessions[name] = Session(self.opened)
        return {'dream': name} | self.sessions[name].describe()

    def service_actions(self):
        """Free what fell silent; serve_forever calls this twice a second."""
        for name, session in list(self.sessions.items()):
            if time.monotonic() - session.heard > self.silence:
                self.sessions.pop(name, None)

    def handle_error(self, request, client_address):
        """That a tab was closed while it was being answered is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page. All else is a POST of JSON, {"dream": name, ...}, to one of ROUTES."""
    protocol_version = 'HTTP/1.1'  # the frames of a tab come over one connection, or two
    disable_nagle_algorithm = True  # which would hold a frame back for 40 ms
    wbufsize = -1  # head and frame leave together
    timeout = 60  # seconds, for who sends half a request
    server_version, sys_version = 'nanowm', ''

    def do_GET(self):
        self.guard(self.send_page)

    def do_POST(self):
        self.guard(self.route)

    def guard(self, answer):
        try:
            self.check_caller()
            answer()
        except Refused as e:
            self.close_connection = True  # the request may not have been read to its end
            self.send(e.status, TEXT, f'{e}\n'.encode())
        except UserError as e:
            self.send(400, TEXT, f'{e}\n'.encode())

    def check_caller(self):
        """Only our page may ask: none of another origin, none whose name was made to point here."""
        hosts = self.headers.get_all('Host', [])
        ours = {'localhost', '127.0.0.1', self.server.host, self.connection.getsockname()[0]}
        if len(hosts) != 1 or re.sub(r':\d+$', '', hosts[0]) not in ours:
            raise Refused(421, f'open {self.server.url}, or use localhost or the IP address '
                               'instead of a name')
        own = f'http://{hosts[0]}'
        if self.headers.get('Origin', own) != own:
            raise Refused(403, 'pages of other origins may not play here')

    def send_page(self):
        if self.path != '/':
            raise Refused(404, f'there is {self.server.url}/ and nothing else')
        self.send(200, 'text/html; charset=utf-8', self.server.page, PAGE_HEADERS)

    def route(self):
        if self.path not in self.ROUTES:
            raise Refused(404, 'no such route')
        self.ROUTES[self.path](self, self.read_request())

    def read_request(self):
        """The JSON object that was posted."""
        length = self.headers.get('Content-Length', '')
        if not re.fullmatch('[0-9]{1,9}', length) or 'Transfer-Encoding' in self.headers:
            raise Refused(411, 'expected a Content-Length')
        if int(length) > MAX_BODY:
            raise Refused(413, f'expected at most {MAX_BODY} bytes')
        if self.headers.get_content_type() != 'application/json':
            raise Refused(415, 'expected application/json')
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as e:
            raise Refused(400, 'expected JSON') from e
        if not isinstance(request, dict):
            raise Refused(400, 'expected a JSON object')
        return request

    def session(self, request):
        session = self.server.sessions.get(str(request.get('dream')))
        if session is None:
            raise Refused(410, 'this dream is over: it fell silent, or was never begun')
        session.heard = time.monotonic()
        return session

    # what a page may ask for

    def new(self, request):
        self.send_json(self.server.compute(self.server.open_session))

    def end(self, request):
        self.server.sessions.pop(str(request.get('dream')), None)
        self.send_json({})

    def start(self, request):
        session = self.session(request)
        self.send_frames(session, session.new_start)

    def truth(self, request):
        session = self.session(request)
        self.send_frames(session, session.back_to_truth)

    def act(self, request):
        """From the next frame on, also of those already asked for."""
        self.take_action(request)
        self.send_json({})

    def step(self, request):
        """So many frames, each sent as soon as it is dreamed."""
        session, count = self.take_action(request), request.get('frames', 1)
        if type(count) is not int or not 1 <= count <= MAX_FRAMES:
            raise Refused(400, f'frames: expected 1 to {MAX_FRAMES}')
        truth = request.get('truth') is True
        self.send_frames(session, lambda: session.step(session.action, truth), count)

    def take_action(self, request):
        """The session, told the request's action: the last one that was told counts."""
        session, action = self.session(request), request.get('action')
        wanted = len(session.least)
        if not isinstance(action, list) or len(action) != wanted or not all(map(is_number, action)):
            raise Refused(400, f'action: expected a list of {wanted} numbers')
        session.action = action
        return session

    def settings(self, request):
        session = self.session(request)
        del request['dream']
        self.server.compute(session.change, request)
        self.send_json({})

    def record(self, request):
        """on: true begins a film; false ends it and is answered with the GIF."""
        session = self.session(request)
        if request.get('on') is True:
            session.record()
            self.send_json({})
        else:
            self.send(200, 'image/gif', gif(session.end_film()))

    ROUTES = {'/new': new, '/end': end, '/start': start, '/truth': truth, '/act': act, '/step': step,
              '/settings': settings, '/record': record}

    # answers

    def send_frames(self, session, move, count=1):
        """Each as HEAD (its age, milliseconds, whether the true episode is over), then the dream's
        frame as rows of RGB bytes, then the truth's if there is one."""
        def dream():
            for i in range(count):
                begun = time.perf_counter()
                frames = move()
                milliseconds = 1000 * (time.perf_counter() - begun)
                over = getattr(session.world, 'over', False)
                body = HEAD.pack(session.dream.age, milliseconds, over)
                body += b''.join(f.transpose(1, 2, 0).tobytes() for f in frames if f is not None)
                if i == 0:
                    self.send_head(200, 'application/octet-stream', count * len(body))
                self.wfile.write(body)
                self.wfile.flush()

        # sent by the thread that dreams: to wake another for each frame costs a tenth of the rate.
        # It waits for no slow reader
        self.connection.settimeout(PATIENCE)
        self.server.compute(dream)
        self.connection.settimeout(self.timeout)

    def send_json(self, answer):
        self.send(200, 'application/json', json.dumps(answer).encode())

    def send(self, status, kind, body, headers=None):
        self.send_head(status, kind, len(body), headers)
        self.wfile.write(body)

    def send_head(self, status, kind, length, headers=None):
        self.send_response(status)
        common = {'Content-Type': kind, 'Content-Length': length, 'Cache-Control': 'no-store',
                  'X-Content-Type-Options': 'nosniff'}
        for key, value in (common | (headers or {})).items():
            self.send_header(key, str(value))
        if self.close_connection:
            self.send_header('Connection', 'close')
        self.end_headers()

    def log_message(self, *args):
        """No line for each frame."""


def is_number(x):
    """A bounded one: not what JSON calls NaN or Infinity, nor true."""
    return type(x) in (int, float) and abs(x) < 1e9


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    port = 8000  # 0 is any that is free [0 to 65535]
    host = '127.0.0.1'  # this machine only; 0.0.0.0 lets in everybody who can reach it
    browser = True  # open the page
    tabs = 8  # dreams at once [>= 1]
    silence = 300.0  # seconds after which a tab that asks for nothing is forgotten [> 0]
    # --------------------------------------------------------------------------
    settings = configure(globals(), shared=run)
    server = Server(host, port, run.open_run(settings), tabs, silence)
    server.compute(Session, server.opened)  # says now what is wrong with the dataset
    print(f'{server.url} (Ctrl-C ends it)', flush=True)
    if browser:
        webbrowser.open(server.url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        util._exit_function()  # ends Doom's game, which would go on without us
        os._exit(0)  # at once, whatever is being computed
