"""Averaging an explanation over noisy copies of the image: the SmoothGrad wrapper."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference import StitchedPredictor


def noisy_mean(base: Explainer, *, samples: int, noise: float, reference_channel: int = 0) -> Explainer:
    """The mean of `base` over `x + σ·ε_n`, `ε_n ~ N(0, 1)` for each voxel and channel, `n < samples`.

    `σ = noise · (max - min)` of the image's `reference_channel` (the paper: FLAIR), one σ for all channels. Sample `n` uses
    `fold_in(key, n)`: instances explained together or apart see the same noise. Maps carry the standard error of the mean.
    Without noise all samples are one and it is computed once.
    """
    if samples < 1 or noise < 0:
        raise ValueError(f"samples must be at least 1 and noise at least 0, not {samples} and {noise}")

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        if noise == 0:
            return base(key, predictor, image, instances, progress=progress)
        sigma = noise_sigma(image, noise, reference_channel)
        moments: list[tuple[Array, Array]] = []
        for n in range(samples):
            noisy = add_noise(jax.random.fold_in(key, n), image, sigma)
            maps, infos = base(key, predictor, noisy, instances, progress=progress)
            if n == 0:
                moments = [(jnp.asarray(m.values), jnp.zeros_like(m.values)) for m in maps]
            else:
                moments = [_welford(*old, m.values, jnp.float32(n)) for old, m in zip(moments, maps, strict=True)]
        averaged = [_finish(m, *moment, samples) for m, moment in zip(maps, moments, strict=True)]
        return averaged, [info._replace(samples=samples) for info in infos]

    return explain


def noise_sigma(image: Array, noise: float, reference_channel: int = 0) -> Array:
    """`σ = noise · (max - min)` of one channel of `image` `(X, Y, Z, C)`, in units of normalised intensity."""
    channel = image[..., reference_channel]
    return noise * (channel.max() - channel.min())


@jax.jit
def add_noise(key: Array, image: Array, sigma: Array) -> Array:
    return image + sigma * jax.random.normal(key, image.shape, image.dtype)


@partial(jax.jit, donate_argnums=(0, 1))
def _welford(mean: Array, squares: Array, value: Array, n: Array) -> tuple[Array, Array]:
    """Running mean and sum of squared deviations after one more value, `n` being the number before it."""
    delta = value - mean
    mean = mean + delta / (n + 1)
    return mean, squares + delta * (value - mean)


def _finish(last: SaliencyMap, mean: Array, squares: Array, samples: int) -> SaliencyMap:
    error = np.sqrt(np.asarray(squares) / (samples * (samples - 1))) if samples > 1 else None
    return SaliencyMap(np.asarray(mean), last.start, error)
