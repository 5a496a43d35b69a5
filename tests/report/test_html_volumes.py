"""Volumes in a page: unpacked again they are the scan, the lesions and the maps, to the step of 8 bits, in the same place."""

import base64
import gzip

import nibabel as nib
import numpy as np
import pytest

from tests.report.simulated_report import AFFINE, SHAPE, lesion_box, write_report_run
from xaiseg.analysis.run_tables import read_run
from xaiseg.errors import InputError
from xaiseg.report.html import volumes
from xaiseg.report.html.scans import Scans, lesion_voxels, map_file, read_map


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_report_run(tmp_path_factory.mktemp("run"), patients=1))


def unpacked(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_a_scan_is_turned_to_ras_with_its_lesions(run):
    volume = Scans(run).volume(0)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.image.shape == (*SHAPE, 2)
    stored = nib.load(Scans(run).cases["sub-00"].images["FLAIR"]).get_fdata()
    inside = stored[stored != 0]
    expected = np.where(stored == 0, 0, (stored - inside.mean()) / inside.std())[::-1, ::-1]
    np.testing.assert_allclose(volume.image[..., 0], expected, atol=1e-4)
    voxels = lesion_voxels(volume)
    assert sorted(voxels) == [1, 2, 3, 4]
    for number, found in voxels.items():
        world = found @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        wanted = np.argwhere(
            np.isin(
                np.arange(np.prod(SHAPE)).reshape(SHAPE), np.arange(np.prod(SHAPE)).reshape(SHAPE)[lesion_box(number)]
            )
        )
        assert {tuple(w) for w in world} == {tuple(w) for w in wanted @ AFFINE[:3, :3].T + AFFINE[:3, 3]}


def test_a_scan_in_8_bits(run):
    volume = Scans(run).volume(0)
    box = volumes.brain_box(volume)
    image = unpacked(volumes.scan_volume(volume, 0, box))
    values, (low, high) = volume.image[..., 0][box], volume.windows[0]
    brain = values != 0
    step = (high - low) / 254
    np.testing.assert_allclose(image.get_fdata()[brain], np.clip(values, low, high)[brain], atol=step / 2 + 1e-5)
    assert (np.asarray(image.dataobj.get_unscaled())[~brain] == 0).all()
    np.testing.assert_allclose(
        image.affine[:3, 3], volume.affine[:3, :3] @ [b.start for b in box] + volume.affine[:3, 3]
    )
    labels = unpacked(volumes.label_volume(volume, box))
    assert np.array_equal(np.asarray(labels.dataobj), volume.labels[box])


def test_a_map_on_its_voxels(run):
    volume = Scans(run).volume(0)
    path = map_file(run, 1, run.methods[0])
    crop = read_map(path, volume)
    texts, limit = volumes.map_volumes(volume, crop, lesion_voxels(volume)[2])
    stored = nib.load(path)
    whole = stored.get_fdata()
    assert limit == pytest.approx(np.abs(whole).max(), rel=1e-6)
    for channel, text in enumerate(texts):
        image = unpacked(text)
        across = np.linalg.inv(image.affine) @ stored.affine
        for place in np.argwhere(np.ones(whole.shape[:3])).tolist():
            at = tuple(np.rint(across[:3, :3] @ place + across[:3, 3]).astype(int))
            assert image.get_fdata()[at] == pytest.approx(whole[(*place, channel)], abs=limit / 254 + 1e-6)


def test_the_same_bytes_each_time(run):
    volume = Scans(run).volume(0)
    box = volumes.brain_box(volume)
    assert volumes.scan_volume(volume, 0, box) == volumes.scan_volume(volume, 0, box)
    assert gzip.decompress(base64.b64decode(volumes.label_volume(volume, box)))[:4] == (348).to_bytes(4, "little")


def test_maps_that_do_not_fit(run, tmp_path):
    volume = Scans(run).volume(0)
    good = nib.load(map_file(run, 0, run.methods[0]))
    moved = good.affine.copy()
    moved[0, 3] += 0.7
    nib.save(nib.Nifti1Image(good.get_fdata(), moved), tmp_path / "moved.nii.gz")
    nib.save(nib.Nifti1Image(np.full((2, 2, 2, 2), np.nan), good.affine), tmp_path / "nan.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(map_file(run, 0, run.methods[0]).read_bytes()[:60])
    for name, said in (
        ("moved", "not on the voxels"),
        ("nan", "not finite"),
        ("cut", "cannot be read"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            read_map(tmp_path / f"{name}.nii.gz", volume)
