"""A planner on trial: from a start to a goal in a true simulator, and how often it gets there.

The world says when a goal is reached, and is asked after every step. Episodes that are solved before
they begin do not count, and a planner's share means something only beside that of standing still, of
random actions, and of the same planner in the true simulator.
"""
import math
import operator
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch

from cem import cem
from configurator import UserError, checked, parse
from evaluate import markdown
from pictures import side_by_side, to_pixels


@dataclass
class Episode:
    """Get from a start to a goal, both of them states of the world, within a budget of steps."""
    seed: int
    start: np.ndarray
    goal: np.ndarray
    picture: np.ndarray  # of the goal, uint8 [3,H,W]
    distance: float  # at the start; below 1 is reached
    budget: int


def draw_episode(world, seed, size, goals='recorded', goal_steps=15, budget=0):
    """An Episode that begins somewhere along the explorer's way.

    goals: 'recorded' is where the explorer gets in goal_steps, 'random' is world.random_goal.
    budget: 0 is twice goal_steps. size: of the goal's picture.
    """
    rng = np.random.default_rng([seed, 1])  # as readers.py explores
    world.reset(seed)
    for _ in range(rng.integers(max(1, world.steps - goal_steps))):
        world.step(world.explore(rng))
    start = world.get_state()
    if goals == 'random':
        world.set_state(world.random_goal(rng))
    else:
        for _ in range(goal_steps):
            world.step(world.explore(rng))
    goal = world.get_state()
    distance = float(world.distance(start, goal))
    return Episode(seed, start, goal, world.render(size), distance, budget or 2 * goal_steps)


def draw_episodes(world, count, seed, size, **options):
    """Episodes of seeds that no dataset has, not solved before they begin. Raises UserError."""
    first = number = 1_000_000_000 + seed * 1_000_000
    episodes = []
    while len(episodes) < count:
        if number == first + 1000 and not episodes:
            raise UserError('goal_steps: of 1,000 goals none lay far enough to count; ask for more')
        episode = draw_episode(world, number, size, **options)
        if episode.distance >= 1:
            episodes.append(episode)
        number += 1
    return episodes


@torch.no_grad()
def act(method, agent, world, episode, film=None):
    """Plan, act and look until the goal is reached or the budget spent: the steps it took, or None.

    film: a list that gets pairs (frame as it was dreamed, frame as it came), both uint8 [H,W,3].
    """
    world.reset(episode.seed)
    world.set_state(episode.start)
    torch.manual_seed(episode.seed)  # what eta draws on the way
    generator = torch.Generator().manual_seed(episode.seed)
    execute, mean, steps = agent.planner.execute, None, 0
    while True:
        plan, imagine = choose(method, agent, world, episode, generator, mean)
        raw = agent.raw(plan)
        if film is not None:
            dreamed = to_pixels(imagine(raw[None])[0], agent.vae)
        for i in range(execute):
            for action in raw[i].numpy():
                world.step(action)
                steps += 1
                reached = world.distance(world.get_state(), episode.goal) < 1
                if reached or steps == episode.budget:
                    break
            if film is not None:
                film.append((dreamed[i], picture_of(world, agent)))
            if reached or steps == episode.budget:
                return steps if reached else None
        mean = torch.cat([plan[execute:], torch.zeros_like(plan[:execute])])  # what is left of it


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
    # for every method: its noise is drawn first, so that all try the same candidates
    imagine = agent.dream_from(world.render(agent.size[0]), generator)
    if method == 'simulator':
        imagine = agent.simulate_from(world)
    cost = agent.cost_of(imagine, episode.picture)

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
    else:
        told = cost_of_another if method == 'wrong' else cost
        plan = cem(told, planner, agent.low, agent.high, generator, mean)
    return plan, imagine


def arms(vary, planner, settings):
    """{label: Planner}: two for 'candidates=32,128 iterations=16,4'. Raises UserError.

    settings: {key: configurator.Setting}, which has those of the planner.
    """
    columns = {}
    for column in vary.split():
        key, _, values = column.partition('=')
        if key not in settings or not hasattr(planner, key):
            raise UserError(f'vary={vary}: expected settings of the planner, like num_steps=1,2,4')
        columns[key] = []
        for text in values.split(','):
            value = parse(text, settings[key])
            columns[key].append(checked(key, value, settings, f'vary={vary}'))
    if len({len(values) for values in columns.values()}) > 1:
        raise UserError(f'vary={vary}: expected as many values of each')
    planners = {}
    for values in zip(*columns.values(), strict=True):
        changed = dict(zip(columns, values, strict=True))
        label = ', '.join(f'{key}={value}' for key, value in changed.items())
        planners[label] = replace(planner, **changed)
    return planners


# -----------------------------------------------------------------------------
# what is shown

def picture_of(world, agent):
    return world.render(agent.size[0]).transpose(1, 2, 0)


def films(method, agent, world, episodes):
    """Video uint8 [T,H,W,3]: what the plans dreamed, above what then happened, above the goal."""
    taken = []
    for episode in episodes:
        film = []
        act(method, agent, world, episode, film)
        world.set_state(episode.start)
        start = picture_of(world, agent)
        taken.append([(start, start), *film])
    length = max(len(film) for film in taken)
    rows = {'dream': [], 'world': [], 'goal': []}
    for film, episode in zip(taken, episodes, strict=True):
        film += [film[-1]] * (length - len(film))
        dreamed, happened = zip(*film, strict=True)
        rows['dream'].append(dreamed)
        rows['world'].append(happened)
        rows['goal'].append([episode.picture.transpose(1, 2, 0)] * length)
    return side_by_side({label: np.array(clips) for label, clips in rows.items()}, num_context=1)


# -----------------------------------------------------------------------------
# results

def wilson(successes, count, z=1.96):
    """The 95 % interval of a share (Wilson 1927); near 0 and 1 it does not leave [0, 1]."""
    share = successes / count
    centre = share + z ** 2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z ** 2 / (4 * count ** 2))
    scale = 1 + z ** 2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def percent(successes, count):
    """'96 [92, 98]': a share in %, and its 95 % interval."""
    low, high = wilson(successes, count)
    return f'{100 * successes / count:.0f} [{100 * low:.0f}, {100 * high:.0f}]'


def summarise(rows):
    """One line of the table, of episodes {'steps' to the goal or None, 'seconds', 'distance'}."""
    steps = [row['steps'] for row in rows if row['steps']]
    return {
        'episodes': len(rows),
        'reached': len(steps),
        'rate': len(steps) / len(rows),
        'interval': wilson(len(steps), len(rows)),
        'median_steps': statistics.median(steps) if steps else None,
        'seconds': statistics.mean(row['seconds'] for row in rows),
    }


def table(summaries):
    """Markdown of {label: summarise(...)}."""
    rows = {'': ['reached, % [95 % interval]', 'episodes', 'steps, median', 's an episode']}
    for label, summary in summaries.items():
        reached = percent(summary['reached'], summary['episodes'])
        steps = summary['median_steps'] or ''
        rows[label] = [reached, summary['episodes'], steps, f'{summary["seconds"]:.1f}']
    return markdown(rows)


def by_distance(rows):
    """{label: summarise(...)} of a third of the episodes each: near, farther, far."""
    rows = sorted(rows, key=operator.itemgetter('distance'))
    thirds = {}
    names = ('near', 'farther', 'far')[:len(rows)]
    for name, part in zip(names, np.array_split(rows, len(names)), strict=True):
        nearest, farthest = part[0]['distance'], part[-1]['distance']
        thirds[f'{name}, {nearest:.1f} to {farthest:.1f}'] = summarise(part)
    return thirds
