"""A trained run, opened: its model, diffusion and settings, and the held-out clips that fit it.

    model, diffusion, config = load_run('out/wall')
    clips = held_out(model, config, num_frames=16)

A checkpoint of ours knows how it was trained. One that train.py did not write has to be told
dataset, pred_name, frame_interval and context_frames, on the command line or in a config file:
config/published/ has the reference's.
"""
import os
import tempfile
from dataclasses import dataclass

import torch

from checkpoint import load_model
from configurator import UserError
from controls import checked
from data import Clips
from diffusion import Diffusion
from machine import cast_weights, compiled, pick_device, pick_dtype, under_results
from vae import load_decoder

# settings ---------------------------------------------------------------------
# of every script that opens a run
ckpt = 'out/wall'  # run folder, checkpoint file or Hugging Face id
dataset = ''  # prepared dataset to start from; '' is the one the model was trained on
context_frames = 0  # given frames; 0 is what the model was trained for [>= 0]
num_steps = 0  # denoising steps per frame; 0 is the run's own [0 to 1000]
schedule = 'sequential'  # sequential, full_sequence or pyramid
stabilization = 0.02  # how noisy known frames are shown, as a share of the timesteps [0 to 1]
solver = 'ddim'  # or dpmpp: DPM-Solver++ 2M, of second order, for fewer steps
eta = 0.0  # of ddim: 0 is deterministic, 1 is DDPM, whose draws depend on the batch [0 to 1]
grid = 'linear'  # the steps' timesteps: evenly spaced in t, or logsnr
history = 0  # frames kept as context when the window slides; 0 is all but one [>= 0]
cache = True  # remember finished frames; False runs the whole window at every step, to the same end
vae = ''  # decodes latents: folder or file; '' is $VAE_MODEL_PATH or pretrained/sd-vae-ft-mse
device = ''  # cpu, cuda, mps; '' is the best there is
dtype = ''  # fp32, bf16 or fp16 autocast; '' is bf16 on CUDA, else fp32
compile = False  # torch.compile the model: it takes minutes, so for long runs only
# what only a checkpoint that train.py did not write has to be told
pred_name: str = None  # epsilon, x, v or flow
frame_interval: int = None  # [>= 1]
normalize_action: bool = None  # None is no
injection: str = None  # adaln_fuse, if it is that: its weights look like those of additive
causal: bool = None  # False, if time attention was not
input_size: tuple = None  # height,width of what it sees, latents or pixels, where that is no square
# ------------------------------------------------------------------------------
SAMPLER = ('schedule', 'stabilization', 'solver', 'eta', 'grid', 'history', 'cache')
FOREIGN = ('pred_name', 'frame_interval', 'normalize_action', 'injection', 'causal', 'input_size')
OF_SHAPE = ('injection', 'causal', 'input_size')  # those that the model is built from


@dataclass
class OpenedRun:
    """What a script needs of a run; frames and actions go to `device`, computed with in `dtype`."""
    ckpt: str
    model: torch.nn.Module
    diffusion: Diffusion
    config: dict  # train.py's settings, action_scale and action_meta
    vae: torch.nn.Module  # decodes what the model dreams; None if that is pixels
    device: str
    dtype: str
    dataset: str
    context_frames: int
    num_steps: int
    sampler: dict  # options of Diffusion.sample

    def held_out(self, num_frames):
        return held_out(self.model, self.config, num_frames, self.dataset)

    def action_meta(self, clips):
        """What the checkpoint knows of its actions, or else the dataset. Raises UserError."""
        about = self.config.get('action_meta') or clips.action_meta
        return checked(about, clips.actions.shape[1], self.ckpt)


def open_run(settings):
    """The OpenedRun that the settings above name. Raises UserError."""
    ckpt, device = locate(settings['ckpt']), pick_device(settings['device'])
    options = {key: settings[key] for key in FOREIGN}
    model, diffusion, config = load_run(ckpt, device, settings['dataset'],
                                        settings['context_frames'], **options)
    dtype = pick_dtype(settings['dtype'], device)
    cast_weights(model, dtype)
    return OpenedRun(
        ckpt=ckpt,
        model=compiled(model, device, settings['compile']),
        diffusion=diffusion,
        config=config,
        vae=load_decoder(model.config.in_channels, settings['vae'], device),
        device=device,
        dtype=dtype,
        dataset=settings['dataset'] or config['dataset'],
        context_frames=settings['context_frames'] or config['context_frames'],
        num_steps=settings['num_steps'] or config['sample_steps'],
        sampler={key: settings[key] for key in SAMPLER})


