"""The commands `synthetic` and `counterfactual`: their tables against images altered by hand and segmented whole."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from conftest import TinyRun
from nibabel.affines import apply_affine
from scipy import ndimage
from tiny import snapshot, stored, table, write_manifest, write_model

from xaiseg._types import Instance
from xaiseg.analysis import counterfactual_run
from xaiseg.analysis import synthetic as synthetic_run
from xaiseg.analysis.normal_tissue import lesions_of, seed_of
from xaiseg.analysis.reopened import open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_explainer import method_of
from xaiseg.analysis.run_tables import read_run
from xaiseg.analysis.synthetic_plan import Design, choose_cases, contrasts_of, directions, planned
from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.cohort.explaining import case_key
from xaiseg.errors import InputError
from xaiseg.imaging.white_matter import white_matter
from xaiseg.instances.lesion_filling import fill

SHAPE = (30, 32, 28)
AFFINE = np.array([[1.5, 0, 0, -21.0], [0, 1.25, 0, -17.0], [0, 0, 1.5, -11.0], [0, 0, 0, 1]])
BLOBS = (((9, 9, 9), 2.3), ((21, 22, 18), 2.6), ((21, 22, 10), 2.0))
CASES = ("sub-01", "sub-02")
CHEAP = ("--no-saliency", "--lesions-per-scan", "1", "--diameter", "5", "--contrast", "0,4")


def write_brain(folder: Path, name: str, seed: int) -> dict[str, str]:
    """A box of fluid, grey and white matter with three lesions, of which the first two are in the reference; stored as LAS."""
    rng = np.random.default_rng(seed)
    grid = np.indices(SHAPE)
    depth = np.minimum.reduce([np.minimum(i, n - 1 - i) for i, n in zip(grid, SHAPE, strict=True)])
    fluid = (depth == 2) | (np.abs(grid.transpose(1, 2, 3, 0) - (15, 16, 14)).max(-1) <= 1)
    grey = (depth == 3) | (depth == 4)
    flair = np.select([fluid, grey], [90.0, 101.0], 100.0) + 5 * rng.standard_normal(SHAPE)
    t1w = np.select([fluid, grey], [20.0, 60.0], 100.0) + 5 * rng.standard_normal(SHAPE)
    reference = np.zeros(SHAPE, np.uint8)
    for n, (centre, radius) in enumerate(BLOBS):
        blob = ((grid.transpose(1, 2, 3, 0) - centre) ** 2).sum(-1) <= radius**2
        flair[blob] += 60
        t1w[blob] -= 35
        reference[blob] = n < 2
    line = {"case": name}
    brain = depth >= 2
    for column, array in (("FLAIR", flair * brain), ("T1w", t1w * brain), ("reference", reference)):
        line[column] = f"{name}_{column}.nii.gz"
        kept = array if column == "reference" else array.astype(np.float32)
        nib.save(stored(kept, "LAS", AFFINE), folder / line[column])
    return line


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("brains")
    model = write_model(folder / "model", "RAS")
    manifest = write_manifest(folder / "cases.tsv", [write_brain(folder, case, n) for n, case in enumerate(CASES, 1)])
    options = ["--samples", "1", "--aggregate", "mean", "--no-pictures"]
    assert main(["explain", str(manifest), str(folder / "out"), "--model", str(model), *options]) == 0
    return TinyRun(folder / "out", model, manifest)


@pytest.fixture
def brains(explained: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of the run, to write to."""
    return explained._replace(out=Path(shutil.copytree(explained.out, tmp_path / "out")))


def call(command: str, run: TinyRun, *options: object) -> list[dict[str, str]]:
    assert main([command, str(run.out), "--model", str(run.model), *map(str, options)]) == 0
    return table(run.out / "analysis" / f"{command}.tsv")


def reopened(run: TinyRun, case: str):
    opened_run = read_run(run.out)
    model = reopen_model(opened_run, load_model(str(run.model)))
    (opened,) = open_scans(opened_run, [], cases=[case])
    return opened_run, model, predictor_of(opened_run, model), opened


