"""What a model is besides its parameters, readable as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NORMALISATIONS = ("zscore_nonzero", "nnunet")
TILINGS = ("monai", "nnunet")
BLENDINGS = ("gaussian", "constant")
OUTPUT_ACTIVATIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ModelSpec:
    """Everything besides the parameters that a result depends on. Stored as `model.json`.

    architecture, options: the network's name in `NETWORKS` and its constructor's arguments.
    channels: input sequences in order.
    normalisation: `zscore_nonzero`, per channel over the whole volume, or `nnunet` with the plan in `preprocessing`.
    orientation: axis codes the network was trained in (`RAS`, `LAS`), or `native` for the order in which files store voxels.
    window: sides of the sliding window in voxels. overlap: of neighbouring windows, 0 to 1. blending: `gaussian` or `constant`.
    tiling: where windows lie, `monai` or `nnunet`, see `inference.windows`.
    mirror_axes: spatial axes of the window; logits are the mean over all combinations of mirrorings along them.
    members: names of the networks of an ensemble, whose logits are averaged; empty for a single network.
    output_activation: of the logits, `softmax` or `sigmoid`.
    threshold: on the probability, `>`; None: the lesion class is the most probable one.
    connectivity: 6, 18 or 26. min_voxels: smaller predicted components are removed.
    target_class: index of the lesion class in the logits. default_layer: the tap Grad-CAM++ uses.
    source: the file the parameters came from, `source_sha256` its hash. notes: what else is worth keeping.
    """

    architecture: str
    options: Mapping[str, Any]
    channels: tuple[str, ...]
    window: tuple[int, int, int]
    overlap: float = 0.25
    blending: str = "gaussian"
    tiling: str = "monai"
    mirror_axes: tuple[int, ...] = ()
    members: tuple[str, ...] = ()
    output_activation: str = "softmax"
    threshold: float | None = 0.3
    connectivity: int = 18
    min_voxels: int = 1
    normalisation: str = "zscore_nonzero"
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    orientation: str = "native"
    target_class: int = 1
    default_layer: str = "decoder1.conv"
    source: str = ""
    source_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
