"""The fingerprint beside a list of all draws, sorted and averaged by NumPy; beside nnunetv2's in tests/parity."""

import doctest
import json
import sys
import weakref
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from training import fingerprint as module
from training.fingerprint import STATISTICS, Fingerprint, LoadedCase, read_fingerprint, take_fingerprint
from xaiseg.errors import InputError

SPACING = (0.5, 1.0, 3.0)


def case(seed: int = 0, shape: tuple[int, int, int] = (7, 8, 9), share: float = 0.2) -> LoadedCase:
    """A brain in a background of zeros, and lesions anywhere, in that background too."""
    rng = np.random.default_rng(seed)
    image = np.zeros((*shape, 2), np.float32)
    image[1:-1, 2:, :-3] = rng.normal(50, 9, (shape[0] - 2, shape[1] - 2, shape[2] - 3, 2))
    image[:4, :, :, 1] = 0
    return LoadedCase(image, rng.uniform(size=shape) < share, SPACING, f"sub-{seed:02d}")


def brute_force(cases: list[LoadedCase], draws: int, seed: int) -> list[dict[str, float]]:
    """Voxel by voxel, z outermost; each draw stands in the list."""
    lists: list[list[float]] = [[], []]
    for image, reference, _, _ in cases:
        X, Y, Z = np.nonzero(image.any(axis=-1))
        inside = [
            (x, y, z)
            for z, y, x in product(*(range(n) for n in reference.shape[::-1]))
            if reference[x, y, z] and X.min() <= x <= X.max() and Y.min() <= y <= Y.max() and Z.min() <= z <= Z.max()
        ]
        random = np.random.RandomState(seed)
        for channel in range(2):
            lesion = [float(image[(*place, channel)]) for place in inside]
            lists[channel] += list(random.choice(lesion, draws)) if lesion else []
    return [
        {
            "mean": np.mean(values),
            "median": np.median(values),
            "std": np.std(values),
            "min": min(values),
            "max": max(values),
            "percentile_00_5": np.percentile(values, 0.5),
            "percentile_99_5": np.percentile(values, 99.5),
        }
        for values in lists
    ]


@pytest.mark.parametrize("draws", [1, 3, 700])
def test_statistics_are_those_of_the_drawn_lesion_voxels(draws: int) -> None:
    """Where few are drawn, not every lesion voxel is among them; a case without lesions adds none."""
    cases = [case(0), case(1, share=0), case(2, (6, 9, 8))]
    found = take_fingerprint(cases, count=3, samples=3 * draws + 2, seed=5)
    for values, expected in zip(found.intensities, brute_force(cases, draws, 5), strict=True):
        assert set(values) == set(STATISTICS)
        assert values == pytest.approx(expected, rel=1e-12)


def test_draws_held_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    once = take_fingerprint([case()], 1, samples=1000)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert take_fingerprint([case()], 1, samples=1000) == once
    assert take_fingerprint([case()], 1, samples=1000, seed=1) != once


def test_shapes_spacings_and_relative_size() -> None:
    """Of (7, 8, 9) voxels the box has 5 x 6 x 6; axes are turned to (Z, Y, X)."""
    found = take_fingerprint([case(0), case(1), case(2, (6, 9, 8))], 3, samples=3)
    assert found.shapes_after_crop == ((6, 6, 5), (6, 6, 5), (5, 7, 4))
    assert found.spacings == (SPACING[::-1],) * 3
    assert found.median_relative_size_after_cropping == 180 / 504


def test_a_channel_alone_can_span_the_box() -> None:
    image = np.zeros((4, 4, 4, 2), np.int16)
    image[1, 2, 3, 0] = 5
    image[3, 0, 1, 1] = -2
    found = take_fingerprint([LoadedCase(image, np.ones((4, 4, 4)), SPACING)], 1, samples=100)
    assert found.shapes_after_crop == ((3, 3, 3),)


def test_a_lesion_of_one_voxel() -> None:
    given = case(share=0)
    given.reference[3, 4, 2] = True
    for channel, values in enumerate(take_fingerprint([given], 1, samples=10).intensities):
        value = float(given.image[3, 4, 2, channel])
        assert values == {name: 0 if name == "std" else pytest.approx(value) for name in STATISTICS}


def test_cases_are_let_go() -> None:
    """When a case is asked for, the one before it is no longer held."""
    earlier: list[weakref.ref] = []

    def stream():
        for seed in range(4):
            assert sum(image() is not None for image in earlier[:-1]) == 0
            given = case(seed)
            earlier.append(weakref.ref(given.image))
            yield given
            del given

    assert len(take_fingerprint(stream(), 4, samples=40).spacings) == 4


def test_there_and_back(tmp_path: Path) -> None:
    found = take_fingerprint([case(0), case(1)], 2, samples=100)
    path = tmp_path / "dataset_fingerprint.json"
    path.write_text(json.dumps(found.to_dict()))
    assert read_fingerprint(path) == found


def changed(name: str, value: object) -> dict:
    return {**take_fingerprint([case()], 1, samples=9).to_dict(), name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spacings", []),
        ("spacings", [[1, 1]]),
        ("spacings", [[1, 1, 0]]),
        ("shapes_after_crop", [[5, 5, 5], [5, 5, 5]]),
        ("shapes_after_crop", [[5, 5, 5.5]]),
        ("foreground_intensity_properties_per_channel", {"0": {"mean": 1.0}}),
        ("foreground_intensity_properties_per_channel", {"1": dict.fromkeys(STATISTICS, 1.0)}),
        ("median_relative_size_after_cropping", 1.2),
        ("median_relative_size_after_cropping", None),
    ],
)
def test_what_is_no_fingerprint_is_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^f\.json: {name} is .*, expected "):
        Fingerprint.from_dict(changed(name, value), "f.json")


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_what_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "dataset_fingerprint.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"dataset_fingerprint\.json: .*give a dataset_fingerprint\.json"):
        read_fingerprint(path)


def spoiled(**changes) -> LoadedCase:
    return case()._replace(**changes)


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[2, 3, 2] = np.nan
    return array


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spoiled(image=np.zeros((7, 8, 9, 2))), "sub-00: all voxels are zero"),
        (spoiled(image=case().image[..., 0]), r"sub-00: image \(7, 8, 9\) and reference"),
        (spoiled(reference=np.ones((7, 8, 8))), r"sub-00: .*reference \(7, 8, 8\)"),
        (spoiled(image=case().image[..., :1]), "sub-00: 1 channels, but 2"),
        (spoiled(image=with_nan(case().image)), "sub-00: NaN"),
        (spoiled(reference=with_nan(case().reference)), "sub-00: NaN"),
        (spoiled(spacing=(1.0, 0.0, 1.0)), r"sub-00: spacing is \(1.0, 0.0, 1.0\)"),
        (spoiled(spacing=(1.0, 1.0), name=""), "case 2: spacing"),
    ],
)
def test_a_case_that_cannot_be_used_is_named(given: LoadedCase, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take_fingerprint([case(1), given], 2, samples=10)


def test_no_lesion_at_all() -> None:
    with pytest.raises(InputError, match="none of 1 has a lesion"):
        take_fingerprint([case(share=0)], 1)


def test_the_count_must_be_right() -> None:
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"2 cases came by, but count is {count}"):
            take_fingerprint([case(0), case(1)], count, samples=10)
    with pytest.raises(ValueError, match="0 samples for 1 cases"):
        take_fingerprint([case(0)], 1, samples=0)


def test_the_example() -> None:
    result = doctest.testmod(sys.modules["training.fingerprint"])
    assert result.attempted > 0
    assert result.failed == 0
