"""Repeat an ablation: one arm for each value of an axis, all else fixed, and a table of them.

    python ablate.py config/wall_ablation.py --axis=target       # epsilon, x, v, flow
    python ablate.py config/wall_ablation.py --axis=injection    # the five, and one that stays deaf
    python ablate.py config/wall_ablation.py --axis=scale        # three sizes
    python ablate.py config/wall_ablation.py --axis=steps        # of each target and solver
    python ablate.py config/rt1_b2.py --launch='torchrun --nproc_per_node=8'

An arm is a folder of out_dir named by target, injection, size and seed, so axes share the arms they
have in common; for other --train_options or --eval_options use another --out_dir. After an
interruption the same command goes on: what is done (its metrics.json is there; delete the folder to
do it again) is skipped, what was begun is resumed. Leaves results/<axis>_<config>.md and .png.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
from itertools import product

import numpy as np

from configurator import UserError, check_choice, check_choices, configure, run_config_file
from diffusion import SOLVERS, TARGETS
from evaluate import COLUMNS, markdown, with_interval
from folder import latest_of
from machine import under_results, write_whole
from metrics import interval
from model import INJECTIONS
from pictures import plot
from run import make_folder

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS_KEYS = ('psnr', 'ssim', 'gap_psnr')  # what the steps axis shows


def words(key, text):
    """'--a=1 --b=2' -> ['--a=1', '--b=2'], quoted as in a shell. Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f'{key}={text!r}: {e}') from e


def call(script, *options):
    """Run train.py or evaluate.py; Ctrl-C and SIGTERM are passed on, so that a training saves."""
    command = [*(launch or [sys.executable]), os.path.join(HERE, script), *options]
    # in a session of its own: otherwise the terminal's Ctrl-C would reach it twice
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait()
    except KeyboardInterrupt as e:
        child.terminate()
        child.wait()
        raise UserError('interrupted; the same ablate.py command goes on') from e
    if code:
        raise UserError(f'{shlex.join(command)} ended with {code}; '
                        'the same ablate.py command goes on once that is mended')


def leave_to_arms(key, options, taken):
    """Raises UserError if an option for every arm is one in which they differ."""
    for option in options:
        name = option.lstrip('-').partition('=')[0]
        if name in taken:
            raise UserError(f'{key}: the arms set {name}; what they share is said in {base}')


def check_same_clips(runs):
    """Raises UserError unless all were measured on the same clips."""
    for run in runs:
        if run['clips'] != runs[0]['clips']:
            raise UserError(f'{run["folder"]} and {runs[0]["folder"]} were measured on different clips: '
                            'delete the metrics.json of one, or use another --out_dir')


def train(folder, options):
    """Train an arm as far as that is not done."""
    if os.path.exists(f'{folder}/metrics.json'):
        return
    resume = bool(latest_of(folder))
    options = [f'--{key}={value}' for key, value in options.items()]
    call('train.py', base, *options, *train_options, f'--out_dir={folder}', f'--resume={resume}')


def measure(ckpt, folder, *options):
    """The metrics.json in `folder`, after evaluating the arm if there is none."""
    path = f'{folder}/metrics.json'
    if not os.path.exists(path):
        call('evaluate.py', f'--ckpt={ckpt}', f'--out_dir={folder}', *options, *eval_options)
    with open(path) as f:
        return json.load(f) | {'folder': folder}


def resampled(run, solver, n):
    """The metrics of a trained arm with another solver and n steps a frame."""
    folder = run['folder']
    return measure(folder, f'{folder}/{solver}-{n}', f'--solver={solver}', f'--num_steps={n}')


# -----------------------------------------------------------------------------
# tables; `runs` are the metrics of one arm, one for each seed

def over_seeds(runs, key):
    """(mean, standard deviation) of a metric; a single run has a deviation of 0."""
    values = [run['means'][key] for run in runs]
    if len(values) == 1:
        return values[0], 0.0
    return np.mean(values), np.std(values, ddof=1)


def over_clips(runs, key):
    """95 % interval of a mean, by bootstrap over the clips, each averaged over the seeds."""
    return interval(np.mean([run['per_clip'][key] for run in runs], axis=0))


