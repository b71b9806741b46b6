"""Measure a world model on fixed held-out clips, next to baselines that keep it honest.

    python evaluate.py --ckpt=out/wall
    torchrun --nproc_per_node=8 evaluate.py --ckpt=out/rt1_b2       # the same figures, sooner

`copy` repeats the last context frame. `wrong actions` is the same model with the same noise, under
another clip's actions: a model that ignores its actions scores as well with wrong ones, so the gap
between right and wrong says how well it listens. `vae` is what a model of latents could reach at
best. Only predicted frames count, against the original pixels.

Leaves beside the checkpoint: metrics.json, .md (a table to paste), .png (quality over the horizon)
and clips.png (the best, median and worst clip); if it is not its folder's latest, under its name.
"""
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import envs
import machine
import objects
import run
from configurator import UserError, check_choice, check_choices, check_context, configure
from data import to_model
from machine import RANK, WORLD_SIZE, autocast, write_whole
from metrics import DISTANCES, NETWORKS, frechet, interval, load_networks, psnr, ssim
from pictures import contact_sheet, plot, to_pixels, write_picture
from sample import dream

COLUMNS = {  # of tables: title and digits
    'psnr': ('PSNR', 2),
    'ssim': ('SSIM', 4),
    'lpips': ('LPIPS', 4),
    'fid': ('FID', 2),
    'fvd': ('FVD', 1),
    'gap_psnr': ('right - wrong actions, dB', 2),
}
BASELINES = {'copy': 'copy_', 'wrong actions': 'wrong_', 'vae': 'vae_'}  # and prefixes of scores


@torch.no_grad()
def evaluate(rollout, clips, numbers, num_context, vae=None, networks=None, world=None,
             batch_size=64):
    """Score the predicted frames of clips `numbers`; several processes share the clips.

    rollout(frames, action, seed): dreams anew what Clips.batch gives, as sample.dream does.
    networks: of load_networks. Returns {name: [num_clips, predicted]} for psnr, ssim and lpips of
    the dream, and under copy_, wrong_ and, with a VAE, vae_ of the baselines. fid and fvd are
    features [num_clips, n, d], also under truth_. A world adds the scores of objects.compare.
    """
    check_enough(numbers)
    metrics = {'psnr': psnr, 'ssim': ssim} | (networks or {})

    def in_pixels(x):
        x = x[:, num_context:]
        if vae:
            x = vae.decode(x)
        return (x.clamp(-1, 1) + 1) / 2

    # every process has as many clips, as FSDP wants; the last one may do some of the first again
    share = math.ceil(len(numbers) / WORLD_SIZE)
    end = (RANK + 1) * share
    scores = defaultdict(list)
    bar = tqdm(total=2 * share, desc='evaluating', unit='rollout', disable=RANK > 0, leave=False)
    for first in range(RANK * share, end, batch_size):
        places = np.arange(first, min(first + batch_size, end)) % len(numbers)
        frames, action = clips.batch(numbers[places])
        _, wrong_action = clips.batch(numbers[places - 1])
        predictions = {}
        for who, told in {'': action, 'wrong_': wrong_action}.items():
            x = rollout(frames, told, first)
            predictions[who] = in_pixels(x)
            bar.update(len(x))
        original = clips.pixels(numbers[places]).to(x.device).float() / 255  # [B,F,3,H,W]
        truth = original[:, num_context:]
        predictions['copy_'] = original[:, [num_context - 1]].expand_as(truth)
        if vae:
            predictions['vae_'] = in_pixels(to_model(frames, x.device))
        for name, values in score(predictions, truth, metrics, world).items():
            scores[name].append(values)
    bar.close()
    shares = machine.gather({name: torch.cat(parts) for name, parts in scores.items()})
    return {name: torch.cat([part[name] for part in shares])[:len(numbers)] for name in scores}


def check_enough(numbers):
    if len(numbers) < 2:
        raise UserError(f'{len(numbers)} clip to evaluate: expected 2 or more, as the wrong '
                        "actions are another clip's")


