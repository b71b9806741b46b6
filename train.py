r"""Train a world model with diffusion forcing, on one CPU or GPU or on many processes.

    python train.py config/wall.py                                      # minutes on a laptop
    python train.py config/wall.py --injection=film --out_dir=out/film  # change anything
    python train.py config/wall.py --resume=True                        # go on where it stopped
    torchrun --nproc_per_node=8 train.py config/pusht_tiny.py           # 8 GPUs
    torchrun --nproc_per_node=8 train.py config/rt1_b2.py config/xl2.py --fsdp=True --grad_checkpoint=True \
        --out_dir=out/rt1_xl2                                           # one model, in 8 shards

Leaves in out_dir: latest.safetensors (replaced atomically), step_*.safetensors (kept), config.json, log.jsonl,
dream_*.png, and TensorBoard events if it is installed.
"""
import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import load_weights, read_checkpoint, save_checkpoint
from configurator import configure
from data import DTYPES, RANK, WORLD_SIZE, Clips, RandomClips, autocast, pick_device, pick_dtype, to_model
from diffusion import Diffusion
from evaluate import evaluate, summarise
from model import SIZES, NanoWM, NanoWMConfig
from sample import contact_sheet, dream, to_pixels
from vae import load_vae

# settings ---------------------------------------------------------------------
# run
out_dir = 'out/wall'
resume = False  # go on from out_dir/latest.safetensors
init_from = ''  # weights to start from at step 0: a run folder, a checkpoint file or a Hugging Face id
seed = 3407
device = ''  # cpu, cuda, mps; '' is the best there is
dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
compile = False  # torch.compile the model
fsdp = False  # under torchrun: one shard of weights, gradients, moments and EMA each; bf16 wants grad_checkpoint too
grad_checkpoint = False  # compute every block again in the backward pass instead of keeping its activations
# data
dataset = 'data/wall'  # made by data.py
num_frames = 4  # frames per clip, and the model's window
context_frames = 1  # how many of them are given when it dreams
frame_interval = 1  # keep every k-th frame; the k actions between are concatenated
vae = ''  # decodes dreamed latents for a look: folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
normalize_action = False  # by the training split's mean and std
real_data = True  # False trains on random numbers: for benchmarks, and for trying a config with no data
frame_shape = (4, 32, 32)  # channels, height, width without real_data; read off the dataset otherwise
action_dim = 7  # numbers per recorded frame without real_data; times frame_interval reaches the model
# model
model_size = ''  # S, B, L or XL sets hidden_size, depth and num_heads
patch_size = 4
hidden_size = 128
depth = 4
num_heads = 4
injection = 'additive'  # additive, adaln, adaln_fuse, film or cross_attention
causal = True
# diffusion
pred_name = 'v'  # epsilon, x, v or flow
noise_schedule: str = None  # linear or squaredcos_cap_v2; None is the target's native one
zero_terminal_snr: bool = None  # None is the target's native choice
snr_gamma = 5.0  # min-SNR loss weight; 0 turns it off
timestep_sampling = 'logit_normal'  # or uniform
timestep_mean = 0.0  # of the normal under logit_normal; higher is noisier
timestep_std = 1.0  # 2.5 or more favours both ends: clean pasts and noisy presents
timestep_per_clip = False  # one noise level for all frames instead of one each
# optimisation
batch_size = 8  # clips per process and micro-step
grad_accum = 1  # micro-steps per step
max_steps = 10000
learning_rate = 1e-4
min_lr = 0.0  # where the cosine ends
warmup_steps = 1000
weight_decay = 0.01
gradient_clip_norm = 0.1  # 0 turns it off
gradient_clip_start = 0  # first step that is clipped
ema_decay = 0.999  # of the weights that validate, dream and are saved for use; 0 turns it off
# logging
log_every = 10
val_every = 1000  # validation loss, and a picture of held-out dreams
latest_every = 1000  # replace latest.safetensors
keep_every = 10000  # and keep a numbered one
num_val_clips = 64
metrics_every = 0  # evaluate.py's PSNR, SSIM and gap between right and wrong actions on a few clips; 0 is never
num_metric_clips = 16
sample_steps = 50  # DDIM steps per dreamed frame
wandb = False  # log to Weights & Biases too
wandb_project = 'nanowm'
# ------------------------------------------------------------------------------
config = configure(globals())

for key in ('batch_size', 'grad_accum', 'max_steps', 'num_val_clips', 'sample_steps', 'depth', 'num_heads',
            'patch_size', 'frame_interval', 'num_metric_clips'):
    if config[key] < 1:
        sys.exit(f'{key}={config[key]}: expected 1 or more')
if not 1 <= context_frames < num_frames:
    sys.exit(f'context_frames={context_frames}: expected 1 to num_frames - 1 = {num_frames - 1}')

