"""The engine for playing: a dream that goes on frame by frame, each one after the action that it answers.

    dream = open_dream(opened)                 # an OpenedRun, of run.py
    dream.reset(frames, actions)               # what is known: frames as a dataset stores them
    frame = dream.step([0.1, 0.0])             # uint8 [3,H,W], as often as you like

It is the rollout of Diffusion.sample, schedule='sequential', cut at each new frame: of a causal
model the same noise gives the same video. The KV cache is kept until the window is full; then the
window slides, for as long as one plays, and nothing grows.
"""
import numpy as np
import torch

from cache import CachedModel, PlainModel
from configurator import UserError
from data import to_model
from diffusion import Sampler
from machine import autocast
from pictures import to_pixels


class Dream:
    """One dream of a model; several may share the model.

    sampler: a diffusion.Sampler, which may be replaced between two steps. Its schedule does not
    matter: each new frame is denoised alone. vae: decodes what the model dreams, None for pixels.
    action_scale, interval: mean and std of the dataset's numbers and frame_interval, as the
    checkpoint has them; actions are given in those numbers.
    """

    def __init__(self, model, diffusion, sampler, vae=None, dtype='fp32', action_scale=(0, 1),
                 interval=1):
        self.model, self.diffusion, self.sampler = model, diffusion, sampler
        self.vae, self.dtype, self.action_scale = vae, dtype, np.float32(action_scale)
        config = model.config
        self.per_frame = interval, config.action_dim // interval  # shape of a whole frame's action
        self.device = model.pos_embed.device
        shape = (1, config.num_frames, config.in_channels, *config.input_size)
        self.generator = torch.Generator()  # on the CPU: the same noise on every device
        # the window: its frames, the noise that a known one is shown with, and how much of that
        self.frames = torch.zeros(shape, device=self.device)
        self.noise = torch.zeros(shape, device=self.device)
        self.levels = torch.zeros(shape[:2], dtype=torch.long, device=self.device)
        self.actions = torch.zeros(*shape[:2], config.action_dim, device=self.device)
        self.drawn = torch.zeros(2, *shape[2:])

    def reset(self, frames, actions=None, seed=0):
        """Start from frames [K,C,H,W] as stored and the actions [K-1,...] between them.

        Of more frames than the window holds, the last count. Returns the last, as uint8 [3,H,W].
        Raises UserError.
        """
        window = self.model.config.num_frames
        self.sampler.kept(window)  # refuses a history that is too long
        frames = to_model(torch.as_tensor(frames), self.device)
        actions = [] if actions is None else actions
        if len(actions) != len(frames) - 1 and self.model.config.action_dim:
            raise UserError(f'{len(frames)} frames and {len(actions)} actions: expected an action '
                            'between each frame and the next')
        self.generator.manual_seed(seed)
        self.known = min(len(frames), window)
        self.full = window  # frames in the window when it has to slide
        self.age = 0  # frames dreamed since
        self.frames[0, :self.known] = frames[-self.known:]
        for i in range(len(frames)):
            self.draw_noise(max(0, i - len(frames) + self.known))
        if self.known > 1:
            for place, action in enumerate(actions[1 - self.known:]):
                self.actions[0, place] = self.scaled(action)
        cached = self.sampler.cache and self.model.config.causal
        self.net = CachedModel(self.model) if cached else PlainModel(self.model)
        self.make_context()
        return self.picture(self.known - 1)

    @torch.no_grad()
    def step(self, action):
        """Do what the action says and dream the frame that follows: uint8 [3,H,W].

        action: the dataset's numbers [A], held for a frame interval, or [frame_interval,A].
        Raises UserError.
        """
        action = self.scaled(action)
        if self.known == self.full:
            self.slide()
        self.actions[0, self.known - 1] = action
        new, self.known = self.known, self.known + 1
        self.frames[0, new] = self.draw_noise(new)
        with autocast(self.device, self.dtype):
            window = self.diffusion.denoise(
                self.net, self.frames[:, :self.known], self.actions[:, :self.known],
                self.levels[:, :new], self.noise[:, :new], self.sampler)
        self.frames[0, new] = window[0, new]
        self.levels[0, new] = -1  # what was dreamed in this window is shown as it is
        self.age += 1
        return self.picture(new)

    def slide(self):
        """Keep the last `history` frames as context. They have other places now, and are run anew."""
        history = self.sampler.kept(self.model.config.num_frames)
        kept = slice(self.known - history, self.known)
        for buffer in (self.frames, self.noise, self.actions):
            buffer[:, :history] = buffer[:, kept].clone()
        self.known, self.full = history, history + 1
        self.net.new_window()
        self.make_context()

    def make_context(self):
        self.levels[:, :self.known] = self.diffusion.context_levels(self.known, self.sampler)

    def draw_noise(self, place):
        """For the frame at this place: what it is shown with and, returned, what it is made from."""
        torch.randn(self.drawn.shape, generator=self.generator, out=self.drawn)
        self.noise[0, place] = self.drawn[1]
        return self.drawn[0]

    def scaled(self, action):
        """An action as the model counts it: [frame_interval * A]."""
        mean, std = self.action_scale
        action = np.asarray(action, dtype=np.float32)
        if action.shape not in (self.per_frame, self.per_frame[1:]):
            raise UserError(f'an action of shape {list(action.shape)}: expected '
                            f'{list(self.per_frame[1:])} or {list(self.per_frame)}')
        scaled = (np.broadcast_to(action, self.per_frame) - mean) / std
        return torch.from_numpy(scaled).flatten()

    def picture(self, place):
        pixels = to_pixels(self.frames[:, place], self.vae)[0]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def open_dream(opened, **options):
    """A Dream of an OpenedRun; options of diffusion.Sampler take the place of the run's."""
    sampler = Sampler(**dict(num_steps=opened.num_steps) | opened.sampler | options)
    return Dream(opened.model, opened.diffusion, sampler, opened.vae, opened.dtype,
                 opened.config['action_scale'], opened.config['frame_interval'])


def recorded_start(clips, number):
    """Clip `number` of a data.Clips, for Dream.reset: frames [K,...], actions [K-1,interval,A]."""
    first = clips.first_rows([number])[0][0]
    rows = first + np.arange(clips.num_frames * clips.interval).reshape(-1, clips.interval)
    return clips.frames[rows[:, 0]], clips.actions[rows[:-1]]
