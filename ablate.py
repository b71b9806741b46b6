"""Repeat an ablation: train an arm for each value of an axis with everything else fixed, evaluate, make a table.

    python ablate.py config/wall_ablation.py --axis=target            # epsilon, x, v, flow
    python ablate.py config/wall_ablation.py --axis=injection         # the five, and one that cannot learn to listen
    python ablate.py config/wall_ablation.py --axis=scale             # three sizes
    python ablate.py config/wall_ablation.py --axis=steps             # of sampling, for each target and solver
    python ablate.py config/rt1_b2.py --launch='torchrun --nproc_per_node=8'

An arm is a folder of out_dir named by target, injection, size and seed, so axes share the arms they have in common; for
other --train_options or --eval_options use another --out_dir. After an interruption the same command goes on: what is
done (its metrics.json is there; delete the folder to do it again) is skipped, what was begun is resumed. Leaves
results/<axis>_<config>.md and .png.
"""
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
from PIL import Image

from checkpoint import read_checkpoint, save_checkpoint
from evaluate import COLUMNS, interval, markdown, plot, with_interval
from model import INJECTIONS

TARGETS = ('epsilon', 'x', 'v', 'flow')
DOUBLE_ZERO = 'cross_attention_double_zero'
STEPS_KEYS = ('psnr', 'ssim', 'gap_psnr')  # what the steps axis shows


def call(script, *options):
    """Run train.py or evaluate.py; ends with one line if that fails."""
    command = [*(shlex.split(launch) or [sys.executable]), script, *options]
    if code := subprocess.run(command).returncode:
        sys.exit(f'{shlex.join(command)} ended with {code}; the same ablate.py command goes on once that is mended')


def init_double_zero(folder, *options):
    """Begin an arm as the published reference does, with cross_gate zero beside the zero cross_attn.proj.

    A step at a learning rate of 0 saves the weights that training starts from; without the gates they become step 0.
    """
    shutil.rmtree(f'{folder}.init', ignore_errors=True)
    call('train.py', *options, f'--out_dir={folder}.init', '--max_steps=1', '--learning_rate=0', '--sample_steps=1')
    state, config, meta = read_checkpoint(f'{folder}.init', train=True)
    state = {k: v * 0 if k.endswith('cross_gate') else v for k, v in state.items() if not k.startswith('train.adam.')}
    os.makedirs(folder, exist_ok=True)
    save_checkpoint(f'{folder}/latest.safetensors', state, config, **meta | {'step': 0})
    shutil.rmtree(f'{folder}.init')


def train(target, injection, size, seed):
    """Train one arm as far as that is not done; returns its folder."""
    folder = f'{out_dir}/{base_name}/{target}-{injection}-{size}-seed{seed}'
    latest = f'{folder}/latest.safetensors'
    if not os.path.exists(f'{folder}/metrics.json'):
        values = {'pred_name': target, 'injection': injection.removesuffix('_double_zero'), 'seed': seed, **sizes[size]}
        options = [base, *(f'--{k}={v}' for k, v in values.items()), *shlex.split(train_options)]
        if injection == DOUBLE_ZERO and not os.path.exists(latest):
            init_double_zero(folder, *options)
        call('train.py', *options, f'--out_dir={folder}', f'--resume={os.path.exists(latest)}')
    return folder


def measure(ckpt, out, *options):
    """The metrics.json of an arm in folder `out`, after evaluating it if there is none."""
    path = f'{out}/metrics.json'
    if not os.path.exists(path):
        call('evaluate.py', f'--ckpt={ckpt}', f'--out_dir={out}', *options, *shlex.split(eval_options))
    with open(path) as f:
        return json.load(f)


def over_seeds(runs, key):
    """(mean, standard deviation) of a metric; a single run has a deviation of 0."""
    values = [run['means'][key] for run in runs]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def over_clips(runs, key):
    """95 % interval of a metric's mean, by bootstrap over the clips, each averaged over the seeds."""
    return interval(np.mean([run['per_clip'][key] for run in runs], axis=0))


def cell(mean, deviation, key):
    digits = COLUMNS[key][1]
    return f'{mean:.{digits}f}' + f' ± {deviation:.{digits}f}' * (len(seeds) > 1)


def compare_arms(arms):
    """(Markdown, picture) of {name: runs}."""
    runs = sum(arms.values(), [])
    columns = [k for k in COLUMNS if all(k in run['means'] for run in runs)]
    rows = {axis: ['parameters', 'steps', *(COLUMNS[k][0] for k in columns), '95 % interval', 'gap by seed']}
    for name, runs in arms.items():
        low, high = over_clips(runs, 'gap_psnr')
        s = runs[0]['settings']
        rows[name] = [f'{s["parameters"] / 1e6:.2f} M', f'{s["train"]["max_steps"]:,}',
                      *(cell(*over_seeds(runs, k), k) for k in columns), f'{low:.2f} to {high:.2f}',
                      ', '.join(f'{run["means"]["gap_psnr"]:.2f}' for run in runs)]
    rows['copy'] = ['', '', *(with_interval(k, runs[0]['means'], {}, 'copy_') for k in columns), '', '']
    whose = {'dream': 'psnr', 'copy': 'copy_psnr', 'wrong actions': 'wrong_psnr'}
    curves = {label: [over_seeds(runs, key) for runs in arms.values()] for label, key in whose.items()}
    names = [name.replace('_', ' ').replace('attention ', '') for name in arms]  # or labels meet
    return markdown(rows), plot(curves, names, f'PSNR in dB by {axis}', joined=False, size=(760, 320))


