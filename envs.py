"""The worlds to learn: `wall`, ours and plain numpy, and simulators of others.

A world is a class with a row in WORLDS, at the end; nothing else knows its name. It says of itself:

    about                   in a few words
    steps                   the length of an episode
    episodes, image_size    how many are collected, and pixels along a side, by default
    action_dim              numbers in an action
    KEYS                    {key: action} for whoever plays it; keys held together add up

and it does:

    reset(seed)             start an episode
    step(action)            float32 [action_dim] -> True if there was contact, as with the wall;
                            `over`, if it has that, is then True where the episode ended early
    render(size)            uint8 [3, size, size]
    get_state() / set_state(state)      float64 vector; what actions lead to depends on it alone
    explore(rng)            the scripted policy's next action

and, for plan.py:

    distance(state, goal)   between two states; the goal is reached below 1
    random_goal(rng)        a state to reach from where the episode is

It may say what is to be seen in its pictures, for objects.py:

    COLOURS                 {name: (red, green, blue)} that its pixels are mixed of, at most four
    OBJECTS                 {name: (area, spread)} of those that are objects: the share of the
                            picture, and the root mean square distance from the object's middle
    SIDE, BORDER            of the picture, in the world's units; the border is not looked at
    NEAR                    a place as close to the true one as this is right
    places()                {name: (x, y)} of the middles of the objects, in the world's units
"""
import numpy as np
from PIL import Image

import gym_worlds
from configurator import UserError
from doom import Doom
from pusht import PushT


class Wall:
    """A round agent in two rooms; the door between them is elsewhere in every episode.

    Positions are (x, y) in [0, 1], y down. An action is a displacement of at most MAX_STEP along
    each axis; wall and border stop it, x first, then y.
    """
    about = 'an agent in two rooms, and a door between them'
    steps, episodes = 60, 2000
    image_size = 32
    action_dim = 2
    KEYS = {'ArrowLeft': [-0.1, 0], 'ArrowRight': [0.1, 0],
            'ArrowUp': [0, -0.1], 'ArrowDown': [0, 0.1]}

    RADIUS, HALF_WALL, HALF_DOOR, MAX_STEP = 0.1, 0.04, 0.16, 0.14
    GAP = HALF_DOOR - RADIUS  # the agent's room in the door, up and down
    REACH = HALF_WALL + RADIUS  # closer to the middle than this only inside the door
    NEAR = 0.07  # of the room counts as reached, like DINO-WM's 4.5 of 65
    SIDE, BORDER = 1.0, 0.0
    COLOURS = {'agent': (225, 60, 50), 'wall': (60, 70, 90), 'floor': (235, 235, 235)}
    OBJECTS = {'agent': (np.pi * RADIUS ** 2, RADIUS / 2 ** 0.5)}

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        door = rng.uniform(0.2, 0.8)
        x = rng.uniform(self.RADIUS, 0.5 - self.HALF_WALL - self.RADIUS)  # in the left room
        if rng.random() >= 0.5:
            x = 1 - x
        self.set_state([x, rng.uniform(self.RADIUS, 1 - self.RADIUS), door])

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
        r, gap, reach = self.RADIUS, self.GAP, self.REACH
        new_x = np.clip(x + dx, r, 1 - r)
        # in the door y was clipped to its edge: a rounding error more must not keep the agent out
        if abs(y - self.door) > gap + 1e-9 and abs(x - 0.5) >= reach:
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
        """Anti-aliased: a pixel is covered by its distance, in pixels, to the edge of a shape."""
        centre = (np.arange(size) + 0.5) / size
        x, y = centre[None, :], centre[:, None]
        wall = np.maximum(abs(x - 0.5) - self.HALF_WALL, self.HALF_DOOR - abs(y - self.door))
        agent = np.hypot(x - self.pos[0], y - self.pos[1]) - self.RADIUS
        colours = {name: np.array(rgb)[:, None, None] for name, rgb in self.COLOURS.items()}
        frame = np.zeros((3, size, size)) + colours['floor']
        for name, distance in {'wall': wall, 'agent': agent}.items():
            frame += np.clip(0.5 - distance * size, 0, 1) * (colours[name] - frame)
        return frame.round().astype(np.uint8)

    def explore(self, rng):
        """Head for a goal, and for a new one when there or, often, when blocked."""
        arrived = self.goal is None or np.abs(self.goal - self.pos).max() < 0.03
        if arrived or rng.random() < 0.4 * self.blocked + 0.03:
            self.goal = self.choose_goal(rng)
        to = self.goal - self.pos
        beyond = (self.pos[0] - 0.5) * (self.goal[0] - 0.5) < 0 and self.goal[1] == self.door
        if beyond and abs(to[1]) >= self.GAP:  # not in line with the door yet
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


