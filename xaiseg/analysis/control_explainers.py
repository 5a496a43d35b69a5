"""Explainers that are known to be bad, to see what the measures of `sanity` say of them beside real ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import ndimage

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap


def random_map() -> Explainer:
    """Standard normal noise for each voxel and channel, drawn from the key and the lesion's label: it knows nothing."""

    def explain(
        key: Array, predictor: Any, image: Array, instances: Sequence[Instance], *, progress: Progress | None = None
    ) -> tuple[list[SaliencyMap], list[Info]]:
        drawn = [jax.random.normal(jax.random.fold_in(key, i.label), image.shape, image.dtype) for i in instances]
        return [SaliencyMap(values, (0, 0, 0)) for values in drawn], [Info(0, 0) for _ in instances]

    return explain


def edge_map() -> Explainer:
    """The magnitude of Sobel's gradient of each channel: it knows the image, but neither network nor lesion."""

    def explain(
        key: Array, predictor: Any, image: Array, instances: Sequence[Instance], *, progress: Progress | None = None
    ) -> tuple[list[SaliencyMap], list[Info]]:
        volume = np.asarray(image)
        edges = [ndimage.generic_gradient_magnitude(volume[..., c], ndimage.sobel) for c in range(volume.shape[-1])]
        found = SaliencyMap(jnp.asarray(np.stack(edges, -1)), (0, 0, 0))
        return [found for _ in instances], [Info(0, 0) for _ in instances]

    return explain


CONTROLS = {"random": random_map, "edges": edge_map}
