"""The dilation experiment against brute force: each dilated image is made voxel by voxel and segmented whole."""

import doctest
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import BLOBS, blob, tiny_model, volumes
from xaiseg._types import Instance
from xaiseg.analysis import context, crossing
from xaiseg.analysis.altered import passes_at_most
from xaiseg.analysis.context import CONTEXT_COLUMNS, context_curves, context_rows, context_summary
from xaiseg.analysis.crossing import crossing_interval
from xaiseg.checkpoints import convert
from xaiseg.errors import InputError
from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.devices import device_mesh

FIXTURES = Path(__file__).parent.parent / "fixtures"
SPACING = (1.0, 0.5, 4.0)
STEPS = (0.0, 0.5, 1.0, 2.5, 4.0, 8.0)


def test_examples():
    for module in (context, crossing):
        assert doctest.testmod(module).failed == 0


@pytest.fixture(scope="module")
def image():
    found = volumes()
    return np.stack([zscore_nonzero(found[name], name) for name in ("FLAIR", "T1w")], -1)


def lesions():
    masks = [blob(*BLOBS[0]), blob(*BLOBS[1])]
    return [Instance(n, np.argwhere(m).astype(np.int32)) for n, m in enumerate(masks, start=1)]


def dilated(image, voxels, spacing, distance, background=0.0):
    """Every voxel's distance to every voxel of the lesion."""
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape[:3]), indexing="ij"), -1).reshape(-1, 1, 3)
    apart = np.sqrt((((grid - voxels[None]) * np.array(spacing)) ** 2).sum(-1)).min(1).reshape(image.shape[:3])
    out = np.empty_like(image)
    out[...] = background
    out[apart <= distance + 1e-6] = image[apart <= distance + 1e-6]
    return out


def from_scratch(predictor, image, voxels, spacing, distance, threshold, background=0.0):
    logits = predictor(jnp.asarray(dilated(image, voxels, spacing, distance, background)))
    held = tuple(voxels.T)
    probability = np.asarray(predictor.probability(logits))[held]
    found = probability > threshold if threshold is not None else np.asarray(predictor.most_probable(logits))[held]
    logit = np.asarray(logits)[held][:, predictor.target_class]
    return probability.mean(), probability.max(), logit.mean(), found.any()


def agree(curve, predictor, image, instance, threshold, spacing=SPACING, steps=STEPS, background=0.0, atol=1e-5):
    expected = [
        from_scratch(predictor, image, instance.voxels, spacing, d, threshold, background) for d in (*steps, np.inf)
    ]
    for name, column in zip(list(CONTEXT_COLUMNS)[1:], zip(*expected, strict=True), strict=True):
        # 1e-5 is what was asked for; logits are of order 1 to 10, so float32's rounding is about 1e-6
        np.testing.assert_allclose(getattr(curve, name), column, atol=atol, err_msg=name)


WAYS = {
    "windows": {},
    "in chunks": {"chunk": 3},
    "tiles of windows": {"tiles": True},
    "the whole volume": {"window": None, "stride": (2, 2, 2)},
    "nnU-Net's tiling": {"tiling": "nnunet", "overlap": 0.5},
    "windows larger than the volume": {"window": (16, 32, 40)},
    "two devices": {"mesh": True, "chunk": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_scores_are_those_of_each_dilated_image_segmented_from_scratch(way, image):
    model = tiny_model()
    options = dict(way)
    chunk, tiles, mesh = options.pop("chunk", None), options.pop("tiles", False), options.pop("mesh", False)
    plain = replace(StitchedPredictor.of(model), local_fn=None, **options)
    predictor = replace(
        plain,
        local_fn=model.local_logits(4) if tiles else None,
        mesh=device_mesh(1, rows=2) if mesh else None,
    )
    found = context_curves(predictor, image, SPACING, lesions(), distances_mm=STEPS, threshold=0.5, chunk=chunk)
    for curve, instance in zip(found, lesions(), strict=True):
        assert curve.distance_mm.tolist() == [*STEPS, np.inf]
        agree(curve, plain, image, instance, 0.5)
        assert curve.passes <= passes_at_most(predictor, image.shape, instance.voxels, len(STEPS) + 1)
        assert np.ptp(curve.mean_logit) > 0.01  # the network does look around, or nothing would be tested


def test_a_deep_unet_and_the_most_probable_class():
    model = convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16))
    predictor = StitchedPredictor.of(model)
    image = np.asarray(jax.random.normal(jax.random.key(0), (20, 24, 18, 2)))
    instance = Instance(3, np.argwhere(np.ones((3, 2, 2))).astype(np.int32) + np.array([11, 12, 9], np.int32))
    steps = (0.0, 1.0, 4.0)
    (curve,) = context_curves(predictor, image, SPACING, [instance], distances_mm=steps, threshold=None)
    agree(curve, predictor, image, instance, None, steps=steps)


