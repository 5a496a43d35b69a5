"""Matching instances with a reference: which lesions were found, which were missed, which are not there.

Rule `overlap`: a predicted instance that shares at least one voxel with a reference instance is a true positive (TP), one that
shares none a false positive (FP); a reference instance that shares none with the prediction is a false negative (FN). One
prediction may cover several reference lesions and the reverse; each is counted once on its own side. Rule `iou`: a shared
voxel is not enough, the intersection over union with some instance of the other side must reach the threshold.
"""

from dataclasses import dataclass

import numpy as np

RULES = ("overlap", "iou")


@dataclass(frozen=True)
class Match:
    """How one instance relates to the other side.

    group: `TP`, `FP` or `FN`. A reference instance that was found is `TP` as well.
    partner: label of the instance of the other side with the largest IoU, 0 if none overlaps.
    overlap: voxels shared with the other side. iou: with `partner`.
    """

    group: str
    partner: int
    overlap: int
    iou: float


@dataclass(frozen=True)
class Matching:
    """The matches of both sides by label, with the rule and threshold that made them."""

    predicted: dict[int, Match]
    reference: dict[int, Match]
    rule: str
    threshold: float

    @property
    def counts(self) -> dict[str, int]:
        """TP and FP count predicted instances, FN reference instances."""
        groups = [m.group for m in self.predicted.values()]
        missed = sum(m.group == "FN" for m in self.reference.values())
        return {"TP": groups.count("TP"), "FP": groups.count("FP"), "FN": missed}


def match_instances(
    predicted: np.ndarray, reference: np.ndarray, rule: str = "overlap", threshold: float = 0.25
) -> Matching:
    """Match two label maps `(X, Y, Z)`. `threshold` is the IoU that rule `iou` asks for; rule `overlap` ignores it."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, known are {', '.join(RULES)}")
    if predicted.shape != reference.shape:
        raise ValueError(f"label maps of shapes {predicted.shape} and {reference.shape}")
    both = (predicted > 0) & (reference > 0)
    pairs, shared = np.unique(np.stack([predicted[both], reference[both]]), axis=1, return_counts=True)
    sizes_p, sizes_r = np.bincount(predicted.ravel()), np.bincount(reference.ravel())
    iou = shared / (sizes_p[pairs[0]] + sizes_r[pairs[1]] - shared)

    def side(sizes: np.ndarray, own: int, missed: str) -> dict[int, Match]:
        matches = {}
        for label in np.flatnonzero(sizes[1:]) + 1:
            mine = np.flatnonzero(pairs[own] == label)
            if len(mine) == 0:
                matches[int(label)] = Match(missed, 0, 0, 0.0)
                continue
            best = mine[np.argmax(iou[mine])]
            hit = rule == "overlap" or iou[best] >= threshold
            partner = int(pairs[1 - own][best])
            matches[int(label)] = Match("TP" if hit else missed, partner, int(shared[mine].sum()), float(iou[best]))
        return matches

    used = threshold if rule == "iou" else 0.0
    return Matching(side(sizes_p, 0, "FP"), side(sizes_r, 1, "FN"), rule, used)
