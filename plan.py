"""Plan in the dream, act in the world.

    python plan.py --ckpt=out/wall                          # 50 episodes: a table and a GIF
    python plan.py --ckpt=out/wall --goals=random           # goals in the other room
    python plan.py --ckpt=out/wall --simulator=True         # the same planner in the true simulator
    python plan.py --ckpt=out/wall --vary=num_steps=1,2,4   # what matters: a row for each value
    python plan.py --ckpt=out/two_room --judge=True         # scored by an outsider: judge.py
    torchrun --nproc_per_node=8 plan.py --ckpt=out/wall     # the same figures, sooner

cem.py looks for actions whose dream ends near the goal. The first of them are acted out in the
simulator, and the plan is made anew from what happened (model-predictive control); trials.py says
what counts, and what the planner has to beat.
"""
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields

import torch
from tqdm import tqdm

import envs
import machine
import run
from cem import OBJECTIVES, Agent, cem
from configurator import UserError, check_choice, configure, read_settings
from machine import RANK, WORLD_SIZE, autocast, write_whole
from pictures import write_video
from prepare import begin
from trials import METHODS, act, arms, by_distance, draw_episodes, films, summarise, table

# settings ---------------------------------------------------------------------
# what is asked for; times are in steps of the simulator
goals = 'recorded'  # where the explorer got to in goal_steps, or random: wherever the world says
goal_steps = 15  # [>= 1]
budget = 0  # steps to get there; 0 is twice goal_steps [>= 0]
num_episodes = 50  # for each seed [>= 1]
num_seeds = 1  # [>= 1]
seed = 0  # the first; episodes of other seeds have nothing in common [>= 0]
baselines = True  # the same episodes by lesser means, and by the true simulator
simulator = False  # plan in the true simulator only: the ceiling
vary = ''  # a row for each value instead: num_steps=1,2 or candidates=32,128 iterations=16,4
judge = False  # let stable-worldmodel score it; heeds num_episodes, seed and baselines
num_films = 4  # episodes in the GIF [>= 0]
out_dir = ''  # for plan.json, plan.md and plan.gif; '' is beside the checkpoint
# the planner; times are in frames of the model
candidates = 32  # action sequences dreamed at once [>= 2]
elites = 6  # the best of them, around which the next are drawn [>= 2]
iterations = 5  # [>= 1]
horizon = 5  # length of a plan [>= 1]
execute = 5  # how much of it is acted out before planning anew [>= 1]
first_std = 1.0  # of the first candidates, in standard deviations of the data's actions [> 0]
min_std = 1e-3  # candidates never get closer to each other [>= 0]
objective = 'blur'  # what makes a dream close to the goal: pixels, blur, whitened or features
look_at = 'last'  # frame of the dream, or all of them
memory = 2.0  # GB that dreams may take; fewer are dreamed at once if need be [> 0]
# ------------------------------------------------------------------------------


@dataclass
class Planner:
    """How to plan: the settings above, and how to dream."""
    candidates: int = candidates
    elites: int = elites
    iterations: int = iterations
    horizon: int = horizon
    execute: int = execute
    first_std: float = first_std
    min_std: float = min_std
    objective: str = objective
    look_at: str = look_at
    memory: float = memory
    num_steps: int = 1  # of denoising
    sampler: dict = field(default_factory=dict)  # options of Diffusion.sample

    def __post_init__(self):
        check_choice('objective', self.objective, OBJECTIVES)
        check_choice('look_at', self.look_at, ('last', 'all'))
        if self.elites > self.candidates:
            raise UserError(f'elites={self.elites}: expected at most candidates={self.candidates}')
        if self.execute > self.horizon:
            raise UserError(f'execute={self.execute}: expected at most horizon={self.horizon}')


@torch.no_grad()
def plan_actions(model, diffusion, frame, goal, config, seed=0, **cem_options):
    """How to get from a frame to a goal, both uint8 [3,H,W]: float32 [H,A], one row a simulator step.

    The actions are raw, as the simulator takes them. model, diffusion, config: of run.load_run.
    cem_options: the fields of Planner. Raises UserError.
    """
    agent = Agent(model, diffusion, config, Planner(**cem_options))
    generator = torch.Generator().manual_seed(seed)
    cost = agent.cost_of(agent.dream_from(frame, generator), goal)
    plan = cem(cost, agent.planner, agent.low, agent.high, generator)
    return agent.raw(plan).flatten(0, 1).numpy()


