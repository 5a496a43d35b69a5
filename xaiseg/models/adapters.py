"""Your own network as a `LogitsFn`: a plain function, a module of Linen, NNX or Equinox, a 2-D network slice by slice.

Each adapter returns a `jax.tree_util.Partial` whose leaves are the parameters and whose function compares by what the network is:
parameters are arguments of compiled programs, and two parameter sets of one architecture share them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.tree_util import Partial

from xaiseg._types import LogitsFn, TappedFn
from xaiseg.models.taps import Taps

Output = Callable[[Any], Array] | int | str | None
"""Where the logits are in what a network returns: a function of it, an index or a key; None where it is the logits."""


def from_function(
    function: Callable[..., Any], params: Any = None, *, output: Output = None, channels_first: bool = False
) -> LogitsFn:
    """A pure function `(params, x)`, or `(x)` without `params`, from `(N, *window, C)` to `(N, *window, classes)`.

        logits_fn = from_function(lambda params, x: x @ params["weight"] + params["bias"], params)

    params: a pytree of arrays. channels_first: the function takes `(N, C, *window)` and returns `(N, classes, *window)`.
    Two adapters share compiled programs if they are made from the same function object.
    Raises ValueError, once applied, if the result is not logits of the window's grid; so do all adapters here.
    """
    network = _partial(function)
    if params is not None:
        network = Partial(_call, network, params)
    return Partial(_Adapted(output, channels_first), network)


def from_linen(
    module: nn.Module, variables: Any, *, output: Output = None, channels_first: bool = False, **call_kwargs: Any
) -> LogitsFn:
    """A Flax Linen module: `module.apply(variables, x, **call_kwargs)`.

        logits_fn = from_linen(net, {"params": params, "batch_stats": stats}, train=False)

    Nothing is mutable, so batch norm must be told to use its running averages, by a field of the module or in the call.
    """
    network = Partial(_ApplyLinen(_Static(module), _Static(call_kwargs)), variables)
    return Partial(_Adapted(output, channels_first), network)


def from_nnx(
    module: nnx.Module, *, output: Output = None, channels_first: bool = False, **call_kwargs: Any
) -> LogitsFn:
    """A Flax NNX module, `module(x, **call_kwargs)`, as it is now and as after `module.eval()`; the module itself is not touched.

        logits_fn = from_nnx(net)

    Later training of `module` does not show. Whatever the module draws at random in spite of `eval`, it draws alike in each call.
    """
    copy = nnx.clone(module)
    copy.eval()
    graphdef, state = nnx.split(copy)
    state = jax.tree.map(jnp.copy, state)  # a training step may donate the module's own
    network = Partial(_ApplyNNX(_Static(graphdef), _Static(call_kwargs)), state)
    return Partial(_Adapted(output, channels_first), network)


def from_equinox(
    module: Any,
    state: Any = None,
    *,
    output: Output = None,
    channels_first: bool = True,
    batched: bool = False,
    **call_kwargs: Any,
) -> LogitsFn:
    """An Equinox module in inference mode, by Equinox's convention from one array `(C, *window)` to `(classes, *window)`.

        logits_fn = from_equinox(net)
        logits_fn = from_equinox(net, state)  # net, state = eqx.nn.make_with_state(Net)(key)

    state: that of batch norm; the module is then called as `module(x, state, **call_kwargs)` and returns `(output, state)`.
    channels_first, batched: False and True for a module that takes `(*window, C)` or has an axis for the batch.
    Raises ImportError without equinox.
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError("from_equinox needs equinox: pip install equinox") from error
    arrays, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_array)
    network = Partial(_ApplyEquinox(_Static(static), _Static(call_kwargs)), arrays, state)
    return Partial(_Adapted(output, channels_first, batched), network)


