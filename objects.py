"""Where things are in a picture, found by their colours, and whether a dream has them there too.

A world (envs.py) lists the COLOURS that its pictures are mixed of, and among them the OBJECTS to
look for. Each pixel is taken apart into shares of those colours, so an edge blended into the
background counts with its share, and a place is known to a fraction of a pixel. An object is found
where there is about as much of its colour as it should have, and together.
"""
import numpy as np

FAINT = 0.25  # a share of a colour below this is noise, or the edge of something else
LEAST, MOST = 0.5, 1.75  # times its true area, for an object to be found: a trace is too little
WIDEST = 1.5  # times its true spread: a smudge is too wide


def shares(world, frames):
    """frames [...,3,H,W] in [0, 1] -> {name: [...,H,W]}, the share of each of the world's COLOURS.

    Shares of three or four colours add up to 1: with red, green and blue these are four equations,
    solved by least squares.
    """
    colours = np.array(list(world.COLOURS.values())).T / 255  # [3,colours]
    solve = np.linalg.pinv(np.vstack([colours, np.ones(colours.shape[1])]))  # [colours,4]
    mixed = np.einsum('kc,...chw->...khw', solve[:, :3], frames) + solve[:, 3:, None]
    mixed = mixed.clip(0, 1)
    return {name: mixed[..., k, :, :] for k, name in enumerate(world.COLOURS)}


def find(world, frames):
    """frames [...,3,H,W] in [0, 1] -> {object: (found [...], place [...,2], mask [...,H,W])}.

    Places are (x, y) in the world's units; without the object they mean nothing.
    """
    height, width = frames.shape[-2:]
    x = (np.arange(width) + 0.5) / width
    y = ((np.arange(height) + 0.5) / height)[:, None]
    edge = world.BORDER / world.SIDE
    inside = (abs(x - 0.5) < 0.5 - edge) & (abs(y - 0.5) < 0.5 - edge)
    seen = {}
    for name, share in shares(world, frames).items():
        if name not in world.OBJECTS:
            continue
        area, spread = world.OBJECTS[name]
        weight = np.where(inside & (share > FAINT), share, 0)
        total = weight.sum(axis=(-2, -1)).clip(1e-6)
        centre_x = (weight * x).sum(axis=(-2, -1)) / total
        centre_y = (weight * y).sum(axis=(-2, -1)) / total
        square = (x - centre_x[..., None, None]) ** 2 + (y - centre_y[..., None, None]) ** 2
        wide = np.sqrt((weight * square).sum(axis=(-2, -1)) / total)
        amount = total / (height * width) / area
        found = (amount > LEAST) & (amount < MOST) & (wide < WIDEST * spread)
        place = np.stack([centre_x, centre_y], axis=-1) * world.SIDE
        seen[name] = found, place, inside & (share > 0.5)
    return seen


def compare(world, dreamed, truth):
    """Clips [B,F,3,H,W] in [0, 1] -> {'agent.found': [B,F], ...} for each object and measure.

    Clip by clip, as the shares of many long ones would take gigabytes.
    """
    pairs = zip(dreamed, truth, strict=True)
    clips = [compare_clip(world, dream, original) for dream, original in pairs]
    return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}


def compare_clip(world, dreamed, truth):
    """Frames [F,3,H,W] in [0, 1] -> {'agent.found': [F], ...}.

    NaN where the detector does not see the object in the truth, and for the distance also where it
    does not in the dream.
    """
    result = {}
    theirs = find(world, truth)
    for name, (found, place, mask) in find(world, dreamed).items():
        there, true_place, true_mask = theirs[name]
        distance = np.linalg.norm(place - true_place, axis=-1)
        both = (mask & true_mask).sum(axis=(-2, -1))
        either = (mask | true_mask).sum(axis=(-2, -1))
        values = {
            'found': found,
            'distance': np.where(found, distance, np.nan),
            'near': found & (distance < world.NEAR),
            'iou': both / either.clip(1),
        }
        for measure, value in values.items():
            result[f'{name}.{measure}'] = np.where(there, value, np.nan)
    return result


def summarise(scores):
    """compare's scores of all clips -> {object: numbers}, over all frames and for each of them.

    found and near are shares of the frames; distance is [median, 90th percentile] of those found;
    iou is the median.
    """
    result = {}
    for name, values in scores.items():  # [clips,F]
        thing, measure = name.rsplit('.', 1)
        numbers = result.setdefault(thing, {'per_frame': {}})
        numbers[measure] = statistic(measure, values)
        numbers['per_frame'][measure] = [statistic(measure, frame) for frame in values.T]
    return result


def statistic(measure, values):
    values = values[~np.isnan(values)]
    if len(values) == 0:  # None, as JSON has no NaN
        return [None, None] if measure == 'distance' else None
    if measure == 'distance':
        return np.percentile(values, (50, 90)).tolist()
    return float(np.median(values) if measure == 'iou' else values.mean())


def columns(world):
    return ['found, %', f'distance of {world.SIDE:g}, median', '90th percentile',
            f'within {world.NEAR:g}, %', 'IoU, median']


def cells(numbers):
    """One object's row of a table, of summarise's numbers; what nobody knows is empty."""
    values = [numbers['found'], *numbers['distance'], numbers['near'], numbers['iou']]
    percent = (True, False, False, True, False)
    text = []
    for value, is_share in zip(values, percent, strict=True):
        if value is None:
            text.append('')
        else:
            text.append(f'{100 * value:.1f}' if is_share else f'{value:.3g}')
    return text
