"""Policies for data.py, (observation, rng) -> action: where chance or an explorer is not enough.

    python data.py gym --env=CarRacing-v3 --name=carracing --repeat=2 --policy=policies.py:drive
    python data.py wall --name=wall_door --policy=policies.py:linger

The worlds of envs.py have no observation: a policy is given the world itself.
"""
import numpy as np


def drive(observation, rng):
    """Follow CarRacing's grey road, swaying, so that a dream learns what steering does.

    At random, gas and brake are pressed together and the car hardly moves.
    """
    ahead = observation[40:66].astype(int)  # rows before the car, which is in row 70, column 48
    grey = (np.ptp(ahead, axis=2) < 12) & (abs(ahead.mean(axis=2) - 105) < 12)
    steer = rng.normal(0, 0.35)
    if grey.any():
        steer += (np.nonzero(grey)[1].mean() - 48) / 25
    gas, brake = rng.uniform(0, 0.4), 0.0
    if rng.random() < 0.1:
        gas, brake = 0.0, rng.uniform(0, 0.3)
    return np.float32([np.clip(steer, -1, 1), gas, brake])


def linger(wall, rng):
    """Explore, but where the door's edge is near, try for it, now a hair inside and now outside.

    There a rollout ends in one room or the other, and the explorer tries it in one or two steps of a hundred.
    """
    x, y = wall.pos
    edge = wall.door + np.copysign(wall.GAP, y - wall.door)
    inside = abs(x - 0.5) < wall.REACH
    if inside or max(abs(x - 0.5), abs(y - edge)) > 0.25 or rng.random() < 0.2:
        return wall.explore(rng)
    across = np.copysign(wall.MAX_STEP * rng.uniform(0.5, 1), 0.5 - x)
    action = [across, edge - y + rng.normal(0, 0.01)]
    return np.clip(action, -wall.MAX_STEP, wall.MAX_STEP).astype(np.float32)
