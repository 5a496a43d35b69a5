"""Synthetic lesions and fillings, on a phantom whose anatomy is known and on flat white matter of known numbers."""

import importlib
from typing import NamedTuple

import numpy as np
import pytest
from scipy import ndimage

from training.lesion_bank import LesionBank
from training.synthesis import Settings, insert, synthesise
from training.volumes import Volume, make_volume
from xaiseg.errors import InputError
from xaiseg.imaging.phantom import Phantom, phantom
from xaiseg.imaging.phantom_anatomy import draw_anatomy
from xaiseg.imaging.phantom_lesions import draw_lesions
from xaiseg.imaging.white_matter import WhiteMatter, white_matter
from xaiseg.instances import label_components
from xaiseg.instances.lesion_filling import (
    EDGE,
    FILLED_EDGE,
    Texture,
    drawn,
    edge_weight,
    fill,
    interpolated,
    texture_of,
)

CUBE = np.ones((3, 3, 3))
SHAPE, SPACING = (88, 106, 88), 1.8  # coarser voxels leave little white matter that is pure


class Brain(NamedTuple):
    """A phantom as a volume, the same brain without its lesions in the same units, and the truth."""

    volume: Volume
    clean: np.ndarray
    truth: Phantom
    white: WhiteMatter


@pytest.fixture(scope="module")
def brain() -> Brain:
    module = importlib.import_module("xaiseg.imaging.phantom")
    kept: list = []

    def anatomy(rng: np.random.Generator, *arguments):
        """Drawn once: the second brain is given the first one's and goes on with its random numbers."""
        if not kept:
            kept.append((draw_anatomy(rng, *arguments), rng.bit_generator.state))
        rng.bit_generator.state = kept[0][1]
        return kept[0][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_anatomy", anatomy)
        truth = phantom(4, SHAPE, SPACING, lesions=16)
        # every random number is drawn as before, but no lesion is blended in
        patch.setattr(module, "draw_lesions", lambda *arguments: (draw_lesions(*arguments)[0], []))
        healthy = phantom(4, SHAPE, SPACING, lesions=16)
    channels = [(truth.flair, healthy.flair), (truth.t1w, healthy.t1w)]
    inside = truth.flair != 0
    image, clean = (
        np.stack([np.where(inside, (p[k] - p[0][inside].mean()) / p[0][inside].std(), 0) for p in channels], -1)
        for k in (0, 1)
    )
    volume = make_volume("patient", image.astype(np.float32), truth.lesions > 0)
    return Brain(volume, clean, truth, white_matter(volume.image, volume.reference))


@pytest.fixture(scope="module")
def bank(brain: Brain) -> LesionBank:
    return LesionBank.of([brain.volume])


def flat(shape: tuple[int, int, int] = (40, 40, 40), seed: int = 0) -> tuple[np.ndarray, WhiteMatter]:
    """White matter throughout: FLAIR 1 ± 0.1, T1w 2 ± 0.1 with white noise; two background planes."""
    rng = np.random.default_rng(seed)
    image = (rng.normal(size=(*shape, 2)) * [0.1, 0.1] + [1, 2]).astype(np.float32)
    image[:2] = 0
    mask = np.zeros(shape, bool)
    mask[5:-3, 3:-3, 3:-3] = True
    return image, WhiteMatter(mask, np.zeros(shape, bool))


def donor(side: int) -> Volume:
    """Much of fluid, grey and white matter, each ± 0.1, and in the white a cube 0.4 brighter on FLAIR and 0.3 darker on T1w."""
    image, _ = flat()
    image[2:12] += np.float32([-2, -4])
    image[12:, :12] += np.float32([0.4, -1.5])
    reference = np.zeros(image.shape[:3], bool)
    cube = slice(22, 22 + side)
    reference[cube, cube, cube] = True
    image[reference] += np.float32([0.4, -0.3])
    reference[34, 34, 34] = True  # a lesion below the minimum size
    return make_volume("donor", image, reference)


def distance_within(mask: np.ndarray, reach: int) -> np.ndarray:
    return ndimage.binary_dilation(mask, CUBE, reach)


def test_white_matter_of_a_phantom_is_white_matter(brain: Brain) -> None:
    found, truth = brain.white.mask, brain.truth
    white = (truth.tissue == 3) & (truth.lesions == 0)
    assert (found & white).sum() / found.sum() > 0.98
    assert (found & white).sum() / white.sum() > 0.25
    assert not (found & (truth.tissue == 0)).any()
    assert (found & (truth.tissue == 1)).sum() < 1e-3 * found.sum()
    assert not (found & distance_within(truth.lesions > 0, 2)).any()


def test_places_near_ventricles_are_near_fluid_deep_in_the_brain(brain: Brain) -> None:
    near, truth = brain.white.near_ventricles, brain.truth
    assert 100 < near.sum() < brain.white.mask.sum() / 2
    assert not (near & ~brain.white.mask).any()
    deep = ndimage.distance_transform_edt(truth.tissue > 0) > 10
    # a cube's corner is √3 times its reach away: 5 voxels and one eroded
    to_fluid = ndimage.distance_transform_edt(~((truth.tissue == 1) & deep))
    assert to_fluid[near].max() <= 6 * np.sqrt(3) + 1


def test_white_matter_does_not_depend_on_the_units_of_the_scan(brain: Brain) -> None:
    image = brain.volume.image
    scaled = np.where(image == 0, 0, image * [7.0, 0.5] + [300.0, 50.0])
    agree = white_matter(scaled, brain.volume.reference).mask
    # the blur at the border of the brain is normalised, so only rounding differs
    assert (agree != brain.white.mask).mean() < 1e-4


def test_the_bank_holds_the_lesions_in_units_of_nearby_white_matter() -> None:
    (lesion,) = LesionBank.of([donor(6)]).lesions
    assert (lesion.source, lesion.mask.sum(), lesion.mask.shape) == ("donor", 216, (10, 10, 10))
    # robust spreads of some thousand voxels are known to 3 %, the lesion's mean to 2 %
    np.testing.assert_allclose(lesion.contrast[lesion.mask].mean(0), [4, -3], rtol=0.06)
    np.testing.assert_allclose(lesion.spread, [0.1, 0.1], rtol=0.05)


def test_the_bank_names_its_sources_and_passes_over_volumes_without_lesions(brain: Brain, bank: LesionBank) -> None:
    empty = make_volume("healthy", brain.volume.image, np.zeros(SHAPE, bool))
    both = LesionBank.of([empty, brain.volume])
    assert both.sources == {"patient"}
    assert len(both.lesions) == len(bank.lesions) <= 16
    for lesion in bank.lesions:
        assert lesion.contrast[..., 0].min() >= 0
        assert lesion.contrast[..., 1].max() <= 0
        assert label_components(lesion.mask, 18).max() == 1


def test_inserted_lesions_are_the_only_change(brain: Brain, bank: LesionBank) -> None:
    image, reference = brain.volume.image, brain.volume.reference
    before = image.copy(), reference.copy()
    settings = Settings(gap=4, size=(8, 400))
    out, new = insert(np.random.default_rng(0), image, reference, bank, count=6, settings=settings, white=brain.white)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(reference, before[1])
    assert (out.dtype, new.dtype, out.shape) == (np.float32, bool, image.shape)
    inserted = new & ~reference
    assert (new & reference).sum() == reference.sum()
    assert label_components(inserted, 18).max() == 6
    assert label_components(new, 18).max() == label_components(reference, 18).max() + 6
    assert not (inserted & ~brain.white.mask).any()
    sizes = np.bincount(label_components(inserted, 18).ravel())[1:]
    assert 8 <= sizes.min() <= sizes.max() <= 400
    # four voxels lie between a lesion put in and any other
    labels = label_components(new, 18)
    for number in np.unique(labels[inserted]):
        assert set(np.unique(labels[distance_within(labels == number, 4)])) <= {0, number}
    changed = (out != image).any(-1)
    assert not (changed & ~distance_within(inserted, EDGE)).any()
    assert changed[inserted].all()
    assert not out[image == 0].any()


def test_a_lesion_is_bright_on_flair_and_dark_on_t1w_by_its_contrast() -> None:
    bank = LesionBank.of([donor(9)])
    fresh, white = flat(seed=1)
    nothing = np.zeros(fresh.shape[:3], bool)
    for factor, unit in ((1.0, "tissue"), (0.5, "tissue"), (1.0, "image")):
        settings = Settings(scale=(1, 1), contrast=(factor, factor), texture=0.0, periventricular=0.0, unit=unit)
        target = np.where(fresh == 0, 0, fresh * 2).astype(np.float32)  # twice the spread, so twice the contrast
        out, mask = insert(np.random.default_rng(3), target, nothing, bank, count=1, settings=settings, white=white)
        gain = (out - target)[mask].mean(0)
        np.testing.assert_allclose(gain, np.array([0.4, -0.3]) * factor * (2 if unit == "tissue" else 1), rtol=0.08)


def test_background_stays_zero_within_the_reach_of_a_lesion() -> None:
    image, white = flat()
    image[::7] = 0  # whatever the place, a lesion of 9 voxels crosses such a plane
    nothing = np.zeros(image.shape[:3], bool)
    settings = Settings(scale=(1, 1), periventricular=0.0)
    out, mask = insert(
        np.random.default_rng(0), image, nothing, LesionBank.of([donor(9)]), count=1, settings=settings, white=white
    )
    assert mask[::7].any()
    assert not out[::7].any()
    filled = fill(np.random.default_rng(0), out, mask, white.mask)
    assert not filled[::7].any()


def test_every_visible_lesion_of_a_phantom_stands_out_where_it_is_put(brain: Brain, bank: LesionBank) -> None:
    seen = LesionBank(tuple(b for b in bank.lesions if b.contrast[b.mask][:, 1].mean() < -1.5), bank.channels)
    out, new = insert(
        np.random.default_rng(1), brain.volume.image, brain.volume.reference, seen, count=5, white=brain.white
    )
    labels = label_components(new & ~brain.volume.reference, 18)
    assert labels.max() == 5
    for number in range(1, 6):
        lesion = labels == number
        around = distance_within(lesion, 6) & brain.white.mask & ~distance_within(new, EDGE)
        flair, t1w = out[lesion].mean(0) - out[around].mean(0)
        assert flair > 0.3  # z-scored: a third of the brain's standard deviation
        assert t1w < 0


def test_periventricular_lesions_lie_near_ventricles(brain: Brain, bank: LesionBank) -> None:
    small = Settings(periventricular=1.0, size=(5, 40), scale=(1, 1))
    near = distance_within(brain.white.near_ventricles, 1)
    for share, least, most in ((1.0, 0.8, 1.0), (0.0, 0.0, 0.7)):
        settings = Settings(periventricular=share, size=small.size, scale=small.scale)
        _, new = insert(
            np.random.default_rng(2), brain.volume.image, brain.volume.reference, bank, count=10, settings=settings,
            white=brain.white,
        )  # fmt: skip
        labels = label_components(new & ~brain.volume.reference, 18)
        middles = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, labels.max() + 1))).round().astype(int)
        assert least <= near[tuple(middles.T)].mean() <= most


