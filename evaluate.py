"""Measure a world model on fixed held-out clips, next to two baselines that keep it honest.

    python evaluate.py --ckpt=out/wall

copy repeats the last context frame; wrong gives the same model, with the same noise, another clip's actions. A model
that ignores its actions scores as well with wrong ones: the gap between right and wrong says how well it listens.
Only predicted frames count. Leaves metrics.json and metrics.png beside the checkpoint.
"""
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import to_model
from sample import beside, dream, held_out, load_decoder, load_run

MAX_PSNR = 58.92  # 10 log10(12 * 255^2): the error of rounding to 8 bits; an identical frame scores this, not infinity


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of frames [...,C,H,W] in [0, 1], one value per frame."""
    mse = (a - b).square().mean(dim=(-3, -2, -1))
    return (-10 * torch.log10(mse.clamp(min=1e-12))).clamp(max=MAX_PSNR)


def ssim(a, b, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of frames [...,C,H,W] in [0, 1], one value per frame.

    Gaussian windows that fit inside the frame; frames smaller than the window get a window of their own size.
    """
    shape, (C, H, W) = a.shape[:-3], a.shape[-3:]
    size = min(window, H - (H + 1) % 2, W - (W + 1) % 2)
    g = torch.exp(-(torch.arange(size, device=a.device) - size // 2) ** 2 / (2 * sigma ** 2))
    g = (g / g.sum()).to(a.dtype)

    def blur(x):
        x = F.conv2d(x, g[None, None, :, None])
        return F.conv2d(x, g[None, None, None, :])

    a, b = a.reshape(-1, 1, H, W), b.reshape(-1, 1, H, W)
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a ** 2, blur(b * b) - mu_b ** 2, blur(a * b) - mu_a * mu_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    s = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a ** 2 + mu_b ** 2 + c1) * (var_a + var_b + c2))
    return s.mean(dim=(-2, -1)).reshape(*shape, C).mean(dim=-1)


def evaluate(model, diffusion, clips, numbers, num_context, num_steps, batch_size=64, seed=0, vae=None, **options):
    """PSNR and SSIM of `numbers`' predicted frames: {'psnr', 'ssim', 'copy_psnr', ...: [num_clips, predicted]}.

    They are compared with the original pixels; a model of latents needs its VAE. options go to Diffusion.sample.
    """
    device = model.pos_embed.device
    frames, action = clips.batch(numbers)
    scores = {f'{who}{metric}': [] for who in ('', 'copy_', 'wrong_') for metric in ('psnr', 'ssim')}
    with tqdm(total=2 * len(frames), desc='evaluating', unit='rollout') as bar:
        for i in range(0, len(frames), batch_size):
            part = slice(i, i + batch_size)
            x0 = to_model(frames[part], device)
            right, wrong = (a[part].to(device) for a in (action, action.roll(1, dims=0)))
            truth = clips.pixels(numbers[part]).float() / 255  # [B,F,3,H,W]
            predictions = {'copy_': truth[:, num_context - 1:num_context].expand_as(truth[:, num_context:])}
            for who, a in (('', right), ('wrong_', wrong)):
                x = dream(model, diffusion, x0, a, num_context, num_steps, seed=seed + i, **options)[:, num_context:]
                predictions[who] = ((vae.decode(x) if vae else x.clamp(-1, 1)).cpu() + 1) / 2
                bar.update(len(x0))
            for who, x in predictions.items():
                for name, metric in (('psnr', psnr), ('ssim', ssim)):
                    scores[who + name].append(metric(x, truth[:, num_context:]))
    return {k: torch.cat(v) for k, v in scores.items()}


