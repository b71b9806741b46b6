"""What measuring during a training costs, in FLOPs, for config/rt1_b2.py: latents of 256x256 pixels, B/2, 8 x 8 clips.

    PYTHONPATH=. python docs/cost_of_metrics.py

Counted without gradients on one clip of random numbers, and multiplied. LPIPS and FID are counted if they are there.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import forward_flops
from configurator import run_config_file
from diffusion import Diffusion
from metrics import load_networks
from model import SIZES, NanoWM, NanoWMConfig
from vae import VAE


def flops(f, *args):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        f(*args)
    return counter.get_total_flops()


config = run_config_file('config/rt1_b2.py')
model, diffusion = NanoWM(NanoWMConfig(**SIZES['B'], action_dim=7)), Diffusion('v')
dreamed = model.config.num_frames - 1
frame, latent = torch.rand(1, 1, 3, 256, 256), torch.randn(1, 1, 4, 32, 32)


def rollout(num_steps):
    diffusion.sample(model, latent, torch.randn(1, dreamed + 1, 7), dreamed + 1, num_steps)


step = 64 * 3 * forward_flops(model)
one_more = (flops(rollout, 4) - flops(rollout, 2)) / 2  # rollouts are linear in their steps
costs = {
    'rollouts, right and wrong actions': 2 * (flops(rollout, 2) + (config['sample_steps'] - 2) * one_more),
    'decoding dream, wrong actions and vae': 3 * dreamed * flops(VAE().decode, latent),
}
networks, absent = load_networks(['lpips', 'fid'], 'cpu', (256, 256), dreamed)
if 'lpips' in networks:
    costs['LPIPS of dream, copy, wrong actions and vae'] = 4 * dreamed * flops(networks['lpips'], frame, frame)
if 'fid' in networks:
    costs['FID of these and the truth'] = 5 * dreamed * flops(networks['fid'], frame)
print(f'a training step: {step / 1e12:.1f} TFLOP; a clip measured: {sum(costs.values()) / 1e12:.1f}')
print(*(f'no {name.upper()}: {why}' for name, why in absent.items()), sep='\n')
for num_clips in (16, 64, 256):
    print(f'{num_clips} clips every {config["metrics_every"]:,} steps, as a share of the training:')
    for name, cost in {**costs, 'together': sum(costs.values())}.items():
        print(f'{num_clips * cost / config["metrics_every"] / step:8.2%} {name}')
