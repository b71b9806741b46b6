"""What a player holds: which keys there are, and what each adds to an action.

Controls are a dict that the page of play.py reads:

    rest      the action [A] when nothing is held
    keys      {name: [A]} what each key adds to it; the names are those of KeyboardEvent.code
              (ArrowLeft, KeyW, Space), and Mouse0 and Mouse2 for clicks
    captions  {name: word} for keys whose names do not say it; optional
    mouse     {'x': [first, bins], 'y': ...} how movement becomes one-hot numbers: from number
              `first` on, a 1 at the bin nearest to the pixels moved since the last frame; optional
    sliders   [lowest, highest], each [A], for a dataset that does not know its keys; optional
    names     [A] what the sliders' numbers mean, if that is known

A world names its keys in its class (envs.py). Other datasets name their controls in meta.json, into
which prepare.py writes those that are KNOWN.
"""
import numpy as np

import envs

ARROWS = (('ArrowLeft', 'ArrowRight'), ('ArrowUp', 'ArrowDown'))


def controls_of(meta, low, high):
    """Controls of the dataset with this meta.json, whose actions lie between low and high [A]."""
    world = envs.WORLDS.get(meta.get('what'))
    if world:
        return dict(rest=[0.0] * world.action_dim, keys=world.KEYS)
    if meta.get('controls'):
        return meta['controls']
    rest = np.clip(0, low, high)
    keys = {}
    for number, pair in enumerate(ARROWS[:len(rest)]):
        for key, limit in zip(pair, (low, high), strict=True):
            change = np.zeros_like(rest)
            change[number] = limit[number] - rest[number]
            keys[key] = change.tolist()
    return dict(rest=rest.tolist(), keys=keys, sliders=[low.tolist(), high.tolist()],
                names=meta.get('action_names'))


def csgo():
    """Counter-Strike's 51 numbers: 11 keys, 2 clicks, one-hot bins of mouse movement.

    Pearce & Zhu 2021 (arXiv 2104.04258). Crouching is Ctrl there and C here, since Ctrl and W
    together close a tab of the browser.
    """
    x_bins = [0, 2, 4, 10, 20, 30, 60, 100, 200, 300, 500, 1000]  # pixels
    y_bins = [0, 2, 4, 10, 20, 50, 100, 200]
    x_bins = [-pixels for pixels in x_bins[:0:-1]] + x_bins
    y_bins = [-pixels for pixels in y_bins[:0:-1]] + y_bins
    x_first = 13
    y_first = x_first + len(x_bins)
    num_actions = y_first + len(y_bins)

    def hot(*numbers):
        return [float(number in numbers) for number in range(num_actions)]

    still = x_first + x_bins.index(0), y_first + y_bins.index(0)
    names = ['KeyW', 'KeyA', 'KeyS', 'KeyD', 'Space', 'KeyC', 'ShiftLeft', 'Digit1', 'Digit2',
             'Digit3', 'KeyR', 'Mouse0', 'Mouse2']
    keys = {name: hot(number) for number, name in enumerate(names)}
    # to look around without a mouse, a bin that turns well
    for name, first, bins, pixels in (
            ('ArrowLeft', x_first, x_bins, -60), ('ArrowRight', x_first, x_bins, 60),
            ('ArrowUp', y_first, y_bins, -20), ('ArrowDown', y_first, y_bins, 20)):
        keys[name] = hot(first + bins.index(pixels))
        keys[name][first + bins.index(0)] = -1.0
    return dict(
        rest=hot(*still),
        keys=keys,
        captions={'KeyC': 'crouch', 'Space': 'jump', 'ShiftLeft': 'walk', 'KeyR': 'reload',
                  'Mouse0': 'fire', 'Mouse2': 'aim'},
        mouse={'x': [x_first, x_bins], 'y': [y_first, y_bins]})


KNOWN = {'csgo': csgo()}
