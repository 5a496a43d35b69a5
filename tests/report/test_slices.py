"""Slices of altered scans and the picture of filled lesions: what is drawn is what was measured, the same bytes each time."""

import numpy as np
import pytest
from nibabel.affines import apply_affine

from xaiseg.report.counterfactual import counterfactual_figure
from xaiseg.report.slices import Slice, SliceRow, axial_slice, slices_figure


@pytest.mark.parametrize("rotation", [np.eye(3), np.diag([-1, 1, -1]), np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])])
def test_a_slice_is_axial_whatever_the_storage(rotation):
    """Channels are the world's x, y and z, so that a slice tells where it was taken."""
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 2.0, 0.5])
    affine[:3, 3] = 3, -4, 5
    world = apply_affine(affine, np.indices((24, 20, 30)).transpose(1, 2, 3, 0))
    voxels = np.argwhere(np.ones((3, 1, 2))) + np.array([10, 9, 12])
    found = axial_slice(world, voxels, affine, side_mm=12)
    x, y, z = np.moveaxis(found.values, -1, 0)
    step = found.spacing
    np.testing.assert_allclose(np.diff(x, axis=0), step[0])
    np.testing.assert_allclose(np.diff(y, axis=1), step[1])
    assert np.ptp(z) == 0
    assert z[0, 0] in apply_affine(affine, voxels)[:, 2]
    own = {tuple(np.round(p, 6)) for p in apply_affine(affine, voxels) if abs(p[2] - z[0, 0]) < 1e-6}
    assert {tuple(np.round(p, 6)) for p in found.values[found.mask]} == own
    assert 12 <= x.max() - x.min() + step[0] <= 12 + 3 * step[0]


def slices(count, columns):
    rng = np.random.default_rng(0)
    mask = np.zeros((9, 12), bool)
    mask[3:6, 4:8] = True
    return [
        SliceRow(f"$case · {n}", [Slice(rng.normal(size=(9, 12, 2)), mask, (1.0, 1.5)) for _ in range(columns)])
        for n in range(count)
    ]


def test_slices(tmp_path):
    rows = slices(2, 3)
    options = {"title": "Title", "facts": "facts"}
    fig = slices_figure(rows, "abc", ("FLAIR", "T1w"), None, **options)
    assert len(fig.axes) == 2 * 3 * 2
    axes = {ax.get_label(): ax for ax in fig.axes}
    shown = axes["T1w 1 2"].images[0]
    np.testing.assert_allclose(shown.get_array(), rows[1].slices[2].values[..., 1].T)
    values = [s.values[..., 1] for s in rows[1].slices]
    np.testing.assert_allclose(shown.get_clim(), (np.min(values), np.max(values)))
    assert axes["T1w 1 0"].collections
    assert not axes["T1w 1 2"].collections
    left, right = axes["T1w 1 0"].get_xlim()
    assert left > right
    for name in ("a.png", "b.png"):
        assert slices_figure(rows, "abc", ("FLAIR", "T1w"), tmp_path / name, **options) is None
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="expected at least one, each with 2 slices"):
        slices_figure(rows, "ab", ("FLAIR", "T1w"), None, **options)


@pytest.mark.parametrize("saliency", [False, True])
@pytest.mark.parametrize("neighbours", [0, 3])
def test_filled_lesions(saliency, neighbours, tmp_path):
    rows = []
    for n in range(4):
        for k in range(1 + neighbours):
            after = 0.1 if k == 0 else 0.8 + 0.02 * k
            row = {"patient": f"p{n // 2}", "role": "neighbour" if k else "filled", "distance_mm": 5.0 * k}
            row |= {"before_mean_probability": 0.9 - 0.1 * n, "after_mean_probability": after}
            rows.append(row | ({"saliency_change": 0.5 / (1 + k)} if saliency else {}))
    fig = counterfactual_figure(rows, None)
    axes = {ax.get_label(): ax for ax in fig.axes}
    assert set(axes) == {"Filled lesions", "Neighbours"} | ({"Saliency maps"} if saliency else set())
    np.testing.assert_allclose(axes["Filled lesions"].lines[-1].get_ydata(), [0.75, 0.1])
    points = axes["Neighbours"].lines[-1]
    assert len(points.get_xdata()) == 4 * neighbours
    if neighbours:
        assert points.get_ydata()[0] == pytest.approx(0.82 - 0.9)
    else:
        assert "no lesion that near" in [text.get_text() for text in axes["Neighbours"].texts]
    for name in ("a.png", "b.png"):
        assert counterfactual_figure(rows, tmp_path / name) is None
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
