"""A planner on trial: from a start to a goal in a true simulator, and how often it gets there.

The world says when a goal is reached, and is asked after every step. A planner's share means
something only beside that of standing still, of random actions, and of the same planner in the true
simulator.
"""
import math
import statistics
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from cem import cem
from configurator import UserError
from evaluate import markdown, with_interval
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
    """An Episode that begins somewhere along the explorer's way; options as in plan.py."""
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
    """Episodes whose seeds no dataset has, and that are not solved before they begin."""
    episodes, number = [], 1_000_000_000 + seed * 1_000_000
    while len(episodes) < count:
        episode = draw_episode(world, number, size, **options)
        if episode.distance >= 1:
            episodes.append(episode)
        number += 1
    return episodes


@torch.no_grad()
def act(choose, agent, world, episode, film=None):
    """Plan, act and look, until the goal is reached or the budget spent.

    choose(world, episode, generator, mean): as below; mean is what is left of the last plan.
    film: a list that gets pairs (frame as dreamed, frame as it came), both uint8 [H,W,3].
    Returns the steps it took, or None.
    """
    world.reset(episode.seed)
    world.set_state(episode.start)
    torch.manual_seed(episode.seed)  # what eta draws on the way
    generator = torch.Generator().manual_seed(episode.seed)
    execute, mean, steps = agent.planner.execute, None, 0
    while True:
        plan, imagine = choose(world, episode, generator, mean)
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
        mean = torch.cat([plan[execute:], torch.zeros_like(plan[:execute])])


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
    """A plan by one of METHODS [horizon,interval*A], standardised, and what dreams it."""
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
    else:
        minimised = cost_of_another if method == 'wrong' else cost
        plan = cem(minimised, planner, agent.low, agent.high, generator, mean)
    return plan, imagine


def arms(vary, kinds):
    """{label: {option of the planner: value}}: two for 'candidates=32,128 iterations=16,4'.

    kinds: {option: its type}. Raises UserError.
    """
    columns = {}
    for column in vary.split():
        key, _, values = column.partition('=')
        if kinds.get(key) not in (int, float, str):
            raise UserError(f'vary={vary}: expected settings of the planner, like num_steps=1,2,4')
        try:
            columns[key] = [kinds[key](value) for value in values.split(',')]
        except ValueError as e:
            raise UserError(f'vary={vary}: {e}') from e
    if len({len(values) for values in columns.values()}) > 1:
        raise UserError(f'vary={vary}: expected as many values of each')
    rows = {}
    for values in zip(*columns.values(), strict=True):
        changed = dict(zip(columns, values, strict=True))
        label = ', '.join(f'{key}={value}' for key, value in changed.items())
        rows[label] = changed
    return rows


# -----------------------------------------------------------------------------
# what is shown

def picture_of(world, agent):  # uint8 [H,W,3]
    return world.render(agent.size[0]).transpose(1, 2, 0)


def films(choose, agent, world, episodes):
    """Video uint8 [T,H,W,3]: what the plans dreamed, above what then happened, above the goal."""
    taken = []
    for episode in episodes:
        world.set_state(episode.start)
        start = picture_of(world, agent)
        taken.append([(start, start)])
        act(choose, agent, world, episode, taken[-1])
    length = max(len(film) for film in taken)
    for film in taken:
        film += [film[-1]] * (length - len(film))
    seen = np.array(taken)  # [B,T,2,H,W,3]
    goals = np.array([episode.picture for episode in episodes]).transpose(0, 2, 3, 1)
    goals = goals[:, None].repeat(length, axis=1)
    rows = {'dream': seen[:, :, 0], 'world': seen[:, :, 1], 'goal': goals}
    return side_by_side(rows, num_context=1)


# -----------------------------------------------------------------------------
# results

def wilson(successes, count, z=1.96):
    """The 95 % interval of a share (Wilson 1927); near 0 and 1 it does not leave [0, 1]."""
    share = successes / count
    centre = share + z ** 2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z ** 2 / (4 * count ** 2))
    scale = 1 + z ** 2 / count
    return (centre - spread) / scale, (centre + spread) / scale


def share(successes, count):
    """'88 [76, 94]': percent, and their 95 % interval."""
    percent = [100 * end for end in wilson(successes, count)]
    return with_interval(100 * successes / count, percent, digits=0)


def table(results):
    """Markdown of {label: episodes}, each {'reached': steps or None, 'seconds': ...}."""
    rows = {'': ['reached, % [95 % interval]', 'episodes', 'steps, median', 's an episode']}
    for label, episodes in results.items():
        steps = [episode['reached'] for episode in episodes if episode['reached']]
        median = statistics.median(steps) if steps else ''
        seconds = statistics.mean(episode['seconds'] for episode in episodes)
        rows[label] = [share(len(steps), len(episodes)), len(episodes), median, f'{seconds:.1f}']
    return markdown(rows)


def by_distance(episodes):
    """table's results of a third of the episodes each: near, farther, far."""
    thirds = {}
    for part in np.array_split(sorted(episodes, key=itemgetter('distance')), 3):
        if len(part):
            nearest, farthest = part[0]['distance'], part[-1]['distance']
            thirds[f'{nearest:.1f} to {farthest:.1f} away'] = part
    return thirds
