"""A whole analysis: of runs written by hand, of a run of the tiny network, and of input that cannot be used."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simulated_run import lesions, write_run, write_volume
from tiny import RAS, table, tiny_model, write_case, write_manifest

from xaiseg.analysis import analyse as module
from xaiseg.analysis.analyse import TABLES, analyse
from xaiseg.analysis.run_tables import read_run
from xaiseg.analysis.true_negatives import label_map, sample_true_negatives, write_true_negatives
from xaiseg.cohort import Request, Settings, explain
from xaiseg.cohort.stages import INSTANCES, MASK
from xaiseg.demo import write_phantoms
from xaiseg.errors import InputError
from xaiseg.imaging import nifti, read_manifest
from xaiseg.instances import instances_of, label_components

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
quiet = partial(analyse, say=lambda _: None, resamples=50)


@pytest.fixture(autouse=True)
def without_what_is_slow(request, monkeypatch):
    """Mixed models and boosting have tests of their own; pictures are drawn in one test."""
    if "everything" not in request.node.name:
        for name in ("group_figure", "profile_figure", "error_figure"):
            monkeypatch.setattr(module, name, lambda *args, **_: next(a for a in args if isinstance(a, Path)).touch())
    monkeypatch.setattr("xaiseg.analysis.groups.has_mixed_models", lambda: False)
    monkeypatch.setattr(module.errors.detect_errors, "__defaults__", (50, 0, ("logistic",)))


def with_maps(root, rows):
    """A map for every lesion: FLAIR positive in it and negative around, T1w minus half of that; a label map a case."""
    labels: dict[str, np.ndarray] = {}
    for n, row in enumerate(rows):
        volume = labels.setdefault(row["case"], np.zeros((30, 30, 12), np.int16))
        x, y = 4 + 10 * (n % 3), 4 + 10 * (n // 3 % 3)
        volume[x : x + 3, y : y + 3, 5:7] = row["lesion"]
    for row in rows:
        mask = labels[row["case"]] == row["lesion"]
        flair = np.where(mask, 1.0, -0.25).astype(np.float32)
        name = f"space-orig_desc-smoothgrad_lesion-{row['lesion']:03d}_saliency"
        write_volume(root, row, f"{name}.nii.gz", np.stack([flair, -flair / 2], -1), AFFINE)
        write_volume(root, row, INSTANCES, labels[row["case"]], AFFINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """TP and FP, FN, TN of eight patients; FN and TN come from runs of their own, which hold other groups as well."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    main = lesions(rng, 8, {"TP": 2.0, "FP": 1.5})
    write_run(folder / "main", main)
    with_maps(folder / "main", main)
    write_run(folder / "missed", lesions(rng, 8, {"TP": 2.0, "FN": 1.0}), instances="reference")
    write_run(folder / "normal", lesions(rng, 8, {"FP": 0.2}), instances="given")
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def test_everything_is_written_and_described(copy):
    pytest.importorskip("sklearn", reason="scikit-learn is an optional extra")
    said = []
    found = analyse(
        copy / "main", missed=copy / "missed", normal=copy / "normal", resamples=50, seed=2, say=said.append
    )
    folder = copy / "main" / "analysis"
    description = json.loads((folder / "analysis.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == sorted([*description["files"], "analysis.json"])
    for name, columns in TABLES.items():
        rows = table(folder / f"{name}.tsv")
        assert len(rows) == len(found[name]) > 0
        assert list(rows[0]) == list(columns) == list(description["columns"][f"{name}.tsv"])
    assert description["lesions"] == {"TP": 24, "FP": 24, "FN": 24, "TN": 24}
    assert description["patients"] == 8
    peaks = {r["group"]: r["median"] for r in found["groups"] if (r["measure"], r["channel"]) == ("peak", "FLAIR")}
    assert peaks["TP"] > peaks["FP"] > peaks["FN"] > peaks["TN"]
    first = next(r for r in found["comparisons"] if (r["group_a"], r["group_b"]) == ("TP", "TN"))
    assert first["delta_low"] > 0.9
    assert any("FLAIR peak: TP " in line and ", TN 0." in line for line in said)
    for picture in folder.glob("*.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 5


def test_profiles_come_from_the_saved_maps(copy):
    rows = [r for r in quiet(copy / "main")["profiles"] if r["channel"] == "FLAIR" and r["group"] == "TP"]
    assert {r["mean"] for r in rows if r["to_mm"] <= 0} == {1.0}
    assert {r["mean"] for r in rows if r["from_mm"] >= 0} == {-0.25}
    assert {r["lesions"] for r in rows if r["from_mm"] == 0} == {24}


def test_an_analysis_repeats_and_forgets_what_is_no_longer_so(copy):
    pytest.importorskip("sklearn", reason="scikit-learn is an optional extra")
    quiet(copy / "main", missed=copy / "missed")
    folder = copy / "main" / "analysis"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"}
    quiet(copy / "main", missed=copy / "missed")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"} == before
    text = (copy / "main" / "lesions.tsv").read_text().replace("\tFP\t", "\tTP\t")
    (copy / "main" / "lesions.tsv").write_text(text)
    notes = quiet(copy / "main")["notes"]
    assert any("no error detection: 0 FP" in note for note in notes)
    assert not (folder / "error_scores.tsv").exists()
    assert not (folder / "error_detection.png").exists()


def test_nan_maps_and_figures_are_left_out_and_counted(copy):
    path = next((copy / "main").glob("sub-00/anat/*lesion-001*"))
    image = nifti.nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[0, 0, 0, 0] = np.nan
    nifti.nib.save(nifti.nib.Nifti1Image(values, image.affine), path)
    next((copy / "main").glob("sub-01/anat/*lesion-002*")).write_bytes(b"no map")
    next((copy / "main").glob("sub-02/anat/*lesion-002*")).unlink()
    lines = (copy / "main" / "lesions.tsv").read_text().splitlines()
    cells = lines[1].split("\t")
    cells[lines[0].split("\t").index("smoothgrad_T1w_peak")] = "n/a"
    (copy / "main" / "lesions.tsv").write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    found = quiet(copy / "main")
    assert any("3 of 48 lesions have no usable map" in n and "1 values are not finite" in n for n in found["notes"])
    assert any("up to 1 lesions" in note for note in found["notes"])
    assert max(r["lesions"] for r in found["profiles"] if r["group"] == "TP") == 23
    row = next(r for r in found["groups"] if (r["measure"], r["channel"]) == ("peak", "T1w"))
    assert (row["n"], row["undefined"]) == (23, 1)


def test_without_reference_masks_groups_reduce_to_what_is_known(tmp_path):
    rows = lesions(np.random.default_rng(1), 5, {"unlabelled": 2.0})
    found = quiet(write_run(tmp_path / "out", rows))
    assert {r["group"] for r in found["groups"]} == {"unlabelled"}
    assert found["comparisons"] == found["error_detection"] == []
    assert {r["group"] for r in found["modality"]} == {"all", "unlabelled"}
    assert any("without reference masks" in note for note in found["notes"])


def test_one_patient_and_small_groups_are_said(tmp_path):
    rows = lesions(np.random.default_rng(2), 1, {"TP": 2.0, "FP": 1.0}, each=4)
    found = quiet(write_run(tmp_path / "out", [*rows[:5], *rows[6:7]]))  # FP of lesions 2 and 4
    notes = "\n".join(found["notes"])
    assert "all lesions are of one patient" in notes
    assert "fewer than 3 lesions: FP (2)" in notes
    assert "n/a" in (tmp_path / "out/analysis/comparisons.tsv").read_text()
    named = dict.fromkeys(("sub-00", "sub-01"), "one")
    two = write_run(tmp_path / "two", lesions(np.random.default_rng(3), 2, {"TP": 2.0, "FP": 1.0}))
    assert "one patient" in "\n".join(quiet(two, patients=named)["notes"])
    assert "one patient" not in "\n".join(quiet(two)["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda main: write_run(main, lesions(np.random.default_rng(0), 2, {"TP": 1}), status="left"),
            "2 of 2 cases are left",
        ),
        (lambda main: (main / "lesions.tsv").unlink(), r"lesions.tsv: cannot be read"),
        (lambda main: (main / "logs/settings.json").unlink(), r"settings.json: cannot be read"),
        (lambda main: (main / "logs/settings.json").write_text("{}"), r"of a run of 'nothing', expected 'explain'"),
        (lambda main: (main / "desc-smoothgrad_saliency.json").write_text("{}"), "has no entry 'Method'"),
        (lambda main: (main / "lesions.tsv").write_text("case\tlesion\n"), "no column subject, session, group"),
        (
            lambda main: (main / "lesions.tsv").write_text("case\tsubject\tsession\tgroup\tlesion\n"),
            "no lesion, expected",
        ),
        (lambda main: (main / "lesions.tsv").write_text("case\tsubject\tsession\tgroup\tlesion\na\n"), "as many cells"),
        (
            lambda main: (main / "lesions.tsv").write_text("case\tsubject\tsession\tgroup\tlesion\na\ta\ta\tTP\tx\n"),
            "column lesion: could not convert",
        ),
    ],
)
def test_runs_that_cannot_be_used(tmp_path, change, message):
    main = tmp_path / "main"
    if "left" not in message:
        write_run(main, lesions(np.random.default_rng(0), 2, {"TP": 1.0}))
    change(main)
    with pytest.raises(InputError, match=message):
        quiet(main)
    assert not (main / "analysis").exists()


def test_runs_that_do_not_belong_together(copy, tmp_path):
    with pytest.raises(InputError, match="explained given instances, expected missed or reference"):
        quiet(copy / "main", missed=copy / "normal")
    rows = lesions(np.random.default_rng(0), 2, {"FN": 1.0})
    other = write_run(tmp_path / "other", rows, instances="reference", hashed="xyz")
    with pytest.raises(InputError, match="model is xyz, expected abc"):
        quiet(copy / "main", missed=other)
    other = write_run(tmp_path / "fewer", rows, instances="reference", samples=2)
    with pytest.raises(InputError, match=r"smoothgrad is .*2.*, expected .*50"):
        quiet(copy / "main", missed=other)
    with pytest.raises(InputError, match="resamples is 0"):
        analyse(copy / "main", resamples=0)


def test_true_negatives_of_a_cohort_become_a_manifest(tmp_path):
    """Two phantoms whose predicted lesions are the true ones: regions keep away from them and stand in a manifest of `xaiseg`."""
    source = write_phantoms(tmp_path / "scans", 2, shape=(48, 56, 48), spacing=3.5)
    cases = {case.name: case for case in read_manifest(source, ("FLAIR", "T1w"))}
    rows = []
    for name, case in cases.items():
        mask = nifti.read_labels(case.reference)
        labels = label_components(mask > 0)
        grid = nifti.check_header(case.reference)
        for instance in instances_of(labels):
            rows.append(
                {"case": name, "subject": case.subject, "session": "n/a", "lesion": instance.label, "group": "TP"}
            )
            write_volume(tmp_path / "out", rows[-1], INSTANCES, labels.astype(np.int16), grid.affine)
            write_volume(tmp_path / "out", rows[-1], MASK, mask.astype(np.uint8), grid.affine)
    shutil.move(tmp_path / "out", tmp_path / "kept")
    write_run(tmp_path / "out", rows, source=source)
    shutil.copytree(tmp_path / "kept", tmp_path / "out", dirs_exist_ok=True)
    run = read_run(tmp_path / "out")
    manifest = write_true_negatives(run, tmp_path / "tn", distance_mm=4.0, seed=3)
    found = read_manifest(manifest, ("FLAIR", "T1w"))
    assert [case.name for case in found] == list(cases)
    for case in found:
        labels, mask = nifti.read_labels(case.instances), nifti.read_labels(case.reference)
        assert labels.max() >= 2
        assert not (labels[mask > 0]).any()
        sizes = sorted(len(i.voxels) for i in instances_of(labels))
        wanted = sorted(len(i.voxels) for i in instances_of(label_components(mask > 0)))
        assert set(sizes) <= set(wanted)
        assert case.images["FLAIR"].is_file()
    again = write_true_negatives(run, tmp_path / "again", source, distance_mm=4.0, seed=3)
    for path in (tmp_path / "tn").glob("*.nii.gz"):
        assert path.read_bytes() == (again.parent / path.name).read_bytes()
    few = write_true_negatives(run, tmp_path / "few", distance_mm=4.0, most=1, seed=3)
    assert {nifti.read_labels(case.instances).max() for case in read_manifest(few, ("FLAIR", "T1w"))} == {1}
    with pytest.raises(InputError, match="its channels are FLAIR, T1w, expected T2w"):
        write_true_negatives(run, tmp_path / "no", t1w="T2w")
    with pytest.raises(InputError, match="no scan has normal-appearing tissue"):
        write_true_negatives(run, tmp_path / "no", distance_mm=500.0)


@pytest.mark.slow
def test_runs_of_a_network(tmp_path, monkeypatch):
    """The tiny network on anisotropic scans: predicted, reference and given instances are explained, then analysed together."""
    monkeypatch.setattr("xaiseg.cohort.tables.summary_figure", lambda *_, **__: None)
    names = ["sub-01", "sub-02", "sub-03"]
    lines = [write_case(tmp_path / "in", name, seed=n) for n, name in enumerate(names)]
    manifest = write_manifest(tmp_path / "in" / "cases.tsv", lines)
    model, settings = tiny_model(), Settings(samples=2, chunk=8)

    def explained(source, name, instances):
        request = Request(source, tmp_path / name, instances=instances, pictures=False, min_voxels=1)
        explain(model, request, settings, say=lambda _: None)
        return tmp_path / name

    out, missed = explained(manifest, "out", "predicted"), explained(manifest, "missed", "reference")
    given = []
    for n, (name, line) in enumerate(zip(names, lines, strict=True)):
        subject = name.removeprefix("sub-")
        labels = nifti.read_labels(out / f"sub-{subject}/anat/{name}_{INSTANCES}")
        reference = nifti.read_labels(tmp_path / "in" / line["reference"])
        inside = np.pad(np.ones(np.array(labels.shape) - 8, bool), 4)
        spacing = np.abs(np.diag(RAS))[:3].tolist()
        rng = np.random.default_rng(n)
        regions = sample_true_negatives(labels + reference, inside, spacing, rng, instances_of(labels), 2.0)
        assert len(regions) >= 1
        nifti.write(tmp_path / "in" / f"tn_{n}.nii.gz", label_map(regions, labels.shape), RAS)
        given.append({**line, "instances": f"tn_{n}.nii.gz"})
    normal = explained(write_manifest(tmp_path / "in" / "tn.tsv", given), "normal", "given")
    found = quiet(out, missed=missed, normal=normal)
    peaks = {r["group"]: r for r in found["groups"] if (r["measure"], r["channel"]) == ("peak", "FLAIR")}
    assert list(peaks) == ["TP", "FP", "FN", "TN"]
    assert peaks["FN"]["n"] == 3
    assert min(peaks["TP"]["median"], peaks["FP"]["median"]) > peaks["TN"]["median"]
    # the maps' mean in the lesion is what the table says of it
    inside = [r for r in found["profiles"] if r["channel"] == "FLAIR" and r["to_mm"] <= 0 and r["group"] == "TP"]
    expected = next(
        r for r in found["groups"] if (r["measure"], r["channel"], r["group"]) == ("mean_inside", "FLAIR", "TP")
    )
    assert min(r["mean"] for r in inside) < expected["q3"]
    assert max(r["mean"] for r in inside) > expected["q1"]
    assert (
        any("no error detection" in note or "expected" in note for note in found["notes"]) or found["error_detection"]
    )
