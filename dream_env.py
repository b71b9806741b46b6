"""A dream as a gymnasium environment, so that agents can be trained in it.

    env = DreamEnv(run.open_run(vars(run) | {'ckpt': 'out/wall'}))
    frame, info = env.reset(seed=0)         # uint8 [H,W,3], of the validation split
    frame, reward, terminated, truncated, info = env.step(env.action_space.sample())

The model dreams pictures only. The reward is NOT modelled: it is always 0.0, and no episode ends by
itself. Read from the frames what you reward, in a gymnasium.Wrapper, and end episodes with
gymnasium.wrappers.TimeLimit.
"""
import numpy as np

from configurator import extra
from controls import limits
from dream import open_dream, recorded_start

gymnasium = extra('gymnasium')


class DreamEnv(gymnasium.Env):
    """Observations: frames uint8 [H,W,3]. Actions: the dataset's numbers [A], held for a frame interval.

    opened: an OpenedRun, of run.py. options: those of diffusion.Sampler. What eta draws does not
    depend on reset's seed: it comes from torch's own generator.
    """
    metadata = {'render_modes': ['rgb_array'], 'render_fps': 10}

    def __init__(self, opened, render_mode='rgb_array', **options):
        self.render_mode = render_mode
        self.dream = open_dream(opened, **options)
        self.clips = opened.held_out(opened.context_frames)
        lowest, _, _, highest = limits(opened.action_meta(self.clips))
        self.action_space = gymnasium.spaces.Box(lowest, highest, dtype=np.float32)
        height, width = self.clips.pixels([0]).shape[-2:]
        self.observation_space = gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        clip = self.np_random.integers(len(self.clips))
        noise_seed = int(self.np_random.integers(2 ** 31))
        self.frame = self.dream.reset(*recorded_start(self.clips, clip), noise_seed)
        return self.render(), {}

    def step(self, action):
        """Numbers beyond the recorded ones, unknown to the model, are taken to their limits."""
        action = np.clip(action, self.action_space.low, self.action_space.high)
        self.frame = self.dream.step(action)
        return self.render(), 0.0, False, False, {'age': self.dream.age}

    def render(self):
        return np.ascontiguousarray(self.frame.transpose(1, 2, 0))
