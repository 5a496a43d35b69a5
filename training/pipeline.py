"""Training patches, read ahead of the loop. The batch of a step is a pure function of seed and step: a run goes on with the same.

Grain reads: a random-access source of patches, batched, with threads (or worker processes) that work a few batches ahead. Only
the crop is done here; `augment` changes it where the network runs.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from absl import flags
from numpy.random import Generator

from training.volumes import Volume, open_volume
from xaiseg.errors import InputError
from xaiseg.instances import label_components

try:
    import grain
except ModuleNotFoundError as error:
    raise InputError("training: grain is not installed; pip install 'xaiseg[training]'") from error

Batch = tuple[np.ndarray, np.ndarray]

_OFF_CENTRE = 1 / 6  # of the patch: the paper cuts 96³ at random out of the 128³ around the voxel


class VolumeCache:
    """Volumes by number. Those in folders are memory-mapped when asked for, and the latest used are kept in memory.

    A volume that is kept is read as a whole, which pays where all fit, or where pages of mapped files come slowly, as from a
    network. Otherwise keep none: of a mapped volume only the patch is read, and the system keeps its pages as long as it can.
    Files are open only while a patch is cut, so there may be more volumes than a process may have files. Safe between threads.

    Args:
        volumes: arrays, or folders as `volumes` stores them; a mapped volume counts as its folder. Arrays stay where they are.
        max_bytes: of the volumes kept.
    """

    def __init__(self, volumes: Sequence[Volume | Path], max_bytes: int = 0) -> None:
        self._volumes = [_folder_of(volume) for volume in volumes]
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[Volume, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, number: int) -> Volume:
        volume = self._volumes[number]
        if isinstance(volume, Volume):
            return volume
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number][0]
        mapped = open_volume(volume)
        size = sum(array.nbytes for array in mapped[1:])
        if size > self._max_bytes:
            return mapped
        loaded = Volume(mapped.name, *(np.array(array) for array in mapped[1:]))
        with self._lock:
            self._kept[number] = loaded, size
            self._kept.move_to_end(number)
            while self.bytes > self._max_bytes:
                self._kept.popitem(last=False)
        return loaded

    @property
    def bytes(self) -> int:
        """Of the volumes kept at present."""
        return sum(size for _, size in self._kept.values())

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process: it keeps volumes of its own."""
        return {"volumes": self._volumes, "max_bytes": self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class Patches:
    """A random-access source: patch i of step s is number `s · batch + i`, drawn by a generator of its own.

    The volume is drawn uniformly. With probability `positive_fraction` the patch lies around a voxel of a lesion, if the volume
    has one, else around one elsewhere in the brain; its centre is off the voxel by up to a sixth of each side. With `forced`,
    as nnU-Net does it, the last `ceil(batch · positive_fraction)` patches of a batch lie around a lesion, and the others around
    any voxel of the brain. A patch lies within the volume where that is large enough; beyond it, both are zero.

    Args:
        volumes: see `VolumeCache`.
        patch: sides in voxels.
        batch: patches of a step.
        steps: of the whole run.
        seed: 0 or more.
        positive_fraction: 0 to 1.
        forced: see above.
        margin: voxels around the patch that come with it, for `augment`: sides are `patch + 2 · margin`.
        instances: the reference numbers the lesions of the patch (18-connected) from 1; with more than 255 the others are 255.
        cache_bytes: see `VolumeCache`.

    Raises:
        InputError: there is no volume, or a number cannot be.
    """

    def __init__(
        self,
        volumes: Sequence[Volume | Path],
        *,
        patch: Sequence[int],
        batch: int,
        steps: int,
        seed: int,
        positive_fraction: float = 0.8,
        forced: bool = False,
        margin: int = 0,
        instances: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        if not len(volumes):
            raise InputError("training volumes: none; expected at least one to cut patches from: add cases")
        rules = [
            ("patch", patch, len(patch) == 3 and min(patch) >= 1, "three positive numbers of voxels"),
            ("batch", batch, batch >= 1, "1 or more"),
            ("steps", steps, steps >= 0, "0 or more"),
            ("seed", seed, seed >= 0, "0 or more"),
            ("positive_fraction", positive_fraction, 0 <= positive_fraction <= 1, "a number from 0 to 1"),
            ("margin", margin, margin >= 0, "0 or more"),
            ("cache_bytes", cache_bytes, cache_bytes >= 0, "0 or more"),
        ]
        for name, value, holds, expected in rules:
            if not holds:
                raise InputError(f"{name}: {value}; expected {expected}: correct it")
        self.cache = VolumeCache(volumes, cache_bytes)
        self._patch, self._margin, self._instances = np.array(patch), margin, instances
        self._batch, self._steps, self._seed = batch, steps, seed
        self._fraction = positive_fraction
        # A product such as 0.1 · 30 may come out a little above the whole number that is meant.
        self._forced = int(np.ceil(batch * positive_fraction - 1e-9)) if forced else None

    def __len__(self) -> int:
        return self._steps * self._batch

    def __getitem__(self, number: int) -> Batch:
        """Image `(*patch, C)` float32 and reference `(*patch)` uint8."""
        step, item = divmod(int(number), self._batch)
        rng = np.random.default_rng((self._seed, step, item))
        volume = self.cache[int(rng.integers(len(self.cache)))]
        image, reference = self._crop(volume, self._voxel(rng, volume, item), rng)
        return image, _numbered(reference) if self._instances else reference

    def _voxel(self, rng: Generator, volume: Volume, item: int) -> np.ndarray:
        pools = [volume.lesion, volume.other]
        if self._forced is None:
            pools = pools[:1] if rng.random() < self._fraction else pools[1:]
        elif item >= self._batch - self._forced:
            pools = pools[:1]
        if not any(map(len, pools)):
            pools = [volume.lesion, volume.other]
        place = int(rng.integers(sum(map(len, pools))))
        flat = pools[0][place] if place < len(pools[0]) else pools[1][place - len(pools[0])]
        return np.array(np.unravel_index(int(flat), volume.reference.shape))

    def _crop(self, volume: Volume, voxel: np.ndarray, rng: Generator) -> Batch:
        sides = self._patch
        reach = (sides * _OFF_CENTRE).astype(int)
        start = voxel - sides // 2 + rng.integers(-reach, reach + 1)
        # A side of the volume that is too small is centred, as the stitched prediction pads it.
        room = np.array(volume.reference.shape) - sides
        start = np.where(room >= 0, np.clip(start, 0, np.maximum(room, 0)), -((-room) // 2)) - self._margin
        sides = sides + 2 * self._margin
        first = np.maximum(start, 0)
        last = np.minimum(start + sides, volume.reference.shape)
        source = tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))
        target = tuple(slice(a, b) for a, b in zip((first - start).tolist(), (last - start).tolist(), strict=True))
        image = np.zeros((*sides.tolist(), volume.image.shape[-1]), np.float32)
        reference = np.zeros(sides.tolist(), np.uint8)
        image[target] = volume.image[source]
        reference[target] = volume.reference[source]
        return image, reference


class Batches:
    """Batches of a source, in order of steps, read ahead: images `(B, *patch, C)` float32 and references `(B, *patch)` uint8.

    An iterator, and a context, which ends the threads and processes that read.

    Attributes:
        waited: seconds that `next` has waited for data so far: what a device that computes one batch after the other stood idle.
        step: of the next batch.
    """

    def __init__(self, source: Patches, batch: int, start: int, threads: int, ahead: int, workers: int) -> None:
        self._source, self._batch = source, batch
        self._threads, self._ahead, self._workers = threads, ahead, workers
        self.waited = 0.0
        self._open(start)

    def _open(self, start: int) -> None:
        """Whatever was read ahead is dropped; Grain counts its batches from `start`."""
        self._start = self.step = start
        dataset = grain.MapDataset.source(self._source).batch(self._batch)[start:]
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._ahead)
        batches = dataset.to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its command-line flags here, and refuses outside of absl's programs
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers, self._ahead))
        self._iterator = iter(batches)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        begun = time.monotonic()
        images, references = next(self._iterator)
        self.waited += time.monotonic() - begun
        self.step += 1
        return images, references

    def next(self) -> Batch:
        """The next batch. Raises StopIteration after the last step."""
        return next(self)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs, as JSON can hold it: the first step, the number of workers and Grain's own state."""
        return {"start": self._start, "step": self.step, "workers": self._workers, "grain": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where an iterator over the same source, with the same seed and batch, was when `get_state` was called.

        Another number of workers is no hindrance: then only the step counts.
        """
        self._iterator.close()
        if state["workers"] != self._workers:
            self._open(state["step"])
            return
        self._open(state["start"])
        self._iterator.set_state(state["grain"])
        self.step = state["step"]

    def close(self) -> None:
        """End all threads and processes. May be called again."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def batches(
    volumes: Sequence[Volume | Path],
    *,
    patch: Sequence[int],
    batch: int,
    steps: int,
    seed: int,
    start: int = 0,
    positive_fraction: float = 0.8,
    forced: bool = False,
    margin: int = 0,
    instances: bool = False,
    threads: int = 2,
    ahead: int = 2,
    workers: int = 0,
    cache_bytes: int = 0,
) -> Batches:
    """The batches of steps `start` to `steps`: those of step s are the same wherever it starts and whoever reads.

    Args:
        volumes: see `VolumeCache`; the others up to margin and cache_bytes see `Patches`.
        start: the first step, from 0.
        threads: that read, in each process; each makes a batch at a time. 0 reads only when asked.
        ahead: batches that are ready or being read, in each process.
        workers: processes that read instead of this one, 0 for none. Threads copy mapped memory side by side, so they serve unless
            Python itself is the limit. A program that has workers must be one that can be imported (`if __name__ == "__main__"`).
        cache_bytes: in each process.

    Raises:
        InputError: there is no volume, or a number cannot be.

    Example:
        >>> from training.volumes import make_volume
        >>> brain = make_volume("brain", np.ones((9, 9, 9, 2), np.float32), np.zeros((9, 9, 9), bool))
        >>> with batches([brain], patch=(8, 8, 8), batch=2, steps=3, seed=0, start=1) as source:
        ...     [images.shape for images, references in source]
        [(2, 8, 8, 8, 2), (2, 8, 8, 8, 2)]
    """
    source = Patches(
        volumes,
        patch=patch,
        batch=batch,
        steps=steps,
        seed=seed,
        positive_fraction=positive_fraction,
        forced=forced,
        margin=margin,
        instances=instances,
        cache_bytes=cache_bytes,
    )
    rules = [("start", start, 0 <= start <= steps, f"a step from 0 to {steps}")]
    rules += [(name, n, n >= 0, "0 or more") for name, n in (("threads", threads), ("workers", workers))]
    rules += [("ahead", ahead, ahead >= max(1, threads), f"1 or more, and the threads, {threads}, at least")]
    for name, value, holds, expected in rules:
        if not holds:
            raise InputError(f"{name}: {value}; expected {expected}: correct it")
    return Batches(source, batch, start, threads, ahead, workers)


def _numbered(reference: np.ndarray) -> np.ndarray:
    return np.minimum(label_components(reference > 0, 18), 255).astype(np.uint8)


def _folder_of(volume: Volume | Path) -> Volume | Path:
    """The folder of a mapped volume, which, unlike its arrays, is small to send to a process."""
    image = volume.image if isinstance(volume, Volume) else None
    return Path(image.filename).parent if isinstance(image, np.memmap) and image.filename else volume
