"""Muon, the optimizer of the blocks' matrices (Jordan et al. 2024).

A gradient's momentum is a matrix of a few strong directions and many weak ones. Muon takes a step of
the same length along each: it replaces the momentum's singular values by ones. torch.optim.Muon does
so for one matrix at a time; here all matrices of a shape go through the Newton-Schulz iteration
together, which on a CPU takes a third of the time.
"""
import math
from collections import defaultdict

import torch

from machine import DTYPES, fast_dtype

NEWTON_SCHULZ_STEPS = 5
# chosen to make small singular values grow fast, not to end at exactly one
COEFFICIENTS = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """For matrices only, whole ones (not FSDP's parts). Updates are scaled so that a learning rate of
    AdamW's suits them (Liu et al. 2025)."""

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):  # torch passes one, None, when it restores a run
        for group in self.param_groups:
            weights = [p for p in group['params'] if p.grad is not None]
            gradients = [p.grad for p in weights]
            momenta = [self.momentum_of(p) for p in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
            updates = torch._foreach_lerp(gradients, momenta, group['momentum'])  # Nesterov's

            by_shape = defaultdict(list)
            for p, update in zip(weights, updates, strict=True):
                by_shape[p.shape].append((p, update))
            for shape, pairs in by_shape.items():
                matrices, updates = zip(*pairs, strict=True)
                updates = orthogonal(torch.stack(updates)).to(matrices[0].dtype)
                torch._foreach_mul_(matrices, 1 - group['lr'] * group['weight_decay'])
                step = 0.2 * math.sqrt(max(shape)) * group['lr']
                torch._foreach_add_(matrices, updates.unbind(), alpha=-step)

    def momentum_of(self, p):
        state = self.state[p]
        if not state:
            state['momentum_buffer'] = torch.zeros_like(p)
        return state['momentum_buffer']


def orthogonal(x):
    """Matrices [N,rows,cols] with their singular values brought near one, most to between 0.7 and 1.2."""
    if x.shape[1] > x.shape[2]:  # the products are of the shorter side
        return orthogonal(x.mT).mT
    x = x.to(DTYPES[fast_dtype()])
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most one
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):  # each singular value s becomes a s + b s^3 + c s^5
        xx = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x