def locate(ckpt):
    """A run may lie under $RESULTS_DIR; a Hugging Face id stays what it is. Raises UserError."""
    if not ckpt:
        raise UserError("ckpt='': expected a run folder, a checkpoint file or a Hugging Face id")
    moved = under_results(ckpt)
    return moved if os.path.exists(moved) else ckpt


def load_run(ckpt, device='', dataset='', context_frames=0, **options):
    """(model, diffusion, config) of a checkpoint; config as in OpenedRun.

    options: of a checkpoint that train.py did not write, the settings in FOREIGN. Raises UserError.
    """
    ckpt, device = locate(ckpt), pick_device(device)
    options = {key: value for key, value in options.items() if value is not None}
    shape = {key: options[key] for key in OF_SHAPE if key in options}
    model, meta = load_model(ckpt, device, **shape)
    if 'train' not in meta:
        options |= {'context_frames': context_frames, 'dataset': dataset}
        config = foreign_config(ckpt, model.config, options)
    elif options:
        needless = ' '.join(f'--{key}' for key in options)
        raise UserError(f'{ckpt} knows how it was trained: leave out {needless}')
    else:
        config = own_config(ckpt, meta)
    diffusion = Diffusion(config['pred_name'], config['noise_schedule'],
                          config['zero_terminal_snr'], snr_gamma=config['snr_gamma'])
    return model, diffusion.to(device), config


def own_config(ckpt, meta):
    """load_run's config of a checkpoint with the metadata that train.py writes. Raises UserError."""
    config = meta['train']
    try:
        numbers = [config[key] for key in ('num_frames', 'context_frames', 'frame_interval', 'sample_steps')]
        good = all(type(n) is int and 1 <= n <= 10_000 for n in numbers)
        good = good and type(config['dataset']) is str
        config = config | {'action_scale': meta['action_scale'], 'action_meta': meta.get('action_meta')}
        good = good and {'pred_name', 'noise_schedule', 'zero_terminal_snr', 'snr_gamma'} <= config.keys()
    except (LookupError, TypeError):
        good = False
    if not good:
        raise UserError(f'{ckpt}: its metadata is not as train.py writes it; use another checkpoint')
    return config


def foreign_config(ckpt, model_config, options):
    """load_run's config of a checkpoint that train.py did not write. Raises UserError."""
    needed = ('pred_name', 'frame_interval', 'context_frames', 'dataset')
    missing = ' '.join(f'--{key}=' for key in needed if not options.get(key))
    if missing:
        raise UserError(f'{ckpt} does not say how it was trained: add {missing}')
    guessed = dict(injection=model_config.injection, causal=model_config.causal,
                   normalize_action=False)
    config = guessed | options
    print(f'{ckpt}: taken to be trained with', *(f'--{key}={config[key]}' for key in guessed))
    clips = Clips(under_results(options['dataset']), 'val', 1, normalize=config['normalize_action'])
    native = dict(noise_schedule=None, zero_terminal_snr=None, snr_gamma=0.0, sample_steps=250)
    return native | config | dict(num_frames=model_config.num_frames,
                                  action_scale=(clips.mean.tolist(), clips.std.tolist()),
                                  action_meta=clips.action_meta)


def held_out(model, config, num_frames, dataset=''):
    """Validation clips as the run saw them, from its dataset or another that fits it."""
    dataset = under_results(dataset or config['dataset'])
    clips = Clips(dataset, 'val', num_frames, config['frame_interval'], config['action_scale'])
    shape, size = clips.frames.shape[1:], model.config
    want = (size.in_channels, *size.input_size)
    if shape != want or clips.action_dim != size.action_dim:
        raise UserError(f'{clips.folder}: frames {shape} and {clips.action_dim} action numbers do '
                        f'not fit the model, which takes {want} and {size.action_dim}')
    return clips


def output_folder(ckpt, out_dir=''):
    """Where what a checkpoint made goes: its own folder, out/<name> for a Hugging Face id, or out_dir."""
    if out_dir:
        return under_results(out_dir)
    if os.path.isdir(ckpt):
        return ckpt
    if os.path.exists(ckpt):
        return os.path.dirname(ckpt) or '.'
    return under_results(f'out/{os.path.basename(ckpt)}')


def make_folder(path):
    """Make the folder. Raises UserError now, before hours of work, if it cannot be written to."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f'cannot write to {path}: {e.strerror}') from e
