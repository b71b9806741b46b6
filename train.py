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
import copy
import math
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from tqdm import tqdm

import machine
from bench import forward_flops
from checkpoint import load_weights, read_checkpoint, restore_training, save_checkpoint, training_state
from configurator import UserError, configure
from data import Clips, random_dataset, to_model
from diffusion import Diffusion
from evaluate import evaluate, summarise
from logger import Logger
from machine import RANK, RESTARTS, WORLD_SIZE
from model import build_model
from pictures import contact_sheet, to_pixels, write_picture
from run import make_folder
from sample import dream
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
num_frames = 4  # frames per clip, and the model's window [>= 2]
context_frames = 1  # how many of them are given when it dreams [>= 1]
frame_interval = 1  # keep every k-th frame; the k actions between are concatenated [>= 1]
vae = ''  # decodes dreamed latents for a look: folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
normalize_action = False  # by the training split's mean and std
real_data = True  # False trains on random numbers: for benchmarks, and for trying a config with no data
frame_shape = (4, 32, 32)  # channels, height, width without real_data; read off the dataset otherwise
action_dim = 7  # numbers per recorded frame without real_data; times frame_interval reaches the model
# model
model_size = ''  # S, B, L or XL sets hidden_size, depth and num_heads
patch_size = 4  # [>= 1]
hidden_size = 128  # [>= 4]
depth = 4  # [>= 2]
num_heads = 4  # [>= 1]
injection = 'additive'  # additive, adaln, adaln_fuse, film or cross_attention
causal = True
zero_cross_gate = False  # begin cross_attention as the reference does, which never learns to listen
# diffusion
pred_name = 'v'  # epsilon, x, v or flow
noise_schedule: str = None  # linear or squaredcos_cap_v2; None is the target's native one
zero_terminal_snr: bool = None  # None is the target's native choice
snr_gamma = 5.0  # min-SNR loss weight; 0 turns it off [>= 0]
timestep_sampling = 'logit_normal'  # or uniform
timestep_mean = 0.0  # of the normal under logit_normal; higher is noisier
timestep_std = 1.0  # 2.5 or more favours both ends: clean pasts and noisy presents [>= 0]
timestep_per_clip = False  # one noise level for all frames instead of one each
clean_history = 0.0  # share of clips that begin as rollouts do, with a few almost clean frames [0 to 1]
clean_level = 0.05  # how noisy these are at most, as a share of the timesteps [0 to 1]
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
ema_decay = 0.999  # of the weights that validate, dream and are saved for use; 0 turns it off [0 to 1]
# logging
log_every = 10  # [>= 1]
val_every = 1000  # validation loss, and a picture of held-out dreams; 0 is never [>= 0]
latest_every = 1000  # replace latest.safetensors [>= 1]
keep_every = 10000  # and keep a numbered one; 0 is never [>= 0]
num_val_clips = 64  # [>= 1]
metrics_every = 0  # evaluate.py's PSNR, SSIM and gap between right and wrong actions; 0 is never [>= 0]
num_metric_clips = 16  # [>= 2]
sample_steps = 50  # denoising steps per dreamed frame [>= 1]
wandb = False  # log to Weights & Biases too
wandb_project = 'nanowm'
# ------------------------------------------------------------------------------
config = configure(globals())
if context_frames >= num_frames:
    raise UserError(f'context_frames={context_frames}: expected 1 to num_frames - 1 = {num_frames - 1}')

# setup: the machine
master = RANK == 0
device = machine.pick_device(device)
dtype = machine.pick_dtype(dtype, device)
precision = machine.autocast(device, dtype)
machine.join_processes(device)
if fsdp and WORLD_SIZE == 1:
    raise UserError('fsdp=True cuts a model among processes and here is one: start them with torchrun')
if fsdp and muon:
    raise UserError('muon=True works on whole matrices, and fsdp=True cuts them: leave one of them out')
torch.manual_seed(seed)
out_dir, dataset = machine.under_results(out_dir), machine.under_results(dataset)
make_folder(out_dir)

# setup: the data
if not real_data:
    scratch = tempfile.TemporaryDirectory()
    dataset = random_dataset(f'{scratch.name}/random', frame_shape, action_dim, rows=64 * num_frames * frame_interval)
train_clips = Clips(dataset, 'train', num_frames, frame_interval, normalize_action)
val_clips = Clips(dataset, 'val', num_frames, frame_interval, normalize_action)
val_frames, val_action = val_clips.batch(val_clips.fixed(num_val_clips))
frame_shape = train_clips.frames.shape[1:]
decoder, can_look = None, frame_shape[0] == 3 and real_data
if frame_shape[0] != 3 and real_data:  # latents: pictures and metrics need their decoder, training does not
    try:
        decoder, can_look = load_vae(vae, device), True
    except UserError as e:
        if master:
            print(f'no pictures of dreams and no metrics: {e}')
