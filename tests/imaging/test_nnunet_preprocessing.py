"""nnU-Net's preprocessing and the way back, against arrays made by nnunetv2 (scripts/fixtures/nnunet_preprocessing.py)."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging.grid import Grid
from xaiseg.imaging.nnunet import Prepared, prepare
from xaiseg.imaging.nnunet_labels import resize_labels
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("nnunet_prep_*.npz"))
# nnU-Net computes in float64 from float32 sums, and so do we: equal to the last bit with one SciPy; another may round
# its splines otherwise.
TOLERANCE = 1e-6
PLAN = {
    "orientation": "native",
    "transpose_forward": [0, 1, 2],
    "spacing": [1.0, 1.0, 1.0],
    "normalisation": ["NoNormalization"],
    "use_mask_for_norm": [False],
    "intensities": [{}],
    "data_resampling": {"order": 3, "order_z": 0, "force_separate_z": None},
    "probability_resampling": {"order": 1, "order_z": 0, "force_separate_z": None},
}


def plan(**changes) -> NnunetPreprocessing:
    return NnunetPreprocessing.from_dict({**PLAN, **changes}, "model.json")


def as_nnunet(fixture: dict[str, np.ndarray], with_zooms: bool = True) -> Prepared:
    volumes = list(fixture["volumes"].astype(np.float32))
    preprocessing = NnunetPreprocessing.from_dict(json.loads(str(fixture["preprocessing"])), "fixture")
    grid = Grid(volumes[0].shape, fixture["affine"])
    zooms = fixture["zooms"] if with_zooms else None
    return prepare(volumes, grid, preprocessing, [f"{i}.nii" for i in range(len(volumes))], zooms)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem.removeprefix("nnunet_prep_"))
def test_as_nnunet(path: Path) -> None:
    """The network's input, the logits on the cropped grid, and the segmentation that nnU-Net would write."""
    fixture = dict(np.load(path))
    prepared = as_nnunet(fixture)
    image = fixture["image"]
    assert prepared.image.shape == image.shape
    assert prepared.image.dtype == np.float32
    np.testing.assert_allclose(prepared.image, image, rtol=0, atol=TOLERANCE * np.ptp(image))
    restored = prepared.restore(fixture["logits"])
    np.testing.assert_allclose(restored, fixture["restored"], rtol=0, atol=TOLERANCE * np.ptp(fixture["restored"]))
    segmentation = prepared.insert(restored.argmax(axis=-1).astype(np.uint8))
    assert segmentation.dtype == np.uint8
    np.testing.assert_array_equal(segmentation, fixture["segmentation"])


def test_there_are_fixtures() -> None:
    assert len(FIXTURES) == 10


def test_the_headers_spacing_decides() -> None:
    """Of 9 voxels, 4.5 remain; a float32 affine turned by 13 degrees has lost the digit that rounds them up."""
    fixture = dict(np.load(next(path for path in FIXTURES if "oblique_ties" in path.stem)))
    assert as_nnunet(fixture).image.shape[2] == 5
    assert as_nnunet(fixture, with_zooms=False).image.shape[2] == 4


