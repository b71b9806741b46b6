"""The world model: a DiT over space and time that denoises each frame at that frame's own noise level.

Blocks alternate between space (even: attention among the patches of one frame) and time (odd:
attention among the frames of one patch position, causal). The noise level and the action reach
every block once per frame, and are broadcast over that frame's patches. Read `NanoWM.forward`
first, then `Block`, then `Attention`. On a first reading ignore `cache`, `places`, `skip` and
`remember`, which serve cache.py.

Shapes: B clips, F frames, P patches per frame, D hidden size, d = D / heads, A numbers per action.
Parameters carry the names of the reference's checkpoints (arXiv 2605.23993).
DiT: Peebles & Xie 2023 (arXiv 2212.09748). Diffusion forcing: Chen et al. 2024 (arXiv 2407.01392).
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, check_choice

SIZES = {  # NanoWM-B/2 is size B with patch_size 2
    'S': dict(depth=12, hidden_size=384, num_heads=6),
    'B': dict(depth=12, hidden_size=768, num_heads=12),
    'L': dict(depth=24, hidden_size=1024, num_heads=16),
    'XL': dict(depth=28, hidden_size=1152, num_heads=16),
}


@dataclass
class NanoWMConfig:
    """Shape of a model. `NanoWMConfig(**SIZES['B'])` is NanoWM-B/2, on 4x32x32 latents."""
    input_size: int | tuple[int, int] = 32  # height and width of a frame, in latents or pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    depth: int = 12  # blocks, spatial and temporal together
    num_heads: int = 12
    num_frames: int = 4  # the window: the longest clip the model sees at once
    action_dim: int = 7  # numbers per frame of the model; 0 for one without actions
    injection: str = 'additive'  # how the action enters: one of INJECTIONS
    causal: bool = True  # a frame sees itself and the past only
    zero_cross_gate: bool = False  # start cross_attention as the reference does: deaf to actions

    def __post_init__(self):
        size = self.input_size
        self.input_size = (size, size) if isinstance(size, int) else tuple(size)
        check_choice('injection', self.injection, INJECTIONS)
        if self.depth < 2:
            raise UserError(f'depth={self.depth}: expected 2 or more, one for space and one for time')
        if any(side % self.patch_size for side in self.input_size):
            raise UserError(f'input_size={self.input_size} does not divide into patches of '
                            f'{self.patch_size}')
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(f'hidden_size={self.hidden_size} must be a multiple of '
                            f'4 * num_heads={4 * self.num_heads}')

    @property
    def grid(self):
        """Patches per frame as (rows, columns)."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size


# -----------------------------------------------------------------------------
# small parts

def modulate(x, shift, scale):
    """The affine half of adaLN: x [B,F,P,D] with shift, scale [B,F,1,D] for all patches of a frame."""
    return x * (1 + scale) + shift


def norm(x):
    """The other half: LayerNorm without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulation(dim, num_chunks):
    """From a frame's embedding to shifts, scales and gates; it starts at zero (adaLN-Zero)."""
    return nn.Sequential(nn.SiLU(), ZeroLinear(dim, num_chunks * dim))


class ZeroLinear(nn.Linear):
    """A Linear that NanoWM.init_weights sets to zero: what it gates or outputs starts at zero."""


class RMSNorm(nn.RMSNorm):
    """One that keeps its input's dtype under autocast; the fused kernel wants the weight in it too."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def by_patch(x):
    """x [B,F,P,D] of frames -> [B,P,F,D] of patch positions, as attention in time wants it.

    Copied: on a view, and without gradients, torch runs a Linear as many small products, and in bf16
    casts the weight for each: two thirds of a dream's time on a CPU. On a copy it is one product.
    """
    return x.transpose(1, 2).contiguous()


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the timestep's sinusoids and for the action."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x):
        return self.mlp(x)


class PatchEmbedder(nn.Module):
    """A frame [C,H,W] becomes patches [P,D]: one convolution whose stride is its kernel."""

    def __init__(self, config):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x):
        B = x.shape[0]
        x = self.proj(x.flatten(0, 1))  # [B*F, D, rows, cols]
        return x.flatten(2).transpose(1, 2).unflatten(0, (B, -1))


class FinalLayer(nn.Module):
    """Patches [B,F,P,D] become frames again."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.adaLN_modulation = modulation(config.hidden_size, 2)
        self.linear = ZeroLinear(config.hidden_size, config.patch_size ** 2 * config.in_channels)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, :, None].chunk(2, dim=-1)
        x = self.linear(modulate(norm(x), shift, scale))
        (rows, cols), p = self.config.grid, self.config.patch_size
        x = x.unflatten(-1, (p, p, -1)).unflatten(2, (rows, cols))  # [B,F,rows,cols,p,p,C]
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # [B,F,C,rows,p,cols,p]
        return x.flatten(5, 6).flatten(3, 4)  # [B,F,C,H,W]


