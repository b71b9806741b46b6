"""Train a world model with diffusion forcing, on one CPU or GPU or on many processes.

    python train.py config/wall.py                                      # minutes on a laptop
    python train.py config/wall.py --injection=film --out_dir=out/film  # change anything
    python train.py config/wall.py --resume=True                        # go on where it stopped
    torchrun --nproc_per_node=8 train.py config/rt1_b2.py               # 8 GPUs

Leaves in out_dir: latest.safetensors (replaced atomically), step_*.safetensors (kept), config.json,
log.jsonl, loss.png, dream_*.png, and TensorBoard events if it is installed.
"""
import copy
import math
import os
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import folder
import machine
from bench import forward_flops
from checkpoint import load_weights, read_checkpoint, restore_training, save_checkpoint, training_state
from configurator import UserError, check_choice, check_choices, check_context, configure
from data import Clips, to_model
from diffusion import TIMESTEP_SAMPLING, Diffusion
from evaluate import check_enough, evaluate, summarise
from logger import Logger
from machine import RANK, WORLD_SIZE
from metrics import NETWORKS, load_networks
from model import build_model
from muon import Muon
from pictures import contact_sheet, to_pixels
from random_data import random_dataset
from run import locate
from sample import dream
from vae import load_decoder

# settings ---------------------------------------------------------------------
# run
out_dir = 'out/wall'
resume: bool | str = False  # go on from out_dir/latest.safetensors, or from a checkpoint's path
init_from = ''  # weights to start from: a run folder, a checkpoint file or a Hugging Face id
seed = 3407  # [0 to 1e12]
device = ''  # cpu, cuda, mps; '' is the best there is
dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
compile = False  # torch.compile the model
fsdp = False  # under torchrun: cut weights, gradients, moments and EMA among the processes
grad_checkpoint = False  # recompute each block in the backward pass, to save memory
# data
dataset = 'data/wall'  # made by data.py
num_frames = 4  # frames per clip, and the model's window [2 to 10000]
context_frames = 1  # how many of them are given when it dreams [>= 1]
frame_interval = 1  # keep every k-th frame; the k actions between are concatenated [1 to 10000]
vae = ''  # decodes latents for pictures: '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
normalize_action = False  # standardise by the training split's mean and std
num_workers = 1  # threads that read batches ahead [1 to 256]
real_data = True  # False trains on random numbers of the shapes below, to try a config without data
frame_shape = (4, 32, 32)  # channels, height, width; without real_data
action_dim = 7  # numbers per recorded frame; without real_data
# model
model_size = ''  # S, B, L or XL: overrides hidden_size, depth and num_heads
patch_size = 4  # [>= 1]
hidden_size = 128  # [>= 4]
depth = 4  # [2 to 1000]
num_heads = 4  # [>= 1]
injection = 'additive'  # additive, adaln, adaln_fuse, film or cross_attention
causal = True
zero_cross_gate = False  # begin cross_attention as the reference does, which never learns to listen
# diffusion
pred_name = 'v'  # epsilon, x, v or flow
noise_schedule: str = None  # linear or squaredcos_cap_v2; None is the target's own, as flow's always is
zero_terminal_snr: bool = None  # None is the target's native choice
snr_gamma = 5.0  # min-SNR loss weight; 0 turns it off [>= 0]
timestep_sampling = 'logit_normal'  # or uniform
timestep_mean = 0.0  # of the normal under logit_normal; higher is noisier
timestep_std = 1.0  # 2.5 or more: most frames are almost clean or almost noise [>= 0]
timestep_per_clip = False  # one noise level for all frames instead of one each
clean_history = 0.0  # share of clips whose first frames are almost clean, as in a rollout [0 to 1]
clean_level = 0.05  # their highest noise level, as a share of the timesteps [0 to 1]
# optimisation
batch_size = 8  # clips per process and micro-step [>= 1]
grad_accum = 1  # micro-steps per step [>= 1]
max_steps = 10000  # [>= 1]
learning_rate = 1e-4  # [>= 0]
min_lr = 0.0  # where the cosine ends [>= 0]
warmup_steps = 1000  # [>= 0]
weight_decay = 0.01  # [>= 0]
muon = False  # Muon for the matrices of the blocks, AdamW for the rest
gradient_clip_norm = 0.1  # 0 turns it off [>= 0]
gradient_clip_start = 0  # first step that is clipped [>= 0]
ema_decay = 0.999  # of the averaged weights, which dream and are kept; 0 turns it off [0 to 1]
# logging
log_every = 10  # [>= 1]
val_every = 1000  # validation loss, and a picture of held-out dreams; 0 is never [>= 0]
latest_every = 1000  # replace latest.safetensors [>= 1]
keep_every = 10000  # and keep a numbered one; 0 is never [>= 0]
keep_last = 0  # of the numbered ones only so many; 0 is all [>= 0]
num_val_clips = 64  # [>= 1]
metrics_every = 0  # evaluate.py's PSNR, SSIM and right-wrong gap; 0 is never [>= 0]
metrics = ''  # and of lpips,fid,fvd those named here, if their weights are on this machine
num_metric_clips = 16  # [>= 2]
sample_steps = 50  # denoising steps per dreamed frame [1 to 1000]
wandb = False  # log to Weights & Biases too
wandb_project = 'nanowm'
# ------------------------------------------------------------------------------
config = configure(globals())
check_context(context_frames, num_frames)
check_choice('timestep_sampling', timestep_sampling, TIMESTEP_SAMPLING)
wanted = check_choices('metrics', metrics, NETWORKS)

