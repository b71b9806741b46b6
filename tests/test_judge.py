"""Truths about the outside judge: what we hand it, with a stand-in for it, and itself where it is installed."""
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import TRAIN, error, inline, run

import envs
import judge
from cem import Agent
from data import Clips
from plan import Planner
from run import load_run

SMALL = dict(candidates=6, elites=2, iterations=2, horizon=3, execute=3)


class StableWall(envs.StableWorld, envs.Wall):
    """The wall world, as if the judge had it."""
    name, state_column = 'Wall-v0', 'state'

    def __init__(self):
        pass

    def render(self, size):
        return envs.Wall.render(self, size)

    def their_state(self):
        return self.get_state()

    def set_their_state(self, state):
        self.set_state(state)


class World:
    """What judge.py uses of stable_worldmodel.World, in the wall world: [E] episodes side by side."""
    action_space = np.zeros((4, 2), np.float32)

    def __init__(self, name, num_envs, image_shape, image_resample):
        assert (name, num_envs, image_shape, image_resample) == ('Wall-v0', 4, (16, 16), 'bilinear')

    def set_policy(self, policy):
        self.policy, policy.env = policy, self

    def evaluate(self, dataset, episodes_idx, start_steps, goal_offset, eval_budget, callables):
        assert [setter['method'] for setter in callables] == ['_set_state', '_set_goal_state']
        ends = [start + goal_offset + 1 for start in start_steps]
        chunks = dataset.load_chunk(episodes_idx, start_steps, ends)
        states = [chunk['state'][0].numpy() for chunk in chunks]
        goals = [chunk['state'][-1].numpy() for chunk in chunks]
        world, reached = StableWall(), np.zeros(4, bool)
        for _ in range(eval_budget):
            actions = self.policy.get_action({'pixels': chunks})
            for i, action in enumerate(actions):
                world.set_state(states[i])
                world.step(action)
                states[i] = world.get_state()
                reached[i] |= world.distance(states[i], goals[i]) < 1
        return {'episode_successes': reached}


class Policy:
    """Stands in for its policies: remembers what it was made of, and stands still."""

    def __init__(self, *given, **options):
        self.given, self.options = given, options

    def get_action(self, info):
        return np.zeros(World.action_space.shape, np.float32)


@pytest.fixture
def stand_in(monkeypatch):
    """A stable_worldmodel that is none."""
    package, policy, solver = (ModuleType(name) for name in ('swm', 'policy', 'solver'))
    package.World, solver.CEMSolver = World, Policy
    policy.BasePolicy, policy.PlanConfig = Policy, Policy
    policy.RandomPolicy, policy.WorldModelPolicy = Policy, Policy
    for name, module in (('', package), ('.policy', policy), ('.solver', solver)):
        monkeypatch.setitem(sys.modules, f'stable_worldmodel{name}', module)
    monkeypatch.setitem(envs.WORLDS, 'wall', StableWall)


@pytest.fixture(scope='module')
def agent(trained):
    return Agent(*load_run(trained, 'cpu'), Planner(**SMALL))


