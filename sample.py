"""Dream: show the model the first frames of held-out clips, give it the actions, and write truth beside dream.

    python sample.py --ckpt=out/wall                            # GIF beside the checkpoint
    python sample.py --ckpt=out/wall --num_frames=50            # longer than the model's window, which slides
    python sample.py --ckpt=out/wall --actions=file.npy         # your own actions, float [num_frames, A]
"""
import os
import sys
import tempfile

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoint import load_model
from data import Clips, autocast, pick_device, pick_dtype, to_model
from diffusion import Diffusion
from vae import load_vae


def load_run(ckpt, device='', dataset='', context_frames=0, **told):
    """(model, diffusion, settings) of a checkpoint; ends with one line if it cannot be read.

    A checkpoint that train.py did not write has to be told its dataset, context_frames, pred_name and frame_interval,
    and may be told normalize_action, injection and causal; one of ours knows the latter five.
    """
    device = pick_device(device)
    told = {k: v for k, v in told.items() if v is not None}
    try:
        model, meta = load_model(ckpt, device, told.get('injection'), told.get('causal'))
        if 'train' in meta:
            if told:
                sys.exit(f'{ckpt} knows how it was trained: leave out {" ".join(f"--{k}" for k in told)}')
            cfg = meta['train'] | {'action_scale': meta['action_scale']}
        else:
            told |= {'dataset': dataset, 'context_frames': context_frames}
            need = ('pred_name', 'frame_interval', 'context_frames', 'dataset')
            if missing := [f'--{k}=' for k in need if not told.get(k)]:
                sys.exit(f'{ckpt} does not say how it was trained: add {" ".join(missing)}')
            taken = dict(injection=model.config.injection, causal=model.config.causal,
                         normalize_action=told.get('normalize_action', False))
            print(f'{ckpt}: taken to be trained with', *(f'--{k}={v}' for k, v in taken.items()))
            scale = Clips(dataset, 'val', 1, normalize=taken['normalize_action'])
            cfg = told | taken | dict(noise_schedule=None, zero_terminal_snr=None, snr_gamma=0.0, sample_steps=250,
                                      num_frames=model.config.num_frames,
                                      action_scale=(scale.mean.tolist(), scale.std.tolist()))
        diffusion = Diffusion(cfg['pred_name'], cfg['noise_schedule'], cfg['zero_terminal_snr'],
                              snr_gamma=cfg['snr_gamma'])
    except (FileNotFoundError, ValueError) as e:
        sys.exit(str(e))
    except KeyError as e:
        sys.exit(f'{ckpt} lacks {e} in its metadata: was it written by this train.py?')
    return model, diffusion.to(device), cfg


def beside(ckpt):
    """The folder for what is made with a checkpoint: its own, or out/<name> for a Hugging Face id."""
    if os.path.exists(ckpt):
        return ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt)
    return os.path.join('out', os.path.basename(ckpt))


def make_folder(path):
    """The folder, made if need be; ends with one line, before hours of work, if nothing can be written there."""
    try:
        os.makedirs(path or '.', exist_ok=True)
        tempfile.TemporaryFile(dir=path or '.').close()
    except OSError as e:
        sys.exit(f'cannot write to {path}: {e.strerror}')


def held_out(model, cfg, num_frames, dataset=''):
    """Validation clips as the run saw them (interval, action scale), from its dataset or another that fits it."""
    clips = Clips(dataset or cfg['dataset'], 'val', num_frames, cfg['frame_interval'], cfg['action_scale'])
    want = (model.config.in_channels, *model.config.input_size, model.config.action_dim)
    if (*clips.frames.shape[1:], clips.action_dim) != want:
        sys.exit(f'{dataset or cfg["dataset"]}: frames {clips.frames.shape[1:]} and {clips.action_dim} action numbers '
                 f'do not fit the model, which takes {want[:3]} and {want[3]}')
    return clips


