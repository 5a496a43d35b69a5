"""What is drawn lies in its range and happens as often as it should; no item depends on another; image and mask stay together."""

from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy import ndimage

from training.augment import NNUNET, PAPER, Augmentation, augment, check_augmentation, draw
from xaiseg.errors import InputError

MANY = 4000
EVERYTHING = replace(
    NNUNET,
    quarter_turns=(0.5, 0.5, 0.5),
    shear=0.5,
    translation=0.5,
    elastic=0.5,
    bias_field=0.5,
    shift=0.5,
    scale=0.5,
)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Four patches of 8³; the reference is where the first channel exceeds 1."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 8, 8, 8, 2)).astype(np.float32)
    return images, (images[..., 0] > 1).astype(np.uint8)


def drawn(settings: Augmentation) -> dict[str, np.ndarray]:
    """The parameters of many items, `(MANY, …)`."""
    keys = jax.random.split(jax.random.key(0), MANY)
    # Not compiled as a whole: its parts are the same for all settings, and are compiled once.
    parameters = jax.vmap(lambda key: draw(key, settings, 2))(keys)._asdict()
    del parameters["noise_key"], parameters["knots_key"]
    return {name: np.asarray(value) for name, value in parameters.items()}


def happens(values: np.ndarray, probability: float) -> bool:
    """Within four standard deviations of the binomial distribution."""
    return abs(values.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / values.size)


def fills(values: np.ndarray, low: float, high: float) -> bool:
    """Within the range, and to both of its ends."""
    edge = 0.01 * (high - low)
    return bool(low - 1e-6 <= values.min() < low + edge and high - edge < values.max() <= high + 1e-6)


@pytest.fixture(scope="module")
def nnunet() -> dict[str, np.ndarray]:
    return drawn(EVERYTHING)


def test_paper() -> None:
    values = drawn(PAPER)
    for axis in range(3):
        assert happens(values["flips"][:, axis], 0.5)
    assert happens(values["shift"], 0.5)
    assert happens(values["scale"], 0.5)
    assert fills(values["offset"], -0.1, 0.1)
    assert fills(values["factor"], 0.9, 1.1)
    # Nothing else of the intensity, and nothing elastic.
    others = [
        "elastic",
        "bias_field",
        "noise",
        "blur",
        "brightness",
        "contrast",
        "low_resolution",
        "gamma_inverted",
        "gamma",
    ]
    assert not any(values[name].any() for name in others)
    # The lengths of the columns are the scales, turns or not: R·S has those of S.
    scales = np.linalg.norm(values["matrix"], axis=1)
    affine = np.abs(scales - 1).max(axis=1) > 1e-4
    assert happens(affine, 0.5)
    assert fills(scales[affine], 0.9, 1.1)
    still = values["matrix"][~affine]
    np.testing.assert_array_equal(np.sort(np.abs(still), axis=-1), np.broadcast_to([0, 0, 1], still.shape))
    # No quarter turn in any plane, or all of them undone: the half turns about x, y and z one after the other are none.
    identity = (still == np.eye(3)).all(axis=(1, 2))
    assert happens(identity, _identity_share())
    np.testing.assert_array_equal(values["moved"][affine], True)


def _identity_share() -> float:
    """Of the 64 combinations of turns in three planes, each 1/2 for none and 1/6 for one, two or three quarters."""
    share = 0.0
    for turns in np.ndindex(4, 4, 4):
        cube = np.arange(27).reshape(3, 3, 3)
        for k, plane in zip(turns, ((0, 1), (0, 2), (1, 2)), strict=True):
            cube = np.rot90(cube, k, plane)
        if (cube.ravel() == np.arange(27)).all():
            share += float(np.prod([0.5 if k == 0 else 1 / 6 for k in turns]))
    return share


def test_paper_rotates_by_fifteen_degrees_about_each_axis() -> None:
    matrices = drawn(replace(PAPER, quarter_turns=(0, 0, 0), scaling=0.0))["matrix"]
    # Rz·Ry·Rx: entry (2, 0) is -sin y; (1, 0) / (0, 0) tan z; (2, 1) / (2, 2) tan x.
    x = np.degrees(np.arctan2(matrices[:, 2, 1], matrices[:, 2, 2]))
    y = np.degrees(-np.arcsin(matrices[:, 2, 0]))
    z = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    turned = np.abs(x) > 1e-5
    assert happens(turned, 0.5)
    for angles in (x, y, z):
        assert fills(angles[turned], -15, 15)
        assert abs(angles[turned].mean()) < 4 * 15 / np.sqrt(3 * turned.sum())


