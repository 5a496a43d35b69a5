"""The phantom is judged by what its maps say about its images, never by the numbers that drew it."""

from dataclasses import fields

import numpy as np
import pytest
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.imaging.phantom import Phantom, phantom

SMALL = {"shape": (64, 72, 64), "spacing": 2.5}
TINY = {"shape": (40, 48, 40), "spacing": 4.0}
MEDIUM = {"shape": (80, 96, 80), "spacing": 2.0}
SEEDS = (0, 1, 2)
TOUCHING = ndimage.generate_binary_structure(3, 2)
CSF, GREY, WHITE = 1, 2, 3


@pytest.fixture(scope="module")
def patients() -> list[Phantom]:
    return [phantom(seed, **MEDIUM) for seed in SEEDS]


def normal(patient: Phantom, tissue: int) -> np.ndarray:
    """Voxels of a tissue away from lesions, look-alikes and the brain's edge."""
    marked = ndimage.binary_dilation((patient.lesions > 0) | (patient.lookalikes > 0), iterations=2)
    return (patient.tissue == tissue) & ~marked & ndimage.binary_erosion(patient.tissue > 0, iterations=3)


def around(patient: Phantom, mask: np.ndarray, tissue: int) -> np.ndarray:
    """The normal voxels of a tissue within three voxels of a mask: the same bias field, the same neighbourhood."""
    return normal(patient, tissue) & ndimage.binary_dilation(mask, iterations=3)


def test_same_arguments_same_patient():
    one, other = phantom(5, **TINY), phantom(5, **TINY)
    for field in fields(Phantom):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_seeds_are_different_patients(patients):
    one, other = patients[:2]
    tissue = (one.tissue > 0) | (other.tissue > 0)
    assert (one.tissue != other.tissue)[tissue].mean() > 0.2  # another brain, not merely other noise
    assert not np.array_equal(one.lesions, other.lesions)


@pytest.mark.parametrize(("shape", "spacing"), [((112, 136, 112), 1.5), ((64, 72, 64), 2.5), ((48, 40, 56), 2.0)])
def test_shapes_dtypes_and_affine(shape, spacing):
    patient = phantom(3, shape=shape, spacing=spacing)
    dtypes = {"flair": np.float32, "t1w": np.float32, "lesions": np.int32, "lookalikes": np.int32, "tissue": np.uint8}
    for name, dtype in dtypes.items():
        assert getattr(patient, name).shape == shape
        assert getattr(patient, name).dtype == dtype
    np.testing.assert_array_equal(np.diag(patient.affine), [spacing, spacing, spacing, 1])
    brain = patient.tissue > 0
    for axis in range(3):  # the brain fits: no face of the grid cuts it
        assert not np.take(brain, [0, -1], axis=axis).any()
    centroid = patient.affine @ [*np.argwhere(brain).mean(axis=0), 1]
    assert np.abs(centroid[:3]).max() < 0.06 * min(np.multiply(shape, spacing))  # within a few percent of the origin
    assert patient.lesions.max() >= 1


def test_zero_exactly_outside_the_brain(patients):
    for patient in patients:
        outside = patient.tissue == 0
        assert not patient.flair[outside].any()
        assert not patient.t1w[outside].any()
        assert (patient.flair[~outside] > 0).all()
        assert (patient.t1w[~outside] > 0).all()
        volume = 2.0**3 * (~outside).sum() / 1000  # ml; adult brains span about 900 to 1700
        assert 900 < volume < 1700


def test_contrast_of_tissues(patients):
    for patient in patients:
        clear = ~ndimage.binary_dilation(patient.tissue == CSF)  # the cortex beside a sulcus is darkened by its CSF
        grey, white = normal(patient, GREY) & clear, normal(patient, WHITE) & clear
        csf = normal(patient, CSF)
        flair = [np.median(patient.flair[mask]) for mask in (csf, white, grey)]
        t1w = [np.median(patient.t1w[mask]) for mask in (csf, grey, white)]
        assert flair[0] < 0.85 * flair[1]  # most CSF is thin sulci: partial volume raises it
        assert 1.02 < flair[2] / flair[1] < 1.35
        assert t1w[0] < 0.75 * t1w[1]
        assert t1w[1] < 0.92 * t1w[2]


