"""What every explainer keeps: the signature, purity, shapes and dtypes, instances that do not know of each other, and results that
do not depend on how the work was cut: by chunks, by devices, or by stopping in between."""

import inspect
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from xaiseg._types import Explainer, Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor, device_mesh
from xaiseg.saliency import (
    AGGREGATORS,
    expected_gradients,
    gradcam,
    gradcam_pp,
    guided_backprop,
    hirescam,
    input_gradient,
    integrated_gradients,
    jacobian_rows,
    layercam,
    merge_samples,
    noisy,
    occlusion,
    seg_gradcam,
    signed_max,
    smooth_integrated_gradients,
    smoothgrad,
    times_input,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (18, 20, 17, 2))
OTHER = jax.random.normal(jax.random.key(2), (18, 20, 17, 2))
INSTANCES = [
    Instance(3, np.array([[0, 0, 0], [0, 0, 1]], np.int32)),
    Instance(5, np.array([[8, 8, 8], [8, 9, 8], [9, 9, 8]], np.int32)),
    Instance(9, np.array([[17, 19, 16]], np.int32)),
]
LAYER = "decoder1.conv"


def explainers(chunk):
    """Every explainer, small, with the channels of its maps."""
    rows = {f"rows, {name}": (jacobian_rows(make(), chunk=chunk), 2) for name, make in AGGREGATORS.items()}
    cams = {
        "grad-cam": (gradcam(layer=LAYER), 1),
        "grad-cam of the class": (gradcam(layer=LAYER, region="class"), 1),
        "seg-grad-cam": (seg_gradcam(layer=LAYER), 1),
        "hirescam at two taps": (hirescam(layer=(LAYER, "bottleneck")), 2),
        "layercam": (layercam(layer=LAYER), 1),
        "grad-cam++": (gradcam_pp(layer=LAYER), 1),
        "grad-cam++ of the probability": (gradcam_pp(layer=LAYER, target="probability", form="pooled"), 1),
        "noisy grad-cam++": (noisy(gradcam_pp(layer=LAYER), samples=2, noise=0.05), 1),
    }
    return {
        **rows,
        "rows of the probability": (jacobian_rows(signed_max(), target="probability", chunk=chunk), 2),
        "input gradient": (input_gradient(chunk=chunk), 2),
        "input × gradient": (times_input(jacobian_rows(signed_max(), chunk=chunk)), 2),
        "smoothgrad, signed_max": (smoothgrad(samples=2, chunk=chunk), 2),
        "smoothgrad, mean": (smoothgrad(samples=2, aggregate="mean", chunk=chunk), 2),
        "smoothgrad to a tolerance": (smoothgrad(samples=4, tolerance=0.3, chunk=chunk), 2),
        "smoothgrad²": (noisy(jacobian_rows(signed_max(), chunk=chunk), samples=2, noise=0.05, statistic="squared"), 2),
        "vargrad": (noisy(input_gradient(chunk=chunk), samples=2, noise=0.05, statistic="variance"), 2),
        "integrated gradients": (integrated_gradients(input_gradient(chunk=chunk), steps=2), 2),
        "smooth integrated gradients": (smooth_integrated_gradients(samples=2, steps=2), 2),
        "expected gradients": (expected_gradients(input_gradient(chunk=chunk), references=[OTHER], samples=2), 2),
        "guided backpropagation": (guided_backprop(jacobian_rows(signed_max(), chunk=chunk)), 2),
        "occlusion": (occlusion(patch=6, margin=2, chunk=chunk), 2),
        **cams,
    }


EXPLAINERS = explainers(chunk=4)
# A second device, and another chunk, are programs to compile anew: beside these few, only where slow tests run.
ALWAYS = ("rows, signed_max", "input gradient", "smoothgrad, signed_max", "integrated gradients", "grad-cam++")
SOMETIMES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in EXPLAINERS]


@pytest.fixture(scope="module")
def predictor():
    """Of windows, not of tiles, so that all explainers share one set of compiled programs."""
    return StitchedPredictor.of(convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16)))


@pytest.fixture(scope="module")
def results(predictor):
    """What each explainer gives, computed once."""
    found: dict = {}

    def of(name):
        if name not in found:
            found[name] = EXPLAINERS[name][0](KEY, predictor, IMAGE, INSTANCES)
        return found[name]

    return of


def equal(a, b, tolerance=0.0):
    """Maps at the same place; `tolerance` is a fraction of the largest value."""
    assert a.start == b.start
    for x, y in ((a.values, b.values), (a.standard_error, b.standard_error)):
        if x is None:
            assert y is None
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(np.asarray(y)).max()))


