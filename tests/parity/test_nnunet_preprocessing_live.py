"""Beside nnunetv2 itself: random shapes, spacings, axes and readers, and one head."""

import json
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what nnunetv2's dependencies deprecate while they are imported
    pytest.importorskip("nnunetv2")
    from scripts.fixtures.nnunet_preprocessing import DEFAULT, Case, reference

from xaiseg.imaging.grid import Grid
from xaiseg.imaging.nnunet import prepare
from xaiseg.imaging.nnunet_plan import SCHEMES, NnunetPreprocessing

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # nnunetv2's own warnings

READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    spacing = rng.choice([0.5, 0.8984375, 1.0, 1.2, 3.3, 5.0], 3)
    target = rng.choice([0.5, 0.8984375, 1.0, 1.5, 4.0], 3 if seed % 4 else 2)
    shape = rng.integers(9, 30, 3)
    crop = [sorted(rng.choice(int(n) + 1, 2, replace=False)) for n in shape]
    channels = int(rng.integers(1, 4))
    reader = READERS[seed % len(READERS)]
    # SimpleITK keeps the header's spacing where it turns axes, nibabel takes the affine's: the last digit may differ.
    degrees = 0.0 if reader == "SimpleITKIOWithReorient" else float(rng.choice([0.0, 17.0]))
    letters = rng.permutation(["LR", "AP", "IS"])
    return Case(
        tuple(map(int, shape)),
        tuple(map(float, spacing)),
        tuple(map(float, target)),
        tuple(map(int, rng.permutation(3))),
        reader,
        "".join(pair[rng.integers(2)] for pair in letters),
        degrees,
        tuple(str(s) for s in rng.choice(SCHEMES, channels)),
        tuple(map(bool, rng.integers(2, size=channels))),
        tuple((max(int(a) - 3, 0), int(b) + 3) for a, b in crop),
        low=0,
        resampling=DEFAULT,
        order_z=int(rng.choice([0, 0, 1, 3])),
        force=[None, None, True, False][rng.integers(4)],
        seed=seed,
    )


HEAD = Case(
    (96, 110, 40), (0.9, 0.9, 4), (1, 1, 1), schemes=("ZScoreNormalization",) * 2, masks=(True, False), low=0,
    crop=((9, 90), (12, 100), (3, 38)),
)  # fmt: skip


@pytest.mark.parametrize("case", [*map(random_case, range(24)), HEAD], ids=[*map(str, range(24)), "head"])
def test_as_nnunet(case: Case) -> None:
    expected = reference(case)
    volumes = list(expected["volumes"].astype(np.float32))
    preprocessing = NnunetPreprocessing.from_dict(json.loads(str(expected["preprocessing"])), "plans.json")
    grid = Grid(volumes[0].shape, expected["affine"])
    prepared = prepare(volumes, grid, preprocessing, [str(i) for i in range(len(volumes))], expected["zooms"])
    image = expected["image"]
    assert prepared.image.shape == image.shape
    # Where a reader turns axes, float32 sums run in another order.
    assert np.abs(prepared.image - image).max() <= 1e-5 * np.ptp(image)
    restored = prepared.restore(expected["logits"])
    assert np.abs(restored - expected["restored"]).max() <= 1e-5 * np.ptp(expected["restored"])
    segmentation = prepared.insert(restored.argmax(axis=-1).astype(np.uint8))
    np.testing.assert_array_equal(segmentation, expected["segmentation"])
