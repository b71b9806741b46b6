"""An outside judge: our model in stable-worldmodel's simulator, by its planner, budget and criterion.

    pip install stable-worldmodel==0.1.1 opencv-python-headless imageio pymunk pygame shapely
    python data.py two_room && python train.py config/two_room.py
    python plan.py --ckpt=out/two_room --judge=True

The judge asks a model for `get_cost` and a dataset for `load_chunk`, and does the rest itself. Its
protocol: a goal 25 simulator steps on in a held-out episode, 50 steps to get there, and success if
its simulator says so at any of them.
"""
import contextlib
import io
import json
import math
import os
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import envs
from configurator import UserError
from data import Clips
from evaluate import markdown
from machine import write_whole
from trials import METHODS, percent

GOAL_OFFSET, BUDGET = 25, 50  # simulator steps


class CostModel(nn.Module):
    """What the judge's planner optimises: how far from the goal our dream of each candidate ends.

    method: of trials.METHODS: plan, simulator (the world takes the dream's place) or wrong.
    """

    def __init__(self, agent, world=None, method='plan', progress=None):
        super().__init__()
        self.agent, self.model, self.world = agent, agent.model, world
        self.method, self.progress = method, progress

    def get_cost(self, info, candidates):
        """[B,S] for standardised candidates [B,S,horizon,interval*A].

        info: 'pixels' and 'goal' uint8 [B,S,1,H,W,3], the same for all S, and the simulator's state.
        """
        agent, costs = self.agent, []
        actions = candidates.cpu().clamp(agent.low, agent.high)  # the judge's planner knows no bounds
        if self.method == 'wrong':
            actions = actions.roll(1, dims=1)
        for i, some in enumerate(actions):
            pictures = torch.stack([info['pixels'][i, 0, 0], info['goal'][i, 0, 0]])
            frame, goal = pictures.permute(0, 3, 1, 2).cpu().numpy()
            if self.method == 'simulator':
                self.world.set_their_state(info[self.world.state_column][i, 0, 0].cpu().numpy())
                imagine = agent.simulate_from(self.world)
            else:
                imagine = agent.dream_from(frame, torch.Generator().manual_seed(0))
            costs.append(agent.cost_of(imagine, goal)(some))
        if self.progress:
            self.progress()
        return torch.stack(costs).to(candidates.device)


class Scaler:
    """Between the actions of the judge's simulator and the standardised ones of its planner."""

    def __init__(self, agent):
        self.mean, self.std = agent.mean.numpy(), agent.std.numpy()

    def transform(self, actions):
        return (actions - self.mean) / self.std

    def inverse_transform(self, actions):
        return actions * self.std + self.mean