# setup: who am I, on what device
master = RANK == 0
device = pick_device(device)
kind = torch.device(device).type
restarts = torch.tensor(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)), device=device)
if WORLD_SIZE > 1:
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    dist.all_reduce(restarts, dist.ReduceOp.MAX)  # each node counts its own
elif fsdp:
    sys.exit('fsdp=True cuts a model among processes and here is one: start them with torchrun --nproc_per_node=N')
dtype = pick_dtype(dtype, device)
precision = autocast(device, dtype)
torch.manual_seed(seed)

# data
if real_data:
    train_clips, val_clips = (Clips(dataset, split, num_frames, frame_interval, normalize_action)
                              for split in ('train', 'val'))
elif len(frame_shape) != 3 or not all(type(n) is int and n > 0 for n in frame_shape) or action_dim < 0:
    sys.exit(f'frame_shape={frame_shape}, action_dim={action_dim}: expected (channels, height, width), and 0 or more')
else:
    train_clips = val_clips = RandomClips(frame_shape, num_frames, frame_interval * action_dim)
channels, height, width = train_clips.frames.shape[1:]

# model
if model_size and model_size not in SIZES:
    sys.exit(f'model_size={model_size!r}: expected one of {", ".join(SIZES)}')
shape = SIZES.get(model_size, dict(hidden_size=hidden_size, depth=depth, num_heads=num_heads))
try:
    model = NanoWM(NanoWMConfig(input_size=(height, width), patch_size=patch_size, in_channels=channels,
                                num_frames=num_frames, action_dim=train_clips.action_dim, injection=injection,
                                causal=causal, **shape))
    diffusion = Diffusion(pred_name, noise_schedule, zero_terminal_snr, snr_gamma=snr_gamma).to(device)
    diffusion.sample_timesteps((1, 1), timestep_sampling)  # refuses an unknown name now, not at step 0
except ValueError as e:
    sys.exit(str(e))
ema = copy.deepcopy(model).eval().requires_grad_(False) if ema_decay else model
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'fp16')

# checkpoints: the weights to use under their own names, and what training needs to go on under "train."
latest = os.path.join(out_dir, 'latest.safetensors')


def save(*paths):
    """Called by every process: what FSDP has cut is put together tensor by tensor, and only the master keeps it."""
    state = dict(ema.state_dict())
    if ema_decay:
        state |= {f'train.model.{k}': v for k, v in model.state_dict().items()}
    state |= {f'train.adam.{i}.{k}': v for i, s in optimizer.state_dict()['state'].items() for k, v in s.items()}
    for k, v in state.items():
        if fsdp and v.ndim:  # Adam's step counts are not cut
            whole = v.full_tensor()
            state[k] = whole.cpu() if master else None
    for path in paths if master else ():
        save_checkpoint(path, state, model.config, step=step, train=config, scaler=scaler.state_dict(),
                        action_scale=(train_clips.mean.tolist(), train_clips.std.tolist()))


step, adam = 0, {}  # finished optimiser steps, and their moments
resume = resume or restarts > 0 and os.path.exists(latest)
if resume:
    try:
        state, _, meta = read_checkpoint(latest, train=True)
        average = {k: v for k, v in state.items() if not k.startswith('train.')}
        load_weights(ema, average, latest)
        prefix = 'train.model.'
        load_weights(model, {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)} or average, latest)
    except (FileNotFoundError, ValueError) as e:
        sys.exit(str(e))
    for k, v in state.items():
        if k.startswith('train.adam.'):
            i, name = k.split('.')[2:]
            adam.setdefault(int(i), {})[name] = v
    scaler.load_state_dict(meta['scaler'])
    step = meta['step']
    del state, average
elif os.path.exists(latest):
    sys.exit(f'{latest} is there already: add --resume=True to go on, or choose another --out_dir')
elif init_from:
    try:
        load_weights(model, read_checkpoint(init_from)[0], init_from)
    except (FileNotFoundError, ValueError) as e:
        sys.exit(str(e))
    ema.load_state_dict(model.state_dict())

# only now to the device: a model too big for one is cut on the way, block by block
if grad_checkpoint:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
if fsdp:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor, init_device_mesh
    mesh = init_device_mesh(kind, (WORLD_SIZE,))
for m in (model, ema) if ema_decay else (model,):
    for part in (*m.blocks, m) if fsdp else ():
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # the root too: the EMA has no backward to cut it in
    m.to(device)
weights = [p for p in model.parameters() if p.requires_grad]
ema_weights = [e for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay, fused=kind != 'mps')
if fsdp:
    adam = {i: {k: distribute_tensor(v, weights[i].device_mesh, weights[i].placements) if v.ndim else v
                for k, v in s.items()} for i, s in adam.items()}
