"""Measure a world model on fixed held-out clips, next to baselines that keep it honest.

    python evaluate.py --ckpt=out/wall
    torchrun --nproc_per_node=8 evaluate.py --ckpt=out/rt1_b2       # the same figures, sooner

copy repeats the last context frame; wrong gives the same model, with the same noise, another clip's actions. A model
that ignores its actions scores as well with wrong ones: the gap between right and wrong says how well it listens. vae
is what a model of latents could reach at best. Only predicted frames count, against the original pixels.

PSNR and SSIM are always there; LPIPS, FID (pip install -e '.[eval]') and FVD are if their weights are, in pretrained/
or in torch's cache. Nothing is downloaded: what is absent is said, with the command that fetches it.

Leaves beside the checkpoint: metrics.json, metrics.md (a table to paste), metrics.png (quality over the horizon) and
clips.png (the best, the median and the worst clip, truth above dream).
"""
import json
import os
import platform
import sys
import time
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import RANK, WORLD_SIZE, autocast, pick_device, pick_dtype, to_model
from sample import beside, contact_sheet, dream, held_out, load_decoder, load_run, make_folder, to_pixels

MAX_PSNR = 58.92  # 10 log10(12 * 255^2): the error of rounding to 8 bits; an identical frame scores this, not infinity
WEIGHTS = {  # of the networks that judge: a file in pretrained/ or in torch's cache, and where it is published
    'vgg': ('vgg16-397923af.pth', 'https://download.pytorch.org/models/vgg16-397923af.pth'),
    'alex': ('alexnet-owt-7be5be79.pth', 'https://download.pytorch.org/models/alexnet-owt-7be5be79.pth'),
    'inception': ('weights-inception-2015-12-05-6726825d.pth', 'https://github.com/toshas/torch-fidelity/releases/'
                  'download/v0.2.0/weights-inception-2015-12-05-6726825d.pth'),
    'i3d': ('i3d/i3d_torchscript.pt', 'https://www.dropbox.com/scl/fi/c5nfs6c422nlpj880jbmh/i3d_torchscript.pt'
            '?rlkey=x5xcjsrz0818i4qxyoglp5bb8&dl=1'),
}
COLUMNS = {'psnr': ('PSNR', 2), 'ssim': ('SSIM', 4), 'lpips': ('LPIPS', 4), 'fid': ('FID', 2), 'fvd': ('FVD', 1),
           'gap_psnr': ('right - wrong actions, dB', 2)}  # of tables: title and digits
DISTANCES = ('fid', 'fvd')  # between two sets; the other metrics compare frame with frame


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of frames [...,C,H,W] in [0, 1], one value per frame."""
    mse = (a - b).square().mean(dim=(-3, -2, -1))
    return (-10 * torch.log10(mse.clamp(min=1e-12))).clamp(max=MAX_PSNR)


def ssim(a, b, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of frames [...,C,H,W] in [0, 1], one value per frame.

    Gaussian windows that fit inside the frame, as in scikit-image (torchmetrics adds a mirrored border and scores
    higher); frames smaller than the window get a window of their own size.
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


# -----------------------------------------------------------------------------
# the networks that judge

def weights(name):
    """Path of a network's weights; raises FileNotFoundError with the command that fetches them."""
    file, url = WEIGHTS[name]
    for folder in ('pretrained', os.path.join(torch.hub.get_dir(), 'checkpoints')):
        if os.path.exists(path := os.path.join(folder, file)):
            return path
    raise FileNotFoundError(f"curl -L --create-dirs -o pretrained/{file} '{url}'")


def chunked(f, *frames, size=32):
    """f over frames [B,F,3,H,W], `size` frames at a time: -> [B,F,...]."""
    parts = zip(*(x.flatten(0, 1).split(size) for x in frames), strict=True)
    return torch.cat([f(*part) for part in parts]).unflatten(0, frames[0].shape[:2])