metric_clips = val_clips.fixed(num_metric_clips)
if metrics_every and can_look:
    val_clips.pixels(metric_clips)  # if they are missing, that is said now

# setup: the model, its average, and the optimizer
model = build_model(config, frame_shape, train_clips.action_dim)
diffusion = Diffusion(pred_name, noise_schedule, zero_terminal_snr, snr_gamma=snr_gamma).to(device)
diffusion.sample_timesteps((1, 1), timestep_sampling)  # refuses an unknown name now, not at step 0
latest = os.path.join(out_dir, 'latest.safetensors')
resume = resume or (machine.largest(RESTARTS, device) > 0 and os.path.exists(latest))
if os.path.exists(latest) and not resume:
    raise UserError(f'{latest} is there already: add --resume=True to go on, or choose another --out_dir')
if init_from and not resume:
    load_weights(model, read_checkpoint(init_from)[0], init_from)
num_parameters = sum(p.numel() for p in model.parameters())
flops = 3 * forward_flops(model) * batch_size * grad_accum
ema = copy.deepcopy(model).eval().requires_grad_(False) if ema_decay else model
if grad_checkpoint:
    machine.recompute_activations(model)
for m in dict.fromkeys((model, ema)):  # one and the same without an average
    if fsdp:
        machine.shard(m, device)
    m.to(device)
weights = [p for p in model.parameters() if p.requires_grad]
ema_weights = [e for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
matrices = [p for p in model.blocks.parameters() if muon and p.ndim == 2 and p.requires_grad]
others = [p for p in weights if all(p is not m for m in matrices)]
optimizers = [torch.optim.AdamW(others, learning_rate, weight_decay=weight_decay, fused=not device.startswith('mps'))]
if muon:  # Jordan et al. 2024: the update of a matrix is made orthogonal; scaled so that AdamW's rate suits it
    optimizers.append(torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn='match_rms_adamw'))
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype == 'fp16')
step = 0  # finished ones
if resume:
    meta = restore_training(latest, model, ema, optimizers)
    scaler.load_state_dict(meta['scaler'])
    step = meta['step']
net = machine.distributed(torch.compile(model) if compile else model, device)
logger = Logger(out_dir, config, step, wandb_project if wandb else '')


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
    t = diffusion.sample_timesteps(shape[:2], timestep_sampling, timestep_mean, timestep_std, timestep_per_clip,
                                   generator)
    if clean_history:
        t = with_clean_history(t, generator)
    return t, torch.randn(shape, device=device, generator=generator)


def with_clean_history(t, generator):
    """Timesteps [B,F] in which some clips begin with one to F-1 almost clean frames: what a rollout shows the model."""
    B, F = t.shape
    known = torch.randint(1, F, (B, 1), device=device, generator=generator)
    chosen = torch.rand(B, 1, device=device, generator=generator) < clean_history
    level = torch.rand(B, F, device=device, generator=generator) * clean_level * diffusion.num_timesteps
    history = torch.arange(F, device=device) < known
    return torch.where(chosen & history, level.long(), t)


def batches(first):
    """Yields for every step from `first` on its micro-batches, each (frames, action, t, noise).

    All randomness of a step comes from (seed, n) and is drawn for the global batch, so a resumed run repeats the
    uninterrupted one, and N processes draw what one would. The clips of step n+1 are read while n is computed.
    """
    micro_steps = WORLD_SIZE * grad_accum
    with ThreadPoolExecutor(1) as loader:
        ahead = loader.submit(load, first)
        for n in count(first):
            loaded, ahead = ahead.result(), loader.submit(load, n + 1)
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + n)
            t, noise = draw((micro_steps * batch_size, num_frames, *frame_shape), generator)
            micro_batches = []
            for i, (frames, action) in enumerate(loaded, start=RANK * grad_accum):
                mine = slice(i * batch_size, (i + 1) * batch_size)
                x0, action = to_model(frames, device), action.to(device, non_blocking=True)
                micro_batches.append((x0, action, t[mine], noise[mine]))
            yield micro_batches


@torch.no_grad()
def validation_loss():
    """Loss of the EMA weights on fixed clips, timesteps and noise; every process computes it, as FSDP has to."""
    generator = torch.Generator(device).manual_seed(seed)
    loss = 0.0
    for frames, action in zip(val_frames.split(batch_size), val_action.split(batch_size), strict=True):
        x0 = to_model(frames, device)
        t, noise = draw(x0.shape, generator)
        with precision:
            loss += diffusion.loss(ema, x0, action.to(device), t, noise).item() * len(x0)
    return loss / len(val_frames)


def dream_picture():
    """Held-out clips, truth (latents as decoded) above dream; every process dreams them, as FSDP has to."""
    x0, action = to_model(val_frames[:8], device), val_action[:8].to(device)
    with precision:
        dreamed = dream(ema, diffusion, x0, action, context_frames, sample_steps)
    return contact_sheet({'truth': to_pixels(x0, decoder), 'dream': to_pixels(dreamed, decoder)}, context_frames)