def ball(opened, row: dict[str, str]) -> np.ndarray:
    """The weight of a ball with a border of 1 mm, on the whole grid."""
    world = apply_affine(opened.scan.grid.affine, np.indices(opened.scan.image.shape[:3]).transpose(1, 2, 3, 0))
    centre = [float(row[f"centre_{axis}_mm"]) for axis in "xyz"]
    return np.clip(0.5 - (np.linalg.norm(world - centre, axis=-1) - float(row["diameter_mm"]) / 2), 0, 1)


def test_rows_are_those_of_balls_put_in_by_hand(brains):
    options = ["--lesions-per-scan", 1, "--diameter", "4,6", "--contrast", "0,5", "--roughness", 0, "--samples", 1]
    rows = call("synthetic", brains, *options)
    assert len(rows) == 2 * 2 * 3 * 2
    for case in CASES:
        run, model, predictor, opened = reopened(brains, case)
        image = opened.scan.image
        lesions = lesions_of(run, opened)
        assert lesions.sum() > (opened.labels > 0).sum()
        white = white_matter(image, lesions).mask
        explain = method_of(run, model, samples=1).explain
        own = [row for row in rows if row["case"] == case]
        outer = ball(opened, max(own, key=lambda row: float(row["diameter_mm"])))
        # all of the largest ball is white matter; the tissue around is what lies within 8 mm of it
        assert white[outer > 0.5].all()
        near = ndimage.distance_transform_edt(outer < 0.5, sampling=opened.scan.grid.spacing) <= 8
        around = image[near & (outer == 0) & white & ~lesions].astype(float)
        spread = 1.4826 * np.median(np.abs(around - np.median(around, 0)), 0)
        for row in own if case == CASES[0] else own[-1:]:
            weight = ball(opened, row)
            voxels = np.argwhere(weight >= 0.5)
            contrast = np.array([float(row[f"contrast_{name}"]) for name in ("FLAIR", "T1w")])
            signs = {"FLAIR alone": (1, 0), "T1w alone": (0, -1), "FLAIR and T1w": (1, -1)}[row["series"]]
            np.testing.assert_allclose(contrast, float(row["contrast"]) * np.array(signs))
            added = np.array([float(row["added_FLAIR"]), float(row["added_T1w"])])
            np.testing.assert_allclose(added, contrast * spread, rtol=1e-5)  # seven digits in the table
            whole = np.where(image != 0, image + weight[..., None] * added, 0).astype(np.float32)
            logits = np.asarray(predictor(whole))
            p = np.asarray(predictor.probability(logits))[tuple(voxels.T)]
            np.testing.assert_allclose(float(row["mean_probability"]), p.mean(), atol=1e-5)  # float32, other tiles
            np.testing.assert_allclose(float(row["max_probability"]), p.max(), atol=1e-5)
            assert row["detected"] == str(int((p > model.spec.threshold).any()))
            assert int(row["voxels"]) == len(voxels)
            if row["contrast"] == "5" and row["diameter_mm"] == "4":
                instance = Instance(1, voxels.astype(np.int32))
                (found,), _ = explain(case_key(0, case), predictor, jnp.asarray(whole), [instance])
                peak = np.asarray(found.values)[..., 0].max()
                np.testing.assert_allclose(float(row["saliency_FLAIR_peak"]), peak, rtol=1e-4)
    assert {row["detected"] for row in rows} == {"0", "1"}
    summary = table(brains.out / "analysis/synthetic_summary.tsv")
    for row in summary:
        of = [r for r in rows if r["series"] == row["series"] and row["diameter_mm"] in ("all", r["diameter_mm"])]
        measure = {"detection_rate": "detected"}.get(row["measure"], row["measure"])
        if measure in of[0]:
            values = [float(r[measure]) for r in of if r["contrast"] == row["contrast"]]
            np.testing.assert_allclose(float(row["estimate"]), np.mean(values), rtol=1e-5, atol=1e-7)
            assert int(row["lesions"]) == len(values)
    assert {row["measure"] for row in summary} >= {"detected_50", "mean_probability", "saliency_T1w_peak"}
    record = json.loads((brains.out / "analysis/synthetic.json").read_text())
    assert record["settings"]["method"]["smoothgrad"]["samples"] == 1
    assert record["settings"]["method"]["smoothgrad"]["aggregate"] == "mean"
    pictures = {"synthetic.png", "synthetic_lesions.png"}
    assert set(record["files"]) == {"synthetic.tsv", "synthetic_summary.tsv", *pictures}
    for name in record["columns"]:
        assert list(record["columns"][name]) == list(table(brains.out / "analysis" / name)[0])