def sinusoids(t):
    """Timesteps [B,F] at 128 frequencies, [cos | sin]: [B,F,256]."""
    frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# -----------------------------------------------------------------------------
# rotary position: turn pair i of a head by position * frequency_i, so that q.k depends on distances

def rope_angles(positions, num_freqs):
    """Angles [len(positions), num_freqs] at frequencies 10000^(-i/num_freqs) (Su et al. 2021)."""
    return positions[:, None].float() * 10000 ** (-torch.arange(num_freqs) / num_freqs)


def rope_tables(angles):
    """cos and sin, as one [2,L,d], for `rotate` from angles [L,d/2]; half of sin is negated."""
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)])


def rotate(x, cos, sin):
    """Turn x [...,L,d]: pair (a, b) becomes (a cos - b sin, b cos + a sin).

    a is from the first half of d, b from the second; rolling by half a head swaps them.
    """
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


# -----------------------------------------------------------------------------
# attention

@dataclass
class Axis:
    """What attention has to know of its axis besides x: space (patches of a frame) or time (frames)."""
    rope: tuple  # cos and sin [L,d] of the L positions that x has along the axis
    mask: torch.Tensor = None  # [L,W], true where a position sees another of W; None is everywhere
    is_causal: bool = False  # the mask is a lower triangle: fused kernels have that one built in
    actions: torch.Tensor = None  # time: [B,K,D] embedded, of the window's first K <= W frames
    places: torch.Tensor = None  # time: [L], which frames of the window x has

    def __getitem__(self, part):
        """The same for a slice of the frames."""
        cos, sin = self.rope
        return Axis((cos[part], sin[part]), self.mask[part], False, self.actions, self.places[part])


def attend(q, k, v, axis):
    """softmax(q k' / sqrt(d)) v for q [B,N,heads,L,d] and k, v [B,N,heads,K,d]."""
    mask = axis.mask
    if mask is not None and q.device.type == 'cpu':
        # in time, thousands of problems of a few frames each: plain products beat the fused kernel
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v
    if axis.is_causal:
        mask = None  # the kernel takes one or the other
    B = len(q)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # fused kernels want 4 dimensions
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=axis.is_causal)
    return out.unflatten(0, (B, -1))


class Attention(nn.Module):
    """Self-attention along L of x [B,N,L,D]: frames do not see each other in space (N = F, L = P),
    nor patch positions in time (N = P, L = F)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.k_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x, parts):
        """[B,N,L,parts*D] -> as many tensors [B,N,heads,L,d]."""
        x = x.unflatten(-1, (parts, self.num_heads, -1))
        if x.device.type == 'cpu':
            x = x.float()  # attention on a CPU is slower in bf16
        return x.transpose(2, 4).unbind(3)

    def forward(self, x, axis, cache=None):
        q, k, v = self.heads(self.qkv(x), 3)
        q, k = rotate(self.q_norm(q), *axis.rope), rotate(self.k_norm(k), *axis.rope)
        if cache is not None:
            k, v = cache.update(axis.places, k, v)
        with torch.autocast('cpu', enabled=False):
            x = attend(q, k, v, axis)
        return self.proj(x.transpose(2, 3).flatten(3))

    def remember(self, x, axis, cache):
        """Keys and values of x into the cache, and no more."""
        D = x.shape[-1]
        kv = F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:])
        k, v = self.heads(kv, 2)
        cache.update(axis.places, rotate(self.k_norm(k), *axis.rope), v)


class CrossAttention(nn.Module):
    """Patches attend to actions: in time, to those up to their frame's; in space, to their frame's own.

    With that single key the softmax is 1 and the answer is its value, whatever the query.
    """

    def __init__(self, dim, num_heads, temporal):
        super().__init__()
        self.num_heads, self.temporal = num_heads, temporal
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = ZeroLinear(dim, dim)
        if not temporal:
            self.q.requires_grad_(False)  # in the checkpoints, and without effect

    def heads(self, x):
        """[B,L,D] -> [B,heads,L,d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, a, axis):
        """x [B,F,P,D], a [B,F,D] the frames' own actions -> [B,F,P,D], or [B,F,1,D] in space."""
        if not self.temporal:
            v = self.kv(a).chunk(2, dim=-1)[1]
            return self.proj(v)[:, :, None]
        P = x.shape[2]
        k, v = self.kv(axis.actions).chunk(2, dim=-1)  # [B,K,D], shared by all patches of a frame
        mask = axis.mask
        if mask is not None:  # actions may be given for the beginning of the window only
            mask = mask[:, :k.shape[1]].repeat_interleave(P, dim=0)  # [F*P,K]
        q = self.heads(self.q(x).flatten(1, 2))
        out = F.scaled_dot_product_attention(q, self.heads(k), self.heads(v), attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))  # from [B,heads,F*P,d]


