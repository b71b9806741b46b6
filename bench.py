"""How fast is it here, and how far is that from what the hardware can do?

    python bench.py config/wall.py                                     # a training step, rollouts and data loading
    python bench.py --model_size=S --patch_size=2 --mode=rollout       # random weights and data: only speed matters

A time is the fastest of `repeats`, the device waited for; a share is of the rate of a large matmul in the same run.
Config files are train.py's: what does not matter to speed is passed over. Prints a table and writes JSON.
"""
import json
import os
import resource
import sys
import tempfile
import time

import numpy as np
import torch

from configurator import configure
from data import DTYPES, Clips, autocast, pick_device, pick_dtype, to_model
from diffusion import Diffusion
from model import SIZES, NanoWM, NanoWMConfig

# settings ---------------------------------------------------------------------
mode = 'all'  # train, rollout, data or all
out = 'bench.json'  # file to write
repeats = 3
device = ''  # cpu, cuda, mps; '' is the best there is
dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
compile = False  # torch.compile the model
# data
dataset = ''  # made by data.py; where there is none: random numbers of the shape below
frame_shape = (4, 32, 32)  # channels, height, width: 3 channels are uint8 pixels, others float16 latents
action_dim = 7
num_frames = 4  # frames per clip, and the model's window
frame_interval = 1
# model
model_size = ''  # S, B, L or XL sets hidden_size, depth and num_heads
patch_size = 4
hidden_size = 128
depth = 4
num_heads = 4
injection = 'additive'
causal = True
pred_name = 'v'
batch_size = 8  # clips per training step
# rollouts
context_frames = 1  # given frames
rollout_frames = 0  # context included; 0 is the model's window
history = 0  # frames that a window which slid keeps; 0 is all but one
rollouts = 1  # at once
sample_steps = 10  # per frame
schedule = 'sequential'
cem_rollouts = 8  # from one shared context frame, as planning asks for
cem_frames = 5  # dreamed by each
cem_steps = 4  # per frame
# ------------------------------------------------------------------------------
config = configure(globals(), strict=False)

if mode not in ('train', 'rollout', 'data', 'all'):
    sys.exit(f'mode={mode!r}: expected train, rollout, data or all')
if model_size and model_size not in SIZES:
    sys.exit(f'model_size={model_size!r}: expected one of {", ".join(SIZES)}')
total = rollout_frames or num_frames
if num_frames < 2 or not 1 <= context_frames < total:
    sys.exit(f'num_frames={num_frames}, context_frames={context_frames}: expected 2 or more, and 1 to {total - 1}')
device = pick_device(device)
kind = torch.device(device).type
dtype = pick_dtype(dtype, device)
precision = autocast(device, dtype)
torch.manual_seed(0)
name = torch.cuda.get_device_name() if kind == 'cuda' else f'{kind}, {torch.get_num_threads()} threads'
result = {'device': name, 'dtype': dtype, 'torch': torch.__version__, 'settings': config}
print(f'{name}, {dtype}, torch {torch.__version__}{", compiled" if compile else ""}')


def report(key, value, unit, digits=2):
    result[key] = value
    print(f'{key.replace("_", " "):44} {value:12,.{digits}f} {unit}', flush=True)


def seconds(f):
    """How long f() takes, until the device has done it."""
    wait = {'cuda': torch.cuda.synchronize, 'mps': torch.mps.synchronize}.get(kind, lambda: None)
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def build(window):
    """A model of this window without a zero in it: zero-initialised layers would make every comparison trivial."""
    shape = SIZES.get(model_size, dict(hidden_size=hidden_size, depth=depth, num_heads=num_heads))
    model = NanoWM(NanoWMConfig(input_size=size[1:], patch_size=patch_size, in_channels=size[0], num_frames=window,
                                action_dim=A, injection=injection, causal=causal, **shape))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device)


if not os.path.exists(dataset):  # random, but prepared like any other, so that loading it can be measured
    folder = tempfile.TemporaryDirectory()
    dataset, rows = folder.name, 64 * num_frames * frame_interval
    os.makedirs(f'{dataset}/train')
    pixels = np.random.default_rng(0).integers(256, size=(rows, *frame_shape), dtype=np.uint8)
    np.save(f'{dataset}/train/frames.npy', pixels if frame_shape[0] == 3 else (pixels / 64 - 2).astype(np.float16))
    np.save(f'{dataset}/train/actions.npy', np.ones((rows, action_dim), np.float32))
    np.save(f'{dataset}/train/episodes.npy', [0, rows])
    with open(f'{dataset}/meta.json', 'w') as f:
        json.dump({}, f)