class StableWorld:
    """A simulator of stable-worldmodel (MIT), whose own planner can judge our models: judge.py."""
    action_dim = 2
    resolution = {}  # of its picture, as the simulator takes it
    resample = 'bilinear'  # how judge.py makes the picture smaller, and we

    def __init__(self):
        self.env = gym_worlds.make(self.name, 'stable_worldmodel', **self.resolution).unwrapped

    def set_their_state(self, state):
        """A state as state_column has it."""
        self.env._set_state(np.asarray(state, dtype=np.float64))

    def render(self, size):
        how = Image.Resampling[self.resample.upper()]
        frame = Image.fromarray(self.env.render()).resize((size, size), how)
        return np.ascontiguousarray(np.asarray(frame).transpose(2, 0, 1))


class TwoRoom(StableWorld):
    """Two rooms and a door, always at the same place. A state is (x, y) in [0, 224], y down.

    An action is a direction and a speed, of at most 1 along each axis, which is 5 pixels.
    """
    about = 'two rooms, simulated by stable-worldmodel'
    steps, episodes = 100, 500
    image_size = 64
    KEYS = {'ArrowLeft': [-0.8, 0], 'ArrowRight': [0.8, 0],
            'ArrowUp': [0, -0.8], 'ArrowDown': [0, 0.8]}
    name = 'swm/TwoRoom-v1'
    state_column = 'proprio'  # of its datasets

    def reset(self, seed):
        from stable_worldmodel.envs.two_room.expert_policy import ExpertPolicy
        self.env.reset(seed=int(seed))
        self.over = False  # until it is at the target
        # as noisy as in its own datasets
        self.expert = ExpertPolicy(action_noise=2.0, action_repeat_prob=0.05, seed=int(seed))
        self.expert.set_env(self.env)

    def get_state(self):
        return self.env.agent_position.numpy().astype(np.float64)

    their_state = get_state
    set_state = StableWorld.set_their_state

    def step(self, action):
        action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        wanted = self.get_state() + 5 * action
        _, _, self.over, _, _ = self.env.step(action)
        return bool(np.abs(self.get_state() - wanted).max() > 1e-3)

    def explore(self, rng):
        """Its expert's way to a target, with the noise that reset gave it."""
        info = dict(state=self.get_state(), goal_state=self.env.target_position.numpy())
        return np.asarray(self.expert.get_action(info), np.float32)

    def distance(self, state, goal):
        return np.hypot(*(state - goal)) / 16

    def random_goal(self, rng):
        """Anywhere in the other room."""
        x = rng.uniform(25, 95)
        if self.get_state()[0] < self.env.WALL_CENTER:
            x = 224 - x
        return np.array([x, rng.uniform(25, 199)])


class StablePushT(StableWorld, PushT):
    """PushT in the same physics and pictures; only, an action may lead out of the table."""
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
        target = np.clip(position + 100 * super().explore(rng), 15, 497)  # where PushT.step goes
        return ((target - position) / 100).astype(np.float32)


WORLDS = {'wall': Wall, 'pusht': PushT, 'two_room': TwoRoom, 'swm_pusht': StablePushT, 'doom': Doom}


def make_world(name):
    """A world, ready for reset. Raises UserError if it is unknown, or its simulator missing."""
    if name not in WORLDS:
        raise UserError(f'{name!r}: no such world; expected one of {", ".join(WORLDS)}')
    return WORLDS[name]()
