"""Truths about finding objects in pictures."""
import numpy as np
import pytest

import envs
import objects


def pictures(world, size, count=40):
    """(frames [count,3,size,size] in [0, 1], [{name: true place}]) of an explorer's episode."""
    world.reset(1)
    rng = np.random.default_rng(1)
    frames, places = [], []
    for _ in range(count):
        world.step(world.explore(rng))
        frames.append(world.render(size) / 255)
        places.append(world.places())
    return np.stack(frames), places


@pytest.fixture(scope='module', params=['wall', 'pusht'])
def seen(request):
    if request.param == 'pusht':
        pytest.importorskip('gym_pusht')
    world = envs.make_world(request.param)
    return world, *pictures(world, world.image_size)


def test_objects_are_found_where_the_simulator_has_them(seen):
    world, frames, places = seen
    for name, (found, place, _) in objects.find(world, frames).items():
        truth = np.stack([where[name] for where in places])
        assert found.all()
        error = np.linalg.norm(place - truth, axis=-1) / world.SIDE
        assert np.median(error) < 0.003 and error.max() < 0.015  # 0.015 is a pixel of 64


def test_a_picture_compared_with_itself_is_right(seen):
    world, frames, _ = seen
    scores = objects.summarise(objects.compare(world, frames[None], frames[None]))
    assert scores.keys() == world.OBJECTS.keys()
    for numbers in scores.values():
        assert numbers['found'] == numbers['near'] == numbers['iou'] == 1
        assert numbers['distance'] == [0, 0]
        assert len(numbers['per_frame']['found']) == len(frames)


def test_a_thing_that_is_gone_is_not_found(seen):
    world, frames, _ = seen
    background = np.array(list(world.COLOURS.values())[-1]) / 255
    empty = np.zeros_like(frames) + background[:, None, None]
    for found, _, mask in objects.find(world, empty).values():
        assert not found.any() and not mask.any()


def test_a_thing_in_two_places_is_not_found():
    world = envs.make_world('wall')
    world.set_state([0.2, 0.3, 0.5])
    left = world.render(32) / 255
    world.set_state([0.8, 0.7, 0.5])
    right = world.render(32) / 255
    for frame in (np.minimum(left, right), (left + right) / 2):  # both of them, and half of each
        assert not objects.find(world, frame)['agent'][0]


def test_a_moved_thing_is_as_far_off_as_it_was_moved():
    world = envs.make_world('wall')
    world.set_state([0.3, 0.5, 0.5])
    here = world.render(32)[None, None] / 255
    world.set_state([0.4, 0.5, 0.5])
    there = world.render(32)[None, None] / 255
    agent = objects.summarise(objects.compare(world, there, here))['agent']
    assert np.allclose(agent['distance'], 0.1, atol=0.002)
    assert agent['found'] == 1 and agent['near'] == 0 and 0.2 < agent['iou'] < 0.5


def test_a_frame_whose_truth_hides_the_thing_does_not_count():
    world = envs.make_world('wall')
    world.set_state([0.3, 0.5, 0.5])
    frame = world.render(32)[None, None] / 255
    agent = objects.summarise(objects.compare(world, frame, np.full_like(frame, 235 / 255)))['agent']
    assert agent['found'] is None and agent['distance'] == [None, None]
    assert objects.cells(agent) == [''] * 5
