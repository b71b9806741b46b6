"""Dream: show the model the first frames of held-out clips, give it the actions, compare with the truth.

    python sample.py --ckpt=out/wall                        # GIF beside the checkpoint
    python sample.py --ckpt=out/wall --num_frames=50        # beyond the model's window, which slides
    python sample.py --ckpt=out/wall --actions=file.npy     # your own actions, a row per recorded frame
"""
import os

import numpy as np
import torch
from tqdm import tqdm

import run
from configurator import UserError, check_choice, check_context, configure
from data import to_model
from machine import autocast
from pictures import side_by_side, to_pixels, write_video


def dream(model, diffusion, frames, action, num_context, num_steps, seed=0, progress=False,
          **options):
    """Continue frames[:, :num_context] under action. frames [B,F,C,H,W]; returns the same shape.

    Clip i draws its noise from seed + i, on the CPU: the same in any batch and on any device, so that
    two rollouts of a clip differ by their actions only. options go to Diffusion.sample.
    """
    draws = []
    for i in range(len(frames)):
        generator = torch.Generator().manual_seed(seed + i)
        draws.append(torch.randn(2, *frames.shape[1:], generator=generator))
    noise, context_noise = torch.stack(draws, dim=1).to(frames.device)
    with tqdm(disable=not progress, desc='dreaming', unit='eval') as bar:
        return diffusion.sample(model, frames[:, :num_context], action, frames.shape[1], num_steps,
                                noise, context_noise, progress=bar.update, **options)


def read_actions(path, action_dim, frame_interval):
    """Raw actions float32 [F,frame_interval,A] of an .npy, which has a row for each recorded frame,
    or one for each frame of the model. Raises UserError.
    """
    try:
        actions = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, EOFError, AttributeError) as e:
        raise UserError(f'--actions={path} is not a readable .npy file of floats: {e}') from e
    if not np.isfinite(actions).all():
        raise UserError(f'--actions={path}: some numbers are not finite')
    numbers = action_dim // frame_interval  # of a recorded action
    fits = actions.ndim == 2 and actions.shape[1] in (numbers, action_dim)
    if not fits or actions.size % action_dim:
        raise UserError(f'--actions={path} has shape {list(actions.shape)}: '
                        f'expected [{frame_interval} * num_frames, {numbers}]')
    return actions.reshape(-1, frame_interval, numbers)


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    out = ''  # file to write; '' is rollout.<format> beside the checkpoint
    format = 'gif'  # gif or mp4
    fps = 4.0  # [> 0]
    num_clips = 6  # held-out starts, or with --actions: dreams of the same actions [>= 1]
    num_frames = 16  # length of the dream, context included; with --actions, theirs [>= 2]
    actions = ''  # .npy of raw actions, a row per recorded frame; '' is the recorded ones
    seed = 0  # [>= 0]
    # --------------------------------------------------------------------------
    settings = configure(globals(), shared=run)
    check_choice('format', format, ('gif', 'mp4'))
    opened = run.open_run(settings)
    model, config, num_context = opened.model, opened.config, opened.context_frames
    out = out or os.path.join(run.output_folder(opened.ckpt), f'rollout.{format}')
    if not out.endswith(('.gif', '.mp4')):
        raise UserError(f'--out={out}: expected a name that ends in .gif or .mp4')
    run.make_folder(os.path.dirname(out) or '.')

    if actions:
        own = read_actions(actions, model.config.action_dim, config['frame_interval'])
        num_frames = len(own)
    check_context(num_context, num_frames)
    clips = opened.held_out(num_context if actions else num_frames)
    numbers = clips.fixed(num_clips, seed=seed)
    frames, action = clips.batch(numbers)
    frames = to_model(frames, opened.device)
    if actions:
        action = torch.from_numpy(clips.standardise(own)).flatten(1)
        action = action.expand(len(frames), -1, -1)
        unknown = frames.new_zeros(len(frames), num_frames - num_context, *frames.shape[2:])
        frames = torch.cat([frames, unknown], dim=1)

    torch.manual_seed(seed)  # what eta draws on the way
    with autocast(opened.device, opened.dtype):
        dreamed = dream(model, opened.diffusion, frames, action.to(opened.device), num_context,
                        opened.num_steps, seed, progress=True, **opened.sampler)
    rows = {'dream': to_pixels(dreamed, opened.vae)}
    if not actions:
        truth = clips.pixels(numbers).movedim(2, -1).numpy()
        rows = {'truth': truth} | rows
    write_video(out, side_by_side(rows, num_context), fps)
    print(f'{out}: {len(frames)} clips of {num_frames} frames, {num_context} of them given')
