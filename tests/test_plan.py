"""Truths about planning."""
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAIN, error, inline, run

import trials
from cem import OBJECTIVES, Agent, cem, whitening
from configurator import UserError
from envs import make_world
from machine import autocast
from plan import Planner, plan_actions
from run import load_run, open_run
from trials import METHODS, act, by_distance, draw_episodes, percent, wilson

SMALL = dict(candidates=8, elites=2, iterations=2, horizon=3, execute=2)
PLAN = ['plan.py', '--device=cpu', '--num_episodes=2', '--goal_steps=4', '--num_films=1',
        *(f'--{key}={value}' for key, value in SMALL.items())]


@pytest.fixture(scope='module')
def opened(trained):
    return load_run(trained, 'cpu')


@pytest.fixture
def frames():
    """Two pictures of the wall world, with the agent in different places."""
    world = make_world('wall')
    pictures = []
    for x in (0.2, 0.35):
        world.set_state([x, 0.3, 0.5])
        pictures.append(world.render(16))
    return pictures


def figures(folder):
    with open(os.path.join(folder, 'plan.json')) as f:
        results = json.load(f)
    rows = {}
    for label, episodes in results['episodes'].items():
        rows[label] = [(row['steps'], row['distance']) for row in episodes]
    return rows


# -----------------------------------------------------------------------------
# the planner

def test_cem_finds_the_optimum_of_a_quadratic():
    optimum = torch.tensor([[0.5, -1.0], [1.5, 0.2]])
    bound = torch.full((2,), 3.0)
    planner = Planner(candidates=100, elites=10, iterations=20, horizon=2, execute=1)
    found = cem(lambda x: (x - optimum).square().sum(dim=(1, 2)), planner, -bound, bound,
                torch.Generator().manual_seed(0))
    assert torch.allclose(found, optimum, atol=0.02)


def test_cem_stays_in_range_where_the_optimum_does_not():
    low, high = torch.tensor([-0.5, -2.0]), torch.tensor([0.5, 2.0])
    planner = Planner(candidates=50, elites=5, iterations=10, horizon=3, execute=1)
    found = cem(lambda x: (x - 5).square().sum(dim=(1, 2)), planner, low, high,
                torch.Generator().manual_seed(0))
    assert (found <= high).all() and (found >= low).all()
    assert torch.allclose(found, high.expand(3, 2), atol=0.1)


def test_a_perfect_model_reaches_the_goal(opened):
    planner = Planner(candidates=32, elites=4, iterations=5)
    agent, world = Agent(*opened, planner), make_world('wall')
    steps = []
    for episode in draw_episodes(world, 5, seed=0, size=16):
        steps.append(act('simulator', agent, world, episode))
    assert all(steps)


def test_standing_still_reaches_nothing(opened):
    agent, world = Agent(*opened, Planner(**SMALL)), make_world('wall')
    for episode in draw_episodes(world, 5, seed=0, size=16):
        assert act('still', agent, world, episode) is None


def test_planned_actions_are_raw_and_in_the_range_of_the_data(opened, frames):
    agent = Agent(*opened, Planner(**SMALL))
    plan = plan_actions(*opened[:2], *frames, opened[2], **SMALL)
    assert plan.shape == (3, 2) and plan.dtype == np.float32
    actions = agent.recorded.actions
    assert (plan >= actions.min(axis=0) - 1e-6).all() and (plan <= actions.max(axis=0) + 1e-6).all()


def test_one_seed_gives_one_plan_and_another_seed_another(opened, frames):
    def plan(seed):
        return plan_actions(*opened[:2], *frames, opened[2], seed=seed, **SMALL)
    assert (plan(1) == plan(1)).all()
    assert (plan(1) != plan(2)).any()


def test_how_many_are_dreamed_at_once_does_not_matter(opened, frames):
    costs = []
    actions = torch.randn(8, 3, 2)
    for memory in (2.0, 1e-9):
        agent = Agent(*opened, Planner(**SMALL, memory=memory))
        dream = agent.dream_from(frames[0], torch.Generator().manual_seed(0))
        with torch.no_grad():
            costs.append(agent.cost_of(dream, frames[1])(actions))
    assert torch.allclose(*costs, rtol=1e-4)


def test_raw_actions_reach_the_model_as_it_was_trained(wall, tmp_path, frames):
    inline(*TRAIN, f'--dataset={wall}', f'--out_dir={tmp_path}', '--max_steps=1',
           '--normalize_action=True', '--frame_interval=2')
    model, diffusion, config = load_run(tmp_path, 'cpu')
    agent = Agent(model, diffusion, config, Planner(**SMALL))
    told = []

    def sample(model, context, action, *args, **options):
        told.append(action)
        return torch.zeros(8, 4, 3, 16, 16)
    diffusion.sample = sample
    standardised = torch.randn(8, 3, 4)
    agent.dream_from(frames[0], torch.Generator())(agent.raw(standardised))
    assert agent.raw(standardised).shape == (8, 3, 2, 2)
    assert torch.allclose(told[0][:, :3], standardised, atol=1e-5)  # by the same mean and std
    assert (told[0][:, 3] == 0).all()


