"""Prediction of a whole volume in one piece, and rows there: on the field around the instance, where the network is local."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model, ModelSpec, build_network
from xaiseg.saliency import gradcam, jacobian_rows, mean, signed_max

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)
SHAPE = (22, 13, 30)  # multiples of 4 are (24, 16, 32): one voxel before and after, one and two, one and one
IMAGE = jax.random.normal(jax.random.key(1), (*SHAPE, 2))
LESION = Instance(1, np.array([[0, 0, 0], [10, 5, 14], [10, 6, 15], [11, 7, 16], [21, 12, 29]], np.int32))


@pytest.fixture(scope="module")
def model():
    return convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16))


@pytest.fixture(scope="module")
def rows(model):
    """All rows through the network on the padded volume, by reverse mode."""

    @jax.jit
    def logits(x):
        padded = jnp.pad(x, ((1, 1), (1, 2), (1, 1), (0, 0)))
        return model.logits_fn(padded[None])[0, 1:-1, 1:-2, 1:-1]

    places = tuple(LESION.voxels.T)
    jacobian = jax.jacrev(lambda x: logits(x)[places][:, 1])(IMAGE)
    return np.asarray(logits(IMAGE)), np.asarray(jacobian)


def whole(saliency):
    volume = np.zeros((*SHAPE, saliency.values.shape[-1]), np.float32)
    volume[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape[:3], strict=True))] = (
        saliency.values
    )
    return volume


def test_the_prediction_is_the_network_on_the_padded_volume(model, rows):
    predictor = StitchedPredictor.of(model, whole_volume=True)
    assert predictor.plan(SHAPE).padding == ((1, 1), (1, 2), (1, 1))
    np.testing.assert_allclose(predictor(IMAGE), rows[0], atol=1e-5)


@pytest.mark.parametrize("tile", [4, 8, None])
def test_rows_are_those_of_the_whole_volume(model, rows, tile):
    """At the volume's corners and in its middle. Tiles: the same products in another order."""
    predictor = StitchedPredictor.of(model, whole_volume=True)
    assert predictor.local_fn is not None
    predictor = replace(predictor, local_fn=None if tile is None else model.local_logits(tile))
    (found,), (info,) = jacobian_rows(signed_max(), chunk=2)(KEY, predictor, IMAGE, [LESION])
    expected = np.take_along_axis(rows[1], np.abs(rows[1]).argmax(0)[None], 0)[0]
    np.testing.assert_allclose(whole(found), expected, atol=1e-5 * np.abs(expected).max())
    assert (info.rows, info.windows) == (5, 1)


def test_a_row_is_computed_on_the_field_of_its_tile_alone(model):
    predictor = replace(StitchedPredictor.of(model, whole_volume=True), local_fn=model.local_logits(4))
    inner = Instance(1, LESION.voxels[1:2])
    (found,), _ = jacobian_rows(mean())(KEY, predictor, IMAGE, [inner])
    assert predictor.local_fn is not None
    assert found.values.shape[2] == predictor.local_fn.field[2] == 19


@pytest.mark.slow
def test_a_network_with_statistics_of_the_whole_volume(rows):
    spec = ModelSpec("unet", {"channels": [3, 4], "strides": [2], "norm": "instance"}, ("FLAIR", "T1w"), (8, 8, 8))
    variables = build_network(spec).init(jax.random.key(3), jnp.zeros((1, 8, 8, 8, 2)))
    model = Model(spec, variables)
    predictor = StitchedPredictor.of(model, whole_volume=True)
    assert predictor.local_fn is None
    (found,), _ = jacobian_rows(signed_max(), chunk=2)(KEY, predictor, IMAGE, [LESION])
    jacobian = np.asarray(jax.jacrev(lambda x: predictor(x)[tuple(LESION.voxels.T)][:, 1])(IMAGE))
    expected = np.take_along_axis(jacobian, np.abs(jacobian).argmax(0)[None], 0)[0]
    np.testing.assert_allclose(whole(found), expected, atol=1e-5 * np.abs(expected).max())


def test_activation_maps_cover_the_whole_volume(model):
    (found,), (info,) = gradcam(layer="decoder1.conv")(
        KEY, StitchedPredictor.of(model, whole_volume=True), IMAGE, [LESION]
    )
    assert found.values.shape == (*SHAPE, 1)
    assert info.rows == 1


def test_a_network_of_slices_takes_no_whole_volume():
    flat = convert(FIXTURES / "unet_2d.pth", window=(16, 16, 1), target_class=1)
    with pytest.raises(ValueError, match="slice by slice, not whole"):
        StitchedPredictor.of(flat, whole_volume=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(22, 13, 6), (5, 13, 30)])
def test_a_volume_thinner_than_a_tile(model, shape):
    predictor = StitchedPredictor.of(model, whole_volume=True)
    lesion = Instance(1, np.array([[2, 3, 4], [3, 3, 5]], np.int32))
    (found,), _ = jacobian_rows(signed_max(), chunk=2)(KEY, predictor, IMAGE[: shape[0], :, : shape[2]], [lesion])
    jacobian = np.asarray(
        jax.jacrev(lambda x: predictor(x)[tuple(lesion.voxels.T)][:, 1])(IMAGE[: shape[0], :, : shape[2]])
    )
    expected = np.take_along_axis(jacobian, np.abs(jacobian).argmax(0)[None], 0)[0]
    box = tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))
    np.testing.assert_allclose(found.values, expected[box], atol=1e-5 * np.abs(expected).max())
