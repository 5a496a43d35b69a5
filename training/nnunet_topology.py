"""Which axes an nnU-Net pools, with which kernels, for a voxel size and a patch; and how large its feature maps are together.

Source: `get_pool_and_conv_props` of nnunetv2 2.8.1 and `compute_conv_feature_map_size` of dynamic_network_architectures 0.4.4.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

MIN_EDGE = 4  # voxels along an axis of the lowest feature map; an axis is halved while it has twice that


class Topology(NamedTuple):
    """kernel_sizes, strides: of each stage, top first, one int per axis. patch_size: as given, each side rounded up to a multiple
    of `divisible_by`, which is the product of the strides along the axis."""

    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]
    divisible_by: tuple[int, ...]


def topology(spacing: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """Pool the fine axes until they are as coarse as the others, then all of them, until the lowest map has `MIN_EDGE` voxels.

    A stage halves each axis that has at least 8 voxels and less than twice the spacing of the finest such axis; where that is one
    axis alone, it must have 12. A kernel is 1 voxel wide along axes of twice the finest spacing or more, from then on 3; at the
    bottom it is always 3.

    Args:
        spacing: in mm, one per axis.
        patch_size: in voxels; halves are possible, where it is a median.

    Example:
        >>> topology((3.0, 0.5, 0.5), (16, 64, 64)).strides
        ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    """
    axes = range(len(spacing))
    voxel, side = list(spacing), [float(n) for n in patch_size]
    kernel = [1] * len(spacing)
    strides, kernels = [(1,) * len(spacing)], []
    while True:
        long_enough = [a for a in axes if side[a] >= 2 * MIN_EDGE]
        finest = min((voxel[a] for a in long_enough), default=0.0)
        halved = [a for a in long_enough if voxel[a] / finest < 2]
        if not halved or (len(halved) == 1 and side[halved[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if k == 3 or voxel[a] / min(voxel) < 2 else 1 for a, k in zip(axes, kernel, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in halved else 1 for a in axes))
        for a in halved:
            voxel[a] *= 2
            side[a] = math.ceil(side[a] / 2)
    kernels.append((3,) * len(spacing))
    divisible = tuple(math.prod(axis) for axis in zip(*strides, strict=True))
    padded = tuple(math.ceil(n / d) * d for n, d in zip(patch_size, divisible, strict=True))
    return Topology(tuple(kernels), tuple(strides), padded, divisible)


def feature_map_size(
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    encoder: Sequence[int],
    decoder: Sequence[int],
    classes: int,
    residual: bool,
) -> int:
    """Elements of all feature maps that convolutions make of one patch, nnU-Net's measure of memory.

    Args:
        patch_size: in voxels, a multiple of the product of the strides.
        strides, features: of each stage, top first.
        encoder: convolutions of each stage of a `PlainConvUNet`, or blocks of a `ResidualEncoderUNet`. Of a block, both
            convolutions count, and its skip where features or grid change, even where that has no convolution but only a mean.
        decoder: convolutions of each stage, from the bottom; the transposed convolution ahead of them counts as one more.
        classes: channels of the logits, which count on the top grid alone.
        residual: whether the encoder is that of a `ResidualEncoderUNet`, which has a stem.

    Returns:
        The number of elements, for a batch of one.
    """
    voxels, grid = [], list(patch_size)
    for stride in strides:
        grid = [n // s for n, s in zip(grid, stride, strict=True)]
        voxels.append(math.prod(grid))
    total = features[0] * voxels[0] if residual else 0
    for stage, (count, here) in enumerate(zip(encoder, voxels, strict=True)):
        maps = count
        if residual:
            changes = stage > 0 and (features[stage] != features[stage - 1] or voxels[stage] != voxels[stage - 1])
            maps = 2 * count + changes
        total += maps * features[stage] * here
    for stage, convolutions in zip(reversed(range(len(features) - 1)), decoder, strict=True):
        total += (convolutions + 1) * features[stage] * voxels[stage]
    return total + (classes * voxels[0] if len(features) > 1 else 0)
