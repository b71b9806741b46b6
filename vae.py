"""The Stable Diffusion autoencoder: frames become latents of a 64th of the pixels, in which a world model is cheap.

    vae = load_vae()                # pretrained/sd-vae-ft-mse/, or $VAE_MODEL_PATH
    latents = vae.encode(frames)    # [B,F,3,256,256] in [-1,1] -> [B,F,4,32,32], about unit variance
    frames = vae.decode(latents)

A convolutional network that halves the picture three times, and its mirror image (Rombach et al. 2022, arXiv
2112.10752). Modules carry the names of the published `diffusion_pytorch_model.safetensors`, so that loading is
load_state_dict. Read `VAE` first, then `encoder`, then `ResnetBlock`.
"""
import os
import re
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import hub_file, load_weights

WIDTHS = (128, 256, 512, 512)  # channels at full, half, quarter and eighth resolution
SCALE = 0.18215  # brings Stable Diffusion's latents to unit variance
CPU_PIXELS, GPU_PIXELS = 2 ** 16, 2 ** 20  # at once: 1 or 16 frames of 256x256, at 64 MiB a frame's largest activation
FILE, FOLDER = 'diffusion_pytorch_model.safetensors', 'pretrained/sd-vae-ft-mse'
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}  # of attention, in older files

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, convolution, around a shortcut that is a 1x1 convolution where the width changes."""

    def __init__(self, in_width, width):
        super().__init__()
        self.norm1 = group_norm(in_width)
        self.conv1 = conv3x3(in_width, width)
        self.norm2 = group_norm(width)
        self.conv2 = conv3x3(width, width)
        self.conv_shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, x):
        h = F.silu(self.norm1(x), inplace=True)  # one name and in place: a 256x256 activation is freed once used
        h = self.conv1(h)
        h = F.silu(self.norm2(h), inplace=True)
        h = self.conv2(h)
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Every position of the smallest feature map looks at all others, with a single head."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1 head, h*w, C]
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(2, 3).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width), ResnetBlock(width, width)])
        self.attentions = nn.ModuleList([Attention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: how it was trained


class Upsample(nn.Module):
    """Doubles the picture by repeating pixels, then convolves: here as one transposed convolution.

    Of the 3x3 pixels under the kernel, those that repeat each other share a product, so 4 of 9 are left. The 4x4 kernel
    is the 3x3 one convolved with the 2x2 block of ones that repeats a pixel.
    """

    def __init__(self, width):
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x):
        kernel = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)  # sums of 2x2
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)


def named(**layers):
    """Layers in the order they run, under the checkpoint's names."""
    return nn.Sequential(OrderedDict(layers))


def stage(in_width, width, depth, **resampler):
    """`depth` residual blocks at one resolution, then the way to the next."""
    resnets = (ResnetBlock(width if i else in_width, width) for i in range(depth))
    return named(resnets=nn.Sequential(*resnets), **resampler)


def encoder(a, b, c, d):
    """[N,3,H,W] -> [N,8,H/8,W/8]."""
    return named(
        conv_in=conv3x3(3, a),
        down_blocks=nn.Sequential(stage(a, a, 2, downsamplers=nn.Sequential(Downsample(a))),
                                  stage(a, b, 2, downsamplers=nn.Sequential(Downsample(b))),
                                  stage(b, c, 2, downsamplers=nn.Sequential(Downsample(c))),
                                  stage(c, d, 2)),
        mid_block=MidBlock(d), conv_norm_out=group_norm(d), act=nn.SiLU(inplace=True), conv_out=conv3x3(d, 8))


def decoder(a, b, c, d):
    """[N,4,h,w] -> [N,3,8h,8w]."""
    return named(
        conv_in=conv3x3(4, d), mid_block=MidBlock(d),
        up_blocks=nn.Sequential(stage(d, d, 3, upsamplers=nn.Sequential(Upsample(d))),
                                stage(d, c, 3, upsamplers=nn.Sequential(Upsample(c))),
                                stage(c, b, 3, upsamplers=nn.Sequential(Upsample(b))),
                                stage(b, a, 3)),
        conv_norm_out=group_norm(a), act=nn.SiLU(inplace=True), conv_out=conv3x3(a, 3))


