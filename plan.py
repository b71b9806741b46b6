"""Plan in the dream, act in the world: the cross-entropy method over dreamed futures.

    python plan.py --ckpt=out/wall                          # 50 episodes: a table and a GIF
    python plan.py --ckpt=out/wall --goals=random           # goals in the other room
    python plan.py --ckpt=out/wall --simulator=True         # the same planner in the true simulator
    python plan.py --ckpt=out/wall --vary=num_steps=1,2,4   # what matters: a row for each value
    python plan.py --ckpt=out/two_room --judge=True         # scored by an outsider: judge.py
    torchrun --nproc_per_node=8 plan.py --ckpt=out/wall     # the same figures, sooner

From the frame that is there, dream where many candidate action sequences lead; see which dreams end
near the goal; draw new candidates around those, and again (CEM: Rubinstein 1999). Act out the first
actions of the plan in the simulator, and plan anew from what happened (model-predictive control).
"""
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import envs
import run
from configurator import UserError, configure
from data import Clips, to_model
from machine import (
    RANK,
    WORLD_SIZE,
    autocast,
    barrier,
    join_processes,
    leave_processes,
    name_of,
    under_results,
    write_whole,
)
from pictures import write_video
from prepare import begin
from trials import act, by_distance, draw_episodes, films, summarise, table

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
judge = False  # let stable-worldmodel score the model, in its simulator by its own planner
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
objective = 'blur'  # what makes a dream close to the goal: pixels, blur or features
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
        for name, known in (('objective', tuple(OBJECTIVES)), ('look_at', ('last', 'all'))):
            if getattr(self, name) not in known:
                raise UserError(f'{name}={getattr(self, name)!r}: '
                                f'expected one of {", ".join(known)}')
        if self.elites > self.candidates:
            raise UserError(f'elites={self.elites}: expected at most candidates={self.candidates}')
        if self.execute > self.horizon:
            raise UserError(f'execute={self.execute}: expected at most horizon={self.horizon}')


# -----------------------------------------------------------------------------
# what makes a dream close to the goal: the squared distance between what these make of the two

def pixels(frames, model):
    """As they are: flat as long as an object and the place it should be at do not overlap."""
    return frames


def blur(frames, model):
    """Blurred, so that objects feel each other from afar: a lot to find the way, a little to aim."""
    copies = []
    for share in (1 / 32, 3 / 32, 6 / 32):  # the Gaussian's standard deviation, of the picture's side
        down, across = (gaussian(side, share, frames.device) for side in frames.shape[-2:])
        copies.append(down @ frames @ across.T)
    return torch.cat(copies, dim=1)


def gaussian(side, share, device):
    """The matrix [side,side] that blurs a row of pixels, as if there were none beyond the border."""
    position = torch.arange(side, device=device, dtype=torch.float32) / side
    weight = torch.exp(-(position[:, None] - position).square() / (2 * share ** 2))
    return weight / weight.sum(dim=1, keepdim=True)


