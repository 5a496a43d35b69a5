"""What a run writes, recomputed from the files it read."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from tiny import CASE, CHANNELS, RAS, SHAPE, Explain, blob, onto, table, timeless, volumes, write_case, write_manifest

import xaiseg
from xaiseg.checkpoints import load_model
from xaiseg.checkpoints.folder import model_hash
from xaiseg.cli import main
from xaiseg.cohort.stages import WORKER
from xaiseg.saliency import gradcam_pp, smoothgrad

MEASURES = ("peak", "minimum", "mean_inside", "mean_ring", "positive_mass", "negative_mass", "peak_se")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, manifest: Path, native_model: Path) -> Path:
    """A run with both methods, its pictures included."""
    out = tmp_path_factory.mktemp("outputs") / "new" / "out"
    options = ["--model", str(native_model), "--samples", "2", "--chunk", "4"]
    methods = ["--method", "smoothgrad", "--method", "gradcam++"]
    assert main(["explain", str(manifest), str(out), *options, *methods]) == 0
    return out


def place(out: Path, name: str, case: str = CASE) -> Path:
    folder = out.joinpath(*case.split("_"), "anat")
    return folder / f"{case}_{name}"


def load(out: Path, name: str, case: str = CASE) -> nib.Nifti1Image:
    return nib.load(place(out, f"space-orig_{name}.nii.gz", case))


def read(out: Path, name: str) -> np.ndarray:
    return np.asarray(load(out, name).dataobj)


def zscore(volume: np.ndarray) -> np.ndarray:
    values = volume[volume != 0].astype(np.float64)
    return np.where(volume != 0, (volume - values.mean()) / values.std(), 0).astype(np.float32)


def own_maps(
    model_folder: Path, images: Sequence[nib.Nifti1Image], labels: np.ndarray, case: str, method: str = "smoothgrad"
) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
    """The explainer's own maps and standard errors on the whole grid of `images`, by label, called without the runner."""
    model = load_model(model_folder)
    image = jnp.asarray(np.stack([zscore(np.asarray(i.dataobj)) for i in images], -1))
    instances = xaiseg.instances_of(labels)
    explain = smoothgrad(samples=2, noise=0.05, chunk=4)
    if method == "gradcam++":
        explain = gradcam_pp(layer=model.spec.default_layer)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(case.encode()))
    maps, _ = explain(key, xaiseg.StitchedPredictor.of(model), image, instances)
    whole = {}
    for instance, saliency in zip(instances, maps, strict=True):
        box = tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))
        values = np.zeros((*image.shape[:3], saliency.values.shape[-1]), np.float32)
        values[box] = saliency.values
        error = None
        if saliency.standard_error is not None:
            error = np.zeros_like(values)
            error[box] = saliency.standard_error
        whole[instance.label] = values, error
    return whole


def test_every_file_and_no_other(out: Path) -> None:
    lesions = [f"space-orig_desc-{m}_lesion-00{n}_saliency" for m in ("smoothgrad", "gradcampp") for n in (1, 2)]
    names = [f"{lesion}.{ending}" for lesion in lesions for ending in ("nii.gz", "png")]
    names += ["desc-smoothgrad_convergence.png", "desc-lesions.tsv", "space-orig_desc-instances_dseg.nii.gz"]
    names += ["space-orig_label-L_mask.nii.gz", "space-orig_label-L_probseg.nii.gz"]
    top = ["dataset_description.json", ".bidsignore", "desc-smoothgrad_saliency.json", "desc-gradcampp_saliency.json"]
    top += ["lesions.tsv", "lesions.json", "cases.tsv", "cases.json", "desc-smoothgrad_summary.png"]
    top += ["README.md"] + [f"space-orig_{n}.json" for n in ("label-L_probseg", "label-L_mask", "desc-instances_dseg")]
    top += [f"logs/{name}" for name in ("run.json", "settings.json", "plan.json", "failures.tsv", "timings.tsv")]
    top += [f"logs/cases/{CASE}.jsonl", f"logs/{WORKER}.log", "logs/locks/run", "logs/locks/plan", "logs/locks/tables"]
    expected = {out / name for name in top} | {place(out, name) for name in names}
    assert {p for p in out.rglob("*") if p.is_file()} == expected
    for picture in out.rglob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_log_holds_settings_versions_the_model_and_the_files(out: Path, native_model: Path) -> None:
    log = json.loads((out / "logs" / "run.json").read_text())
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert set(log["files"]) == {file for file in files if not file.startswith("logs/locks/")}
    assert log["settings"]["methods"] == ["smoothgrad", "gradcam++"]
    assert {k: log["settings"][k] for k in ("samples", "noise", "seed", "aggregate", "chunk")} == {
        "samples": 2, "noise": 0.05, "seed": 0, "aggregate": "signed_max", "chunk": 4,
    }  # fmt: skip
    assert log["versions"]["xaiseg"] == xaiseg.__version__
    assert log["versions"]["jax"] == jax.__version__
    assert log["versions"]["numpy"] == np.__version__
    assert log["model"]["hash"] == model_hash(load_model(native_model))
    assert log["model"]["threshold"] == 0.5
    assert log["methods"]["gradcampp"]["layer"] == "bottleneck.conv"
    assert log["cases"][0]["case"] == CASE