def test_lesions_are_put_in_until_their_volume_is_reached(brain: Brain, bank: LesionBank) -> None:
    settings = Settings(size=(5, 60))
    arguments = brain.volume.image, brain.volume.reference, bank
    _, new = insert(np.random.default_rng(4), *arguments, voxels=150, settings=settings, white=brain.white)
    added = new.sum() - brain.volume.reference.sum()
    assert 150 <= added < 150 + 60
    nowhere = WhiteMatter(np.zeros(SHAPE, bool), np.zeros(SHAPE, bool))
    nowhere.mask[50, 50, 50] = True
    out, new = insert(np.random.default_rng(4), *arguments, count=1, white=nowhere)
    np.testing.assert_array_equal(new, brain.volume.reference)
    np.testing.assert_array_equal(out, brain.volume.image)


def test_filling_restores_the_brain_without_lesions(brain: Brain) -> None:
    image, reference, clean = brain.volume.image, brain.volume.reference, brain.clean
    # the truth is the same brain, noise and all: a lesion and its blur end within 5 voxels
    np.testing.assert_allclose(image[~distance_within(reference, 5)], clean[~distance_within(reference, 5)], atol=1e-5)
    before = image.copy()
    out = fill(np.random.default_rng(0), image, reference, brain.white.mask)
    np.testing.assert_array_equal(image, before)
    changed = (out != image).any(-1)
    assert not (changed & ~distance_within(reference, FILLED_EDGE)).any()
    assert not out[image == 0].any()
    spread = image[brain.white.mask].std(0)
    error, damage = np.abs((out - clean)[reference].mean(0)), np.abs((image - clean)[reference].mean(0))
    assert (error < 0.5 * spread).all()
    assert (error < damage / 4).all()
    labels = brain.truth.lesions
    means = [(out - clean)[labels == n].mean(0) for n in range(1, labels.max() + 1)]
    # partial volume with cortex and ventricle is not white, so one spread, not the error of a mean
    assert (np.median(np.abs(means), axis=0) < 0.5 * spread).all()


