"""Dream: continue held-out clips from their first frames and the actions, beside the truth.

    python sample.py --ckpt=out/wall                        # GIF beside the checkpoint
    python sample.py --ckpt=out/wall --num_frames=50        # beyond the model's window, which slides
    python sample.py --ckpt=out/wall --actions=file.npy     # your own actions, a row for each step
    python sample.py --ckpt=out/doom --samples=4            # several dreams of each start
"""
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import run
from configurator import UserError, check_choice, check_context, configure, extra
from controls import beyond, legend, read_own_actions
from data import to_model
from machine import autocast, under_results
from pictures import contact_sheet, side_by_side, to_pixels, write_picture, write_video


def dream(model, diffusion, frames, action, num_context, num_steps, seed=0, progress=False,
          **options):
    """Continue frames[:, :num_context] under action. frames [B,F,C,H,W]; returns the same shape.

    Clip i draws its noise from seed + i, on the CPU: the same in any batch and on any device, so that
    two rollouts of a clip differ by their actions only. (What eta draws depends on the batch too.)
    options go to Diffusion.sample.
    """
    if options.get('eta'):
        torch.manual_seed(seed)
    draws = []
    for i in range(len(frames)):
        generator = torch.Generator().manual_seed(seed + i)
        draws.append(torch.randn(2, *frames.shape[1:], generator=generator))
    noise, context_noise = torch.stack(draws, dim=1).to(frames.device)
    with tqdm(disable=not progress, desc='dreaming', unit='eval') as bar:
        return diffusion.sample(model, frames[:, :num_context], action, frames.shape[1], num_steps,
                                noise, context_noise, progress=bar.update, **options)


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    out = ''  # file to write; '' is rollout.<format> beside the checkpoint
    format = 'gif'  # gif, mp4, or png: all frames side by side
    fps = 4.0  # of a GIF at most 50 [0.01 to 100]
    num_clips = 6  # held-out starts [1 to 1000]
    samples = 1  # dreams of each start; where the world is random they differ [1 to 1000]
    num_frames = 16  # context included; where a recording ends, its actions begin again [2 to 100000]
    actions = ''  # .npy of your own: raw, a row for each recorded frame from where the dream begins; sets num_frames
    seed = 0  # [0 to 2147483647]
    # --------------------------------------------------------------------------
    settings = configure(globals(), shared=run)
    check_choice('format', format, ('gif', 'mp4', 'png'))
    opened = run.open_run(settings)
    model, config, num_context = opened.model, opened.config, opened.context_frames
    out = under_results(out) if out else os.path.join(run.output_folder(opened.ckpt), f'rollout.{format}')
    if not out.endswith(('.gif', '.mp4', '.png')) or os.path.isdir(out):
        raise UserError(f'--out={out}: expected a file whose name ends in .gif, .mp4 or .png')
    if out.endswith('.mp4'):
        extra('imageio_ffmpeg')  # says now, not after the dream, if it is missing
    run.make_folder(os.path.dirname(out) or '.')

    # the starts, and what is done from there
    if actions:
        clips = opened.held_out(num_context)
        about = opened.action_meta(clips)
        print(*legend(about), sep='\n')
        own = read_own_actions(actions, model.config.action_dim, config['frame_interval'])
        excess = beyond(about, own.reshape(-1, own.shape[2]))
        if excess:
            print(f'{actions}: {excess}; there its dream falls apart')
        num_frames = num_context + len(own)
    else:
        check_context(num_context, num_frames)
        clips = opened.held_out(num_context + 1)
        wanted = min(num_clips, (np.diff(clips.cumulative) > 0).sum())  # no more than recordings
        longest = int(np.diff(clips.episodes).max())
        recorded = min(num_frames, (longest - 1) // clips.interval + 1)
        clips = opened.held_out(recorded)
        while len(clips.fixed(num_clips)) < wanted:  # as much truth as leaves a start for every clip
            recorded -= 1
            clips = opened.held_out(recorded)
    numbers = clips.fixed(num_clips, seed=seed)
    frames, action = clips.batch(numbers)
    if actions:
        chosen = torch.from_numpy(clips.standardise(own)).flatten(1)  # [steps,interval*A]
        chosen = F.pad(chosen, (0, 0, 0, 1))  # what is done at the last frame leads to no frame
        chosen = chosen.expand(len(frames), -1, -1)
        action = torch.cat([action[:, :num_context - 1], chosen], dim=1)
    else:
        action = action[:, torch.arange(num_frames) % (clips.num_frames - 1)]
    frames = to_model(frames, opened.device)
    to_come = frames.new_zeros(len(frames), num_frames - clips.num_frames, *frames.shape[2:])
    frames = torch.cat([frames, to_come], dim=1)

    rows = {}
    if not actions:
        truth = clips.pixels(numbers).movedim(2, -1).numpy()
        rows['truth'] = np.pad(truth, [(0, 0), (0, to_come.shape[1]), (0, 0), (0, 0), (0, 0)],
                               constant_values=255)
    for i in range(samples):
        with autocast(opened.device, opened.dtype):
            dreamed = dream(model, opened.diffusion, frames, action.to(opened.device), num_context,
                            opened.num_steps, seed + i * len(frames), progress=True, **opened.sampler)
        label = f'dream {i + 1}' if samples > 1 else 'dream'
        rows[label] = to_pixels(dreamed, opened.vae)
    if out.endswith('.png'):
        write_picture(out, contact_sheet(rows, num_context))
    else:
        write_video(out, side_by_side(rows, num_context), fps)
    print(f'{out}: {len(frames)} clips of {num_frames} frames, {num_context} of them given')