def test_costs_come_in_the_order_of_starts_and_candidates(agent):
    frames = torch.from_numpy(np.moveaxis(agent.recorded.frames[[0, 5, 30, 40]], 1, -1))
    pixels, goals = (some[:, None, None].expand(-1, 6, -1, -1, -1, -1) for some in frames.split(2))
    candidates = 3 * torch.randn(2, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    model = judge.CostModel(agent)

    def costs(rows, columns):
        info = {'pixels': pixels[rows], 'goal': goals[rows]}
        return model.get_cost(info, candidates[rows][:, columns])

    with torch.no_grad():
        whole = costs([0, 1], [0, 1, 2, 3, 4, 5])
        assert whole.shape == (2, 6) and len(whole.unique()) == 12
        assert torch.allclose(costs([1, 0], [5, 4, 3, 2, 1, 0]), whole.flip(0, 1), rtol=1e-4)
        limited = candidates.clamp(agent.low, agent.high)
        assert (model.get_cost({'pixels': pixels, 'goal': goals}, limited) == whole).all()


def test_what_it_plans_with_may_be_told_wrong_actions_or_be_the_simulator(agent):
    world = StableWall()
    states, pixels = [], []
    for seed in range(4):  # two starts and their goals
        world.reset(seed)
        states.append(world.get_state())
        pixels.append(world.render(16).transpose(1, 2, 0))

    def shared(rows):
        return torch.from_numpy(np.stack(rows))[:, None, None].expand(-1, 6, 1, *rows[0].shape)

    info = {'pixels': shared(pixels[:2]), 'goal': shared(pixels[2:]), 'state': shared(states[:2])}
    candidates = torch.randn(2, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    costs = {}
    for method in ('plan', 'wrong', 'simulator'):
        costs[method] = judge.CostModel(agent, world, method).get_cost(info, candidates)
    assert torch.allclose(costs['wrong'], costs['plan'].roll(1, dims=1), rtol=1e-4)
    for i in range(2):
        world.set_state(states[i])
        truth = agent.cost_of(agent.simulate_from(world), pixels[2 + i].transpose(2, 0, 1))
        assert torch.equal(costs['simulator'][i], truth(candidates[i].clamp(agent.low, agent.high)))


def test_actions_are_scaled_as_those_of_our_own_planner(agent):
    scaler, standardised = judge.Scaler(agent), torch.randn(5, 2)
    raw = scaler.inverse_transform(standardised.numpy())
    assert np.allclose(raw, agent.raw(standardised)[:, 0], atol=1e-6)
    assert np.allclose(scaler.transform(raw), standardised, atol=1e-5)


def test_a_chunk_has_the_frames_actions_and_states_of_its_steps(wall):
    clips, world = Clips(wall, 'val', 2), StableWall()
    recorded = judge.Recorded(clips, world)
    chunks = recorded.load_chunk([0, 1], [3, 10], [9, 30])
    assert [len(chunk['state']) for chunk in chunks] == [6, 20]
    for chunk in chunks:
        assert list(chunk) == recorded.column_names
        pixels, actions, states = (chunk[name].numpy() for name in recorded.column_names)
        for i, after in enumerate(states[1:]):
            world.set_state(states[i])
            assert (world.render(16) == pixels[i]).all()
            world.step(actions[i])
            assert np.allclose(world.get_state(), after)


def test_a_judgement_replays_what_was_recorded_and_leaves_its_table(stand_in, trained, tmp_path):
    options = [f'--{key}={value}' for key, value in SMALL.items()]
    printed = inline('plan.py', f'--ckpt={trained}', '--device=cpu', '--judge=True',
                     '--num_episodes=4', f'--out_dir={tmp_path}', *options)
    assert '| the recorded actions | 100 [51, 100] | 4 |' in printed
    assert (tmp_path / 'judge.md').read_text() in printed
    results = json.loads((tmp_path / 'judge.json').read_text())['results']
    assert all(results['the recorded actions']['reached'])
    assert not all(results['stand still']['reached'])


def test_the_judge_gets_our_planner_s_settings(stand_in, agent):
    policy = judge.policies(agent, None, np.zeros((25, 4, 2), np.float32))['plan in the dream']()
    solver, config = policy.given
    budget = {key: solver.options[key] for key in ('num_samples', 'n_steps', 'topk')}
    assert budget == dict(num_samples=6, n_steps=2, topk=2)
    assert config.given == (3, 3) and config.options == {'action_block': 1}


def test_a_world_that_the_judge_does_not_know_is_refused(trained):
    said = error('plan.py', f'--ckpt={trained}', '--judge=True', '--device=cpu')
    assert 'the judge has no wall: it takes episodes of two_room or swm_pusht' in said


@pytest.mark.slow
@pytest.mark.parametrize('name', ['two_room', 'swm_pusht'])
def test_replayed_actions_reach_every_goal_of_the_judge_itself(name, tmp_path):
    pytest.importorskip('stable_worldmodel')
    data, out = tmp_path / 'data', tmp_path / 'run'
    run('data.py', name, f'--out={data}', '--episodes=4', '--image_size=16', '--workers=0')
    inline(*TRAIN, f'--dataset={data}', f'--out_dir={out}', '--max_steps=1', '--frame_interval=5')
    options = [f'--{key}={value}' for key, value in SMALL.items()]
    printed = inline('plan.py', f'--ckpt={out}', '--device=cpu', '--judge=True', '--num_episodes=6',
                     *options)
    assert '| the recorded actions | 100 ' in printed
