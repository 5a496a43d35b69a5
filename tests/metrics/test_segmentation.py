"""Dice and normalised Dice against values worked out by hand."""

import numpy as np
import pytest

from xaiseg.metrics import dice, normalised_dice


def masks(true, false_positive, false_negative, size=1000):
    """A prediction and a reference with these counts of voxels."""
    predicted, reference = np.zeros(size, bool), np.zeros(size, bool)
    predicted[: true + false_positive] = True
    reference[:true] = reference[size - false_negative :] = True
    if false_negative == 0:
        reference[true:] = False
    return predicted.reshape(10, 10, -1), reference.reshape(10, 10, -1)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((6, 2, 4), 12 / 18),
        ((5, 0, 0), 1.0),
        ((0, 3, 4), 0.0),
        ((0, 3, 0), 0.0),
        ((0, 0, 4), 0.0),
        ((0, 0, 0), 1.0),
    ],
)
def test_dice(counts, expected):
    assert dice(*masks(*counts)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # κ = 0.999 · 10 / (0.001 · 990) = 10.0909…; 12 / (2κ + 12 + 4)
        ((6, 2, 4), 12 / (2 * 0.999 * 10 / (0.001 * 990) + 16)),
        ((6, 0, 4), 12 / 16),  # without false positives κ does not matter
        ((0, 3, 4), 0.0),
        ((0, 3, 0), 0.0),  # empty reference: κ = 1
        ((0, 0, 4), 0.0),
        ((0, 0, 0), 1.0),
        ((1000, 0, 0), 1.0),  # nothing but lesion
    ],
)
def test_normalised_dice(counts, expected):
    assert normalised_dice(*masks(*counts)) == pytest.approx(expected)


def test_at_the_reference_load_both_are_one_measure():
    """With |G| / V = r, κ is 1."""
    predicted, reference = masks(6, 2, 4)
    assert normalised_dice(predicted, reference, r=0.01) == pytest.approx(dice(predicted, reference))


def test_normalised_dice_does_not_fall_with_the_lesion_load():
    """Same precision relative to the load: twice the lesions with twice the false positives score the same nDSC at fixed κ·FP."""
    low = normalised_dice(*masks(10, 1, 0, 100_000))
    high = normalised_dice(*masks(100, 1, 0, 100_000))
    # κ·FP grows with |G| as 2TP does, so nDSC stays where Dice rises from 20/21 to 200/201; 1e-3 for the V - |G| in κ
    assert low == pytest.approx(high, abs=1e-3)
