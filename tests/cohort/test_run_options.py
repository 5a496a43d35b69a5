"""What each option of `explain` changes, and what it leaves alone."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import CASE, Explain, blob, snapshot, table, timeless

from xaiseg.cli import main


def volumes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.nii.gz")}


def maps(out: Path) -> dict[str, np.ndarray]:
    """Saliency maps by name, on a common grid: the crop may differ where values underflow."""
    found = {}
    for file in out.rglob("*_saliency.nii.gz"):
        image = nib.load(file)
        mask = nib.load(next(file.parent.glob("*_mask.nii.gz")))
        start = np.rint((np.linalg.inv(mask.affine) @ image.affine)[:3, 3]).astype(int)
        whole = np.zeros((*mask.shape, image.shape[3]), np.float32)
        whole[tuple(slice(s, s + n) for s, n in zip(start, image.shape[:3], strict=True))] = image.dataobj
        found[file.name] = whole
    return found


def assert_same_maps(a: Path, b: Path) -> None:
    ours, theirs = maps(a), maps(b)
    assert ours.keys() == theirs.keys() != set()
    for name, values in ours.items():
        # Rows are added up in another order at most: a few float32 roundings.
        np.testing.assert_allclose(values, theirs[name], rtol=0, atol=1e-5 * np.abs(values).max())


def sidecar(out: Path, method: str = "smoothgrad") -> dict:
    return json.loads((out / f"desc-{method}_saliency.json").read_text())["Settings"]


def column(out: Path, name: str) -> list[str]:
    return [row[name] for row in table(out / "lesions.tsv")]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(explain: Explain) -> None:
    a, b, c = explain("a"), explain("b", "--seed", "0"), explain("c", "--seed", "1")
    assert volumes(a) == volumes(b)
    assert timeless(table(a / "lesions.tsv")) == timeless(table(b / "lesions.tsv"))
    for name, content in volumes(a).items():
        assert (volumes(c)[name] == content) == ("saliency" not in name)
    assert column(a, "smoothgrad_FLAIR_peak") != column(c, "smoothgrad_FLAIR_peak")


def test_samples_and_noise(explain: Explain) -> None:
    plain, one = explain("plain", "--noise", "0"), explain("one", "--samples", "1")
    assert column(plain, "smoothgrad_samples") == ["1", "1"]
    assert column(plain, "smoothgrad_FLAIR_peak_se") == column(one, "smoothgrad_FLAIR_peak_se") == ["n/a", "n/a"]
    louder = explain("louder", "--noise", "0.2", "--samples", "3")
    assert column(louder, "smoothgrad_samples") == ["3", "3"]
    assert sidecar(louder)["noise"] == 0.2
    assert all(float(v) > 0 for v in column(louder, "smoothgrad_FLAIR_peak_se"))
    far = [np.abs(m - maps(plain)[name]).max() for name, m in maps(louder).items()]
    near = [np.abs(m - maps(plain)[name]).max() for name, m in maps(one).items()]
    assert min(far) > 0
    assert min(near) > 0


def test_the_mean_is_below_the_signed_maximum(explain: Explain) -> None:
    maximum, mean = explain("maximum", "--noise", "0"), explain("mean", "--noise", "0", "--aggregate", "mean")
    assert sidecar(mean)["aggregate"] == "mean"
    for name, values in maps(mean).items():
        # |Σ row / n| ≤ max |row| at every voxel, with room for rounding; and they are not the same.
        largest = np.abs(maps(maximum)[name])
        assert (np.abs(values) <= largest + 1e-6).all()
        assert np.abs(values).sum() < 0.9 * largest.sum()


@pytest.mark.parametrize("options", [["--chunk", "1"], ["--chunk", "13"], ["--memory", "8M"], ["--memory", "1G"]])
def test_chunk_and_memory_change_no_map(options: list[str], explain: Explain) -> None:
    assert_same_maps(explain("a"), explain("b", *options))


def test_too_little_memory_is_an_error_and_leaves_nothing(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    out = explain("out", "--memory", "1K", status=1)
    assert not out.exists()
    assert "too little" in capsys.readouterr().err.splitlines()[-1]


def test_only_the_lesions_asked_for_with_unchanged_results(explain: Explain) -> None:
    both, one = explain("both"), explain("one", "--lesions", "2", "--min-voxels", "1000")
    assert column(one, "lesion") == ["2"]
    assert timeless(table(one / "lesions.tsv")) == timeless(table(both / "lesions.tsv"))[1:]
    assert {k: v for k, v in volumes(both).items() if "lesion-001" not in k} == volumes(one)


def test_lesions_below_the_size_are_left_out(explain: Explain, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [int(n) for n in column(explain("all"), "voxels")]
    capsys.readouterr()
    out = explain("large", "--min-voxels", str(max(sizes)))
    assert column(out, "voxels") == [str(max(sizes))]
    assert f"1 left out: below --min-voxels {max(sizes)}" in capsys.readouterr().out


def test_reference_lesions_are_explained(explain: Explain) -> None:
    out = explain("out", "--instances", "reference")
    assert column(out, "group") == ["FN", "TP"]  # in order of the first voxel: the missed lesion is further left
    missed, found = blob((5, 21, 5), 2.0), blob((9, 9, 8), 2.3)
    labels = np.asarray(nib.load(next(out.rglob("*_dseg.nii.gz"))).dataobj)
    np.testing.assert_array_equal(labels, missed * 1 + found * 2)
    assert column(out, "voxels") == [str(missed.sum()), str(found.sum())]
    mask = np.asarray(nib.load(next(out.rglob("*_mask.nii.gz"))).dataobj)
    assert not (mask[missed]).any()  # the mask stays the prediction


def test_missed_lesions_alone_are_explained_as_among_all(explain: Explain) -> None:
    every, out = explain("all", "--instances", "reference"), explain("out", "--instances", "missed")
    assert column(out, "group") == ["FN"]
    name = f"{CASE}_space-orig_desc-smoothgrad_lesion-001_saliency.nii.gz"
    (found,), (same,) = out.rglob("*_saliency.nii.gz"), every.rglob(name)
    assert found.name == name
    both = [np.asarray(nib.load(path).dataobj) for path in (found, same)]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)  # other lesions in a group: rows add up in another order


def test_given_lesions_keep_their_labels(explain: Explain) -> None:
    out = explain("out", "--instances", "given")
    assert column(out, "lesion") == ["2", "7"]
    assert column(out, "group") == ["TP", "FP"]  # against the reference
    assert {p.name for p in out.rglob("*_saliency.nii.gz")} == {
        f"{CASE}_space-orig_desc-smoothgrad_lesion-00{n}_saliency.nii.gz" for n in (2, 7)
    }


def test_the_layer_of_gradcam(explain: Explain) -> None:
    default, other = explain("a", "--method", "gradcam++"), explain("b", "--method", "gradcam++", "--layer", "encoder0")
    assert sidecar(default, "gradcampp")["layer"] == "bottleneck.conv"
    assert sidecar(other, "gradcampp")["layer"] == "encoder0"
    assert not (default / "desc-smoothgrad_saliency.json").exists()
    for name, values in maps(default).items():
        assert values.min() >= 0
        assert not np.allclose(values, maps(other)[name])


def test_the_threshold_replaces_the_models(explain: Explain) -> None:
    out = explain("out", "--threshold", "0.9")
    mask, probability = (
        np.asarray(nib.load(next(out.rglob(f"*_{suffix}.nii.gz"))).dataobj) for suffix in ("mask", "probseg")
    )
    np.testing.assert_array_equal(mask, probability > 0.9)
    assert mask.sum() < (probability > 0.5).sum()
    assert json.loads((out / "logs" / "run.json").read_text())["model"]["threshold"] == 0.9


def test_selected_cases_get_what_they_get_in_the_whole_cohort(explain: Explain, cohort: Path) -> None:
    everyone = explain("everyone", source=cohort)
    some = explain("some", "--cases", "sub-03,sub-01", source=cohort)
    assert column(some, "case") == ["sub-01", "sub-01", "sub-03", "sub-03"]
    assert [row["case"] for row in table(everyone / "cases.tsv")] == ["sub-01", "sub-02", "sub-03"]
    assert {k: v for k, v in volumes(everyone).items() if not k.startswith("sub-02")} == volumes(some)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    explain: Explain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    explain("out", "--dry-run", "--method", "smoothgrad", "--method", "gradcam++")
    assert snapshot(tmp_path) == before
    printed = capsys.readouterr().out
    assert "plan: 1 case, 2 lesions" in printed
    assert "Grad-CAM++ at bottleneck.conv: 8 rows × 1 through 8 windows" in printed  # each lesion lies in four windows
    assert "estimated time" in printed


def test_overwriting_replaces_exactly_the_earlier_files(explain: Explain) -> None:
    out = explain("out", "--method", "gradcam++")
    earlier = set(snapshot(out))
    (out / "sub-01" / "notes.txt").write_text("mine")
    explain("out", "--overwrite")
    files = snapshot(out)
    assert files[str(Path("sub-01", "notes.txt"))] == b"mine"
    assert not [name for name in files if "gradcampp" in name or ".earlier" in name]
    assert set(files) - {str(Path("sub-01", "notes.txt"))} == {
        n.replace("gradcampp", "smoothgrad") for n in earlier
    } | {
        "desc-smoothgrad_summary.png",
        str(Path("sub-01", "ses-1", "anat", "sub-01_ses-1_desc-smoothgrad_convergence.png")),
    }


@pytest.mark.parametrize("options", [["--threshold", "0.99999999"], ["--min-voxels", "1000"], ["--memory", "1K"]])
def test_a_run_that_fails_puts_the_earlier_one_back(options: list[str], explain: Explain, tmp_path: Path) -> None:
    out = explain("out")
    (out / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    explain("out", "--overwrite", *options, status=1)
    assert snapshot(tmp_path) == before


def test_a_folder_of_something_else_is_not_overwritten(explain: Explain, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    before = snapshot(tmp_path)
    explain("out", "--overwrite", status=1)
    assert snapshot(tmp_path) == before


def test_a_bids_folder_gives_what_a_manifest_gives(
    explain: Explain, manifest: Path, native_model: Path, tmp_path: Path
) -> None:
    anat = tmp_path / "bids" / "sub-01" / "ses-1" / "anat"
    masks = tmp_path / "bids" / "derivatives" / "expert" / "sub-01" / "ses-1" / "anat"
    for folder in (anat, masks):
        folder.mkdir(parents=True)
    for channel in ("FLAIR", "T1w"):
        (anat / f"{CASE}_{channel}.nii.gz").symlink_to(manifest.parent / f"{CASE}_{channel}.nii.gz")
    (masks / f"{CASE}_label-L_mask.nii.gz").symlink_to(manifest.parent / f"{CASE}_reference.nii.gz")
    a, b = explain("a"), explain("b", source=tmp_path / "bids")
    assert volumes(a) == volumes(b)
    assert timeless(table(a / "cases.tsv")) == timeless(table(b / "cases.tsv"))


def test_out_below_the_input_is_not_taken_for_a_reference(explain: Explain, manifest: Path, tmp_path: Path) -> None:
    """The natural place of derivatives is in the dataset they derive from."""
    anat = tmp_path / "bids" / "sub-01" / "ses-1" / "anat"
    anat.mkdir(parents=True)
    for channel in ("FLAIR", "T1w"):
        (anat / f"{CASE}_{channel}.nii.gz").symlink_to(manifest.parent / f"{CASE}_{channel}.nii.gz")
    first = explain("bids/derivatives/xaiseg", source=tmp_path / "bids")
    second = explain("second", source=tmp_path / "bids")
    for out in (first, second):
        assert column(out, "group") == ["unlabelled", "unlabelled"]
        assert table(out / "cases.tsv")[0]["dice"] == "n/a"


def test_status_of_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (
        (["--samples", "0"], "--samples"),
        (["--noise", "-1"], "--noise"),
        (["--threshold", "1"], "--threshold"),
        (["--lesions", "3,x"], "--lesions"),
        (["--memory", "lots"], "--memory"),
        (["--method", "guess"], "--method"),
        (["--seed", "-1"], "--seed"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["explain", "in", "out", "--model", "m", *options])
        assert stop.value.code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
