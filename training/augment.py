"""Random augmentation of a batch, compiled, where the network runs: a pure function of a key and the batch.

The order: one movement (affine, elastic, quarter turns), flips, bias field, noise, blur, brightness, contrast, low resolution,
gamma of the inverted image, gamma, shift, scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from training import augment_intensity as intensity
from training import augment_spatial as spatial
from xaiseg.errors import InputError

Range = tuple[float, float]

_BIAS_ORDER = 3  # enough for the one or two slopes that a coil's field has across a head
# Each transform has a row of random numbers: what it draws does not depend on which others there are. All rows are one call, for
# a call each would take XLA half a minute to compile.
_ROWS = (
    *("flips", "quarter_turns", "affine", "elastic", "bias_field", "noise", "blur", "brightness", "contrast"),
    *("low_resolution", "gamma_inverted", "gamma", "shift", "scale"),
)


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges `(lowest, highest)`. As it stands, nothing is changed; `PAPER` and `NNUNET` are two recipes.

    flips: probability for each axis. quarter_turns: for each plane xy, xz, yz, of a turn by 90°, 180° or 270°; needs equal sides.

    affine: that a movement is considered at all; then `rotation`, `scaling`, `shear`, `translation`: probabilities of each.
    degrees: about each axis. scales: along each axis, or one along all if `one_scale`; above 1, things become smaller.
    shears: off the diagonal of the matrix. voxels: of the translation.
    elastic: probability. elastic_sigma: smoothness of the displacement, elastic_amplitude: its largest component, both in voxels.

    bias_field: probability; bias_coefficients: of the polynomial of order 3 in the exponent, each channel has its own.
    noise: probability; noise_deviation: one for all channels.
    blur: probability; blur_channel: then of each channel; blur_sigma: along each axis, in voxels.
    brightness, contrast: probabilities; the factors of each channel; one half of them below 1.
    low_resolution: probability; low_resolution_channel: then of each channel; zooms: the share of voxels kept along each axis.
    gamma, gamma_inverted: probabilities; exponents: of each channel; one half of them below 1.
    shift, scale: probabilities; offsets and factors: one for all channels.
    """

    flips: tuple[float, float, float] = (0.0, 0.0, 0.0)
    quarter_turns: tuple[float, float, float] = (0.0, 0.0, 0.0)

    affine: float = 1.0
    rotation: float = 0.0
    degrees: Range = (-15.0, 15.0)
    scaling: float = 0.0
    scales: Range = (0.9, 1.1)
    one_scale: bool = False
    shear: float = 0.0
    shears: Range = (-0.1, 0.1)
    translation: float = 0.0
    voxels: Range = (-5.0, 5.0)
    elastic: float = 0.0
    elastic_sigma: Range = (9.0, 13.0)
    elastic_amplitude: Range = (0.0, 5.0)

    bias_field: float = 0.0
    bias_coefficients: Range = (-0.3, 0.3)
    noise: float = 0.0
    noise_deviation: Range = (0.0, 0.1)
    blur: float = 0.0
    blur_channel: float = 1.0
    blur_sigma: Range = (0.5, 1.0)
    brightness: float = 0.0
    brightness_factors: Range = (0.75, 1.25)
    contrast: float = 0.0
    contrast_factors: Range = (0.75, 1.25)
    low_resolution: float = 0.0
    low_resolution_channel: float = 1.0
    zooms: Range = (0.5, 1.0)
    gamma_inverted: float = 0.0
    gamma: float = 0.0
    exponents: Range = (0.7, 1.5)
    shift: float = 0.0
    offsets: Range = (-0.1, 0.1)
    scale: float = 0.0
    factors: Range = (0.9, 1.1)

    @property
    def moves(self) -> bool:
        """Whether voxels are ever read from elsewhere, flips apart."""
        affine = self.affine * max(self.rotation, self.scaling, self.shear, self.translation)
        return max(affine, self.elastic, *self.quarter_turns) > 0


# Spagnolo et al., Sci Rep 2026: shift, scale, flips, quarter turns, and affine movements as one, each with probability 1/2.
PAPER = Augmentation(
    flips=(0.5, 0.5, 0.5), quarter_turns=(0.5, 0.5, 0.5), affine=0.5, rotation=1.0, scaling=1.0, shift=0.5, scale=0.5
)

