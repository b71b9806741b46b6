"""PushT (Chi et al. 2023): a round pusher, a T-shaped block and the T's goal pose."""
import numpy as np
from PIL import Image

import gym_worlds


class PushT:
    """Simulated by gym-pusht at 10 Hz.

    Positions are in [0, 512]. An action is where the pusher should go, relative to where it is,
    over 100. A state is the pusher's position and velocity, then the block's position, angle,
    velocity and angular velocity.
    """
    about = 'a pusher and a T-shaped block, simulated by gym-pusht'
    steps, episodes = 200, 1200
    image_size = 64
    action_dim = 2
    KEYS = {'ArrowLeft': [-0.2, 0], 'ArrowRight': [0.2, 0],
            'ArrowUp': [0, -0.2], 'ArrowDown': [0, 0.2]}
    SIDE, NEAR = 512.0, 20.0
    BORDER = 8.0  # its grey is that of the edge of a block
    # pusher and block are drawn in two shades each, a rim and a lighter inside: these lie between
    COLOURS = {'pusher': (72, 116, 241), 'block': (143, 163, 184), 'goal': (144, 238, 144),
               'table': (255, 255, 255)}
    OBJECTS = {'pusher': (707 / 512 ** 2, 10.6 / 512), 'block': (7400 / 512 ** 2, 46 / 512)}

    def __init__(self):
        self.env = gym_worlds.make('gym_pusht/PushT-v0', 'gym_pusht', obs_type='state',
                                   observation_width=512, observation_height=512).unwrapped

    def reset(self, seed):
        self.env.reset(seed=int(seed))
        self.set_state(self.random_goal(np.random.default_rng(seed)))

    def random_goal(self, rng):
        """Pusher and block anywhere, at rest."""
        pusher, block = rng.uniform(60, 452, 2), rng.uniform(120, 392, 2)
        return np.array([*pusher, 0, 0, *block, rng.uniform(-np.pi, np.pi), 0, 0, 0])

    def distance(self, state, goal):
        """As DINO-WM counts: (pusher, block) within 20 of 512, and the angle within 20 degrees."""
        places = [0, 1, 4, 5]
        moved = np.linalg.norm(state[places] - goal[places])
        turned = abs((state[6] - goal[6] + np.pi) % (2 * np.pi) - np.pi)  # from 0 to pi
        return max(moved / 20, turned / np.radians(20))

    def places(self):
        """Of the block the middle of what one sees; the centre of gravity is 4 beside it."""
        middle = self.env.block.local_to_world((0, 40.8))
        return {'pusher': np.array(self.env.agent.position), 'block': np.array(middle)}

    def get_state(self):
        agent, block = self.env.agent, self.env.block
        return np.array([*agent.position, *agent.velocity, *block.position, block.angle,
                         *block.velocity, block.angular_velocity])

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
        frame = Image.fromarray(self.env._render()).resize((size, size), Image.BOX)
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

        The offset turns the block. The steps are None until the pusher is where the push starts.
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