def affine_of(codes: str, spacing: tuple[float, ...], degrees: float = 10.0) -> np.ndarray:
    directions = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    a = np.deg2rad(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([directions[c] for c in codes]).T @ np.diag(spacing)
    affine[:3, 3] = 5, -60, 33
    return affine


@pytest.mark.parametrize(
    ("codes", "spacing", "target", "changes"),
    [
        ("LAS", (0.9, 0.8, 4), [1, 1, 1.2], {}),
        ("PSR", (0.9, 1.1, 1), [1.7, 1, 0.6], {"transpose_forward": [2, 0, 1], "orientation": "RAS"}),
        ("ASL", (1, 1.2, 1), [4, 0.8, 1], {"transpose_forward": [1, 0, 2]}),
        ("LAS", (0.9, 0.8, 2), [1, 0.7], {"transpose_forward": [1, 2, 0], "orientation": "RAS"}),
    ],
)
def test_world_coordinates(codes, spacing, target, changes) -> None:
    """A blob placed in the world lies there in the image, and once more on the stored grid after the way back."""
    shape = tuple(round(36 / s) for s in spacing)
    grid = Grid(shape, affine_of(codes, spacing))
    ijk = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = grid.to_world(ijk)
    place = grid.to_world(np.array([0.6, 0.4, 0.55]) * shape)
    sigma = 3.0  # mm
    blob = np.exp(-np.square(world - place).sum(axis=-1) / (2 * sigma**2)).astype(np.float32)
    blob[np.linalg.norm(world - place, axis=-1) > 12] = 0  # so that the crop is off-centre

    prepared = prepare([blob], grid, plan(spacing=target, **changes), ["a.nii"])
    assert prepared.cropped_grid.shape != prepared.grid.shape
    wanted = target if len(target) == 3 else [prepared.spacing[0], *target]
    np.testing.assert_allclose(prepared.grid.spacing, wanted, rtol=0.07)  # shapes are rounded, the least being 7

    def centroid(values: np.ndarray, on: Grid) -> np.ndarray:
        voxels = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), axis=-1)
        return (on.to_world(voxels) * values[..., None]).sum(axis=(0, 1, 2)) / values.sum()

    found = centroid(prepared.image[..., 0], prepared.grid)
    assert np.linalg.norm(found - place) < 0.5 * min(prepared.grid.spacing)
    back = prepared.insert(prepared.restore(prepared.image[..., 0]))
    assert np.linalg.norm(centroid(back, grid) - place) < 0.5 * min(spacing)


def test_a_constant_comes_back_inside_the_crop() -> None:
    """With the fill of each channel outside; the crop is the box of the voxels that differ from zero in any channel."""
    rng = np.random.default_rng(0)
    volumes = np.zeros((2, 11, 12, 9), np.float32)
    volumes[0, 3:8, 2:9, 1:6] = rng.uniform(-2, 2, (5, 7, 5))
    volumes[1, 4:10, 2:9, 1:6] = rng.uniform(-2, 2, (6, 7, 5))
    changes = {"normalisation": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [True] * 2, "intensities": [{}] * 2}
    grid = Grid(volumes.shape[1:], affine_of("PSR", (1, 1.5, 0.8)))
    prepared = prepare(volumes, grid, plan(orientation="RAS", transpose_forward=[2, 0, 1], **changes), ["a", "b"])
    restored = prepared.restore(np.broadcast_to(np.float32([3, -4]), (*prepared.grid.shape, 2)))
    back = prepared.insert(restored, fill=[1, 0])
    expected = np.zeros((11, 12, 9, 2), np.float32)
    expected[...] = 1, 0
    expected[3:10, 2:9, 1:6] = 3, -4
    np.testing.assert_array_equal(back, expected)  # weights of linear interpolation sum to 1; the rest is clipped


@pytest.mark.parametrize("target", [[1, 1, 1], [2, 0.7, 1.3]])
def test_labels_by_nearest_neighbour(target) -> None:
    """Against the stored voxel nearest to where each image voxel lies in the world."""
    rng = np.random.default_rng(1)
    grid = Grid((9, 10, 11), affine_of("LAS", (1, 1, 1)))
    volume = np.zeros(grid.shape, np.float32)
    volume[1:8, 2:9, 3:10] = rng.uniform(1, 2, (7, 7, 7))
    coarse = rng.integers(0, 4, (3, 4, 4))
    labels = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[:9, :10, :11].astype(np.int32)
    prepared = prepare([volume], grid, plan(spacing=target, transpose_forward=[1, 0, 2]), ["a.nii"])
    found = prepared.labels_to_image(labels)
    assert found.dtype == np.int32
    assert found.shape == prepared.grid.shape
    ijk = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1)
    stored = (np.linalg.inv(grid.affine) @ prepared.grid.affine)[:3]
    nearest = np.floor(ijk @ stored[:, :3].T + stored[:, 3] + 0.5 + 1e-9).astype(int)
    np.testing.assert_array_equal(found, labels[tuple(np.moveaxis(nearest, -1, 0))])