# setup: the machine
master = RANK == 0
device = machine.pick_device(device)
dtype = machine.pick_dtype(dtype, device)
precision = machine.autocast(device, dtype)
machine.join_processes(device)
if fsdp and WORLD_SIZE == 1:
    raise UserError('fsdp=True needs several processes: start them with torchrun')
if muon and (fsdp or dtype == 'fp16'):
    raise UserError('muon=True wants whole matrices and bf16 or fp32: not fsdp=True, not dtype=fp16')
torch.manual_seed(seed)
out_dir, dataset = machine.under_results(out_dir), machine.under_results(dataset)
lock = folder.claim(out_dir)  # until this process ends

# setup: the data
if not real_data:
    scratch = tempfile.TemporaryDirectory()
    rows = 64 * num_frames * frame_interval
    dataset = random_dataset(scratch.name, frame_shape, action_dim, rows)
train_clips = Clips(dataset, 'train', num_frames, frame_interval, normalize_action)
val_clips = Clips(dataset, 'val', num_frames, frame_interval, normalize_action)
val_frames, val_action = val_clips.batch(val_clips.fixed(num_val_clips))
metric_clips = val_clips.fixed(num_metric_clips)
frame_shape = train_clips.frames.shape[1:]
decoder, can_look = None, real_data
if real_data:  # only pictures and metrics need the decoder of latents
    try:
        decoder = load_decoder(frame_shape[0], vae, device)
    except UserError as e:
        can_look = False
        if master:
            print(f'no pictures of dreams and no metrics: {e}')
networks = {}
if metrics_every and can_look:  # what is missing is said now, not after an hour
    check_enough(metric_clips)
    frame_size = val_clips.pixels(metric_clips[:1]).shape[-2:]
    networks, absent = load_networks(wanted, device, frame_size, num_frames - context_frames)
    for name, why in absent.items():
        if master:
            print(f'no {name.upper()}: {why}')

# setup: the model, its average, and the optimizers
global_batch = WORLD_SIZE * grad_accum * batch_size
about = folder.about(config, global_batch, (train_clips.mean.tolist(), train_clips.std.tolist()))
start = folder.starting_point(out_dir, resume, about)  # a checkpoint, or '' for a run that begins
model = build_model(config, frame_shape, train_clips.action_dim)
diffusion = Diffusion(pred_name, noise_schedule, zero_terminal_snr, snr_gamma=snr_gamma).to(device)
if init_from and not start:
    load_weights(model, read_checkpoint(locate(init_from))[0], init_from)
num_parameters = sum(p.numel() for p in model.parameters())
flops = 3 * forward_flops(model) * batch_size * grad_accum  # a backward pass costs two forward ones
if grad_checkpoint:
    machine.recompute_activations(model)
ema, models = model, [model]
if ema_decay:
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    models.append(ema)
for m in models:
    if fsdp:
        machine.shard(m, device)
    m.to(device)