def test_interpolation_follows_a_slope_and_texture_has_spread_and_correlation() -> None:
    x = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((40, 40, 40), np.float32)
    known = np.ones(x.shape, bool)
    known[16:24, 16:24, 16:24] = False
    smooth = interpolated(x[..., None], known)[..., 0]
    # symmetric about 19.5, between the values at both sides of the hole, rising
    profile = smooth[16:24, 20, 20]
    np.testing.assert_allclose(profile + profile[::-1], 39, atol=0.1)
    assert (np.diff(profile) > 0).all()
    wanted = Texture(np.array([0.5, 2.0]), np.array([[0.0, 0.0, 0.0], [0.6, 0.8, 1.0]]))
    noise = drawn(np.random.default_rng(0), wanted, (60, 60, 60))
    # 216 000 voxels, fewer independent ones
    np.testing.assert_allclose(noise.std((0, 1, 2)), wanted.spread, rtol=0.02)
    for axis, sigma in enumerate((0.6, 0.8, 1.0)):
        rows = np.moveaxis(noise[..., 1], axis, 0)
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
        expected = (kernel[1:] * kernel[:-1]).sum() / (kernel**2).sum()
        assert np.corrcoef(rows[1:].ravel(), rows[:-1].ravel())[0, 1] == pytest.approx(expected, abs=0.03)
    measured = texture_of(noise, np.ones((60, 60, 60), bool))
    np.testing.assert_allclose(measured.spread, wanted.spread, rtol=0.08)  # the high pass takes a little
    np.testing.assert_allclose(measured.sigma[1], wanted.sigma[1], rtol=0.12)
    assert measured.sigma[0].max() < 0.3