def features(frames, model):
    """What the model's middle block makes of each frame, shown as almost clean."""
    kept = []
    block = model.blocks[len(model.blocks) // 2]
    hook = block.register_forward_hook(lambda block, inputs, output: kept.append(output))
    model(frames[:, None], torch.full((1, 1), 20, device=frames.device))
    hook.remove()
    return kept[0].float()


OBJECTIVES = {'pixels': pixels, 'blur': blur, 'features': features}


# -----------------------------------------------------------------------------
# the planner

def cem(cost, planner, low, high, generator, mean=None):
    """The cross-entropy method: actions [horizon,A] of low cost.

    cost: [N,horizon,A] -> [N]. low, high [A]: bounds of the actions. mean [horizon,A]: where to
    begin, instead of zero.
    """
    if mean is None:
        mean = torch.zeros(planner.horizon, len(low))
    std = torch.full_like(mean, planner.first_std)
    for _ in range(planner.iterations):
        noise = torch.randn(planner.candidates, *mean.shape, generator=generator)
        actions = mean + std * noise
        actions[0] = mean
        actions = actions.clamp(low, high)
        best = cost(actions).topk(planner.elites, largest=False).indices
        mean = actions[best].mean(dim=0)
        std = actions[best].std(dim=0).clamp(min=planner.min_std)
    return mean


class Agent:
    """A world model that plans: all that stays the same from plan to plan. Raises UserError.

    The planner draws standardised actions [horizon, interval*A], the simulator takes them raw
    [horizon, interval, A], and the model is told them as in its training. A frame is uint8 [3,H,W].
    """

    def __init__(self, model, diffusion, config, planner, vae=None):
        if not model.config.action_dim:
            raise UserError('the model was trained without actions: there is nothing to plan')
        self.model, self.diffusion, self.planner = model, diffusion, planner
        self.device, self.interval = model.pos_embed.device, config['frame_interval']
        self.vae = vae or run.load_decoder(model)
        self.size = model.config.input_size
        if self.vae:
            self.size = tuple(8 * side for side in self.size)
        dataset = under_results(config['dataset'])
        self.recorded = Clips(dataset, 'train', planner.horizon, self.interval, normalize=True)
        if self.recorded.action_dim != model.config.action_dim:
            raise UserError(f'{dataset}: {self.recorded.action_dim} action numbers do not fit the '
                            f'model, which takes {model.config.action_dim}')
        self.mean = torch.from_numpy(np.asarray(self.recorded.mean))
        self.std = torch.from_numpy(np.asarray(self.recorded.std))
        scale = self.recorded.action_scale(config['action_scale'])
        self.model_mean, self.model_std = (torch.from_numpy(np.asarray(part)) for part in scale)
        actions = self.recorded.actions
        self.low = self.standardised(actions.min(axis=0))
        self.high = self.standardised(actions.max(axis=0))

    def raw(self, actions):
        """Standardised [...,interval*A] -> raw [...,interval,A]."""
        return actions.unflatten(-1, (self.interval, -1)) * self.std + self.mean

    def standardised(self, action):
        """Raw [A] -> standardised [interval*A], the same all along the interval."""
        return ((torch.from_numpy(action) - self.mean) / self.std).repeat(self.interval)

    def encode(self, frames):
        """uint8 [N,3,H,W] -> frames [N,C,h,w] as the model dreams them."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (3, *self.size):
            raise UserError(f'a frame or goal is {frames.dtype} {list(frames.shape[1:])}: '
                            f'expected uint8 {[3, *self.size]}')
        x = to_model(torch.from_numpy(frames), self.device)
        return self.vae.encode(x) if self.vae else x

    def dream(self, frame, generator):
        """A function: raw actions [N,horizon,interval,A] -> the frames [N,horizon,C,h,w] they lead to.

        Candidates share the frame they start from, which is run once for all of them, and the noise:
        they differ by actions only.
        """
        planner = self.planner
        context = self.encode(frame[None])[:, None]
        length = planner.horizon + 1
        draws = torch.randn(2, 1, length, *context.shape[2:], generator=generator)
        noise, context_noise = draws.to(self.device)

        def imagine(actions):
            scaled = (actions - self.model_mean) / self.model_std
            scaled = F.pad(scaled.flatten(-2), (0, 0, 0, 1))  # no frame follows the last
            frames = self.diffusion.sample(
                self.model, context, scaled.to(self.device), length, planner.num_steps,
                noise=noise.expand(len(scaled), -1, -1, -1, -1), context_noise=context_noise,
                **planner.sampler)
            return frames[:, 1:]

        return imagine

    def simulate(self, world):
        """The same function by the true simulator: the ceiling."""
        state = world.get_state()

        def imagine(actions):
            frames = []
            for candidate in actions.numpy():
                world.set_state(state)
                for acts in candidate:
                    for action in acts:
                        world.step(action)
                    frames.append(world.render(self.size[0]))
            world.set_state(state)
            return self.encode(np.stack(frames)).unflatten(0, (len(actions), -1))

        return imagine

    def cost(self, imagine, goal):
        """A function for cem: how far from the goal's frame standardised actions lead, [N]."""
        embed = OBJECTIVES[self.planner.objective]
        target = embed(self.encode(goal[None]), self.model)
        first = -1 if self.planner.look_at == 'last' else 0

        chunk = self.dreams_at_once()

        def cost(actions):
            costs = []
            for some in actions.split(chunk):
                frames = imagine(self.raw(some))[:, first:]
                errors = (embed(frames.flatten(0, 1), self.model) - target).square()
                costs.append(errors.reshape(len(some), -1).mean(dim=1).cpu())
            return torch.cat(costs)

        return cost

    def dreams_at_once(self):
        """How many fit into planner.memory: a patch keeps its keys and values in every other block,
        and is about 20 times as wide inside of one."""
        shape = self.model.config
        patches = shape.num_frames * shape.grid[0] * shape.grid[1]
        bytes_each = 4 * patches * shape.hidden_size * (shape.depth + 20)
        return max(1, int(self.planner.memory * 1e9 / bytes_each))


@torch.no_grad()
def plan_actions(model, diffusion, frame, goal, config, seed=0, **cem_options):
    """How to get from a frame to a goal, both uint8 [3,H,W]: float32 [H,A], one row a simulator step.

    The actions are raw, as the simulator takes them. model, diffusion, config: of run.load_run.
    cem_options: the fields of Planner. Raises UserError.
    """
    agent = Agent(model, diffusion, config, Planner(**cem_options))
    generator = torch.Generator().manual_seed(seed)
    cost = agent.cost(agent.dream(frame, generator), goal)
    plan = cem(cost, agent.planner, agent.low, agent.high, generator)
    return agent.raw(plan).flatten(0, 1).numpy()


# -----------------------------------------------------------------------------
# the planner and those it has to beat

METHODS = {
    'plan': 'plan in the dream',
    'simulator': 'plan in the true simulator',
    'wrong': 'plan, told wrong actions',
    'recorded': 'best recorded actions',
    'random': 'random actions',
    'still': 'stand still',
}


def choose(method, agent, world, episode, generator, mean=None):
    """A plan by one of METHODS, standardised [horizon,interval*A], and the function that dreams it.

    mean: where cem begins.
    """
    planner = agent.planner
    imagine = agent.dream(world.render(agent.size[0]), generator)
    if method == 'simulator':
        imagine = agent.simulate(world)
    cost = agent.cost(imagine, episode.picture)

    def cost_of_another(actions):
        return cost(actions.roll(1, dims=0))

    if method == 'still':
        plan = agent.standardised(np.zeros(world.action_dim, np.float32)).repeat(planner.horizon, 1)
    elif method == 'random':
        plan = torch.randn(planner.horizon, len(agent.low), generator=generator)
        plan = plan.clamp(agent.low, agent.high)
    elif method == 'recorded':  # as many as cem would try
        count = planner.candidates * planner.iterations
        draws = torch.randint(len(agent.recorded), (count,), generator=generator)
        _, candidates = agent.recorded.batch(draws.numpy())
        plan = candidates[cost(candidates).argmin()]
    elif method == 'wrong':
        plan = cem(cost_of_another, planner, agent.low, agent.high, generator, mean)
    else:
        plan = cem(cost, planner, agent.low, agent.high, generator, mean)
    return plan, imagine


def arms(vary):
    """{label: {field of Planner: value}}: two for 'candidates=32,128 iterations=16,4'."""
    known = {f.name: f.type for f in fields(Planner)}
    columns = {}
    for column in vary.split():
        key, _, values = column.partition('=')
        if known.get(key) not in (int, float, str):
            raise UserError(f'vary={vary}: expected settings of the planner, like num_steps=1,2,4')
        try:
            columns[key] = [known[key](value) for value in values.split(',')]
        except ValueError as e:
            raise UserError(f'vary={vary}: {e}') from e
    try:
        combinations = list(zip(*columns.values(), strict=True))
    except ValueError as e:
        raise UserError(f'vary={vary}: expected as many values of each') from e
    rows = {}
    for values in combinations:
        changed = dict(zip(columns, values, strict=True))
        label = ', '.join(f'{key}={value}' for key, value in changed.items())
        rows[label] = changed
    return rows


if __name__ == '__main__':
    settings = configure(globals(), shared=run)
    if goals not in ('recorded', 'random'):
        raise UserError(f'goals={goals!r}: expected recorded or random')
    opened = run.open_run(settings)
    join_processes()
    out_dir = out_dir or run.output_folder(opened.ckpt)
    options = {f.name: settings[f.name] for f in fields(Planner) if f.name in settings}
    # unlike a dream that people watch, a plan does well with one step
    options |= dict(num_steps=settings['num_steps'] or Planner.num_steps, sampler=opened.sampler)
    planner = Planner(**options)
    config = opened.config | {'dataset': opened.dataset}
    agent = Agent(opened.model, opened.diffusion, config, planner, opened.vae)
    what = agent.recorded.meta.get('what')
    if what not in envs.WORLDS:
        raise UserError(f'{opened.dataset} is of {what}, which has no simulator to act in: '
                        f'expected one of {", ".join(envs.WORLDS)}')
    if judge:
        from judge import score
        score(agent, what, settings | {'out_dir': out_dir})
        sys.exit()

    rows = {METHODS['plan']: ('plan', {})}  # of the table: how, and what is changed of the planner
    if simulator:
        rows = {METHODS['simulator']: ('simulator', {})}
    elif vary:
        rows = {label: ('plan', changed) for label, changed in arms(vary).items()}
    elif baselines:
        rows = {label: (method, {}) for method, label in METHODS.items()}

    world = envs.make_world(what)
    episodes = []
    for i in range(num_seeds):
        episodes += draw_episodes(world, num_episodes, seed + i, agent.size[0],
                                  goals=goals, goal_steps=goal_steps, budget=budget)
    finished = os.path.join(out_dir, 'plan.partial')  # a file an episode: a killed run goes on there
    if RANK == 0:
        run.make_folder(finished)
        begin(os.path.join(finished, 'settings.json'), settings)
    barrier()
    tasks = list(itertools.product(rows, range(len(episodes))))
    paths = {task: os.path.join(finished, f'{i:06d}.json') for i, task in enumerate(tasks)}
    mine = [task for task in tasks[RANK::WORLD_SIZE] if not os.path.exists(paths[task])]
    reached = Counter()
    bar = tqdm(mine, unit='episode', disable=RANK > 0)
    for label, i in bar:
        bar.set_description(label)
        method, changed = rows[label]
        agent.planner = replace(planner, **changed)
        start = time.perf_counter()
        with autocast(opened.device, opened.dtype):
            steps = act(partial(choose, method, agent), agent, world, episodes[i])
        seconds = time.perf_counter() - start
        row = dict(reached=steps, distance=episodes[i].distance, seconds=seconds)
        write_whole(paths[label, i], json.dumps(row))
        reached[label] += steps is not None
        bar.set_postfix_str(f'{reached[label]} reached')
    barrier()
    leave_processes()
    if RANK > 0:
        sys.exit()

    results = defaultdict(list)
    for (label, _), path in paths.items():
        with open(path) as f:
            results[label].append(json.load(f))
    summaries = {label: summarise(done) for label, done in results.items()}
    text = table(summaries)
    first = next(iter(rows))
    text += f'\n\n{first}, by the distance at the start (1 is reached):\n\n'
    text += table(by_distance(results[first]))
    with open(os.path.join(out_dir, 'plan.md'), 'w') as f:
        f.write(text + '\n')
    with open(os.path.join(out_dir, 'plan.json'), 'w') as f:
        settings |= dict(dataset=opened.dataset, num_steps=planner.num_steps,
                         machine=name_of(opened.device), processes=WORLD_SIZE)
        json.dump({'settings': settings, 'summaries': summaries, 'episodes': results}, f)
    if num_films:
        agent.planner = planner
        with autocast(opened.device, opened.dtype):
            best = partial(choose, rows[first][0], agent)
            video = films(best, agent, world, episodes[:num_films])
        write_video(os.path.join(out_dir, 'plan.gif'), video, fps=3)
    shutil.rmtree(finished)
    print(text)
    print(f'{out_dir}: plan.json, plan.md and plan.gif')