parameters, ema_parameters = list(model.parameters()), list(ema.parameters())
weights = [p for p in parameters if p.requires_grad]
matrices = set()
if muon:
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2}
others = [p for p in weights if p not in matrices]
optimizers = [torch.optim.AdamW(others, learning_rate, weight_decay=weight_decay, fused=True)]
if muon:
    optimizers.append(Muon([p for p in weights if p in matrices], learning_rate, weight_decay))
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'fp16')
latest = os.path.join(out_dir, 'latest.safetensors')
step = 0  # steps done so far
if start:
    meta = restore_training(start, model, ema, optimizers)
    if meta['scaler']:  # it was fp16
        scaler.load_state_dict(meta['scaler'])
    step = meta['step']
net = machine.distributed(machine.compiled(model, device, compile), device)
logger = Logger(out_dir, config, step, wandb_project if wandb else '')
interrupt = machine.Interrupt(step)


def lr_at(n):
    """Linear warm-up, then a cosine down to min_lr at max_steps."""
    if n < warmup_steps:
        return learning_rate * (n + 1) / warmup_steps
    progress = (n - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def load(n):
    """The clips of this process's share of step n, one (frames, action) per micro-step."""
    shape = (WORLD_SIZE, grad_accum, batch_size)
    clips = np.random.default_rng([seed, n]).integers(len(train_clips), size=shape)
    return [train_clips.batch(numbers) for numbers in clips[RANK]]


def draw(shape, generator):
    """Timesteps [B,F] and noise like frames of `shape` [B,F,C,H,W]."""
    t = diffusion.sample_timesteps(shape[:2], timestep_sampling, timestep_mean, timestep_std,
                                   timestep_per_clip, generator)
    if clean_history:
        t = diffusion.with_clean_history(t, clean_history, clean_level, generator)
    return t, torch.randn(shape, device=device, generator=generator)


def batches(first):
    """Yields for every step from `first` on its micro-batches, each (x0, action, t, noise).

    All randomness of step n comes from (seed, n) and is drawn for the global batch: a resumed run
    repeats the uninterrupted one, and N processes draw what one would. While n is computed, the clips
    of the next steps are read, one step by each of the workers.
    """
    with ThreadPoolExecutor(num_workers) as loader:
        steps = range(first, max_steps)
        ahead = deque(loader.submit(load, n) for n in steps[:num_workers])
        for n in steps:
            loaded = ahead.popleft().result()
            if n + num_workers < max_steps:
                ahead.append(loader.submit(load, n + num_workers))
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + n)
            t, noise = draw((global_batch, num_frames, *frame_shape), generator)
            mine = slice(RANK * grad_accum, (RANK + 1) * grad_accum)
            t, noise = t.split(batch_size)[mine], noise.split(batch_size)[mine]
            x0 = [to_model(frames, device) for frames, _ in loaded]
            action = [action.to(device, non_blocking=True) for _, action in loaded]
            yield list(zip(x0, action, t, noise, strict=True))