# Isensee et al., Nat Methods 2021, as version 2 of nnU-Net trains 3-D patches that are nearly cubes. It names the noise's range a
# variance and takes it as a standard deviation. Beyond the crop it reads zeros, and this the border: give a margin.
NNUNET = Augmentation(
    flips=(0.5, 0.5, 0.5),
    rotation=0.2,
    degrees=(-30.0, 30.0),
    scaling=0.2,
    scales=(0.7, 1.4),
    one_scale=True,
    noise=0.1,
    blur=0.2,
    blur_channel=0.5,
    brightness=0.15,
    contrast=0.15,
    low_resolution=0.25,
    low_resolution_channel=0.5,
    gamma_inverted=0.1,
    gamma=0.3,
)


class Drawn(NamedTuple):
    """What was drawn for one item; C channels. Parameters of what does not happen are drawn all the same, and not used.

    flips: bool `(3,)`.
    moved: bool, by turns, affine or elastic movement. matrix `(3, 3)`, turns included, translation `(3,)`: of `places`.
    elastic: bool. knots_key: of the knots; sigma, amplitude: see `augment_spatial.elastic_displacement`.
    What follows is a bool each, with the parameters of `augment_intensity`; those of a channel that is left out change nothing.
    """

    flips: Array
    moved: Array
    matrix: Array
    translation: Array
    elastic: Array
    knots_key: Array
    sigma: Array
    amplitude: Array
    bias_field: Array
    bias_coefficients: Array
    noise: Array
    noise_key: Array
    noise_deviation: Array
    blur: Array
    blur_sigma: Array
    brightness: Array
    brightness_factors: Array
    contrast: Array
    contrast_factors: Array
    low_resolution: Array
    zooms: Array
    gamma_inverted: Array
    inverted_exponents: Array
    gamma: Array
    exponents: Array
    shift: Array
    offset: Array
    scale: Array
    factor: Array


