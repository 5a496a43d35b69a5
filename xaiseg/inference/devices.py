"""Which devices an explainer uses: noise samples and Jacobian rows over the two axes of a mesh.

Samples know nothing of each other, and neither do rows before they are reduced, so nothing is exchanged while devices compute: each
runs the same programs on its own part, and results are merged at the end, in an order that does not depend on the devices.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

if TYPE_CHECKING:
    from xaiseg.inference.stitch import StitchedPredictor

AXES = ("samples", "rows")


def device_mesh(samples: int | None = None, rows: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `samples × rows` devices, by default all local ones, each with noise samples of its own.

        predictor = StitchedPredictor.of(model, mesh=device_mesh())

    Rows pay where there are fewer samples than devices. Raises ValueError where there are not so many devices.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    samples = len(devices) // rows if samples is None else samples
    if samples < 1 or rows < 1 or samples * rows > len(devices):
        raise ValueError(f"a mesh of {samples} × {rows} devices: there are {len(devices)}")
    return Mesh(np.array(devices[: samples * rows], dtype=object).reshape(samples, rows), AXES)


def sample_shards(predictor: "StitchedPredictor | None") -> list[Any]:
    """A predictor for each part of the noise samples, which keeps the devices of its own row of the mesh."""
    if predictor is None or getattr(predictor, "mesh", None) is None:
        return [predictor]
    mesh = predictor.mesh
    assert mesh is not None
    return [on_device(replace(predictor, mesh=Mesh(row[None], AXES)), row[0]) for row in mesh.devices]


def row_shards(predictor: "StitchedPredictor") -> list["StitchedPredictor"]:
    """A predictor for each device that Jacobian rows are spread over."""
    if predictor.mesh is None:
        return [predictor]
    devices = predictor.mesh.devices.reshape(-1)
    return [on_device(replace(predictor, mesh=Mesh(np.array([[d]], dtype=object), AXES)), d) for d in devices]


def device_of(predictor: "StitchedPredictor") -> Any:
    """The first device of a predictor; None for JAX's default."""
    return None if predictor.mesh is None else predictor.mesh.devices.reshape(-1)[0]


def on_device(predictor: "StitchedPredictor", device: Any) -> "StitchedPredictor":
    """The same predictor with its parameters on a device."""
    local = predictor.local_fn
    return replace(
        predictor,
        logits_fn=jax.device_put(predictor.logits_fn, device),
        tapped_fn=jax.device_put(predictor.tapped_fn, device),
        local_fn=None if local is None else local._replace(function=jax.device_put(local.function, device)),
    )