@torch.no_grad()
def validation_loss():
    """Loss of the EMA weights on fixed clips, timesteps and noise; every process calls it (FSDP)."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = draw((len(val_frames), num_frames, *frame_shape), generator)
    parts = [tensor.split(batch_size) for tensor in (val_frames, val_action, *drawn)]
    loss = 0.0
    for frames, action, t, noise in zip(*parts, strict=True):
        x0 = to_model(frames, device)
        with precision:
            loss += diffusion.loss(ema, x0, action.to(device), t, noise).item() * len(x0)
    return loss / len(val_frames)


def rollout(frames, action, seed=0):
    """Held-out clips, dreamed anew; every process calls it (FSDP)."""
    x0, action = to_model(frames, device), action.to(device)
    with precision:
        return dream(ema, diffusion, x0, action, context_frames, sample_steps, seed)


def dream_picture():
    """Held-out clips, truth above dream; every process calls it (FSDP)."""
    truth = to_model(val_frames[:8], device)
    dreamed = rollout(val_frames[:8], val_action[:8])
    rows = {'truth': to_pixels(truth, decoder), 'dream': to_pixels(dreamed, decoder)}
    return contact_sheet(rows, context_frames)


def save(*paths):
    """Every process calls it, as FSDP has cut the weights among them; the first one writes."""
    state = training_state(model, ema, optimizers)
    for path in paths:
        if master:
            save_checkpoint(path, state, model.config, step=step, scaler=scaler.state_dict(),
                            action_meta=train_clips.action_meta, **about)


def due(every):
    """Whether what happens every so many steps happens after this one."""
    return every > 0 and (step % every == 0 or step == max_steps)


if start and start != latest:
    save(latest)  # from now on this folder's latest is that checkpoint
if master:
    rate = machine.matmul_rate(device, dtype)
    print(f'{num_parameters / 1e6:.2f} M parameters, {len(train_clips):,} clips, '
          f'{flops * WORLD_SIZE / 1e9:.1f} GFLOP a step, {device} {dtype} at {rate / 1e12:.2f} TFLOP/s')
    if step >= max_steps:
        print(f'{start} has done its max_steps={max_steps} already')
    print(folder.disk_space(out_dir, 4 * num_parameters * (2 + len(models)), config))

# the loop ---------------------------------------------------------------------
bar = tqdm(total=max_steps, initial=step, disable=not master, desc=out_dir, unit='step',
           dynamic_ncols=True)
stream = batches(step)
loss_sum, norm_sum = torch.zeros((), device=device), torch.zeros((), device=device)
clock, since, stop = time.perf_counter(), step, False
for micro_batches in stream:
    lr = lr_at(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr

    for micro, (x0, action, t, noise) in enumerate(micro_batches):
        with machine.gradient_sync(net, wanted=micro == grad_accum - 1):
            with precision:
                loss = diffusion.loss(net, x0, action, t, noise) / grad_accum
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    max_norm = math.inf
    if gradient_clip_norm and step >= gradient_clip_start:
        max_norm = gradient_clip_norm
    norm_sum += machine.whole(torch.nn.utils.clip_grad_norm_(weights, max_norm))
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if ema_decay:
        # over few steps at first, so that the untrained weights are soon forgotten
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(ema_parameters, parameters, 1 - decay)
    step += 1

    # the rest runs every few steps only: reading a number makes the CPU wait for the device
    stop = interrupt.agreed(step, device)
    events = (log_every, val_every, latest_every, keep_every, metrics_every)
    if not any(map(due, events)) and not stop:
        continue
    steps = step - since
    weights_norm = machine.whole(torch.nn.utils.get_total_norm(weights).detach())
    means = machine.mean(torch.stack([loss_sum / steps, norm_sum / steps, weights_norm]))
    loss_mean, norm, weights_norm = means.tolist()
    # a weight that is not finite must not be saved, even if no loss has shown it yet
    finite = math.isfinite(loss_mean) and math.isfinite(weights_norm)
    if not scaler.is_enabled():  # in fp16 gradients may overflow: the scaler skips such a step
        finite = finite and math.isfinite(norm)
    if not finite:
        bar.close()
        kept = f'{latest} holds the last good step' if os.path.exists(latest) else 'nothing was saved'
        raise UserError(f'step {step}: loss {loss_mean}, gradient {norm}, weights {weights_norm}: not '
                        f'finite, stopped before saving; {kept}; try a lower learning_rate or fp32')
    if master:
        speed = steps / (time.perf_counter() - clock)
        clips_per_s, mfu = speed * global_batch, speed * flops / rate
        logger.log(step, loss=loss_mean, grad_norm=norm, lr=lr, clips_per_s=clips_per_s, mfu=mfu)
        bar.set_postfix(loss=f'{loss_mean:.4f}', clips_s=f'{clips_per_s:.0f}', mfu=f'{mfu:.0%}')
        bar.update(step - bar.n)
    loss_sum.zero_()
    norm_sum.zero_()

    if due(keep_every):
        save(os.path.join(out_dir, f'step_{step:07d}.safetensors'), latest)
        folder.drop_old(out_dir, step, keep_last)
    elif due(latest_every) or stop:
        save(latest)
    if due(val_every):
        val_loss = validation_loss()
        logger.log(step, val_loss=val_loss)
        logger.plot_losses()
        if master:
            bar.write(f'step {step}: loss {loss_mean:.4f}, on held-out clips {val_loss:.4f}')
        if can_look:
            logger.picture(step, dream_picture())
    if due(metrics_every) and can_look:
        scores = evaluate(rollout, val_clips, metric_clips, context_frames, decoder, networks)
        if master:
            logger.log(step, **summarise(scores)['means'])
    clock, since = time.perf_counter(), step
    if stop:
        break

bar.close()
stream.close()  # and its threads
logger.close()
machine.leave_processes()
if stop and step < max_steps:
    if master:
        print(f'interrupted at step {step}, saved to {latest}; go on with --resume=True')
    sys.exit(interrupt.exit_code)
