"""Jacobian rows against brute force through MONAI (stored) and against finite differences in float64."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Aggregator, Instance
from xaiseg.checkpoints import convert
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor, device_mesh
from xaiseg.saliency import AGGREGATORS, jacobian_rows, mean, signed_max

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def predictor():
    """With tiles of 4 voxels, whose field of 19 is wider than the window: no saving, but all that tiles are."""
    model = convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16))
    return replace(StitchedPredictor.of(model), local_fn=model.local_logits(4))


def whole(saliency, shape):
    """The map over the volume: zero beyond its crop."""
    volume = np.zeros((*shape, saliency.values.shape[-1]), np.asarray(saliency.values).dtype)
    volume[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = (
        saliency.values
    )
    return volume


def smooth(x):
    """A network that is smooth everywhere and couples neighbours, (N, *window, 2) -> (N, *window, 2)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1) + jnp.roll(x[..., 1], -1, 3)
    return jnp.stack([x[..., 0], jnp.tanh(mixed) + jnp.sin(jnp.roll(mixed, 1, 2)) * x[..., 1]], -1)


LESION = np.array([[1, 2, 1], [2, 2, 1], [2, 2, 2], [5, 0, 3]], np.int32)


@pytest.mark.parametrize(("chunk", "tiles"), [(1, True), (4, True), (50, True), (4, False)])
@pytest.mark.parametrize("lesion", ["one", "eight"])
def test_signed_max_is_brute_force_through_monai(predictor, lesion, chunk, tiles):
    stored = np.load(FIXTURES / "rows_signed_max.npz")
    image, voxels = jnp.asarray(stored["x"], jnp.float32), stored[f"{lesion}_voxels"]
    if not tiles:
        predictor = replace(predictor, local_fn=None)
    (found,), (info,) = jacobian_rows(signed_max(), chunk=chunk)(KEY, predictor, image, [Instance(1, voxels)])
    expected = stored[f"{lesion}_signed_max"]
    # the project's bound is 1e-4 of the largest value; float32 against float64 stays far below
    np.testing.assert_allclose(whole(found, image.shape[:3]), expected, atol=1e-5 * np.abs(expected).max())
    windows = {"one": 1, "eight": 8}[lesion]
    assert (info.rows, info.windows) == (6 * windows, windows)


@pytest.mark.parametrize("lesion", ["one", "eight"])
def test_mean_is_brute_force_through_monai(predictor, lesion):
    stored = np.load(FIXTURES / "rows_mean.npz")
    image, voxels = jnp.asarray(stored["x"], jnp.float32), stored[f"{lesion}_voxels"]
    predictor = replace(predictor, local_fn=None)
    (found,), (info,) = jacobian_rows(mean())(KEY, predictor, image, [Instance(1, voxels)])
    expected = stored[f"{lesion}_mean"]
    np.testing.assert_allclose(whole(found, image.shape[:3]), expected, atol=1e-5 * np.abs(expected).max())
    # one pull-back through each window, whatever the lesion's size
    assert info.rows == info.windows == {"one": 1, "eight": 8}[lesion]


