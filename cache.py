"""The cached rollout: a causal model that runs each frame only as often as it changes.

A frame sees itself and the past only. So once it is finished, its keys and values in every temporal
block never change: the frame is run one last time, and they are kept. From then on a denoising step
costs only the frames that it moves.
"""
import math

import torch

CPU_PATCHES = 1024  # run finished frames so many patches at a time: a sixth faster, as they fit into L2


class KVCache:
    """Keys and values [B,P,heads,window,d] of one temporal block, for all frames of a window."""

    def __init__(self, window):
        self.window, self.k, self.v = window, None, None

    def update(self, places, k, v):
        """Put keys and values [B,P,heads,L,d] in their places [L]; returns the whole window's."""
        if self.k is None:
            shape = (*k.shape[:-2], self.window, k.shape[-1])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.k.index_copy_(-2, places, k)
        self.v.index_copy_(-2, places, v)
        return self.k, self.v

    def repeat_rows(self, batch):
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
        """The network's output for the frames `moving`, a slice of the window x [B,F,C,H,W].

        t [1,F]: the timesteps at which frames are shown. action [B,F,A] or None.
        """
        return self.model(x, t, action)[:, moving]


class CachedModel:
    """The same for less: runs the frames that move, and each once more when it is finished."""

    def __init__(self, model, shared_context=False):
        """shared_context: the frames before the first that moves are the same in all rows."""
        self.model, self.shared_context = model, shared_context
        window = model.config.num_frames
        self.cache = [KVCache(window) if block.temporal else None for block in model.blocks]
        self.finished = 0

    def new_window(self):
        """The window slid: frames have other places, and no longer see the oldest one."""
        self.finished = 0

    def __call__(self, x, t, action, moving):
        """As PlainModel's. The first self.finished frames are in the cache for good; those from there
        to the first moving one have just been finished, and enter it now; the moving ones are written
        too, and overwritten at their next step."""
        start = moving.start
        if self.shared_context:
            self.fill_from_one_row(x, t, action, start)
        chunk = start
        if x.device.type == 'cpu':
            chunk = max(1, CPU_PATCHES // (len(x) * math.prod(self.model.config.grid)))
        while start - self.finished > chunk:
            self.run(x, t, action, slice(self.finished, self.finished + chunk), skip=chunk)
            self.finished += chunk
        frames = slice(self.finished, moving.stop)
        out = self.run(x, t, action, frames, skip=start - self.finished)
        self.finished = start
        return out

    def fill_from_one_row(self, x, t, action, stop):
        """What all rows share is run for the first only."""
        row_action = None if action is None else action[:1]
        self.run(x[:1], t, row_action, slice(0, stop), skip=stop)
        for block_cache in self.cache:
            if block_cache:  # blocks in space have none
                block_cache.repeat_rows(len(x))
        self.finished, self.shared_context = stop, False

    def run(self, x, t, action, frames, skip):
        places = torch.arange(frames.start, frames.stop, device=x.device)
        return self.model(x[:, frames], t[:, frames], action, cache=self.cache, places=places,
                          skip=skip)
