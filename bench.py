"""How fast is it here, and how far is that from what the hardware can do?

    python bench.py config/wall.py                                 # training, rollouts, loading
    python bench.py --model_size=S --patch_size=2 --mode=rollout   # random weights and data

A time is the fastest of `repeats`; a share is of the rate of a large matmul in the same run. Config
files are train.py's: what does not matter to speed is passed over. Prints a table and writes JSON.
"""
import json
import math
import os
import tempfile
from functools import partial

import numpy as np
import torch

import machine
from configurator import UserError, check_choice, check_context, configure
from data import Clips, to_model
from diffusion import Diffusion
from machine import seconds, under_results, write_whole
from model import build_model
from random_data import random_dataset
from run import make_folder


def forward_flops(model):
    """Multiply-adds of one clip's forward pass, times two; a training step is three of these."""
    config = model.config
    N, D, P = config.num_frames, config.hidden_size, math.prod(config.grid)
    per_frame = 0  # the modulations, whose inputs are one vector a frame
    for name, p in model.named_parameters():
        if p.ndim == 2 and 'modulation' in name:
            per_frame += 2 * p.numel()
    per_token = 2 * 2 * config.patch_size ** 2 * config.in_channels * D  # first and last layer
    for block in model.blocks:
        keys = P  # attended to by each token: its frame, or its past
        if block.temporal:
            keys = (N + 1) / 2 if config.causal else N
        per_token += 2 * 16 * D * D + 4 * D * keys
        if config.injection == 'cross_attention' and block.temporal:
            per_token += 2 * 2 * D * D + 4 * D * keys
    return N * (per_frame + P * per_token)