@partial(jax.jit, static_argnames=("settings", "margin", "mesh"))
def augment(
    key: Array,
    images: Array,
    references: Array,
    settings: Augmentation,
    *,
    margin: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """A batch augmented at random, each item by the key folded with its number: no item depends on the others.

    Items are taken one after the other, so that what does not happen to an item is not computed. Vectorised, each condition would
    become a choice between two results that are both computed, for every item: 15 to 30 times slower on a CPU.

    Args:
        key: of the step.
        images: `(B, X, Y, Z, C)` float32.
        references: `(B, X, Y, Z)`, of any type, read at the nearest voxel.
        settings: static, as are margin and mesh.
        margin: voxels at each end that serve as surroundings and are cut off: what turns into view is then image, not border.
        mesh: devices that share the batch evenly along its only axis, each taking its own items in turn.

    Returns:
        Images and references, smaller by twice the margin.

    Raises:
        InputError: see `check_augmentation`.

    Example:
        >>> images, references = jnp.ones((2, 8, 8, 8, 1)), jnp.zeros((2, 8, 8, 8), jnp.uint8)
        >>> images, references = augment(jax.random.key(0), images, references, PAPER, margin=1)
        >>> images.shape
        (2, 6, 6, 6, 1)
    """
    patch = tuple(side - 2 * margin for side in images.shape[1:4])
    check_augmentation(settings, patch)

    def items(key: Array, numbers: Array, images: Array, references: Array) -> tuple[Array, Array]:
        def item(one: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            number, image, reference = one
            drawn = draw(jax.random.fold_in(key, number), settings, image.shape[-1])
            return apply(drawn, image, reference, settings, margin)

        augmented: tuple[Array, Array] = jax.lax.map(item, (numbers, images, references))
        return augmented

    if mesh is not None:
        share = PartitionSpec(mesh.axis_names[0])
        specs = (PartitionSpec(), share, share, share)
        items = jax.shard_map(items, mesh=mesh, in_specs=specs, out_specs=(share, share), check_vma=False)
    return items(key, jnp.arange(len(images), dtype=jnp.int32), images, references)


def draw(key: Array, settings: Augmentation, channels: int) -> Drawn:
    """The parameters of one item with so many channels."""
    key, noise_key, knots_key = jax.random.split(key, 3)
    bias_shape = (channels, *(_BIAS_ORDER + 1,) * 3)
    width = 1 + math.prod(bias_shape)  # the longest: whether it happens, and then a number for each parameter
    rows = dict(zip(_ROWS, jax.random.uniform(key, (len(_ROWS), width), jnp.float32), strict=True))

    def happens(
        name: str, probability: float | tuple[float, ...], shape: tuple[int, ...] = (), start: int = 0
    ) -> Array:
        return rows[name][start : start + math.prod(shape)].reshape(shape) < jnp.array(probability, jnp.float32)

    def within(name: str, extent: Range, shape: tuple[int, ...] = (), start: int = 1) -> Array:
        low, high = extent
        return low + (high - low) * rows[name][start : start + math.prod(shape)].reshape(shape)

    def around_one(name: str, extent: Range) -> Array:
        """Per channel: as often from below 1 as from above it, where the range has both."""
        low, high = extent
        lower = within(name, (low, max(min(high, 1.0), low)), (channels,))
        upper = within(name, (min(max(low, 1.0), high), high), (channels,))
        share = 0.5 if low < 1 < high else float(high <= 1)
        return jnp.where(happens(name, share, (channels,), 1 + channels), lower, upper)

    turned = happens("quarter_turns", settings.quarter_turns, (3,))
    turns = jnp.where(turned, 1 + jnp.floor(3 * rows["quarter_turns"][3:6]).astype(jnp.int32), 0)
    moved, matrix, translation = _draw_affine(rows["affine"], settings)
    elastic = happens("elastic", settings.elastic)
    blurred = happens("blur", settings.blur_channel, (channels, 1), 1)
    lowered = happens("low_resolution", settings.low_resolution_channel, (channels,), 1)
    return Drawn(
        flips=happens("flips", settings.flips, (3,)),
        moved=moved | elastic | (turns > 0).any(),
        matrix=jnp.dot(matrix, spatial.turn_matrix(turns), precision="highest"),
        translation=translation,
        elastic=elastic,
        knots_key=knots_key,
        sigma=within("elastic", settings.elastic_sigma),
        amplitude=within("elastic", settings.elastic_amplitude, start=2),
        bias_field=happens("bias_field", settings.bias_field),
        bias_coefficients=within("bias_field", settings.bias_coefficients, bias_shape),
        noise=happens("noise", settings.noise),
        noise_key=noise_key,
        noise_deviation=within("noise", settings.noise_deviation),
        blur=happens("blur", settings.blur),
        blur_sigma=jnp.where(blurred, within("blur", settings.blur_sigma, (channels, 3), 1 + channels), 0.0),
        brightness=happens("brightness", settings.brightness),
        brightness_factors=around_one("brightness", settings.brightness_factors),
        contrast=happens("contrast", settings.contrast),
        contrast_factors=around_one("contrast", settings.contrast_factors),
        low_resolution=happens("low_resolution", settings.low_resolution),
        zooms=jnp.where(lowered, within("low_resolution", settings.zooms, (channels,), 1 + channels), 1.0),
        gamma_inverted=happens("gamma_inverted", settings.gamma_inverted),
        inverted_exponents=around_one("gamma_inverted", settings.exponents),
        gamma=happens("gamma", settings.gamma),
        exponents=around_one("gamma", settings.exponents),
        shift=happens("shift", settings.shift),
        offset=within("shift", settings.offsets),
        scale=happens("scale", settings.scale),
        factor=within("scale", settings.factors),
    )


def apply(drawn: Drawn, image: Array, reference: Array, settings: Augmentation, margin: int = 0) -> tuple[Array, Array]:
    """One item `(X, Y, Z, C)`, `(X, Y, Z)` changed as drawn; smaller by twice the margin. `settings` say what may happen at all."""
    image, reference = _move(drawn, image, reference, settings, margin)
    if any(settings.flips):
        image, reference = spatial.flip(image, drawn.flips), spatial.flip(reference, drawn.flips)

    def when(probability: float, happens: Array, change: Callable[[Array], Array]) -> None:
        nonlocal image
        if probability:
            image = jax.lax.cond(happens, change, lambda x: x, image)

    when(settings.bias_field, drawn.bias_field, lambda x: intensity.bias_field(x, drawn.bias_coefficients))
    when(settings.noise, drawn.noise, lambda x: intensity.noise(drawn.noise_key, x, drawn.noise_deviation))
    when(settings.blur, drawn.blur, lambda x: intensity.blur(x, drawn.blur_sigma, settings.blur_sigma[1]))
    when(settings.brightness, drawn.brightness, lambda x: intensity.scale(x, drawn.brightness_factors))
    when(settings.contrast, drawn.contrast, lambda x: intensity.contrast(x, drawn.contrast_factors))
    when(settings.low_resolution, drawn.low_resolution, lambda x: intensity.low_resolution(x, drawn.zooms))
    when(
        settings.gamma_inverted,
        drawn.gamma_inverted,
        lambda x: intensity.gamma(x, drawn.inverted_exponents, invert=True),
    )
    when(settings.gamma, drawn.gamma, lambda x: intensity.gamma(x, drawn.exponents))
    when(settings.shift, drawn.shift, lambda x: intensity.shift(x, drawn.offset))
    when(settings.scale, drawn.scale, lambda x: intensity.scale(x, drawn.factor))
    return image, reference


def check_augmentation(settings: Augmentation, patch: Sequence[int]) -> None:
    """Raises InputError that names the first field whose value cannot be, for patches of these sides."""
    for field in fields(Augmentation):
        value = getattr(settings, field.name)
        if field.type is Range:
            holds, expected = len(value) == 2 and value[0] <= value[1], "two numbers, the lower first"
        elif isinstance(value, tuple):
            holds = len(value) == 3 and all(0 <= p <= 1 for p in value)
            expected = "three numbers from 0 to 1"
        else:
            holds, expected = 0 <= value <= 1, "a number from 0 to 1"
        _require(holds, settings, field.name, expected)
    for name in ("scales", "elastic_sigma", "zooms", "exponents"):
        _require(getattr(settings, name)[0] > 0, settings, name, "positive numbers")
    for name in ("elastic_amplitude", "noise_deviation", "blur_sigma"):
        _require(getattr(settings, name)[0] >= 0, settings, name, "numbers of 0 or more")
    _require(settings.zooms[1] <= 1, settings, "zooms", "1 at most")
    for probability, (a, b) in zip(settings.quarter_turns, spatial.PLANES, strict=True):
        if probability and patch[a] != patch[b]:
            raise InputError(
                f"augmentation.quarter_turns: {settings.quarter_turns} for patches of {tuple(patch)} voxels; expected equal sides "
                "in every plane that is turned: set 0 there, or choose a cube"
            )


def _require(holds: bool, settings: Augmentation, name: str, expected: str) -> None:
    if not holds:
        raise InputError(f"augmentation.{name}: {getattr(settings, name)!r}; expected {expected}: correct it")


def _draw_affine(row: Array, settings: Augmentation) -> tuple[Array, Array, Array]:
    """Whether there is an affine movement, its matrix and its translation."""
    probabilities = jnp.array([settings.rotation, settings.scaling, settings.shear, settings.translation], jnp.float32)
    parts = (row[1:5] < probabilities) & (row[0] < settings.affine)
    values = row[5:17].reshape(4, 3)
    ranges = (settings.degrees, settings.scales, settings.shears, settings.voxels)
    degrees, scales, shears, voxels = (low + (high - low) * u for (low, high), u in zip(ranges, values, strict=True))
    if settings.one_scale:
        scales = jnp.full((3,), scales[0])
    matrix = spatial.affine_matrix(
        jnp.where(parts[0], degrees, 0.0), jnp.where(parts[1], scales, 1.0), jnp.where(parts[2], shears, 0.0)
    )
    return parts.any(), matrix, jnp.where(parts[3], voxels, 0.0)


def _move(drawn: Drawn, image: Array, reference: Array, settings: Augmentation, margin: int) -> tuple[Array, Array]:
    """The affine and elastic movement, read from the whole patch for what lies within the margin."""
    patch = tuple(side - 2 * margin for side in reference.shape)

    def knots() -> Array:
        grid = spatial.elastic_grid(patch, settings.elastic_sigma[0])
        return jax.random.normal(drawn.knots_key, (*grid, 3), jnp.float32)

    def moved(image: Array, reference: Array) -> tuple[Array, Array]:
        displacement = None
        if settings.elastic:
            displacement = jax.lax.cond(
                drawn.elastic,
                lambda: spatial.elastic_displacement(knots(), patch, drawn.sigma, drawn.amplitude),
                lambda: jnp.zeros((*patch, 3)),
            )
        where = spatial.places(patch, reference.shape, drawn.matrix, drawn.translation, displacement)
        return spatial.read_linear(image, where), spatial.read_nearest(reference, where)

    def kept(image: Array, reference: Array) -> tuple[Array, Array]:
        return spatial.centre_crop(image, margin), spatial.centre_crop(reference, margin)

    if not settings.moves:
        return kept(image, reference)
    return jax.lax.cond(drawn.moved, moved, kept, image, reference)