# -----------------------------------------------------------------------------
# the block, and one kind of it for each way that the action can enter

class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the frame's noise level (adaLN-Zero).

    An injection overrides the one of `before`, `condition`, `between` and `after` where the action
    comes in. What it adds starts at zero (ZeroLinear); if causal, it uses no action of a later frame.
    """

    def __init__(self, config, temporal):
        super().__init__()
        D = config.hidden_size
        self.temporal = temporal
        self.attn = Attention(D, config.num_heads)
        self.mlp = SwiGLU(D, 4 * D)
        self.adaLN_modulation = modulation(D, 6)

    def before(self, x, a):
        return x

    def condition(self, c, a):
        return self.adaLN_modulation(c)

    def between(self, x, a):
        return x

    def after(self, x, a, axis):
        return x

    def forward(self, x, c, a, axis, cache=None):
        """x [B,F,P,D] patches, c [B,F,D] noise level, a [B,F,D] action -> [B,F,P,D]."""
        x = self.before(x, a)
        six = self.condition(c, a)[:, :, None].chunk(6, dim=-1)  # each [B,F,1,D]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
        x = x + gate_attn * self.attention(modulate(norm(x), shift_attn, scale_attn), axis, cache)
        x = self.between(x, a)
        x = x + gate_mlp * self.mlp(modulate(norm(x), shift_mlp, scale_mlp))
        return self.after(x, a, axis)

    def attention(self, x, axis, cache):
        """Among the patches of each frame, or among the frames of each patch position."""
        if not self.temporal:
            return self.attn(x, axis)
        return self.attn(by_patch(x), axis, cache).transpose(1, 2)

    def remember(self, x, c, a, axis, cache):
        """A temporal block's keys and values of x: all that later frames need of a finished one."""
        x = self.before(x, a)
        shift, scale = self.condition(c, a)[:, :, None].chunk(6, dim=-1)[:2]
        self.attn.remember(by_patch(modulate(norm(x), shift, scale)), axis, cache)


class AdditiveBlock(Block):
    """The action is added to every patch."""

    def before(self, x, a):
        return x + a[:, :, None]


class AdaLNBlock(Block):
    """The action has an adaLN of its own, added to the noise level's."""

    def __init__(self, config, temporal):
        super().__init__(config, temporal)
        self.action_adaLN_modulation = modulation(config.hidden_size, 6)

    def condition(self, c, a):
        return self.adaLN_modulation(c) + self.action_adaLN_modulation(a)


class AdaLNFuseBlock(Block):
    """The action is added to the noise level's embedding, and shares its adaLN."""

    def condition(self, c, a):
        return self.adaLN_modulation(c + a)


class FiLMBlock(Block):
    """The action scales and shifts the patches between attention and MLP (Perez et al. 2018)."""

    def __init__(self, config, temporal):
        super().__init__(config, temporal)
        self.film_modulation = modulation(config.hidden_size, 2)

    def between(self, x, a):
        gamma, beta = self.film_modulation(a)[:, :, None].chunk(2, dim=-1)
        return modulate(x, beta, gamma)


class CrossAttentionBlock(Block):
    """The patches attend to the actions, after the MLP."""

    def __init__(self, config, temporal):
        super().__init__(config, temporal)
        self.cross_attn = CrossAttention(config.hidden_size, config.num_heads, temporal)
        # cross_attn.proj starts at zero: with this gate at zero too, each one's gradient is a product
        # with the other's zero, and neither ever moves
        gate = torch.zeros if config.zero_cross_gate else torch.ones
        self.cross_gate = nn.Parameter(gate(config.hidden_size))

    def after(self, x, a, axis):
        return x + self.cross_gate * self.cross_attn(norm(x), a, axis)


INJECTIONS = {
    'additive': AdditiveBlock,
    'adaln': AdaLNBlock,
    'adaln_fuse': AdaLNFuseBlock,
    'film': FiLMBlock,
    'cross_attention': CrossAttentionBlock,
}


# -----------------------------------------------------------------------------

