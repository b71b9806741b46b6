"""Worlds to learn: `wall`, ours and plain numpy, and `pusht`, the real PushT simulator.

A world is a class with a row in WORLDS, at the end; nothing else knows its name. What it says of itself:

    about                   in a few words
    steps, episodes         how long an episode is, and how many are collected by default
    image_size              pixels along a side, by default
    action_dim              numbers in an action
    KEYS                    {key: action [action_dim]} for whoever plays it; keys held together add up

and what it does:

    reset(seed)             start an episode
    step(action)            action [action_dim] float32 -> True if there was contact (with the wall, or with the block)
    render(size)            uint8 [3, size, size]
    get_state() / set_state(state)      float64 vector; what given actions lead to depends on it alone
    explore(rng)            the scripted policy's next action

and, for plan.py:

    distance(state, goal)   between two states; the goal is reached below 1
    random_goal(rng)        a state to reach from where the episode is

A world may end an episode before its steps are over: then `over` is True. And it may say what is to
be seen in its pictures, for objects.py:

    COLOURS                 {name: (red, green, blue)} that its pixels are mixed of, at most four
    OBJECTS                 {name: (area, spread)} of those that are objects: the share of the picture
                            they cover, and the root mean square distance from their middle
    SIDE, BORDER            of the picture, in the world's units; nothing is looked for in the border
    NEAR                    a place as close to the true one as this is right
    places()                {name: (x, y)} of the middles of the objects, in the world's units
"""
import os

import numpy as np
from PIL import Image

from configurator import UserError
from doom import Doom


class Wall:
    """A round agent in two rooms. The wall between them has a door at a height of its own in every episode.

    Positions are (x, y) in [0, 1], y down. An action is a displacement of at most MAX_STEP along each axis; wall and
    border stop it, x first, then y.
    """
    about = 'an agent in two rooms, and a door between them'
    steps, episodes = 60, 2000
    image_size = 32
    action_dim = 2
    KEYS = {'ArrowLeft': [-0.1, 0], 'ArrowRight': [0.1, 0], 'ArrowUp': [0, -0.1], 'ArrowDown': [0, 0.1]}

    RADIUS, HALF_WALL, HALF_DOOR, MAX_STEP = 0.1, 0.04, 0.16, 0.14
    NEAR = 0.07  # of the room counts as reached, like DINO-WM's 4.5 of 65
    SIDE, BORDER = 1.0, 0.0
    COLOURS = {'agent': (225, 60, 50), 'wall': (60, 70, 90), 'floor': (235, 235, 235)}
    OBJECTS = {'agent': (np.pi * RADIUS ** 2, RADIUS / 2 ** 0.5)}

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.door = rng.uniform(0.2, 0.8)
        x = rng.uniform(self.RADIUS, 0.5 - self.HALF_WALL - self.RADIUS)  # in the left room
        if rng.random() >= 0.5:
            x = 1 - x
        self.pos = np.array([x, rng.uniform(self.RADIUS, 1 - self.RADIUS)])
        self.goal, self.blocked = None, False

    def get_state(self):
        return np.array([*self.pos, self.door])

    def places(self):
        return {'agent': self.pos}

    def set_state(self, state):
        self.pos, self.door = np.array(state[:2], dtype=np.float64), float(state[2])
        self.goal, self.blocked = None, False

    def step(self, action):
        x, y = self.pos
        dx, dy = np.clip(np.asarray(action, dtype=np.float64), -self.MAX_STEP, self.MAX_STEP)
        r = self.RADIUS
        gap = self.HALF_DOOR - r  # the agent's room in the door, up and down
        reach = self.HALF_WALL + r  # closer to the middle than this only inside the door
        new_x = np.clip(x + dx, r, 1 - r)
        if abs(y - self.door) > gap and abs(x - 0.5) >= reach:
            if x < 0.5:
                new_x = min(new_x, 0.5 - reach)
            else:
                new_x = max(new_x, 0.5 + reach)
        if abs(new_x - 0.5) < reach:
            new_y = np.clip(y + dy, self.door - gap, self.door + gap)
        else:
            new_y = np.clip(y + dy, r, 1 - r)
        self.pos = np.array([new_x, new_y])
        self.blocked = bool(abs(x + dx - new_x) > 1e-9 or abs(y + dy - new_y) > 1e-9)
        return self.blocked

    def render(self, size):
        """Anti-aliased: a pixel's coverage is its distance to the shape's edge, in pixels, clipped to [0, 1]."""
        centre = (np.arange(size) + 0.5) / size
        x, y = centre[None, :], centre[:, None]
        wall = np.maximum(abs(x - 0.5) - self.HALF_WALL, self.HALF_DOOR - abs(y - self.door))
        agent = np.hypot(x - self.pos[0], y - self.pos[1]) - self.RADIUS
        frame = np.full((3, size, size), 235.0)
        for distance, colour in ((wall, (60, 70, 90)), (agent, (225, 60, 50))):
            cover = np.clip(0.5 - distance * size, 0, 1)
            frame += cover * (np.array(colour)[:, None, None] - frame)
        return frame.round().astype(np.uint8)

    def explore(self, rng):
        """Head for a goal, and for a new one when there, often when blocked; every other goal is beyond the door."""
        arrived = self.goal is None or np.abs(self.goal - self.pos).max() < 0.03
        if arrived or rng.random() < 0.4 * self.blocked + 0.03:
            self.goal = self.choose_goal(rng)
        to = self.goal - self.pos
        beyond = (self.pos[0] - 0.5) * (self.goal[0] - 0.5) < 0 and self.goal[1] == self.door
        if beyond and abs(to[1]) >= self.HALF_DOOR - self.RADIUS:  # not in line with the door yet
            to[0] *= 0.3
        speed = self.MAX_STEP * rng.uniform(0.5, 1) / max(np.abs(to).max(), self.MAX_STEP)
        action = to * speed + rng.normal(0, 0.015, 2)
        return np.clip(action, -self.MAX_STEP, self.MAX_STEP).astype(np.float32)

    def choose_goal(self, rng):
        """A place in the other room at the door's height, or any place."""
        depth = rng.uniform(0.15, 0.4)
        if self.pos[0] >= 0.5:
            depth = -depth
        if rng.random() < 0.5:
            return np.array([0.5 + depth, self.door])
        return rng.uniform(0, 1, 2)

    def distance(self, state, goal):
        return np.hypot(state[0] - goal[0], state[1] - goal[1]) / self.NEAR

    def random_goal(self, rng):
        """Anywhere in the other room."""
        x = rng.uniform(self.RADIUS, 0.5 - self.HALF_WALL - self.RADIUS)
        if self.pos[0] < 0.5:
            x = 1 - x
        return np.array([x, rng.uniform(self.RADIUS, 1 - self.RADIUS), self.door])


