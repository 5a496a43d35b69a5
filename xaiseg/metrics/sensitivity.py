"""Infidelity, faithfulness correlation and max-sensitivity: does a map foretell what a change of the image does to the score, and
does it stay when the image hardly changes?"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from xaiseg._types import Explainer, Instance, SaliencyMap
from xaiseg.inference import StitchedPredictor
from xaiseg.metrics.instance_score import generator, instance_scores, place_of
from xaiseg.metrics.similarity import pearson
from xaiseg.saliency.baselines import Baseline, reference_image, zero
from xaiseg.saliency.noise import noise_sigma
from xaiseg.saliency.patches import per_axis


class Infidelity(NamedTuple):
    """value: `E[(β·IᵀM - d)²]`, in squared logits. beta: the `β` that makes it smallest; 0 for a map that is orthogonal to all
    `I`. relative: `value / E[d²]`, 0 where the map foretells every change and 1 where it foretells none; NaN where nothing
    changes."""

    value: float
    beta: float
    relative: float


class FaithfulnessCorrelation(NamedTuple):
    """Pearson's r of the change of the score with `Σ_T M`, and with `Σ_T M ⊙ (x - x')`; NaN where either does not vary."""

    of_map: float
    of_attribution: float


def infidelity(
    key: Array,
    predictor: StitchedPredictor,
    image: Array,
    instance: Instance,
    maps: Sequence[SaliencyMap],
    *,
    samples: int = 50,
    noise: float = 0.05,
    reference_channel: int = 0,
    chunk: int | None = None,
) -> list[Infidelity]:
    """`E_I[(β·IᵀM - d)²]` with `d = S_i(x) - S_i(x - I)` and `β = E[IᵀM·d] / E[(IᵀM)²]` (Yeh et al., NeurIPS 2019).

    `I ~ N(0, σ²)` for each voxel and channel, `σ = noise · (max - min)` of the reference channel, as in `noisy`; sample `n` is
    drawn from `fold_in(key, n)`, the same for every map and lesion. maps: of one instance, by different explainers; they share
    the passes. β removes the scale of a map, and with it that of the target. Fitted to the samples, it leaves `1 - 1/samples` of
    `E[d²]` on average where a map has nothing to do with the score. chunk: see `instance_scores`.
    Raises ValueError for arguments out of range.
    """
    if samples < 1 or not noise > 0:
        raise ValueError(f"samples must be at least 1 and noise above 0, not {samples} and {noise}")
    sigma = noise_sigma(image, noise, reference_channel)
    placed = [place_of(m, image.shape) for m in maps]
    products = np.zeros((len(maps), samples))

    def images() -> Iterator[Array]:
        yield image
        for n in range(samples):
            change = sigma.astype(image.dtype) * jax.random.normal(jax.random.fold_in(key, n), image.shape, image.dtype)
            drawn = np.asarray(change, np.float64)
            products[:, n] = [np.sum(drawn[where] * values) for where, values in placed]
            yield image - change

    scores = instance_scores(predictor, images(), instance, chunk=chunk)
    change = scores[0] - scores[1:]
    return [_infidelity(product, change) for product in products]


def faithfulness_correlation(
    key: Array,
    predictor: StitchedPredictor,
    image: Array,
    instance: Instance,
    maps: Sequence[SaliencyMap],
    *,
    baseline: Baseline | None = None,
    region: np.ndarray | None = None,
    samples: int = 100,
    fraction: float = 0.1,
    patch: int | Sequence[int] = 1,
    chunk: int | None = None,
) -> list[FaithfulnessCorrelation]:
    """Pearson's r over random subsets `T` of `Σ_T M` with `S_i(x) - S_i(x with T at the baseline)` (Bhatt et al., IJCAI 2020).

    Also of `M ⊙ (x - x')`, since a gradient is not an attribution. A subset is `fraction` of all patches that touch the region,
    whole voxels, rounded to one at least. Single voxels change the score of a large network by little more than its rounding:
    then choose patches of some voxels.

    maps: of one instance, by different explainers; they share the passes. baseline: gives `x'`, `zero()` by default. region: mask
    `(X, Y, Z)` that is drawn from, by default the whole volume. patch: sides in voxels. chunk: see `instance_scores`.
    Raises ValueError for arguments out of range or an empty region.
    """
    if samples < 2 or not 0 < fraction < 1:
        raise ValueError(f"samples must be at least 2 and fraction between 0 and 1, not {samples} and {fraction}")
    within = np.ones(image.shape[:3], bool) if region is None else np.asarray(region) != 0
    if within.shape != image.shape[:3] or not within.any():
        raise ValueError(f"the region {within.shape} is empty, or not of the volume's shape {image.shape[:3]}")
    sides = per_axis("patch", patch)
    numbers = _patch_numbers(image.shape[:3], sides)
    numbers[within] = np.unique(numbers[within], return_inverse=True)[1].reshape(-1)
    patches = int(numbers[within].max()) + 1
    size = max(1, round(fraction * patches))
    reference = reference_image(baseline or zero(), image)
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    placed = [
        (where, values.sum(-1), (values * difference[where]).sum(-1))
        for where, values in (place_of(m, image.shape) for m in maps)
    ]
    sums = np.zeros((len(maps), 2, samples))

    def images() -> Iterator[Array]:
        yield image
        for n in range(samples):
            chosen = np.zeros(patches, bool)
            chosen[generator(key, n).permutation(patches)[:size]] = True
            subset = within & chosen[np.where(within, numbers, 0)]
            sums[:, :, n] = [[v[subset[where[:3]]].sum() for v in both] for where, *both in placed]
            yield jnp.where(subset[..., None], reference, image)

    scores = instance_scores(predictor, images(), instance, chunk=chunk)
    change = scores[0] - scores[1:]
    return [FaithfulnessCorrelation(pearson(pair[0], change), pearson(pair[1], change)) for pair in sums]


def max_sensitivity(
    key: Array,
    explainer: Explainer,
    predictor: StitchedPredictor,
    image: Array,
    instances: Sequence[Instance],
    *,
    samples: int = 10,
    radius: float = 0.01,
    reference_channel: int = 0,
) -> np.ndarray:
    """`max_{‖δ‖∞ ≤ r} ‖M(x + δ) - M(x)‖₂ / ‖M(x)‖₂` over random `δ`, for each instance, `(n,)` (Yeh et al., NeurIPS 2019).

    `δ` is uniform for each voxel and channel, `r = radius · (max - min)` of the reference channel. Both maps are explained with
    the same key, so that a method that draws noise is not blamed for it: `key, δ_key = split(key)`. Sample `n` is from
    `fold_in(δ_key, n)`. Instances are those of the clean image throughout. NaN where `M(x)` is zero everywhere.
    Raises ValueError for arguments out of range.
    """
    if samples < 1 or not radius > 0:
        raise ValueError(f"samples must be at least 1 and radius above 0, not {samples} and {radius}")
    key, drawn = jax.random.split(key)
    bound = noise_sigma(image, radius, reference_channel).astype(image.dtype)
    clean, _ = explainer(key, predictor, image, instances)
    before = [np.asarray(m.values, np.float64) for m in clean]
    norms = np.array([np.linalg.norm(values) for values in before])
    largest = np.zeros(len(instances))
    for n in range(samples):
        change = bound * jax.random.uniform(jax.random.fold_in(drawn, n), image.shape, image.dtype, -1.0, 1.0)
        moved, _ = explainer(key, predictor, image + change, instances)
        for i, (old, new) in enumerate(zip(clean, moved, strict=True)):
            if (old.start, old.values.shape) != (new.start, new.values.shape):
                raise ValueError(
                    f"maps of instance {instances[i].label} are of different crops, so they do not compare"
                )
            # not fmax, which would hide a map that is not a number
            largest[i] = np.maximum(largest[i], np.linalg.norm(np.asarray(new.values, np.float64) - before[i]))
    return np.divide(largest, norms, out=np.full(len(instances), np.nan), where=norms > 0)


def _infidelity(product: np.ndarray, change: np.ndarray) -> Infidelity:
    power = float((product**2).mean())
    beta = float((product * change).mean()) / power if power != 0 else 0.0
    value, whole = float(((beta * product - change) ** 2).mean()), float((change**2).mean())
    return Infidelity(value, beta, value / whole if whole > 0 else np.nan)


def _patch_numbers(shape: Sequence[int], sides: Sequence[int]) -> np.ndarray:
    """The number of each voxel's patch, on a grid that begins at the volume's first voxel."""
    counts = [-(-n // s) for n, s in zip(shape, sides, strict=True)]
    axes = np.ix_(*(np.arange(n) // s for n, s in zip(shape, sides, strict=True)))
    return np.ravel_multi_index(np.broadcast_arrays(*axes), counts)