class NanoWM(nn.Module):
    """Causal space-time diffusion transformer over clips of frames."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, (rows, cols) = config.hidden_size, config.grid
        self.x_embedder = PatchEmbedder(config)
        self.pos_embed = nn.Parameter(torch.randn(1, rows * cols, D) * 0.02)
        self.temp_embed = nn.Parameter(torch.randn(1, config.num_frames, D) * 0.02)
        self.t_embedder = Embedder(256, D)
        if config.action_dim:
            self.action_embedder = Embedder(config.action_dim, D)
        block = INJECTIONS[config.injection]
        self.blocks = nn.ModuleList(block(config, temporal=i % 2 == 1) for i in range(config.depth))
        self.last_temporal = config.depth // 2 * 2 - 1  # index of that block
        self.final_layer = FinalLayer(config)
        self.build_rope()
        self.init_weights()

    def build_rope(self):
        """In space half of a head encodes the row and half the column; in time all of it the frame."""
        d, (rows, cols) = self.config.hidden_size // self.config.num_heads, self.config.grid
        row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
        space = torch.cat([rope_angles(row, d // 4), rope_angles(col, d // 4)], dim=1)
        time = rope_angles(torch.arange(self.config.num_frames), d // 2)
        self.register_buffer('space_rope', rope_tables(space), persistent=False)
        self.register_buffer('time_rope', rope_tables(time), persistent=False)

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))  # a convolution: a Linear on patches
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, ZeroLinear):
                nn.init.zeros_(m.weight)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)

    def forward(self, x, t, action=None, cache=None, places=None, skip=0):
        """Embed the frames, embed what conditions them, run the blocks, turn patches into frames again.

        x: [B,F,C,H,W] frames, F <= num_frames, each at its own noise level.
        t: [B,F] or [1,F] integer timestep of each frame; -1 means clean and is shown as 0.
        action: [B,F,A], or None. action[:, f] is done at frame f and so conditions frame f+1.
        Returns [B,F,C,H,W], what the network predicts; the target decides what that means.

        A causal model may be given its window in parts (cache.py). Then cache has a KVCache for each
        temporal block, x are the frames at `places` [F] of the window, action is the whole window's,
        and the first `skip` frames only enter the cache: [B,F-skip,C,H,W] come back, or None.
        """
        x = self.x_embedder(x) + self.pos_embed  # [B,F,P,D]
        c = self.t_embedder(sinusoids(t.clamp(min=0)))  # [B,F,D]
        if cache is None:
            window = places = torch.arange(x.shape[1], device=x.device)
        else:
            window = torch.arange(self.config.num_frames, device=x.device)
        actions = self.embed_actions(action, x, len(window))[:, :len(window)]
        a = actions[:, places]  # [B,F,D]
        mask = None
        if self.config.causal:
            mask = places[:, None] >= window
        is_causal = self.config.causal and cache is None
        space = Axis(self.space_rope.unbind())
        time = Axis(self.time_rope[:, places].unbind(), mask, is_causal, actions, places)

        for i, block in enumerate(self.blocks):
            if i == 1:
                x = x + self.temp_embed[:, places, None]  # before the first block in time
            if skip and i == self.last_temporal:  # all that is needed of the first frames
                block.remember(x[:, :skip], c[:, :skip], a[:, :skip], time[:skip], cache[i])
                if skip == x.shape[1]:
                    return None
                x, c, a, time = x[:, skip:], c[:, skip:], a[:, skip:], time[skip:]
            axis = time if block.temporal else space
            block_cache = cache[i] if cache else None
            x = block(x, c, a, axis, block_cache)
        return self.final_layer(x, c)

    def embed_actions(self, action, x, num_frames):
        """[B,F,D]: to each frame belongs the action before it, and to the first an exact zero."""
        if action is None or not self.config.action_dim:
            return x.new_zeros(len(x), num_frames, x.shape[-1])
        return F.pad(self.action_embedder(action[:, :-1]), (0, 0, 1, 0))


def build_model(settings, frame_shape, action_dim):
    """The NanoWM of train.py's settings, for frames (C,H,W) and actions of that many numbers."""
    names = {f.name for f in fields(NanoWMConfig)}
    shape = {key: value for key, value in settings.items() if key in names}
    if settings['model_size']:
        check_choice('model_size', settings['model_size'], SIZES)
        shape |= SIZES[settings['model_size']]
    channels, *input_size = frame_shape
    shape |= dict(in_channels=channels, input_size=tuple(input_size), action_dim=action_dim)
    return NanoWM(NanoWMConfig(**shape))
