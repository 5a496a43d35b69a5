"""Parameter randomisation (Adebayo et al., NeurIPS 2018): a map that outlives what the network learnt does not explain it.

The cascade randomises layers from the last to the first. Beside the plain test (MPRT) are its noise-averaged form (sMPRT), which
is the same test of `noisy(explainer)`, and the entropy-based one (eMPRT), both of Hedström et al. 2024.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from xaiseg._types import Explainer, Instance, SaliencyMap
from xaiseg.inference import StitchedPredictor
from xaiseg.metrics.similarity import histogram_entropy, spearman, ssim
from xaiseg.models import Model, ModelSpec, build_network
from xaiseg.models.model import slice_axis
from xaiseg.saliency.noise import noisy

Path = tuple[str, ...]


class Layer(NamedTuple):
    """A module with a kernel, and what follows it before the next one: its norm, with statistics, and activation.

    name: of the module with the kernel. paths: of its variables, each with its collection first.
    """

    name: str
    paths: tuple[Path, ...]


class Randomisation(NamedTuple):
    """What is left of a map, for each step of the cascade and each instance; NaN where a map is zero, constant or not finite.

    Maps are compared where either of them is not zero: what neither network sees is no likeness.

    layers: `(k,)`, the last layer that each step randomised; all behind it are random too.
    spearman: `(k, n)`, ρ of `|M|` with `|M_l|`. signed: `(k, n)`, ρ of `M` with `M_l`. Sizes fall off with the distance from the
      lesion in any network, which leaves some ρ; signs do not.
    ssim: `(k, n)`, of both `|M|` divided by their maxima: high for two peaked maps, which are both close to zero nearly everywhere.
    complexity: `(n,)`, eMPRT: the rise of the entropy of `|M|` from the trained network to the fully random one, as a share of
      the first.
    """

    layers: tuple[str, ...]
    spearman: np.ndarray
    signed: np.ndarray
    ssim: np.ndarray
    complexity: np.ndarray


def network_layers(spec: ModelSpec) -> list[Layer]:
    """The layers of a model's network in the order of computation, from the first to the last."""
    order: list[Path] = []

    def note(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            order.append(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        # a function of its own: a trace that JAX remembers would call nothing
        network, grid = build_network(spec), jnp.zeros(_grid(spec))
        shapes = jax.eval_shape(lambda key: network.init(key, grid), jax.random.key(0))
    variables: dict[Path, list[Path]] = {}
    for path in flatten_dict(shapes):
        variables.setdefault(path[1:-1], []).append(path)
    owners = [owner for owner in dict.fromkeys(order) if owner in variables]
    groups: list[list[Path]] = []
    for owner in owners:
        if not groups or (_has_kernel(variables[owner]) and any(_has_kernel(variables[o]) for o in groups[-1])):
            groups.append([])
        groups[-1].append(owner)
    return [
        Layer(
            "/".join(next((o for o in group if _has_kernel(variables[o])), group[0])),
            tuple(path for owner in group for path in sorted(variables[owner])),
        )
        for group in groups
    ]


def cascade(key: Array, model: Model, *, steps: int | None = None) -> Iterator[tuple[str, Model]]:
    """The model with its last layer randomised, then its last two, down to all of them; each with the name of the latest.

    A layer takes the values of a freshly initialised network, its norms' parameters and statistics too. Each layer, and each
    member of an ensemble, draws from a key of its own, and keeps what it drew. steps: about so many steps, of several layers
    each, where there are more layers. Raises ValueError for fewer than one step.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    layers = list(enumerate(network_layers(model.spec)))[::-1]
    network, grid = build_network(model.spec), _grid(model.spec)
    members = model.spec.members or (None,)
    held = [dict(flatten_dict(model.variables[m] if m is not None else model.variables)) for m in members]
    for group in np.array_split(np.arange(len(layers)), min(steps or len(layers), len(layers))):
        for number, layer in (layers[i] for i in group):
            for m, variables in enumerate(held):
                fresh = flatten_dict(_init(network, grid, jax.random.fold_in(jax.random.fold_in(key, number), m)))
                variables.update((path, np.asarray(fresh[path])) for path in layer.paths)
        trees = [unflatten_dict(variables) for variables in held]
        changed = dict(zip(model.spec.members, trees, strict=True)) if model.spec.members else trees[0]
        yield layers[group[-1]][1].name, replace(model, variables=changed)


def parameter_randomisation(
    key: Array,
    explainer: Explainer,
    model: Model,
    image: Array,
    instances: Sequence[Instance],
    *,
    steps: int | None = None,
    margin: int | None = None,
    bins: int = 100,
    predictor_of: Callable[[Model], StitchedPredictor] = StitchedPredictor.of,
) -> Randomisation:
    """Explain the instances of the trained network, Ω fixed, while more and more of its layers are random; see `cascade`.

    `weights_key, key = split(key)`; all explanations have the same key. margin: compare so many voxels around the bounding box of
    each instance; by default all that its map covers. Far from the lesion maps of any network are close to zero and fall off with
    distance, and so agree. bins: of the entropy's histogram. predictor_of: how a model is applied.
    """
    weights_key, key = jax.random.split(key)

    def explained(model: Model) -> list[np.ndarray]:
        maps, _ = explainer(key, predictor_of(model), image, instances)
        return [_around(m, i, margin) for m, i in zip(maps, instances, strict=True)]

    clean = explained(model)
    layers, left = [], []
    for name, changed in cascade(weights_key, model, steps=steps):
        layers.append(name)
        left.append([_compared(a, b, bins) for a, b in zip(clean, explained(changed), strict=True)])
    measures = np.reshape(left, (len(layers), len(instances), 4))
    rank, signed, structure, complexity = np.moveaxis(measures, -1, 0)
    return Randomisation(tuple(layers), rank, signed, structure, complexity[-1])


def smooth_parameter_randomisation(
    key: Array,
    explainer: Explainer,
    model: Model,
    image: Array,
    instances: Sequence[Instance],
    *,
    samples: int = 20,
    noise: float = 0.05,
    **options: Any,
) -> Randomisation:
    """sMPRT: the same of maps averaged over noisy images, see `noisy`, so that shattered gradients do not pass for forgetting.

    options: of `parameter_randomisation`.
    """
    averaged = noisy(explainer, samples=samples, noise=noise)
    return parameter_randomisation(key, averaged, model, image, instances, **options)


def complexity_rise(trained: np.ndarray, random: np.ndarray, bins: int = 100) -> float:
    """eMPRT: `(H(random) - H(trained)) / H(trained)`, `H` the entropy of a map's histogram; NaN where `H(trained)` is zero."""
    before = histogram_entropy(trained, bins)
    return (histogram_entropy(random, bins) - before) / before if before > 0 else np.nan


def _grid(spec: ModelSpec) -> tuple[int, ...]:
    """What the network itself is given: a window, or a slice of it, with its channels."""
    axis = slice_axis(spec)
    return (1, *(n for i, n in enumerate(spec.window) if i != axis), len(spec.channels))


# Of hashable arguments, so that it is compiled once for a network, whatever tests are made of it. It runs once a layer: to optimise
# it for speed, as compilers do, takes ten times as long as all that it does.
@partial(
    jax.jit,
    static_argnums=(0, 1),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
def _init(network: nn.Module, grid: tuple[int, ...], key: Array) -> Mapping[str, Any]:
    return network.init(key, jnp.zeros(grid))


def _has_kernel(paths: Sequence[Path]) -> bool:
    return any(path[-1] == "kernel" for path in paths)


def _around(saliency: SaliencyMap, instance: Instance, margin: int | None) -> np.ndarray:
    """The map where it is compared, `(x, y, z, C)`: at most its crop."""
    values = np.asarray(saliency.values, np.float64)
    if margin is None:
        return values
    low, high = instance.voxels.min(0) - margin - saliency.start, instance.voxels.max(0) + margin + 1 - saliency.start
    return values[tuple(map(slice, np.maximum(low, 0).tolist(), np.maximum(high, 0).tolist()))]


def _compared(trained: np.ndarray, random: np.ndarray, bins: int) -> tuple[float, float, float, float]:
    """What `Randomisation` holds of two maps of one crop."""
    either = (trained != 0) | (random != 0)
    a, b = np.abs(trained), np.abs(random)
    if not (a.any() and b.any()):
        return (np.nan,) * 4
    # each map as a share of its largest value; a channel that is zero in both has nothing to compare
    channels = [c for c in range(a.shape[-1]) if either[..., c].any()]
    x, y = a / a.max(), b / b.max()
    alike = [ssim(x[..., c], y[..., c], data_range=1.0, mask=either[..., c]) for c in channels]
    return (
        spearman(a[either], b[either]),
        spearman(trained[either], random[either]),
        float(np.mean(alike)),
        complexity_rise(a[either], b[either], bins),
    )
