"""Beside captum: the same small network in PyTorch, its logits stitched by MONAI and summed over a lesion.

Equal up to a documented scaling, which each test states. captum computes in float64, we in float32.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch, MONAI and captum deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    attr = pytest.importorskip("captum.attr")
    from monai.inferers import sliding_window_inference

from jax.tree_util import Partial

from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency.baselines import given
from xaiseg.saliency.guided import guided_backprop
from xaiseg.saliency.noise import noise_sigma, noisy
from xaiseg.saliency.paths import (
    completeness_gap,
    expected_gradients,
    integrated_gradients,
    smooth_integrated_gradients,
    times_input,
)
from xaiseg.saliency.rows import input_gradient

pytestmark = pytest.mark.parity

KEY = jax.random.key(3)
WINDOW = (8, 8, 8)
# Two windows along the first and the last axis
SHAPE = (10, 8, 11)
# Voxels in one window, in two, in all four; neighbours in different windows
LESION = Instance(1, np.array([[1, 3, 4], [2, 3, 4], [4, 3, 5], [4, 4, 5], [5, 4, 5], [9, 7, 10]], np.int32))
INNER = Instance(2, np.array([[4, 3, 5], [4, 4, 5], [5, 4, 5]], np.int32))  # in all four
SAMPLES, NOISE = 5, 0.3

_rng = np.random.default_rng(0)
IMAGE = _rng.standard_normal((*SHAPE, 2)).astype(np.float32)
REFERENCE = (0.5 * _rng.standard_normal((*SHAPE, 2))).astype(np.float32)


class Network(torch.nn.Module):
    """Two convolutions of 3³, one of 1³. `forward` is the sum of a lesion's stitched logits, `(N, C, X, Y, Z)` to `(N,)`."""

    def __init__(self, activation, lesion):
        super().__init__()
        self.lesion = lesion
        layer = {"relu": torch.nn.ReLU, "softplus": torch.nn.Softplus}[activation]
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv3d(2, 6, 3, padding=1),
            layer(),
            torch.nn.Conv3d(6, 5, 3, padding=1),
            layer(),
            torch.nn.Conv3d(5, 2, 1),
        ).double()

    def forward(self, x):
        logits = sliding_window_inference(x, WINDOW, 1, self.layers, overlap=0.25, mode="gaussian")
        return logits[:, 1][:, *torch.from_numpy(self.lesion.voxels.T).long()].sum(1)


def network(activation, lesion):
    """The module, and the same function with the same weights."""
    module = Network(activation, lesion)
    kernels = [
        (
            np.moveaxis(c.weight.detach().numpy(), (0, 1), (-1, -2)).astype(np.float32),
            c.bias.detach().numpy().astype(np.float32),
        )
        for c in module.layers
        if isinstance(c, torch.nn.Conv3d)
    ]

    def logits(kernels, x):
        for number, (kernel, bias) in enumerate(kernels):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            )
            x = x + bias.reshape(1, 1, 1, 1, -1)
            if number < 2:
                x = getattr(jax.nn, activation)(x)
        return x

    return module, StitchedPredictor(Partial(logits, jax.tree.map(jnp.asarray, kernels)), WINDOW)


@pytest.fixture(scope="module")
def smooth():
    return network("softplus", LESION)


@pytest.fixture(scope="module")
def kinked():
    return network("relu", INNER)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 0)[None].copy())


def channels_last(y):
    return np.moveaxis(y.detach().numpy()[0], 0, -1)


def explained(explain, predictor, lesion=LESION):
    (found,), (info,) = explain(KEY, predictor, jnp.asarray(IMAGE), [lesion])
    assert info.windows == 4
    return found