def test_a_seed_gives_the_same_files_and_another_other_places(brains):
    found = []
    for seed in (3, 3, 4):
        call("synthetic", brains, *CHEAP, "--cases", CASES[0], "--seed", seed)
        files = snapshot(brains.out / "analysis")
        found.append({name: content for name, content in files.items() if not name.endswith(".json")})
    assert found[0] == found[1]
    assert found[0]["synthetic.tsv"] != found[2]["synthetic.tsv"]


@pytest.mark.parametrize("command", ["synthetic", "counterfactual"])
def test_an_interruption_leaves_the_earlier_experiment_whole(brains, command, monkeypatch):
    cheap = CHEAP if command == "synthetic" else ("--no-saliency", "--lesions", 2, "--neighbours", 0)
    call(command, brains, *cheap)
    before = snapshot(brains.out)
    module = synthetic_run if command == "synthetic" else counterfactual_run
    rows = "insertion_rows" if command == "synthetic" else "counterfactual_rows"
    real, calls = getattr(module, rows), []

    def stop_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, rows, stop_at_the_second)
    assert main([command, str(brains.out), "--model", str(brains.model), *map(str, cheap)]) == 130
    assert snapshot(brains.out) == before


def test_the_shape_of_a_real_lesion_and_contrasts_as_intensities(brains):
    options = ["--shape", "lesion", "--unit", "intensity", "--sign", "FLAIR=-", "--series", "FLAIR", "--diameter", "6"]
    rows = call("synthetic", brains, *CHEAP[:3], "--contrast", "1:2:0.5", "--cases", "sub-02", *options)
    assert [row["contrast"] for row in rows] == ["1", "1.5", "2"]
    assert [row["added_FLAIR"] for row in rows] == ["-1", "-1.5", "-2"]
    assert {row["added_T1w"] for row in rows} == {"0"}
    assert {row["case"] for row in rows} == {"sub-02"}
    assert int(rows[0]["like"]) in [int(row["lesion"]) for row in table(brains.out / "lesions.tsv")]
    # four voxels across
    assert float(rows[0]["volume_mm3"]) == pytest.approx(np.pi / 6 * 6**3, rel=0.2)


def test_given_centres_are_world_coordinates(brains):
    """Of a scan stored as LAS and taken as RAS; the second centre lies between voxels."""
    options = ["--centre=1.5,10.5,-2", "--centre=-3.25,11,4", "--series", "all", "--roughness", 0]
    rows = call("synthetic", brains, *CHEAP, "--cases", "sub-01", *options)
    assert [row["place"] for row in rows] == ["1", "1", "2", "2"]
    assert [float(rows[2][f"centre_{axis}_mm"]) for axis in "xyz"] == pytest.approx([-3.25, 11, 4])
    *_, opened = reopened(brains, "sub-01")
    for row in rows:
        assert int(row["voxels"]) == (ball(opened, row) >= 0.5).sum()


def test_channels_of_other_names(explained):
    """No white matter is told from them: places are given, and spreads are of all tissue."""
    run, _, _, opened = reopened(explained, "sub-01")
    names = ("T2w", "PD")
    with pytest.raises(InputError, match=r"places cannot be drawn.*channels are T2w, PD.*--centre"):
        planned(run, opened, Design(), names, 0, [])
    notes: list[str] = []
    centre = (-3.0, 10.5, 4.0)
    (lesion,) = planned(run, opened, Design(centres_mm=(centre,), diameters_mm=(5.0,)), names, 0, notes)
    assert len(notes) == 1
    assert "all tissue" in notes[0]
    assert lesion.centre_mm == pytest.approx(centre)
    with pytest.raises(InputError, match="FLAIR and T1w among them"):
        planned(run, opened, Design(), ("FLAIR", "PD"), 0, [])