def test_the_background_of_each_channel(image):
    predictor = StitchedPredictor.of(tiny_model())
    background = np.array([0.5, -2.0], np.float32)
    options = {"distances_mm": STEPS, "threshold": 0.5, "background": background.tolist()}
    (curve,) = context_curves(predictor, image, SPACING, lesions()[:1], **options)
    agree(curve, predictor, image, lesions()[0], 0.5, background=background)
    # a volume in a larger window is padded with zeros, as ever, not with the background
    wide = replace(predictor, window=(16, 32, 40))
    (curve,) = context_curves(wide, image, SPACING, lesions()[:1], **options)
    agree(curve, wide, image, lesions()[0], 0.5, background=background)


def test_windows_without_anything_new_are_not_computed_again(image):
    predictor = replace(StitchedPredictor.of(tiny_model()), window=None, stride=(2, 2, 2))
    lesion = lesions()[0]
    calls: list[int] = []
    options = {"distances_mm": (0, 0.1, 0.2, 100, 200), "threshold": 0.5, "progress": calls.append}
    (curve,) = context_curves(predictor, image, SPACING, [lesion], **options)
    # no voxel lies nearer than 0.5 mm to another; 100 mm hold the scan, as do 200 mm and infinity
    assert curve.passes == sum(calls) == 2
    assert len(set(curve.mean_logit[:3].tolist())) == len(set(curve.mean_logit[3:].tolist())) == 1
    agree(curve, predictor, image, lesion, 0.5, steps=options["distances_mm"])


def test_a_voxel_at_the_distance_is_kept_whatever_the_header_rounds():
    """Voxels of 1.0000002 mm, as float32 headers give them: three steps away is within 3 mm."""
    predictor = StitchedPredictor(lambda x: jnp.concatenate([-x, jnp.roll(x, 3, 1)], -1), (8, 8, 8))
    image = np.zeros((8, 8, 8, 1), np.float32)
    image[1, 4, 4] = 1
    lesion = Instance(1, np.array([[4, 4, 4]], np.int32))
    (curve,) = context_curves(predictor, image, [1.0000002] * 3, [lesion], distances_mm=(2, 3), threshold=0.5)
    assert curve.mean_logit.tolist() == [0, 1, 1]


def test_rows_and_what_is_refused(image):
    predictor = StitchedPredictor.of(tiny_model())
    (curve,) = context_curves(predictor, image, SPACING, lesions()[:1], distances_mm=(0, 2), threshold=0.5)
    rows = context_rows(curve, case="sub-01", volume_mm3=5.0)
    assert list(rows[0]) == ["case", "volume_mm3", "lesion", *CONTEXT_COLUMNS]
    assert [row["distance_mm"] for row in rows] == [0, 2, np.inf]
    assert {row["detected"] for row in rows} <= {0, 1}
    bad = [
        {"distances_mm": (1, 0)},
        {"distances_mm": ()},
        {"distances_mm": (-1, 2)},
        {"background": (0.0, 1.0, 2.0)},
        {"spacing": (1, 1)},
        {"spacing": (1, 0, 1)},
    ]
    for wrong in bad:
        spacing = wrong.pop("spacing", SPACING)
        with pytest.raises(InputError, match=r"expected|give"):
            next(context_curves(predictor, image, spacing, lesions(), threshold=0.5, **wrong))
    with pytest.raises(InputError, match="0 lesions"):
        context_summary([], [])


