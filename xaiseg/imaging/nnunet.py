"""nnU-Net v2's way from the stored images to its network's input, and the way back, without nnunetv2.

The order is nnU-Net's: axes, crop to the non-zero region, normalisation, resampling; back: logits resampled, inserted
into the field of view, axes. Source: `DefaultPreprocessor.run_case_npy` and
`convert_predicted_logits_to_segmentation_with_correct_shape` of nnunetv2 2.8.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from xaiseg.errors import InputError
from xaiseg.imaging.grid import NATIVE, Grid, invert, reorient, reorient_grid, reorientation
from xaiseg.imaging.nnunet_labels import resize_labels
from xaiseg.imaging.nnunet_plan import NnunetPreprocessing
from xaiseg.imaging.nnunet_resample import KEEP, new_shape, resample

_EPSILON = 1e-8  # least divisor of a normalisation


@dataclass(frozen=True, eq=False)
class Prepared:
    """The image that an nnU-Net takes, and the way back from it to the stored grid.

    Three grids: stored; cropped, with nnU-Net's axes and the stored voxel size; and that of `image`, the cropped one
    resampled.

    Attributes:
        image: (X', Y', Z', C) float32; its first axis is the first of nnU-Net's transposed array.
        grid: of `image`.
        cropped_grid: after the crop and before resampling.
        stored_grid: of the volumes given to `prepare`.
        start: the voxel at which the crop begins, along the axes of `image`, in stored voxels.
        spacing: of `cropped_grid` as nnU-Net read it, in mm.
        transform: (3, 2) orientation transform from the stored axes to those of `image`.
        preprocessing: as given to `prepare`.
    """

    image: np.ndarray
    grid: Grid
    cropped_grid: Grid
    stored_grid: Grid
    start: tuple[int, int, int]
    spacing: tuple[float, ...]
    transform: np.ndarray
    preprocessing: NnunetPreprocessing

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Undo the resampling, by the rule for probabilities; nnU-Net does so to logits, before their softmax.

        Args:
            values: (X', Y', Z') or (X', Y', Z', K), on `grid`.

        Returns:
            (x, y, z) or (x, y, z, K) float32, on `cropped_grid`.
        """
        _on(self.grid, values, "values")
        stacked = np.moveaxis(np.asarray(values, np.float32).reshape(*self.grid.shape, -1), -1, 0)
        target = _target(self.preprocessing, self.spacing)
        rule = self.preprocessing.probability_resampling
        restored = resample(stacked, self.cropped_grid.shape, target, self.spacing, rule)
        out = np.ascontiguousarray(np.moveaxis(restored, 0, -1))
        return out.reshape(*self.cropped_grid.shape, *values.shape[3:])

    def insert(self, values: np.ndarray, fill: float | Sequence[float] = 0) -> np.ndarray:
        """Undo the crop and the change of axes.

        Args:
            values: (x, y, z) or (x, y, z, K), on `cropped_grid`.
            fill: what voxels outside the crop get, one for all channels or one each: nnU-Net gives its background
                channel the probability 1 and the others 0.

        Returns:
            (X, Y, Z) or (X, Y, Z, K) on `stored_grid`, of the dtype of `values`.
        """
        _on(self.cropped_grid, values, "values")
        whole = reorient_grid(self.stored_grid, self.transform).shape
        out = np.empty((*whole, *values.shape[3:]), values.dtype)
        out[...] = fill
        out[self._crop] = values
        return reorient(out, invert(self.transform))

    def labels_to_image(self, labels: np.ndarray) -> np.ndarray:
        """Bring a mask or label map onto the grid of `image`: nearest neighbour, yet no label within the crop vanishes.

        Args:
            labels: (X, Y, Z) integer on `stored_grid`, 0 the background. What lies outside the crop is lost.

        Returns:
            (X', Y', Z') int32; see `nnunet_labels.resize_labels` for labels smaller than a voxel.
        """
        _on(self.stored_grid, labels, "labels")
        cropped = reorient(labels, self.transform)[self._crop]
        return resize_labels(cropped, self.grid.shape, self.grid.spacing)

    @property
    def _crop(self) -> tuple[slice, ...]:
        return tuple(slice(i, i + n) for i, n in zip(self.start, self.cropped_grid.shape, strict=True))


def prepare(
    volumes: Sequence[np.ndarray],
    grid: Grid,
    preprocessing: NnunetPreprocessing,
    names: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> Prepared:
    """Bring the channels of a case to an nnU-Net's input.

    Args:
        volumes: one (X, Y, Z) float32 per channel, as stored, all on `grid`.
        names: what messages call the volumes, their paths.
        spacing: voxel size along the stored axes in mm as the header gives it (`header.get_zooms()`), which nnU-Net
            reads. An oblique affine yields it only up to rounding, and nnU-Net rounds shapes at halves and compares
            spacings for equality, so that the last digit can decide. By default, that of `grid`.

    Raises:
        InputError: a volume is zero throughout; it does not suit its normalisation; or it is too thin to be resampled.
        ValueError: the volumes are not as many as the preprocessing has channels, or not on `grid`.
    """
    if not len(volumes) == len(names) == preprocessing.channels:
        raise ValueError(f"{len(volumes)} volumes and {len(names)} names for {preprocessing.channels} channels")
    for volume, name in zip(volumes, names, strict=True):
        _on(grid, volume, name)
        if not volume.any():
            raise InputError(f"{name}: all voxels are zero; expected an image, give the right file")

    to_reader = reorientation(grid, preprocessing.orientation)
    read = reorient_grid(grid, to_reader)
    header_is_kept = np.array_equal(to_reader, reorientation(grid, NATIVE))
    # Where nibabel reorients, it writes the affine's spacing into the header, a float32.
    zooms = spacing if spacing is not None and header_is_kept else np.array(read.spacing, np.float32)
    # In memory as nnU-Net's (C, Z, Y, X) is, since float32 sums depend on their order.
    data = np.empty((len(volumes), *read.shape[::-1]), np.float32)
    for channel, volume in zip(data, volumes, strict=True):
        channel[...] = reorient(volume, to_reader).T
    forward = preprocessing.transpose_forward
    data = data.transpose(0, *(1 + axis for axis in forward))
    own = tuple(float(zooms[2 - axis]) for axis in forward)

    mask = ndimage.binary_fill_holes((data != 0).any(axis=0))
    crop = ndimage.find_objects(mask.astype(np.uint8))[0]
    data, mask = data[(slice(None), *crop)], mask[crop]
    for index, name in enumerate(names):
        _normalise(data[index], mask, preprocessing, index, name)

    target = _target(preprocessing, own)
    if preprocessing.data_resampling.resampling_fn != KEEP:
        shape = new_shape(data.shape[1:], own, target)
        if 0 in shape:
            raise InputError(
                f"{names[0]}: {' x '.join(map(str, data.shape[1:]))} voxels other than zero of "
                f"{' x '.join(f'{s:g}' for s in own)} mm; expected at least half a voxel of the model's "
                f"{' x '.join(f'{s:g}' for s in target)} mm along each axis: give the whole image"
            )
        data = resample(data, shape, own, target, preprocessing.data_resampling)

    transform = _compose(to_reader, forward)
    start = (crop[0].start, crop[1].start, crop[2].start)
    cropped_grid = reorient_grid(grid, transform).crop(start, mask.shape)
    image = np.ascontiguousarray(np.moveaxis(data, 0, -1))
    resized = _resize_grid(cropped_grid, image.shape[:3])
    return Prepared(image, resized, cropped_grid, grid, start, own, transform, preprocessing)


def _normalise(
    image: np.ndarray, mask: np.ndarray, preprocessing: NnunetPreprocessing, channel: int, name: str
) -> None:
    """In place, in float32 as nnU-Net does."""
    scheme = preprocessing.normalisation[channel]
    known: Mapping[str, float] = preprocessing.intensities[channel]
    if scheme == "ZScoreNormalization":
        inside = mask if preprocessing.use_mask_for_norm[channel] else ...
        values = image[inside]
        image[inside] = (values - values.mean()) / max(values.std(), _EPSILON)
    elif scheme == "CTNormalization":
        np.clip(image, known["percentile_00_5"], known["percentile_99_5"], out=image)
        image -= known["mean"]
        image /= max(known["std"], _EPSILON)
    elif scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= max(image.max(), _EPSILON)
    elif scheme == "RGBTo01Normalization":
        if image.min() < 0 or image.max() > 255:
            raise InputError(
                f"{name}: intensities from {image.min():g} to {image.max():g}; expected 0 to 255, as the model was "
                "trained on: give an image of that kind"
            )
        image /= 255


def _target(preprocessing: NnunetPreprocessing, own: Sequence[float]) -> tuple[float, ...]:
    """Target spacing per axis: a 2-D configuration keeps that between slices."""
    return preprocessing.spacing if len(preprocessing.spacing) == 3 else (own[0], *preprocessing.spacing)


def _compose(to_reader: np.ndarray, forward: tuple[int, int, int]) -> np.ndarray:
    """The orientation transform that reorients, reverses the axes and transposes them."""
    position = {2 - axis: index for index, axis in enumerate(forward)}
    return np.array([[position[int(axis)], int(flip)] for axis, flip in to_reader])


def _resize_grid(grid: Grid, shape: tuple[int, ...]) -> Grid:
    """The grid of `shape` voxels over the field of view of `grid`."""
    scale = np.divide(grid.shape, shape)
    resize = np.diag([*scale, 1.0])
    resize[:3, 3] = (scale - 1) / 2
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ resize)


def _on(grid: Grid, array: np.ndarray, name: str) -> None:
    if array.shape[:3] != grid.shape:
        raise ValueError(f"{name}: shape {array.shape}; expected {grid.shape} along the first three axes")
