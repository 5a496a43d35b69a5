"""The pipeline: pure, on the right places, faithful to the voxels it copies, resumable, and gone when it is closed."""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.pipeline import Batch, Patches, VolumeCache, batches
from training.volumes import Volume, make_volume
from xaiseg.errors import InputError

SETTINGS: dict[str, Any] = {"patch": (8, 8, 8), "batch": 4, "steps": 6, "seed": 3}
SHAPE = (20, 22, 24)


def ramp(shape: tuple[int, int, int] = SHAPE, lesion: bool = True) -> Volume:
    """Channel 0 holds each voxel's number from 1, so that a patch tells where it was cut; channel 1 its negative."""
    number = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    reference = np.zeros(shape, bool)
    reference[9:11, 10:12, 11:13] = lesion
    return make_volume("ramp", np.stack([number, -number], axis=-1), reference)


def point(shape: tuple[int, int, int] = (64, 64, 64)) -> Volume:
    """One voxel of lesion in the middle of a brain of ones."""
    reference = np.zeros(shape, bool)
    reference[32, 32, 32] = True
    return make_volume("point", np.ones((*shape, 1), np.float32), reference)


def stored(folder: Path, volume: Volume) -> Path:
    folder.mkdir()
    for field in Volume._fields[1:]:
        np.save(folder / f"{field}.npy", getattr(volume, field))
    return folder


def mapped(folder: Path) -> Volume:
    return Volume(folder.name, *(np.load(folder / f"{field}.npy", mmap_mode="r") for field in Volume._fields[1:]))


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def items(volumes: list[Volume], **changes: Any) -> list[Batch]:
    source = Patches(volumes, **(SETTINGS | changes))
    return [source[number] for number in range(len(source))]


def read(volumes: list, **changes: Any) -> list[Batch]:
    with batches(volumes, **(SETTINGS | changes)) as source:
        return list(source)


def test_a_batch_depends_on_seed_and_step_only() -> None:
    volumes = [ramp(), ramp((9, 9, 9), lesion=False)]
    whole = read(volumes)
    assert len(whole) == 6
    assert {(images.shape, images.dtype) for images, _ in whole} == {((4, 8, 8, 8, 2), np.dtype(np.float32))}
    assert {(r.shape, r.dtype) for _, r in whole} == {((4, 8, 8, 8), np.dtype(np.uint8))}
    assert_same(read(volumes, start=4), whole[4:])
    assert_same(read(volumes, start=6), [])
    assert_same(read(volumes, steps=3), whole[:3])
    assert_same(read(volumes, threads=0), whole)
    assert_same(read(volumes, threads=4, ahead=5), whole)
    assert not np.array_equal(read(volumes, seed=4)[0][0], whole[0][0])
    # All patches of the large volume differ; the small one has no more than eight to give.
    assert len({images[i].tobytes() for images, _ in whole for i in range(4)}) > 12


def test_batches_are_the_items_of_the_source_in_order() -> None:
    """An item's generator is seeded by seed, step and item; the draws by hand."""
    volumes = [ramp(), ramp()]
    cut = items(volumes)
    expected = [tuple(np.stack(part) for part in zip(*cut[i : i + 4], strict=True)) for i in range(0, 24, 4)]
    assert_same(read(volumes), expected)  # type: ignore[arg-type]
    rng = np.random.default_rng((3, 2, 1))
    volume = volumes[rng.integers(2)]
    pool = volume.lesion if rng.random() < 0.8 else volume.other
    voxel = np.array(np.unravel_index(pool[rng.integers(len(pool))], SHAPE))
    corner = np.clip(voxel - 4 + rng.integers([-1] * 3, [2] * 3), 0, np.array(SHAPE) - 8)
    inside = tuple(slice(a, a + 8) for a in corner)
    np.testing.assert_array_equal(cut[2 * 4 + 1][0], volume.image[inside])


