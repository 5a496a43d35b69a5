"""nnU-Net's plan for training cases, from their fingerprint, by the rules of its own planner: the content of a plans.json.

Source: `ExperimentPlanner` and `nnUNetPlannerResEncM`, `L`, `XL` of nnunetv2 2.8.1 (Isensee et al., Nature Methods 2021,
doi 10.1038/s41592-020-01008-z, and arXiv 2404.09556). Everything per axis is in nnU-Net's order: the file's axes in
reverse, (Z, Y, X), and in the configurations transposed so that the coarsest axis comes first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.fingerprint import Fingerprint
from training.nnunet_topology import Topology, feature_map_size, topology
from xaiseg.errors import InputError
from xaiseg.imaging.nnunet_resample import RESAMPLE, new_shape

ANISOTROPIC = 3  # ratio of spacings, and of voxels, from which an axis counts as coarse
MASKED_BELOW = 3 / 4  # of the voxels are left by the crop: images lie in a background of zeros
LOWRES_BELOW = 1 / 4  # of the median image fits into the patch
_LOWRES_STEP = 1.03  # by which spacing grows until the patch holds enough of the image
_LOWRES_WORTH = 2  # times fewer voxels than at full resolution
_MIN_BATCH = 2
_BASE_FEATURES = 32
_SCHEMES = {
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


_REFERENCE_BATCH = {3: 2, 2: 12}  # patches for which the budgets below were measured, by dimensions
_MAX_FEATURES = {3: 320, 2: 512}
_LARGEST_PATCH = {3: 256.0**3, 2: 2048.0**2}  # voxels from which patches are reduced


@dataclass(frozen=True)
class Planner:
    """What distinguishes nnU-Net's planners.

    Attributes:
        plans_name: of the plans that it makes.
        budget: for 3-D and 2-D, the elements of feature maps (`feature_map_size`) that fill the GPU at `_REFERENCE_BATCH` patches.
        residual: whether it plans a `ResidualEncoderUNet`, on the preprocessed images of nnUNetPlans, and not a `PlainConvUNet`.
        covered: at most this part of all voxels in a batch.
        encoder: convolutions, or residual blocks, of the stages, top first; the last number is that of all further ones.
        decoder: convolutions of each decoder stage.
    """

    plans_name: str
    budget: tuple[int, int]
    residual: bool = True
    covered: float = 1
    encoder: tuple[int, ...] = (1, 3, 4, 6)
    decoder: int = 1

    @property
    def network(self) -> str:
        return "ResidualEncoderUNet" if self.residual else "PlainConvUNet"


PLANNERS = {
    "ExperimentPlanner": Planner("nnUNetPlans", (560_000_000, 85_000_000), False, 0.05, (2,), 2),
    # for 8, 24 and 40 GB of GPU memory
    "nnUNetPlannerResEncM": Planner("nnUNetResEncUNetMPlans", (680_000_000, 135_000_000)),
    "nnUNetPlannerResEncL": Planner("nnUNetResEncUNetLPlans", (2_100_000_000, 380_000_000)),
    "nnUNetPlannerResEncXL": Planner("nnUNetResEncUNetXLPlans", (3_600_000_000, 560_000_000)),
}


def make_plans(
    fingerprint: Fingerprint,
    channel_names: Sequence[str],
    *,
    classes: int = 2,
    planner: str = "ExperimentPlanner",
    dataset_name: str = "Dataset001_Lesions",
    reader: str = "SimpleITKIO",
) -> dict[str, Any]:
    """The plan of 3d_fullres, of 2d, and of 3d_lowres with its cascade where nnU-Net would make those.

    Args:
        fingerprint: of the training cases.
        channel_names: the input sequences in order. The names CT, noNorm, rescale_to_0_1 and rgb_to_0_1 choose a normalisation, all
            others the z-score.
        classes: labels, the background included.
        planner: one of `PLANNERS`.
        dataset_name: what the plans call the data set.
        reader: nnU-Net's class that reads the images; it decides about their orientation, see `LoadedCase`.

    Returns:
        As JSON takes it, in the layout of plans.json, which nnunetv2 and `training.nnunet_plan` read.

    Raises:
        InputError: the planner is unknown, the names do not fit the fingerprint, or the images are too small for a network in 3-D.

    Example:
        >>> statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"), 1.0)
        >>> found = Fingerprint(((1.0, 1.0, 1.0),) * 50, ((150, 180, 140),) * 50, (statistics,) * 2, 0.5)
        >>> plans = make_plans(found, ("FLAIR", "T1w"))
        >>> plans["configurations"]["3d_fullres"]["patch_size"], "3d_lowres" in plans["configurations"]
        ([128, 160, 112], False)
    """
    if planner not in PLANNERS:
        raise InputError(f"planner: {planner!r} is unknown; expected one of {', '.join(PLANNERS)}: choose one")
    if len(channel_names) != len(fingerprint.intensities):
        raise InputError(
            f"channel_names: {', '.join(channel_names) or 'none'} for a fingerprint of {len(fingerprint.intensities)} channels; "
            "expected a name for each: name the sequences of the training cases"
        )
    if classes < 2:
        raise InputError(f"classes: {classes}; expected 2 or more, of which one is the background: correct it")

    target = target_spacing(fingerprint)
    first = int(np.argmax(target))
    transpose = [first, *(axis for axis in range(3) if axis != first)]
    spacing = target[transpose]
    shapes = [
        new_shape(n, s, target.tolist())
        for n, s in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    shape = np.median(shapes, axis=0)[transpose]
    if shape[0] == 1:
        raise InputError(f"fingerprint: images of {_sides(shape)} voxels are slices; expected volumes to plan 3-D for")
    task = _Task(fingerprint, tuple(channel_names), classes, PLANNERS[planner])
    voxels = float(np.prod(shape))
    fullres = task.configuration("3d_fullres", spacing, shape, voxels)
    if len(fullres["architecture"]["arch_kwargs"]["strides"]) < 2:
        raise InputError(
            f"fingerprint: images of {_sides(shape)} voxels of {_sides(spacing)} mm are too small for a network that pools; "
            "expected at least 8 voxels along two axes of like spacing, or 12 along one: give whole images"
        )
    lowres = _lowres(task, fullres, spacing, shape)
    configurations = {"2d": task.configuration("2d", spacing[1:], shape[1:], voxels) | {"batch_dice": True}}
    if lowres is not None:
        configurations["3d_lowres"] = lowres | {"batch_dice": False, "next_stage": "3d_cascade_fullres"}
    configurations["3d_fullres"] = fullres | {"batch_dice": lowres is not None}
    if lowres is not None:
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {
        "dataset_name": dataset_name,
        "plans_name": PLANNERS[planner].plans_name,
        "original_median_spacing_after_transp": np.median(fingerprint.spacings, axis=0)[transpose].tolist(),
        "original_median_shape_after_transp": [
            round(n) for n in np.median(fingerprint.shapes_after_crop, axis=0)[transpose].tolist()
        ],
        "image_reader_writer": reader,
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): dict(v) for c, v in enumerate(fingerprint.intensities)},
    }


def target_spacing(fingerprint: Fingerprint) -> np.ndarray:
    """The voxel size of 3d_fullres, `(3,)` in mm, axes as in the fingerprint: the median over cases.

    An axis that is coarse in spacing and in voxels (by more than `ANISOTROPIC`) takes the 10th percentile, so that thin slices are
    not averaged away, but stays coarser than the others.
    """
    spacings = np.array(fingerprint.spacings)
    target = np.percentile(spacings, 50, axis=0)
    shape = np.percentile(np.array(fingerprint.shapes_after_crop), 50, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    next_coarsest = target[others].max()
    if target[coarse] > ANISOTROPIC * next_coarsest and shape[coarse] * ANISOTROPIC < shape[others].min():
        thin = np.percentile(spacings[:, coarse], 10)
        target[coarse] = thin if thin >= next_coarsest else next_coarsest + 1e-5
    return target


@dataclass(frozen=True)
class _Task:
    fingerprint: Fingerprint
    channel_names: tuple[str, ...]
    classes: int
    planner: Planner

    def configuration(self, name: str, spacing: np.ndarray, shape: np.ndarray, voxels: float) -> dict[str, Any]:
        """All of a configuration but `batch_dice`. shape: of the median image. voxels: of a typical 3-D image."""
        found, size = self._patch(spacing, shape)
        dims = len(spacing)
        reference_batch = _REFERENCE_BATCH[dims]
        fits = round(self.planner.budget[dims == 2] / size * reference_batch)
        cases = len(self.fingerprint.spacings)
        seen = round(voxels * cases * self.planner.covered / math.prod(found.patch_size))
        schemes = [_SCHEMES.get(channel.casefold(), "ZScoreNormalization") for channel in self.channel_names]
        masked = self.fingerprint.median_relative_size_after_cropping < MASKED_BELOW
        shared = self.planner.residual and name in ("2d", "3d_fullres")
        return {
            "data_identifier": f"{'nnUNetPlans' if shared else self.planner.plans_name}_{name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": max(min(fits, seen), _MIN_BATCH),
            "patch_size": list(found.patch_size),
            "median_image_size_in_voxels": shape.tolist(),
            "spacing": spacing.tolist(),
            "normalization_schemes": schemes,
            # the other schemes would not leave the background at zero
            "use_mask_for_norm": [masked and scheme == "ZScoreNormalization" for scheme in schemes],
            **_resampling("data", is_seg=False, order=3),
            **_resampling("seg", is_seg=True, order=1),
            **_resampling("probabilities", is_seg=False, order=1),
            "architecture": self._architecture(found),
        }

    def _patch(self, spacing: np.ndarray, shape: np.ndarray) -> tuple[Topology, int]:
        """The largest patch whose feature maps fit the budget, and their size.

        It starts isotropic in mm and larger than any GPU would take, is cut to the median image, and loses voxels along the axis on
        which it covers most of the image, until it fits. Of axes that cover the same, the last one is taken.
        """
        dims = len(spacing)
        per_mm = 1 / spacing
        largest = per_mm * (_LARGEST_PATCH[dims] / np.prod(per_mm)) ** (1 / dims)
        found = topology(
            spacing.tolist(), [min(round(n), m) for n, m in zip(largest.tolist(), shape.tolist(), strict=True)]
        )
        # At least two patches must fit: plain planning allows for that in 2-D too, where the budget is that of 12.
        allowed = 1 if self.planner.residual else _MIN_BATCH / _REFERENCE_BATCH[dims]
        while (size := self._size(found)) * allowed > self.planner.budget[dims == 2]:
            side = int(np.argsort(np.array(found.patch_size) / shape, kind="stable")[-1])
            # A smaller side may be halved less often: step by what the next smaller patch asks for, so as to skip none.
            smaller = list(found.patch_size)
            smaller[side] -= found.divisible_by[side]
            step = topology(spacing.tolist(), smaller).divisible_by[side]
            smaller[side] = found.patch_size[side] - step
            found = topology(spacing.tolist(), smaller)
        return found, size

    def _size(self, found: Topology) -> int:
        stages = len(found.strides)
        return feature_map_size(
            found.patch_size,
            found.strides,
            _features(found),
            self._encoder(stages),
            (self.planner.decoder,) * (stages - 1),
            self.classes,
            self.planner.residual,
        )

    def _encoder(self, stages: int) -> list[int]:
        known = self.planner.encoder
        return [known[min(stage, len(known) - 1)] for stage in range(stages)]

    def _architecture(self, found: Topology) -> dict[str, Any]:
        stages, dims = len(found.strides), len(found.patch_size)
        return {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{self.planner.network}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": _features(found),
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [list(k) for k in found.kernel_sizes],
                "strides": [list(s) for s in found.strides],
                "n_blocks_per_stage" if self.planner.residual else "n_conv_per_stage": self._encoder(stages),
                "n_conv_per_stage_decoder": [self.planner.decoder] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }


def _lowres(task: _Task, fullres: dict[str, Any], spacing: np.ndarray, shape: np.ndarray) -> dict[str, Any] | None:
    """The configuration at the spacing at which a patch holds `LOWRES_BELOW` of the image; None where 3d_fullres nearly does.

    The fine axes grow first, until no spacing is more than twice another.
    """
    voxels = at_full = float(np.prod(shape))
    coarser, lowres = spacing.copy(), None
    in_patch = math.prod(fullres["patch_size"])
    while in_patch / voxels < LOWRES_BELOW:
        fine = coarser.max() / coarser > 2
        coarser = np.where(fine if fine.any() else True, coarser * _LOWRES_STEP, coarser)
        sides = spacing / coarser * shape
        voxels = float(np.prod(sides))
        lowres = task.configuration("3d_lowres", coarser, np.array([round(n) for n in sides.tolist()]), voxels)
        in_patch = math.prod(lowres["patch_size"])
    return lowres if at_full / voxels >= _LOWRES_WORTH else None


def _features(found: Topology) -> list[int]:
    most = _MAX_FEATURES[len(found.patch_size)]
    return [min(_BASE_FEATURES * 2**stage, most) for stage in range(len(found.strides))]


def _resampling(what: str, is_seg: bool, order: int) -> dict[str, Any]:
    """`order_z` is that of an axis which is resampled separately, as it is where spacings differ by more than 3."""
    return {
        f"resampling_fn_{what}": RESAMPLE,
        f"resampling_fn_{what}_kwargs": {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None},
    }


def _sides(values: np.ndarray) -> str:
    return " x ".join(f"{v:g}" for v in values)
