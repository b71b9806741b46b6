"""The world model: a DiT over space and time that denoises every frame of a clip at that frame's own noise level.

Blocks alternate between space (even: attention among the patches of one frame) and time (odd: attention among the
frames of one patch position, causal). The noise level and the action reach every block once per frame, and are
broadcast over that frame's patches. Read `NanoWM.forward` first, then `Block`, then `Attention`.

DiT: Peebles & Xie 2023 (arXiv 2212.09748). Diffusion forcing: Chen et al. 2024 (arXiv 2407.01392).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

INJECTIONS = ('additive', 'adaln', 'adaln_fuse', 'film', 'cross_attention')
SIZES = {  # B/2 in the tables is size B with patch_size 2
    'S': dict(depth=12, hidden_size=384, num_heads=6),
    'B': dict(depth=12, hidden_size=768, num_heads=12),
    'L': dict(depth=24, hidden_size=1024, num_heads=16),
    'XL': dict(depth=28, hidden_size=1152, num_heads=16),
}


@dataclass
class NanoWMConfig:
    """Shape of a model. `NanoWMConfig(**SIZES['B'])` is the B/2 of the tables, on 4x32x32 latents."""
    input_size: int | tuple[int, int] = 32  # height and width of a frame, in latents or pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    depth: int = 12  # blocks, spatial and temporal together
    num_heads: int = 12
    num_frames: int = 4  # the longest clip the model sees at once
    action_dim: int = 7  # numbers per frame; 0 for a model without actions
    injection: str = 'additive'  # how the action enters: one of INJECTIONS
    causal: bool = True  # a frame sees itself and the past only

    def __post_init__(self):
        if self.depth < 2:
            raise ValueError(f'depth={self.depth}: expected 2 or more, a block for space and one for time')
        size = self.input_size
        self.input_size = (size, size) if isinstance(size, int) else tuple(size)
        if self.injection not in INJECTIONS:
            raise ValueError(f'injection={self.injection!r}: expected one of {", ".join(INJECTIONS)}')
        if any(s % self.patch_size for s in self.input_size):
            raise ValueError(f'input_size={self.input_size} does not divide into patches of {self.patch_size}')
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f'hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={4 * self.num_heads}')

    @property
    def grid(self):
        """Patches per frame as (rows, columns)."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size


# -----------------------------------------------------------------------------
# rotary position: rotate pair i of a head by position * frequency_i, so that q.k depends on distances only

def rope_angles(positions, num_freqs):
    """Angles [len(positions), num_freqs] of positions at frequencies 10000^(-i/num_freqs) (Su et al. 2021)."""
    return positions[:, None].float() * 10000 ** (-torch.arange(num_freqs) / num_freqs)


def rope_tables(angles):
    """(cos, sin) [L, d] for `rotate` from angles [L, d/2]; the first half of sin is negated."""
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)


def rotate(x, cos, sin):
    """Rotate x [..., d] by tables that broadcast to it; the pairs are the first half of d with the second half."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


def modulate(x, shift, scale):
    """The adaLN of one frame's patches: x [B,F,P,D] with shift, scale [B,F,1,D]."""
    return x * (1 + scale) + shift