def dream(model, diffusion, frames, action, num_context, num_steps, seed=0, progress=False, **options):
    """Continue frames[:, :num_context] under action. frames [B,N,C,H,W] in [-1,1]; returns the same shape.

    Clip i draws its noise from seed + i, on the CPU: the same in any batch and on any device, so that two rollouts of
    a clip differ by their actions only. options go to Diffusion.sample.
    """
    draws = [torch.randn(2, *frames.shape[1:], generator=torch.Generator().manual_seed(seed + i))
             for i in range(len(frames))]
    noise, context_noise = torch.stack(draws, dim=1).to(frames.device)
    with tqdm(disable=not progress, desc='dreaming', unit='eval') as bar:
        return diffusion.sample(model, frames[:, :num_context], action, frames.shape[1], num_steps,
                                noise=noise, context_noise=context_noise, progress=bar.update, **options)


def load_decoder(model, path=''):
    """The VAE that decodes what the model dreams, or None if it dreams pixels."""
    if model.config.in_channels == 3:
        return None
    try:
        return load_vae(path, model.pos_embed.device)
    except (FileNotFoundError, ValueError) as e:
        sys.exit(str(e))


def to_pixels(frames, vae=None):
    """[..., C,H,W] in [-1, 1], or latents with their VAE, -> uint8 [..., H,W,3] on the CPU."""
    frames = vae.decode(frames) if vae else frames
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy().swapaxes(-3, -1).swapaxes(-3, -2)


