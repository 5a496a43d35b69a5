"""Beside captum's `Occlusion`: the same small network in PyTorch, stitched by MONAI, the mean logit over a lesion.

captum's conventions are ours, with no scaling between: the clean output minus the occluded one; patches from the first voxel on,
the last of an axis cut off; where patches overlap, the mean over those that cover a voxel.
captum computes in float64, we in float32.
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
from xaiseg.saliency.occlusion import occlusion

pytestmark = pytest.mark.parity

WINDOW, SHAPE = (8, 8, 8), (10, 8, 11)
# in both windows of the first and the last axis, in all four
LESION = Instance(1, np.array([[1, 3, 4], [2, 3, 4], [4, 3, 5], [4, 4, 5], [5, 4, 5], [9, 7, 10]], np.int32))
_rng = np.random.default_rng(0)
IMAGE = _rng.standard_normal((*SHAPE, 2)).astype(np.float32)
REFERENCE = (0.5 * _rng.standard_normal((*SHAPE, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def networks():
    """`(N, C, X, Y, Z)` to the mean of the lesion's stitched probabilities `(N,)`, and the predictor with the same weights."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 2, 3, padding=1)
    ).double()
    kernels = [
        (
            jnp.asarray(np.moveaxis(c.weight.detach().numpy(), (0, 1), (-1, -2)), jnp.float32),
            np.float32(c.bias.detach()),
        )
        for c in (layers[0], layers[2])
    ]

    def logits(kernels, x):
        for number, (kernel, bias) in enumerate(kernels):
            x = jax.nn.relu(x) if number else x
            dimensions = ("NDHWC", "DHWIO", "NDHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=dimensions)
            x = x + bias.reshape(1, 1, 1, 1, -1)
        return x

    def score(kind):
        def forward(x):
            blended = sliding_window_inference(x, WINDOW, 1, layers, overlap=0.25, mode="gaussian")
            value = blended if kind == "logit" else torch.softmax(blended, 1)
            return value[:, 1][:, *torch.from_numpy(LESION.voxels.T).long()].mean(1)

        return forward

    return score, StitchedPredictor(Partial(logits, jax.tree.map(jnp.asarray, kernels)), WINDOW)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 0)[None].copy())


@pytest.mark.parametrize("target", ["logit", "probability"])
@pytest.mark.parametrize("channels", ["each", "together"])
@pytest.mark.parametrize(("patch", "stride"), [((4, 4, 4), (4, 4, 4)), ((4, 3, 5), (3, 2, 3)), ((5, 8, 4), (1, 4, 4))])
def test_occlusion_is_captums(networks, patch, stride, channels, target):
    score, predictor = networks
    deep = 1 if channels == "each" else 2
    with torch.no_grad():
        expected = attr.Occlusion(score(target)).attribute(
            to_torch(IMAGE),
            sliding_window_shapes=(deep, *patch),
            strides=(deep, *stride),
            baselines=to_torch(REFERENCE),
        )
    expected = np.moveaxis(expected.numpy()[0], 0, -1)
    if channels == "together":
        # captum writes the one number of all channels to each of them
        np.testing.assert_array_equal(expected[..., 0], expected[..., 1])
        expected = expected[..., :1]
    explain = occlusion(
        patch=patch, stride=stride, margin=None, baseline=given(REFERENCE), channels=channels, target=target
    )
    (found,), (info,) = explain(jax.random.key(0), predictor, jnp.asarray(IMAGE), [LESION])
    assert (found.start, info.windows) == ((0, 0, 0), 4)
    # float32 against float64
    np.testing.assert_allclose(found.values, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