def tapped_from_linen(
    module: nn.Module,
    variables: Any,
    layers: Sequence[str],
    *,
    output: Output = None,
    channels_first: bool = False,
    **call_kwargs: Any,
) -> TappedFn:
    """The same network as `from_linen(...)` with the outputs of submodules as taps, for Grad-CAM++; the module stays as it is.

        tapped_fn = tapped_from_linen(net, variables, ["decoder.Conv_0"], train=False)
        predictor = StitchedPredictor(from_linen(net, variables, train=False), window, tapped_fn=tapped_fn)
        explain = gradcam_pp(layer="decoder.Conv_0")

    layers: submodules by their path in `variables["params"]`, joined with dots, each called once and not within `nn.remat`,
    `nn.scan` or `nn.vmap`; their outputs are arrays `(N, *grid, K)`, or `(N, K, *grid)` with `channels_first`.
    A module `(x, offsets) -> (logits, taps)` needs no adapter: `tapped_fn=jax.tree_util.Partial(module.apply, variables)` beside
    `from_linen(module, variables, output=0)`. `xaiseg.models.taps.Taps` writes such networks, in any library.
    Raises ValueError, once applied, for a layer that is not called exactly once or returns no array.
    """
    logits_fn = from_linen(module, variables, output=output, channels_first=channels_first, **call_kwargs)
    return Partial(_TapLinen(tuple(layers), channels_first), logits_fn)


def slicewise(logits_fn: LogitsFn, axis: int = 2) -> LogitsFn:
    """A 2-D network `(N, a, b, C) -> (N, a, b, classes)` as one of volumes, for windows with side 1 along `axis` (0, 1 or 2).

        predictor = StitchedPredictor(slicewise(logits_fn), window=(96, 96, 1))

    Volumes are then explained slice by slice, and a 2-D image is a volume `(X, Y, 1, C)`.
    Raises ValueError, once applied, for a window with another side along `axis`.
    """
    return Partial(_Slicewise(axis), _partial(logits_fn))


def slicewise_tapped(tapped_fn: TappedFn, axis: int = 2) -> TappedFn:
    """`slicewise` for a network with taps: those with a grid, `(N, a', b', K)`, get the axis back; others are left out."""
    return Partial(_SlicewiseTapped(axis), _partial(tapped_fn))


def check_logits_fn(logits_fn: LogitsFn, window: Sequence[int], channels: int) -> int:
    """The number of classes of a network, from shapes alone.

    Raises ValueError if it does not return logits of the window's grid.
    """
    x = jax.ShapeDtypeStruct((1, *window, channels), jnp.float32)
    logits = jax.eval_shape(logits_fn, x)
    _check(logits, x.shape)
    return logits.shape[-1]


@dataclass(frozen=True, eq=False)
class _Static:
    """What a network is besides its arrays. Hashable though it may hold lists, as modules' fields often do."""

    value: Any

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        try:
            return self.value is other.value or bool(self.value == other.value)
        except (TypeError, ValueError):  # arrays among the fields have no truth value
            return False


@dataclass(frozen=True)
class _Adapted:
    """A network brought to the project's layout, its output checked when it is traced."""

    output: Output
    channels_first: bool
    batched: bool = True

    def __call__(self, network: Partial, x: Array) -> Array:
        def logits_of(window: Array) -> Any:
            found = network(window)
            if self.output is None:
                return found
            return self.output(found) if callable(self.output) else found[self.output]

        given = jnp.moveaxis(x, -1, 1) if self.channels_first else x
        logits = logits_of(given) if self.batched else jax.vmap(logits_of)(given)
        _check(logits, given.shape, self.channels_first)
        if self.channels_first:
            logits = jnp.moveaxis(logits, 1, -1)
        return logits.astype(x.dtype)  # a network may compute in bfloat16