def test_blurred_pictures_feel_a_distance_that_pixels_do_not(opened):
    world, shown = make_world('wall'), {}
    for place in (0.15, 0.5, 0.85):
        world.set_state([0.2, place, 0.5])
        shown[place] = torch.from_numpy(world.render(32))[None] / 127.5 - 1
    ratio = {}
    for name in ('pixels', 'blur'):
        embedded = {place: OBJECTIVES[name](x, None) for place, x in shown.items()}
        far, near = ((embedded[place] - embedded[0.85]).square().mean() for place in (0.15, 0.5))
        ratio[name] = far / near
    assert ratio['pixels'] < 1.01 < 1.1 < ratio['blur']


def test_whitened_colours_vary_equally_and_apart_from_each_other():
    mixed = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed[:, 1] = 0.3 * mixed[:, 1] + mixed[:, 0]
    white = torch.einsum('ij,njhw->nihw', whitening(mixed), mixed)
    assert torch.allclose(torch.cov(white.transpose(0, 1).flatten(1)), torch.eye(3), atol=1e-4)


def test_a_colour_that_hardly_varies_is_not_blown_up():
    grey = torch.randn(50, 1, 8, 8).expand(-1, 3, -1, -1)
    assert torch.linalg.matrix_norm(whitening(grey), 2) < 11 / grey.std()


@pytest.mark.parametrize('objective', ['blur', 'whitened'])
def test_pictures_are_compared_with_all_digits_whatever_dreams(objective):
    frames, agent = torch.rand(2, 3, 16, 16), SimpleNamespace(whitening=torch.rand(3, 3))
    expected = OBJECTIVES[objective](frames, agent)
    with autocast('cpu', 'bf16'):
        assert torch.equal(OBJECTIVES[objective](frames, agent), expected)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_objective_is_zero_at_the_goal_only(opened, frames, objective):
    agent = Agent(*opened, Planner(**SMALL, objective=objective, look_at='all'))
    with torch.no_grad():
        for picture, reached in ((frames[1], True), (frames[0], False)):
            still = agent.encode(np.stack([picture] * 6)).unflatten(0, (2, 3))
            cost = agent.cost_of(lambda actions, still=still: still, frames[1])
            assert (cost(torch.zeros(2, 3, 2)) < 1e-10).all() == reached


def test_features_are_those_of_the_model_whether_compiled_or_not(opened, frames):
    model, *rest = opened
    embedded = []
    for m in (model, torch.compile(model, backend='eager')):
        agent = Agent(m, *rest, Planner(**SMALL, objective='features'))
        with torch.no_grad():
            m(torch.zeros(1, 1, 3, 16, 16), torch.full((1, 1), 20))  # once compiled, it may notice no new hook
            embedded.append(OBJECTIVES['features'](agent.encode(frames[0][None]), agent))
    assert torch.equal(*embedded)


# -----------------------------------------------------------------------------
# trials

@pytest.mark.parametrize('goals', ['recorded', 'random'])
def test_episodes_are_not_solved_before_they_begin(goals):
    world = make_world('wall')
    episodes = draw_episodes(world, 20, seed=0, size=16, goals=goals)
    assert all(world.distance(e.start, e.goal) >= 1 for e in episodes)
    assert all(world.distance(e.goal, e.goal) == 0 and e.start[2] == e.goal[2] for e in episodes)
    assert len({e.seed for e in episodes}) == 20


def test_goals_that_nobody_can_miss_are_refused(monkeypatch):
    world = make_world('wall')
    monkeypatch.setattr(world, 'distance', lambda state, goal: 0.5)
    with pytest.raises(UserError, match='goal_steps: of 1,000 goals none lay far enough'):
        draw_episodes(world, 2, seed=0, size=16, goal_steps=1)


def test_the_wilson_interval_is_as_published():
    assert np.allclose(wilson(5, 10), (0.2366, 0.7634), atol=1e-4)
    assert np.allclose(wilson(0, 10), (0, 0.2775), atol=1e-4)
    assert percent(0, 20) == '0 [0, 16]'


def test_thirds_that_lie_at_one_distance_are_three_rows():
    rows = [dict(steps=1, seconds=0.0, distance=1.01 + i / 1000) for i in range(6)]
    assert [row['episodes'] for row in by_distance(rows).values()] == [2, 2, 2]


@pytest.fixture(scope='module')
def planned(trained, tmp_path_factory):
    """(options, what is printed, folder) of a run of plan.py."""
    folder = str(tmp_path_factory.mktemp('plan'))
    options = [*PLAN, f'--ckpt={trained}']
    return options, inline(*options, f'--out_dir={folder}'), folder


