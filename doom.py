"""Doom's `take_cover` (ViZDoom, Wydmuch et al. 2019): imps throw fireballs, the player steps aside.

The world of World Models (Ha & Schmidhuber 2018, arXiv 1803.10122). Bricks move as the player does;
fireballs come when they will, so there samples are right and means are not.
"""
import os
from multiprocessing import util

import numpy as np
from PIL import Image

from configurator import extra


class Doom:
    """A corridor whose far end is lined with imps. It is over when the player is dead.

    An action is two buttons, to step left and to step right, each pressed above 0.5, for TICS of
    1/35 s. The picture is the middle of what the player sees, a square where an imp is six pixels
    of 64 tall. A state is (seed, buttons, buttons, ...), and is restored by playing it all again, a
    millisecond a step: the game can save itself only to a file.
    """
    about = "imps that throw fireballs, Doom's take_cover, simulated by vizdoom"
    steps, episodes = 200, 1000
    image_size = 64
    action_dim = 2
    KEYS = {'ArrowLeft': [1, 0], 'ArrowRight': [0, 1]}

    TICS = 4
    CROP = (80, 40, 240, 200)  # left, top, right and bottom, of 320x240
    NEAREST, FARTHEST = 16.0, 752.0  # where the player can stand, across the corridor
    DANGER = 60  # a fireball that flies past at less than this is worth a step aside

    def __init__(self):
        vizdoom = extra('vizdoom')
        self.game = game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, 'take_cover.cfg'))
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        seen = vizdoom.GameVariable
        game.set_available_game_variables([seen.HEALTH, seen.POSITION_X, seen.POSITION_Y])
        game.set_objects_info_enabled(True)  # where fireballs are, for the explorer
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_doom_config_path(os.devnull)  # or it leaves a file of settings in this folder
        game.init()
        # a worker of a DataLoader ends without deleting it, and would leave the game running
        util.Finalize(self, game.close, exitpriority=0)

    def reset(self, seed):
        self.seed, self.taken = int(seed), []
        self.game.set_seed(self.seed % 2 ** 32)  # it takes no larger one
        self.game.new_episode()
        self.goal = None
        self.look()

    def look(self):
        """Remember what is seen now; after the end, the last picture stays."""
        self.over = self.game.is_episode_finished()
        if self.over:
            return
        seen = self.game.get_state()
        self.screen = seen.screen_buffer
        self.health, *self.pos = seen.game_variables
        self.fireballs = [(ball.position_x, ball.position_y) for ball in seen.objects
                          if ball.name == 'DoomImpBall']

    def step(self, action):
        """True if a fireball hit."""
        buttons = [bool(number > 0.5) for number in action]
        before = self.health
        self.taken.append(buttons[0] + 2 * buttons[1])
        if not self.over:
            self.game.make_action(buttons, self.TICS)
            self.look()
        return self.over or self.health < before

    def render(self, size):
        frame = Image.fromarray(self.screen).resize((size, size), Image.BOX, box=self.CROP)
        return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))

    def get_state(self):
        return np.array([self.seed, *self.taken], dtype=np.float64)

    def set_state(self, state):
        self.reset(state[0])
        for buttons in state[1:].astype(int):
            self.step([buttons & 1, buttons >> 1])

    def explore(self, rng):
        """Walk to a place, stand there for a while, and dodge two fireballs in three."""
        if self.goal is None or self.patience == 0:
            self.goal = rng.uniform(self.NEAREST, self.FARTHEST)
            self.patience = rng.integers(4, 24)
            self.dodges = rng.random() < 2 / 3
        self.patience -= 1
        x, y = self.pos
        way = self.goal - y
        near = [ball_y - y for ball_x, ball_y in self.fireballs
                if 0 < ball_x - x < 250 and abs(ball_y - y) < self.DANGER]
        if near and self.dodges:
            way = -100 * np.sign(near[0] or 1)
        if abs(way) < 20:
            return np.float32([0, 0])
        return np.float32([way > 0, way < 0])
