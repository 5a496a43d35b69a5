"""A whole run with an nnU-Net that crops and resamples: results on the input's grid, maps where the network saw them.

The voxels of the scans are 1 × 0.5 × 4 mm and the plan's 1 × 1 × 3 mm, so nothing lies where it was.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from tiny import CASE, CHANNELS, SHAPE, stored, table, volumes, write_case, write_manifest

from xaiseg._types import Instance
from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.cohort.work import load_scan
from xaiseg.imaging import read_input
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import jacobian_rows, signed_max

RESULTS = Path(__file__).parent.parent / "fixtures" / "nnunet_plain"
CODES = "LSA"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    return write_manifest(folder / "cases.tsv", [write_case(folder, CASE, codes=CODES)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One fold and no mirroring, so that it compiles quickly; both are tested in tests/models/test_forward.py."""
    folder = tmp_path_factory.mktemp("model") / "m"
    assert main(["convert", str(RESULTS), str(folder), "--fold", "1", "--no-mirroring"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(model, cases, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--instances", "given", "--min-voxels", "2", "--samples", "1", "--noise", "0"]
    assert main(["explain", str(cases), str(out), "--model", str(model), *options]) == 0
    return out


def file(out, name):
    subject, session = CASE.split("_")
    return out / subject / session / "anat" / f"{CASE}_{name}.nii.gz"


def test_segmentations_lie_on_the_grid_of_the_input(run, cases):
    given = nib.load(cases.parent / f"{CASE}_instances.nii.gz")
    for name in ("space-orig_label-L_probseg", "space-orig_label-L_mask", "space-orig_desc-instances_dseg"):
        image = nib.load(file(run, name))
        assert image.shape == given.shape
        np.testing.assert_allclose(image.affine, given.affine, atol=1e-5)
    labels = np.asarray(nib.load(file(run, "space-orig_desc-instances_dseg")).dataobj)
    np.testing.assert_array_equal(labels, np.asarray(given.dataobj))


def test_probabilities_are_nothing_outside_of_the_crop(run):
    """Two voxels of background all around: nnU-Net crops them away and never sees them."""
    probability = np.asarray(nib.load(file(run, "space-orig_label-L_probseg")).dataobj)
    inside = (slice(2, -2),) * 3
    assert probability[inside].min() > 0
    probability[inside] = 0
    assert not probability.any()


def test_lesions_are_measured_in_voxels_of_the_input(run):
    labels = volumes()["instances"]
    rows = {int(row["lesion"]): row for row in table(run / "lesions.tsv")}
    assert sorted(rows) == [2, 7]
    for label, row in rows.items():
        voxels = np.argwhere(labels == label)
        assert int(row["voxels"]) == len(voxels)
        assert float(row["volume_mm3"]) == pytest.approx(len(voxels) * 2.0)  # 1 × 0.5 × 4 mm
        centroid = apply_affine(stored(labels).affine, voxels.mean(0))
        found = [float(row[f"centroid_{axis}_mm"]) for axis in "xyz"]
        np.testing.assert_allclose(found, centroid, atol=1e-4)


@pytest.mark.slow
def test_maps_are_those_of_the_network_and_placed_where_it_saw_them(run, model, cases):
    """Rows of the predictor on the preprocessed image, voxel by voxel through `jax.jacrev`, found again by world coordinates."""
    loaded = load_model(model)
    (case,) = read_input(cases, CHANNELS)
    scan = load_scan(case, loaded.spec)
    assert scan.image.shape[:3] != scan.stored_grid.shape
    labels = scan.labels_to_image(scan.labels(case.instances))
    predictor = replace(StitchedPredictor.of(loaded), scan=True)  # the network once in the program, not once per window
    for label in (2, 7):
        voxels = np.argwhere(labels == label).astype(np.int32)
        # the voxels of the network's image whose centre lies in a lesion's voxel, or on the border of one (0.5 mm to 1 mm)
        instances = volumes()["instances"]
        place = apply_affine(np.linalg.inv(stored(instances).affine) @ scan.grid.affine, voxels)
        near = [np.rint(place + shift).astype(int) for shift in (-1e-3, 1e-3)]
        assert all(label in {int(instances[tuple(n[i])]) for n in near} for i in range(len(voxels)))
        rows = np.asarray(jax.jacrev(lambda x, v=voxels: predictor(x)[tuple(v.T)][:, 1])(jnp.asarray(scan.image)))
        expected = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
        image = nib.load(file(run, f"space-orig_desc-smoothgrad_lesion-{label:03d}_saliency"))
        values = np.asarray(image.dataobj)
        index = np.argwhere(values.any(-1))
        world = apply_affine(image.affine, index)
        on_image = apply_affine(np.linalg.inv(scan.grid.affine), world)
        assert np.abs(on_image - on_image.round()).max() < 1e-3  # float32 headers
        found = np.zeros_like(expected)
        found[tuple(on_image.round().astype(int).T)] = values[tuple(index.T)]
        # float32 sums over windows in another order
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_lesion_that_the_preprocessing_crops_away_is_said(model, cases, tmp_path, capsys):
    array = np.zeros(SHAPE, np.uint8)
    array[0, 4:8, 4:8] = 3  # background
    array[8:10, 8:10, 8:10] = 5
    nib.save(stored(array, CODES), tmp_path / "given.nii.gz")
    line = {"case": CASE, **{c: str(cases.parent / f"{CASE}_{c}.nii.gz") for c in CHANNELS}}
    manifest = write_manifest(tmp_path / "cases.tsv", [{**line, "instances": "given.nii.gz"}])
    options = ["--instances", "given", "--samples", "1", "--noise", "0", "--dry-run"]
    assert main(["explain", str(manifest), str(tmp_path / "out"), "--model", str(model), *options]) == 0
    assert "plan: 1 case, 1 lesion" in capsys.readouterr().out
    (row,) = (r for r in _explained(manifest, tmp_path / "out", model) if r["case"] == CASE)
    assert row["message"] == "not explained: 3, outside of what the preprocessing keeps"


def _explained(manifest, out, model):
    options = ["--instances", "given", "--samples", "1", "--noise", "0", "--method", "gradcam++"]
    assert main(["explain", str(manifest), str(out), "--model", str(model), *options]) == 0
    return table(out / "cases.tsv")


def test_channels_that_the_manifest_does_not_have(model, cases, tmp_path, capsys):
    manifest = tmp_path / "cases.tsv"
    manifest.write_text(cases.read_text().replace("T1w\t", "T1\t", 1))
    assert main(["segment", str(manifest), str(tmp_path / "out"), "--model", str(model)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no column 'T1w', found" in line
    assert "'T1'" in line


def test_instances_of_a_map_and_instances_given_to_the_api_agree(model, cases, run):
    """The API on the preprocessed image gives the command's map."""
    loaded = load_model(model)
    (case,) = read_input(cases, CHANNELS)
    scan = load_scan(case, loaded.spec)
    voxels = np.argwhere(scan.labels_to_image(scan.labels(case.instances)) == 7).astype(np.int32)
    explain = jacobian_rows(signed_max())
    predictor = StitchedPredictor.of(loaded)
    (found,), _ = explain(jax.random.key(0), predictor, jnp.asarray(scan.image), [Instance(7, voxels)])
    row = next(r for r in table(run / "lesions.tsv") if r["lesion"] == "7")
    assert float(row["smoothgrad_FLAIR_peak"]) == pytest.approx(float(found.values[..., 0].max()), rel=1e-5)