def equal(found, expected, of=None):
    """To 1e-5 of the largest value: float32 against float64."""
    values = np.asarray(found.values if of is None else of)
    # the windows of the lesion are all windows here, so that nothing is cropped
    assert found.start == (0, 0, 0)
    assert np.abs(expected).max() > 1e-5
    np.testing.assert_allclose(values, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.fixture
def noise(monkeypatch):
    """Our noise for captum, which draws all samples in one call of `torch.normal(0, σ)`."""
    sigma = float(noise_sigma(jnp.asarray(IMAGE), NOISE))
    drawn = [sigma * jax.random.normal(jax.random.fold_in(KEY, n), IMAGE.shape) for n in range(SAMPLES)]
    ours = torch.cat([to_torch(d) for d in drawn])

    def normal(mean, std):
        assert std.shape == ours.shape
        np.testing.assert_allclose(std, sigma)
        return ours

    monkeypatch.setattr(torch, "normal", normal)
    return sigma


def test_the_networks_are_one_function(smooth, kinked):
    for module, predictor in (smooth, kinked):
        with torch.no_grad():
            expected = float(module(to_torch(IMAGE)))
        found = float(np.asarray(predictor(jnp.asarray(IMAGE)))[(*module.lesion.voxels.T, 1)].sum())
        assert found == pytest.approx(expected, rel=1e-5)


def test_saliency_without_abs_is_the_input_gradient_of_the_sum(smooth):
    module, predictor = smooth
    expected = channels_last(attr.Saliency(module).attribute(to_torch(IMAGE).requires_grad_(), abs=False))
    equal(explained(input_gradient(), predictor), expected)


def test_input_x_gradient(smooth):
    module, predictor = smooth
    expected = channels_last(attr.InputXGradient(module).attribute(to_torch(IMAGE).requires_grad_()))
    equal(explained(times_input(input_gradient()), predictor), expected)


@pytest.mark.parametrize(
    ("method", "quadrature"), [("gausslegendre", "gauss_legendre"), ("riemann_middle", "midpoint")]
)
def test_integrated_gradients(smooth, method, quadrature):
    """`multiply_by_inputs=True`, the default. The convergence delta is our gap, before it is made relative and absolute."""
    module, predictor = smooth
    expected, delta = attr.IntegratedGradients(module).attribute(
        to_torch(IMAGE), to_torch(REFERENCE), n_steps=3, method=method, return_convergence_delta=True
    )
    explain = integrated_gradients(baseline=given(REFERENCE), steps=3, quadrature=quadrature)
    found = explained(explain, predictor)
    equal(found, channels_last(expected))
    with torch.no_grad():
        difference = float(module(to_torch(IMAGE)) - module(to_torch(REFERENCE)))
    gap = completeness_gap(predictor, jnp.asarray(IMAGE), jnp.asarray(REFERENCE), LESION, found)
    assert gap == pytest.approx(abs(float(delta)) / abs(difference), abs=1e-5)


@pytest.fixture
def samples_of(smooth, noise):
    """captum's noise tunnel over Saliency."""
    module, _ = smooth

    def attribute(kind):
        return channels_last(
            attr.NoiseTunnel(attr.Saliency(module)).attribute(
                to_torch(IMAGE), nt_type=kind, nt_samples=SAMPLES, stdevs=noise, abs=False
            )
        )

    return attribute


@pytest.mark.parametrize(
    ("statistic", "kind", "scale"),
    [("mean", "smoothgrad", 1), ("squared", "smoothgrad_sq", 1), ("variance", "vargrad", SAMPLES / (SAMPLES - 1))],
)
def test_statistics_over_noise(smooth, samples_of, statistic, kind, scale):
    """captum's variance divides by N, ours by N - 1."""
    found = explained(noisy(input_gradient(), samples=SAMPLES, noise=NOISE, statistic=statistic), smooth[1])
    equal(found, scale * samples_of(kind))


def test_standard_error_is_vargrads(smooth, samples_of):
    found = explained(noisy(input_gradient(), samples=SAMPLES, noise=NOISE), smooth[1])
    equal(found, np.sqrt(samples_of("vargrad") / (SAMPLES - 1)), of=found.standard_error)


def test_smooth_integrated_gradients(smooth, noise):
    module, predictor = smooth
    expected = channels_last(
        attr.NoiseTunnel(attr.IntegratedGradients(module)).attribute(
            to_torch(IMAGE),
            nt_type="smoothgrad",
            nt_samples=SAMPLES,
            stdevs=noise,
            baselines=to_torch(REFERENCE),
            n_steps=3,
        )
    )
    options = {"baseline": given(REFERENCE), "steps": 3, "samples": SAMPLES, "noise": NOISE}
    equal(explained(smooth_integrated_gradients(**options), predictor), expected)


def test_expected_gradients_are_gradient_shap_without_noise(smooth, monkeypatch):
    """captum draws all baselines, then all places; it is handed ours."""
    module, predictor = smooth
    references = [REFERENCE, -REFERENCE, np.zeros_like(REFERENCE)]
    keys = [jax.random.fold_in(KEY, n) for n in range(SAMPLES)]
    numbers = [int(jax.random.randint(jax.random.fold_in(k, 0), (), 0, 3)) for k in keys]
    places = np.array([float(jax.random.uniform(jax.random.fold_in(k, 1))) for k in keys])
    assert len(set(numbers)) > 1
    monkeypatch.setattr(np.random, "choice", lambda size, count: np.array(numbers))
    monkeypatch.setattr(np.random, "uniform", lambda low, high, count: places)
    expected = attr.GradientShap(module).attribute(
        to_torch(IMAGE), torch.cat([to_torch(r) for r in references]), n_samples=SAMPLES, stdevs=0.0
    )
    equal(explained(expected_gradients(references=references, samples=SAMPLES), predictor), channels_last(expected))


def test_guided_backprop(kinked):
    """captum guides the sum of the lesion's logits at once. So do we for voxels in the same windows, as those here are."""
    module, predictor = kinked
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
        expected = channels_last(attr.GuidedBackprop(module).attribute(to_torch(IMAGE).requires_grad_()))
    found = explained(guided_backprop(input_gradient()), predictor, INNER)
    plain = explained(input_gradient(), predictor, INNER)
    assert np.abs(np.asarray(found.values - plain.values)).max() > 0.1 * np.abs(expected).max()
    equal(found, expected)