def test_a_soft_edge_is_one_inside_and_ends_after_two_voxels() -> None:
    mask = np.zeros((15, 15, 15), bool)
    mask[5:10, 5:10, 5:10] = True
    weight = edge_weight(mask)
    assert (weight[mask] == 1).all()
    assert (weight[7, 7, 10:13] > [0.3, 0.02, -1]).all()
    assert (np.diff(weight[7, 7, 9:14]) <= 0).all()
    assert not weight[~distance_within(mask, EDGE)].any()


def test_synthesis_depends_on_its_seed_only_and_leaves_the_volume_alone(
    brain: Brain, bank: LesionBank, tmp_path
) -> None:
    np.save(tmp_path / "image.npy", brain.volume.image)
    mapped = brain.volume._replace(image=np.load(tmp_path / "image.npy", mmap_mode="r"))
    settings = Settings(probability=1.0, lesions=(3, 3), filled=0.5, size=(5, 200))
    one = synthesise((5, 0), mapped, bank, settings)
    two = synthesise((5, 0), brain.volume, bank, settings, brain.white)
    added = synthesise(3, brain.volume, bank, Settings(1.0, (3, 3), filled=0.0), brain.white).reference
    assert label_components(added, 18).max() == label_components(brain.volume.reference, 18).max() + 3
    for a, b in zip(one[1:], two[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    other = synthesise((5, 1), brain.volume, bank, settings, brain.white)
    assert not np.array_equal(one.reference, other.reference)
    np.testing.assert_array_equal(np.load(tmp_path / "image.npy"), brain.volume.image)
    assert one.name == "patient"
    np.testing.assert_array_equal(one.lesion, np.flatnonzero(one.reference))
    removed = label_components(brain.volume.reference & ~one.reference, 18).max()
    assert 3 <= removed <= 13  # of 16, binomial of half
    everything = Settings(probability=1.0, lesions=(0, 0), filled=1.0)
    assert not synthesise(0, brain.volume, bank, everything, brain.white).reference.any()


def test_a_share_of_volumes_is_left_as_it_is(brain: Brain, bank: LesionBank) -> None:
    assert synthesise(0, brain.volume, bank, Settings(probability=0.0)) is brain.volume
    none = Settings(probability=0.5, lesions=(0, 0), filled=0.0)
    left = [synthesise((1, i), brain.volume, bank, none, brain.white) is brain.volume for i in range(12)]
    assert 2 <= sum(left) <= 10


def test_what_cannot_be_used_is_refused(brain: Brain, bank: LesionBank) -> None:
    image, reference = brain.volume.image, brain.volume.reference
    empty = make_volume("healthy", image, np.zeros(SHAPE, bool))
    with pytest.raises(InputError, match="no lesion of 5 voxels or more stands out on FLAIR in healthy"):
        LesionBank.of([empty])
    with pytest.raises(InputError, match="channels are FLAIR, T2w, expected FLAIR and T1w"):
        LesionBank.of([brain.volume], ("FLAIR", "T2w"))
    with pytest.raises(InputError, match="patient has 2 channels, expected FLAIR, T1w, T2w"):
        LesionBank.of([brain.volume], ("FLAIR", "T1w", "T2w"))
    with pytest.raises(InputError, match="0 voxels of brain were found"):
        white_matter(np.zeros((9, 9, 9, 2), np.float32), np.zeros((9, 9, 9), bool))
    with pytest.raises(InputError, match="the white matter given is empty"):
        insert(
            np.random.default_rng(0), image, reference, bank, count=1, white=WhiteMatter(reference & False, reference)
        )
    with pytest.raises(InputError, match="no voxel of white matter is left"):
        fill(np.random.default_rng(0), image, reference, reference)
    with pytest.raises(InputError, match="the image has 1 channels, the lesion bank FLAIR, T1w"):
        insert(np.random.default_rng(0), image[..., :1], reference, bank, count=1)
    with pytest.raises(InputError, match="lesions has 90000 to 99999 voxels"):
        insert(np.random.default_rng(0), image, reference, bank, count=1, settings=Settings(size=(90000, 99999)))
    with pytest.raises(ValueError, match="either count or voxels"):
        insert(np.random.default_rng(0), image, reference, bank)


@pytest.mark.parametrize(
    "change",
    [{"probability": 1.5}, {"lesions": (5, 2)}, {"size": (0, 4)}, {"scale": (0, 1)}, {"gap": 0}, {"unit": "mm"}],
)
def test_settings_that_cannot_be_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match=f"synthesis: {next(iter(change))} is"):
        Settings(**change)