def cell(runs, key):
    """'mean ± standard deviation' over the seeds, or just the number where there is one seed."""
    texts = [f'{number:.{COLUMNS[key][1]}f}' for number in over_seeds(runs, key)]
    return ' ± '.join(texts[:len(runs)])


def compare_arms(arms):
    """(Markdown, panels of a plot) of {value: runs}."""
    shared = set.intersection(*[set(run['means']) for run in sum(arms.values(), [])])
    columns = [key for key in COLUMNS if key in shared]
    titles = [COLUMNS[key][0] for key in columns]
    rows = {axis: ['parameters', 'steps', *titles, '95 % interval', 'gap by seed']}
    for value, runs in arms.items():
        settings = runs[0]['settings']
        cells = [cell(runs, key) for key in columns]
        low, high = over_clips(runs, 'gap_psnr')
        gaps = ', '.join(f'{run["means"]["gap_psnr"]:.2f}' for run in runs)
        size, train_steps = settings['parameters'] / 1e6, settings['train']['max_steps']
        rows[value] = [f'{size:.2f} M', f'{train_steps:,}', *cells,
                       f'{low:.2f} to {high:.2f}', gaps]
    means = runs[0]['means']  # which the copy has of every arm
    copies = [f'{means[f"copy_{key}"]:.{COLUMNS[key][1]}f}' for key in columns[:-1]]
    rows['copy'] = ['', '', *copies, '', '', '']

    curves = {}
    for label, key in {'dream': 'psnr', 'copy': 'copy_psnr', 'wrong actions': 'wrong_psnr'}.items():
        curves[label] = {value: over_seeds(runs, key) for value, runs in arms.items()}
    return markdown(rows), {'PSNR, dB': curves}


def compare_samplers(lines):
    """(Markdown, panels of a plot) of {(target, solver): {steps: runs}}."""
    tables, panels = [], {}
    for key in STEPS_KEYS:
        title = COLUMNS[key][0]
        rows = {f'{title} by denoising steps a frame': steps}
        panels[title] = {}
        for names, line in lines.items():
            rows[', '.join(names)] = [cell(runs, key) for runs in line.values()]
            panels[title][names] = {n: over_seeds(runs, key) for n, runs in line.items()}
        tables.append(markdown(rows))
    return '\n\n'.join([*tables, fewest_steps(lines)]), panels


def fewest_steps(lines):
    """Markdown: what the most steps of the first solver give, and how few steps give the same.

    The same is: PSNR, SSIM and gap all within its intervals.
    """
    titles = [COLUMNS[key][0] for key in STEPS_KEYS]
    titles += [f'{solver}: fewest steps within' for solver in solvers]
    rows = {f'{solvers[0]}, {steps[-1]} steps': titles}
    for target in values:
        most = lines[target, solvers[0]][steps[-1]]
        spans = {key: over_clips(most, key) for key in STEPS_KEYS}
        rows[target] = []
        for key, span in spans.items():
            mean, _ = over_seeds(most, key)
            rows[target].append(with_interval(key, mean, span))
        for solver in solvers:
            line = lines[target, solver]
            reached = [n for n, runs in line.items() if within(runs, spans)]
            rows[target].append(min(reached, default=''))
    return markdown(rows)


def within(runs, spans):
    """Whether the mean of every metric lies in its span [low, high]."""
    return all(low <= over_seeds(runs, key)[0] <= high for key, (low, high) in spans.items())


def numbers(key, text, least):
    """'0,1,2' -> [0, 1, 2]. Raises UserError unless they are different and `least` or more."""
    parts = text.split(',')
    valid = all(part.isdecimal() and int(part) >= least for part in parts)
    if not valid or len(set(parts)) < len(parts):
        raise UserError(f'{key}={text!r}: expected different numbers, {least} or more, like 1,2')
    return [int(part) for part in parts]


