"""Policies for data.py gym, where acting at random goes nowhere: (observation, rng) -> action.

    python data.py gym --env=CarRacing-v3 --name=carracing --repeat=2 --policy=policies.py:drive
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