def compare_samplers(runs, key):
    """(Markdown, picture) of one metric of {(target, solver): [runs of each number of steps]}."""
    curves = {', '.join(name): [over_seeds(r, key) for r in line] for name, line in runs.items()}
    title = f'{COLUMNS[key][0]} by denoising steps a frame'
    rows = {title: steps} | {name: [cell(*v, key) for v in line] for name, line in curves.items()}
    return markdown(rows), plot(curves, steps, title, size=(760, 360))


def fewest_steps(runs):
    """Markdown: what the first solver's last number of steps gives, and with how few each solver gives the same."""
    head = [*(COLUMNS[k][0] for k in STEPS_KEYS), *(f'{solver}: fewest steps within' for solver in solvers)]
    rows = {f'{solvers[0]}, {steps[-1]} steps': head}
    for target in values:
        last = runs[target, solvers[0]][-1]
        means = {k: over_seeds(last, k)[0] for k in STEPS_KEYS}
        spans = {k: over_clips(last, k) for k in STEPS_KEYS}
        rows[target] = [with_interval(k, means, spans) for k in STEPS_KEYS]
        for solver in solvers:
            within = [n for n, line in zip(steps, runs[target, solver], strict=True)
                      if all(low <= over_seeds(line, k)[0] <= high for k, (low, high) in spans.items())]
            rows[target].append(min(within, default=''))
    return markdown(rows)


if __name__ == '__main__':
    from configurator import configure
    argv = sys.argv[1:]
    if argv and argv[0].endswith('.py'):
        argv[0] = f'--base={argv[0]}'  # its keys are those of train.py
    # settings -----------------------------------------------------------------
    base = 'config/wall_ablation.py'  # what the arms have in common
    axis = 'target'  # target, injection, scale or steps
    seeds = '0,1,2'
    only = ''  # some values of the axis, like epsilon,v; '' is all
    solvers = 'ddim,dpmpp'  # of the steps axis
    steps = '1,2,4,8,16,32,64,128,250'  # of the steps axis
    launch = ''  # what runs a script, like torchrun --nproc_per_node=8; '' is this Python
    train_options = ''  # more for every train.py, like --max_steps=100
    eval_options = ''  # more for every evaluate.py, like --num_clips=64
    out_dir = 'out/ablation'
    results_dir = 'results'
    # --------------------------------------------------------------------------
    configure(globals(), argv)
    if not os.path.exists(base):
        sys.exit(f'{base}: no such config file')
    settings, base_name = runpy.run_path(base), os.path.splitext(os.path.basename(base))[0]
    # where the base says nothing: train.py's defaults
    width, depth, heads = (settings.get(k, v) for k, v in (('hidden_size', 128), ('depth', 4), ('num_heads', 4)))
    if 'model_size' in settings:
        sizes = {name: {'model_size': name} for name in 'SBL'}
    else:  # half, all and one and a half times the heads, each as wide as in the base
        sizes = {f'{h * width // heads}x{depth}': dict(hidden_size=h * width // heads, depth=depth, num_heads=h)
                 for h in (heads // 2, heads, heads * 3 // 2)}
    fixed = dict(target=settings.get('pred_name', 'v'), injection=settings.get('injection', 'additive'),
                 size=settings.get('model_size', f'{width}x{depth}'))
    axes = {'target': ('target', TARGETS), 'injection': ('injection', (*INJECTIONS, DOUBLE_ZERO)),
            'scale': ('size', sizes), 'steps': ('target', TARGETS)}
    if axis not in axes:
        sys.exit(f'axis={axis!r}: expected one of {", ".join(axes)}')
    key, values = axes[axis]
    if {*filter(None, only.split(','))} - {*values}:
        sys.exit(f'only={only!r}: expected some of {",".join(values)}')
    values, solvers = only.split(',') if only else values, solvers.split(',')
    try:
        seeds, steps = ([int(n) for n in numbers.split(',')] for numbers in (seeds, steps))
    except ValueError:
        sys.exit(f'seeds={seeds!r}, steps={steps!r}: expected numbers like 0,1,2')
    arms = {}  # {value: [metrics of each seed]}
    for seed, value in product(seeds, values):
        folder = train(**fixed | {key: value}, seed=seed)
        arms.setdefault(value, []).append(measure(folder, folder))
    if axis == 'steps':
        runs = {(value, solver): [[
            measure(ckpt := run['settings']['ckpt'], f'{ckpt}/{solver}-{n}', f'--solver={solver}', f'--num_steps={n}')
            for run in arms[value]] for n in steps] for value, solver in product(values, solvers)}
        tables, pictures = zip(*(compare_samplers(runs, k) for k in STEPS_KEYS), strict=True)
        tables = (*tables, fewest_steps(runs))
        used = [run for line in runs.values() for seeds_of in line for run in seeds_of]
    else:
        tables, pictures = zip(*[compare_arms(arms)], strict=True)
        used = sum(arms.values(), [])

    s, path = used[0]['settings'], f'{results_dir}/{axis}_{base_name}'
    machines = ', '.join(sorted({run['settings']['machine'] for run in used}))
    text = '\n\n'.join([
        *tables,
        f'{s["num_clips"]} held-out clips, {s["context_frames"]} of {s["num_frames"]} frames given; seed '
        f'{", ".join(map(str, seeds))}{": mean ± standard deviation" * (len(seeds) > 1)}.\n'
        f'Intervals: 95 %, bootstrap over the clips, each averaged over the seeds. Evaluated on {machines}.',
        f'    python ablate.py {shlex.join(sys.argv[1:])}\n'])
    os.makedirs(results_dir, exist_ok=True)
    with open(f'{path}.md', 'w') as f:
        f.write(text)
    Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures])).save(f'{path}.png')
    print(f'{text}\n{path}.md and .png')