def score(predictions, truth, metrics, world=None):
    """{name: values [B,predicted], or features [B,n,d]} of {prefix: frames} beside the true frames."""
    scores = {}
    for name, metric in metrics.items():
        if name in DISTANCES:
            scores[f'truth_{name}'] = metric(truth).cpu()
        for who, prediction in predictions.items():
            images = [prediction] if name in DISTANCES else [prediction, truth]
            scores[who + name] = metric(*images).cpu()
    if world:
        for who, prediction in predictions.items():
            pair = prediction.float().cpu().numpy(), truth.cpu().numpy()
            for name, values in objects.compare(world, *pair).items():
                scores[who + name] = torch.from_numpy(values)
    return scores


def summarise(scores):
    """evaluate's scores -> {'means', 'intervals', 'per_frame', 'per_clip'}, each a dict by name.

    gap_ is right minus wrong actions, clip by clip. fid and fvd are among the means only.
    """
    scores = {name: values.double() for name, values in scores.items()}
    per_frame = {name: x for name, x in scores.items() if not name.endswith(DISTANCES)}
    for name in [name for name in per_frame if f'wrong_{name}' in per_frame]:
        per_frame[f'gap_{name}'] = per_frame[name] - per_frame[f'wrong_{name}']

    per_clip = {name: values.mean(dim=1).numpy() for name, values in per_frame.items()}
    means = {name: float(values.mean()) for name, values in per_clip.items()}
    for name in scores.keys() - per_frame.keys():
        if not name.startswith('truth_'):
            truth = scores[f'truth_{name[-3:]}']
            means[name] = frechet(scores[name].flatten(0, 1), truth.flatten(0, 1))
    return {
        'means': means,
        'intervals': {name: interval(values) for name, values in per_clip.items()},
        'per_frame': {name: values.mean(dim=0).tolist() for name, values in per_frame.items()},
        'per_clip': {name: values.tolist() for name, values in per_clip.items()},
    }


# -----------------------------------------------------------------------------
# tables and pictures

def markdown(rows):
    """A Markdown table of {first cell: [other cells]}; the first row is its head."""
    lines = []
    for first, others in rows.items():
        cells = ' | '.join(str(cell) for cell in [first, *others])
        lines.append(f'| {cells} |')
    lines.insert(1, '|' + ' --- |' * (1 + len(others)))
    return '\n'.join(lines)


def with_interval(key, value, span):
    """'mean [low, high]', with the digits of a column; without a span just the mean."""
    digits = COLUMNS[key][1]
    text = f'{value:.{digits}f}'
    if span:
        text += f' [{span[0]:.{digits}f}, {span[1]:.{digits}f}]'
    return text


def table(name, means, intervals):
    """Markdown: the run, ready to paste among others, above its baselines."""
    columns = [key for key in COLUMNS if key in means]
    rows = {'': [COLUMNS[key][0] for key in columns]}
    for label, prefix in {f'**{name}**': '', **BASELINES}.items():
        if f'{prefix}psnr' in means:
            rows[label] = []
            for key in columns:
                score, cell = prefix + key, ''
                if score in means:  # a baseline has no gap
                    cell = with_interval(key, means[score], intervals.get(score))
                rows[label].append(cell)
    return markdown(rows)


def table_of_objects(world, results):
    """Markdown: of each object whether it is there, and where it should be."""
    rows = {'': objects.columns(world)}
    for thing in world.OBJECTS:
        for label, prefix in {'dream': '', **BASELINES}.items():
            if prefix + thing in results:
                rows[f'{thing}, {label}'] = objects.cells(results[prefix + thing])
    return markdown(rows)


def plot_horizon(path, results, num_context):
    curves = {}
    for label, prefix in {'dream': '', **BASELINES}.items():
        score = f'{prefix}psnr'
        if score in results['means']:
            label = f'{label}, {results["means"][score]:.2f} dB'
            curves[label] = dict(enumerate(results['per_frame'][score], start=num_context))
    panels = {'PSNR over the horizon, dB': curves}
    for thing, scores in results.get('objects', {}).items():
        if not thing.startswith(tuple(BASELINES.values())):
            title = f'{thing}: found and near, shares of the clips, and the median IoU'
            panels[title] = {}
            for label, key in {'found': 'found', 'near': 'near', 'IoU': 'iou'}.items():
                panels[title][label] = dict(enumerate(scores['per_frame'][key], start=num_context))
    plot(path, panels, 'frame of the clip')


def suffix_for(ckpt):
    """Of the results' names: tells a folder's numbered checkpoints apart; its latest needs none."""
    path = Path(ckpt)
    return f'-{path.stem}' if path.is_file() and path.stem != 'latest' else ''