if __name__ == '__main__':
    settings = configure(globals(), shared=run)
    check_choice('goals', goals, ('recorded', 'random'))
    if settings['context_frames'] > 1:
        raise UserError('context_frames: a plan begins from one frame, the one that is there')
    opened = run.open_run(settings)
    machine.join_processes()
    out_dir = run.output_folder(opened.ckpt, out_dir)
    run.make_folder(out_dir)
    options = {f.name: settings[f.name] for f in fields(Planner) if f.name in settings}
    # unlike a dream that people watch, a plan does well with one step
    options |= dict(num_steps=settings['num_steps'] or Planner.num_steps, sampler=opened.sampler)
    planner = Planner(**options)
    config = opened.config | {'dataset': opened.dataset}
    agent = Agent(opened.model, opened.diffusion, config, planner, opened.vae)
    what = agent.recorded.meta.get('what')
    known = [name for name, world in envs.WORLDS.items() if hasattr(world, 'distance')]
    if what not in known:
        raise UserError(f'{opened.dataset} is of {what}, which has no simulator with goals: '
                        f'expected one of {", ".join(known)}')
    if judge:
        if WORLD_SIZE > 1:
            raise UserError('judge=True is one process: start it without torchrun')
        from judge import score
        with autocast(opened.device, opened.dtype):
            score(agent, what, settings | {'out_dir': out_dir})
        sys.exit()

    method = 'simulator' if simulator else 'plan'
    rows = {METHODS[method]: (method, planner)}  # of the table: how to choose actions
    if vary:
        every = read_settings(globals()) | read_settings(vars(run))
        rows = {label: (method, varied) for label, varied in arms(vary, planner, every).items()}
    elif baselines and not simulator:
        rows = {label: (method, planner) for method, label in METHODS.items()}

    world = envs.make_world(what)
    episodes = []
    for i in range(num_seeds):
        episodes += draw_episodes(world, num_episodes, seed + i, agent.size[0],
                                  goals=goals, goal_steps=goal_steps, budget=budget)
    finished = os.path.join(out_dir, 'plan.partial')  # a file an episode: a killed run goes on there
    if RANK == 0:
        run.make_folder(finished)
        weights = opened.model.final_layer.linear.bias.double().sum().item()  # tells trainings apart
        begin(os.path.join(finished, 'settings.json'), settings | dict(weights=weights))
    machine.barrier()
    tasks = list(itertools.product(rows, range(len(episodes))))
    paths = {task: os.path.join(finished, f'{i:06d}.json') for i, task in enumerate(tasks)}
    mine = [task for task in tasks[RANK::WORLD_SIZE] if not os.path.exists(paths[task])]
    reached = Counter()
    bar = tqdm(mine, unit='episode', disable=RANK > 0)
    for label, i in bar:
        bar.set_description(label)
        method, agent.planner = rows[label]
        start = time.perf_counter()
        with autocast(opened.device, opened.dtype):
            steps = act(method, agent, world, episodes[i])
        seconds = time.perf_counter() - start
        row = dict(steps=steps, distance=episodes[i].distance, seconds=seconds)
        write_whole(paths[label, i], json.dumps(row))
        reached[label] += steps is not None
        bar.set_postfix_str(f'{reached[label]} reached')
    machine.barrier()
    machine.leave_processes()
    if RANK > 0:
        sys.exit()

    results = defaultdict(list)
    for (label, _), path in paths.items():
        with open(path) as f:
            results[label].append(json.load(f))
    summaries = {label: summarise(done) for label, done in results.items()}
    first = next(iter(rows))
    text = table(summaries)
    text += f'\n\n{first}, by the distance at the start (1 is reached):\n\n'
    text += table(by_distance(results[first]))
    settings |= dict(dataset=opened.dataset, num_steps=planner.num_steps,
                     machine=machine.name_of(opened.device), processes=WORLD_SIZE)
    results = {'settings': settings, 'summaries': summaries, 'episodes': results}
    write_whole(os.path.join(out_dir, 'plan.md'), text + '\n')
    write_whole(os.path.join(out_dir, 'plan.json'), json.dumps(results))
    shutil.rmtree(finished)
    print(f'{text}\n{out_dir}: plan.json and plan.md')
    if num_films:
        method, agent.planner = rows[first]
        with autocast(opened.device, opened.dtype):
            video = films(method, agent, world, episodes[:num_films])
        write_video(os.path.join(out_dir, 'plan.gif'), video, fps=3)
        print(f'{out_dir}: plan.gif')