if __name__ == '__main__':
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
    configure(globals(), argv=argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends like Ctrl-C
    seeds, steps = numbers('seeds', seeds, 0), sorted(numbers('steps', steps, 1))
    solvers = check_choices('solvers', solvers, SOLVERS) or list(SOLVERS)
    launch, train_options = words('launch', launch), words('train_options', train_options)
    eval_options = words('eval_options', eval_options)
    out_dir = os.path.abspath(under_results(out_dir))

    # the arm that the axes share: what the base says, and where it says nothing this
    shared = dict(pred_name='v', injection='additive', hidden_size=128, depth=4, num_heads=4)
    shared |= run_config_file(base)
    width, depth, heads = shared['hidden_size'], shared['depth'], shared['num_heads']
    size = shared.get('model_size') or f'{width}x{depth}'
    reference = {'target': shared['pred_name'], 'injection': shared['injection'], 'scale': size}

    # the axes: what train.py is told for each value
    axes = {
        'target': {name: {'pred_name': name} for name in TARGETS},
        'injection': {name: {'injection': name} for name in INJECTIONS},
        'scale': {name: {'model_size': name} for name in dict.fromkeys(['S', 'B', 'L', size])},
    }
    axes['injection']['cross_attention_double_zero'] = {
        'injection': 'cross_attention', 'zero_cross_gate': True}
    if not shared.get('model_size'):  # half, all and one and a half times the heads, each as wide
        axes['scale'] = {}
        for h in sorted({max(1, heads // 2), heads, max(heads + 1, heads * 3 // 2)}):
            w = h * width // heads
            axes['scale'][f'{w}x{depth}'] = {'hidden_size': w, 'depth': depth, 'num_heads': h}
    check_choice('axis', axis, [*axes, 'steps'])
    varied = 'target' if axis == 'steps' else axis
    values = check_choices('only', only, axes[varied]) or list(axes[varied])
    taken = set().union(*[options for arms in axes.values() for options in arms.values()])
    leave_to_arms('train_options', train_options, taken | {'seed', 'out_dir', 'resume'})
    taken = {'solver', 'num_steps'} if axis == 'steps' else set()
    leave_to_arms('eval_options', eval_options, taken | {'ckpt', 'out_dir'})

    make_folder(out_dir)
    make_folder(results_dir)

    # train and evaluate
    arms = {value: [] for value in values}  # {value: runs}
    base_name = os.path.splitext(os.path.basename(base))[0]
    for seed in seeds:
        for value in values:
            arm = reference | {varied: value}
            options = {'seed': seed}
            for key, name in arm.items():
                options |= axes[key][name]
            folder = f'{out_dir}/{base_name}/{"-".join(arm.values())}-seed{seed}'
            train(folder, options)
            arms[value].append(measure(folder, folder))
    check_same_clips(sum(arms.values(), []))
    if axis == 'steps':
        lines = {pair: {} for pair in product(values, solvers)}  # {(target, solver): {steps: runs}}
        for (value, solver), n in product(lines, steps):
            lines[value, solver][n] = [resampled(run, solver, n) for run in arms[value]]
        check_same_clips(sum([sum(line.values(), []) for line in lines.values()], []))
        text, panels = compare_samplers(lines)
    else:
        text, panels = compare_arms(arms)

    used = [run['settings'] for run in sum(arms.values(), [])]
    machines = ', '.join(sorted({settings['machine'] for settings in used}))
    clips = '{num_clips} held-out clips, {context_frames} of {num_frames} frames given'
    seeds_used = 'seed ' + ', '.join(str(seed) for seed in seeds)
    if len(seeds) > 1:
        seeds_used += ': mean ± standard deviation'
    text += f"""

{clips.format(**used[0])}; {seeds_used}.
Intervals: 95 %, bootstrap over the clips, each averaged over the seeds. Evaluated on {machines}.

    python ablate.py {shlex.join(sys.argv[1:])}
"""
    path = f'{results_dir}/{axis}_{base_name}'
    write_whole(f'{path}.md', text)
    xlabel = 'denoising steps a frame' if axis == 'steps' else axis
    plot(f'{path}.png', panels, xlabel, log_ticks=axis == 'steps')
    print(f'{text}\n{path}.md and .png')
