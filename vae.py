"""The Stable Diffusion autoencoder: latents have a 64th of the places that frames have pixels.

    vae = load_vae()                # pretrained/sd-vae-ft-mse/, or $VAE_MODEL_PATH
    latents = vae.encode(frames)    # [B,F,3,256,256] in [-1,1] -> [B,F,4,32,32] of unit variance
    frames = vae.decode(latents)

A convolutional network that halves the picture three times, and its mirror image (Rombach et al.
2022, arXiv 2112.10752). Modules carry the names of the published weights. Read `VAE` first, then
`encoder`, then `ResnetBlock`.
"""
import os
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from checkpoint import check_fit, check_numbers
from configurator import UserError
from pickles import refusing

WIDTHS = (128, 256, 512, 512)  # channels at full, half, quarter and eighth resolution
SCALE = 0.18215  # brings Stable Diffusion's latents to unit variance
# pixels at once, 1 or 16 frames of 256x256: the largest activation takes 64 MiB a frame
CPU_PIXELS, GPU_PIXELS = 2 ** 16, 2 ** 20
FILE = 'diffusion_pytorch_model.safetensors'
FOLDER = 'pretrained/sd-vae-ft-mse'
# older files name the parts of attention otherwise
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, convolution; the shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, in_width, width):
        super().__init__()
        self.norm1 = group_norm(in_width)
        self.conv1 = conv3x3(in_width, width)
        self.norm2 = group_norm(width)
        self.conv2 = conv3x3(width, width)
        self.conv_shortcut = nn.Identity()
        if in_width != width:
            self.conv_shortcut = nn.Conv2d(in_width, width, 1)

    def forward(self, x):
        # one name and in place: an activation of 64 MiB is freed once it is used
        h = F.silu(self.norm1(x), inplace=True)
        h = self.conv1(h)
        h = F.silu(self.norm2(h), inplace=True)
        h = self.conv2(h)
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Every position of the smallest feature map looks at all others, with a single head."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1 head, h*w, C]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out(h)
        return x + h.transpose(2, 3).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width), ResnetBlock(width, width)])
        self.attentions = nn.ModuleList([Attention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample(nn.Module):
    """Doubles the picture by repeating pixels, then convolves: here as one transposed convolution.

    Of the 3x3 pixels under the kernel, those that repeat each other share a product, so 4 of 9 are
    left. The 4x4 kernel is the 3x3 one convolved with the 2x2 block of ones that repeats a pixel.
    """

    def __init__(self, width):
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x):
        flipped = self.conv.weight.flip(2, 3)
        kernel = F.avg_pool2d(flipped, 2, stride=1, padding=1, divisor_override=1)  # sums of 2x2
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)


def stage(in_width, width, depth, **resampler):
    """`depth` residual blocks at one resolution, then the way to the next."""
    resnets = [ResnetBlock(in_width, width)]
    resnets += [ResnetBlock(width, width) for _ in range(depth - 1)]
    return nn.Sequential(OrderedDict(resnets=nn.Sequential(*resnets), **resampler))


def down(in_width, width):
    halve = nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d((0, 1, 0, 1)),  # right and bottom only: how it was trained
        conv=nn.Conv2d(width, width, 3, stride=2)))
    return stage(in_width, width, 2, downsamplers=nn.Sequential(halve))


def up(in_width, width):
    return stage(in_width, width, 3, upsamplers=nn.Sequential(Upsample(width)))


def encoder(a, b, c, d):
    """[N,3,H,W] -> [N,8,H/8,W/8]."""
    return nn.Sequential(OrderedDict(
        conv_in=conv3x3(3, a),
        down_blocks=nn.Sequential(down(a, a), down(a, b), down(b, c), stage(c, d, 2)),
        mid_block=MidBlock(d),
        conv_norm_out=group_norm(d),
        act=nn.SiLU(inplace=True),
        conv_out=conv3x3(d, 8)))


def decoder(a, b, c, d):
    """[N,4,h,w] -> [N,3,8h,8w]."""
    return nn.Sequential(OrderedDict(
        conv_in=conv3x3(4, d),
        mid_block=MidBlock(d),
        up_blocks=nn.Sequential(up(d, d), up(d, c), up(c, b), stage(b, a, 3)),
        conv_norm_out=group_norm(a),
        act=nn.SiLU(inplace=True),
        conv_out=conv3x3(a, 3)))