def _check(logits: Any, given: tuple[int, ...], channels_first: bool = False) -> None:
    """`given`: the shape of the windows as the network got them."""
    if not isinstance(logits, Array | jax.ShapeDtypeStruct):
        raise ValueError(
            f"the network returns a {type(logits).__name__}; expected an array of logits: choose them, as in output=0"
        )
    sides, layout = (
        (slice(2, None), "(N, classes, *window)") if channels_first else (slice(1, -1), "(N, *window, classes)")
    )
    found, n = logits.shape, given[0]
    if len(found) != len(given) or (found[0], *found[sides]) != (n, *given[sides]):
        sizes = ", ".join(map(str, given[sides]))
        expected = f"({n}, classes, {sizes})" if channels_first else f"({n}, {sizes}, classes)"
        raise ValueError(f"the network returns {found} for windows {given}; expected logits {layout}, here {expected}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"the network returns {logits.dtype}; expected logits, floating-point numbers before any argmax"
        )


@dataclass(frozen=True)
class _ApplyLinen:
    module: _Static
    arguments: _Static

    def __call__(self, variables: Any, x: Array) -> Any:
        return self.module.value.apply(variables, x, **self.arguments.value)


@dataclass(frozen=True)
class _ApplyNNX:
    graphdef: _Static
    arguments: _Static

    def __call__(self, state: Any, x: Array) -> Any:
        return nnx.merge(self.graphdef.value, state, copy=True)(x, **self.arguments.value)


@dataclass(frozen=True)
class _ApplyEquinox:
    static: _Static
    arguments: _Static

    def __call__(self, arrays: Any, state: Any, x: Array) -> Any:
        import equinox as eqx

        module = eqx.combine(arrays, self.static.value)
        if state is None:
            return module(x, **self.arguments.value)
        used = jax.tree.map(lambda a: a, state)  # a layer that sets its state makes the old one invalid
        return module(x, used, **self.arguments.value)[0]


@dataclass(frozen=True)
class _TapLinen:
    layers: tuple[str, ...]
    channels_first: bool

    def __call__(self, logits_fn: Partial, x: Array, offsets: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        taps, called = Taps(offsets), []

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            value, name = call(*args, **kwargs), ".".join(context.module.path)
            if context.method_name != "__call__" or not name:
                return value
            called.append(name)
            if name not in self.layers:
                return value
            if not isinstance(value, Array):
                raise ValueError(
                    f"layer {name!r} returns a {type(value).__name__}; expected an array: tap a layer inside it"
                )
            if self.channels_first:
                return jnp.moveaxis(taps(name, jnp.moveaxis(value, 1, -1)), -1, 1)
            return taps(name, value)

        with nn.intercept_methods(intercept):
            logits = logits_fn(x)
        for layer in self.layers:
            if called.count(layer) != 1:
                known = ", ".join(dict.fromkeys(called))
                raise ValueError(
                    f"layer {layer!r} is called {called.count(layer)} times; expected once. Called are {known}"
                )
        return logits, taps.values


@dataclass(frozen=True)
class _Slicewise:
    axis: int

    def __call__(self, network: Partial, x: Array) -> Array:
        return self.expand(network(self.squeeze(x)))

    def squeeze(self, x: Array) -> Array:
        if x.ndim != 5 or self.axis not in (0, 1, 2) or x.shape[1 + self.axis] != 1:
            raise ValueError(
                f"windows {x.shape}; expected (N, x, y, z, C) with side 1 along axis {self.axis} of x, y, z"
            )
        return x.squeeze(1 + self.axis)

    def expand(self, y: Array) -> Array:
        return jnp.expand_dims(y, 1 + self.axis)


@dataclass(frozen=True)
class _SlicewiseTapped(_Slicewise):
    def __call__(self, network: Partial, x: Array, offsets: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:  # type: ignore[override]
        logits, taps = network(self.squeeze(x), {name: self.squeeze(value) for name, value in offsets.items()})
        return self.expand(logits), {name: self.expand(value) for name, value in taps.items() if value.ndim == 4}


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _partial(function: Callable[..., Any]) -> Partial:
    """A Partial keeps its leaves: as the function of another one they would become constants."""
    return function if isinstance(function, Partial) else Partial(function)
