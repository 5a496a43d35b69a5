"""The 3-D viewer of a subject's page: its controls, and the volumes that the page carries for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xaiseg.report.html import volumes
from xaiseg.report.html.page import asset, inert, inert_json, niivue, text
from xaiseg.report.html.scans import Crop, Volume


def controls() -> str:
    return asset("viewer.html")


class Payload:
    """The volumes of a page, each an inert element, and `scans`, what the viewer is told about them."""

    def __init__(self) -> None:
        self.scans: list[dict[str, Any]] = []
        self._elements: list[str] = []

    def add_scan(self, name: str, volume: Volume, channels: Sequence[str]) -> None:
        box = volumes.brain_box(volume)
        shown = [
            {"name": channel, "id": self._element(volumes.scan_volume(volume, c, box)), "low": low, "high": high}
            for c, (channel, (low, high)) in enumerate(zip(channels, volume.windows, strict=True))
        ]
        labels = self._element(volumes.label_volume(volume, box))
        self.scans.append({"name": name, "channels": shown, "labels": labels, "lesions": []})

    def add_lesion(self, number: int, group: str, size: str, volume: Volume, voxels: np.ndarray) -> str:
        """Of the last scan; returns its place, by which buttons name it."""
        lesions = self.scans[-1]["lesions"]
        nearest = voxels[np.argmin(((voxels - voxels.mean(0)) ** 2).sum(1))]
        centre = (volume.affine @ [*nearest, 1])[:3]
        lesions.append(
            {
                "number": number,
                "group": group,
                "volume": size,
                "centre": [round(x, 2) for x in centre.tolist()],
                "maps": [],
            }
        )
        return f"{len(self.scans) - 1}/{len(lesions) - 1}"

    def add_map(self, names: Sequence[str], signed: bool, volume: Volume, saliency: Crop, voxels: np.ndarray) -> None:
        """Of the last lesion: a map for each of the names."""
        packed, limit = volumes.map_volumes(volume, saliency, voxels)
        for name, one in zip(names, packed, strict=True):
            entry = {"name": name, "id": self._element(one), "limit": limit, "signed": signed}
            self.scans[-1]["lesions"][-1]["maps"].append(entry)

    def html(self) -> str:
        return "\n".join([inert_json("scans", self.scans), *self._elements, inert("niivue", niivue())])

    def _element(self, content: str) -> str:
        name = f"volume-{len(self._elements)}"
        self._elements.append(inert(name, content))
        return name


def button(place: str, label: str) -> str:
    return f'<button type="button" hidden data-show="{place}">{text(label)}</button>'
