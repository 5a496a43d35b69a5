from functools import partial
from pathlib import Path

import numpy as np
import pytest

from training import volumes
from training.cases import read_cases
from training.config import Config
from training.volumes import cached, make_volume, volume_of_case, volume_of_phantom
from xaiseg.errors import InputError
from xaiseg.imaging import load_scan
from xaiseg.imaging.phantom import phantom


def test_a_phantom_s_lesions_are_the_reference_and_look_alikes_are_not(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(phantom, shape=(36, 44, 36), spacing=4.0)
    monkeypatch.setattr(volumes, "phantom", small)
    volume = volume_of_phantom(tmp_path, 1000, tiny.orientation)
    brain = small(1000)
    np.testing.assert_array_equal(volume.reference, brain.lesions > 0)
    inside = brain.t1w != 0
    # float32 standard score against float64: intensities of some hundreds over a deviation of some tens.
    values = brain.t1w[inside].astype(float)
    np.testing.assert_allclose(volume.image[..., 1][inside], (values - values.mean()) / values.std(), atol=1e-5)
    (tmp_path / "las").mkdir()
    flipped = volume_of_phantom(tmp_path / "las", 1000, "LAS")
    np.testing.assert_array_equal(flipped.image, volume.image[::-1])
    np.testing.assert_array_equal(flipped.reference, volume.reference[::-1])


def test_a_case_is_read_once_in_model_orientation(
    bids, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, add = bids
    add("sub-01")
    (case,) = read_cases([folder], [], tiny.channels).training
    first = volume_of_case(tmp_path, case, tiny.channels, "LAS")
    assert case.reference is not None
    scan = load_scan(case, tiny.channels)
    np.testing.assert_array_equal(first.image, scan.image[::-1])
    np.testing.assert_array_equal(first.reference, scan.labels(case.reference)[::-1] > 0)
    monkeypatch.setattr(volumes, "load_scan", None)
    again = volume_of_case(tmp_path, case, tiny.channels, "LAS")
    assert isinstance(again.image, np.memmap)
    np.testing.assert_array_equal(again.image, first.image)


def test_indices_of_lesion_and_of_the_rest_of_the_brain() -> None:
    image = np.zeros((3, 3, 3, 2), np.float32)
    image[0, 0, :, 1] = 1
    reference = np.zeros((3, 3, 3), bool)
    reference[0, 0, 1] = True
    volume = make_volume("case", image, reference)
    assert (volume.lesion.tolist(), volume.other.tolist()) == ([1], [0, 2])
    assert len(make_volume("all", image[:1, :1, 1:2], reference[:1, :1, 1:2]).other) == 0


def test_a_volume_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the first array: one error, and no volume that would be taken for a whole one."""
    save = np.save

    def full(file: str, array: np.ndarray) -> None:
        if "reference" in str(file):
            raise OSError("3411968 requested and 2096096 written")  # what numpy says then, without a number or a name
        save(file, array)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return np.ones((4, 4, 4, 2), np.float32), np.zeros((4, 4, 4), bool)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"a-case: cannot be written .3411968 requested.*make room"):
        cached(tmp_path, "a-case", draw)
    monkeypatch.undo()
    assert not (tmp_path / "a-case").exists()
    assert cached(tmp_path, "a-case", draw).image.shape == (4, 4, 4, 2)