clips = Clips(dataset, 'train', num_frames, frame_interval)
size, A = clips.frames.shape[1:], clips.action_dim  # of a frame, of an action
try:
    model, diffusion = build(num_frames), Diffusion(pred_name).to(device)
except ValueError as e:
    sys.exit(str(e))
net = torch.compile(model, disable=not compile)

if mode in ('train', 'all'):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=kind != 'mps')
    x0, action = clips.batch(np.arange(batch_size) % len(clips))
    x0, action = to_model(x0, device), action.to(device)

    def step():
        with precision:
            loss = diffusion.loss(net, x0, action)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    n = 2048 if kind == 'cpu' else 8192
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    matmul = lambda: min(seconds(lambda: a @ b) for _ in range(8))  # noqa: E731
    step(), matmul()  # to warm up; then in turns, as the machine's speed may change
    took, yardstick = map(min, zip(*((seconds(step), matmul()) for _ in range(repeats)), strict=True))
    flops, rate = 3 * model.flops() * batch_size, 2 * n ** 3 / yardstick
    report('matmul', rate / 1e12, 'TFLOP/s')
    report('train_step', took * 1e3, 'ms')
    report('train_clips', batch_size / took, 'clips/s')
    report('train_tokens', batch_size * num_frames * model.pos_embed.shape[1] / took, 'tokens/s', 0)
    report('train_rate', flops / took / 1e12, 'TFLOP/s')
    report('train_share_of_matmul', 100 * flops / took / rate, '%', 1)
    del optimizer

if mode in ('data', 'all'):
    pick = np.random.default_rng(0)
    load = lambda: to_model(clips.batch(pick.integers(len(clips), size=batch_size))[0], device)  # noqa: E731
    wait = min(seconds(load) for _ in range(10 * repeats))
    report('data', batch_size / wait, 'clips/s', 0)
    if mode == 'all':
        report('data_share_of_a_step', 100 * wait / (wait + took), '% waiting, if nothing overlaps')


def compare(title, net, context, action, num_frames, num_steps, **options):
    """Frames/s of a rollout, cached and plain in turns, and how far the two outputs are apart."""
    noise, videos = torch.randn(len(action), num_frames, *context.shape[2:], device=device), {}

    def roll(cache, num_steps=num_steps):
        with precision:
            videos[cache] = diffusion.sample(net, context, action, num_frames, num_steps, noise=noise, cache=cache,
                                             context_noise=noise[:len(context)], **options)

    try:
        roll(True, 2), roll(False, 1)  # to warm up; two steps have every shape there is
    except ValueError as e:
        sys.exit(str(e))
    times = [(seconds(lambda: roll(True)), seconds(lambda: roll(False))) for _ in range(repeats)]
    cached, plain = map(min, zip(*times, strict=True))
    new = len(action) * (num_frames - context.shape[1])
    report(f'{title}_cached', new / cached, 'frames/s')
    report(f'{title}_plain', new / plain, 'frames/s')
    report(f'{title}_speedup', plain / cached, 'times')
    report(f'{title}_largest_difference', (videos[True] - videos[False]).abs().max().item(), '', 7)


if mode in ('rollout', 'all'):
    noise = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    compare('rollout', net, noise(rollouts, context_frames, *size), noise(rollouts, total, A), total, sample_steps,
            schedule=schedule, history=history or None)
    past = history or num_frames - 1  # one interactive frame: from an action to the picture it leads to
    context, action = noise(1, past, *size), noise(1, past + 1, A)
    frame = lambda: diffusion.sample(net, context, action, past + 1, sample_steps)  # noqa: E731
    with precision:
        report('one_frame', 1e3 * min([seconds(frame) for _ in range(repeats + 1)][1:]), 'ms')
    net = torch.compile(build(cem_frames + 1), disable=not compile)
    compare('cem', net, noise(1, 1, *size), noise(cem_rollouts, cem_frames + 1, A), cem_frames + 1, cem_steps)

rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
report('peak_memory', (torch.cuda.max_memory_allocated() if kind == 'cuda' else rss) / 2 ** 30, 'GiB')
with open(out, 'w') as f:
    json.dump(result, f, indent=1)
print(out)