def test_units_differ_between_patients(patients):
    levels = [np.median(p.flair[p.tissue == WHITE]) for p in patients]
    assert max(levels) > 1.1 * min(levels)


def test_lesions_lie_in_white_matter_and_mostly_near_the_ventricles(patients):
    near = []
    for patient in patients:
        assert (patient.tissue[patient.lesions > 0] == WHITE).all()
        # CSF that survives an opening by 4 mm is ventricle or cistern: sulci are thinner
        ball = ndimage.iterate_structure(ndimage.generate_binary_structure(3, 1), 2)
        ventricles = ndimage.binary_opening(patient.tissue == CSF, ball)
        distance = ndimage.distance_transform_edt(~ventricles, sampling=2.0)
        near += list(ndimage.minimum(distance, patient.lesions, range(1, patient.lesions.max() + 1)))
    assert np.mean(np.array(near) < 8) > 0.4  # 58 % are drawn at the lateral ventricles


def test_lesions_are_bright_on_flair_and_dark_on_t1w(patients):
    flair, t1w = [], []
    for patient in patients:
        for label in range(1, patient.lesions.max() + 1):
            lesion = patient.lesions == label
            reference = around(patient, lesion, WHITE)
            flair.append(patient.flair[lesion].mean() / patient.flair[reference].mean())
            t1w.append(patient.t1w[lesion].mean() / patient.t1w[reference].mean())
    assert 1.2 < np.mean(flair) < 1.5
    assert np.mean(np.array(flair) > 1.05) > 0.9
    assert np.std(flair) > 0.04  # some faint, some striking
    assert 0.7 < np.mean(t1w) < 0.95
    assert max(t1w) > 0.95  # some are isointense


def test_lookalikes_are_bright_on_flair_only(patients):
    t1w: dict[int, list[float]] = {CSF: [], GREY: [], WHITE: []}
    for patient in patients:
        for tissue, ratios in t1w.items():
            mask = (patient.lookalikes > 0) & (patient.tissue == tissue)
            reference = around(patient, mask, tissue)
            assert patient.flair[mask].mean() > 1.04 * patient.flair[reference].mean()
            ratios.append(patient.t1w[mask].mean() / patient.t1w[reference].mean())
        assert patient.lookalikes.max() >= 5
        assert not (patient.lesions.astype(bool) & patient.lookalikes.astype(bool)).any()
    assert min(t1w[WHITE]) > 0.96  # true lesions lie in the same tissue: below 0.95 on average
    assert np.mean(t1w[CSF]) > 1.0
    assert np.mean(t1w[GREY]) > 0.93  # a handful of patches in a 3 mm ribbon: partial volume moves them by about 5 %


def test_every_label_is_one_component_and_none_touch(patients):
    for patient in patients:
        for labels, smallest in ((patient.lesions, 5), (patient.lookalikes, 4)):
            parts, count = ndimage.label(labels > 0, TOUCHING)
            assert count == labels.max()
            pairs = np.unique(np.stack([parts[labels > 0], labels[labels > 0]]), axis=1)
            assert pairs.shape[1] == count  # one label for one component
            assert np.bincount(labels.ravel())[1:].min() >= smallest


@pytest.mark.parametrize("n", [0, 1, 12])
def test_number_of_lesions_is_respected(n):
    assert abs(int(phantom(4, lesions=n, **TINY).lesions.max()) - n) <= n // 6


def test_lesion_load_has_a_heavy_tail():
    volumes = [np.bincount(phantom(seed, **SMALL).lesions.ravel())[1:] * 2.5**3 for seed in range(10, 14)]
    together = np.concatenate(volumes)
    assert all(4 <= len(v) <= 25 for v in volumes)
    assert len({len(v) for v in volumes}) > 2
    assert together.mean() > 1.2 * np.median(together)
    assert together.max() < 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (64, 64)}, "shape"),
        ({"shape": (8, 64, 64)}, "shape"),
        ({"spacing": 0.0}, "spacing"),
        ({"spacing": float("nan")}, "spacing"),
        ({"lesions": -1}, "lesions"),
    ],
)
def test_impossible_requests_name_the_argument(arguments, message):
    with pytest.raises(InputError, match=message):
        phantom(0, **arguments)
