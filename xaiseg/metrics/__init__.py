"""Measures of agreement."""

from xaiseg.metrics.bootstrap import Interval, bootstrap_interval, resample_weights, sum_by_patient
from xaiseg.metrics.evaluation import CaseEvaluation, EvaluationSettings, evaluate_case, summarise
from xaiseg.metrics.lesions import lesion_measures, lesion_rates, lesion_rows
from xaiseg.metrics.surface import SurfaceDistances, surface_distances
from xaiseg.metrics.tuning import TuningGrid, choose, parse_tuning, tune_case
from xaiseg.metrics.voxels import VoxelCounts, count_voxels, dice, normalised_dice, voxel_measures

__all__ = [
    "CaseEvaluation",
    "EvaluationSettings",
    "Interval",
    "SurfaceDistances",
    "TuningGrid",
    "VoxelCounts",
    "bootstrap_interval",
    "choose",
    "count_voxels",
    "dice",
    "evaluate_case",
    "lesion_measures",
    "lesion_rates",
    "lesion_rows",
    "normalised_dice",
    "parse_tuning",
    "resample_weights",
    "sum_by_patient",
    "summarise",
    "surface_distances",
    "tune_case",
    "voxel_measures",
]