class PushT:
    """PushT (Chi et al. 2023): a round pusher, a T-shaped block and the T's goal pose, simulated by gym-pusht at 10 Hz.

    Positions are in [0, 512]. An action is where the pusher should go, relative to where it is, over 100.
    """
    about = 'a pusher and a T-shaped block, simulated by gym-pusht'
    steps, episodes = 200, 1200
    image_size = 64
    action_dim = 2
    KEYS = {'ArrowLeft': [-0.2, 0], 'ArrowRight': [0.2, 0], 'ArrowUp': [0, -0.2], 'ArrowDown': [0, 0.2]}
    SIDE, NEAR = 512.0, 20.0
    BORDER = 8.0  # its grey is that of the edge of a block
    # pusher and block are drawn in two shades each, a rim and a lighter inside: these lie between
    COLOURS = {'pusher': (72, 116, 241), 'block': (143, 163, 184), 'goal': (144, 238, 144),
               'table': (255, 255, 255)}
    OBJECTS = {'pusher': (707 / 512 ** 2, 10.6 / 512), 'block': (7400 / 512 ** 2, 46 / 512)}

    def __init__(self):
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        try:
            import gym_pusht  # noqa: F401
            import gymnasium
        except ImportError as e:
            raise UserError(f'pusht needs its simulator: pip install gym-pusht ({e})') from e
        self.env = gymnasium.make('gym_pusht/PushT-v0', obs_type='state', observation_width=512,
                                  observation_height=512, disable_env_checker=True).unwrapped

    def reset(self, seed):
        self.env.reset(seed=int(seed))
        self.set_state(self.random_goal(np.random.default_rng(seed)))

    def random_goal(self, rng):
        """Pusher and block anywhere, at rest."""
        pusher, block, angle = rng.uniform(60, 452, 2), rng.uniform(120, 392, 2), rng.uniform(-np.pi, np.pi)
        return np.array([*pusher, 0, 0, *block, angle, 0, 0, 0])

    def distance(self, state, goal):
        """As DINO-WM counts it: (pusher, block) within 20 of 512, and the block's angle within 20 degrees."""
        places = [0, 1, 4, 5]
        moved = np.linalg.norm(state[places] - goal[places])
        return max(moved / 20, angle_between(state[6], goal[6]) / np.radians(20))

    def places(self):
        """Of the block the middle of what one sees; the simulator's centre of gravity is 4 beside it."""
        middle = self.env.block.local_to_world((0, 40.8))
        return {'pusher': np.array(self.env.agent.position), 'block': np.array(middle)}

    def get_state(self):
        agent, block = self.env.agent, self.env.block
        return np.array([*agent.position, *agent.velocity, *block.position, block.angle, *block.velocity,
                         block.angular_velocity])

    def set_state(self, state):
        self.env._setup()  # a new space: the old one remembers its contacts
        s, agent, block = [float(v) for v in state], self.env.agent, self.env.block
        agent.position, agent.velocity = tuple(s[:2]), tuple(s[2:4])
        block.angle = s[6]  # before the position: turning moves it around its centre of gravity
        block.position, block.velocity, block.angular_velocity = tuple(s[4:6]), tuple(s[7:9]), s[9]
        self.env.space.reindex_shapes_for_body(agent)
        self.env.space.reindex_shapes_for_body(block)
        self.plan = None

    def step(self, action):
        target = np.array(self.env.agent.position) + 100 * np.asarray(action, dtype=np.float64)
        self.env.step(np.clip(target, 15, 497))
        return self.env.n_contact_points > 0

    def render(self, size):
        frame = Image.fromarray(self.env._render()).resize((size, size), Image.BOX)  # every pixel of 512x512 counts
        return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))

    def explore(self, rng):
        """Get behind the block, push it some way, choose another way."""
        agent, block = np.array(self.env.agent.position), self.env.block
        centre = np.array(block.local_to_world(block.center_of_gravity))
        if self.plan is None:
            self.plan = self.choose_plan(agent, centre, rng)
        angle, offset, left, speed = self.plan
        ahead = np.array([np.cos(angle), np.sin(angle)])
        aside = np.array([-ahead[1], ahead[0]])
        start = np.clip(centre - 95 * ahead + offset * aside, 20, 492)
        if left is None and np.hypot(*(start - agent)) > 20:
            to = self.way_around(agent, centre, start)
            limit = max(speed, 45)
        else:
            if left is None:
                left = rng.integers(12, 32)
            left -= 1
            to = centre + offset * aside + 60 * ahead - agent
            to = speed * to / max(np.hypot(*to), 1e-6)
            limit = speed
            self.plan = (angle, offset, left, speed) if left > 0 else None
        to = to * min(1, limit / max(np.hypot(*to), 1e-6)) + rng.normal(0, 2, 2)
        return (to / 100).astype(np.float32)

    def choose_plan(self, agent, centre, rng):
        """(direction of the push, its offset from the block's centre, steps left of it, speed).

        The offset turns the block. The steps are None while the pusher is on its way to where the push starts.
        """
        home = np.arctan2(*(256 - centre)[::-1]) + rng.normal(0, 0.5)
        across = np.arctan2(*(centre - agent)[::-1]) + rng.normal(0, 0.8)
        near_border = np.abs(centre - 256).max() > 110
        return home if near_border else across, rng.normal(0, 25), None, rng.uniform(12, 30)

    def way_around(self, agent, centre, goal):
        """The direction to the goal, or around the block where that is in the way."""
        outward = agent - centre
        distance = np.hypot(*outward)
        to = goal - agent
        if to @ outward >= 0 or distance >= 115:
            return to
        turn = np.array([-outward[1], outward[0]]) / distance
        if turn @ to <= 0:
            turn = -turn
        return 40 * turn + max(0, 105 - distance) * outward / distance