def test_a_run_leaves_its_table_figures_and_film(planned):
    _, printed, folder = planned
    assert set(os.listdir(folder)) == {'plan.json', 'plan.md', 'plan.gif'}
    with open(f'{folder}/plan.md') as f:
        assert f.read() in printed
    assert {len(rows) for rows in figures(folder).values()} == {2}
    assert list(figures(folder)) == list(METHODS.values())


def test_a_killed_run_goes_on_to_the_same_figures(planned, tmp_path, monkeypatch):
    options, _, folder = planned
    options = [*options, f'--out_dir={tmp_path}']
    played = []

    def act_some(*args):
        if len(played) == 5:
            raise KeyboardInterrupt
        played.append(args)
        return act(*args)
    monkeypatch.setattr(trials, 'act', act_some)
    with pytest.raises(KeyboardInterrupt):
        inline(*options)
    monkeypatch.undo()
    assert 'was begun with other settings (iterations)' in error(*options, '--iterations=3')
    with monkeypatch.context() as patch:
        patch.setattr('run.open_run', with_other_weights)
        assert 'was begun with other settings (weights)' in error(*options)
    inline(*options)
    assert figures(tmp_path) == figures(folder)


def with_other_weights(settings):
    opened = open_run(settings)
    opened.model.final_layer.linear.bias.data += 1
    return opened


@pytest.mark.slow
def test_two_processes_equal_one(planned, tmp_path):
    options, _, folder = planned
    run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *options,
        f'--out_dir={tmp_path}')
    assert figures(tmp_path) == figures(folder)


@pytest.mark.parametrize('simulator', [True, False])
def test_vary_makes_a_row_for_each_value(planned, tmp_path, monkeypatch, simulator):
    options, *_ = planned
    tried = []

    def act_and_note(method, agent, *args):
        tried.append((method, agent.planner.num_steps, agent.planner.objective))
        return act(method, agent, *args)
    monkeypatch.setattr(trials, 'act', act_and_note)
    vary = 'num_steps=1,2 objective=blur,pixels'
    inline(*options, f'--out_dir={tmp_path}', f'--vary={vary}', f'--simulator={simulator}')
    rows = ['num_steps=1, objective=blur', 'num_steps=2, objective=pixels']
    assert list(figures(tmp_path)) == rows
    method = 'simulator' if simulator else 'plan'
    first, second = (method, 1, 'blur'), (method, 2, 'pixels')
    assert tried == [first, first, second, second, first]  # two episodes each, then the film


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize('option, said', [
    ('--goals=some', "goals='some': expected one of recorded, random"),
    ('--objective=lpips', "objective='lpips': expected one of pixels, blur, whitened, features"),
    ('--look_at=first', "look_at='first': expected one of last, all"),
    ('--elites=9', 'elites=9: expected at most candidates=8'),
    ('--execute=4', 'execute=4: expected at most horizon=3'),
    ('--context_frames=2', 'context_frames: a plan begins from one frame'),
    ('--vary=seed=1', 'vary=seed=1: expected settings of the planner'),
    ('--vary=num_steps=one', "num_steps='one' is of the wrong type"),
    ('--vary=num_steps=1,2 horizon=3', 'expected as many values of each'),
    ('--vary=elites=2,1', 'elites=1: expected >= 2'),
    ('--vary=execute=2,4', 'execute=4: expected at most horizon=3'),
])
def test_a_mistake_ends_in_one_line(planned, option, said):
    options, *_ = planned
    assert said in error(*options, option)


def test_a_goal_of_the_wrong_size_is_refused(opened, frames):
    with pytest.raises(UserError, match=r'uint8 \[3, 8, 8\]: expected uint8 \[3, 16, 16\]'):
        plan_actions(*opened[:2], frames[0], frames[1][:, :8, :8], opened[2])
    with pytest.raises(UserError, match='a frame or goal is float32'):
        plan_actions(*opened[:2], frames[0].astype(np.float32), frames[1], opened[2])


@pytest.mark.parametrize('what', ['rt1', 'doom'])  # no simulator, and one where nothing is a goal
def test_a_world_in_which_no_goal_can_be_reached_is_refused(planned, wall, tmp_path, what):
    shutil.copytree(wall, tmp_path / 'data')
    with open(tmp_path / 'data/meta.json', 'r+') as f:
        meta = json.load(f) | {'what': what}
        f.seek(0)
        json.dump(meta, f)
        f.truncate()
    said = error(*planned[0], f'--dataset={tmp_path}/data')
    assert f'is of {what}, which has no simulator with goals: expected one of wall, pusht' in said


def test_a_model_without_actions_is_refused(opened, frames):
    model, diffusion, config = opened
    deaf = type(model)(type(model.config)(**(vars(model.config) | {'action_dim': 0})))
    with pytest.raises(UserError, match='trained without actions'):
        plan_actions(deaf, diffusion, *frames, config)
