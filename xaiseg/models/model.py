"""A model: what it is (`ModelSpec`, readable as JSON) and its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from xaiseg._types import LocalFn, LogitsFn, TappedFn
from xaiseg.models.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet}

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """Everything besides the parameters that a result depends on. Stored as `model.json`.

    architecture, options: the network's name in `NETWORKS` and its constructor's arguments.
    channels: input sequences in order.
    normalisation: `zscore_nonzero`, per channel over the whole volume.
    orientation: axis codes the network was trained in (`RAS`, `LAS`), or `native` for the order in which files store voxels.
    window: sides of the sliding window in voxels. overlap: of neighbouring windows, 0 to 1. blending: `gaussian` or `constant`.
    threshold: on the probability, `>`. connectivity: 6, 18 or 26. min_voxels: smaller predicted components are removed.
    target_class: index of the lesion class in the logits.
    source: the file the parameters came from, `source_sha256` its hash. default_layer: the tap Grad-CAM++ uses.
    """

    architecture: str
    options: Mapping[str, Any]
    channels: tuple[str, ...]
    window: tuple[int, int, int]
    overlap: float = 0.25
    blending: str = "gaussian"
    threshold: float = 0.3
    connectivity: int = 18
    min_voxels: int = 1
    normalisation: str = "zscore_nonzero"
    orientation: str = "native"
    target_class: int = 1
    default_layer: str = "decoder1.conv"
    source: str = ""
    source_sha256: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A network with its parameters. `logits_fn` and `tapped_fn` are pure and carry the parameters as pytree leaves."""

    spec: ModelSpec
    variables: Variables

    @property
    def network(self) -> nn.Module:
        return build_network(self.spec)

    @property
    def logits_fn(self) -> LogitsFn:
        return Partial(_Apply(self.network), self.variables)

    @property
    def tapped_fn(self) -> TappedFn:
        return Partial(_ApplyTapped(self.network), self.variables)

    @property
    def local_fn(self) -> LocalFn | None:
        """The logits of a tile of twice the network's total stride; None where a logit depends on the whole decoder."""
        network = self.network
        if not getattr(network, "has_local_decoder", False):
            return None
        alignment = network.tile_alignment
        tile = tuple(2 * n for n in alignment)
        if any(t >= w for t, w in zip(tile, self.spec.window, strict=True)):
            return None
        return LocalFn(Partial(_ApplyTile(network, tile), self.variables), tile, alignment)

    @property
    def parameter_count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    def taps(self) -> dict[str, tuple[int, ...]]:
        """Names of the taps, in order of computation, and their shapes `(*grid, features)` for one window."""
        order: list[str] = []  # JAX sorts the keys of a dict that it returns

        def tapped(variables: Variables, x: Array) -> dict[str, Array]:
            _, taps = self.network.apply(variables, x)
            order.extend(taps)
            return taps

        taps = jax.eval_shape(tapped, self.variables, _window(self.spec))
        return {name: taps[name].shape[1:] for name in order}

    def with_spec(self, **changes: Any) -> "Model":
        return replace(self, spec=replace(self.spec, **changes))


def build_network(spec: ModelSpec) -> nn.Module:
    """The Linen module of a spec. Raises ValueError for an unknown architecture or option."""
    if spec.architecture not in NETWORKS:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; known are {', '.join(NETWORKS)}")
    options = {k: _hashable(v) for k, v in spec.options.items()}
    try:
        return NETWORKS[spec.architecture](**options)
    except TypeError as error:
        raise ValueError(f"options of {spec.architecture}: {error}") from error


def expected_variables(spec: ModelSpec) -> Variables:
    """Shapes and dtypes of the network's variables, as a tree of `ShapeDtypeStruct`."""
    return jax.eval_shape(build_network(spec).init, jax.random.key(0), _window(spec))


def _window(spec: ModelSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *spec.window, len(spec.channels)), jnp.float32)


@dataclass(frozen=True)
class _Apply:
    """Hashable by its module, so that two `logits_fn` of one architecture share compiled programs."""

    network: nn.Module

    def __call__(self, variables: Variables, x: Array) -> Array:
        return self.network.apply(variables, x)[0]


@dataclass(frozen=True)
class _ApplyTapped:
    network: nn.Module

    def __call__(self, variables: Variables, x: Array, offsets: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        return self.network.apply(variables, x, offsets)


@dataclass(frozen=True)
class _ApplyTile:
    network: nn.Module
    tile: tuple[int, ...]

    def __call__(self, variables: Variables, x: Array, start: Array) -> Array:
        return self.network.apply(variables, x, tile=(start, self.tile))[0]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
