"""Occlusion against brute force: the whole stitched prediction of each occluded image."""

import doctest
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh
from xaiseg.saliency import Target
from xaiseg.saliency.baselines import blur, given
from xaiseg.saliency.occlusion import occlusion

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)
SHAPE = (6, 5, 7)
IMAGE = jax.random.normal(jax.random.key(1), (*SHAPE, 2))
REFERENCE = jax.random.normal(jax.random.key(2), (*SHAPE, 2))
# starts of windows are {0, 2}, {0, 1}, {0, 3}: its voxels are in 1, 2 or 4 windows, 6 in all, which cover the volume
LESION = Instance(1, np.array([[1, 2, 1], [2, 2, 1], [2, 2, 2], [5, 0, 3], [5, 4, 6]], np.int32))
SMALL = Instance(2, np.array([[1, 1, 1], [1, 2, 1]], np.int32))


def smooth(x):
    """A network that is smooth everywhere and couples neighbours, (N, *window, 2) -> (N, *window, 2)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1) + jnp.roll(x[..., 1], -1, 3)
    return jnp.stack([x[..., 0], jnp.tanh(mixed) + jnp.sin(jnp.roll(mixed, 1, 2)) * x[..., 1]], -1)


PREDICTOR = StitchedPredictor(smooth, (4, 4, 4))


def whole(found, shape):
    volume = np.full((*shape, found.values.shape[-1]), np.nan, np.float32)
    volume[tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape, strict=False))] = found.values
    return volume


def brute_force(predictor, image, instance, reference, patch, stride, channels="each", of=lambda y: y[..., 1]):
    """The map over the whole volume, every patch of it tried, `(X, Y, Z, c)`."""
    predictor = replace(predictor, scan=True)
    c = image.shape[-1]
    switched = np.eye(c, dtype=bool) if channels == "each" else np.ones((1, c), bool)
    axes = []
    for n, p, s in zip(image.shape, patch, stride, strict=False):
        starts = [0]
        while starts[-1] + p < n:
            starts.append(starts[-1] + s)
        axes.append(starts)
    masks = []
    for corner in itertools.product(*axes):
        mask = np.zeros(image.shape[:3], bool)
        mask[tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True))] = True
        masks.append(mask)

    @jax.jit
    def score(image):
        return of(predictor(image)[tuple(instance.voxels.T)]).mean()

    @jax.jit
    def without(masks, on):
        return jax.lax.map(lambda mask: score(jnp.where(mask[..., None] & on, reference, image)), masks)

    on = [jnp.asarray(row)[None, None, None] for row in switched]
    effect = np.stack([np.asarray(score(image) - without(jnp.asarray(np.stack(masks)), row)) for row in on], -1)
    total = np.zeros((*image.shape[:3], len(switched)))
    for mask, values in zip(masks, effect, strict=True):
        total[mask] += values
    return total / np.sum(masks, axis=0)[..., None]


def explained(explain, predictor=PREDICTOR, image=IMAGE, instance=LESION):
    (found,), (info,) = explain(KEY, predictor, image, [instance])
    return found, info


def probability(y):
    return jax.nn.softmax(y, -1)[..., 1]


def product(y):
    return y[..., 0] * jnp.sin(y[..., 1])


SETTINGS = {
    "patches side by side": {"patch": 3},
    "overlapping": {"patch": 3, "stride": 2},
    "one voxel apart": {"patch": (2, 4, 3), "stride": 1},
    "single voxels": {"patch": 1},
    "larger than the volume": {"patch": (20, 2, 20)},
    "all channels": {"patch": 3, "stride": (1, 2, 3), "channels": "together"},
    "in batches": {"patch": 2, "chunk": 5},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_occlusion_is_brute_force_through_all_windows(options):
    patch = np.broadcast_to(options["patch"], 3).tolist()
    stride = np.broadcast_to(options.get("stride", patch), 3).tolist()
    expected = brute_force(PREDICTOR, IMAGE, LESION, REFERENCE, patch, stride, options.get("channels", "each"))
    found, info = explained(occlusion(baseline=given(REFERENCE), margin=None, **options))
    assert np.abs(expected).max() > 0.1
    # differences of float32 numbers of order 1
    np.testing.assert_allclose(whole(found, SHAPE), expected, atol=1e-6)
    assert info.windows == 6
    assert info.extra["patches"] == np.prod(
        [len(range(0, max(n - p, 0) + s, s)) for n, p, s in zip(SHAPE, patch, stride, strict=True)]
    )


@pytest.mark.parametrize("target", ["probability", "log_odds", Target(function=product), Target("margin", against=0)])
def test_a_target_is_that_of_the_blended_logits(target):
    of = {
        "probability": probability,
        "log_odds": lambda y: y[..., 1] - y[..., 0],
        Target("margin", against=0): lambda y: y[..., 1] - y[..., 0],
    }.get(target, product)
    expected = brute_force(PREDICTOR, IMAGE, LESION, REFERENCE, (3, 3, 3), (2, 2, 2), of=of)
    found, _ = explained(occlusion(patch=3, stride=2, baseline=given(REFERENCE), margin=None, target=target, chunk=2))
    np.testing.assert_allclose(whole(found, SHAPE), expected, atol=1e-6)


def test_a_volume_smaller_than_the_window_is_occluded_without_its_padding():
    image, reference = IMAGE[:, :3, :2], REFERENCE[:, :3, :2]
    lesion = Instance(1, np.array([[2, 2, 0], [5, 2, 1]], np.int32))
    expected = brute_force(PREDICTOR, image, lesion, reference, (3, 2, 2), (2, 1, 2))
    found, _ = explained(
        occlusion(patch=(3, 2, 2), stride=(2, 1, 2), baseline=given(reference)), image=image, instance=lesion
    )
    assert found.values.shape == image.shape
    np.testing.assert_allclose(found.values, expected, atol=1e-6)


def test_the_whole_volume_in_one_window():
    predictor = StitchedPredictor(smooth, None, stride=(4, 4, 4))
    expected = brute_force(predictor, IMAGE, LESION, jnp.zeros_like(IMAGE), (3, 3, 3), (3, 3, 3))
    found, info = explained(occlusion(patch=3), predictor)
    np.testing.assert_allclose(whole(found, SHAPE), expected, atol=1e-6)
    assert (info.rows, info.windows, info.extra["patches"]) == (1 + 2 * 12, 1, 12)


def test_slices_of_a_2d_network():
    predictor = StitchedPredictor(lambda x: jnp.stack([x[..., 0], jnp.tanh(x[..., 0] * x[..., 1])], -1), (4, 4, 1))
    expected = brute_force(predictor, IMAGE, LESION, REFERENCE, (3, 3, 1), (2, 2, 1))
    found, _ = explained(occlusion(patch=(3, 3, 1), stride=(2, 2, 1), baseline=given(REFERENCE)), predictor)
    np.testing.assert_allclose(whole(found, SHAPE), expected, atol=1e-6)


@pytest.mark.parametrize(("margin", "near"), [(0, 2 * 1 * 2), (1, 2 * 2 * 2), (2, 2 * 2 * 2), (20, 2 * 2 * 2)])
def test_a_margin_extends_the_map_and_changes_nothing_in_it(margin, near):
    image = jax.random.normal(KEY, (10, 10, 10, 2))
    lesion = Instance(2, np.array([[1, 1, 1], [2, 1, 2]], np.int32))
    wide, _ = explained(occlusion(patch=3, stride=2, margin=None), image=image, instance=lesion)
    # the lesion lies in the first window alone, voxels 0 to 3, which the patches from 0 and from 2 reach
    assert wide.values.shape == (4, 4, 4, 2)
    found, info = explained(occlusion(patch=3, stride=2, margin=margin), image=image, instance=lesion)
    low, high = np.maximum([1 - margin] * 3, 0), np.minimum(np.array([3, 2, 3]) + margin, 10)
    assert found.start == tuple(low.tolist())
    assert found.values.shape == (*(high - low).tolist(), 2)
    common = np.minimum(high, 4)
    inner = np.asarray(found.values)[tuple(map(slice, common - low))]
    np.testing.assert_array_equal(inner, np.asarray(wide.values)[tuple(map(slice, low, common))])
    # patches beyond the window are positions, but take no pass
    reached = [len([s for s in (0, 2, 4, 6, 8) if s < h and s + 3 > l]) for l, h in zip(low, high, strict=True)]
    assert info.extra["patches"] == np.prod(reached)
    assert info.rows == 1 + 2 * near
    # 4 is in the patch from 2, the last that reaches the window; 5 is not
    assert (np.asarray(found.values)[5:] == 0).all()


def test_channels_alone_and_together():
    """They add up where the network is additive in them; where one of two is enough, only both together tell."""

    def additive(x):
        return jnp.tanh(x[..., :1]) + jnp.roll(x[..., 1:], 1, 2) ** 2

    def either(x):
        return jnp.maximum(x[..., :1], x[..., 1:])

    lesion = Instance(1, np.array([[1, 1, 1]], np.int32))
    for function, image in ((additive, IMAGE), (either, jnp.ones_like(IMAGE))):
        predictor = StitchedPredictor(function, (4, 4, 4), target_class=0)
        each, _ = explained(occlusion(patch=2, channels="each"), predictor, image, lesion)
        together, _ = explained(occlusion(patch=2, channels="together"), predictor, image, lesion)
        assert together.values.shape == (*each.values.shape[:3], 1)
        if function is additive:
            np.testing.assert_allclose(together.values[..., 0], each.values.sum(-1), atol=1e-6)
        else:
            assert np.abs(each.values).max() == 0
            assert float(together.values[1, 1, 1, 0]) == 1


def test_the_score_is_the_mean_over_the_instance():
    predictor = StitchedPredictor(lambda x: x, (4, 4, 4), target_class=0)
    small, large = (Instance(1, np.argwhere(np.ones((n, n, n))).astype(np.int32)) for n in (1, 3))
    for lesion in (small, large):
        found, _ = explained(occlusion(patch=4), predictor, jnp.full((4, 4, 4, 1), 2.0), lesion)
        np.testing.assert_allclose(found.values, 2.0, rtol=1e-6)


def test_the_baseline_is_computed_from_the_image():
    plain, _ = explained(occlusion(patch=3, baseline=given(blur(1.0)(IMAGE))))
    found, _ = explained(occlusion(patch=3, baseline=blur(1.0)))
    np.testing.assert_array_equal(found.values, plain.values)
    with pytest.raises(ValueError, match="the baseline of an image"):
        explained(occlusion(baseline=lambda image: image[1:]))


@pytest.fixture(scope="module")
def unet():
    model = convert(FIXTURES / "unet_batch.pth", window=(24, 16, 20))
    return StitchedPredictor(model.logits_fn, model.spec.window, model.spec.overlap, local_fn=model.local_logits(4))


UNET_IMAGE = jax.random.normal(jax.random.key(3), (26, 18, 20, 2))
UNET_LESIONS = [
    Instance(1, np.array([[0, 0, 0], [1, 0, 3], [5, 4, 4]], np.int32)),
    Instance(2, np.array([[12, 8, 9], [12, 8, 10], [12, 9, 10], [15, 8, 10]], np.int32)),
    Instance(3, np.array([[25, 17, 19]], np.int32)),
]


@pytest.mark.parametrize(("target", "margin"), [("logit", 4), ("probability", None)])
def test_tiles_give_the_maps_of_whole_windows(unet, target, margin):
    explain = occlusion(patch=(6, 9, 7), margin=margin, target=target, chunk=3)
    assert unet.local_fn is not None
    # the cones of these tiles do not see the whole window
    assert unet.local_fn.field[0] < unet.window[0]
    tiled, tiled_infos = explain(KEY, unet, UNET_IMAGE, UNET_LESIONS)
    full, full_infos = explain(KEY, replace(unet, local_fn=None), UNET_IMAGE, UNET_LESIONS)
    for a, b, c, d in zip(tiled, full, tiled_infos, full_infos, strict=True):
        # differences of logits of order 1, which tiles and windows add up in another order
        np.testing.assert_allclose(a.values, b.values, atol=2e-6)
        assert a.start == b.start
        assert (c.windows, c.extra) == (d.windows, d.extra)
    assert np.abs(tiled[1].values).max() > 1e-3


@pytest.mark.slow
def test_tiles_are_brute_force_and_skip_what_their_field_does_not_hold(unet):
    lesion, patch = UNET_LESIONS[2], (8, 9, 10)
    expected = brute_force(unet, UNET_IMAGE, lesion, jnp.zeros_like(UNET_IMAGE), patch, patch)
    found, info = explained(occlusion(patch=patch, margin=None), unet, UNET_IMAGE, lesion)
    # the map ends with the lesion's window, though a patch goes on
    assert found.start == (2, 2, 0)
    np.testing.assert_allclose(found.values, expected[2:, 2:], atol=2e-6)
    _, full = explained(occlusion(patch=patch, margin=None), replace(unet, local_fn=None), UNET_IMAGE, lesion)
    assert info.rows < full.rows
    # the field of a tile at the far corner does not reach the near one
    assert (expected[:8, :1, :1] == 0).all()


def test_instances_together_are_instances_apart_in_any_order():
    explain = occlusion(patch=2, margin=3, chunk=3, target="probability")
    instances = [LESION, SMALL, Instance(7, np.array([[5, 4, 6]], np.int32))]
    together, infos = explain(KEY, PREDICTOR, IMAGE, instances)
    for number in (2, 0, 1):
        (alone,), (info,) = explain(jax.random.key(9), PREDICTOR, IMAGE, [instances[number]])
        np.testing.assert_array_equal(alone.values, together[number].values)
        assert alone.start == together[number].start
        assert info == infos[number]
    assert explain(KEY, PREDICTOR, IMAGE, []) == ([], [])


def test_a_view_is_passed_once_for_a_patch_though_its_voxels_need_different_other_views():
    # along y, windows from 0 see two of the patches 0:2, 2:4, 4:5, those from 1 all of them; three windows each, and two channels
    _, info = explained(occlusion(patch=(6, 2, 7), margin=None))
    assert info.rows == 6 + 3 * (2 + 3) * 2


def test_progress_adds_up_to_the_rows_of_the_infos():
    for chunk in (1, 4):
        seen: list[int] = []
        _, infos = occlusion(patch=3, chunk=chunk)(KEY, PREDICTOR, IMAGE, [LESION, SMALL], progress=seen.append)
        assert sum(seen) == sum(info.rows for info in infos)
        assert max(seen) == chunk


@pytest.mark.parametrize("chunk", [2, 7, 100])
def test_the_chunk_changes_nothing(chunk):
    one, info = explained(occlusion(patch=3, stride=2, chunk=1))
    several, same = explained(occlusion(patch=3, stride=2, chunk=chunk))
    np.testing.assert_allclose(several.values, one.values, atol=1e-6)
    assert same == info


def test_blocks_change_nothing(monkeypatch):
    one, info = explained(occlusion(patch=2, target="probability"))
    monkeypatch.setattr(sys.modules["xaiseg.saliency.occlusion"], "_HELD", 3 * len(LESION.voxels))
    several, same = explained(occlusion(patch=2, target="probability"))
    np.testing.assert_array_equal(several.values, one.values)
    assert same == info


def test_devices_change_nothing():
    one, info = explained(occlusion(patch=2, chunk=2))
    predictor = replace(PREDICTOR, mesh=device_mesh(samples=1, rows=2))
    two, same = explained(occlusion(patch=2, chunk=2), predictor)
    np.testing.assert_array_equal(two.values, one.values)
    assert same == info
    assert two.values.devices() == {jax.devices()[0]}


def test_the_network_is_traced_once_for_all_lesions_and_images():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return smooth(x)

    predictor = StitchedPredictor(counted, (4, 4, 4))
    explain = occlusion(patch=3, chunk=2)
    explain(KEY, predictor, IMAGE, [SMALL])
    # besides the program, its shape alone is asked for
    assert [shape for shape in traces if shape[0] == 2] == [(2, 4, 4, 4, 2)]
    first = len(traces)
    for seed in range(2):
        explain(KEY, predictor, jax.random.normal(jax.random.key(seed), IMAGE.shape), [LESION, SMALL])
    assert len(traces) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, "patch is 0 voxels"),
        ({"patch": (2, 2)}, "one for each axis"),
        ({"stride": 0}, "stride is 0 voxels"),
        ({"stride": (1, -1, 1)}, r"stride is \(1, -1, 1\) voxels"),
        ({"patch": (4, 4, 2), "stride": 3}, "larger than the patch"),
        ({"margin": -1}, "margin is -1"),
        ({"channels": "both"}, "known are each, together"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        occlusion(**options)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="target_class is 1"):
        explained(occlusion(), StitchedPredictor(lambda x: x[..., :1], (4, 4, 4)))
    with pytest.raises(ValueError, match="logits have shape"):
        explained(occlusion(), StitchedPredictor(lambda x: x[:, 1:], (4, 4, 4)))


def test_the_example_runs():
    result = doctest.testmod(sys.modules["xaiseg.saliency.occlusion"])
    assert result.attempted > 0
    assert result.failed == 0
