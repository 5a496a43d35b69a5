"""The documentation runs: every example in a docstring of the public names, and the pages beside the code."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xaiseg
import xaiseg.saliency

PAGES = Path(xaiseg.saliency.__file__).parent
MODULES = sorted(f"xaiseg.saliency.{m.name}" for m in pkgutil.iter_modules([str(PAGES)]))
CONSTRUCTORS = {
    name: getattr(xaiseg.saliency, name)
    for name in xaiseg.saliency.__all__
    if inspect.isfunction(getattr(xaiseg.saliency, name))
}
EXPLAINERS = sorted(
    name for name, make in CONSTRUCTORS.items() if "Explainer" in str(inspect.signature(make).return_annotation)
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module):
    found = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert found.failed == 0


@pytest.mark.parametrize("name", EXPLAINERS)
def test_every_explainer_has_an_example(name):
    assert doctest.DocTestParser().get_examples(inspect.getdoc(CONSTRUCTORS[name]) or "")


def test_the_explainers_are_found():
    assert {"smoothgrad", "gradcam_pp", "occlusion", "guided_backprop", "expected_gradients"} <= set(EXPLAINERS)
    assert len(EXPLAINERS) >= 14


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_the_guide_knows_every_explainer(name):
    assert f"`{name}" in (PAGES / "README.md").read_text() or f"xaiseg.{name}(" in (PAGES / "README.md").read_text()


@pytest.mark.slow
def test_the_guide_runs():
    """One after the other, as a reader would."""
    names: dict = {}
    for block in blocks("README.md"):
        exec(block, names)
    assert all(np.isfinite(np.asarray(saliency.values)).all() for saliency in names["compared"].values())


def test_a_variant_of_ones_own():
    """The page's aggregator, wrapper and explainer, each against its definition."""
    names: dict = {}
    code = blocks("write_your_own.md")
    for block in code:
        exec(block, names)
    assert len([line for line in code[0].splitlines() if line.strip()]) <= 20
    predictor = xaiseg.StitchedPredictor(lambda x: jnp.sin(x) * jnp.roll(x, 1, 2), (4, 4, 4), target_class=0)
    image = jax.random.normal(jax.random.key(1), (6, 5, 7, 1))
    lesion = xaiseg.Instance(1, np.array([[1, 2, 1], [2, 2, 1], [5, 0, 3]], np.int32))
    rows = np.asarray(jax.jacrev(lambda x: predictor(x)[tuple(lesion.voxels.T)][:, 0])(image))

    def whole(explain):
        (found,), _ = explain(jax.random.key(0), predictor, image, [lesion])
        volume = np.zeros(image.shape, np.float32)
        box = tuple(slice(s, s + n) for s, n in zip(found.start, found.values.shape[:3], strict=True))
        volume[box] = found.values
        return volume

    spread = names["consistency"]()
    np.testing.assert_allclose(whole(xaiseg.jacobian_rows(spread)), rows.mean(0) / (1e-6 + rows.std(0)), atol=1e-2)
    flipped = names["mirrored_mean"](xaiseg.input_gradient())
    mirrored = np.asarray(
        jax.grad(lambda x: predictor(x)[tuple(lesion.voxels.T)].sum())(image)
        + jax.grad(lambda x: predictor(x)[tuple(((5, 0, 0) + lesion.voxels * (-1, 1, 1)).T)].sum())(image[::-1])[::-1]
    )
    np.testing.assert_allclose(whole(flipped), mirrored / 2, atol=1e-5)
