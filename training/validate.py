"""How well a model does on the validation cases, at each of several thresholds."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from training.volumes import Volume
from xaiseg.inference import StitchedPredictor
from xaiseg.instances import label_components, match_instances
from xaiseg.metrics import dice, normalised_dice
from xaiseg.models import Model


class Score(NamedTuple):
    """Means over cases of nDSC and Dice; over the lesions of all cases, the share found (TPR) and, of those predicted, the share
    that are none (FDR). A rate without lesions to count is 0. V of the nDSC is the whole volume."""

    threshold: float
    ndsc: float
    dice: float
    tpr: float
    fdr: float


def validate(model: Model, volumes: Sequence[Volume], thresholds: Sequence[float]) -> list[Score]:
    """One score per threshold. Lesions are compared by the connectivity and smallest size of the model's spec, rule `overlap`."""
    # a mirrored copy in each direction would be eight times the work, for a choice among thresholds and steps
    predictor = StitchedPredictor.of(model.with_spec(mirror_axes=()))
    spec = model.spec
    per_case = []
    for volume in volumes:
        probability = np.asarray(predictor.probability(predictor(jnp.asarray(volume.image))))
        truth = np.asarray(volume.reference)
        lesions = label_components(truth, spec.connectivity)
        for threshold in thresholds:
            labels = label_components(probability > threshold, spec.connectivity, spec.min_voxels)
            matching = match_instances(labels, lesions)
            found = sum(m.group == "TP" for m in matching.reference.values())
            counts = (found, len(matching.reference), matching.counts["FP"], len(matching.predicted))
            per_case.append((normalised_dice(labels > 0, truth), dice(labels > 0, truth), *counts))
    table = np.array(per_case).reshape(len(volumes), len(thresholds), 6)
    scores = []
    for threshold, (ndsc, dsc), (found, lesions, false, predicted) in zip(
        thresholds, table[..., :2].mean(0).tolist(), table[..., 2:].sum(0).tolist(), strict=True
    ):
        scores.append(Score(threshold, ndsc, dsc, found / max(lesions, 1), false / max(predicted, 1)))
    return scores
