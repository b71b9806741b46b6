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


def rotate(x, cos, sin):
    """Rotate x [..., L, d] by tables [L, d/2]; the pairs are the first half of d with the second half."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


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

    def forward(self, x, rope, temporal, causal):
        B, N, P, D = x.shape  # N frames
        qkv = self.qkv(x).view(B, N, P, 3, self.num_heads, -1)
        # the axis attended over goes next to last, everything before the heads is batch
        qkv = qkv.permute(3, 0, 2, 4, 1, 5) if temporal else qkv.permute(3, 0, 1, 4, 2, 5)
        qkv = qkv.float() if x.device.type == 'cpu' else qkv  # attention on a CPU is slower in bf16
        q, k, v = qkv.flatten(1, 2)  # [B*P, heads, N, d] or [B*N, heads, P, d]
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        with torch.autocast('cpu', enabled=False):
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x.unflatten(0, (B, -1))
        x = x.permute(0, 3, 1, 2, 4) if temporal else x.permute(0, 1, 3, 2, 4)
        return self.proj(x.reshape(B, N, P, D))


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

    def forward(self, x, a, causal):
        B, N, P, D = x.shape
        k, v = self.kv(a).chunk(2, dim=-1)  # [B,F,D], once per frame, shared by all patches
        if not self.temporal:
            return self.proj(v)[:, :, None]  # a frame's own action is all there is to see
        heads = lambda z: z.view(B, -1, self.num_heads, D // self.num_heads).transpose(1, 2)  # noqa: E731
        frame = torch.arange(N, device=x.device)
        mask = frame.repeat_interleave(P)[:, None] >= frame if causal else None  # [F*P, F]
        x = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v), attn_mask=mask)
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
        self.causal = temporal and config.causal
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

    def forward(self, x, c, a, rope):
        """x [B,F,P,D] patches, c [B,F,D] noise level, a [B,F,D] action; returns x."""
        norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)  # noqa: E731
        if self.injection == 'additive':
            x = x + a[:, :, None]
        mod = self.adaLN_modulation(c + a if self.injection == 'adaln_fuse' else c)
        if self.injection == 'adaln':
            mod = mod + self.action_adaLN_modulation(a)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod[:, :, None].chunk(6, dim=-1)  # each [B,F,1,D]

        x = x + gate1 * self.attn(modulate(norm(x), shift1, scale1), rope, self.temporal, self.causal)
        if self.injection == 'film':
            gamma, beta = self.film_modulation(a)[:, :, None].chunk(2, dim=-1)
            x = modulate(x, beta, gamma)
        x = x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))
        if self.injection == 'cross_attention':
            x = x + self.cross_gate * self.cross_attn(norm(x), a, self.causal)
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
            self.register_buffer(f'{name}_cos', angles.cos(), persistent=False)
            self.register_buffer(f'{name}_sin', angles.sin(), persistent=False)
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

    def forward(self, x, t, action=None):
        """What the network says of noisy frames; the prediction target decides what that means.

        x: [B,F,C,H,W] frames, F <= num_frames, each at its own noise level.
        t: [B,F] integer timestep of each frame; -1 means clean and is shown as 0.
        action: [B,F,A] or None. action[:, f] is done at frame f and so conditions frame f+1.
        Returns [B,F,C,H,W].
        """
        B, N, C = x.shape[:3]
        (rows, cols), p, D = self.config.grid, self.config.patch_size, self.config.hidden_size
        x = self.x_embedder.proj(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (B, N))
        x = x + self.pos_embed  # [B,F,P,D]

        freqs = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        angles = t.clamp(min=0)[..., None].float() * freqs
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))  # [B,F,D]
        a = x.new_zeros(B, N, D)  # nothing was done before frame 0
        if action is not None and self.config.action_dim:
            a = torch.cat([a[:, :1], self.action_embedder(action[:, :N - 1])], dim=1)

        space, time = (self.space_cos, self.space_sin), (self.time_cos[:N], self.time_sin[:N])
        for i, block in enumerate(self.blocks):
            if i == 1:  # rotary angles know distances in time, this knows the place in the clip
                x = x + self.temp_embed[:, :N, None]
            x = block(x, c, a, time if block.temporal else space)

        x = self.final_layer(x, c).view(B, N, rows, cols, p, p, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, N, C, rows * p, cols * p)

    def flops(self):
        """Multiply-adds of one clip's forward pass, times two; a training step is three of these."""
        cfg, N, D, P = self.config, self.config.num_frames, self.config.hidden_size, math.prod(self.config.grid)
        per_frame = sum(2 * p.numel() for name, p in self.named_parameters() if p.ndim == 2 and 'modulation' in name)
        per_token = 2 * 2 * cfg.patch_size ** 2 * cfg.in_channels * D
        for b in self.blocks:
            keys = P if not b.temporal else (N + 1) / 2 if b.causal else N
            per_token += 2 * 16 * D * D + 4 * D * keys
            if b.injection == 'cross_attention' and b.temporal:
                per_token += 2 * 2 * D * D + 4 * D * (N + 1) / 2
        return N * (per_frame + P * per_token)