class VAE(nn.Module):
    """Both halves and the 1x1 convolutions between them; widths: channels at the four resolutions.

    encode and decode take any leading dimensions, compute without gradients in the dtype of the
    weights (also under autocast: bf16 leaves coloured speckle) and give a result on their device.
    They work through the frames in chunks, so many frames need no more memory than one.
    """

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.encoder = encoder(*widths)
        self.decoder = decoder(*widths)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def encode(self, frames):
        """Frames [...,3,H,W] in [-1,1] -> latents [...,4,H/8,W/8]: the posterior's mean * SCALE.

        Raises UserError where 8 does not divide H and W.
        """
        H, W = frames.shape[-2:]
        if H % 8 or W % 8:
            raise UserError(f'frames of {H}x{W}: the autoencoder needs '
                            'a height and width that are multiples of 8')

        def encode_chunk(x):
            mean = self.quant_conv(self.encoder(x))[:, :4]  # the other four are the log-variance
            return mean * SCALE

        return self.in_chunks(encode_chunk, frames, pixels=H * W)

    def decode(self, latents):
        """Latents [...,4,h,w] as encode gives them -> frames [...,3,8h,8w] in [-1,1]."""
        def decode_chunk(z):
            return self.decoder(self.post_quant_conv(z / SCALE)).clamp(-1, 1)

        return self.in_chunks(decode_chunk, latents, pixels=64 * latents.shape[-2:].numel())

    @torch.no_grad()
    def in_chunks(self, f, x, pixels):
        """f of x [...,C,H,W], as many frames of so many pixels at a time as fit."""
        weight, leading = self.quant_conv.weight, x.shape[:-3]
        limit = CPU_PIXELS if weight.device.type == 'cpu' else GPU_PIXELS
        chunks = x.reshape(leading.numel(), *x.shape[-3:]).split(max(1, limit // pixels))
        out = []
        with torch.autocast(weight.device.type, enabled=False):
            for chunk in chunks:
                chunk = chunk.to(weight)
                out.append(f(chunk.contiguous(memory_format=torch.channels_last)))  # faster on CPUs
        return torch.cat(out).contiguous().view(*leading, *out[0].shape[1:])


def with_new_names(state):
    """The tensors of an older file under the names of today's, and attention's as matrices."""
    renamed = {}
    for name, x in state.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(f'.{old}.', f'.{new}.')
        attention = '.attentions.' in name and x.ndim == 4  # stored as a 1x1 convolution
        renamed[name] = x.flatten(1) if attention else x
    return renamed


def load_decoder(channels, path='', device='cpu'):
    """The VAE that decodes frames of so many channels; None where they are pixels. Raises UserError."""
    if channels == 3:
        return None
    if channels != 4:
        raise UserError(f'latents of {channels} channels: the autoencoder has 4')
    return load_vae(path, device)


def load_vae(path='', device='cpu'):
    """The VAE of a folder or a .safetensors file, in eval mode, as fp32.

    '' is $VAE_MODEL_PATH, or else pretrained/sd-vae-ft-mse/. Raises UserError.
    """
    path = str(path or os.environ.get('VAE_MODEL_PATH') or FOLDER)
    if os.path.isdir(path):
        path = os.path.join(path, FILE)
    if not os.path.isfile(path):
        raise UserError(
            f'no autoencoder at {path}: check the path and $VAE_MODEL_PATH, or unset both and run '
            f'hf download stabilityai/sd-vae-ft-mse {FILE} --local-dir {FOLDER}')
    with refusing(path, 'autoencoder'):
        state = with_new_names(load_file(path))
        names = [f'encoder.down_blocks.{i}.resnets.0.conv1.bias' for i in range(4)]
        with torch.device('meta'):  # no initialisation
            vae = VAE([len(state[name]) for name in names])
    check_numbers(state, path)
    check_fit(vae, state, path)
    vae.load_state_dict(state, assign=True)
    vae.to(device, torch.float32, memory_format=torch.channels_last)
    return vae.eval().requires_grad_(False)
