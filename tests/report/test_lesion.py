"""The picture of a lesion: what is checked are numbers and sides, and that the same input gives the same bytes."""

from itertools import product

import matplotlib.style
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image

from xaiseg.report.lesion import field_of_view, grey_window, lesion_figure, outline, planes_through, symmetric_limit

SHAPE = (40, 48, 36)
TEXT = {"title": "sub-$1$ · lesion 3 · TP", "subtitle": "412 mm³", "unit": "Δlogit"}


@pytest.fixture
def curved() -> np.ndarray:
    """A C in the axial plane, open to the right: its centroid lies outside it."""
    mask = np.zeros(SHAPE, bool)
    mask[12:24, 14:30, 16:19] = True
    mask[15:24, 17:27, 16:19] = False
    return mask


def scan(mask: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> dict:
    """An ellipsoid of noise with the lesion in it, a signed map around the lesion, and an RAS affine."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in mask.shape), indexing="ij"), -1)
    image = rng.normal(0, 1, (*mask.shape, 2)) + 2 * mask[..., None]
    image[(grid**2).sum(-1) > 0.9] = 0
    saliency = 0.02 * rng.normal(0, 1, (*mask.shape, 2)) + mask[..., None] * [0.4, -0.7]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-20, -31, -7)
    return {
        "image": image.astype(np.float32),
        "channels": ("FLAIR", "T1w"),
        "mask": mask,
        "saliency": saliency.astype(np.float32),
        "affine": affine,
    } | TEXT


def panels(fig, columns) -> list:
    return [ax for ax in fig.axes if ax.get_label().split()[-1] in {str(c) for c in columns}]


def pixels(fig) -> np.ndarray:
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(int)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 4), (3, 1, 0.7)])
def test_planes_pass_through_the_lesion_voxel_nearest_its_centroid(curved, spacing):
    voxels = [v for v in product(*map(range, SHAPE)) if curved[v]]
    centroid = np.mean(voxels, axis=0)
    assert not curved[tuple(centroid.round().astype(int))]
    distances = [sum(((a - c) * s) ** 2 for a, c, s in zip(v, centroid, spacing, strict=True)) for v in voxels]
    chosen = planes_through(curved, spacing)
    assert curved[chosen]
    assert distances[voxels.index(chosen)] == pytest.approx(min(distances), abs=1e-5)  # ties are rounded at 1e-6 mm²


def test_every_close_up_of_a_curved_lesion_shows_its_contour(curved):
    for ax in panels(lesion_figure(**scan(curved)), (1, 2, 3, 4)):
        assert all(len(lines.get_segments()) >= 4 for lines in ax.collections)
        assert len(ax.collections) == 2


def test_field_of_view_is_the_lesion_and_the_margin_in_mm():
    mask = np.zeros((9, 9, 9), bool)
    mask[2:4, 3:8, 5] = True
    centre, side = field_of_view(mask, (1.0, 2.0, 6.0), 10)
    np.testing.assert_array_equal(centre, [2.5, 10, 30])
    assert side == 5 * 2 + 20  # five voxels of 2 mm are the longest extent


def test_symmetric_limit_and_shared_scale(curved):
    inputs = scan(curved)
    inputs["saliency"][3, 3, 3, 1] = -2.5
    assert symmetric_limit(inputs["saliency"]) == 2.5
    fig = lesion_figure(**inputs)
    overlays = [ax.images[1] for ax in panels(fig, (3, 4))]
    assert len(overlays) == 6
    assert {image.get_clim() for image in overlays} == {(-2.5, 2.5)}
    labels = [tick.get_text() for tick in fig.axes[-1].get_yticklabels()]
    assert labels == ["−2.50", "−1.25", "0", "+1.25", "+2.50"]


def test_unsigned_map_of_one_channel_lies_on_the_first_channel(curved):
    inputs = scan(curved)
    inputs["saliency"] = np.abs(inputs["saliency"][..., :1])
    fig = lesion_figure(**inputs, signed=False, saliency_names=["Grad-CAM++"])
    first, cam = panels(fig, (1,)), panels(fig, (3,))
    assert {ax.images[1].get_clim() for ax in cam} == {(0, float(inputs["saliency"].max()))}
    for a, b in zip(first, cam, strict=True):
        np.testing.assert_array_equal(a.images[0].get_array(), b.images[0].get_array())
    assert not panels(fig, (4,))


def test_a_map_of_zeros_draws_no_colour(curved):
    inputs = scan(curved)
    inputs["saliency"][:] = 0
    fig = lesion_figure(**inputs)
    assert [tick.get_text() for tick in fig.axes[-1].get_yticklabels()] == ["0"]
    assert all(abs(ax.images[1].to_rgba(np.zeros(1))[0, 3]) < 0.02 for ax in panels(fig, (3, 4)))  # half a colour step


def test_outline_follows_the_voxel_edges():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    segments = outline(ring)
    assert len(segments) == 12 + 4
    np.testing.assert_array_equal(np.abs(segments[:, 0] - segments[:, 1]).sum(-1), 1)
    midpoints = {tuple(m) for m in segments.mean(axis=1)}
    assert {(-0.5, 0), (2.5, 2), (1, -0.5), (0.5, 1), (1, 1.5)} <= midpoints


def test_grey_window_ignores_the_background():
    channel = np.concatenate([np.zeros(10_000), np.linspace(1, 3, 1001)])
    assert grey_window(channel) == (
        pytest.approx(1.01),
        pytest.approx(2.996),
    )  # 0.5 % and 99.8 % of the way from 1 to 3
    assert grey_window(np.zeros(5)) == (0, 1)


@pytest.mark.parametrize("codes", ["LAS", "PIR"])
def test_storage_order_does_not_change_the_picture(curved, codes):
    inputs = scan(curved, spacing=(1.0, 1.5, 3.0))
    order = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = inputs | {name: apply_orientation(inputs[name], order) for name in ("image", "mask", "saliency")}
    stored["affine"] = inputs["affine"] @ inv_ornt_aff(order, SHAPE)
    assert (stored["affine"] != inputs["affine"]).any()
    np.testing.assert_array_equal(pixels(lesion_figure(**stored)), pixels(lesion_figure(**inputs)))


def test_right_anterior_and_superior_lie_on_the_labelled_sides():
    mask = np.zeros(SHAPE, bool)
    mask[28:36, 36:44, 24:32] = True  # right, anterior, superior of the middle
    inputs = scan(mask)
    inputs["image"][:] = np.float32(-1) * (np.indices(SHAPE)[0][..., None] % 2 + 1)
    inputs["image"][mask] = 9
    fig = lesion_figure(**inputs)
    drawn = pixels(fig)
    for ax, (left, right, top, bottom) in zip(panels(fig, (0,)), ("RLAP", "RLSI", "APSI"), strict=True):
        sides = {text.get_text(): text.get_position() for text in ax.texts}
        assert sides[left][0] < 0.1 < 0.9 < sides[right][0]
        assert sides[bottom][1] < 0.1 < 0.9 < sides[top][1]
        x0, y0, x1, y1 = ax.bbox.extents.round().astype(int)
        panel = drawn[len(drawn) - y1 : len(drawn) - y0, x0:x1]
        n = len(panel)
        inner = panel[n // 7 : -n // 7, n // 7 : -n // 7]  # without the letters
        rows, columns = np.nonzero((inner > 250).all(-1))
        assert len(rows) > 100
        assert columns.mean() < inner.shape[1] / 2
        assert rows.mean() < inner.shape[0] / 2


def test_anisotropic_voxels_keep_their_shape():
    mask = np.zeros(SHAPE, bool)
    mask[10:22, 20:26, 16:18] = True
    fig = lesion_figure(**scan(mask, spacing=(0.5, 1.0, 3.0)))  # 6 mm on every side
    sizes = []
    for ax in panels(fig, (1, 2, 3, 4)):
        (lines, _) = (c for c in ax.collections if isinstance(c, LineCollection))
        points = ax.transData.transform(np.concatenate(lines.get_segments()))
        sizes.append(np.ptp(points, axis=0))
        bar = ax.transData.transform(ax.lines[0].get_xydata())[:, 0] if ax.lines else None
        assert bar is None or np.ptp(bar) == pytest.approx(sizes[-1][0] * 10 / 6)
    np.testing.assert_allclose(sizes, sizes[0][0], rtol=1e-9)  # a 6 mm cube is a square of one size in every panel


def test_files_repeat_whatever_the_style_and_leave_no_trace(curved, tmp_path):
    inputs = scan(curved)
    assert lesion_figure(**inputs, path=tmp_path / "a.png") is None
    style = matplotlib.style.library["ggplot"] | {"figure.constrained_layout.use": True, "axes.grid": True}
    with matplotlib.rc_context(style):
        before = dict(matplotlib.rcParams)
        lesion_figure(**inputs, path=tmp_path / "b.png")
        assert dict(matplotlib.rcParams) == before
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png"}
    assert b"Software" not in data
    assert len(data) < 600_000
    with Image.open(tmp_path / "a.png") as picture:
        assert 1500 <= picture.width <= 1800


def test_text_stays_inside_and_apart(curved):
    inputs = scan(curved) | {"subtitle": "very long " * 40, "unit": "unit " * 60, "channels": ("F" * 90, "T1w")}
    fig = lesion_figure(**inputs)
    boxes = [text.get_window_extent() for text in fig.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= fig.bbox.width
        assert box.y1 <= fig.bbox.height
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros(SHAPE, bool)}, "mask is empty"),
        ({"mask": np.ones((3, 3, 3), bool)}, r"image \(40, 48, 36, 2\) is not the mask's grid \(3, 3, 3\)"),
        ({"channels": ("FLAIR",)}, "1 channels"),
        ({"saliency": np.zeros((*SHAPE, 1))}, r"saliency \(40, 48, 36, 1\) is not the mask's grid"),
        ({"saliency": np.zeros((*SHAPE, 3)), "saliency_names": "abc"}, "3 saliency maps for 2 channels"),
        ({"saliency": np.full((*SHAPE, 2), np.nan)}, "saliency has values that are not finite"),
        ({"image": np.full((*SHAPE, 2), np.inf)}, "image has values that are not finite"),
        ({"signed": False}, "negative in places"),
        ({"affine": np.eye(3)}, r"affine has shape \(3, 3\)"),
    ],
)
def test_wrong_input_is_named(curved, change, message):
    with pytest.raises(ValueError, match=message):
        lesion_figure(**scan(curved) | change)
