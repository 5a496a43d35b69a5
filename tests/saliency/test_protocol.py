"""What every explainer keeps: the signature, purity, shapes and dtypes, and instances that do not know of each other."""

import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

from xaiseg._types import Explainer, Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import gradcam_pp, jacobian_rows, mean, noisy_mean, signed_max, smoothgrad

FIXTURES = Path(__file__).parent.parent / "fixtures"
EXPLAINERS = {
    "rows, signed_max": (jacobian_rows(signed_max(), chunk=4), 2),
    "rows, mean": (jacobian_rows(mean()), 2),
    "smoothgrad, signed_max": (smoothgrad(samples=2, chunk=4), 2),
    "smoothgrad, mean": (smoothgrad(samples=2, aggregate="mean"), 2),
    "grad-cam++": (gradcam_pp(layer="decoder1.conv"), 1),
    "noisy grad-cam++": (noisy_mean(gradcam_pp(layer="decoder1.conv"), samples=2, noise=0.05), 1),
}
INSTANCES = [
    Instance(3, np.array([[0, 0, 0], [0, 0, 1]], np.int32)),
    Instance(5, np.array([[8, 8, 8], [8, 9, 8], [9, 9, 8]], np.int32)),
    Instance(9, np.array([[17, 19, 16]], np.int32)),
]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def predictor():
    return StitchedPredictor.of(convert(FIXTURES / "unet_batch.pth", window=(16, 16, 16)))


@pytest.fixture(scope="module")
def image():
    return jax.random.normal(jax.random.key(1), (18, 20, 17, 2))


@pytest.fixture(params=EXPLAINERS.values(), ids=EXPLAINERS.keys())
def explainer(request):
    return request.param


def equal(a, b):
    assert a.start == b.start
    np.testing.assert_array_equal(a.values, b.values)
    if a.standard_error is None:
        assert b.standard_error is None
    else:
        np.testing.assert_array_equal(a.standard_error, b.standard_error)


def test_the_signature_is_the_protocols(explainer):
    wanted = list(inspect.signature(Explainer.__call__).parameters.values())[1:]
    found = list(inspect.signature(explainer[0]).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


def test_maps_and_infos_are_in_order_with_shapes_that_fit(explainer, predictor, image):
    explain, channels = explainer
    maps, infos = explain(KEY, predictor, image, INSTANCES)
    assert len(maps) == len(infos) == len(INSTANCES)
    for found, info, instance in zip(maps, infos, INSTANCES, strict=True):
        assert isinstance(found.values, np.ndarray)
        assert found.values.dtype == np.float32
        assert found.values.shape[3:] == (channels,)
        end = np.array(found.start) + found.values.shape[:3]
        assert (end <= image.shape[:3]).all()
        assert (np.array(found.start) >= 0).all()
        assert ((instance.voxels >= found.start) & (instance.voxels < end)).all()
        if found.standard_error is not None:
            assert found.standard_error.shape == found.values.shape
        assert info.rows >= info.windows >= 1
    # a class-activation map may be zero for one instance, not for all
    assert max(np.abs(found.values).max() for found in maps) > 0


def test_a_second_call_gives_the_same_and_changes_nothing(explainer, predictor, image):
    explain, _ = explainer
    before = np.array(image)
    first, first_infos = explain(KEY, predictor, image, INSTANCES)
    kept = [m._replace(values=m.values.copy()) for m in first]
    second, second_infos = explain(KEY, predictor, image, INSTANCES)
    for a, b, c in zip(first, second, kept, strict=True):
        equal(a, b)
        np.testing.assert_array_equal(a.values, c.values)
    assert first_infos == second_infos
    np.testing.assert_array_equal(image, before)


def test_instances_together_are_instances_apart_in_any_order(explainer, predictor, image):
    explain, _ = explainer
    together, infos = explain(KEY, predictor, image, INSTANCES)
    for number in (2, 0, 1):
        (alone,), (info,) = explain(KEY, predictor, image, [INSTANCES[number]])
        equal(alone, together[number])
        assert info == infos[number]


def test_no_instance_no_map(explainer, predictor, image):
    assert explainer[0](KEY, predictor, image, []) == ([], [])


def test_progress_tells_of_every_row(explainer, predictor, image):
    seen: list[int] = []
    _, infos = explainer[0](KEY, predictor, image, INSTANCES, progress=seen.append)
    assert sum(seen) == sum(info.rows * info.samples for info in infos)
