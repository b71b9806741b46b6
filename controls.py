"""What the numbers of an action mean: how far they go in the data, and what each key adds to them.

What is known of them is a dict: data.Clips.action_meta, or what a checkpoint keeps of it. Controls
are another one, which the page of play.py reads:

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
from configurator import UserError
from recordings import ordinary

ARROWS = (('ArrowLeft', 'ArrowRight'), ('ArrowUp', 'ArrowDown'))


def checked(about, size, source):
    """What is known of actions of so many numbers, made sure to have the shapes of the lists above.

    Raises UserError.
    """
    try:
        names, controls, held = about.get('action_names'), about.get('controls'), []
        if controls:
            held = [controls['rest'], *controls['keys'].values()]
            controls.get('captions', {}).keys()
        fits = np.float32(about['action_range']).shape == (size, 4) or not size
        fits = fits and all(np.float32(action).shape == (size,) for action in held)
        fits = fits and (not names or len(names) == size) and type(about.get('what', '')) is str
    except (AttributeError, LookupError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f'{source}: expected action_range of {size} rows of 4 numbers, and '
                        'action_names and controls, if any, as controls.py has them')
    return about


def limits(about):
    """float32 [4,A]: the least, 1st percentile, 99th and greatest of each number in the data."""
    return np.float32(about['action_range']).reshape(-1, 4).T


def controls_of(about):
    """Controls of the actions of which this is known; sliders go over what is usual in the data."""
    world = envs.WORLDS.get(about.get('what'))
    if world:
        return dict(rest=[0.0] * world.action_dim, keys=world.KEYS)
    if about.get('controls'):
        return about['controls']
    _, low, high, _ = limits(about)
    rest = np.clip(0, low, high)
    keys = {}
    for number, pair in enumerate(ARROWS[:len(rest)]):
        for key, limit in zip(pair, (low, high), strict=True):
            change = np.zeros_like(rest)
            change[number] = limit[number] - rest[number]
            keys[key] = change.tolist()
    return dict(rest=rest.tolist(), keys=keys, sliders=[low.tolist(), high.tolist()],
                names=about.get('action_names'))


def legend(about):
    """Lines to print: of each number how far it goes, its name and its keys, if they are known."""
    controls, names = controls_of(about), about.get('action_names')
    captions = controls.get('captions', {})
    lines = []
    for i, (least, low, high, greatest) in enumerate(limits(about).T):
        line = f'actions[:, {i}]: {least:.3g} to {greatest:.3g}, 98 % of them {low:.3g} to {high:.3g}'
        if names:
            line += f'; {names[i]}'
        if not controls.get('sliders'):
            for key, change in controls['keys'].items():
                if change[i]:
                    line += f'; {captions.get(key, key)} {change[i]:+.3g}'
        lines.append(line)
    return lines


def beyond(about, actions):
    """Which numbers of raw actions [N,A] leave the range of the data, in words; '' if none do."""
    found = []
    least, _, _, greatest = limits(about)
    lowest, highest = actions.min(axis=0), actions.max(axis=0)
    for i in np.flatnonzero((lowest < least) | (highest > greatest)):
        found.append(f'actions[:, {i}] goes from {lowest[i]:.3g} to {highest[i]:.3g}, '
                     f'the data from {least[i]:.3g} to {greatest[i]:.3g}')
    if len(found) > 3:
        found[2:] = [f'and {len(found) - 2} more numbers of it']
    return '; '.join(found)


def read_own_actions(path, action_dim, frame_interval):
    """Raw actions float32 [steps,frame_interval,A] of an .npy: a row for each recorded frame, or one
    for each frame of the model. Raises UserError.
    """
    if not action_dim:
        raise UserError(f'--actions={path}: the model was trained without actions')
    try:
        actions = np.lib.format.open_memmap(ordinary(path), mode='r')
        if actions.dtype.kind not in 'fiub':
            raise ValueError(f'it holds {actions.dtype}')
    except (OSError, ValueError, OverflowError) as e:
        raise UserError(f'--actions={path} is not a readable .npy file of numbers: {e}') from e
    actions = np.asarray(actions, np.float32)
    if not np.isfinite(actions).all():
        raise UserError(f'--actions={path}: some numbers are not finite')
    numbers = action_dim // frame_interval  # of a recorded action
    fits = actions.ndim == 2 and actions.shape[1] in (numbers, action_dim) and actions.size
    if not fits or actions.size % action_dim:
        raise UserError(f'--actions={path} has shape {list(actions.shape)}: '
                        f'expected [{frame_interval} * steps, {numbers}]')
    return actions.reshape(-1, frame_interval, numbers)


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