def angle_between(a, b):
    """Radians, from 0 to pi."""
    return abs((a - b + np.pi) % (2 * np.pi) - np.pi)


class StableWorld:
    """A simulator of stable-worldmodel (MIT), whose own planner can then judge what we train on it: see judge.py.

    Pictures are made smaller as its World makes them, so that its pictures and ours are the same.
    """
    action_dim = 2
    resolution = {}  # of its picture, as the simulator takes it
    resample = 'bilinear'  # how the picture is made smaller

    def __init__(self):
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        try:
            import gymnasium
            import stable_worldmodel  # noqa: F401
        except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision made for another torch
            raise UserError(f'{self.name} needs its simulator: pip install stable-worldmodel==0.1.1 '
                            f'opencv-python-headless imageio pymunk pygame shapely ({e})') from e
        self.env = gymnasium.make(self.name, disable_env_checker=True, **self.resolution).unwrapped

    def render(self, size):
        how = Image.Resampling[self.resample.upper()]
        frame = Image.fromarray(self.env.render()).resize((size, size), how)
        return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))


class TwoRoom(StableWorld):
    """Two rooms and a door that is always at the same place. A state is the agent's (x, y) in [0, 224], y down.

    An action is a direction and a speed, of at most 1 along each axis, which is 5 pixels.
    """
    about = 'two rooms, simulated by stable-worldmodel'
    steps, episodes = 100, 500
    image_size = 64
    KEYS = {'ArrowLeft': [-0.8, 0], 'ArrowRight': [0.8, 0], 'ArrowUp': [0, -0.8], 'ArrowDown': [0, 0.8]}
    name = 'swm/TwoRoom-v1'
    state_column = 'proprio'  # of its datasets

    def reset(self, seed):
        self.env.reset(seed=int(seed))

    def their_state(self):
        """As state_column has it."""
        return self.get_state()

    def get_state(self):
        return self.env.agent_position.numpy().astype(np.float64)

    def set_state(self, state):
        self.env._set_state(np.asarray(state))

    def step(self, action):
        action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        wanted = self.get_state() + 5 * action
        self.env.step(action)
        return bool(np.abs(self.get_state() - wanted).max() > 1e-3)

    def explore(self, rng):
        """Its expert's way to a target, with so much noise that a quarter of the judge's goals are where they start."""
        from stable_worldmodel.envs.two_room.expert_policy import ExpertPolicy
        expert = ExpertPolicy()
        expert.set_env(self.env)
        info = dict(state=self.get_state(), goal_state=self.env.target_position.numpy())
        return np.clip(expert.get_action(info) + rng.normal(0, 2, 2), -1, 1).astype(np.float32)

    def distance(self, state, goal):
        return np.hypot(*(state - goal)) / 16

    def random_goal(self, rng):
        """Anywhere in the other room."""
        x = rng.uniform(25, 95)
        if self.get_state()[0] < self.env.WALL_CENTER:
            x = 224 - x
        return np.array([x, rng.uniform(25, 199)])