def test_sidecars_describe_the_method_and_the_dataset(out: Path, native_model: Path) -> None:
    sidecar = json.loads((out / "desc-smoothgrad_saliency.json").read_text())
    assert sidecar["Settings"] | {"samples": 2, "noise": 0.05, "seed": 0} == sidecar["Settings"]
    assert sidecar["Channels"] == list(CHANNELS)
    assert sidecar["ModelHash"] == model_hash(load_model(native_model))
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "xaiseg"
    assert description["SourceDatasets"]


def test_tables_have_the_described_columns(out: Path) -> None:
    for name in ("lesions", "cases"):
        rows = table(out / f"{name}.tsv")
        assert list(rows[0]) == list(json.loads((out / f"{name}.json").read_text()))
    assert (out / "lesions.tsv").read_bytes() == place(out, "desc-lesions.tsv").read_bytes()


def test_full_size_outputs_lie_where_the_scan_lies(out: Path, manifest: Path) -> None:
    scan = nib.load(manifest.parent / f"{CASE}_FLAIR.nii.gz").header
    assert (int(scan["sform_code"]), int(scan["qform_code"])) == (1, 3)
    for name in ("label-L_probseg", "label-L_mask", "desc-instances_dseg"):
        header = load(out, name).header
        assert header.get_data_shape() == SHAPE
        for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim"):
            np.testing.assert_array_equal(header[field][..., :4] if field == "pixdim" else header[field],
                                          scan[field][..., :4] if field == "pixdim" else scan[field])  # fmt: skip
        np.testing.assert_array_equal(header.get_qform(), scan.get_qform())


def test_a_crop_keeps_the_codes_and_is_tight(out: Path) -> None:
    image = load(out, "desc-smoothgrad_lesion-001_saliency")
    assert image.ndim == 4
    assert image.shape[3] == len(CHANNELS)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 3)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)  # mm; a qform is a float32 quaternion
    values = np.asarray(image.dataobj).any(-1)
    assert values.shape != SHAPE
    for axis in range(3):
        profile = values.any(tuple(a for a in range(3) if a != axis))
        assert profile[0]
        assert profile[-1]


def test_masks_follow_from_the_probability(out: Path) -> None:
    probability, mask, labels = (read(out, n) for n in ("label-L_probseg", "label-L_mask", "desc-instances_dseg"))
    np.testing.assert_array_equal(mask, probability > 0.5)
    np.testing.assert_array_equal(labels > 0, mask)
    assert (labels[8, 9, 8], labels[16, 19, 13]) == (1, 2)


ROTATED = np.eye(4)
ROTATED[:3, :3] = (
    np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
    @ np.array([[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]])
)  # fmt: skip
OBLIQUE = ROTATED @ RAS