def test_a_patch_is_a_crop_within_the_volume() -> None:
    volume = ramp()
    for image, reference in items([volume], positive_fraction=0.3):
        corner = np.unravel_index(int(image[0, 0, 0, 0]) - 1, SHAPE)
        where = tuple(slice(s, s + 8) for s in corner)
        np.testing.assert_array_equal(image, volume.image[where])
        np.testing.assert_array_equal(reference, volume.reference[where])


def test_a_margin_surrounds_the_same_patch() -> None:
    volume = ramp()
    padded = np.pad(volume.image, [(2, 2)] * 3 + [(0, 0)])
    for (image, reference), (large, large_reference) in zip(items([volume]), items([volume], margin=2), strict=True):
        np.testing.assert_array_equal(large[2:-2, 2:-2, 2:-2], image)
        np.testing.assert_array_equal(large_reference[2:-2, 2:-2, 2:-2], reference)
        corner = np.unravel_index(int(image[0, 0, 0, 0]) - 1, SHAPE)
        np.testing.assert_array_equal(large, padded[tuple(slice(s, s + 12) for s in corner)])


def test_a_small_volume_is_padded_as_the_prediction_pads_it() -> None:
    small = ramp((5, 8, 7), lesion=False)
    images, references = items([small])[0]
    np.testing.assert_array_equal(images, np.pad(small.image, [(1, 2), (0, 0), (0, 1), (0, 0)]))
    assert not references.any()


@pytest.mark.parametrize("fraction", [0.0, 0.8, 1.0])
def test_positive_fraction(fraction: float) -> None:
    patches = items([point()], batch=500, steps=1, positive_fraction=fraction)
    # A patch cut elsewhere holds the lesion by chance in 8³ of 64³ places: 1 of 500. Binomial: 3 standard deviations are 0.054.
    assert abs(np.mean([reference.any() for _, reference in patches]) - fraction) <= 0.06


@pytest.mark.parametrize(("batch", "fraction", "forced"), [(4, 0.33, 2), (2, 0.33, 1), (30, 0.1, 3), (3, 0.0, 0)])
def test_forced_are_the_last_of_each_batch(batch: int, fraction: float, forced: int) -> None:
    patches = items([point()], batch=batch, steps=20, positive_fraction=fraction, forced=True)
    found = np.array([reference.any() for _, reference in patches]).reshape(20, batch)
    assert found[:, batch - forced :].all()
    # Others lie anywhere, and hold the one voxel in 1 of 500.
    assert found[:, : batch - forced].mean() < 0.02


def test_patches_around_a_lesion_lie_off_centre_by_a_sixth_at_most() -> None:
    patches = items([point()], patch=(12, 12, 12), batch=300, steps=1, positive_fraction=1.0)
    places = np.array([np.argwhere(reference)[0] for _, reference in patches])
    for axis in range(3):
        assert sorted(set(places[:, axis].tolist())) == [4, 5, 6, 7, 8]


def test_volumes_are_drawn_uniformly() -> None:
    volumes = [
        make_volume(str(i), np.full((8, 8, 8, 1), i + 1, np.float32), np.zeros((8, 8, 8), bool)) for i in range(3)
    ]
    drawn = np.array([image[0, 0, 0, 0] for image, _ in items(volumes, batch=900, steps=1)])
    counts = np.bincount(drawn.astype(int))[1:]
    assert np.abs(counts - 300).max() < 4 * np.sqrt(900 * 2 / 9)  # binomial


def test_negative_patches_lie_in_the_brain() -> None:
    image = np.zeros((64, 64, 64, 2), np.float32)
    image[30, 31, 32] = 1.0
    volume = make_volume("point", image, np.zeros((64, 64, 64), bool))
    assert all(patch.any() for patch, _ in items([volume]))


