"""What is measured of whole lesions, and the published algorithm as it is run for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

VARIANTS = ("window", "whole")

Baseline = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Setup:
    """None, and no variants, leave it to what the network costs, see `resolved`.

    shape: of the volume. window: sides. sizes: of lesions in one window, in voxels.
    places: where else one of the smallest size lies, of `lesions.PLACES`.
    rows: of a lesion that PyTorch computes, 0 for all. many: lesions explained at once, for their memory.
    """

    shape: tuple[int, int, int]
    window: tuple[int, int, int]
    sizes: tuple[int, ...]
    places: tuple[str, ...]
    variants: tuple[str, ...] = ()
    rows: int | None = None
    many: int | None = None

    def resolved(self, network: str) -> "Setup":
        """On CPU the U-Net in full; of the others two rows, windows only, and nothing with many lesions."""
        import torch

        cheap = network == "unet" or torch.cuda.is_available()
        return replace(
            self,
            sizes=tuple(sorted(self.sizes)),
            variants=self.variants or (VARIANTS if network == "unet" else VARIANTS[:1]),
            rows=self.rows if self.rows is not None else 0 if cheap else 2,
            many=self.many if self.many is not None else 10 if cheap else 0,
        )


def baseline(
    network: str,
    net: Any,
    image: np.ndarray,
    window: tuple[int, int, int],
    variant: str,
    stride: tuple[int, ...],
    needless: bool = True,
) -> tuple[Baseline, str]:
    """The published algorithm as a function of a lesion's voxels, and how it is run, in words."""
    from scripts import published

    if variant == "whole":
        return (
            lambda voxels: published.whole_volume(net, image, voxels, multiple=stride)
        ), "each row through all of it"
    # the graphs of 27 windows take about 5 GB of a U-Net, 35 of the DynUNet, 100 of the Swin UNETR
    stitching = "together" if network == "unet" else "apart"
    graphs = "their graphs kept" if stitching == "together" else "one after another"
    options: dict[str, Any] = {"roi": window, "stitching": stitching, "needless": needless}
    return (
        lambda voxels: published.sliding_window(net, image, voxels, **options)
    ), f"each row through all windows, {graphs}"