optimizer.load_state_dict({'state': adam, 'param_groups': optimizer.state_dict()['param_groups']})

net = torch.compile(model) if compile else model
if WORLD_SIZE > 1 and not fsdp:
    net = DDP(net, device_ids=[torch.cuda.current_device()] if kind == 'cuda' else None, broadcast_buffers=False)

# logging
log_path, board, run = os.path.join(out_dir, 'log.jsonl'), None, None
if master:
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, 'config.json'), 'w') as f:
        json.dump(config, f, indent=1)
    lines = open(log_path).readlines() if resume and os.path.exists(log_path) else []
    with open(log_path, 'w') as f:  # what was logged after the checkpoint will be logged again
        f.writelines(line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step)
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(os.path.join(out_dir, 'tb'), purge_step=step + 1)
    if wandb:
        try:
            import wandb as wb
        except ImportError:
            sys.exit('--wandb=True needs it: pip install wandb')
        name = os.path.basename(os.path.normpath(out_dir))
        run = wb.init(project=wandb_project, name=name, id=name, config=config, resume='allow')


def log(**values):
    with open(log_path, 'a') as f:
        f.write(json.dumps({'step': step, **values}) + '\n')
    for k, v in values.items():
        board and board.add_scalar(k, v, step)
    run and run.log(values, step=step)


def matmul_rate(n=2048 if kind == 'cpu' else 8192):
    """FLOP/s of a large matmul in the training dtype, the yardstick of the MFU shown."""
    a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    best = 0
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def lr_at(n):
    """Linear warm-up, then a cosine down to min_lr at max_steps."""
    if n < warmup_steps:
        return learning_rate * (n + 1) / warmup_steps
    progress = (n - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def load(n):
    """The clips of this process's share of step n, one (frames, action) per micro-step."""
    clips = np.random.default_rng([seed, n]).integers(len(train_clips), size=(WORLD_SIZE, grad_accum, batch_size))
    return [train_clips.batch(numbers) for numbers in clips[RANK]]


def batches(n):
    """This process's share of step n: yields (frames, action, t, noise), one per micro-step.

    All randomness of a step comes from (seed, n) and is drawn for the global batch, so a resumed run repeats the
    uninterrupted one, and N processes draw what one would. The clips of step n+1 are read while n is computed.
    """
    global ahead
    loaded, ahead = ahead.result(), loader.submit(load, n + 1)
    total = batch_size * grad_accum * WORLD_SIZE
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + n)
    t = diffusion.sample_timesteps((total, num_frames), timestep_sampling, timestep_mean, timestep_std,
                                   timestep_per_clip, generator)
    noise = torch.randn(total, num_frames, channels, height, width, device=device, generator=generator)
    for i, (frames, action) in enumerate(loaded, start=RANK * grad_accum):
        part = slice(i * batch_size, (i + 1) * batch_size)
        yield to_model(frames, device), action.to(device, non_blocking=True), t[part], noise[part]


loader = ThreadPoolExecutor(1)
ahead = loader.submit(load, step)
decoder = None  # of latents, for pictures and metrics only: training goes on without it
if real_data and channels != 3:
    try:
        decoder = load_vae(vae, device)
    except (FileNotFoundError, ValueError) as e:
        print(f'no pictures of dreams and no metrics: {e}') if master else None
val_frames, val_action = val_clips.batch(val_clips.fixed(num_val_clips))
metric_clips = val_clips.fixed(num_metric_clips)
metrics_every = metrics_every if real_data and (decoder or channels == 3) else 0
if metrics_every:  # whatever is missing is said now, not at that step
    if len(metric_clips) < 2:
        sys.exit(f'num_metric_clips={num_metric_clips}: metrics need two or more, and as many in the validation split')
    val_clips.pixels(metric_clips)


@torch.no_grad()
def validation_loss():
    """Loss of the EMA weights on fixed clips, timesteps and noise; every process computes it, as FSDP has to."""
    generator = torch.Generator(device).manual_seed(seed)
    total = 0.0
    for frames, action in zip(val_frames.split(batch_size), val_action.split(batch_size), strict=True):
        x0 = to_model(frames, device)
        t = diffusion.sample_timesteps(x0.shape[:2], timestep_sampling, timestep_mean, timestep_std, timestep_per_clip,
                                       generator)
        noise = torch.randn(x0.shape, device=device, generator=generator)
        with precision:
            total += diffusion.loss(ema, x0, action.to(device), t, noise).item() * len(x0)
    return total / len(val_frames)