class VAE(nn.Module):
    """Both halves and the 1x1 convolutions at the bottleneck; widths: channels at the four resolutions.

    encode and decode take any leading dimensions, compute without gradients in the dtype of the weights (also under
    autocast: bf16 leaves coloured speckle) and give a result on their device. They work through the frames in chunks of
    CPU_PIXELS or GPU_PIXELS, at least one frame: so much memory they need, however many frames there are.
    """

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.encoder, self.decoder = encoder(*widths), decoder(*widths)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, frames):
        """Frames [...,3,H,W] in [-1,1] -> latents [...,4,H/8,W/8]: the posterior's mean, times SCALE."""
        H, W = frames.shape[-2:]
        if H % 8 or W % 8:
            raise ValueError(f'frames of {H}x{W}: the autoencoder needs a height and width that are multiples of 8')
        return self._chunked(lambda x: self.quant_conv(self.encoder(x))[:, :4] * SCALE, frames, H * W)

    def decode(self, latents):
        """Latents [...,4,h,w] as encode gives them -> frames [...,3,8h,8w] in [-1,1]."""
        h, w = latents.shape[-2:]
        return self._chunked(lambda z: self.decoder(self.post_quant_conv(z / SCALE)).clamp(-1, 1), latents, 64 * h * w)

    @torch.no_grad()
    def _chunked(self, f, x, pixels):
        weight, lead = self.quant_conv.weight, x.shape[:-3]
        limit = CPU_PIXELS if weight.device.type == 'cpu' else GPU_PIXELS
        with torch.autocast(weight.device.type, enabled=False):
            out = [f(part.to(weight).contiguous(memory_format=torch.channels_last))  # the faster layout on CPUs
                   for part in x.reshape(lead.numel(), *x.shape[-3:]).split(max(1, limit // pixels))]
        return torch.cat(out).contiguous().view(*lead, *out[0].shape[1:])


def load_vae(path='', device='cpu'):
    """The VAE of a folder, a .safetensors file or a hub id (owner/name), in eval mode, as fp32 on `device`.

    '' is $VAE_MODEL_PATH, or else pretrained/sd-vae-ft-mse/. Raises FileNotFoundError with the command that downloads
    it, and ValueError with the tensors that are missing, unexpected or of another shape.
    """
    path = str(path or os.environ.get('VAE_MODEL_PATH') or FOLDER)
    hub_id = re.fullmatch(r'\w[\w.-]*/[\w.-]+(?<!\.safetensors)', path) and path != FOLDER
    if hub_id and not os.path.exists(path):
        path = hub_file(path, (FILE,))
    path = os.path.join(path, FILE) if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise FileNotFoundError(f'no autoencoder at {path}: check the path and $VAE_MODEL_PATH, or unset both and run '
                                f'hf download stabilityai/sd-vae-ft-mse {FILE} --local-dir {FOLDER}')
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as e:
        raise ValueError(f'{path} is not a readable safetensors file ({e}); download it again') from e
    for old, new in OLD_NAMES.items():
        state = {k.replace(f'.{old}.', f'.{new}.'): v for k, v in state.items()}
    # some of those files store attention's Linears as 1x1 convolutions
    state = {k: v.flatten(1) if '.attentions.' in k and v.ndim == 4 else v for k, v in state.items()}

    widths = [len(state.get(f'encoder.down_blocks.{i}.resnets.0.conv1.weight', ())) for i in range(4)]
    with torch.device('meta'):  # no initialisation
        vae = VAE(widths if all(w and w % 32 == 0 for w in widths) else WIDTHS)
    vae.to_empty(device=device).to(memory_format=torch.channels_last)
    load_weights(vae, state, path)
    return vae.eval().requires_grad_(False)