def test_series_and_signs():
    assert {n: d.tolist() for n, d in directions(Design(), ("T2w",)).items()} == {"T2w alone": [1]}
    four = directions(Design(signs={"b": -1}), ("a", "b", "c", "MPRAGE"))
    assert {n: d.tolist() for n, d in four.items()} == {
        "a alone": [1, 0, 0, 0],
        "b alone": [0, -1, 0, 0],
        "c alone": [0, 0, 1, 0],
        "a, b, c and MPRAGE": [1, -1, 1, -1],
    }
    with pytest.raises(InputError, match="4 at most"):
        directions(Design(series=tuple("abcde")), tuple("abcde"))
    contrasts, which = contrasts_of(Design(contrasts=(0, 2)), directions(Design(), ("FLAIR", "T1w")))
    assert contrasts.tolist() == [[0, 0], [2, 0], [0, -2], [2, -2]]
    assert which == {"FLAIR alone": [0, 1], "T1w alone": [0, 2], "FLAIR and T1w": [0, 3]}
    with pytest.raises(InputError, match="expected rising numbers"):
        contrasts_of(Design(contrasts=(2, 0)), {})


def test_scans_are_drawn_patient_by_patient(explained):
    run = read_run(explained.out)
    names = ["a1", "a2", "a3", "b1", "c1", "c2"]
    run.cases[:] = [{"case": name, "patient": name[0], "status": "empty" if name == "b1" else "done"} for name in names]
    run.cases.append({"case": "d1", "patient": "d", "status": "failed"})
    for seed in range(4):
        for number in (1, 2, 3, 5):
            drawn = choose_cases(run, (), number, seed)
            assert len(drawn) == number
            assert len({name[0] for name in drawn}) == min(number, 3)
            assert drawn == sorted(drawn)
    assert choose_cases(run, ("c2", "a1"), 1, 0) == ["c2", "a1"]


def test_what_cannot_be_done_is_said(brains, fails):
    ask = ("synthetic", brains.out, "--model", brains.model)
    assert "no segmented scan sub-09" in fails(*ask, "--cases", "sub-09")
    assert "lies in no voxel of the scan" in fails(*ask, "--centre=900,0,0")
    assert "lies in the background, expected a place in the brain" in fails(*ask, "--centre=-21,-17,-11")
    assert "no ball of 60 mm" in fails(*ask, "--diameter", "60")
    assert "series PD: the model's channels are FLAIR, T1w" in fails(*ask, "--series", "PD")
    assert "sign of PD: the model's channels are FLAIR, T1w" in fails(*ask, "--sign", "PD=+")
    assert "was explained by smoothgrad, not by vargrad" in fails(*ask, "--method", "vargrad")
    assert "the model of the run" in fails(*ask[:3], "example")
    ask = ("counterfactual", brains.out, "--model", brains.model)
    assert "mm³" in fails(*ask, "--volume", "1e6:")
    assert "no lesion 99 of sub-01, its explained lesions there are" in fails(*ask, "--only", "sub-01:99")
    assert "no explained lesions of that scan" in fails(*ask, "--only", "sub-07:1")
    assert not (brains.out / "analysis").exists()
    path = brains.out / "cases.tsv"
    path.write_text(path.read_text().replace("\tdone\t", "\tleft\t", 1))
    assert "left to do" in fails(*ask)


def test_an_input_that_was_moved(brains, fails, tmp_path):
    path = brains.out / "logs/settings.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"input": str(tmp_path / "gone.tsv")}))
    for command, *cheap in (("synthetic", *CHEAP, "--scans", 1), ("counterfactual", "--no-saliency", "--lesions", 1)):
        assert "gone.tsv" in fails(command, brains.out, "--model", brains.model)
        call(command, brains, *cheap, "--source", brains.manifest)


@pytest.mark.parametrize(
    "option",
    [
        "--contrast=3:1:1",
        "--contrast=-1,2",
        "--contrast=a",
        "--centre=1,2",
        "--diameter=0",
        "--diameter=4,4",
        "--sign=FLAIR",
        "--shape=cube",
    ],
)
def test_options_of_the_wrong_form(explained, option):
    with pytest.raises(SystemExit, match="2"):
        main(["synthetic", str(explained.out), "--model", "example", option])


