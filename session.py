"""One tab of play.py: a dream, the simulator beside it if there is one, a film if it records."""
import os
import time
from collections import deque
from dataclasses import replace

import numpy as np
import torch

import envs
from configurator import UserError
from controls import controls_of, limits
from data import to_model
from diffusion import SOLVERS
from dream import open_dream, recorded_start
from pictures import gif_bytes, side_by_side

MAX_STEPS = 250  # denoising steps a frame
MAX_FILM = 300  # frames that are kept while recording: the last ones


class Session:
    """Every move returns (dream, truth), uint8 [3,H,W]; truth is None where it is unknown or unasked."""

    def __init__(self, opened):
        self.opened = opened
        self.dream = open_dream(opened)
        self.clips = opened.held_out(opened.context_frames)
        self.about_actions = opened.action_meta(self.clips)
        self.least, _, _, self.greatest = limits(self.about_actions)
        self.height, self.width = self.clips.pixels([0]).shape[-2:]
        self.world = find_world(self.clips.meta)
        # of the last frames, as many as a dream starts from: the simulator's states, and the
        # actions between them
        self.states = deque(maxlen=opened.context_frames)
        self.acted = deque(maxlen=opened.context_frames - 1)
        self.rng = np.random.default_rng()
        self.action = None  # the last one that was told
        self.film = None
        self.heard = time.monotonic()  # of its tab
        self.new_start()

    def describe(self):
        """What the page has to know."""
        sampler = self.dream.sampler
        return dict(
            name=os.path.basename(os.path.normpath(self.opened.ckpt)),
            height=self.height,
            width=self.width,
            truth=self.world is not None,
            controls=controls_of(self.about_actions),
            solvers=list(SOLVERS),
            num_steps=sampler.num_steps,
            solver=sampler.solver,
            stabilization=sampler.stabilization)

    def new_start(self):
        """Another episode, of the simulator or from the validation split."""
        seed = self.new_seed()
        if not self.world:
            clip = seed % len(self.clips)
            return self.dream.reset(*recorded_start(self.clips, clip), seed), None
        self.world.reset(seed)
        self.states.append(self.world.get_state())
        for _ in range(self.opened.context_frames - 1):  # the frames that lead to the dream's first
            self.simulate(self.world.explore(self.rng) for _ in range(self.clips.interval))
        return self.back_to_truth()

    def back_to_truth(self):
        """Let the dream begin again where the simulator is."""
        if not self.world:
            raise UserError('there is no simulator of this dataset, so nobody knows the truth')
        pixels = []
        for state in self.states:
            if len(self.states) > 1:  # else it is where it is, and some worlds take long to go back
                self.world.set_state(state)
            pixels.append(self.world.render(self.height))
        frames = torch.from_numpy(np.stack(pixels))
        if self.opened.vae:
            frames = self.opened.vae.encode(to_model(frames, self.opened.device))
        return self.dream.reset(frames, np.array(self.acted), self.new_seed()), pixels[-1]

    def step(self, action, show_truth=True):
        """Do an action [A] in both worlds.

        Numbers beyond the recorded ones, which would destroy the dream, are taken to their limits.
        """
        action = np.clip(np.float32(action), self.least, self.greatest)
        dreamed, truth = self.dream.step(action), None
        if self.world:
            self.simulate([action] * self.clips.interval)
            if show_truth:
                truth = self.world.render(self.height)
        if self.film is not None:
            self.film.append((time.monotonic(), dreamed, truth))
        return dreamed, truth

    def simulate(self, actions):
        """Actions [frame_interval,A] in the simulator, each taken when the one before it is done."""
        taken = []
        for action in actions:
            self.world.step(action)
            taken.append(action)
        self.states.append(self.world.get_state())
        self.acted.append(taken)

    def new_seed(self):
        return int(self.rng.integers(2 ** 31))

    def change(self, settings):
        """Other num_steps, solver or stabilization, from the next frame on. Raises UserError."""
        unknown = settings.keys() - {'num_steps', 'solver', 'stabilization'}
        num_steps = settings.get('num_steps', 1)
        solver = settings.get('solver', '')
        level = settings.get('stabilization', 0)
        if type(num_steps) is not int or not 1 <= num_steps <= MAX_STEPS:
            raise UserError(f'num_steps: expected 1 to {MAX_STEPS}')
        if unknown or type(solver) is not str or type(level) not in (int, float):
            raise UserError('expected num_steps, solver and stabilization')
        self.dream.sampler = replace(self.dream.sampler, **settings)

    def record(self):
        """Begin a film."""
        self.film = deque(maxlen=MAX_FILM)

    def end_film(self):
        """The film since then: [(time, dream, truth)]. Raises UserError if there is none."""
        film, self.film = self.film, None
        if not film:
            raise UserError('nothing was recorded')
        return film


def find_world(meta):
    """The simulator that a dataset was collected from, or None."""
    if meta.get('what') not in envs.WORLDS:
        return None
    try:
        return envs.make_world(meta['what'])
    except UserError as e:
        print(f'no truth beside the dream: {e}')
        return None


def gif(film):
    """A film as the bytes of a GIF, in the time it took; truth is in it where it was always shown."""
    times, *videos = zip(*film, strict=True)
    rows = {}
    for label, video in zip(('dream', 'truth'), videos, strict=True):
        if all(frame is not None for frame in video):
            rows[label] = np.stack(video)[None].transpose(0, 1, 3, 4, 2)  # [1,T,H,W,3]
    milliseconds = 100
    if len(times) > 1:
        milliseconds = 1000 * float(np.median(np.diff(times)))
    return gif_bytes(side_by_side(rows, num_context=0, min_size=192), milliseconds)