def save(*paths):
    """Every process helps to put together what FSDP has cut; the first one writes."""
    state = training_state(model, ema, optimizers)
    scale = train_clips.mean.tolist(), train_clips.std.tolist()
    for path in paths:
        if master:
            save_checkpoint(path, state, model.config, step=step, train=config, scaler=scaler.state_dict(),
                            action_scale=scale)


def due(every):
    """Whether what happens every so many steps happens after this one."""
    return every > 0 and (step % every == 0 or step == max_steps)


def on_signal(signum, frame):
    """SIGTERM and Ctrl-C finish the step, save, and leave; several processes agree on it when they next log."""
    global asked
    asked = signum


asked, stop = 0, False
signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

if master:
    rate = machine.matmul_rate(device, dtype)
    print(f'{num_parameters / 1e6:.2f} M parameters, {len(train_clips):,} clips, '
          f'{flops * WORLD_SIZE / 1e9:.1f} GFLOP a step, {device} {dtype} at {rate / 1e12:.2f} TFLOP/s')

# the loop ---------------------------------------------------------------------
bar = tqdm(total=max_steps, initial=step, disable=not master, desc=out_dir, unit='step', dynamic_ncols=True)
stream = batches(step)
loss_sum, norm_sum = torch.zeros((), device=device), torch.zeros((), device=device)
clock, since = time.perf_counter(), step
while step < max_steps and not stop:
    lr = lr_at(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr

    for micro, (x0, action, t, noise) in enumerate(next(stream)):
        with machine.gradient_sync(net, wanted=micro == grad_accum - 1):
            with precision:
                loss = diffusion.loss(net, x0, action, t, noise) / grad_accum
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    clips_now = gradient_clip_norm > 0 and step >= gradient_clip_start
    norm = torch.nn.utils.clip_grad_norm_(weights, gradient_clip_norm if clips_now else math.inf)
    norm_sum += machine.whole(norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if ema_decay:
        decay = min(ema_decay, (1 + step) / (10 + step))  # a short average at first, to forget the initialisation
        with torch.no_grad():
            torch._foreach_lerp_(ema_weights, weights, 1 - decay)
    step += 1

    # everything below happens now and then; reading a number here is the only wait for the device
    events = (log_every, val_every, latest_every, keep_every, metrics_every)
    if not any(map(due, events)) and not (asked and WORLD_SIZE == 1):
        continue
    size = machine.whole(torch.nn.utils.get_total_norm(weights).detach()) / WORLD_SIZE  # not finite if a weight is not
    sums = machine.total(torch.stack([loss_sum, norm_sum, size, torch.tensor(float(asked), device=device)]))
    loss_mean, norm, size, stop = sums.tolist()
    loss_mean, norm = (s / (WORLD_SIZE * (step - since)) for s in (loss_mean, norm))
    if not math.isfinite(loss_mean + size) or not (math.isfinite(norm) or scaler.is_enabled()):
        bar.close()
        raise UserError(f'step {step}: loss {loss_mean}, gradient {norm}, weights {size}: not finite, stopped before '
                        f'saving; {latest} holds the last good step; try a lower learning_rate or fp32')
    if master:
        speed = (step - since) / (time.perf_counter() - clock)  # steps/s
        clips_per_s, mfu = speed * batch_size * grad_accum * WORLD_SIZE, speed * flops / rate
        logger.log(step, loss=loss_mean, grad_norm=norm, lr=lr, clips_per_s=clips_per_s, mfu=mfu)
        bar.set_postfix(loss=f'{loss_mean:.4f}', clips_s=f'{clips_per_s:.0f}', mfu=f'{mfu:.0%}')
        bar.update(step - bar.n)
    loss_sum.zero_()
    norm_sum.zero_()

    if due(keep_every):
        save(os.path.join(out_dir, f'step_{step:07d}.safetensors'), latest)
    elif due(latest_every) or stop:
        save(latest)
    if due(val_every):
        val_loss = validation_loss()
        logger.log(step, val_loss=val_loss)
        if master:
            bar.write(f'step {step}: loss {loss_mean:.4f}, on held-out clips {val_loss:.4f}')
        if can_look:
            picture = dream_picture()
            logger.picture(step, picture)
            if master:
                write_picture(os.path.join(out_dir, f'dream_{step:07d}.png'), picture)
    if due(metrics_every) and can_look:
        scores = evaluate(ema, diffusion, val_clips, metric_clips, context_frames, sample_steps, vae=decoder,
                          dtype=dtype)
        logger.log(step, **summarise(scores)['means'])
    clock, since = time.perf_counter(), step

bar.close()
stream.close()
logger.close()
machine.leave_processes()
if stop and step < max_steps:
    if master:
        print(f'interrupted at step {step}, saved to {latest}; go on with --resume=True')
    sys.exit(128 + (asked or signal.SIGTERM))
