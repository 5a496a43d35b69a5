"""From a scan to its instances: stitched probabilities, threshold, components, and how they match a reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from xaiseg._types import Instance
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan
from xaiseg.inference import StitchedPredictor
from xaiseg.inference.stitch import WindowDone
from xaiseg.instances import Matching, instances_of, label_components, match_instances
from xaiseg.metrics import dice, normalised_dice
from xaiseg.models import ModelSpec

SOURCES = ("predicted", "reference", "missed", "given")


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The prediction of one scan, arrays `(X, Y, Z)` on the scan's label grid.

    probability: float32. labels: int32, the predicted instances. reference: int32, the reference's instances, or None.
    matching: of the two, None without a reference.
    """

    probability: np.ndarray
    labels: np.ndarray
    reference: np.ndarray | None
    matching: Matching | None

    def agreement(self) -> dict[str, float | int]:
        """Voxel- and lesion-wise agreement with the reference; empty without one. nDSC is over the whole array."""
        if self.reference is None or self.matching is None:
            return {}
        predicted, truth = self.labels > 0, self.reference > 0
        return {"dice": dice(predicted, truth), "ndsc": normalised_dice(predicted, truth), **self.matching.counts}


@dataclass(frozen=True, eq=False)
class Target:
    """What is to be explained in one scan: a label map on the label grid and a group per label."""

    labels: np.ndarray
    groups: dict[int, str]
    overlap: dict[int, int]
    iou: dict[int, float]


def segment_scan(
    predictor: StitchedPredictor, spec: ModelSpec, scan: Scan, case: Case, progress: WindowDone | None = None
) -> Segmentation:
    """Segment a scan and, where the case has a reference, match the instances with it."""
    logits = jnp.asarray(scan.restore(np.asarray(predictor(jnp.asarray(scan.image), progress))))
    probability = np.asarray(predictor.probability(logits))
    decided = predictor.most_probable(logits) if spec.threshold is None else probability > spec.threshold
    probability, lesion = scan.insert(probability), scan.insert(np.asarray(decided))
    labels = label_components(lesion, spec.connectivity, spec.min_voxels)
    if case.reference is None:
        return Segmentation(probability, labels, None, None)
    reference = label_components(scan.labels(case.reference) > 0, spec.connectivity)
    return Segmentation(probability, labels, reference, match_instances(labels, reference))


def target_of(source: str, segmentation: Segmentation, scan: Scan, case: Case) -> Target:
    """The label map to explain and each instance's group: TP, FP or FN with a reference, else `unlabelled`.

    `predicted`: the predicted instances. `reference`: the components of the reference mask. `missed`: those of them that the
    prediction does not touch, with the same labels. `given`: the manifest's label map.
    Raises InputError where the case lacks what `source` asks for.
    """
    if source in ("reference", "missed"):
        if segmentation.reference is None or segmentation.matching is None:
            raise InputError(
                f"{case.name}: has no reference mask; add a column 'reference', or use --instances predicted"
            )
        labels, matches = segmentation.reference, segmentation.matching.reference
        if source == "missed":
            labels = np.where(np.isin(labels, [n for n, match in matches.items() if match.group == "FN"]), labels, 0)
    elif source == "given":
        if case.instances is None:
            raise InputError(f"{case.name}: has no label map; add a column 'instances', or use --instances predicted")
        labels = scan.labels(case.instances)
        matches = (
            match_instances(labels, segmentation.reference).predicted if segmentation.reference is not None else {}
        )
    else:
        labels = segmentation.labels
        matches = segmentation.matching.predicted if segmentation.matching is not None else {}
    present = [int(label) for label in np.unique(labels) if label > 0]
    return Target(
        labels,
        {label: matches[label].group if label in matches else "unlabelled" for label in present},
        {label: matches[label].overlap for label in present if label in matches},
        {label: matches[label].iou for label in present if label in matches},
    )


def chosen_instances(target: Target, case: str, min_voxels: int, wanted: list[int] | None) -> list[Instance]:
    """The instances to explain: those `wanted` whatever their size, or all of at least `min_voxels` voxels.

    Raises InputError for a wanted label that does not occur.
    """
    if wanted is not None:
        try:
            return instances_of(target.labels, wanted)
        except KeyError as error:
            known = ", ".join(map(str, list(target.groups)[:20])) + (", …" if len(target.groups) > 20 else "")
            raise InputError(f"{case}: no lesion {error.args[0]}; it has {known or 'none'}") from None
    return [instance for instance in instances_of(target.labels) if len(instance.voxels) >= min_voxels]


def on_image(instances: Sequence[Instance], labels: np.ndarray, scan: Scan) -> tuple[list[Instance], list[int]]:
    """The instances of a label map in voxels of the scan's image, and the labels of those that lie outside of it."""
    if scan.prepared is None:
        return list(instances), []
    moved = scan.labels_to_image(labels)
    present = set(np.unique(moved).tolist())
    held = [instance.label for instance in instances if instance.label in present]
    return instances_of(moved, held), [i.label for i in instances if i.label not in present]