def curves_of(detected, probability=None):
    """Curves with these outcomes `(lesions, K + 1)`."""
    detected = np.asarray(detected, bool)
    distances = np.append(np.arange(detected.shape[1] - 1, dtype=float), np.inf)
    values = detected.astype(float) if probability is None else np.asarray(probability)
    return [
        context.ContextCurve(n, distances, v, v, v, d, 1)
        for n, (d, v) in enumerate(zip(detected, values, strict=True), start=1)
    ]


def test_summary_in_closed_form():
    """Ten lesions, number n detected from n mm on: rate (d + 1) / 10 at d mm."""
    detected = [[d >= n for d in range(12)] + [True] for n in range(10)]
    rows = {(r["measure"], r["distance_mm"]): r for r in context_summary(curves_of(detected), list("abcdefghij"))}
    for d in range(12):
        assert rows["detection_rate", d]["estimate"] == pytest.approx(min(d + 1, 10) / 10)
    assert rows["detected_50_mm", None]["estimate"] == pytest.approx(4)
    assert rows["detected_90_mm", None]["estimate"] == pytest.approx(8)
    # of the mean probability, here the rate, 0.95 lies halfway from 8 to 9 mm
    assert rows["level_off_mm", None]["estimate"] == pytest.approx(8.5)
    low, high = (rows["detected_50_mm", None][end] for end in ("low", "high"))
    # an order statistic: the 5th of 10; exact binomial interval of the median at 95 % is the 2nd to the 9th, n = 1 to 8
    assert 0.5 <= low <= 3
    assert 5 <= high <= 7.5
    assert rows["detected_50_mm", None]["patients"] == 10


def test_a_place_is_that_from_which_on_a_curve_stays_above():
    """Random curves, each step of a fine grid of the same lines looked at."""
    rng = np.random.default_rng(0)
    places = np.cumsum(rng.uniform(0.5, 2, 9))
    curves = rng.random((200, 9))
    found = crossing.crossing(places, curves, 0.3)
    fine = np.linspace(places[0], places[-1], 20001)
    for curve, at in zip(curves, found, strict=True):
        below = fine[np.interp(fine, places, curve) < 0.3]
        if curve[-1] < 0.3:
            assert np.isnan(at)
        else:
            # the grid's step
            assert at == pytest.approx(below[-1] if len(below) else places[0], abs=1.1 * (fine[1] - fine[0]))
    assert np.isnan(found).sum() > 20


def test_what_is_not_reached_is_nan_and_beyond_the_last_step_infinite():
    half = [[False, False, n % 2 == 0, True] for n in range(10)]
    rows = {r["measure"]: r for r in context_summary(curves_of(half), list("abcdefghij")) if r["distance_mm"] is None}
    assert rows["detected_50_mm"]["estimate"] == 2
    assert rows["detected_50_mm"]["high"] == np.inf
    assert np.isnan(rows["detected_90_mm"]["estimate"])
    assert rows["detected_90_mm"]["high"] == np.inf
    one = {r["measure"]: r for r in context_summary(curves_of(half), ["a"] * 10)}
    assert np.isnan(one["detected_50_mm"]["low"])


def test_intervals_of_distances_hold_the_truth():
    """60 patients with one to six lesions each, whose thresholds share a patient's part: cover 95 % with little to spare."""
    rng = np.random.default_rng(0)
    places, hits, repeats = np.arange(35.0), 0, 300
    # true rate: thresholds 7 + N(0, 2² + 2²); its median is 7
    for repeat in range(repeats):
        sizes = rng.integers(1, 7, 60)
        patients = [str(p) for p, n in enumerate(sizes) for _ in range(n)]
        own = 7 + np.repeat(rng.normal(0, 2, 60), sizes) + rng.normal(0, 2, len(patients))
        values = (places[None] >= own[:, None]).astype(float)
        _, low, high = crossing_interval(places, values, patients, 0.5, resamples=400, seed=repeat)
        # between steps the rate is a line: its value at the truth, 7, is that of the step itself
        hits += low <= 7 <= high
    # 300 repeats at 95 %: standard error 1.3 %
    assert 0.90 <= hits / repeats <= 0.985