def curve_picture(curves, first, size=(480, 300)):
    """A line for each {label: values}, over the frames of the horizon, as a picture."""
    colours = {'dream': (230, 60, 50), 'copy': (120, 120, 120), 'wrong actions': (60, 100, 220)}
    (W, H), left, top, bottom = size, 56, 30, 40
    values = np.array(list(curves.values()))
    low_value, top_value = np.floor(values.min()), np.ceil(values.max() + 0.5)
    image = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(image)
    n = len(next(iter(curves.values())))
    place = lambda i, v: (left + (i + 0.5) * (W - left - 20) / n,  # noqa: E731
                          top + (top_value - v) / (top_value - low_value) * (H - top - bottom))
    for v in np.linspace(low_value, top_value, 6):
        y = place(0, v)[1]
        draw.line([(left, y), (W - 20, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f'{v:.1f} dB', fill=(90, 90, 90))
    for i in range(n):
        draw.text((place(i, 0)[0] - 4, H - bottom + 6), str(first + i), fill=(90, 90, 90))
    draw.text((left, H - 18), 'frame of the clip', fill=(90, 90, 90))
    for j, (label, values) in enumerate(curves.items()):
        points = [place(i, v) for i, v in enumerate(values)]
        draw.line(points, fill=colours[label], width=3)
        for x, y in points:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colours[label])
        draw.text((left + 130 * j, 8), f'{label}  {np.mean(values):.2f}', fill=colours[label])
    return image


if __name__ == '__main__':
    from configurator import configure
    # settings -----------------------------------------------------------------
    ckpt = 'out/wall'  # run folder, checkpoint file or Hugging Face id
    dataset = ''  # prepared dataset; '' is the one the model was trained on
    out_dir = ''  # where metrics.json and metrics.png go; '' is beside the checkpoint
    num_clips = 256  # fixed held-out clips
    num_frames = 0  # clip length; 0 is the model's window
    context_frames = 0  # given frames; 0 is what the model was trained for
    num_steps = 0  # denoising steps per frame; 0 is the run's own
    solver = 'ddim'  # or dpmpp: DPM-Solver++ 2M, of second order, for fewer steps
    grid = 'linear'  # the steps' timesteps: evenly spaced in t, or logsnr
    cache = True  # remember finished frames; False runs the whole window at every step, for the same dream
    batch_size = 64
    seed = 42  # of the choice of clips
    vae = ''  # decodes latents: folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
    device = ''  # cpu, cuda, mps; '' is the best there is
    # what only a checkpoint that train.py did not write has to be told
    pred_name: str = None  # epsilon, x, v or flow
    frame_interval: int = None
    normalize_action: bool = None  # None is no
    injection: str = None  # adaln_fuse, if it is that: its weights look like those of additive
    causal: bool = None  # False, if time attention was not
    # --------------------------------------------------------------------------
    configure(globals())
    start = time.perf_counter()
    model, diffusion, cfg = load_run(ckpt, device, dataset, context_frames, pred_name=pred_name,
                                     frame_interval=frame_interval, normalize_action=normalize_action,
                                     injection=injection, causal=causal)
    num_frames, context_frames = num_frames or cfg['num_frames'], context_frames or cfg['context_frames']
    num_steps = num_steps or cfg['sample_steps']
    if num_clips < 2 or num_steps < 1 or batch_size < 1:
        sys.exit('expected num_clips of 2 or more (wrong actions are those of another clip), num_steps and batch_size '
                 'of 1 or more')
    if num_frames <= context_frames:
        sys.exit(f'num_frames={num_frames} must be more than context_frames={context_frames}')
    clips = held_out(model, cfg, num_frames, dataset)
    try:
        scores = evaluate(model, diffusion, clips, clips.fixed(num_clips, seed), context_frames, num_steps, batch_size,
                          vae=load_decoder(model, vae), solver=solver, grid=grid, cache=cache)
    except ValueError as e:
        sys.exit(str(e))

    metrics = {k: v.mean().item() for k, v in scores.items()}
    curves = {k: v.mean(dim=0).tolist() for k, v in scores.items()}
    metrics |= dict(num_clips=len(scores['psnr']), seconds=time.perf_counter() - start, num_frames=num_frames,
                    context_frames=context_frames, num_steps=num_steps, solver=solver, grid=grid, ckpt=ckpt,
                    per_frame=curves)
    out_dir = out_dir or beside(ckpt)
    os.makedirs(out_dir or '.', exist_ok=True)
    with open(os.path.join(out_dir, 'metrics.json'), 'w') as f:
        json.dump(metrics, f, indent=1)
    labels = {'dream': 'psnr', 'copy': 'copy_psnr', 'wrong actions': 'wrong_psnr'}
    curve_picture({k: curves[v] for k, v in labels.items()}, context_frames).save(os.path.join(out_dir, 'metrics.png'))
    print(f'{"":14} {"PSNR":>7} {"SSIM":>7}    {metrics["num_clips"]} clips, {context_frames} of {num_frames} '
          f'frames given, {num_steps} steps a frame, {metrics["seconds"]:.0f} s')
    for label, key in labels.items():
        print(f'{label:14} {metrics[key]:7.2f} {metrics[key.replace("psnr", "ssim")]:7.4f}')
    print(f'{os.path.join(out_dir, "metrics.json")} and metrics.png')