def test_labels_below_a_voxel_stay() -> None:
    """Twelve lesions of one voxel each, onto voxels 27 times as large: each stays, in the voxel in which it lies."""
    labels = np.zeros((18, 18, 18), np.int32)
    corners = list(product((0, 5, 11), (3, 17), (2, 8)))
    for label, corner in enumerate(corners, start=1):
        labels[corner] = label
    found = resize_labels(labels, (6, 6, 6), (3.0, 3.0, 3.0))
    assert np.count_nonzero(found) == len(corners)
    for label, corner in enumerate(corners, start=1):
        assert found[tuple(i // 3 for i in corner)] == label


def test_labels_that_share_a_voxel() -> None:
    """The second goes to the nearest background voxel in mm: 3 mm along the first axis is nearer than 4 along others."""
    labels = np.zeros((15, 15, 15), np.int32)
    labels[6, 6, 6], labels[8, 6, 8] = 1, 2
    found = resize_labels(labels, (5, 5, 5), (3.0, 4.0, 4.0))
    assert found[2, 2, 2] == 1
    assert found[3, 2, 2] == 2
    assert np.count_nonzero(found) == 2


def test_a_label_beside_another() -> None:
    """Rather than take a voxel of a neighbour that has two, it moves to the background next to it."""
    labels = np.zeros((15, 15, 15), np.int32)
    labels[3:8, 6:9, 6:9], labels[8, 7, 7] = 1, 2
    found = resize_labels(labels, (5, 5, 5), (1.0, 1.0, 1.0))
    assert found[1, 2, 2] == found[2, 2, 2] == 1
    assert found[3, 2, 2] == 2
    assert np.count_nonzero(found) == 3


def test_a_label_within_another() -> None:
    """Without background near, it takes a voxel of the label that has others, and leaves single voxels alone."""
    labels = np.full((15, 15, 15), 9, np.int32)
    labels[6, 6, 6], labels[8, 8, 8] = 1, 2
    found = resize_labels(labels, (5, 5, 5), (1.0, 1.0, 1.0))
    assert np.count_nonzero(found == 1) == np.count_nonzero(found == 2) == 1
    assert np.count_nonzero(found == 9) == 123
    assert found[2, 2, 2] == 1


def test_a_label_outside_the_crop_is_lost() -> None:
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = 1
    labels = np.zeros((8, 8, 8), np.int32)
    labels[0, 0, 0], labels[3, 3, 3] = 1, 2
    prepared = prepare([volume], Grid((8, 8, 8), np.eye(4)), plan(), ["a.nii"])
    assert set(np.unique(prepared.labels_to_image(labels))) == {0, 2}


def test_a_flat_image_stays_finite() -> None:
    """A standard deviation of 0 counts as 1e-8, as in nnU-Net."""
    volume = np.full((4, 4, 4), 7, np.float32)
    prepared = prepare([volume], Grid((4, 4, 4), np.eye(4)), plan(normalisation=["ZScoreNormalization"]), ["a.nii"])
    assert not prepared.image.any()


def test_the_volumes_are_left_alone() -> None:
    volume = np.random.default_rng(2).uniform(1, 2, (4, 5, 6)).astype(np.float32)
    kept = volume.copy()
    prepare([volume], Grid((4, 5, 6), np.eye(4)), plan(normalisation=["RescaleTo01Normalization"]), ["a.nii"])
    np.testing.assert_array_equal(volume, kept)


def test_images_that_cannot_be_used() -> None:
    grid = Grid((4, 5, 6), np.eye(4))
    ones = np.ones(grid.shape, np.float32)
    with pytest.raises(InputError, match=r"^sub-1\.nii: all voxels are zero"):
        prepare([0 * ones], grid, plan(), ["sub-1.nii"])
    with pytest.raises(InputError, match=r"^sub-1\.nii: intensities from 300 to 300; expected 0 to 255"):
        prepare([300 * ones], grid, plan(normalisation=["RGBTo01Normalization"]), ["sub-1.nii"])
    with pytest.raises(InputError, match=r"^sub-1\.nii: 6 x 5 x 4 voxels.* expected at least half a voxel"):
        prepare([ones], grid, plan(spacing=[20, 1, 1]), ["sub-1.nii"])
    with pytest.raises(ValueError, match="2 volumes and 2 names for 1 channels"):
        prepare([ones, ones], grid, plan(), ["a.nii", "b.nii"])
    with pytest.raises(ValueError, match=r"a\.nii: shape \(4, 5, 5\)"):
        prepare([ones[..., 1:]], grid, plan(), ["a.nii"])
    prepared = prepare([ones], grid, plan(spacing=[1, 2, 1]), ["a.nii"])
    with pytest.raises(ValueError, match="values: shape"):
        prepared.restore(np.zeros((6, 5, 4)))
    with pytest.raises(ValueError, match="labels: shape"):
        prepared.labels_to_image(np.zeros((6, 5, 4), np.int32))


def test_json() -> None:
    ct = {"mean": 1, "std": 2.5, "percentile_00_5": -3, "percentile_99_5": 4.0}
    kept = {**PLAN, "normalisation": ["CTNormalization"], "intensities": [{**ct, "median": 3, "max": 9}]}
    kept["data_resampling"] = {"is_seg": False, "order": 3, "order_z": 1, "force_separate_z": True}
    once = NnunetPreprocessing.from_dict(kept, "model.json")
    written = json.loads(json.dumps(once.to_dict()))
    assert NnunetPreprocessing.from_dict(written, "model.json") == once
    assert written["intensities"] == [ct]
    assert written["data_resampling"] == {
        "resampling_fn": "resample_data_or_seg_to_shape",
        "order": 3,
        "order_z": 1,
        "force_separate_z": True,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orientation": "LAS"}, r"orientation: 'LAS'; expected 'native' or 'RAS'"),
        ({"transpose_forward": [0, 1, 1]}, r"transpose_forward: \[0, 1, 1\]; expected a permutation"),
        ({"transpose_forward": "012"}, r"transpose_forward: '012'"),
        ({"spacing": [1, 0, 1]}, r"spacing: \[1, 0, 1\]; expected 3 lengths"),
        ({"spacing": [1, float("nan"), 1]}, r"spacing: "),
        ({"normalisation": []}, r"normalisation: \[\]; expected a list of ZScore"),
        ({"normalisation": ["MyNorm"]}, r"normalisation: \['MyNorm'\]"),
        ({"use_mask_for_norm": [1]}, r"use_mask_for_norm: \[1\]; expected true or false for each channel \(1\)"),
        ({"intensities": []}, r"intensities: \[\]; expected an object for each"),
        ({"normalisation": ["CTNormalization"]}, r"intensities: mean of channel 0 is None; .* CTNorm"),
        ({"data_resampling": 3}, r"data_resampling: 3; expected an object"),
        ({"data_resampling": {"order": 6}}, r"data_resampling.order: 6; expected an integer from 0 to 5"),
        ({"data_resampling": {"force_separate_z": 0}}, r"data_resampling.force_separate_z: 0"),
        ({"data_resampling": {"is_seg": True}}, r"data_resampling.is_seg: True"),
        (
            {"data_resampling": {"resampling_fn": "resample_torch_fornnunet"}},
            r"data_resampling.resampling_fn: 'resample_torch_fornnunet'; expected resample_data_or_seg_to_shape or",
        ),
        ({"probability_resampling": {"resampling_fn": "no_resampling_hack"}}, r"probability_resampling: no_res"),
        ({"patch_size": [1]}, r"patch_size: unknown"),
    ],
)
def test_plans_that_cannot_be_used(changes, message) -> None:
    with pytest.raises(InputError, match=rf"^model\.json: nnU-Net preprocessing, {message}") as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PLAN)
def test_a_field_is_missing(name) -> None:
    with pytest.raises(InputError, match=rf"^model\.json: nnU-Net preprocessing, {name}: missing"):
        NnunetPreprocessing.from_dict({key: value for key, value in PLAN.items() if key != name}, "model.json")
