"""A small network and lesion for the measures of faithfulness, and the brute-force score: the whole stitched prediction."""

import jax
import jax.numpy as jnp
import numpy as np

from xaiseg import Instance, SaliencyMap, StitchedPredictor

SHAPE = (6, 5, 7)
KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (*SHAPE, 2))
REFERENCE = jax.random.normal(jax.random.key(2), (*SHAPE, 2))
# starts of windows are {0, 2}, {0, 1}, {0, 3}: its voxels are in 1, 2 or 4 windows, 6 of the 8 in all
LESION = Instance(1, np.array([[1, 2, 1], [2, 2, 1], [2, 2, 2], [5, 0, 3], [5, 4, 6]], np.int32))


def smooth(x):
    """A network that is smooth everywhere and couples neighbours, (N, *window, 2) -> (N, *window, 2)."""
    mixed = x[..., 0] * jnp.roll(x[..., 1], 1, 1) + jnp.roll(x[..., 1], -1, 3)
    return jnp.stack([x[..., 0], 2 + jnp.tanh(mixed) + jnp.sin(jnp.roll(mixed, 1, 2)) * x[..., 1]], -1)


def linear(x):
    """Logits that are linear in the image."""
    return jnp.stack([x[..., 0], 3 * x[..., 0] - jnp.roll(x[..., 1], 1, 1) + 0.5 * jnp.roll(x[..., 0], -1, 3)], -1)


PREDICTOR = StitchedPredictor(smooth, (4, 4, 4))
LINEAR = StitchedPredictor(linear, (4, 4, 4))


def score(predictor, image, instance=LESION):
    """`S_i(x)` through all windows of the volume, float64."""
    logits = np.asarray(predictor(jnp.asarray(image, jnp.float32)), np.float64)
    return float(np.mean([logits[tuple(v)][predictor.target_class] for v in instance.voxels.tolist()]))


def gradient(predictor, image=IMAGE, instance=LESION):
    """The gradient of `S_i` by JAX itself, as a map over the whole volume."""

    def of(x):
        return predictor(x)[tuple(instance.voxels.T)][:, predictor.target_class].mean()

    return SaliencyMap(jax.grad(of)(image), (0, 0, 0))


def crop(saliency, start, shape):
    """Part of a map of the whole volume; what lies beyond must not matter, so it should be zero."""
    return SaliencyMap(saliency.values[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))], start)