def lpips_network(net, device, size):
    """LPIPS (Zhang et al. 2018) on net = vgg or alex: (a, b) of [B,F,3,H,W] in [0, 1] -> [B,F]."""
    import lpips
    trunk = torch.load(weights(net), map_location='cpu', weights_only=True)
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # not from the internet; its layers on top it ships
    # they are torchvision's layers, under their numbers there
    network.net.load_state_dict({k: trunk[f'features.{k.split(".", 1)[1]}'] for k in network.net.state_dict()})
    network.to(device)(*torch.zeros(2, 1, 3, *size, device=device))  # says now if the frames are too small for it
    return lambda a, b: chunked(lambda x, y: network(x, y, normalize=True)[:, 0, 0, 0], a, b)


def fid_network(device):
    """InceptionV3's pool3 of frames [B,F,3,H,W] in [0, 1] -> [B,F,2048] (Heusel et al. 2017)."""
    from torch_fidelity import FeatureExtractorInceptionV3
    path = weights('inception')
    network = FeatureExtractorInceptionV3('inception', ['2048'], feature_extractor_weights_path=path).to(device)
    return lambda x: chunked(lambda frames: network((frames * 255).round().byte())[0], x)


def fvd_network(device, num_frames):
    """I3D's features of clips [B,F,3,H,W] in [0, 1] -> [B,1,400] (Unterthiner et al. 2018)."""
    if num_frames < 10:
        raise ValueError(f'it needs 10 predicted frames and here are {num_frames}: --num_frames=')
    network = torch.jit.load(weights('i3d'), map_location=device).eval()

    def features(clip):
        x = F.interpolate(clip[0] * 2 - 1, (224, 224), mode='bilinear').transpose(0, 1)[None]  # [1,3,F,224,224]
        return network(x, rescale=False, resize=True, return_features=True)

    return lambda x: torch.stack([features(clip) for clip in x.split(1)])


def load_networks(metrics, device, size, num_frames, lpips_net='vgg'):
    """({name: network}, {name: why it is absent}) for metrics of lpips, fid and fvd, on frames of size (H, W)."""
    networks, absent = {}, {}
    for name in metrics:
        try:
            networks[name] = {'lpips': lambda: lpips_network(lpips_net, device, size),
                              'fid': lambda: fid_network(device),
                              'fvd': lambda: fvd_network(device, num_frames)}[name]()
        except ImportError as e:  # they need torchvision, whose newest would replace the torch that is here
            absent[name] = f"{e}: pip install -e '.[eval]' torch=={torch.__version__.split('+')[0]}"
        except Exception as e:  # whatever is wrong with one of them, the others are given
            absent[name] = (str(e) or type(e).__name__).splitlines()[0]
    return networks, absent


def frechet(a, b):
    """Frechet distance of the Gaussians with the means and covariances of features a [N,d] and b [M,d].

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((AB)^(1/2)), whose last term is the sum of the singular values of
    R_a R_b' where A = R_a' R_a: no root of a singular matrix, and quick while N < d.
    """
    a, b = a.double(), b.double()
    roots = [torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5).R for x in (a, b)]
    spread = sum(r.square().sum() for r in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + spread).item()