def without_zeros(model):
    """The model without its zero-initialised layers, which would make every comparison trivial."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


def compare(title, net, context, action, num_steps):
    """Report the frames/s of a rollout, cached and plain in turns, and how far the videos differ."""
    num_frames = action.shape[1]
    noise = torch.randn(len(action), num_frames, *context.shape[2:], device=device)
    videos = {}

    @precision
    def roll(cache, num_steps):
        videos[cache] = diffusion.sample(net, context, action, num_frames, num_steps, noise,
                                         context_noise=noise[:len(context)], cache=cache)

    roll(True, 2)  # to warm up; two steps have every shape there is
    roll(False, 1)
    cached = plain = math.inf
    for _ in range(repeats):
        cached = min(cached, seconds(partial(roll, True, num_steps), device))
        plain = min(plain, seconds(partial(roll, False, num_steps), device))
    new = len(action) * (num_frames - context.shape[1])
    report(f'{title}_cached', new / cached, 'frames/s')
    report(f'{title}_plain', new / plain, 'frames/s')
    report(f'{title}_speedup', plain / cached, 'times')
    report(f'{title}_largest_difference', (videos[True] - videos[False]).abs().max().item(), '', 7)


def report(key, value, unit, digits=2):
    result[key] = value
    print(f'{key.replace("_", " "):44} {value:12,.{digits}f} {unit}', flush=True)


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    mode = 'all'  # train, rollout, data or all
    out = 'out/bench.json'  # file to write
    repeats = 3  # [>= 1]
    device = ''  # cpu, cuda, mps; '' is the best there is
    dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
    compile = False  # torch.compile the model
    # data
    dataset = ''  # made by data.py; where there is none: random numbers of the shape below
    frame_shape = (4, 32, 32)  # channels, height, width: 3 channels are pixels, others latents
    action_dim = 7
    num_frames = 4  # frames per clip, and the model's window [>= 2]
    frame_interval = 1  # [>= 1]
    # model
    model_size = ''  # S, B, L or XL sets hidden_size, depth and num_heads
    patch_size = 4  # [>= 1]
    hidden_size = 128  # [>= 4]
    depth = 4  # [2 to 1000]
    num_heads = 4  # [>= 1]
    injection = 'additive'
    causal = True
    pred_name = 'v'
    batch_size = 8  # clips per training step [>= 1]
    # rollouts
    context_frames = 1  # given frames [>= 1]
    rollout_frames = 0  # context included; 0 is the model's window [>= 0]
    sample_steps = 10  # per frame [1 to 1000]
    cem_rollouts = 8  # of 5 frames from one shared frame, as planning asks for [>= 1]
    cem_steps = 4  # per frame [1 to 1000]
    # --------------------------------------------------------------------------
    settings = configure(globals(), strict=False)
    check_choice('mode', mode, ('train', 'rollout', 'data', 'all'))
    out = under_results(out)
    make_folder(os.path.dirname(out) or '.')
    if os.path.isdir(out):
        raise UserError(f'out={out} is a folder: expected a file to write')
    rollout_frames = rollout_frames or num_frames
    check_context(context_frames, rollout_frames)
    device = machine.pick_device(device)
    dtype = machine.pick_dtype(dtype, device)
    precision = machine.autocast(device, dtype)
    torch.manual_seed(0)
    result = {'device': machine.name_of(device), 'dtype': dtype, 'torch': torch.__version__}
    print(*result.values())
    result['settings'] = settings

    # data and model
    dataset = under_results(dataset)
    if not os.path.exists(f'{dataset}/meta.json'):
        if settings['dataset']:
            print(f'no dataset at {dataset}: random numbers of frame_shape instead')
        folder = tempfile.TemporaryDirectory()
        rows = 64 * num_frames * frame_interval
        dataset = random_dataset(folder.name, frame_shape, action_dim, rows)
    clips = Clips(dataset, 'train', num_frames, frame_interval)
    frame_shape, A = clips.frames.shape[1:], clips.action_dim
    model = without_zeros(build_model(settings, frame_shape, A)).to(device)
    net = machine.compiled(model, device, compile)
    diffusion = Diffusion(pred_name).to(device)

    if mode in ('train', 'all'):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        frames, action = clips.batch(np.arange(batch_size) % len(clips))
        x0, action = to_model(frames, device), action.to(device)

        def step():
            with precision:
                loss = diffusion.loss(net, x0, action)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # to warm up
        took, rate = math.inf, 0
        for _ in range(repeats):  # in turns, as the machine's speed may change
            took = min(took, seconds(step, device))
            rate = max(rate, machine.matmul_rate(device, dtype))
        flops = 3 * forward_flops(model) * batch_size
        report('matmul', rate / 1e12, 'TFLOP/s')
        report('train_step', took * 1e3, 'ms')
        report('train_clips', batch_size / took, 'clips/s')
        report('train_rate', flops / took / 1e12, 'TFLOP/s')
        report('train_share_of_matmul', 100 * flops / took / rate, '%', 1)
        del optimizer

    if mode in ('data', 'all'):
        random = np.random.default_rng(0)

        def load():
            frames, _ = clips.batch(random.integers(len(clips), size=batch_size))
            to_model(frames, device)

        wait = min(seconds(load, device) for _ in range(10 * repeats))
        report('data', batch_size / wait, 'clips/s', 0)

    if mode in ('rollout', 'all'):
        machine.cast_weights(model, dtype)  # as in every script that dreams
        context = torch.randn(1, context_frames, *frame_shape, device=device)
        action = torch.randn(1, rollout_frames, A, device=device)
        compare('rollout', net, context, action, sample_steps)

        # one interactive frame: from an action to the picture it leads to
        past = num_frames - 1
        context = torch.randn(1, past, *frame_shape, device=device)
        action = torch.randn(1, past + 1, A, device=device)
        frame = partial(diffusion.sample, net, context, action, past + 1, sample_steps)
        with precision:
            frame()  # to warm up
            report('one_frame', 1e3 * min(seconds(frame, device) for _ in range(repeats)), 'ms')

        window = settings | {'num_frames': 6}
        model = without_zeros(build_model(window, frame_shape, A)).to(device)
        machine.cast_weights(model, dtype)
        net = machine.compiled(model, device, compile)
        context = torch.randn(1, 1, *frame_shape, device=device)
        action = torch.randn(cem_rollouts, 6, A, device=device)
        compare('cem', net, context, action, cem_steps)

    if device.startswith('cuda'):
        report('peak_memory', torch.cuda.max_memory_allocated() / 2 ** 30, 'GiB')
    write_whole(out, json.dumps(result, indent=1))
    print(out)
