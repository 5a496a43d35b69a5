"""Weights of a network from a seed, so that fixtures need not hold megabytes of them."""

from collections.abc import Mapping

import numpy as np


def seeded_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A float32 tensor for each key: norms and biases far from their initial values, kernels that keep variances of order one.

    `RandomState`, because its streams are frozen for good.
    """
    rng = np.random.RandomState(seed)
    state = {}
    for key, shape in shapes.items():
        noise = rng.standard_normal(shape)
        if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            tensor = 0.5 + 0.3 * np.abs(noise)
        elif key.endswith(("bias", "running_mean")):
            tensor = 0.3 * noise
        elif key.endswith("bias_table"):
            tensor = noise
        else:
            tensor = noise / np.sqrt(np.prod(shape[1:]))
        state[key] = tensor.astype(np.float32)
    return state


def seeded_input(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