if __name__ == '__main__':
    # settings -----------------------------------------------------------------
    out_dir = ''  # where the results go; '' is beside the checkpoint
    metrics = 'lpips,fid,fvd'  # besides PSNR and SSIM, where their weights are; '' is none
    lpips_net = 'vgg'  # or alex
    num_clips = 256  # fixed held-out clips; the wrong actions are another one's [>= 2]
    num_frames = 0  # clip length; 0 is the model's window [>= 0]
    batch_size = 64  # rollouts at once [>= 1]
    seed = 42  # of the choice of clips [0 to 1e12]
    # --------------------------------------------------------------------------
    settings = configure(globals(), shared=run)
    start = time.perf_counter()
    wanted = check_choices('metrics', metrics, NETWORKS)
    check_choice('lpips_net', lpips_net, ('vgg', 'alex'))
    opened = run.open_run(settings)
    machine.join_processes(opened.device)
    num_frames = num_frames or opened.config['num_frames']
    num_context = opened.context_frames
    check_context(num_context, num_frames)
    out_dir = run.output_folder(opened.ckpt, out_dir)
    run.make_folder(out_dir)
    clips = opened.held_out(num_frames)
    numbers = clips.fixed(num_clips, seed)
    frame_size = clips.pixels(numbers[:1]).shape[-2:]
    num_dreamed = num_frames - num_context
    networks, absent = load_networks(wanted, opened.device, frame_size, num_dreamed, lpips_net)
    world = envs.WORLDS.get(clips.meta.get('what'))
    if not hasattr(world, 'OBJECTS'):
        world = None

    def rollout(frames, action, seed):
        x0, action = to_model(frames, opened.device), action.to(opened.device)
        with autocast(opened.device, opened.dtype):
            return dream(opened.model, opened.diffusion, x0, action, num_context, opened.num_steps,
                         seed, **opened.sampler)

    scores = evaluate(rollout, clips, numbers, num_context, opened.vae, networks, world, batch_size)
    machine.leave_processes()
    if RANK > 0:
        sys.exit()

    about_objects = {name: scores.pop(name).numpy() for name in list(scores) if '.' in name}
    results = summarise(scores)
    if not math.isfinite(results['means']['psnr']):
        raise UserError(f'{opened.ckpt} dreams what is not a number: its weights are broken')
    settings |= {'dataset': opened.dataset, 'num_frames': num_frames, 'context_frames': num_context,
                 'num_steps': opened.num_steps, 'num_clips': len(numbers), 'processes': WORLD_SIZE,
                 'machine': machine.name_of(opened.device), 'train': opened.config,
                 'parameters': sum(p.numel() for p in opened.model.parameters())}
    results |= {'settings': settings, 'clips': numbers.tolist(), 'absent': absent}

    # the best, the median and the worst clip, dreamed as they were scored (but for what eta draws)
    chosen = np.argsort(results['per_clip']['psnr'])[[-1, len(numbers) // 2, 0]]
    dreams = [rollout(*clips.batch(numbers[[i]]), int(i)) for i in chosen]
    truth = clips.pixels(numbers[chosen]).movedim(2, -1).numpy()
    rows = {'truth': truth, 'dream': to_pixels(torch.cat(dreams), opened.vae)}
    suffix = suffix_for(opened.ckpt)
    write_picture(f'{out_dir}/clips{suffix}.png', contact_sheet(rows, num_context))

    text = table(Path(opened.ckpt).name or '.', results['means'], results['intervals'])
    if world:
        results['objects'] = objects.summarise(about_objects)
        text += f'\n\n{table_of_objects(world, results["objects"])}'
    path = f'{out_dir}/metrics{suffix}'
    plot_horizon(f'{path}.png', results, num_context)
    write_whole(f'{path}.md', text + '\n')
    results['seconds'] = time.perf_counter() - start
    write_whole(f'{path}.json', json.dumps(results))  # last: where it is, all is done

    print(text)
    for name, why in absent.items():
        print(f'no {name.upper()}: {why}')
    recordings = len(np.unique(clips.first_rows(numbers)[1]))
    print(f'{len(numbers)} clips of {recordings} recordings, {num_context} of {num_frames} frames given, '
          f'{opened.num_steps} steps a frame, {results["seconds"]:.0f} s: '
          f'{path}.json, .md, .png and clips{suffix}.png')
