"""Two worlds to learn: `wall`, ours and plain numpy, and `pusht`, the real PushT simulator.

Both have one small interface:

    reset(seed)             start an episode
    step(action)            action [2] float32 -> True if there was contact (with the wall, or with the block)
    render(size)            uint8 [3, size, size]
    get_state() / set_state(state)      float64 vector; what given actions lead to depends on it alone
    explore(rng)            the scripted policy's next action
"""
import os

import numpy as np
from PIL import Image

EPISODE_STEPS = {'wall': 60, 'pusht': 200}


class Wall:
    """A round agent in two rooms. The wall between them has a door at a height of its own in every episode.

    Positions are (x, y) in [0, 1], y down. An action is a displacement of at most MAX_STEP along each axis; wall and
    border stop it, x first, then y.
    """
    RADIUS, HALF_WALL, HALF_DOOR, MAX_STEP = 0.1, 0.04, 0.16, 0.14

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.door = rng.uniform(0.2, 0.8)
        x = rng.uniform(self.RADIUS, 0.5 - self.HALF_WALL - self.RADIUS)
        self.pos = np.array([x if rng.random() < 0.5 else 1 - x, rng.uniform(self.RADIUS, 1 - self.RADIUS)])
        self.goal, self.blocked = None, False

    def get_state(self):
        return np.array([*self.pos, self.door])

    def set_state(self, state):
        self.pos, self.door = np.array(state[:2], dtype=np.float64), float(state[2])
        self.goal, self.blocked = None, False

    def step(self, action):
        (x, y), r, gap = self.pos, self.RADIUS, self.HALF_DOOR - self.RADIUS
        dx, dy = np.clip(np.asarray(action, dtype=np.float64), -self.MAX_STEP, self.MAX_STEP)
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
        if self.goal is None or np.abs(self.goal - self.pos).max() < 0.03 or rng.random() < 0.4 * self.blocked + 0.03:
            side = 1 if self.pos[0] < 0.5 else -1
            through = np.array([0.5 + side * rng.uniform(0.15, 0.4), self.door])
            self.goal = through if rng.random() < 0.5 else rng.uniform(0, 1, 2)
        to = self.goal - self.pos
        if (self.pos[0] - 0.5) * (self.goal[0] - 0.5) < 0 and self.goal[1] == self.door:
            lined_up = abs(to[1]) < self.HALF_DOOR - self.RADIUS
            to = to if lined_up else np.array([0.3 * to[0], to[1]])
        speed = self.MAX_STEP * rng.uniform(0.5, 1) / max(np.abs(to).max(), self.MAX_STEP)
        return np.clip(to * speed + rng.normal(0, 0.015, 2), -self.MAX_STEP, self.MAX_STEP).astype(np.float32)


class PushT:
    """PushT (Chi et al. 2023): a round pusher, a T-shaped block and the T's goal pose, simulated by gym-pusht at 10 Hz.

    Positions are in [0, 512]. An action is where the pusher should go, relative to where it is, over 100.
    """

    def __init__(self):
        os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')
        os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
        try:
            import gym_pusht  # noqa: F401
            import gymnasium
        except ImportError as e:
            raise SystemExit(f'pusht needs its simulator: pip install gym-pusht ({e})') from e
        self.env = gymnasium.make('gym_pusht/PushT-v0', obs_type='state', observation_width=512,
                                  observation_height=512, disable_env_checker=True).unwrapped

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.env.reset(seed=int(seed))
        self.set_state([*rng.uniform(60, 452, 2), 0, 0, *rng.uniform(120, 392, 2), rng.uniform(-np.pi, np.pi), 0, 0, 0])

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
        """Get behind the block, push it some way, choose another way.

        The plan is (direction, offset, steps left to push; None while on the way). Directions lead back to the middle
        when the block is near a border, the offset from the centre turns it.
        """
        agent, block = np.array(self.env.agent.position), self.env.block
        centre = np.array(block.local_to_world(block.center_of_gravity))
        if self.plan is None:
            home = np.arctan2(*(256 - centre)[::-1]) + rng.normal(0, 0.5)
            across = np.arctan2(*(centre - agent)[::-1]) + rng.normal(0, 0.8)
            angle = home if np.abs(centre - 256).max() > 110 else across
            self.plan = [angle, rng.normal(0, 25), None, rng.uniform(12, 30)]
        angle, offset, left, speed = self.plan
        ahead = np.array([np.cos(angle), np.sin(angle)])
        aside = np.array([-ahead[1], ahead[0]])
        start = np.clip(centre - 95 * ahead + offset * aside, 20, 492)
        to = start - agent
        if left is None and np.hypot(*to) > 20:
            outward = agent - centre
            distance = np.hypot(*outward)
            if (to @ -outward) > 0 and distance < 115:  # the block is in the way: go around it
                turn = np.array([-outward[1], outward[0]]) / distance
                to = 40 * (turn if turn @ to > 0 else -turn) + max(0, 105 - distance) * outward / distance
        else:
            self.plan[2] = left = (rng.integers(12, 32) if left is None else left) - 1
            to = centre + offset * aside + 60 * ahead - agent
            to = speed * to / max(np.hypot(*to), 1e-6)
            if left <= 0:
                self.plan = None
        limit = max(speed, 45) if left is None else speed
        to = to * min(1, limit / max(np.hypot(*to), 1e-6)) + rng.normal(0, 2, 2)
        return (to / 100).astype(np.float32)


WORLDS = {'wall': Wall, 'pusht': PushT}
