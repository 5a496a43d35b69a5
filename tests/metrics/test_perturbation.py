"""Deletion and insertion against a loop that predicts every image anew."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faithfulness import IMAGE, KEY, LESION, LINEAR, PREDICTOR, REFERENCE, SHAPE, crop, gradient, linear, score, smooth

from xaiseg import InputError, SaliencyMap
from xaiseg.metrics.perturbation import deletion, insertion, ranks
from xaiseg.metrics.replacement import by_baseline, noisy_linear
from xaiseg.saliency.baselines import given

FRACTIONS = (0.0, 0.02, 0.1, 0.35, 1.0)
BY_REFERENCE = by_baseline(given(REFERENCE))
MAP = SaliencyMap(jax.random.normal(jax.random.key(8), (4, 3, 5, 2)), (1, 0, 2))


def brute_force(values, region, inserting, fractions=FRACTIONS, predictor=PREDICTOR):
    """Scores and area for values without ties: sort (voxel, channel) by hand, replace one by one, predict everything."""
    places = sorted((tuple(p) for p in np.argwhere(region).tolist()), key=lambda p: -values[p])
    scores = []
    for fraction in fractions:
        count = round(fraction * len(places))
        taken = places[count:] if inserting else places[:count]
        changed = np.array(IMAGE)
        for place in taken:
            changed[place] = np.asarray(REFERENCE)[place]
        scores.append(score(predictor, changed))
    clean = score(predictor, IMAGE)
    pairs = zip(fractions[1:], fractions, scores[1:], scores, strict=False)
    return scores, sum((b - a) * (p + q) / 2 / clean for b, a, p, q in pairs)


def volume_of(saliency):
    whole = np.zeros((*SHAPE, 2), np.float32)
    whole[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = saliency.values
    return whole


@pytest.mark.parametrize("inserting", [False, True], ids=["deletion", "insertion"])
@pytest.mark.parametrize("rank_by", ["signed", "absolute"])
def test_curves_are_brute_force(inserting, rank_by):
    of, whole = (insertion if inserting else deletion), volume_of(MAP)
    # many steps: few elements matter to this lesion, and a place too early or late shows with those only
    fractions = tuple(np.linspace(0, 1, 31).tolist())
    (found,) = of(
        KEY, PREDICTOR, IMAGE, LESION, [MAP],
        replacement=BY_REFERENCE, fractions=fractions, rank_by=rank_by, orders=2, chunk=4,
    )  # fmt: skip
    values = np.abs(whole) if rank_by == "absolute" else whole
    scores, area = brute_force(values, whole != 0, inserting, fractions)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert found.area == pytest.approx(area, abs=1e-6)
    assert found.clean == pytest.approx(score(PREDICTOR, IMAGE), abs=1e-6)
    assert found.drop == pytest.approx(found.clean * (1 - area), abs=1e-5)
    ends = [found.scores[-1], found.scores[0]] if inserting else [found.scores[0], found.scores[-1]]
    assert ends[0] == pytest.approx(found.clean, abs=1e-6)
    # all of the region is replaced at the other end, in whatever order
    np.testing.assert_allclose(found.control[:, 0 if inserting else -1], ends[1], atol=1e-6)
    np.testing.assert_allclose(
        found.control_areas, np.trapezoid(found.control / found.clean, fractions, axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(
        found.control_drops, np.trapezoid(found.clean - found.control, fractions, axis=1), rtol=1e-12
    )
    assert found.control.shape == (2, 31)
    assert not np.allclose(found.control[0, 1:-1], found.control[1, 1:-1])


def test_a_region_is_shared_and_a_map_alone_has_the_same_area():
    region = np.zeros(SHAPE, bool)
    region[1:4, 1:4, 1:5] = True
    other = SaliencyMap(-MAP.values, MAP.start)
    options = {"replacement": BY_REFERENCE, "fractions": FRACTIONS, "orders": 2}
    both = deletion(KEY, PREDICTOR, IMAGE, LESION, [MAP, other], region=region, **options)
    (alone,) = deletion(KEY, PREDICTOR, IMAGE, LESION, [other], region=region, **options)
    np.testing.assert_array_equal(both[1].scores, alone.scores)
    np.testing.assert_array_equal(both[0].control, both[1].control)
    np.testing.assert_array_equal(both[0].control, alone.control)
    # by default, where any of the maps is not zero
    parts = [crop(SaliencyMap(volume_of(MAP), (0, 0, 0)), s, (2, 3, 5)) for s in ((1, 0, 2), (3, 0, 2))]
    union = deletion(KEY, PREDICTOR, IMAGE, LESION, parts, **options)
    (whole,) = deletion(KEY, PREDICTOR, IMAGE, LESION, [MAP], **options)
    np.testing.assert_array_equal(union[0].control, whole.control)


@pytest.mark.parametrize("chunk", [2, 5, 100])
def test_the_chunk_changes_nothing(chunk):
    options = {"fractions": FRACTIONS, "orders": 1}
    (one,) = insertion(KEY, PREDICTOR, IMAGE, LESION, [MAP], chunk=1, **options)
    (many,) = insertion(KEY, PREDICTOR, IMAGE, LESION, [MAP], chunk=chunk, **options)
    np.testing.assert_allclose(many.scores, one.scores, atol=1e-6)
    np.testing.assert_allclose(many.control, one.control, atol=1e-6)


def test_an_exact_explanation_beats_every_random_order():
    """A linear network and all of it positive towards the baseline: `M ⊙ (x - x')` orders by what each element takes along."""
    reference = IMAGE - 1
    exact = gradient(LINEAR)
    order = SaliencyMap(exact.values * (IMAGE - reference), (0, 0, 0))
    predictor = replace(LINEAR, logits_fn=lambda x: linear(x) + 10.0)
    options = {"replacement": by_baseline(given(reference)), "orders": 12, "fractions": FRACTIONS}
    (less,) = deletion(KEY, predictor, IMAGE, LESION, [order], **options)
    (more,) = insertion(KEY, predictor, IMAGE, LESION, [order], **options)
    assert less.area < less.control_areas.min()
    assert more.area > more.control_areas.max()
    (worst,) = deletion(KEY, predictor, IMAGE, LESION, [order._replace(values=-order.values)], **options)
    assert worst.area > worst.control_areas.max()


def test_a_map_of_one_channel_ranks_voxels():
    one = SaliencyMap(MAP.values[..., :1], MAP.start)
    voxels = np.abs(volume_of(SaliencyMap(jnp.repeat(one.values, 2, -1), MAP.start)))
    count = int((voxels != 0).sum())
    (found,) = deletion(
        KEY, PREDICTOR, IMAGE, LESION, [one],
        replacement=BY_REFERENCE, fractions=(0.0, 20 / count, 1.0), rank_by="absolute", orders=1,
    )  # fmt: skip
    # the ten highest voxels, both of their channels
    expected, _ = brute_force(voxels + np.array([1e-6, 0]), voxels != 0, False, (0.0, 20 / count, 1.0))
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)


def test_ties_are_broken_by_lot():
    region = np.ones((3, 3, 3, 1), bool)
    flat = np.zeros(region.shape)
    flat[1] = 1
    a, b = (ranks(np.random.default_rng(seed), flat, region) for seed in (0, 1))
    assert sorted(a.ravel()) == list(range(27))
    assert a[1].max() < 9
    assert (a != b).any()
    # each element is first of its nine about equally often: binomial (900, 1/9), five standard deviations
    first = np.bincount([np.argmin(ranks(np.random.default_rng(s), flat, region)) for s in range(900)], minlength=27)
    assert first[9:18].sum() == 900
    assert np.abs(first[9:18] - 100).max() < 5 * np.sqrt(900 / 9 * 8 / 9)


def test_imputation_replaces_what_is_masked():
    (found,) = deletion(
        KEY, PREDICTOR, IMAGE, LESION, [MAP], replacement=noisy_linear(0.1), fractions=(0.0, 0.5, 1.0), orders=1
    )
    whole = volume_of(MAP)
    fill = noisy_linear(0.1)(jax.random.split(KEY)[1], IMAGE)
    half = np.zeros(whole.shape, bool)
    places = sorted((tuple(p) for p in np.argwhere(whole).tolist()), key=lambda p: -whole[p])
    for place in places[:60]:
        half[place] = True
    assert found.scores[1] == pytest.approx(score(PREDICTOR, fill(half)), abs=1e-6)
    assert found.scores[2] == pytest.approx(score(PREDICTOR, fill(whole != 0)), abs=1e-6)


def test_a_score_that_is_not_positive_has_no_area():
    predictor = replace(PREDICTOR, logits_fn=lambda x: -smooth(x))
    (found,) = deletion(KEY, predictor, IMAGE, LESION, [MAP], fractions=FRACTIONS, orders=2)
    assert found.clean < 0
    assert np.isnan(found.area)
    assert np.isnan(found.control_areas).all()
    assert found.drop == pytest.approx(np.trapezoid(found.clean - found.scores, FRACTIONS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractions": (0.0, 0.5)}, ValueError, "from 0 to 1"),
        ({"fractions": (0.0, 0.5, 0.5, 1.0)}, ValueError, "rising"),
        ({"rank_by": "size"}, ValueError, "expected signed or absolute"),
        ({"orders": 0}, ValueError, "orders is 0"),
        ({"region": np.ones((2, 2, 2), bool)}, InputError, "expected that of the volume"),
        ({"region": np.zeros(SHAPE, bool)}, InputError, "no voxel to replace"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        deletion(KEY, PREDICTOR, IMAGE, LESION, [MAP], **options)


def test_maps_that_order_nothing_are_refused():
    with pytest.raises(InputError, match="not finite"):
        deletion(KEY, PREDICTOR, IMAGE, LESION, [MAP._replace(values=MAP.values.at[0, 0, 0, 0].set(jnp.nan))])
    with pytest.raises(InputError, match="maps are zero"):
        deletion(KEY, PREDICTOR, IMAGE, LESION, [MAP._replace(values=MAP.values * 0)])
