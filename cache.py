"""The cached rollout: a causal model that runs each frame only as often as it changes.

A frame sees itself and the past only, so a finished frame looks the same for good. It is run once more when it is
finished, and its keys and values are kept; after that a denoising step costs only the frames that it moves.
"""
import math

import torch

CPU_PATCHES = 1024  # so many at a time of finished frames: on a CPU, what fits its own cache is a sixth faster


class KVCache:
    """Keys and values [B,P,heads,window,d] of one temporal block, for all frames of a window."""

    def __init__(self, window):
        self.window, self.k, self.v = window, None, None

    def update(self, places, k, v):
        """Put keys and values [B,P,heads,L,d] in their places [L]; returns those of the whole window."""
        if self.k is None:
            shape = (*k.shape[:-2], self.window, k.shape[-1])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.k.index_copy_(-2, places, k)
        self.v.index_copy_(-2, places, v)
        return self.k, self.v

    def expand(self, batch):
        """What was remembered of one row, for `batch` of them."""
        self.k = self.k.repeat(batch, 1, 1, 1, 1)
        self.v = self.v.repeat(batch, 1, 1, 1, 1)


class PlainModel:
    """The model as it is: the whole window at every step. It is what CachedModel has to equal."""

    def __init__(self, model):
        self.model = model

    def new_window(self):
        pass

    def __call__(self, x, t, action, moving):
        """What the model says of the frames `moving` (a slice) of a window x [B,F,C,H,W] at timesteps t [1,F]."""
        return self.model(x, t.expand(len(x), -1), action)[:, moving]


class CachedModel:
    """The same for less: the frames before `moving` are finished, and each of them is run once."""

    def __init__(self, model, shared_context=False):
        """shared_context: the frames before the first that moves are the same in all rows of the batch."""
        self.model, self.shared = model, shared_context
        self.cache = [KVCache(model.config.num_frames) if b.temporal else None for b in model.blocks]
        self.done = 0  # so many frames are remembered as they will stay

    def new_window(self):
        """The window slid: frames have other places, and the oldest they saw is gone, so all are run anew."""
        self.done = 0

    def __call__(self, x, t, action, moving):
        finished = moving.start
        if self.shared:
            only = action if action is None else action[:1]
            self.run(x[:1], t, only, slice(0, finished), skip=finished)
            for memory in filter(None, self.cache):
                memory.expand(len(x))
            self.shared, self.done = False, finished

        few = finished
        if x.device.type == 'cpu':
            few = max(1, CPU_PATCHES // (len(x) * math.prod(self.model.config.grid)))
        while finished - self.done > few:
            self.run(x, t, action, slice(self.done, self.done + few), skip=few)
            self.done += few
        out = self.run(x, t, action, slice(self.done, moving.stop), skip=finished - self.done)
        self.done = finished
        return out

    def run(self, x, t, action, frames, skip):
        places = torch.arange(frames.start, frames.stop, device=x.device)
        return self.model(x[:, frames], t[:, frames], action, cache=self.cache, places=places, skip=skip)