# -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, diffusion, clips, numbers, num_context, num_steps, batch_size=64, seed=0, vae=None, networks=None,
             dtype='fp32', **options):
    """Score the predicted frames of clips `numbers`, shared among the processes if there are several.

    Returns {name: [num_clips, predicted]} for psnr, ssim and lpips (if it is among `networks`) of the dream, and under
    copy_, wrong_ and, with a VAE, vae_ of the baselines. fid and fvd are features [num_clips, n, d], also under truth_.
    Clip i draws its noise from seed + i. options go to Diffusion.sample.
    """
    if len(numbers) < 2:
        raise ValueError('wrong actions are those of another clip: 2 clips or more are needed')
    device, metrics = model.pos_embed.device, {'psnr': psnr, 'ssim': ssim} | (networks or {})
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = -(-len(numbers) // world_size)  # the same for all, as FSDP wants: the last may do some clips twice
    scores = defaultdict(list)
    pixels = lambda x: ((vae.decode(x) if vae else x.clamp(-1, 1)) + 1) / 2  # noqa: E731
    with tqdm(total=2 * share, desc='evaluating', unit='rollout', disable=rank > 0, leave=False) as bar:
        for first in range(rank * share, (rank + 1) * share, batch_size):
            part = np.arange(first, min(first + batch_size, (rank + 1) * share)) % len(numbers)
            frames, right = clips.batch(numbers[part])
            x0, wrong = to_model(frames, device), clips.batch(numbers[part - 1])[1]
            truth = clips.pixels(numbers[part]).to(device).float() / 255  # [B,F,3,H,W]
            last, truth = truth[:, num_context - 1:num_context], truth[:, num_context:]
            predictions = {'copy_': last.expand_as(truth)}
            for who, action in (('', right), ('wrong_', wrong)):
                with autocast(device, dtype):
                    x = dream(model, diffusion, x0, action.to(device), num_context, num_steps, seed + first, **options)
                predictions[who] = pixels(x[:, num_context:])
                bar.update(len(part))
            if vae:
                predictions['vae_'] = pixels(x0[:, num_context:])
            for name, metric in metrics.items():
                if name in DISTANCES:
                    scores[f'truth_{name}'].append(metric(truth).cpu())
                for who, x in predictions.items():
                    scores[who + name].append((metric(x) if name in DISTANCES else metric(x, truth)).cpu())
    scores = {k: torch.cat(v) for k, v in scores.items()}
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, scores)
        scores = {k: torch.cat([s[k] for s in shares]) for k in scores}
    return {k: v[:len(numbers)] for k, v in scores.items()}


def summarise(scores):
    """What evaluate returns -> {'means', 'intervals', 'per_frame', 'per_clip'}, each {name: number or list}.

    gap_ is right minus wrong actions, clip by clip. fid and fvd are one number for the whole set: among the means only.
    """
    scores = {k: v.double() for k, v in scores.items()}
    scores |= {f'gap_{k[6:]}': scores[k[6:]] - v for k, v in scores.items()
               if k.startswith('wrong_') and not k.endswith(DISTANCES)}
    sets = {k: scores.pop(k) for k in list(scores) if k.endswith(DISTANCES)}
    per_clip = {k: v.mean(dim=1).numpy() for k, v in scores.items()}
    means = {k: float(v.mean()) for k, v in per_clip.items()}
    means |= {k: frechet(v.flatten(0, 1), sets[f'truth_{k[-3:]}'].flatten(0, 1)) for k, v in sets.items()
              if not k.startswith('truth_')}
    return dict(means=means, intervals={k: interval(v) for k, v in per_clip.items()},
                per_frame={k: v.mean(dim=0).tolist() for k, v in scores.items()},
                per_clip={k: v.tolist() for k, v in per_clip.items()})


