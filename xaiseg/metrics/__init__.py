"""Measures: of agreement with a reference, and of explanations."""

from xaiseg.metrics.bootstrap import Interval, bootstrap_interval, resample_weights, sum_by_patient
from xaiseg.metrics.evaluation import CaseEvaluation, EvaluationSettings, evaluate_case, summarise
from xaiseg.metrics.instance_score import instance_scores
from xaiseg.metrics.lesions import lesion_measures, lesion_rates, lesion_rows
from xaiseg.metrics.localisation import Localisation, leakage, localisation
from xaiseg.metrics.perturbation import PerturbationCurve, deletion, insertion
from xaiseg.metrics.randomisation import Randomisation, cascade, parameter_randomisation, smooth_parameter_randomisation
from xaiseg.metrics.replacement import by_baseline, noisy_linear
from xaiseg.metrics.sensitivity import (
    FaithfulnessCorrelation,
    Infidelity,
    faithfulness_correlation,
    infidelity,
    max_sensitivity,
)
from xaiseg.metrics.similarity import instance_similarity
from xaiseg.metrics.surface import SurfaceDistances, surface_distances
from xaiseg.metrics.tuning import TuningGrid, choose, parse_tuning, tune_case
from xaiseg.metrics.voxels import VoxelCounts, count_voxels, dice, normalised_dice, voxel_measures

__all__ = [
    "CaseEvaluation",
    "EvaluationSettings",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Interval",
    "Localisation",
    "PerturbationCurve",
    "Randomisation",
    "SurfaceDistances",
    "TuningGrid",
    "VoxelCounts",
    "bootstrap_interval",
    "by_baseline",
    "cascade",
    "choose",
    "count_voxels",
    "deletion",
    "dice",
    "evaluate_case",
    "faithfulness_correlation",
    "infidelity",
    "insertion",
    "instance_scores",
    "instance_similarity",
    "leakage",
    "lesion_measures",
    "lesion_rates",
    "lesion_rows",
    "localisation",
    "max_sensitivity",
    "noisy_linear",
    "normalised_dice",
    "parameter_randomisation",
    "parse_tuning",
    "resample_weights",
    "smooth_parameter_randomisation",
    "sum_by_patient",
    "summarise",
    "surface_distances",
    "tune_case",
    "voxel_measures",
]