@pytest.mark.parametrize("orientation", ["native", "RAS"])
@pytest.mark.parametrize(("codes", "affine"), [("RAS", RAS), ("LAS", RAS), ("PSR", OBLIQUE)])
def test_maps_lie_where_the_explainer_puts_them(
    orientation: str,
    codes: str,
    affine: np.ndarray,
    explain: Explain,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model = request.getfixturevalue(f"{orientation.lower()}_model")
    line = write_case(tmp_path, CASE, codes=codes, affine=affine)
    out = explain("out", source=write_manifest(tmp_path / "cases.tsv", [line]), model=model)
    scans = [nib.load(tmp_path / line[channel]) for channel in CHANNELS]
    labels = load(out, "desc-instances_dseg")
    assert labels.shape == scans[0].shape
    if orientation == "RAS":
        scans, labels = [nib.as_closest_canonical(s) for s in scans], nib.as_closest_canonical(labels)
    own = own_maps(model, scans, np.asarray(labels.dataobj).astype(np.int32), CASE)
    explained = [int(row["lesion"]) for row in table(out / "lesions.tsv")]
    assert len(explained) == 2
    for label in explained:
        expected, _ = own[label]
        found = load(out, f"desc-smoothgrad_lesion-{label:03d}_saliency")
        values = onto(found, scans[0].affine, scans[0].shape)
        # The same computation but for the last bit of the normalised intensities.
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_ras_model_sees_a_scan_and_its_reoriented_twin_alike(
    explain: Explain, ras_model: Path, tmp_path: Path
) -> None:
    runs = {}
    for codes in ("RAS", "LAS", "PSR"):
        line = write_case(tmp_path / codes, CASE, codes=codes)
        runs[codes] = explain(f"out-{codes}", source=write_manifest(tmp_path / f"{codes}.tsv", [
            {k: v if k == "case" else f"{codes}/{v}" for k, v in line.items()}]), model=ras_model)  # fmt: skip
        assert nib.aff2axcodes(load(runs[codes], "label-L_probseg").affine) == tuple(codes)
    names = ["label-L_probseg", "desc-instances_dseg"] + [f"desc-smoothgrad_lesion-00{n}_saliency" for n in (1, 2)]
    for codes in ("LAS", "PSR"):
        for name in names:
            np.testing.assert_array_equal(onto(load(runs[codes], name), RAS), onto(load(runs["RAS"], name), RAS))
        for here, there in zip(table(runs[codes] / "lesions.tsv"), table(runs["RAS"] / "lesions.tsv"), strict=True):
            for column in ("lesion", "group", "voxels", "overlap", "smoothgrad_FLAIR_peak", "smoothgrad_T1w_mean_ring"):
                assert here[column] == there[column]
            for column in ("centroid_x_mm", "centroid_y_mm", "centroid_z_mm", "volume_mm3"):
                assert float(here[column]) == pytest.approx(float(there[column]), abs=1e-4)  # float32 affines


def around(mask: np.ndarray) -> np.ndarray:
    """The mask and the 18 neighbours of its voxels, by shifting it."""
    padded = np.pad(mask, 1)
    grown = np.zeros_like(padded)
    for i, j, k in np.ndindex(3, 3, 3):
        if abs(i - 1) + abs(j - 1) + abs(k - 1) <= 2:
            grown |= np.roll(padded, (i - 1, j - 1, k - 1), (0, 1, 2))
    return grown[1:-1, 1:-1, 1:-1]


@pytest.mark.parametrize("method", ["smoothgrad", "gradcam++"])
def test_measures_of_the_maps(method: str, out: Path, manifest: Path, native_model: Path) -> None:
    key = method.replace("++", "pp")
    scans = [nib.load(manifest.parent / f"{CASE}_{channel}.nii.gz") for channel in CHANNELS]
    labels = read(out, "desc-instances_dseg").astype(np.int32)
    own = own_maps(native_model, scans, labels, CASE, method)
    for row in table(out / "lesions.tsv"):
        label = int(row["lesion"])
        inside = labels == label
        ring = around(around(inside)) & ~inside
        values = onto(load(out, f"desc-{key}_lesion-{label:03d}_saliency"), scans[0].affine).astype(np.float64)
        error = own[label][1]
        for channel, name in enumerate([f"{key}_FLAIR", f"{key}_T1w"] if method == "smoothgrad" else [key]):
            v = values[..., channel]
            expected = [v.max(), v.min(), v[inside].mean(), v[ring].mean(), v.clip(0).sum(), v.clip(None, 0).sum()]
            if error is not None:
                expected.append(error[..., channel].flat[v.argmax()])
            else:
                assert row[f"{name}_peak_se"] == "n/a"
            found = [float(row[f"{name}_{measure}"]) for measure in MEASURES[: len(expected)]]
            # Seven digits are written; the standard error is a difference of close float32 values.
            np.testing.assert_allclose(found[:6], expected[:6], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(found[6:], expected[6:], rtol=1e-2, atol=1e-7)
        assert int(row[f"{key}_samples"]) == (2 if method == "smoothgrad" else 1)
    taken = [row for row in table(out / "logs" / "timings.tsv") if row["unit"] == key]
    assert [row["lesions"] for row in taken] == ["1,2"]
    assert all(float(row["seconds"]) > 0 for row in taken)


def windows_of(voxels: np.ndarray) -> np.ndarray:
    """Which of the windows of 16³ that step by 12 hold which voxels, `(windows, voxels)`, counted by hand for 24×28×22."""
    starts = [(x, y, z) for x in (0, 8) for y in (0, 12) for z in (0, 6)]
    return np.array([((voxels >= s) & (voxels < np.array(s) + 16)).all(1) for s in starts])


def test_measures_of_the_lesions(out: Path) -> None:
    labels, probability = read(out, "desc-instances_dseg"), read(out, "label-L_probseg").astype(np.float64)
    reference = volumes()["reference"] > 0
    rows = table(out / "lesions.tsv")
    assert [row["group"] for row in rows] == ["TP", "FP"]
    for row in rows:
        inside = labels == int(row["lesion"])
        voxels = np.argwhere(inside)
        held = windows_of(voxels)
        assert (row["case"], row["subject"], row["session"]) == (CASE, "01", "1")
        assert int(row["voxels"]) == len(voxels)
        assert float(row["volume_mm3"]) == pytest.approx(len(voxels) * 1.0 * 0.5 * 4.0, rel=1e-6)
        centre = RAS[:3, :3] @ voxels.mean(0) + RAS[:3, 3]
        assert [float(row[f"centroid_{a}_mm"]) for a in "xyz"] == pytest.approx(centre.tolist(), abs=1e-5)
        assert int(row["overlap"]) == (inside & reference).sum()
        found = blob((9, 9, 8), 2.3)  # the reference's lesion there
        iou = (inside & found).sum() / (inside | found).sum()
        assert float(row["iou"]) == pytest.approx(iou if row["group"] == "TP" else 0, rel=1e-6)
        assert float(row["mean_probability"]) == pytest.approx(probability[inside].mean(), rel=1e-6)
        assert float(row["max_probability"]) == pytest.approx(probability[inside].max(), rel=1e-6)
        assert int(row["smoothgrad_windows"]) == held.any(1).sum()
        assert int(row["smoothgrad_rows"]) == held.sum()


def test_agreement_with_the_reference(out: Path) -> None:
    mask, reference = read(out, "label-L_mask") > 0, volumes()["reference"] > 0
    (row,) = table(out / "cases.tsv")
    true, false = (mask & reference).sum(), (mask & ~reference).sum()
    missed = (~mask & reference).sum()
    kappa = (1 - 0.001) * reference.sum() / (0.001 * (~reference).sum())
    assert float(row["dice"]) == pytest.approx(2 * true / (2 * true + false + missed), rel=1e-6)
    assert float(row["ndsc"]) == pytest.approx(2 * true / (kappa * false + 2 * true + missed), rel=1e-6)
    # One blob of the two is in the reference, and one lesion of the reference is no blob.
    assert (row["TP"], row["FP"], row["FN"]) == ("1", "1", "1")
    assert (row["status"], row["lesions"], row["explained"], row["message"]) == ("done", "2", "2", "n/a")
    assert float(row["volume_mm3"]) == pytest.approx(mask.sum() * 2.0, rel=1e-6)


def test_segment_writes_the_same_segmentation_and_no_maps(
    out: Path, manifest: Path, native_model: Path, tmp_path: Path
) -> None:
    assert main(["segment", str(manifest), str(tmp_path / "out"), "--model", str(native_model)]) == 0
    written = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.nii.gz")}
    assert len(written) == 3
    for file in written:
        assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes()
    explained = [{k: v for k, v in row.items() if k != "explained"} for row in timeless(table(out / "cases.tsv"))]
    assert timeless(table(tmp_path / "out" / "cases.tsv")) == explained
    log = json.loads((tmp_path / "out" / "logs" / "run.json").read_text())
    assert all((tmp_path / "out" / file).is_file() for file in log["files"])
