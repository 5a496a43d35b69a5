"""A run opened again: its model, its scans, the lesions that are chosen."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_run import lesions, write_run

from xaiseg.analysis.reopened import Choice, choose, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_tables import read_run
from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.errors import InputError
from xaiseg.instances import label_components


@pytest.fixture
def run(tmp_path):
    """Two groups, 4 patients with 6, 6, 6 and 1 lesions."""
    rows = lesions(np.random.default_rng(0), 4, {"TP": 2.0, "FP": 1.0})
    return read_run(write_run(tmp_path / "run", rows[:19]))


def test_choice_by_group_and_volume(run):
    volume, group = run.lesions["volume_mm3"], run.lesions["group"]
    assert choose(run, Choice()) == list(range(19))
    found = choose(run, Choice(("TP",), (20.0, 60.0)))
    assert found == [n for n in range(19) if group[n] == "TP" and 20 <= volume[n] <= 60]


@pytest.mark.parametrize("number", [1, 3, 4, 7, 13])
def test_a_draw_takes_patients_in_turn(run, number):
    drawn = run.lesions["patient"][choose(run, Choice(number=number, seed=3))].tolist()
    assert len(drawn) == number
    counts = {patient: drawn.count(patient) for patient in ["00", "01", "02", "03"]}
    full = {patient: n for patient, n in counts.items() if patient != "03"}  # the last has one lesion only
    assert max(full.values()) - min(full.values()) <= 1
    assert counts["03"] == 1 if number >= 4 else max(counts.values()) == 1


def test_a_draw_depends_on_its_seed_alone(run):
    draws = {tuple(choose(run, Choice(number=5, seed=seed))) for seed in (0, 0, 1, 2)}
    assert 1 < len(draws) <= 3
    assert choose(run, Choice(number=5, seed=1)) == choose(run, Choice(number=5, seed=1))


def test_a_choice_of_nothing_says_what_there_is(run):
    with pytest.raises(InputError, match="no lesion of group TN; its groups are FP, TP"):
        choose(run, Choice(("TN",)))
    with pytest.raises(InputError, match=r"none of 19 lesions .* 1000 to inf mm³ \(they have"):
        choose(run, Choice(volume_mm3=(1000.0, float("inf"))))


def test_scans_and_prediction_are_those_of_the_run(finished):
    run = read_run(finished.out)
    model = reopen_model(run, load_model(str(finished.model)))
    assert model.spec.threshold == run.identity["model"]["threshold"]
    predictor = predictor_of(run, model)
    seen = []
    for opened in open_scans(run, range(len(run))):
        seen += opened.places
        logits = np.asarray(predictor(opened.scan.image))
        probability = np.asarray(predictor.probability(logits))
        # what is found again is what the run found and wrote
        again = label_components(probability > model.spec.threshold, model.spec.connectivity, model.spec.min_voxels)
        np.testing.assert_array_equal(again, opened.labels)
        for place, instance in zip(opened.places, opened.instances, strict=True):
            assert instance.label == run.lesions["lesion"][place]
            assert len(instance.voxels) == run.lesions["voxels"][place]
            mean = probability[tuple(instance.voxels.T)].mean()
            np.testing.assert_allclose(mean, run.lesions["mean_probability"][place], rtol=1e-5)
    assert sorted(seen) == list(range(len(run)))


def test_another_threshold_of_the_same_network_is_the_runs(finished):
    run = read_run(finished.out)
    other = load_model(str(finished.model)).with_spec(threshold=0.9)
    assert reopen_model(run, other).spec.threshold == run.identity["model"]["threshold"]


def test_another_network_is_refused(finished):
    run = read_run(finished.out)
    model = load_model(str(finished.model))
    moved = {"params": {k: {n: a + 1 for n, a in v.items()} for k, v in model.variables["params"].items()}}
    with pytest.raises(InputError, match="give the model of the run"):
        reopen_model(run, replace(model, variables=moved))


def test_input_without_a_case_is_refused(finished, tmp_path):
    lines = finished.manifest.read_text().splitlines()
    folder = finished.manifest.parent
    short = "\n".join(
        [lines[0], "\t".join([c if n == 0 else str(folder / c) for n, c in enumerate(lines[1].split("\t"))])]
    )
    (tmp_path / "short.tsv").write_text(short + "\n")
    run = read_run(finished.out)
    with pytest.raises(InputError, match=r"short\.tsv: no case sub-02"):
        list(open_scans(run, range(len(run)), tmp_path / "short.tsv"))


def test_patients_are_the_manifests(finished, tmp_path):
    """Two scans of one patient whose names do not tell."""
    lines = [line.split("\t") for line in finished.manifest.read_text().splitlines()]
    folder = finished.manifest.parent
    rows = [[*lines[0], "patient"], *([r[0], *(str(folder / c) for c in r[1:]), "the same"] for r in lines[1:])]
    (tmp_path / "patients.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    options = ["--samples", "1", "--no-pictures", "--save-maps", "none", "--method", "gradient"]
    command = ["explain", str(tmp_path / "patients.tsv"), str(tmp_path / "out"), "--model", str(finished.model)]
    assert main([*command, *options]) == 0
    run = read_run(tmp_path / "out")
    assert set(run.lesions["patient"]) == {"the same"}
    assert {row["patient"] for row in read_run(finished.out).cases} == {"01", "02"}
    assert set(read_run(tmp_path / "out", {"sub-01": "other"}).lesions["patient"]) == {"the same", "other"}


def test_a_scan_without_lesions_can_be_opened(finished):
    """It has no row in the table of lesions."""
    run = read_run(finished.out)
    run = run.chosen(run.lesions["case"] == "sub-01")
    (opened,) = open_scans(run, [], cases=["sub-02"])
    assert opened.case.name == "sub-02"
    assert opened.instances == []
    assert opened.labels.max() > 0
