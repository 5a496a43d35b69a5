"""What a model is and what it takes, before anything is run: `xaiseg inspect`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr

from xaiseg._types import LogitsFn
from xaiseg.inference import logits_shape
from xaiseg.models import Model, build_network, expected_variables
from xaiseg.saliency.linearise import Linear, linearise_window, row_bytes
from xaiseg.saliency.targets import head

# What is worth a line of a plan; the rest is in model.json.
_PREPROCESSING = ("orientation", "transpose_forward", "spacing", "normalisation", "use_mask_for_norm")
# Normalisations that carry statistics of the whole window into every logit.
_GLOBAL_NORMS = ("instance", "instance_affine", "group")


@dataclass(frozen=True)
class Inspection:
    """Figures of one model. Operations count a multiplication and an addition as two.

    taps: name to `(*grid, features)` in one window.
    receptive_field: voxels along each axis that a logit near the window's centre depends on at most, through convolutions and
      attention, cut off at the window; whole_window: by normalisation it depends on the statistics of all others as well.
    forward_flops, row_flops: in one window, forward, and of one Jacobian row, which is a pull-back through the whole window.
    forward_bytes: temporaries of a forward pass. linearised_bytes: what is kept of a window while its rows are computed.
    row_bytes: temporaries and result of one row. All as XLA plans them on this machine, without the parameters.
    """

    taps: Mapping[str, tuple[int, ...]]
    receptive_field: tuple[int, ...]
    whole_window: bool
    forward_flops: int
    row_flops: int
    forward_bytes: int
    linearised_bytes: int
    row_bytes: int


def inspect(model: Model) -> Inspection:
    """Inspect a model for one window of its spec. Compiles it, which takes seconds to a minute."""
    spec = model.spec
    window = jax.ShapeDtypeStruct((*spec.window, len(spec.channels)), jnp.float32)
    batch = jax.ShapeDtypeStruct((1, *window.shape), jnp.float32)
    logits_fn = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.logits_fn)
    forward = jax.jit(lambda f, x: f(x))
    classes = logits_shape(logits_fn, batch).shape[-1]
    lesion = head("logit", spec.target_class, spec.output_activation, classes)
    linear = Linear(*linearise_window.lower(logits_fn, window, np.zeros(3, np.int32), spec.window, lesion).out_info)
    pull, logit = linear.pull, jax.ShapeDtypeStruct(linear.logits.shape, jnp.float32)
    return Inspection(
        taps=model.taps(),
        receptive_field=receptive_field(model),
        whole_window=str(spec.options.get("norm", "")).split(":")[0] in _GLOBAL_NORMS,
        forward_flops=flops(jax.make_jaxpr(lambda f, x: f(x))(logits_fn, batch)),
        row_flops=flops(jax.make_jaxpr(lambda p, ct: p(ct))(pull, logit)),
        forward_bytes=_temporaries(forward.lower(logits_fn, batch).compile()),
        linearised_bytes=int(sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(pull))),
        row_bytes=row_bytes(linear),
    )


def _temporaries(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Operations of the convolutions and matrix products of a program; nothing else weighs. Padding counts as voxels do."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
        out = math.prod(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * out * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            _, features, *spatial = numbers.rhs_spec
            taps = math.prod(shapes[1][i] for i in spatial) * shapes[1][features]
            # a dilated input is zeros but for one in so many
            total += 2 * out * taps // math.prod(params["lhs_dilation"])
        else:
            times = params.get("length", 1) if name == "scan" else 1
            total += times * sum(flops(inner) for inner in _inner(params))
    return total


def _inner(params: Mapping[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]


def receptive_field(model: Model) -> tuple[int, ...]:
    """Voxels along each axis that the logit at the window's centre depends on, without normalisation over the grid.

    The extent of the gradient of the same network with positive random weights, through which no two paths cancel.
    """
    options = {**model.spec.options, **({"norm": "none"} if "norm" in model.spec.options else {})}
    spec = replace(model.spec, options=options, members=(), mirror_axes=())
    rng = np.random.default_rng(0)

    def positive(path: Any, leaf: Any) -> Array:
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        value = rng.uniform(0.5, 1.5, leaf.shape) / fan_in
        return jnp.asarray(value if path[-1].key != "bias" else 0 * value, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(positive, expected_variables(spec))
    x = jnp.asarray(rng.uniform(0.5, 1.5, (*spec.window, len(spec.channels))), jnp.float32)

    @jax.jit
    def gradient(logits_fn: LogitsFn, x: Array, voxel: Array) -> Array:
        return jax.grad(lambda x: logits_fn(x[None])[0, ..., spec.target_class][tuple(voxel)])(x)

    # The reach depends on where a voxel lies between the strides: the first and the last place are the extremes.
    step = np.array([getattr(build_network(spec), "tile_alignment", (1,) * len(spec.window))]).max()
    block = np.array(spec.window) // 2 // step * step
    extents = []
    for voxel in (block, np.minimum(block + step - 1, np.array(spec.window) - 1)):
        places = np.argwhere(np.asarray(gradient(Model(spec, variables).logits_fn, x, voxel)).any(-1))
        extents.append(places.max(0) - places.min(0) + 1)
    return tuple(np.max(extents, axis=0).tolist())


def summary(model: Model) -> dict[str, str]:
    """What the spec says, by name, in words: what is known without compiling anything."""
    spec = model.spec
    members = f", mean of {len(spec.members)} ({', '.join(spec.members)})" if spec.members else ""
    mirrored = f", mirrored along axes {_plain(spec.mirror_axes)}" if spec.mirror_axes else ""
    decision = f"threshold {spec.threshold}" if spec.threshold is not None else "where it is the most probable"
    source = f"{spec.source} (SHA-256 {spec.source_sha256[:12]}…)" if spec.source_sha256 else spec.source
    size = _size(sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables)))
    facts = {
        "architecture": f"{spec.architecture}{members}{mirrored}",
        "options": ", ".join(f"{k} {_plain(v)}" for k, v in spec.options.items()),
        "parameters": f"{model.parameter_count:,}{' each' if spec.members else ''} ({size} in all)",
        "input": f"{', '.join(spec.channels)}; {spec.normalisation}"
        + ("" if spec.preprocessing else f", orientation {spec.orientation}"),
        "preprocessing": ", ".join(
            f"{k} {_plain(spec.preprocessing[k])}" for k in _PREPROCESSING if spec.preprocessing
        ),
        "window": f"{_by(spec.window)}, overlap {spec.overlap}, {spec.tiling} tiling, {spec.blending} blending",
        "lesions": f"class {spec.target_class} after {spec.output_activation}, {decision}, connectivity {spec.connectivity}",
        "source": source,
        **{name: _plain(value) for name, value in spec.notes.items() if value},
    }
    return {name: value for name, value in facts.items() if value}


def describe(model: Model, found: Inspection) -> list[str]:
    """The summary and the inspection, as lines to print."""
    field = f"up to {_by(found.receptive_field)} voxels"
    if found.whole_window:
        field += ", and the rest of the window through the statistics of its normalisation"
    facts = {
        **summary(model),
        "receptive field": field,
        "compute": f"{_flops(found.forward_flops)} a window, {_flops(found.row_flops)} a Jacobian row",
        "memory": f"forward {_size(found.forward_bytes)}, kept of a window for its rows {_size(found.linearised_bytes)}, "
        f"a row {_size(found.row_bytes)} (planned by XLA for {jax.default_backend()})",
        "taps": f"{len(found.taps)} (grid of a window × features; * is the default of Grad-CAM++)",
    }
    width = max(map(len, found.taps))
    taps = [
        f"  {'*' if name == model.spec.default_layer else ' '} {name:{width}}  {_by(grid)} × {features}"
        for name, (*grid, features) in found.taps.items()
    ]
    return [*as_lines(facts), *taps]


def as_lines(facts: Mapping[str, str]) -> list[str]:
    return [f"{name:17}{value}" for name, value in facts.items()]


def _by(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple) and any(isinstance(v, str) and " " in v for v in value):
        return "; ".join(map(str, value))
    if isinstance(value, list | tuple):
        return " ".join(f"({_plain(v)})" if isinstance(v, list | tuple | Mapping) else str(v) for v in value)
    return str(value)


def _size(count: int) -> str:
    return f"{count / 2**20:.3g} MiB" if count < 2**30 else f"{count / 2**30:.3g} GiB"


def _flops(count: int) -> str:
    return f"{count / 1e9:.3g} GFLOP"