def interval(values, resamples=1000):
    """95 % interval [low, high] of the mean of values [n], by bootstrap (Efron 1979), the same resamples every time."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return np.percentile(values[picks].mean(axis=1), [2.5, 97.5]).tolist()


def markdown(rows):
    """A Markdown table of {first cell: [other cells]}, the first row its head."""
    lines = [f'| {" | ".join([str(first), *map(str, others)])} |' for first, others in rows.items()]
    return '\n'.join([lines[0], '| --- ' * lines[0].count(' | ') + '| --- |', *lines[1:]])


def with_interval(key, means, intervals, whose=''):
    """'mean [low, high]' of metric `key`; '' where there is none."""
    digits, key = COLUMNS[key][1], whose + key
    span = ', '.join(f'{v:.{digits}f}' for v in intervals.get(key, ()))
    return f'{means[key]:.{digits}f}' + f' [{span}]' * bool(span) if key in means else ''


def table(name, means, intervals):
    """Markdown: the run, ready to paste among others, above its baselines."""
    columns = {k: title for k, (title, _) in COLUMNS.items() if k in means}
    rows = {f'**{name}**': '', 'copy': 'copy_', 'wrong actions': 'wrong_', 'vae': 'vae_'}
    return markdown({'': columns.values()} | {row: [with_interval(k, means, intervals, whose) for k in columns]
                                              for row, whose in rows.items() if f'{whose}psnr' in means})


def plot(curves, ticks, caption, joined=True, size=(560, 320)):
    """A picture of {label: [n]} over n ticks; a value may be a pair, then the second is drawn as plus and minus."""
    palette = [(230, 60, 50), (120, 120, 120), (60, 100, 220), (40, 160, 90), (240, 160, 40), (150, 80, 190),
               (30, 170, 190), (140, 100, 60)]
    (W, H), left, top, bottom = size, 56, 14 + 16 * -(-len(curves) // 4), 40
    values = np.array(list(curves.values()))
    values, bars = (values[..., 0], values[..., 1]) if values.ndim == 3 else (values, np.zeros_like(values))
    low, high = (values - bars).min(), (values + bars).max()
    margin = 0.05 * (high - low) + 1e-3
    low, high = low - margin, high + margin
    image = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(image)
    place = lambda i, v, shift=0: (left + (i + 0.5) * (W - left - 20) / len(ticks) + shift,  # noqa: E731
                                   top + (high - v) / (high - low) * (H - top - bottom))
    for v in np.linspace(low, high, 6):
        y = place(0, v)[1]
        draw.line([(left, y), (W - 20, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f'{v:.4g}', fill=(90, 90, 90))
    for i, tick in enumerate(ticks):
        draw.text((place(i, 0)[0], H - bottom + 6), str(tick), fill=(90, 90, 90), anchor='ma')
    draw.text((left, H - 18), caption, fill=(90, 90, 90))
    for j, label in enumerate(curves):
        colour, shift = palette[j % len(palette)], 0 if joined else 12 * j  # beside each other, not on top
        points = [place(i, v, shift) for i, v in enumerate(values[j])]
        if joined:
            draw.line(points, fill=colour, width=3)
        for i, (x, y) in enumerate(points):
            v, bar = values[j, i], bars[j, i]
            draw.line([place(i, v - bar, shift), place(i, v + bar, shift)], fill=colour, width=2)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        draw.text((left + (W - left) // 4 * (j % 4), 6 + 16 * (j // 4)), label, fill=colour)
    return image


def machine(device):
    """What computes, in words."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    return f'{name}, threads: {torch.get_num_threads()}'