def finite_difference_rows(predictor, image, voxels):
    """∂y[v]/∂x for each voxel `v` by central differences in float64, `(n, X, Y, Z, C)`."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(image, np.float64))
        step = 1e-5

        @jax.jit
        @jax.vmap
        def difference(position):
            bump = jnp.zeros(x.size).at[position].set(step).reshape(x.shape)
            places = tuple(voxels.T)
            return (predictor(x + bump)[..., 1][places] - predictor(x - bump)[..., 1][places]) / (2 * step)

        return np.asarray(difference(jnp.arange(x.size))).T.reshape(len(voxels), *image.shape)


@pytest.mark.parametrize("aggregate", ["signed_max", "mean"])
@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 3, 4)])
def test_rows_are_finite_differences_of_the_stitched_logits(shape, aggregate):
    predictor = StitchedPredictor(smooth, (4, 4, 4))
    image = jax.random.normal(jax.random.key(1), (*shape, 2))
    rows = finite_difference_rows(predictor, image, LESION)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    expected = {"signed_max": largest, "mean": rows.mean(0)}[aggregate]
    (found,), (info,) = jacobian_rows(AGGREGATORS[aggregate](), chunk=3)(KEY, predictor, image, [Instance(1, LESION)])
    # float32 against central differences, whose own error is of order step² = 1e-10; the largest entry is about 2
    np.testing.assert_allclose(whole(found, shape), expected, atol=1e-5)
    assert info.windows > 1


def test_a_map_is_cropped_to_the_windows_of_its_instance():
    image = jnp.ones((4, 7, 10, 2))  # starts {0}, {0, 3}, {0, 3, 6}
    lesion = Instance(4, np.array([[3, 2, 3], [3, 2, 4]], np.int32))
    (found,), (info,) = jacobian_rows(mean())(KEY, StitchedPredictor(smooth, (4, 4, 4)), image, [lesion])
    assert (found.start, found.values.shape) == ((0, 0, 0), (4, 4, 7, 2))
    assert info.windows == 2


def test_padding_is_not_part_of_a_map():
    image, lesion = jnp.ones((3, 6, 4, 2)), Instance(1, np.array([[2, 5, 3]], np.int32))
    (found,), _ = jacobian_rows(signed_max())(KEY, StitchedPredictor(smooth, (4, 4, 4)), image, [lesion])
    assert (found.start, found.values.shape) == ((0, 2, 0), (3, 4, 4, 2))


def test_tiles_give_the_rows_of_whole_windows(predictor):
    """A lesion across the tiles of one window, others at its corners, where tiles are clamped."""
    image = jax.random.normal(KEY, (16, 16, 16, 2))
    scattered = np.array([[0, 0, 0], [1, 8, 15], [7, 3, 3], [7, 4, 4], [8, 9, 15], [15, 15, 15]], np.int32)
    instances = [Instance(1, scattered), *(Instance(2 + i, v[None]) for i, v in enumerate(scattered))]
    explain = jacobian_rows(signed_max(), chunk=2)
    assert predictor.local_fn is not None
    tiled, tiled_infos = explain(KEY, predictor, image, instances)
    full, full_infos = explain(KEY, replace(predictor, local_fn=None), image, instances)
    for a, b in zip(tiled, full, strict=True):
        # the same products, added up in another order
        shape = image.shape[:3]
        np.testing.assert_allclose(whole(a, shape), whole(b, shape), atol=1e-6 * np.abs(b.values).max())
    # one voxel lies in one tile; the first lesion has voxels in several of one window
    assert tiled_infos == full_infos


@pytest.mark.parametrize("chunk", [None, 2])
def test_memory_that_holds_no_chunk_is_refused(predictor, chunk):
    image = jnp.ones((16, 16, 16, 2))
    lesion = Instance(1, np.array([[3, 3, 3], [3, 3, 4]], np.int32))
    explain = jacobian_rows(signed_max(), chunk=chunk, memory=1000)
    with pytest.raises(InputError, match=r"--memory 0\.000954 MiB is too little") as caught:
        explain(KEY, predictor, image, [lesion])
    assert ("smaller --chunk" in str(caught.value)) == (chunk is not None)
    assert "\n" not in str(caught.value)


def test_less_memory_changes_nothing(predictor):
    image = jax.random.normal(KEY, (16, 16, 16, 2))
    lesion = Instance(1, np.argwhere(np.ones((2, 3, 3))).astype(np.int32) + 4)
    free, tight = (
        jacobian_rows(signed_max(), memory=memory)(KEY, predictor, image, [lesion])[0][0] for memory in (None, 2**21)
    )
    np.testing.assert_allclose(tight.values, free.values, atol=1e-6 * np.abs(free.values).max())


def test_one_trace_for_all_lesions_and_images():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return smooth(x)

    predictor = StitchedPredictor(counted, (4, 4, 4))
    explain = jacobian_rows(signed_max(), chunk=2)
    lesions = [Instance(1, LESION[:1]), Instance(2, LESION[1:]), Instance(3, LESION)]
    for seed in range(3):
        explain(KEY, predictor, jax.random.normal(jax.random.key(seed), (6, 5, 7, 2)), lesions)
    # one to learn the shapes, one for the compiled program
    assert len(traces) <= 2


def test_progress_adds_up_to_the_rows_of_the_infos():
    predictor = StitchedPredictor(smooth, (4, 4, 4))
    image, lesion = jnp.ones((6, 5, 7, 2)), Instance(1, LESION)
    for aggregator in (signed_max(), mean()):
        seen: list[int] = []
        _, infos = jacobian_rows(aggregator, chunk=2)(KEY, predictor, image, [lesion], progress=seen.append)
        assert sum(seen) == infos[0].rows


def test_every_row_reaches_the_aggregator_once_under_its_own_number():
    """An aggregator that only counts: each row number weighs one, and padding nothing."""

    def update(state, rows, index, weight):
        return state.at[(index, *(jnp.zeros_like(index),) * 3)].add(weight)

    predictor = StitchedPredictor(smooth, (4, 4, 4))
    count = Aggregator(jnp.zeros, update, jnp.add, lambda state: state)
    image = jnp.ones((4, 4, 4, 2))
    lesion = Instance(1, np.array([[0, 0, 1], [0, 0, 2], [1, 2, 0]], np.int32))
    (found,), _ = jacobian_rows(count, chunk=2)(KEY, predictor, image, [lesion])
    assert found.values[:, 0, 0, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_rows_is_refused(chunk):
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        jacobian_rows(signed_max(), chunk=chunk)


@pytest.mark.parametrize("voxels", [[[0, 0, 4]], [[-1, 0, 0]]])
def test_voxels_outside_of_the_volume_are_refused(voxels):
    lesion = Instance(1, np.array(voxels, np.int32).reshape(-1, 3))
    with pytest.raises(ValueError, match=r"must lie in the volume \(4, 4, 4\); found"):
        jacobian_rows(mean())(KEY, StitchedPredictor(smooth, (4, 4, 4)), jnp.ones((4, 4, 4, 2)), [lesion])


def test_an_instance_without_voxels_is_refused():
    with pytest.raises(ValueError, match="instance 7 has no voxels"):
        jacobian_rows(mean())(
            KEY, StitchedPredictor(smooth, (4, 4, 4)), jnp.ones((4, 4, 4, 2)), [Instance(7, np.zeros((0, 3), np.int32))]
        )


def test_a_sum_takes_one_pass_however_many_devices():
    predictor = StitchedPredictor(smooth, (4, 4, 4), mesh=device_mesh(1, rows=2))
    lesion, seen = Instance(1, np.argwhere(np.ones((4, 4, 4))).astype(np.int32)), []
    _, (info,) = jacobian_rows(mean())(KEY, predictor, jnp.ones((4, 4, 4, 2)), [lesion], progress=seen.append)
    assert sum(seen) == info.rows == 1