def side_by_side(rows, num_context, min_size=96):
    """Video uint8 [T,H',W',3] with one row for each {label: uint8 [B,T,h,w,3]} and one column for each clip.

    Dreamed frames carry a red bar; frames are enlarged without smoothing to at least min_size pixels.
    """
    scale = -(-min_size // next(iter(rows.values())).shape[2])
    left, gap, bar = 44, 4, 4
    video = []
    for t in range(next(iter(rows.values())).shape[1]):
        strips = []
        for label, clips in rows.items():
            frames = clips[:, t].repeat(scale, axis=1).repeat(scale, axis=2)
            colour = (230, 60, 50) if label == 'dream' and t >= num_context else (160, 160, 160)
            frames = np.concatenate([frames, np.broadcast_to(np.uint8(colour), (len(frames), bar, *frames.shape[2:]))],
                                    axis=1)
            frames = np.pad(frames, ((0, 0), (gap, 0), (0, gap), (0, 0)), constant_values=255)
            strip = Image.fromarray(np.pad(np.concatenate(frames, axis=1), ((0, 0), (left, 0), (0, 0)),
                                           constant_values=255))
            ImageDraw.Draw(strip).text((4, strip.height // 2 - 6), label, fill=(40, 40, 40))
            strips.append(np.asarray(strip))
        video.append(np.concatenate(strips))
    return np.stack(video)


def contact_sheet(rows):
    """Picture uint8 [H',W',3]: for each clip, a strip of frames for each {label: uint8 [B,T,h,w,3]}."""
    strips = [np.concatenate(list(clip), axis=1) for clips in zip(*rows.values(), strict=True) for clip in clips]
    return np.concatenate(strips).repeat(2, axis=0).repeat(2, axis=1)


def write_video(path, video, fps):
    """Write uint8 [T,H,W,3] as a looping GIF, or as MP4 if the name says so (needs imageio-ffmpeg)."""
    if path.endswith('.mp4'):
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            sys.exit('writing MP4 needs an encoder: pip install imageio-ffmpeg, or use --format=gif')
        video = video[:, :video.shape[1] // 2 * 2, :video.shape[2] // 2 * 2]  # H.264 wants even sides
        iio.imwrite(path, video, fps=fps, codec='libx264', plugin='FFMPEG', macro_block_size=1)
    else:
        iio.imwrite(path, video, duration=1000 / fps, loop=0)


if __name__ == '__main__':
    from configurator import configure
    # settings -----------------------------------------------------------------
    ckpt = 'out/wall'  # run folder, checkpoint file or Hugging Face id
    dataset = ''  # prepared dataset to start from; '' is the one the model was trained on
    out = ''  # file to write; '' is rollout.<format> beside the checkpoint
    format = 'gif'  # gif or mp4
    fps = 4
    num_clips = 6  # held-out starts, or with --actions: dreams of the same actions
    num_frames = 16  # length of the dream, context included
    context_frames = 0  # 0 is what the model was trained for
    actions = ''  # .npy of float [num_frames, A] (or [num_frames * frame_interval, A]) instead of the recorded ones
    num_steps = 0  # denoising steps per frame; 0 is the run's own
    schedule = 'sequential'  # sequential, full_sequence or pyramid
    stabilization = 0.02  # how noisy the known frames are shown, as a share of the timesteps
    eta = 0.0  # 0 is deterministic DDIM, 1 is DDPM
    solver = 'ddim'  # or dpmpp: DPM-Solver++ 2M, of second order, for fewer steps
    grid = 'linear'  # the steps' timesteps: evenly spaced in t, or logsnr
    cache = True  # remember finished frames; False runs the whole window at every step, for the same dream
    history = 0  # frames kept as context when the window slides; 0 is all but one
    seed = 0
    vae = ''  # decodes latents: folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
    device = ''  # cpu, cuda, mps; '' is the best there is
    dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
    # what only a checkpoint that train.py did not write has to be told
    pred_name: str = None  # epsilon, x, v or flow
    frame_interval: int = None
    normalize_action: bool = None  # None is no
    injection: str = None  # adaln_fuse, if it is that: its weights look like those of additive
    causal: bool = None  # False, if time attention was not
    # --------------------------------------------------------------------------
    configure(globals())
    if format not in ('gif', 'mp4') or fps <= 0 or num_clips < 1 or seed < 0:
        sys.exit(f'format={format}, fps={fps}, num_clips={num_clips}, seed={seed}: expected gif or mp4, and no '
                 'negative numbers')
    out = out or os.path.join(beside(ckpt), f'rollout.{format}')
    if not out.endswith(('.gif', '.mp4')):
        sys.exit(f'--out={out}: expected a name that ends in .gif or .mp4')
    model, diffusion, cfg = load_run(ckpt, device, dataset, context_frames, pred_name=pred_name,
                                     frame_interval=frame_interval, normalize_action=normalize_action,
                                     injection=injection, causal=causal)
    context_frames = context_frames or cfg['context_frames']
    if actions:
        try:
            own = np.load(actions, allow_pickle=False).astype(np.float32)
            if not np.isfinite(own).all():
                raise ValueError('some numbers are not finite')
        except (OSError, ValueError, EOFError, AttributeError) as e:
            sys.exit(f'--actions={actions} is not a readable .npy file of floats: {e}')
        A = model.config.action_dim
        raw = A // cfg['frame_interval']  # numbers per recorded action
        if own.ndim != 2 or own.shape[1] not in (raw, A) or own.size % A:
            sys.exit(f'--actions={actions} has shape {list(own.shape)}: expected [{A // raw} * num_frames, {raw}]')
        num_frames = own.size // A
    if not 1 <= context_frames < num_frames:
        sys.exit(f'context_frames={context_frames}: expected 1 or more, and fewer than num_frames={num_frames}')
    make_folder(os.path.dirname(out))
    clips = held_out(model, cfg, context_frames if actions else num_frames, dataset)
    numbers = clips.fixed(num_clips, seed=seed)
    frames, action = clips.batch(numbers)
    frames = to_model(frames, model.pos_embed.device)
    vae = load_decoder(model, vae)
    if actions:
        action = torch.from_numpy((own.reshape(-1, raw) - clips.mean) / clips.std).reshape(1, num_frames, A)
        action = action.expand(len(frames), -1, -1)
        blank = frames.new_zeros(len(frames), num_frames - context_frames, *frames.shape[2:])
        frames = torch.cat([frames, blank], dim=1)
    torch.manual_seed(seed)  # what eta draws on the way
    try:
        with autocast(frames.device, pick_dtype(dtype, frames.device)):
            dreamed = dream(model, diffusion, frames, action.to(frames.device), context_frames,
                            num_steps or cfg['sample_steps'], seed, progress=True, schedule=schedule,
                            stabilization=stabilization, eta=eta, history=history, solver=solver, grid=grid,
                            cache=cache)
    except ValueError as e:
        sys.exit(str(e))
    rows = {'dream': to_pixels(dreamed, vae)}
    if not actions:
        rows = {'truth': clips.pixels(numbers).permute(0, 1, 3, 4, 2).numpy()} | rows
    write_video(out, side_by_side(rows, context_frames), fps)
    print(f'{out}: {len(frames)} clips of {num_frames} frames, {context_frames} of them given')