class StablePushT(StableWorld, PushT):
    """PushT in the same physics and pictures, so that a model of one knows the other; only, an action may lead out."""
    about = 'PushT, simulated by stable-worldmodel'
    name = 'swm/PushT-v1'
    resolution, resample = {'resolution': 512}, 'box'  # as PushT's
    state_column = 'state'

    def their_state(self):
        agent_x, agent_y, *velocity, x, y, angle = self.get_state()[:7]
        return np.array([agent_x, agent_y, x, y, angle % (2 * np.pi), *velocity])

    def step(self, action):
        self.env.step(np.asarray(action, dtype=np.float64))
        return self.env.n_contact_points > 0

    def explore(self, rng):
        position = np.array(self.env.agent.position)
        target = np.clip(position + 100 * super().explore(rng), 15, 497)  # where PushT.step would send it
        return ((target - position) / 100).astype(np.float32)


WORLDS = {'wall': Wall, 'pusht': PushT, 'two_room': TwoRoom, 'swm_pusht': StablePushT, 'doom': Doom}


def make_world(name):
    """A world, ready for reset. Raises UserError for an unknown name, or for a simulator that is not installed."""
    if name not in WORLDS:
        raise UserError(f'{name!r}: no such world; expected one of {", ".join(WORLDS)}')
    return WORLDS[name]()
