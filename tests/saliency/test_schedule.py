"""Which passes a scan's lesions take, and how they are shared out."""

import numpy as np
import pytest

from xaiseg._types import Instance, LocalFn
from xaiseg.inference import plan_windows
from xaiseg.saliency.schedule import Geometry, by_view, passes, portions, regions, spread

PLAN = plan_windows((20, 16, 12), (8, 8, 8), 0.25)  # starts {0, 6, 12}, {0, 6, 8}, {0, 4}
RNG = np.random.default_rng(0)
LESIONS = [
    Instance(i, np.unique(RNG.integers(0, (20, 16, 12), (n, 3)), axis=0).astype(np.int32))
    for i, n in enumerate((1, 30, 200))
]
TILES = LocalFn(lambda *_: None, (4, 4, 4), (2, 2, 2), (3, 3, 3), (3, 3, 3))


@pytest.fixture(params=[None, TILES], ids=["windows", "tiles"])
def geometry(request):
    return Geometry.of(PLAN, request.param)


def entries(work, geometry):
    """Every (instance, row, window) with the voxel it stands for and its share."""
    found = {}
    for portion in work:
        for view, place, share in zip(portion.views, portion.place, portion.share, strict=True):
            corner = geometry.plan.starts[view[0]] + view[1:]
            for instance, row, voxel, s in zip(portion.instance, portion.row, place + corner, share, strict=True):
                key = (int(instance), int(row), view[0])
                assert key not in found
                found[key] = (tuple(voxel.tolist()), float(s))
    return found


def test_every_voxel_goes_once_through_each_window_that_holds_it(geometry):
    found = entries(portions(geometry, LESIONS), geometry)
    expected = {}
    for number, lesion in enumerate(LESIONS):
        _, share = PLAN.coverage(lesion.voxels)
        for window, row in np.argwhere(share > 0).tolist():
            expected[number, row, window] = (tuple(lesion.voxels[row].tolist()), float(share[window, row]))
    assert found == expected


def test_sorting_by_view_keeps_every_entry(geometry):
    work = portions(geometry, LESIONS)
    assert entries(by_view(work), geometry) == entries(work, geometry)
    assert all(len(p.views) == 1 for p in by_view(work))
    assert len({p.views for p in by_view(work)}) == len(by_view(work))


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_devices_share_all_of_it_about_evenly(geometry, devices):
    work = portions(geometry, LESIONS)
    shares = spread(work, devices)
    assert len(shares) == devices
    assert entries([p for share in shares for p in share], geometry) == entries(work, geometry)
    load = [sum(len(p.views) * (len(p.row) + 4) for p in share) for share in shares]
    assert max(load) <= 1.1 * min(load)


def test_places_lie_in_their_views(geometry):
    for portion in portions(geometry, LESIONS):
        assert (portion.place >= 0).all()
        assert (portion.place < np.array(geometry.sides)).all()


def test_passes_are_counted(geometry):
    work = portions(geometry, LESIONS)
    for number, (rows, windows) in enumerate(passes(work, len(LESIONS), linear=False)):
        _, share = PLAN.coverage(LESIONS[number].voxels)
        assert rows == (share > 0).sum()
        assert windows == (share > 0).any(1).sum()
    for number, (rows, _) in enumerate(passes(work, len(LESIONS), linear=True)):
        assert rows == len({v for p in work if (p.instance == number).any() for v in p.views})


def test_regions_hold_the_fields_of_their_views(geometry):
    work = portions(geometry, LESIONS)
    for number, region in enumerate(regions(geometry, work, len(LESIONS))):
        end = np.array(region.box.start) + region.room
        corners = []
        for portion in work:
            if (portion.instance == number).any():
                box = geometry.box(portion.views)
                assert (np.array(box.start) >= region.box.start).all()
                assert (np.array(box.start) + box.shape <= end).all()
                corners += [geometry.corner(view) for view in portion.views]
        assert region.box.start == tuple(np.min(corners, axis=0).tolist())
        assert (np.array(region.box.start) + region.box.shape == np.max(corners, axis=0) + geometry.field).all()


def test_views_needed_at_once_do_not_grow_with_instances():
    """Between a view's first row and its last, other lesions' views would be kept beside it."""
    plan = plan_windows((20, 16, 400), (8, 8, 8), 0.25)
    geometry = Geometry.of(plan, LocalFn(lambda *_: None, (4, 4, 4), (2, 2, 2), (3, 3, 3), (3, 3, 3)))

    cube = np.argwhere(np.ones((3, 3, 3))).astype(np.int32)
    lesions = [Instance(i, cube + np.array([i % 7, i % 5, 8 * i], np.int32)) for i in range(48)]
    work = portions(geometry, lesions)

    def needed_at_once(work):
        first, last = {}, {}
        for turn, portion in enumerate(work):
            for view in portion.views:
                first.setdefault(view, turn)
                last[view] = turn
        return max(sum(first[v] <= turn <= last[v] for v in first) for turn in range(len(work)))

    most = max(len(portion.views) for portion in work)
    assert needed_at_once(work) == most == 8
    assert needed_at_once(sorted(work, key=lambda portion: portion.views)) > most
