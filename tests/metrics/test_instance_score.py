"""Scores from the windows of an instance against the whole stitched prediction."""

import doctest
import sys
from dataclasses import replace
from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faithfulness import IMAGE, LESION, PREDICTOR, REFERENCE, SHAPE, score, smooth

from xaiseg import InputError, Instance, SaliencyMap, StitchedPredictor, device_mesh
from xaiseg.metrics.instance_score import box_around, generator, in_volume, instance_scores

IMAGES = [IMAGE, REFERENCE, IMAGE + 1, IMAGE * 0, REFERENCE * 2]


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 7])
def test_scores_are_those_of_the_whole_prediction(chunk):
    expected = [score(PREDICTOR, image) for image in IMAGES]
    # float32 logits of order 1
    np.testing.assert_allclose(instance_scores(PREDICTOR, iter(IMAGES), LESION, chunk=chunk), expected, atol=1e-6)


def test_volumes_smaller_than_the_window_and_in_one_piece():
    lesion = Instance(2, np.array([[2, 2, 0], [5, 2, 1]], np.int32))
    small = [image[:, :3, :2] for image in IMAGES]
    expected = [score(PREDICTOR, image, lesion) for image in small]
    np.testing.assert_allclose(instance_scores(PREDICTOR, small, lesion, chunk=3), expected, atol=1e-6)
    whole = StitchedPredictor(smooth, None, stride=(4, 4, 4))
    expected = [score(whole, image) for image in IMAGES]
    np.testing.assert_allclose(instance_scores(whole, IMAGES, LESION, chunk=2), expected, atol=1e-6)


def test_devices_change_nothing():
    two = replace(PREDICTOR, mesh=device_mesh(samples=1, rows=2))
    one = instance_scores(PREDICTOR, IMAGES, LESION, chunk=2)
    np.testing.assert_array_equal(instance_scores(two, IMAGES, LESION, chunk=2), one)


def test_one_trace_for_all_lesions_and_images():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return smooth(x)

    predictor = StitchedPredictor(counted, (4, 4, 4))
    instance_scores(predictor, IMAGES, LESION, chunk=3)
    assert traces == [(3, 4, 4, 4, 2)]
    instance_scores(predictor, IMAGES[:2], Instance(5, np.array([[0, 1, 2]], np.int32)), chunk=3)
    assert len(traces) == 1


def test_images_are_drawn_as_needed_and_none_gives_none():
    assert instance_scores(PREDICTOR, [], LESION).shape == (0,)
    drawn = []

    def images():
        for number, image in enumerate(repeat(IMAGE, 4)):
            drawn.append(number)
            yield image
            assert len(drawn) - number == 1

    assert len(instance_scores(PREDICTOR, images(), LESION, chunk=2)) == 4


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        instance_scores(PREDICTOR, IMAGES, LESION, chunk=0)
    with pytest.raises(ValueError, match="instance 3 has no voxels"):
        instance_scores(PREDICTOR, IMAGES, Instance(3, np.zeros((0, 3), np.int32)))
    with pytest.raises(ValueError, match="must lie in the volume"):
        instance_scores(PREDICTOR, IMAGES, Instance(3, np.array([[9, 0, 0]], np.int32)))
    with pytest.raises(ValueError, match="target_class is 4"):
        instance_scores(replace(PREDICTOR, target_class=4), IMAGES, LESION)


def test_a_map_in_its_volume():
    values = np.arange(8.0).reshape(2, 2, 2, 1) + 1
    volume = in_volume(SaliencyMap(values, (1, 2, 3)), (*SHAPE, 2))
    np.testing.assert_array_equal(volume[1:3, 2:4, 3:5], np.repeat(values, 2, -1))
    assert volume.sum() == 2 * values.sum()
    with pytest.raises(InputError, match="3 channels and the image 2"):
        in_volume(SaliencyMap(np.zeros((1, 1, 1, 3)), (0, 0, 0)), (*SHAPE, 2))
    with pytest.raises(ValueError, match="does not lie in the volume"):
        in_volume(SaliencyMap(values, (5, 0, 0)), (*SHAPE, 2))


def test_a_box_around_a_lesion_ends_with_the_volume():
    lesion = Instance(1, np.array([[1, 2, 2], [1, 2, 4]], np.int32))
    place = np.argwhere(box_around(lesion, SHAPE, 2))
    assert place.min(0).tolist() == [0, 0, 0]
    assert place.max(0).tolist() == [3, 4, 6]
    assert len(place) == 4 * 5 * 7


def test_draws_differ_and_come_back():
    key = jax.random.key(7)
    first = generator(key, 0).random(4)
    np.testing.assert_array_equal(generator(key, 0).random(4), first)
    assert not np.isclose(generator(key, 1).random(4), first).any()
    assert jnp.asarray(first).dtype == jnp.float32


def test_the_example_runs():
    result = doctest.testmod(sys.modules["xaiseg.metrics.instance_score"])
    assert result.attempted > 0
    assert result.failed == 0