class Recorded:
    """Held-out episodes as the judge asks for them; states, which were not recorded, are replayed."""

    def __init__(self, clips, world):
        self.clips, self.world = clips, world
        self.column_names = ['pixels', 'action', world.state_column]
        count = clips.meta['episodes']
        num_train = count - max(1, count // 10)
        self.first_seed = clips.meta['seed'] * 1_000_000 + num_train  # as readers.py plays them

    def load_chunk(self, episodes, starts, ends):
        chunks = []
        for episode, start, end in zip(episodes, starts, ends, strict=True):
            first = self.clips.episodes[episode]
            rows = slice(first + start, first + end)
            states = []
            self.world.reset(self.first_seed + episode)
            for action in self.clips.actions[first:first + end]:
                states.append(self.world.their_state())
                self.world.step(action)
            chunks.append({
                'pixels': torch.from_numpy(np.array(self.clips.frames[rows])),  # [T,3,H,W]
                'action': torch.from_numpy(np.array(self.clips.actions[rows])),
                self.world.state_column: torch.from_numpy(np.stack(states[start:])),
            })
        return chunks


def policies(agent, world, recorded, baselines=True):
    """{label: a function that makes its policy}: plans by the judge's planner, and baselines.

    recorded [T,N,A]: the actions that led from the starts to the goals.
    """
    from stable_worldmodel.policy import BasePolicy, PlanConfig, RandomPolicy, WorldModelPolicy
    from stable_worldmodel.solver import CEMSolver

    class Replay(BasePolicy):
        """Given actions [T,N,A], and rest after them."""

        def __init__(self, actions):
            super().__init__()
            self.actions = iter(actions)

        def get_action(self, info, **options):
            rest = np.zeros(self.env.action_space.shape, np.float32)
            return next(self.actions, rest)

    planner = agent.planner
    config = PlanConfig(planner.horizon, planner.execute, action_block=agent.interval)
    plans = math.ceil(BUDGET / (planner.execute * agent.interval))  # at most, of an episode

    def plan(method):
        bar = tqdm(total=recorded.shape[1] * plans * planner.iterations, unit='iteration',
                   desc=METHODS[method])
        solver = CEMSolver(CostModel(agent, world, method, bar.update), num_samples=planner.candidates,
                           n_steps=planner.iterations, topk=planner.elites,
                           var_scale=planner.first_std, device=agent.device)
        return WorldModelPolicy(solver, config, process={'action': Scaler(agent)})

    makers = {METHODS['plan']: partial(plan, 'plan')}
    if baselines:
        makers |= {METHODS[method]: partial(plan, method) for method in ('simulator', 'wrong')}
        makers['the recorded actions'] = partial(Replay, recorded)
        makers[METHODS['random']] = partial(RandomPolicy, seed=0)
        makers[METHODS['still']] = partial(Replay, [])
    return makers


def score(agent, what, settings):
    """Let it judge: prints a table, and leaves it as judge.md and judge.json. Raises UserError."""
    known = [name for name, world in envs.WORLDS.items() if issubclass(world, envs.StableWorld)]
    if what not in known:
        raise UserError(f'the judge has no {what}: it takes episodes of {" or ".join(known)} '
                        '(a model of pusht: python data.py swm_pusht, and --dataset=data/swm_pusht)')
    world = envs.make_world(what)
    from stable_worldmodel import World
    clips = Clips(agent.recorded.root, 'val', GOAL_OFFSET + 1)
    chosen, _ = clips.first_rows(clips.fixed(settings['num_episodes'], settings['seed']))
    episodes = np.searchsorted(clips.episodes, chosen, side='right') - 1
    starts = chosen - clips.episodes[episodes]
    actions = clips.actions[chosen + np.arange(GOAL_OFFSET)[:, None]]
    state = world.state_column
    setters = [{'method': '_set_state', 'args': {'state': {'value': state}}},
               {'method': '_set_goal_state', 'args': {'goal_state': {'value': f'goal_{state}'}}}]

    rows = {'': ['reached, % [95 % interval]', 'episodes', 's an episode']}
    results = {}
    for label, make_policy in policies(agent, world, actions, settings['baselines']).items():
        judge = World(world.name, num_envs=len(chosen), image_shape=agent.size,
                      image_resample=world.resample, **world.resolution)
        judge.set_policy(make_policy())
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each plan
            result = judge.evaluate(
                dataset=Recorded(clips, world), episodes_idx=episodes.tolist(),
                start_steps=starts.tolist(), goal_offset=GOAL_OFFSET, eval_budget=BUDGET,
                callables=setters)
        seconds = (time.perf_counter() - start) / len(chosen)
        reached = result['episode_successes'].astype(bool).tolist()
        rows[label] = [percent(sum(reached), len(reached)), len(reached), f'{seconds:.1f}']
        results[label] = {'reached': reached, 'seconds': seconds}

    text, path = markdown(rows), os.path.join(settings['out_dir'], 'judge')
    write_whole(f'{path}.md', text + '\n')
    write_whole(f'{path}.json', json.dumps({'settings': settings, 'results': results}))
    print(text)
    planner = agent.planner
    print(f'{planner.candidates} candidates x {planner.iterations} iterations a plan; '
          'published figures took 300 x 30')