def test_filled_lesions_are_those_of_both_images_segmented_whole(brains):
    rows = call("counterfactual", brains, "--groups", "TP,FP", "--samples", 1, "--neighbours", 15)
    summary = table(brains.out / "analysis/counterfactual_summary.tsv")
    assert {(r["case"], r["filled"]) for r in rows} == {
        (r["case"], r["lesion"]) for r in table(brains.out / "lesions.tsv")
    }
    assert {row["role"] for row in rows} == {"filled", "neighbour"}
    for case in CASES[:1]:
        run, model, predictor, opened = reopened(brains, case)
        image, step = opened.scan.image, np.array(opened.scan.grid.spacing)
        lesions = lesions_of(run, opened)
        white = white_matter(image, lesions).mask
        method = method_of(run, model, samples=1)
        for label in sorted({int(row["filled"]) for row in rows if row["case"] == case}):
            rng = np.random.default_rng(seed_of(0, case, label))
            mask = opened.labels == label
            filled = fill(rng, image, mask, white)
            kept = lesions & (
                ndimage.distance_transform_edt(~mask) > 6
            )  # the blobs lie farther apart, and are no larger
            kept |= (opened.labels > 0) & ~mask
            filled = np.where(kept[..., None], image, filled)
            assert (filled == image).all(-1)[white & (ndimage.distance_transform_edt(~mask) > 6)].all()
            found = {row["lesion"]: row for row in rows if row["case"] == case and row["filled"] == str(label)}
            places = np.argwhere(mask) * step
            near = {str(label)}
            for other in {int(n) for n in run.lesions["lesion"][run.lesions["case"] == case]} - {label}:
                apart = np.linalg.norm(places[:, None] - np.argwhere(opened.labels == other) * step, axis=-1).min()
                if apart <= 15:
                    near.add(str(other))
                    assert float(found[str(other)]["distance_mm"]) == pytest.approx(apart, rel=1e-5)
            assert set(found) == near
            for moment, one in (("before", image), ("after", filled)):
                probability = np.asarray(predictor.probability(predictor(one)))
                for name, row in found.items():
                    p = probability[opened.labels == int(name)]
                    np.testing.assert_allclose(float(row[f"{moment}_mean_probability"]), p.mean(), atol=1e-5)
                    assert row[f"{moment}_detected"] == str(int((p > model.spec.threshold).any()))
            instance = Instance(label, np.argwhere(mask).astype(np.int32))
            (after,), _ = method.explain(case_key(0, case), predictor, jnp.asarray(filled), [instance])
            peak = np.asarray(after.values)[..., 0].max()
            np.testing.assert_allclose(float(found[str(label)]["after_saliency_FLAIR_peak"]), peak, rtol=1e-4)
            assert int(found[str(label)]["changed_voxels"]) == (filled != image).any(-1).sum()
    own = [row for row in rows if row["role"] == "filled"]
    assert {row["before_detected"] for row in own} == {"1"}
    assert {row["after_detected"] for row in own} == {"0"}
    means = {(r["role"], r["measure"]): float(r["estimate"]) for r in summary}
    after = [float(row["after_mean_probability"]) for row in own]
    assert means["filled", "after_mean_probability"] == pytest.approx(np.mean(after), rel=1e-5)
    change = [float(r["after_mean_probability"]) - float(r["before_mean_probability"]) for r in rows if r not in own]
    assert means["neighbour", "change_of_mean_probability"] == pytest.approx(np.mean(change), rel=1e-4, abs=1e-6)
    record = json.loads((brains.out / "analysis/counterfactual.json").read_text())
    pictures = {"counterfactual.png", "counterfactual_lesions.png"}
    assert set(record["files"]) == {"counterfactual.tsv", "counterfactual_summary.tsv", *pictures}
    for name in record["columns"]:
        assert list(record["columns"][name]) == list(table(brains.out / "analysis" / name)[0])


def test_a_lesion_named_is_filled_alone_and_the_same_each_time(brains):
    label = next(r["lesion"] for r in table(brains.out / "lesions.tsv") if r["case"] == "sub-02")
    found = []
    for _ in range(2):
        rows = call("counterfactual", brains, "--only", f"sub-02:{label}", "--no-saliency", "--neighbours", 0)
        assert [(r["case"], r["lesion"], r["role"]) for r in rows] == [("sub-02", label, "filled")]
        found.append(snapshot(brains.out / "analysis"))
        found[-1].pop("counterfactual.json")
    assert found[0] == found[1]
