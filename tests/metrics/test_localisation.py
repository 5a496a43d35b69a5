"""Localisation and leakage against loops over voxels of the whole volume, and on maps where they are known."""

import doctest
import sys

import numpy as np
import pytest

from xaiseg import Instance, SaliencyMap
from xaiseg.metrics.localisation import leakage, localisation

SHAPE = (8, 7, 6)
MAP = SaliencyMap(np.random.default_rng(0).standard_normal((4, 5, 3, 2)).astype(np.float32), (2, 1, 1))
# the last two lie beyond the crop
LESION = Instance(1, np.array([[2, 1, 1], [3, 2, 2], [3, 3, 2], [4, 3, 3], [7, 6, 5], [0, 0, 0]], np.int32))
OTHERS = [LESION, Instance(2, np.array([[5, 5, 3], [5, 4, 3]], np.int32)), Instance(4, np.array([[0, 6, 0]], np.int32))]


def volume(saliency=MAP):
    whole = np.zeros((*SHAPE, 2))
    whole[2:6, 1:6, 1:4] = saliency.values
    return whole


def test_localisation_is_a_loop_over_the_volume():
    found = localisation(MAP, LESION)
    whole, lesion = volume(), set(map(tuple, LESION.voxels.tolist()))
    inside, total = np.zeros(3), np.zeros(3)
    heights = {}
    for place in np.ndindex(SHAPE):
        for value in whole[place]:
            parts = np.array([max(value, 0), max(-value, 0), abs(value)])
            total += parts
            inside += parts * (place in lesion)
        heights[place] = max(abs(whole[place]))
    np.testing.assert_allclose(found[:3], inside / total, rtol=1e-6)
    top = sorted(heights, key=lambda p: -heights[p])[:6]
    assert found.rank == pytest.approx(len(lesion & set(top)) / 6)
    assert found.pointing == (top[0] in lesion)


@pytest.mark.parametrize("seed", range(5))
def test_rank_and_pointing_on_other_maps(seed):
    """Heights are scaled up in the lesion so that there are hits."""
    rng = np.random.default_rng(seed)
    saliency = MAP._replace(values=rng.standard_normal(MAP.values.shape))
    for voxel in LESION.voxels[:4] - 2 * np.eye(3, dtype=int)[0] - [0, 1, 1]:
        saliency.values[tuple(voxel)] *= 3
    heights = np.abs(volume(saliency)).max(-1)
    top = np.argsort(-heights.ravel())[:6]
    lesion = np.ravel_multi_index(tuple(LESION.voxels.T), SHAPE)
    found = localisation(saliency, LESION)
    assert found.rank == pytest.approx(np.isin(top, lesion).sum() / 6)
    assert found.pointing == np.isin(top[0], lesion)


def test_a_map_in_its_lesion_and_one_beside_it():
    values = np.zeros((3, 3, 3, 1))
    values[1, 1, 1] = 2
    inside, outside = (Instance(1, np.array([v], np.int32)) for v in ([1, 1, 1], [1, 1, 2]))
    assert localisation(SaliencyMap(values, (0, 0, 0)), inside)[2:] == (1, 1, 1)
    assert localisation(SaliencyMap(-values, (0, 0, 0)), outside)[1:] == (0, 0, 0, 0)
    assert np.isnan(localisation(SaliencyMap(values, (0, 0, 0)), inside).negative)


def test_pointing_is_in_millimetres():
    values = np.zeros((5, 5, 5, 1))
    values[0, 0, 0] = -1
    lesion = Instance(1, np.array([[1, 2, 0], [4, 4, 4]], np.int32))
    spacing = (3.0, 0.5, 1.0)  # √(3² + 1²) mm
    for tolerance, hit in ((0, 0), (3.16, 0), (np.sqrt(10), 1), (4, 1)):
        found = localisation(SaliencyMap(values, (0, 0, 0)), lesion, tolerance_mm=tolerance, spacing=spacing)
        assert found.pointing == hit
    # without spacing it is √5 away
    assert localisation(SaliencyMap(values, (0, 0, 0)), lesion, tolerance_mm=2.3).pointing == 1


def test_equal_values_count_as_the_mean_over_all_choices():
    """Three voxels share the second place, one of them in the lesion; two share the maximum of another map."""
    values = np.array([3.0, 2, 2, 2, 1]).reshape(5, 1, 1, 1)
    lesion = Instance(1, np.array([[1, 0, 0], [4, 0, 0]], np.int32))
    assert localisation(SaliencyMap(values, (0, 0, 0)), lesion).rank == pytest.approx(1 / 3 / 2)
    values = np.array([3.0, 3, 2]).reshape(3, 1, 1, 1)
    assert localisation(SaliencyMap(values, (0, 0, 0)), Instance(1, np.array([[1, 0, 0]], np.int32))).pointing == 0.5


def test_zeros_are_never_among_the_top():
    values = np.array([3.0, 0, 0]).reshape(3, 1, 1, 1)
    lesion = Instance(1, np.array([[1, 0, 0], [2, 0, 0]], np.int32))
    assert localisation(SaliencyMap(values, (0, 0, 0)), lesion)[2:] == (0, 0, 0)


def test_nothing_to_localise():
    empty = Instance(1, np.zeros((0, 3), np.int32))
    assert np.isnan(localisation(MAP, empty)).all()
    assert np.isnan(localisation(MAP._replace(values=MAP.values * 0), LESION)).all()
    lost = MAP.values.copy()
    lost[0, 0, 0, 0] = np.nan
    assert np.isnan(localisation(MAP._replace(values=lost), LESION)).all()
    with pytest.raises(ValueError, match="tolerance_mm is -1"):
        localisation(MAP, LESION, tolerance_mm=-1)


def test_leakage_is_a_loop_over_the_volume():
    whole = np.abs(volume()).sum(-1)
    masses = [sum(whole[tuple(v)] for v in i.voxels.tolist()) for i in OTHERS]
    for own in range(3):
        assert leakage(MAP, own, OTHERS) == pytest.approx(1 - masses[own] / sum(masses), rel=1e-6)
    assert leakage(MAP, 2, OTHERS) == 1  # nothing of it lies in the crop


def test_leakage_where_there_is_none():
    assert np.isnan(leakage(MAP, 0, OTHERS[:1]))
    assert np.isnan(leakage(MAP._replace(values=MAP.values * 0), 0, OTHERS))


def test_the_example_runs():
    result = doctest.testmod(sys.modules["xaiseg.metrics.localisation"])
    assert result.attempted > 0
    assert result.failed == 0
