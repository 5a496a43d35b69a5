"""Small pictures of lesions: pixels against a loop over them, the patient's sides, colours, bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from xaiseg.report.canvas import overlay_colours
from xaiseg.report.html.scans import Crop, Volume
from xaiseg.report.html.thumbnails import OUTLINE, SMALLEST_MM, Layer, picture, view_of, webp
from xaiseg.report.lesion import PLANES

SIZE = 41  # no pixel lies half-way between voxels
SPACING = (1.0, 2.0, 1.5)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((40, 24, 30, 2)).astype(np.float32)
    image[:6] = 0
    labels = np.zeros(image.shape[:3], int)
    labels[15:20, 10:12, 12:17] = 3
    labels[18, 12, 12] = 3
    volume = Volume(image, labels, np.diag([*SPACING, 1.0]), ((-2.0, 2.0), (-1.0, 3.0)))
    crop = Crop(rng.standard_normal((12, 8, 9, 2)).astype(np.float32), (12, 7, 10))
    return volume, np.argwhere(labels == 3), crop


def looped(volume, voxels, crop, layer, plane, signed):
    """A tile, pixel by pixel."""
    view = view_of(voxels, SPACING)
    normal, across, up = PLANES[plane]
    inside = {tuple(v) for v in voxels.tolist()}
    limit = np.abs(crop.values).max()
    table = overlay_colours(signed)
    low, high = volume.windows[layer.channel]
    high += 0.35 * (high - low) * (layer.map is not None)
    tile, lesion = np.zeros((SIZE, SIZE, 3)), np.zeros((SIZE, SIZE), bool)
    for row in range(SIZE):
        for column in range(SIZE):
            place = [0, 0, 0]
            place[normal] = view.voxel[normal]
            # the left edge is the high end of the axis: the patient's right, or front
            place[across] = round(
                float((view.centre[across] + view.side / 2 - (column + 0.5) * view.side / SIZE) / SPACING[across])
            )
            place[up] = round(float((view.centre[up] + view.side / 2 - (row + 0.5) * view.side / SIZE) / SPACING[up]))
            held = all(0 <= p < n for p, n in zip(place, volume.image.shape, strict=False))
            value = volume.image[(*place, layer.channel)] if held else 0
            grey = 0.0 if value == 0 else np.clip((value - low) / (high - low), 0, 1)
            colour = np.full(3, np.rint(255 * grey))
            local = [p - s for p, s in zip(place, crop.start, strict=True)]
            in_crop = held and all(0 <= p < n for p, n in zip(local, crop.values.shape, strict=False))
            if layer.map is not None:
                saliency = crop.values[(*local, layer.map)] if in_crop else 0.0
                level = (saliency / limit + 1) / 2 if signed else saliency / limit
                rgba = np.array(table(min(max(int(level * table.N), 0), table.N - 1)))
                colour = np.rint(colour * (1 - rgba[3]) + 255 * rgba[:3] * rgba[3])
            tile[row, column] = colour
            lesion[row, column] = tuple(place) in inside
    for row in range(SIZE):
        for column in range(SIZE):
            around = [(row + a, column + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
            beside = any(lesion[r, c] for r, c in around if 0 <= r < SIZE and 0 <= c < SIZE)
            if beside and not lesion[row, column]:
                tile[row, column] = OUTLINE
    return tile


@pytest.mark.parametrize("signed", [True, False])
def test_every_pixel_equals_a_loop_over_them(case, signed):
    volume, voxels, crop = case
    crop = crop if signed else Crop(np.abs(crop.values), crop.start)
    layers = [Layer(0, None), Layer(0, 0), Layer(1, 1)]
    drawn = picture(volume, voxels, crop, layers, SIZE, signed)
    assert drawn.shape == (3 * SIZE + 4, 3 * SIZE + 4, 3)
    for row, layer in enumerate(layers):
        for column, plane in enumerate(PLANES):
            tile = drawn[row * (SIZE + 2) :, column * (SIZE + 2) :][:SIZE, :SIZE].astype(int)
            expected = looped(volume, voxels, crop, layer, plane, signed)
            differs = np.argwhere((np.abs(tile - expected) > 1).any(-1))
            # but for the two letters at the edges
            assert all(abs(r - SIZE / 2) < 5 and (c < 9 or c >= SIZE - 9) for r, c in differs.tolist())
            assert 0 < len(differs) < 60


def test_right_is_on_the_left(case):
    volume, voxels, _ = case
    image = np.full_like(volume.image, -1.9)
    image[volume.labels.shape[0] // 2 :] = 1.9  # the patient's right: high along x, in RAS+
    bright = picture(Volume(image, volume.labels, volume.affine, volume.windows), voxels, None, [Layer(0, None)], SIZE)
    axial = bright[: SIZE // 4, :SIZE].mean((0, 2))
    assert axial[:10].mean() > 200
    assert axial[-10:].mean() < 50


def test_a_view_goes_through_the_lesion_and_holds_all_of_it():
    curved = np.array([[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 2, 0], [2, 2, 0], [90, 2, 0]])
    view = view_of(curved, (1.0, 1.0, 1.0))
    assert list(view.voxel) in curved.tolist()
    assert view.side > 91
    assert view_of(curved[:1], (1.0, 1.0, 1.0)).side == SMALLEST_MM


def test_a_map_of_zeros_and_no_map_show_the_scan(case):
    volume, voxels, crop = case
    nothing = picture(volume, voxels, Crop(np.zeros_like(crop.values), crop.start), [Layer(0, 0)], SIZE)
    without = picture(volume, voxels, None, [Layer(0, 0)], SIZE)
    assert np.array_equal(nothing, without)


def test_a_few_kilobytes_the_same_each_time(case):
    volume, voxels, crop = case
    rgb = picture(volume, voxels, crop, [Layer(0, 0), Layer(1, 1)], 88)
    data = webp(rgb)
    assert data == webp(rgb)
    assert len(data) < 15_000  # of noise; real scans take a third
    assert np.abs(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float) - rgb).mean() < 25
