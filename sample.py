"""Dream: show the model the first frames of held-out clips, give it the actions, and write truth beside dream.

    python sample.py --ckpt=out/wall                            # GIF beside the checkpoint
    python sample.py --ckpt=out/wall --num_frames=50            # longer than the model's window, which slides
    python sample.py --ckpt=out/wall --actions=file.npy         # your own actions, float [num_frames, A]
"""
import os

import numpy as np
import torch
from tqdm import tqdm

import run
from configurator import UserError, configure
from data import to_model
from machine import autocast
from pictures import side_by_side, to_pixels, write_video
from run import held_out, load_run  # noqa: F401  for notebooks: from sample import dream, held_out, load_run


def dream(model, diffusion, frames, action, num_context, num_steps, seed=0, progress=False, **options):
    """Continue frames[:, :num_context] under action. frames [B,N,C,H,W] in [-1,1]; returns the same shape.

    Clip i draws its noise from seed + i, on the CPU: the same in any batch and on any device, so that two rollouts of
    a clip differ by their actions only. options go to Diffusion.sample.
    """
    draws = []
    for i in range(len(frames)):
        generator = torch.Generator().manual_seed(seed + i)
        draws.append(torch.randn(2, *frames.shape[1:], generator=generator))
    noise, context_noise = torch.stack(draws, dim=1).to(frames.device)
    with tqdm(disable=not progress, desc='dreaming', unit='eval') as bar:
        return diffusion.sample(model, frames[:, :num_context], action, frames.shape[1], num_steps,
                                noise=noise, context_noise=context_noise, progress=bar.update, **options)


def read_actions(path, action_dim, frame_interval):
    """Your own actions, float32 [num_frames, action_dim] as the model counts them, from an .npy. Raises UserError.

    The file holds raw numbers, a row for each recorded frame or for each frame of the model.
    """
    try:
        actions = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, EOFError, AttributeError) as e:
        raise UserError(f'--actions={path} is not a readable .npy file of floats: {e}') from e
    if not np.isfinite(actions).all():
        raise UserError(f'--actions={path}: some numbers are not finite')
    numbers = action_dim // frame_interval  # of a recorded action
    if actions.ndim != 2 or actions.shape[1] not in (numbers, action_dim) or actions.size % action_dim:
        raise UserError(f'--actions={path} has shape {list(actions.shape)}: '
                        f'expected [{frame_interval} * num_frames, {numbers}]')
    return actions.reshape(-1, action_dim)


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    out = ''  # file to write; '' is rollout.<format> beside the checkpoint
    format = 'gif'  # gif or mp4
    fps = 4.0  # [> 0]
    num_clips = 6  # held-out starts, or with --actions: dreams of the same actions [>= 1]
    num_frames = 16  # length of the dream, context included [>= 2]
    actions = ''  # .npy of float [num_frames, A] (or [num_frames * frame_interval, A]) instead of the recorded ones
    seed = 0  # [>= 0]
    # --------------------------------------------------------------------------
    settings = configure(globals(), shared=run)
    if format not in ('gif', 'mp4'):
        raise UserError(f'format={format!r}: expected gif or mp4')
    opened = run.open_run(settings)
    model, config, num_context = opened.model, opened.config, opened.context_frames
    out = out or os.path.join(run.output_folder(opened.ckpt), f'rollout.{format}')
    if not out.endswith(('.gif', '.mp4')):
        raise UserError(f'--out={out}: expected a name that ends in .gif or .mp4')
    run.make_folder(os.path.dirname(out) or '.')

    if actions:
        own = read_actions(actions, model.config.action_dim, config['frame_interval'])
        num_frames = len(own)
    if num_context >= num_frames:
        raise UserError(f'context_frames={num_context}: expected fewer than num_frames={num_frames}')
    clips = opened.held_out(num_context if actions else num_frames)
    numbers = clips.fixed(num_clips, seed=seed)
    frames, action = clips.batch(numbers)
    frames = to_model(frames, opened.device)
    if actions:
        raw = own.reshape(num_frames, config['frame_interval'], -1)
        scaled = torch.from_numpy((raw - clips.mean) / clips.std).reshape(1, num_frames, -1)
        action = scaled.expand(len(frames), -1, -1)
        unknown = frames.new_zeros(len(frames), num_frames - num_context, *frames.shape[2:])
        frames = torch.cat([frames, unknown], dim=1)

    torch.manual_seed(seed)  # what eta draws on the way
    with autocast(opened.device, opened.dtype):
        dreamed = dream(model, opened.diffusion, frames, action.to(opened.device), num_context, opened.num_steps,
                        seed, progress=True, **opened.sampler)
    rows = {'dream': to_pixels(dreamed, opened.vae)}
    if not actions:
        truth = clips.pixels(numbers).movedim(2, -1).numpy()
        rows = {'truth': truth} | rows
    write_video(out, side_by_side(rows, num_context), fps)
    print(f'{out}: {len(frames)} clips of {num_frames} frames, {num_context} of them given')
