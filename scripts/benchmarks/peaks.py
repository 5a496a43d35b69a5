"""Peak memory of explaining lesions, each figure measured in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.lesions import PLACES, ball, centre_at, scattered
from scripts.benchmarks.measuring import Peak, allocator_of
from scripts.benchmarks.networks import random_image, random_model, torch_network
from scripts.benchmarks.setup import Setup, baseline
from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import jacobian_rows, signed_max

_SCRIPT = Path(__file__).resolve().parent.parent / "benchmark.py"


def print_peaks(network: str, setup: Setup, variant: str, sizes: Sequence[int]) -> None:
    """Of lesions of each size, of many of the first at once, and of the published algorithm."""
    print("peak memory beyond imports, weights and image, each in a process of its own:")
    cases = [("xaiseg", 1, n) for n in sizes]
    if setup.many:
        cases.append(("xaiseg", setup.many, sizes[0]))
    for side, lesions, voxels in [*cases, ("torch", 1, sizes[0])]:
        command = [sys.executable, _SCRIPT, "--network", network, "--variant", variant, "--shape", *setup.shape]
        command += ["--window", *setup.window, "--peak", side, lesions, voxels]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
        what = f"{lesions} lesion{'s' * (lesions > 1)} of {voxels} voxels{' (2 rows)' * (side == 'torch')}"
        name = {"torch": "PyTorch"}.get(side, side)
        *maps, peak = done.stdout.splitlines()[-1].split()
        print(f"  {name:8}{what:34}{peak:>7} MiB{', of which maps '.join(['', *maps])}", flush=True)


def print_peak(network: str, setup: Setup, side: str, lesions: int, voxels: int) -> None:
    """Run one side alone and print its peak in MiB, for xaiseg after what of it are the maps that it returns.

    xaiseg is warm: the compiler's own memory does not count, the programs do.
    """
    variant, image, model = setup.variants[0], random_image(setup.shape), random_model(network, setup.window)
    held = _lesions(model, setup.shape, lesions, voxels)
    if side == "torch":
        stride = model.stride
        del model
        theirs, _ = baseline(network, torch_network(network), image, setup.window, variant, stride)
        peak = Peak(allocator_of(side))
        theirs(held[0][:2])
        print(peak.mib())
        return
    predictor = StitchedPredictor.of(model, whole_volume=variant == "whole")
    x = jax.block_until_ready(jnp.asarray(image))
    explain = jacobian_rows(signed_max())

    def run(parts: list[np.ndarray]) -> int:
        """Returns the bytes of the maps."""
        maps, _ = explain(jax.random.key(0), predictor, x, [Instance(i + 1, v) for i, v in enumerate(parts)])
        return sum(jax.block_until_ready(m.values).nbytes for m in maps)

    peak = Peak(allocator_of(side))
    # where a chunk is one row, one row of each compiles all that the lesions take
    run(held if network == "unet" else [v[:1] for v in held])
    peak.restart()
    maps = run(held)
    print(round(maps / 2**20), peak.mib())


def _lesions(model: object, shape: tuple[int, ...], count: int, voxels: int) -> list[np.ndarray]:
    """One in one window, or many all over the volume."""
    if count > 1:
        return scattered(shape, count, voxels)
    centre = centre_at(StitchedPredictor.of(model).plan(shape), PLACES[0], voxels)
    if centre is None:
        sys.exit(f"no place for a lesion of {voxels} voxels in one window of this volume")
    return [ball(centre, voxels)]