def test_state_is_saved_and_restored() -> None:
    volumes = [ramp()]
    whole = read(volumes)
    with batches(volumes, **SETTINGS, start=1) as source:
        source.next()
        source.next()
        state = json.loads(json.dumps(source.get_state()))
        assert source.step == 3
        source.next()
        source.set_state(state)  # back by one
        assert source.step == 3
        assert_same(list(source), whole[3:])
    with batches(volumes, **SETTINGS) as other:  # begun at another step
        other.set_state(state)
        assert_same([other.next()], whole[3:4])
    state["workers"] = 3  # saved by more workers
    with batches(volumes, **SETTINGS) as other:
        other.set_state(state)
        assert_same(list(other), whole[3:])


def test_closed_leaves_no_thread() -> None:
    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    before = readers()  # of other tests, which may be ending
    with pytest.raises(KeyboardInterrupt), batches([ramp()], **SETTINGS) as source:  # noqa: PT012
        source.next()
        assert readers() - before
        raise KeyboardInterrupt
    assert eventually(lambda: not readers() - before)
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.next()


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


@pytest.mark.slow
def test_worker_processes_give_the_same_and_end(tmp_path: Path) -> None:
    volume = stored(tmp_path / "a", ramp())
    whole = read([volume])
    with batches([mapped(volume)], **SETTINGS, workers=1, start=1) as source:
        first = source.next()
        state = source.get_state()
        assert_same([first, source.next()], whole[1:3])
        assert multiprocessing.active_children()
        source.set_state(state)
        assert_same([source.next()], whole[2:3])
    assert eventually(lambda: not multiprocessing.active_children())


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = Patches.__getitem__

    def slow(self: Patches, number: int) -> Batch:
        time.sleep(0.02)
        return crop(self, number)

    monkeypatch.setattr(Patches, "__getitem__", slow)
    with batches([ramp()], **(SETTINGS | {"steps": 2}), threads=1, ahead=1) as source:
        assert source.waited == 0
        source.next()
        first = source.waited
        assert first >= 0.08  # four patches of 0.02 s
        time.sleep(0.4)  # meanwhile the next is read
        source.next()
        assert source.waited - first < 0.05


def test_cache_keeps_the_latest_used_within_its_bytes(tmp_path: Path) -> None:
    folders = [stored(tmp_path / str(i), ramp()) for i in range(3)]
    size = sum(array.nbytes for array in mapped(folders[0])[1:])
    cache = VolumeCache(folders, 2 * size)
    a, b = cache[0], cache[1]
    assert not isinstance(a.image, np.memmap)
    assert cache[0] is a
    assert cache.bytes == 2 * size
    cache[2]  # in place of 1, used the longest ago
    assert cache.bytes == 2 * size
    assert cache[0] is a
    assert cache[1] is not b
    for field, array in zip(Volume._fields[1:], a[1:], strict=True):
        np.testing.assert_array_equal(array, getattr(ramp(), field))


def test_without_room_volumes_are_mapped(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", ramp())
    for volumes in ([folder], [mapped(folder)]):
        cache = VolumeCache(volumes, 1000)
        assert isinstance(cache[0].image, np.memmap)
        assert cache.bytes == 0
    whole = read([ramp()])
    for size in (0, 10**9):
        assert_same(read([folder], cache_bytes=size), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volumes": []}, r"training volumes: none; expected at least one"),
        ({"patch": (8, 8)}, r"patch: \(8, 8\); expected three positive numbers"),
        ({"positive_fraction": 1.2}, r"positive_fraction: 1.2; expected a number from 0 to 1"),
        ({"start": 7}, r"start: 7; expected a step from 0 to 6"),
        ({"threads": 4, "ahead": 2}, r"ahead: 2; expected 1 or more, and the threads, 4, at least"),
        ({"workers": -1}, r"workers: -1; expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(**({"volumes": [ramp()], **SETTINGS} | changes))


def test_a_broken_volume_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    with (
        pytest.raises(InputError, match=r"sub-01: cannot be read as a stored volume"),
        batches([tmp_path / "sub-01"], **SETTINGS) as source,
    ):
        source.next()