@pytest.mark.parametrize("name", EXPLAINERS)
def test_the_signature_is_the_protocols(name):
    wanted = list(inspect.signature(Explainer.__call__).parameters.values())[1:]
    found = list(inspect.signature(EXPLAINERS[name][0]).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


@pytest.mark.parametrize("name", EXPLAINERS)
def test_maps_and_infos_are_in_order_with_shapes_that_fit(name, results):
    maps, infos = results(name)
    assert len(maps) == len(infos) == len(INSTANCES)
    for found, info, instance in zip(maps, infos, INSTANCES, strict=True):
        assert isinstance(found.values, jax.Array)
        assert found.values.dtype == np.float32
        assert found.values.shape[3:] == (EXPLAINERS[name][1],)
        end = np.array(found.start) + found.values.shape[:3]
        assert (end <= IMAGE.shape[:3]).all()
        assert (np.array(found.start) >= 0).all()
        assert ((instance.voxels >= found.start) & (instance.voxels < end)).all()
        if found.standard_error is not None:
            assert found.standard_error.shape == found.values.shape
        assert info.rows >= info.windows >= 1
    # a class-activation map may be zero for one instance, not for all
    assert max(np.abs(found.values).max() for found in maps) > 0


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_second_call_gives_the_same_and_changes_nothing(name, results, predictor):
    """Also: progress tells of every pass."""
    seen: list[int] = []
    before, (first, first_infos) = np.array(IMAGE), results(name)
    second, second_infos = EXPLAINERS[name][0](KEY, predictor, IMAGE, INSTANCES, progress=seen.append)
    for a, b in zip(first, second, strict=True):
        equal(a, b)
    assert first_infos == second_infos
    np.testing.assert_array_equal(IMAGE, before)
    # a tolerance that is met early saves samples, of which every lesion still there takes its own
    assert sum(seen) == sum(info.rows * info.samples for info in second_infos)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_instances_together_are_instances_apart_in_any_order(name, results, predictor):
    """Also resumed: what is left is explained by an explainer that knows nothing of what was done before.

    Chunks hold rows of several instances, which share a program but no number: equal to the rounding of another batch.
    """
    together, infos = results(name)
    anew = explainers(chunk=4)[name][0]
    for number in (2, 0, 1):
        (alone,), (info,) = anew(KEY, predictor, IMAGE, [INSTANCES[number]])
        equal(alone, together[number], tolerance=1e-5)
        assert info._replace(course=None) == infos[number]._replace(course=None)


@pytest.mark.parametrize("name", SOMETIMES)
def test_chunks_of_one_give_the_same(name, results, predictor):
    """A product is added up in another order in another batch: float32 rounding, magnified where α is nearly undefined."""
    expected, infos = results(name)
    maps, found = explainers(chunk=1)[name][0](KEY, predictor, IMAGE, INSTANCES)
    for a, b in zip(maps, expected, strict=True):
        equal(a, b, tolerance=1e-5)
    assert [(i.rows, i.windows, i.samples) for i in found] == [(i.rows, i.windows, i.samples) for i in infos]


@pytest.mark.parametrize("name", SOMETIMES)
def test_two_devices_give_the_same(name, results, predictor):
    """Samples and steps on two devices, each of which does its own; sums are added up in the same order."""
    expected, infos = results(name)
    maps, found = EXPLAINERS[name][0](KEY, replace(predictor, mesh=device_mesh(2)), IMAGE, INSTANCES)
    for a, b in zip(maps, expected, strict=True):
        equal(a, b, tolerance=1e-6)
    assert [i._replace(course=None) for i in found] == [i._replace(course=None) for i in infos]


@pytest.mark.parametrize("name", ["rows, signed_max", "rows, mean", "rows, median", "smoothgrad, signed_max"])
def test_rows_over_two_devices_give_the_same(name, results, predictor):
    expected, _ = results(name)
    maps, _ = EXPLAINERS[name][0](KEY, replace(predictor, mesh=device_mesh(1, rows=2)), IMAGE, INSTANCES)
    for a, b in zip(maps, expected, strict=True):
        equal(a, b, tolerance=1e-5)


def test_samples_resumed_are_samples_in_one_go(predictor):
    base = jacobian_rows(signed_max(), chunk=4)
    whole = noisy(base, samples=5, noise=0.05)(KEY, predictor, IMAGE, INSTANCES)
    begun = noisy(base, samples=2, noise=0.05)(KEY, predictor, IMAGE, INSTANCES)
    rest = noisy(base, samples=3, noise=0.05, first=2)(KEY, predictor, IMAGE, INSTANCES)
    maps, infos = merge_samples(*begun, *rest)
    for a, b in zip(maps, whole[0], strict=True):
        equal(a, b, tolerance=1e-5)  # moments of five float32 numbers, added up in another order
    assert [i.samples for i in infos] == [5] * 3


@pytest.mark.parametrize("name", EXPLAINERS)
def test_no_instance_no_map(name, predictor):
    assert EXPLAINERS[name][0](KEY, predictor, IMAGE, []) == ([], [])


def sine(traces, x, offsets):
    """A network with a tap that counts how often it is traced."""
    traces.append(x.shape)
    tap = jnp.sin(x) + offsets.get(LAYER, 0.0) if LAYER in offsets else jnp.sin(x)
    both = jnp.tanh(tap) + jnp.roll(tap, 1, 1) * tap
    relu = jnp.maximum(both, 0.0)
    return relu, {LAYER: tap, "bottleneck": both}


@pytest.mark.parametrize("name", EXPLAINERS)
def test_one_trace_per_shape(name):
    """Other images of that shape and other lesions, of any size and place, need no network that was not traced for the first."""
    traces: list = []
    logits_fn = Partial(lambda x: sine(traces, x, {})[0])
    tapped_fn = Partial(lambda x, offsets: sine(traces, x, offsets))
    predictor = StitchedPredictor(logits_fn, (16, 16, 16), tapped_fn=tapped_fn)
    explain = EXPLAINERS[name][0]
    explain(KEY, predictor, IMAGE, INSTANCES)
    first = len(traces)
    explain(jax.random.key(5), predictor, OTHER, INSTANCES[::-1])
    more = Instance(4, np.argwhere(np.ones((2, 3, 2))).astype(np.int32) + 3)
    explain(KEY, predictor, OTHER, [more, INSTANCES[0]])
    assert len(traces) == first