if __name__ == '__main__':
    from configurator import configure
    # settings -----------------------------------------------------------------
    ckpt = 'out/wall'  # run folder, checkpoint file or Hugging Face id
    dataset = ''  # prepared dataset; '' is the one the model was trained on
    out_dir = ''  # where the results go; '' is beside the checkpoint
    metrics = 'lpips,fid,fvd'  # besides PSNR and SSIM, where their weights are; '' is none
    lpips_net = 'vgg'  # or alex
    num_clips = 256  # fixed held-out clips
    num_frames = 0  # clip length; 0 is the model's window
    context_frames = 0  # given frames; 0 is what the model was trained for
    num_steps = 0  # denoising steps per frame; 0 is the run's own
    schedule = 'sequential'  # sequential, full_sequence or pyramid
    solver = 'ddim'  # or dpmpp: DPM-Solver++ 2M, of second order, for fewer steps
    grid = 'linear'  # the steps' timesteps: evenly spaced in t, or logsnr
    cache = True  # remember finished frames; False runs the whole window at every step, for the same dream
    batch_size = 64
    seed = 42  # of the choice of clips
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
    settings = configure(globals())
    start = time.perf_counter()
    if num_clips < 2 or min(num_steps, seed) < 0 or batch_size < 1:
        sys.exit('expected num_clips of 2 or more (wrong actions are those of another clip), num_steps and batch_size '
                 'of 1 or more')
    wanted = [m for m in metrics.split(',') if m]
    if {*wanted} - {'lpips', 'fid', 'fvd'} or lpips_net not in ('vgg', 'alex'):
        sys.exit(f'metrics={metrics!r}, lpips_net={lpips_net!r}: expected some of lpips,fid,fvd, and vgg or alex')
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if WORLD_SIZE > 1:
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
    model, diffusion, cfg = load_run(ckpt, device, dataset, context_frames, pred_name=pred_name,
                                     frame_interval=frame_interval, normalize_action=normalize_action,
                                     injection=injection, causal=causal)
    num_frames, context_frames = num_frames or cfg['num_frames'], context_frames or cfg['context_frames']
    num_steps = num_steps or cfg['sample_steps']
    if not 1 <= context_frames < num_frames:
        sys.exit(f'context_frames={context_frames}: expected 1 or more, and fewer than num_frames={num_frames}')
    make_folder(out_dir := out_dir or beside(ckpt) or '.')
    clips = held_out(model, cfg, num_frames, dataset)
    numbers, vae = clips.fixed(num_clips, seed), load_decoder(model, vae)
    size = clips.pixels(numbers[:1]).shape[-2:]
    networks, absent = load_networks(wanted, device, size, num_frames - context_frames, lpips_net)
    options = dict(schedule=schedule, solver=solver, grid=grid, cache=cache)
    try:
        scores = evaluate(model, diffusion, clips, numbers, context_frames, num_steps, batch_size, vae=vae,
                          networks=networks, dtype=dtype, **options)
    except ValueError as e:  # a schedule or solver there is not
        sys.exit(str(e))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK:
        sys.exit()

    settings |= dict(dataset=dataset or cfg['dataset'], num_frames=num_frames, context_frames=context_frames,
                     num_steps=num_steps, num_clips=len(numbers), processes=WORLD_SIZE, machine=machine(device),
                     parameters=sum(p.numel() for p in model.parameters()), train=cfg)
    results = summarise(scores)
    if not np.isfinite(results['means']['psnr']):
        sys.exit(f'{ckpt} dreams what is not a number: its weights are broken')

    order = np.argsort(results['per_clip']['psnr'])
    shown = {'truth': [], 'dream': []}
    for i in order[[-1, len(order) // 2, 0]]:
        frames, action = clips.batch(numbers[i:i + 1])
        with autocast(device, dtype):
            dreamed = dream(model, diffusion, to_model(frames, device), action.to(device), context_frames, num_steps,
                            seed=int(i), **options)
        shown['truth'].append(clips.pixels(numbers[i:i + 1]).permute(0, 1, 3, 4, 2).numpy())
        shown['dream'].append(to_pixels(dreamed, vae))
    sheet = contact_sheet({k: np.concatenate(v) for k, v in shown.items()})
    Image.fromarray(sheet).save(os.path.join(out_dir, 'clips.png'))
    curves = {'dream': 'psnr', 'copy': 'copy_psnr', 'wrong actions': 'wrong_psnr', 'vae': 'vae_psnr'}
    curves = {f'{k}  {results["means"][v]:.2f} dB': results['per_frame'][v] for k, v in curves.items()
              if v in results['means']}
    plot(curves, range(context_frames, num_frames), 'PSNR over the frames of the clip').save(
        os.path.join(out_dir, 'metrics.png'))
    text = table(os.path.basename(os.path.normpath(ckpt)), results['means'], results['intervals'])
    with open(os.path.join(out_dir, 'metrics.md'), 'w') as f:
        f.write(text + '\n')
    seconds = time.perf_counter() - start
    path = os.path.join(out_dir, 'metrics.json')
    with open(f'{path}.tmp', 'w') as f:
        json.dump(dict(settings=settings, **results, clips=numbers.tolist(), absent=absent, seconds=seconds), f)
    os.replace(f'{path}.tmp', path)  # last of all and whole: where it is, the evaluation is done
    print(text)
    for name, why in absent.items():
        print(f'no {name.upper()}: {why}')
    print(f'{len(numbers)} clips, {context_frames} of {num_frames} frames given, {num_steps} steps a frame, '
          f'{seconds:.0f} s: metrics.json, .md, .png and clips.png in {out_dir}')
