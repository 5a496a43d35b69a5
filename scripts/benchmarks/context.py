"""The dilation experiment of one lesion beside segmenting every dilated image: seconds, their ratio, and that scores agree.

    nice python -m scripts.benchmarks.context                     the shipped example model, a lesion in one window and in most
    nice python -m scripts.benchmarks.context --network unet      the paper's U-Net with random weights

Both sides are warm. From scratch some images are timed (`--images`), their dilation not counted, and their mean taken for the rest.
"""

import argparse
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from scripts.benchmarks.lesions import ball, centre_at
from scripts.benchmarks.measuring import seconds
from scripts.benchmarks.networks import random_image, random_model, threads
from xaiseg import Instance, StitchedPredictor, load_model
from xaiseg.analysis.context import DISTANCES_MM, context_curves

_VOXELS = 100  # as in the paper, 91 to 119
_THRESHOLD = 0.5


def compare(model: Any, shape: tuple[int, ...], images: int) -> None:
    predictor, image = StitchedPredictor.of(model), random_image(shape)
    plan = predictor.plan(shape)
    print(
        f"{'×'.join(map(str, shape))} in {len(plan.starts)} windows; {len(DISTANCES_MM)} distances and the whole image"
    )
    for place in ("one window", "two windows", "most windows"):
        centre = centre_at(plan, place, _VOXELS)
        if centre is None:
            print(f"left out: no place for a lesion in {place}")
            continue
        lesion = Instance(1, ball(centre, _VOXELS))

        def ours(lesion: Instance = lesion, distances: tuple[float, ...] = DISTANCES_MM) -> Any:
            found = context_curves(predictor, image, (1, 1, 1), [lesion], distances_mm=distances, threshold=_THRESHOLD)
            return next(iter(found))

        ours(distances=(0.0,))  # compiles
        curve: list[Any] = []
        took = seconds(lambda curve=curve: curve.append(ours()))
        chosen = np.linspace(0, len(DISTANCES_MM) - 1, images).round().astype(int).tolist()
        if place == "one window":
            jax.block_until_ready(predictor(jnp.asarray(image)))
        times, error = [], 0.0
        for k in chosen:
            logits: list[np.ndarray] = []
            dilated = _dilated(image, lesion, DISTANCES_MM[k])
            times.append(seconds(lambda out=logits, x=dilated: out.append(np.asarray(predictor(jnp.asarray(x))))))
            held = logits[0][tuple(lesion.voxels.T)][:, predictor.target_class]
            error = max(error, abs(float(held.mean(dtype=np.float64)) - curve[0].mean_logit[k]))
        scratch = statistics.mean(times) * (len(DISTANCES_MM) + 1)
        print(
            f"{place:13} {curve[0].passes} passes, {took:.1f} s; from scratch {scratch:.0f} s ({images} images timed): "
            f"ratio {scratch / took:.1f}; mean logits equal to {error:.0e}",
            flush=True,
        )


def _dilated(image: np.ndarray, lesion: Instance, distance_mm: float) -> np.ndarray:
    outside = np.ones(image.shape[:3], bool)
    outside[tuple(lesion.voxels.T)] = False
    near = ndimage.distance_transform_edt(outside) <= distance_mm + 1e-6
    return np.where(near[..., None], image, np.float32(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="example", help="a shipped model, or unet, dynunet, swin_unetr at random")
    parser.add_argument("--shape", type=int, nargs=3, default=(182, 218, 182))
    parser.add_argument("--images", type=int, default=3, help="segmented from scratch, to be timed")
    arguments = parser.parse_args()
    random = arguments.network in ("unet", "dynunet", "swin_unetr")
    model = random_model(arguments.network, (96, 96, 96)) if random else load_model(arguments.network)
    print(f"{arguments.network}, {threads()} threads, load {os.getloadavg()[0]:.1f} at the start")
    compare(model, tuple(arguments.shape), arguments.images)


if __name__ == "__main__":
    main()
