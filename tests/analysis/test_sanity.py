"""The table: each number is that of the measure called alone; known-bad explainers fail where they must."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BLOBS, blob, tiny_model, volumes

from xaiseg import InputError, Instance, SaliencyMap, StitchedPredictor, input_gradient
from xaiseg._types import Info
from xaiseg.analysis.sanity import MEASURES, SanityCase, SanitySettings, sanity, summarise_sanity
from xaiseg.metrics.instance_score import box_around
from xaiseg.metrics.localisation import localisation
from xaiseg.metrics.perturbation import deletion
from xaiseg.metrics.replacement import by_baseline
from xaiseg.metrics.sensitivity import infidelity
from xaiseg.saliency import blur

KEY = jax.random.key(0)
# the middles of the blobs, where the score is positive
LESIONS = [Instance(i + 4, np.argwhere(blob(c, r - 1)).astype(np.int32)) for i, (c, r) in enumerate(BLOBS)]
SETTINGS = SanitySettings(
    margin=4, replacements={"blur": by_baseline(blur(2.0))}, orders=3, samples=8, radius_samples=1, steps=1,
    smooth_samples=2, patch=2, resamples=100, fractions=(0.0, 0.01, 0.05, 0.2, 1.0),
)  # fmt: skip


def standardised(seed):
    found = [volumes(seed)[name] for name in ("FLAIR", "T1w")]
    return jnp.stack([jnp.asarray(np.where(v != 0, (v - v[v != 0].mean()) / v[v != 0].std(), 0)) for v in found], -1)


def edges(key, predictor, image, instances, *, progress=None):
    found = sum(jnp.abs(jnp.roll(image, 1, axis) - image) for axis in range(3))
    return [SaliencyMap(found, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]


def random(key, predictor, image, instances, *, progress=None):
    found = [jax.random.normal(jax.random.fold_in(key, i.label), image.shape) for i in instances]
    return [SaliencyMap(m, (0, 0, 0)) for m in found], [Info(1, 1) for _ in instances]


EXPLAINERS = {"gradient": input_gradient(reduce="mean"), "edges": edges, "random": random}
CASES = [SanityCase(f"scan-{s}", standardised(s), LESIONS, (1, 2, 1), patient=f"p{s}") for s in range(2)]


@pytest.fixture(scope="module")
def found():
    told = []
    result = sanity(KEY, tiny_model(), CASES, EXPLAINERS, SETTINGS, progress=lambda *a: told.append(a))
    assert told == [(case.name, measure) for case in CASES for measure in MEASURES]
    return result


def values(found, explainer, measure, column="value"):
    return [row[column] for row in found.rows if (row["explainer"], row["measure"]) == (explainer, measure)]


def summary(found, explainer, measure):
    (row,) = [row for row in found.summary if (row["explainer"], row["measure"]) == (explainer, measure)]
    return row


def test_the_table_is_complete_and_json(found):
    measures = dict.fromkeys(row["measure"] for row in found.rows)
    assert {name.split("_")[0] for name in MEASURES} <= {name.split("_")[0] for name in measures}
    assert len(found.rows) == len(measures) * 2 * 2 * 3
    assert len(found.summary) == len(measures) * 3
    keys = [(row["case"], row["lesion"], row["explainer"], row["measure"]) for row in found.rows]
    assert len(set(keys)) == len(keys)
    assert json.loads(json.dumps(found._asdict(), allow_nan=False)) == found._asdict()
    assert {(row["case"], row["patient"], row["lesion"], row["voxels"]) for row in found.rows} == {
        (f"scan-{s}", f"p{s}", lesion.label, len(lesion.voxels)) for s in range(2) for lesion in LESIONS
    }


def test_numbers_are_those_of_the_measures_alone(found):
    """Of the second lesion of the second scan, with the keys that the table says."""
    case, lesion, predictor = CASES[1], LESIONS[1], StitchedPredictor.of(tiny_model())
    key = jax.random.fold_in(KEY, 1)
    maps, _ = EXPLAINERS["gradient"](jax.random.fold_in(key, len(MEASURES)), predictor, case.image, [lesion])
    order = list(MEASURES)
    (curve,) = deletion(
        jax.random.fold_in(key, order.index("deletion")), predictor, case.image, lesion, maps,
        replacement=by_baseline(blur(2.0)), region=box_around(lesion, case.image.shape, 4), orders=3,
        fractions=SETTINGS.fractions, chunk=7,
    )  # fmt: skip
    assert values(found, "gradient", "deletion_blur")[3] == pytest.approx(curve.area, abs=1e-5)
    assert values(found, "gradient", "deletion_blur", "control")[3] == pytest.approx(
        curve.control_areas.mean(), abs=1e-5
    )
    assert values(found, "gradient", "deletion_blur", "control_sd")[3] == pytest.approx(
        curve.control_areas.std(ddof=1), abs=1e-5
    )
    (noise,) = infidelity(
        jax.random.fold_in(key, order.index("infidelity")), predictor, case.image, lesion, maps, samples=8
    )
    assert values(found, "gradient", "infidelity")[3] == pytest.approx(noise.relative, rel=1e-3)
    place = localisation(maps[0], lesion, spacing=(1, 2, 1))
    assert values(found, "gradient", "localisation_rank")[3] == pytest.approx(place.rank)
    assert values(found, "gradient", "localisation_mass_positive")[3] == pytest.approx(place.positive, rel=1e-4)


def test_the_gradient_beats_random_orders_and_a_random_map_does_not(found):
    for measure in ("deletion_blur", "insertion_blur"):
        gains = values(found, "gradient", measure, "gain")
        spreads = values(found, "gradient", measure, "control_sd")
        assert all(gain > 3 * spread for gain, spread in zip(gains, spreads, strict=True))
        assert summary(found, "gradient", measure)["gain"] > 5 * abs(summary(found, "random", measure)["gain"])
        # controls are shared
        assert values(found, "gradient", measure, "control") == values(found, "random", measure, "control")


def test_the_known_bad_fail(found):
    for part in ("randomisation", "smooth_randomisation"):
        assert values(found, "edges", f"{part}_spearman") == pytest.approx([1] * 4)
        assert values(found, "edges", f"{part}_ssim") == pytest.approx([1] * 4)
        assert values(found, "edges", f"{part}_entropy") == pytest.approx([0] * 4)
        assert values(found, "edges", f"{part}_signed") == pytest.approx([1] * 4)
        assert max(map(abs, values(found, "gradient", f"{part}_signed"))) < 0.2
        assert max(values(found, "gradient", f"{part}_spearman")) < 0.7
    # an edge detector says the same of every lesion
    assert values(found, "edges", "random_instance") == pytest.approx([1] * 4)
    assert max(values(found, "gradient", "random_instance")) < 0.5
    # 8 samples leave 1 - 1/8 to a map that knows nothing; the standard deviation of each of four is 0.11
    assert np.mean(values(found, "random", "infidelity")) > 0.875 - 3 * 0.11 / 2
    assert max(values(found, "gradient", "infidelity")) < 0.3
    assert max(values(found, "gradient", "leakage")) < min(values(found, "edges", "leakage"))


def test_curves_belong_to_the_rows(found):
    curves = {(c["case"], c["lesion"], c["explainer"], c["measure"]): c for c in found.curves}
    for row in found.rows:
        curve = curves.pop((row["case"], row["lesion"], row["explainer"], row["measure"]), None)
        if row["measure"].endswith("_drop"):
            assert row["value"] is not None
        elif "gain" in row:
            area = np.trapezoid(np.array(curve["score"]) / curve["clean_score"], curve["fraction"])
            assert row["value"] == pytest.approx(area)
        elif curve is not None:
            assert row["value"] == curve["score"][-1]
            assert curve["layer"][-1] == "encoder0_conv"
    assert not curves


def test_the_summary_is_over_lesions_and_resamples_patients(found):
    rows = values(found, "gradient", "deletion_blur")
    row = summary(found, "gradient", "deletion_blur")
    assert row["lesions"] == 4
    assert row["mean"] == pytest.approx(np.mean(rows))
    assert (row["median"], row["smallest"], row["largest"]) == pytest.approx((np.median(rows), min(rows), max(rows)))
    # of two patients a resample has the mean of one, of the other, or of all
    assert [row["mean_low"], row["mean_high"]] == pytest.approx(sorted([np.mean(rows[:2]), np.mean(rows[2:])]))
    one = [r for r in found.rows if r["patient"] == "p0"]
    assert all(r["mean_low"] is None and r["mean_high"] is None for r in summarise_sanity(one))


def test_what_is_not_defined_is_none():
    """One lesion has no other; a map that is not a number, or zero, has no area; the rest of the table stands."""

    def lost(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image * jnp.nan, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]

    settings = replace(SETTINGS, measures=["deletion", "infidelity", "localisation", "leakage", "random_instance"])
    case = SanityCase("scan", CASES[0].image, LESIONS[:1])
    found = sanity(KEY, tiny_model(), [case], {"lost": lost, "random": random}, settings)
    json.dumps(found._asdict(), allow_nan=False)
    assert all(row["value"] is None for row in found.rows if row["explainer"] == "lost")
    assert summary(found, "lost", "deletion_blur") == {
        "explainer": "lost", "measure": "deletion_blur", "lesions": 0, "patients": 0, "mean": None,
        "mean_low": None, "mean_high": None, "median": None, "smallest": None, "largest": None, "gain": None,
        "gain_low": None, "gain_high": None, "limit": 0.0, "verdict": None,
    }  # fmt: skip
    assert values(found, "random", "leakage") == [None]
    assert values(found, "random", "random_instance") == [None]
    assert None not in values(found, "random", "deletion_blur")
    assert found.rows[0]["patient"] == "scan"


def test_other_lesions_are_compared_with_and_not_measured():
    settings = replace(SETTINGS, measures=["leakage", "random_instance"])
    both = sanity(KEY, tiny_model(), [CASES[0]], EXPLAINERS, settings)
    one = CASES[0]._replace(instances=LESIONS[:1], others=LESIONS[1:])
    found = sanity(KEY, tiny_model(), [one], EXPLAINERS, settings)
    assert {row["lesion"] for row in found.rows} == {LESIONS[0].label}
    for explainer in EXPLAINERS:
        for measure in settings.measures:
            assert values(found, explainer, measure) == pytest.approx(values(both, explainer, measure)[:1], abs=1e-5)


def row(value, patient, measure, gain=None):
    found = {"explainer": "e", "measure": measure, "patient": patient, "value": value}
    return found if gain is None else found | {"gain": gain}


@pytest.mark.parametrize(
    ("measure", "numbers", "verdict"),
    [
        ("deletion_blur", (0.1, 0.2, 0.3), "passes"),
        ("deletion_blur", (-0.1, 0.2, 0.3), "unclear"),
        ("insertion_road_drop", (-0.1, -0.2, -0.3), "fails"),
        ("infidelity", (0.5, 0.89, 0.7), "passes"),
        ("infidelity", (0.95, 0.91, 0.92), "fails"),  # of 10 samples, 0.9
        ("faithfulness_correlation", (0.1, 0.2, 0.1), "passes"),
        ("random_instance", (0.6, 0.9, 0.7), "fails"),
        ("randomisation_signed", (-0.6, 0.4, 0.1), "passes"),
        ("randomisation_ssim", (0.1, 0.2, 0.3), None),
        ("localisation_rank", (0.1, 0.2, 0.3), None),
    ],
)
def test_verdicts_by_the_interval(measure, numbers, verdict):
    area = measure.startswith(("deletion", "insertion"))
    rows = [row(0.5 if area else n, p, measure, n if area else None) for p, n in enumerate(2 * numbers)]
    (found,) = summarise_sanity(rows, samples=10)
    assert found["verdict"] == verdict
    assert found["patients"] == 6
    (few,) = summarise_sanity(rows[:5], samples=10)
    assert few["verdict"] is None


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="no explainer"):
        sanity(KEY, tiny_model(), CASES, {})
    with pytest.raises(InputError, match="no case has a lesion"):
        sanity(KEY, tiny_model(), [CASES[0]._replace(instances=[])], EXPLAINERS)
    with pytest.raises(InputError, match="measures: size; known are deletion"):
        SanitySettings(measures=["size"])
    with pytest.raises(InputError, match="margin is -1"):
        SanitySettings(margin=-1)