def test_nnunet(nnunet: dict[str, np.ndarray]) -> None:
    probabilities = {
        "noise": 0.1,
        "blur": 0.2,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution": 0.25,
        "gamma_inverted": 0.1,
        "gamma": 0.3,
    }
    for name, probability in probabilities.items():
        assert happens(nnunet[name], probability), name
    assert fills(nnunet["noise_deviation"], 0, 0.1)
    assert fills(nnunet["brightness_factors"], 0.75, 1.25)
    assert fills(nnunet["contrast_factors"], 0.75, 1.25)
    for name in ("exponents", "inverted_exponents"):
        assert fills(nnunet[name], 0.7, 1.5)
        assert happens(nnunet[name] < 1, 0.5)
    blurred = nnunet["blur_sigma"].any(axis=-1)
    assert happens(blurred, 0.5)
    assert fills(nnunet["blur_sigma"][blurred], 0.5, 1.0)
    assert happens(nnunet["zooms"] < 1, 0.5)
    assert fills(nnunet["zooms"][nnunet["zooms"] < 1], 0.5, 1.0)
    # Channels have parameters of their own, and one transform's say nothing of another's.
    for a, b in (
        (nnunet["exponents"][:, 0], nnunet["exponents"][:, 1]),
        (nnunet["exponents"][:, 0], nnunet["inverted_exponents"][:, 0]),
        (nnunet["gamma"], nnunet["contrast"]),
        (nnunet["gamma"], nnunet["exponents"][:, 0]),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(MANY)


def test_nnunet_rotates_and_scales_apart() -> None:
    values = drawn(NNUNET)
    scales = np.linalg.norm(values["matrix"], axis=1)
    np.testing.assert_allclose(scales, np.broadcast_to(scales[:, :1], scales.shape), atol=1e-5)  # one for all axes
    scaled = np.abs(scales[:, 0] - 1) > 1e-4
    rotated = np.abs(values["matrix"] / scales[:, None, :] - np.eye(3)).max(axis=(1, 2)) > 1e-4
    assert happens(scaled, 0.2)
    assert happens(rotated, 0.2)
    assert happens(scaled & rotated, 0.04)
    assert fills(scales[scaled, 0], 0.7, 1.4)
    np.testing.assert_array_equal(values["moved"], scaled | rotated)


def test_the_rest(nnunet: dict[str, np.ndarray]) -> None:
    for name in ("elastic", "bias_field", "shift", "scale"):
        assert happens(nnunet[name], 0.5), name
    assert fills(nnunet["sigma"], 9, 13)
    assert fills(nnunet["amplitude"], 0, 5)
    assert fills(nnunet["bias_coefficients"], -0.3, 0.3)
    moved = nnunet["translation"].any(axis=1)
    assert happens(moved, 0.5)
    assert fills(nnunet["translation"][moved], -5, 5)
    shears = drawn(Augmentation(shear=0.5))["matrix"][:, [0, 0, 1], [1, 2, 2]]
    assert happens(shears.any(axis=1), 0.5)
    assert fills(shears[shears.any(axis=1)], -0.1, 0.1)


def test_what_one_transform_draws_does_not_depend_on_the_others(nnunet: dict[str, np.ndarray]) -> None:
    alone = drawn(Augmentation(gamma=0.3))
    np.testing.assert_array_equal(alone["gamma"], nnunet["gamma"])
    np.testing.assert_array_equal(alone["exponents"], nnunet["exponents"])


def test_an_item_depends_on_key_and_number_only(batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, references = batch
    key = jax.random.key(7)
    whole = augment(key, images, references, EVERYTHING)
    other = augment(key, np.concatenate([images[:2], images[:2]]), np.concatenate([references[:2]] * 2), EVERYTHING)
    for a, b in zip(whole, other, strict=True):
        np.testing.assert_array_equal(a[:2], b[:2])
    assert not np.array_equal(other[0][0], other[0][2])  # the same patch, with another number
    again = augment(key, images, references, EVERYTHING)
    np.testing.assert_array_equal(whole[0], again[0])
    assert not np.array_equal(whole[0], augment(jax.random.key(8), images, references, EVERYTHING)[0])
    assert (whole[0].dtype, whole[1].dtype) == (np.float32, np.uint8)
    assert np.isfinite(whole[0]).all()


def test_shared_by_devices_is_the_same(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Each device has a batch of two, whose items keep their numbers in the whole."""
    settings = replace(PAPER, noise=1.0)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    shared = augment(jax.random.key(7), *batch, settings, mesh=mesh)
    alone = augment(jax.random.key(7), *batch, settings)
    np.testing.assert_allclose(shared[0], alone[0], atol=1e-5)
    np.testing.assert_array_equal(shared[1], alone[1])
    assert len(shared[0].sharding.device_set) == 2


def test_nothing_is_changed_without_a_probability(batch: tuple[np.ndarray, np.ndarray]) -> None:
    images, references = augment(jax.random.key(0), *batch, Augmentation())
    np.testing.assert_array_equal(images, batch[0])
    np.testing.assert_array_equal(references, batch[1])


def test_flips_and_turns_keep_image_and_reference_together(batch: tuple[np.ndarray, np.ndarray]) -> None:
    settings = Augmentation(flips=(0.5, 0.5, 0.5), quarter_turns=(0.5, 0.5, 0.5))
    images, references = augment(jax.random.key(0), *batch, settings)
    np.testing.assert_array_equal(references, np.asarray(images[..., 0]) > 1)
    for old, new in zip(batch[0], np.asarray(images), strict=True):
        np.testing.assert_array_equal(np.sort(old.ravel()), np.sort(new.ravel()))
    assert (batch[0] != images).any(axis=(1, 2, 3, 4)).sum() >= 3


def test_each_transform_is_applied_as_it_was_drawn(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Affine movement, gamma, shift and scale, with probability 1, item by item from the parameters that were drawn."""
    settings = Augmentation(rotation=1, scaling=1, translation=1, voxels=(-1, 1), gamma=1, shift=1, scale=1)
    key = jax.random.key(3)
    images, references = augment(key, *batch, settings)
    draw_item = jax.jit(lambda item: draw(jax.random.fold_in(key, item), settings, 2))
    for item in range(2):
        p = draw_item(item)
        matrix, centre = np.asarray(p.matrix, float), np.full(3, 3.5)
        offset = centre - matrix @ centre + np.asarray(p.translation)
        for c in range(2):
            x = ndimage.affine_transform(batch[0][item, ..., c].astype(float), matrix, offset, order=1, mode="nearest")
            y = ((x - x.min()) / np.ptp(x)) ** float(p.exponents[c]) * np.ptp(x) + x.min()
            y = (y - y.mean()) / y.std() * x.std() + x.mean()
            expected = (y + float(p.offset)) * float(p.factor)
            np.testing.assert_allclose(images[item, ..., c], expected, atol=1e-4)
        moved = ndimage.affine_transform(batch[1][item], matrix, offset, order=0, mode="nearest")
        np.testing.assert_array_equal(references[item], moved)


def test_a_margin_is_what_turns_into_view(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """The movement of the larger patch, as SciPy makes it, cut afterwards."""
    settings = Augmentation(rotation=1)
    key = jax.random.key(1)
    images, references = augment(key, *batch, settings, margin=2)
    drawn_matrix = jax.jit(lambda item: draw(jax.random.fold_in(key, item), settings, 2).matrix)(3)
    matrix, centre = np.asarray(drawn_matrix, float), np.full(3, 3.5)
    for ours, source, order in ((images[3, ..., 0], batch[0][3, ..., 0], 1), (references[3], batch[1][3], 0)):
        moved = ndimage.affine_transform(source, matrix, centre - matrix @ centre, order=order, mode="nearest")
        np.testing.assert_allclose(ours, moved[2:-2, 2:-2, 2:-2], atol=1e-5)
    still = augment(key, *batch, Augmentation(), margin=2)
    np.testing.assert_array_equal(still[0], batch[0][:, 2:-2, 2:-2, 2:-2])


@pytest.mark.parametrize(
    ("changes", "patch", "message"),
    [
        ({"gamma": 1.5}, (8, 8, 8), r"augmentation.gamma: 1.5; expected a number from 0 to 1: correct it"),
        ({"flips": (0.5, 0.5)}, (8, 8, 8), r"augmentation.flips: .*; expected three numbers from 0 to 1"),
        ({"scales": (1.1, 0.9)}, (8, 8, 8), r"augmentation.scales: .*; expected two numbers, the lower first"),
        ({"scales": (0.9, 1.0, 1.1)}, (8, 8, 8), r"augmentation.scales: .*; expected two numbers"),
        ({"zooms": (0.0, 1.0)}, (8, 8, 8), r"augmentation.zooms: .*; expected positive numbers"),
        ({"zooms": (0.5, 2.0)}, (8, 8, 8), r"augmentation.zooms: .*; expected 1 at most"),
        ({"blur_sigma": (-1.0, 1.0)}, (8, 8, 8), r"augmentation.blur_sigma: .*; expected numbers of 0 or more"),
        (
            {"quarter_turns": (0, 0.5, 0)},
            (8, 8, 6),
            r"augmentation.quarter_turns: .* of \(8, 8, 6\) voxels; .*set 0 there",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, patch: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_augmentation(replace(Augmentation(), **changes), patch)


def test_presets_and_partial_turns_are_accepted() -> None:
    for settings in (PAPER, NNUNET, EVERYTHING, Augmentation()):
        check_augmentation(settings, (8, 8, 8))
    check_augmentation(replace(PAPER, quarter_turns=(0.5, 0, 0)), (8, 8, 6))
    assert all(isinstance(getattr(PAPER, field.name), float | tuple | bool) for field in fields(Augmentation))
