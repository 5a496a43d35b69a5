"""A model: what it is (`ModelSpec`) and its parameters, as the functions that are explained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from xaiseg._types import LocalFn, LogitsFn, TappedFn
from xaiseg.models.dynunet import DynUNet
from xaiseg.models.forward import Forward, LogitsOf, TappedOf
from xaiseg.models.nnunet import PlainConvUNet, ResidualEncoderUNet
from xaiseg.models.precision import check_precision, precision_of
from xaiseg.models.spec import ModelSpec
from xaiseg.models.swin_unetr import SwinUNETR
from xaiseg.models.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "dynunet": DynUNet,
    "plain_conv_unet": PlainConvUNet,
    "residual_encoder_unet": ResidualEncoderUNet,
    "swin_unetr": SwinUNETR,
}

Variables = Mapping[str, Any]

# Sides of a tile, in voxels, where strides allow. A wider one shares its linearisation among more voxels, and each of its rows
# costs more: 16 was fastest for lesions of 20 to 200 voxels (scripts/performance.md).
_TILE = 16


@dataclass(frozen=True)
class Model:
    """A network with its parameters, or an ensemble of one network with several sets of parameters.

    `logits_fn` and `tapped_fn` are pure and carry the parameters as pytree leaves. variables: of the network; of an ensemble, those
    of each member by its name. precision: of convolutions and matrix products, one of `precision.PRECISIONS`.
    """

    spec: ModelSpec
    variables: Variables
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def network(self) -> nn.Module:
        return build_network(self.spec)

    @property
    def logits_fn(self) -> LogitsFn:
        return Partial(LogitsOf(self._forward), self.variables)

    @property
    def tapped_fn(self) -> TappedFn:
        return Partial(TappedOf(self._forward), self.variables)

    @property
    def local_fn(self) -> LocalFn | None:
        """The logits of a tile from the part of the window around it; None where a logit depends on the whole window."""
        return self.local_logits()

    def local_logits(self, side: int = _TILE) -> LocalFn | None:
        """`local_fn` with tiles of about this side, as the network's strides allow."""
        network = self.network
        if self._forward.passes > 1 or self._forward.slice_axis is not None or not getattr(network, "is_local", False):
            return None
        alignment = network.tile_alignment
        tile = tuple(a * max(1, round(side / a)) for a in alignment)
        cone = network.cone(tile)
        return LocalFn(
            Partial(_ApplyTile(network, tile, self.precision), self.variables), tile, alignment, cone.before, cone.after
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """What the sides of a grid must be multiples of.

        Raises ValueError for a network that takes no grid but its window: slice by slice.
        """
        if self._forward.slice_axis is not None:
            raise ValueError("a 2-D network takes volumes slice by slice, not whole")
        x, y, z = self.network.tile_alignment
        return x, y, z

    @property
    def parameter_count(self) -> int:
        """Of one network, running statistics not counted."""
        one = self.variables[self.spec.members[0]] if self.spec.members else self.variables
        return sum(leaf.size for leaf in jax.tree.leaves(one["params"]))

    def taps(self) -> dict[str, tuple[int, ...]]:
        """Names of the taps, in order of computation, and their shapes `(*grid, features)` for one window."""
        _, taps = jax.eval_shape(self.tapped_fn, _window(self.spec), {})
        _, order = outputs(self.spec)  # JAX sorts the keys of a dict that it returns
        return {name: taps[name].shape[1:] for name in order}

    def with_spec(self, **changes: Any) -> "Model":
        return replace(self, spec=replace(self.spec, **changes))

    @property
    def _forward(self) -> Forward:
        return Forward(
            self.network, slice_axis(self.spec), self.spec.mirror_axes, self.spec.members, precision=self.precision
        )


def build_network(spec: ModelSpec) -> nn.Module:
    """The Linen module of a spec. Raises ValueError for an unknown architecture or option."""
    if spec.architecture not in NETWORKS:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; known are {', '.join(NETWORKS)}")
    options = {k: _hashable(v) for k, v in spec.options.items()}
    try:
        return NETWORKS[spec.architecture](**options)
    except TypeError as error:
        raise ValueError(f"options of {spec.architecture}: {error}") from error


def slice_axis(spec: ModelSpec) -> int | None:
    """The window's axis of side 1, along which a 2-D network takes a volume slice by slice; None for a 3-D network.

    Raises ValueError where a 2-D network has a window without such a side.
    """
    if spec.options.get("ndim", 3) == 3:
        return None
    if 1 not in spec.window:
        raise ValueError(f"a 2-D network needs a window with one side of 1, not {spec.window}")
    return spec.window.index(1)


def outputs(spec: ModelSpec) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Classes of a spec's network, and its taps in order with their shapes `(*grid, features)`.

    Raises ValueError or TypeError where it cannot be built.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def init(key: Array, x: Array) -> Array:
        (logits, taps), _ = build_network(spec).init_with_output(key, x)
        shapes.update((name, tap.shape[1:]) for name, tap in taps.items())
        return logits

    return jax.eval_shape(init, jax.random.key(0), _grid(spec)).shape[-1], shapes


def expected_variables(spec: ModelSpec) -> Variables:
    """Shapes and dtypes of the model's variables, as a tree of `ShapeDtypeStruct`."""
    one = jax.eval_shape(build_network(spec).init, jax.random.key(0), _grid(spec))
    return dict.fromkeys(spec.members, one) if spec.members else one


def _window(spec: ModelSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *spec.window, len(spec.channels)), jnp.float32)


def _grid(spec: ModelSpec) -> jax.ShapeDtypeStruct:
    """What the network itself is given: a window, or a slice of it."""
    axis = slice_axis(spec)
    sides = tuple(n for i, n in enumerate(spec.window) if i != axis)
    return jax.ShapeDtypeStruct((1, *sides, len(spec.channels)), jnp.float32)


@dataclass(frozen=True)
class _ApplyTile:
    """Hashable by its module, so that two models of one architecture share compiled programs."""

    network: nn.Module
    tile: tuple[int, ...]
    precision: str

    def __call__(self, variables: Variables, field: Array, start: Array, sides: Array) -> Array:
        with precision_of(self.precision):
            return self.network.apply(variables, field, tile=(self.tile, start, sides))[0]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