# -----------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """Stays in the dtype of its input under autocast, where the fused kernel wants its weight too."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention over the patches of a frame (spatial) or over the frames of a patch position (temporal)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.k_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope, temporal, mask=None, cache=None, frame=None, skip=0):
        """x [B,N,P,D] of N frames -> [B,N-skip,P,D]. mask [N,K] is for time; without a cache: the causal one."""
        B, N, P, D = x.shape
        qkv = self.qkv(x).view(B, N, P, 3, self.num_heads, D // self.num_heads)
        qkv = qkv.float() if x.device.type == 'cpu' else qkv  # attention on a CPU is slower in bf16
        q, k, v = qkv.unbind(3)  # [B,N,P,heads,d]: views, so nothing is copied until the product
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        # the axis attended over goes next to last, everything before the heads is batch
        q, k, v = (z.permute((0, 2, 3, 1, 4) if temporal else (0, 1, 3, 2, 4)) for z in (q, k, v))
        if cache:
            q, mask, (k, v) = q[:, :, :, skip:], mask[skip:], remember(cache[:2], frame, k, v)
        with torch.autocast('cpu', enabled=False):
            if temporal and x.device.type == 'cpu':  # thousands of tiny problems: plain products are faster there
                score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
                x = (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(dim=-1) @ v
            else:
                q, k, v = (z.flatten(0, 1) for z in (q, k, v))
                x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if cache else None,
                                                   is_causal=mask is not None and not cache).unflatten(0, (B, -1))
        return self.proj(x.permute((0, 3, 1, 2, 4) if temporal else (0, 1, 3, 2, 4)).flatten(3))


def remember(cache, frame, *new):
    """Write keys and values [...,n,d] of frames `frame` [n] over their places in the cache; returns all of it."""
    return [z.index_copy_(-2, frame, x.to(z.dtype)) for z, x in zip(cache, new, strict=True)]


class CrossAttention(nn.Module):
    """Patches ask, actions answer: x [B,F,P,D] attends to the action embeddings a [B,F,D]."""

    def __init__(self, dim, num_heads, temporal):
        super().__init__()
        self.num_heads, self.temporal = num_heads, temporal
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if not temporal:  # one key: its softmax is 1 whatever the query, so q is there only for the checkpoint's names
            self.q.requires_grad_(False)

    def forward(self, x, a, mask=None, cache=None, frame=None):
        B, N, P, D = x.shape
        k, v = self.kv(a).chunk(2, dim=-1)  # [B,F,D], once per frame, shared by all patches
        if not self.temporal:
            return self.proj(v)[:, :, None]  # a frame's own action is all there is to see
        heads = lambda z: z.unflatten(-1, (self.num_heads, D // self.num_heads)).transpose(1, -2)  # noqa: E731
        q, k, v = heads(self.q(x).flatten(1, 2)), heads(k), heads(v)
        if cache:
            k, v = (z.to(q.dtype) for z in remember(cache[2:], frame, k, v))
        mask = mask if mask is None else mask[-N:].repeat_interleave(P, dim=0)  # [F*P, frames]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(B, N, P, D))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the frame's noise level (adaLN-Zero)."""

    def __init__(self, config, temporal):
        super().__init__()
        D = config.hidden_size
        self.injection, self.temporal = config.injection, temporal
        self.attn = Attention(D, config.num_heads)
        self.mlp = SwiGLU(D, 4 * D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        if self.injection == 'adaln':
            self.action_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        elif self.injection == 'film':
            self.film_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        elif self.injection == 'cross_attention':
            self.cross_attn = CrossAttention(D, config.num_heads, temporal)
            self.cross_gate = nn.Parameter(torch.ones(D))

    def forward(self, x, c, a, rope, mask=None, cache=None, frame=None, skip=0):
        """x [B,F,P,D] patches, c [B,F,D] noise level, a [B,F,D] action; returns x without its first `skip` frames.

        mask [F,K] (time only) says which of the K frames each frame sees; cache and frame are NanoWM.forward's.
        """
        norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)  # noqa: E731
        if self.injection == 'additive':
            x = x + a[:, :, None]
        mod = self.adaLN_modulation(c + a if self.injection == 'adaln_fuse' else c)
        if self.injection == 'adaln':
            mod = mod + self.action_adaLN_modulation(a)
        shift, scale = mod[:, :, None].chunk(6, dim=-1)[:2]  # each [B,F,1,D]
        h = self.attn(modulate(norm(x), shift, scale), rope, self.temporal, mask, cache, frame, skip)
        x, mod = x[:, skip:], mod[:, skip:]  # the others only had to be seen
        gate1, shift2, scale2, gate2 = mod[:, :, None].chunk(6, dim=-1)[2:]

        x = x + gate1 * h
        if self.injection == 'film':
            gamma, beta = self.film_modulation(a[:, skip:])[:, :, None].chunk(2, dim=-1)
            x = modulate(x, beta, gamma)
        x = x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))
        if self.injection == 'cross_attention':
            x = x + self.cross_gate * self.cross_attn(norm(x), a, mask, cache, frame)
        return x


class PatchEmbedder(nn.Module):
    """A convolution; a module of its own for the name that its weights have in checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the timestep's sinusoids and for the action."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x):
        return self.mlp(x)


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, config.patch_size ** 2 * config.in_channels)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, :, None].chunk(2, dim=-1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class NanoWM(nn.Module):
    """Causal space-time diffusion transformer over clips of frames."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, d, (rows, cols) = config.hidden_size, config.hidden_size // config.num_heads, config.grid
        self.x_embedder = PatchEmbedder(config)
        self.pos_embed = nn.Parameter(torch.randn(1, rows * cols, D) * 0.02)
        self.temp_embed = nn.Parameter(torch.randn(1, config.num_frames, D) * 0.02)
        self.t_embedder = Embedder(256, D)
        if config.action_dim:
            self.action_embedder = Embedder(config.action_dim, D)
        self.blocks = nn.ModuleList(Block(config, temporal=i % 2 == 1) for i in range(config.depth))
        self.final_layer = FinalLayer(config)

        # rotary tables: half of a head's pairs turn with the row, half with the column; in time, all with the frame
        row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
        space = torch.cat([rope_angles(row, d // 4), rope_angles(col, d // 4)], dim=1)
        time = rope_angles(torch.arange(config.num_frames), d // 2)
        for name, angles in (('space', space), ('time', time)):
            cos, sin = rope_tables(angles)
            self.register_buffer(f'{name}_cos', cos, persistent=False)
            self.register_buffer(f'{name}_sin', sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))  # a patch convolution is a Linear on flat patches
                nn.init.zeros_(m.bias) if m.bias is not None else None
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        # adaLN-Zero: what gates or outputs a branch starts at zero
        zero = [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for b in self.blocks:
            zero.append(b.adaLN_modulation[1])
            if b.injection == 'adaln':
                zero.append(b.action_adaLN_modulation[1])
            elif b.injection == 'film':
                zero.append(b.film_modulation[1])
            elif b.injection == 'cross_attention':
                zero.append(b.cross_attn.proj)  # only this one: with cross_gate zero too, neither would get a gradient
        for m in zero:
            nn.init.zeros_(m.weight)

    def new_cache(self, batch):
        """Room for the keys and values of a whole window: for every temporal block [k, v] of its frames, each
        [batch,P,heads,num_frames,d], and with cross_attention also [k, v] of its actions, [batch,heads,num_frames,d].
        """
        cfg, weight = self.config, self.pos_embed
        autocast = weight.device.type != 'cpu' and torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        dtype = torch.float32 if weight.device.type == 'cpu' else dtype  # as Attention has it there
        place = cfg.num_heads, cfg.num_frames, cfg.hidden_size // cfg.num_heads
        shapes = [(batch, math.prod(cfg.grid), *place)] * 2
        shapes += [(batch, *place)] * 2 if cfg.injection == 'cross_attention' else []
        return [[torch.zeros(s, dtype=dtype, device=weight.device) for s in shapes] for _ in range(cfg.depth // 2)]

    def forward(self, x, t, action=None, cache=None, frame=None, skip=0):
        """What the network says of noisy frames; the prediction target decides what that means.

        x: [B,F,C,H,W] frames, F <= num_frames, each at its own noise level.
        t: [B,F] or [1,F] integer timestep of each frame; -1 means clean and is shown as 0.
        action: [B,N,A] of the window, or None. action[:, f] is done at frame f and so conditions frame f+1.
        cache: of new_cache, for a causal model: x are then only the frames at places `frame` [F], consecutive; they
            see themselves and what the cache remembers of the frames before, and are remembered in turn.
        skip: with a cache, the first frames of x that only have to be remembered.
        Returns [B,F-skip,C,H,W].
        """
        B, N, C = x.shape[:3]
        (rows, cols), p = self.config.grid, self.config.patch_size
        x = self.x_embedder.proj(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (B, N))
        x = x + self.pos_embed  # [B,F,P,D]

        freqs = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        angles = t.clamp(min=0)[..., None].float() * freqs
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))  # [B,F,D]
        frame = torch.arange(N, device=x.device) if frame is None else frame
        a = x.new_zeros(B, N, x.shape[-1])
        if action is not None and self.config.action_dim:  # nothing was done before frame 0
            a = self.action_embedder(action[:, frame - 1]).masked_fill((frame == 0)[:, None], 0)

        seen = torch.arange(self.config.num_frames if cache else N, device=x.device)
        mask = frame[:, None] >= seen if self.config.causal else None
        space = self.space_cos[:, None], self.space_sin[:, None]  # [P,1,d]
        time = self.time_cos[frame, None, None], self.time_sin[frame, None, None]  # [F,1,1,d]
        last = len(self.blocks) // 2 * 2 - 1  # the last temporal block; after it a frame is of no use to others
        for i, block in enumerate(self.blocks):
            if i == 1:  # rotary angles know distances in time, this knows the place in the clip
                x = x + self.temp_embed[:, frame, None]
            if block.temporal:
                x = block(x, c, a, time, mask, cache and cache[i // 2], frame, skip if i == last else 0)
            else:
                x = block(x, c, a, space)
            if i == last:
                c, a = c[:, skip:], a[:, skip:]

        x = self.final_layer(x, c).view(B, N - skip, rows, cols, p, p, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, N - skip, C, rows * p, cols * p)

    def flops(self):
        """Multiply-adds of one clip's forward pass, times two; a training step is three of these."""
        cfg, N, D, P = self.config, self.config.num_frames, self.config.hidden_size, math.prod(self.config.grid)
        per_frame = sum(2 * p.numel() for name, p in self.named_parameters() if p.ndim == 2 and 'modulation' in name)
        per_token = 2 * 2 * cfg.patch_size ** 2 * cfg.in_channels * D
        for b in self.blocks:
            keys = P if not b.temporal else (N + 1) / 2 if cfg.causal else N
            per_token += 2 * 16 * D * D + 4 * D * keys
            if b.injection == 'cross_attention' and b.temporal:
                per_token += 2 * 2 * D * D + 4 * D * keys
        return N * (per_frame + P * per_token)