def dream_picture():
    """Held-out clips, truth (latents as decoded) above dream, as a picture; every process dreams it, as FSDP has to."""
    if channels != 3 and not decoder:
        return
    x0, action = to_model(val_frames[:8], device), val_action[:8].to(device)
    with precision:
        dreamed = dream(ema, diffusion, x0, action, context_frames, sample_steps)
    if not master:
        return
    sheet = contact_sheet({'truth': to_pixels(x0, decoder), 'dream': to_pixels(dreamed, decoder)})
    Image.fromarray(sheet).save(os.path.join(out_dir, f'dream_{step:07d}.png'))
    board and board.add_image('dream', sheet, step, dataformats='HWC')


# SIGTERM and Ctrl-C finish the step, save, and leave; several processes agree on it when they next log
asked, stop = 0, False


def on_signal(signum, frame):
    global asked
    asked = signum


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

# the loop
flops = 3 * model.flops() * batch_size * grad_accum
if master:
    rate = matmul_rate()
    print(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_clips):,} clips, '
          f'{flops * WORLD_SIZE / 1e9:.1f} GFLOP a step, {device} {dtype} at {rate / 1e12:.2f} TFLOP/s')
bar = tqdm(total=max_steps, initial=step, disable=not master, desc=out_dir, unit='step', dynamic_ncols=True)
loss_sum, norm_sum = (torch.zeros((), device=device) for _ in range(2))
clock, since = time.perf_counter(), step
while step < max_steps and not stop:
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    for micro, (x0, action, t, noise) in enumerate(batches(step)):
        last = micro == grad_accum - 1
        if fsdp:
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or fsdp or WORLD_SIZE == 1 else net.no_sync():
            with precision:
                loss = diffusion.loss(net, x0, action, t, noise) / grad_accum
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    clip = gradient_clip_norm if gradient_clip_norm and step >= gradient_clip_start else float('inf')
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    norm_sum += norm.full_tensor() if fsdp else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if ema_decay:  # a short average at first, so that it does not remember the initialisation
        with torch.no_grad():
            torch._foreach_lerp_(ema_weights, weights, 1 - min(ema_decay, (1 + step) / (10 + step)))
    step += 1

    # everything below happens now and then; reading a number here is the only wait for the device
    due = {name: step == max_steps and (every > 0 or name in ('log', 'latest')) or every > 0 and step % every == 0
           for name, every in (('log', log_every), ('val', val_every), ('latest', latest_every), ('keep', keep_every),
                               ('metrics', metrics_every))}
    if any(due.values()) or (asked and WORLD_SIZE == 1):
        held = [p.to_local() for p in weights] if fsdp else weights
        size = torch.stack(torch._foreach_norm(held)).sum().detach()  # not finite if any weight is not
        sums = torch.stack([loss_sum, norm_sum, size, torch.tensor(float(asked), device=device)])
        if WORLD_SIZE > 1:
            dist.all_reduce(sums)
        loss_mean, norm, size, stop = sums.tolist()
        loss_mean, norm = (s / (WORLD_SIZE * (step - since)) for s in (loss_mean, norm))
        if not math.isfinite(loss_mean + size) or not (math.isfinite(norm) or scaler.is_enabled()):
            bar.close()
            sys.exit(f'step {step}: loss {loss_mean}, gradient {norm}, weights {size}: not finite, stopped before '
                     f'saving; {latest} holds the last good step; try a lower learning_rate or fp32')
        seconds = time.perf_counter() - clock
        clips_per_s = batch_size * grad_accum * WORLD_SIZE * (step - since) / seconds
        loss_sum.zero_(), norm_sum.zero_()
        if master:
            mfu = flops * (step - since) / seconds / rate
            log(loss=loss_mean, grad_norm=norm, lr=lr, clips_per_s=clips_per_s, mfu=mfu)
            bar.set_postfix(loss=f'{loss_mean:.4f}', clips_s=f'{clips_per_s:.0f}', mfu=f'{mfu:.0%}')
            bar.update(step - bar.n)
        if due['latest'] or due['keep'] or stop:
            save(latest, *([os.path.join(out_dir, f'step_{step:07d}.safetensors')] if due['keep'] else []))
        if due['val']:
            val_loss = validation_loss()
            if master:
                log(val_loss=val_loss)
            if real_data:
                dream_picture()
        if due['metrics']:  # every process does its share
            scores = evaluate(ema, diffusion, val_clips, metric_clips, context_frames, sample_steps, vae=decoder,
                              dtype=dtype)
            if master:
                log(**summarise(scores)['means'])
        clock, since = time.perf_counter(), step
bar.close()
loader.shutdown()
if board:
    board.close()
if WORLD_SIZE > 1:
    dist.destroy_process_group()
if stop and step < max_steps:
    if master:
        print(f'interrupted at step {step}, saved to {latest}; go on with --resume=True')
    sys.exit(128 + (asked or signal.SIGTERM))
