"""Beside pytorch-grad-cam and MONAI: the same networks in PyTorch, with the logits summed over a lesion as the target.

Equal up to a documented scaling, which each test states. PyTorch computes in float64, we in float32.
"""

import importlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch, MONAI and their friends deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # pytorch-grad-cam imports it. The registry's is built for CUDA, and beside a PyTorch for CPU lacks operators that are not
        # needed here, but whose absence is an error.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")  # they exist as long as it does
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    from monai.networks.nets import UNet
    from monai.visualize import GradCAM, GradCAMpp
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

from jax.tree_util import Partial

from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.models.taps import Taps
from xaiseg.saliency.cam import gradcam, gradcam_pp, hirescam, layercam, seg_gradcam

pytestmark = pytest.mark.parity

KEY = jax.random.key(0)
SHAPE = (8, 6, 10)
VOXELS = np.argwhere(np.ones((2, 3, 2))).astype(np.int32) + np.array([3, 1, 6], np.int32)
IMAGE = np.random.default_rng(0).standard_normal((*SHAPE, 2)).astype(np.float32)
MASK = np.zeros(SHAPE)
MASK[tuple(VOXELS.T)] = 1


class Network(torch.nn.Module):
    """A convolution, one of stride 2, ReLU and back up, beside the fine features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.fine = torch.nn.Conv3d(2, 6, 3, padding=1)
        self.coarse = torch.nn.Conv3d(6, 5, 3, padding=1, stride=2)
        self.head = torch.nn.Conv3d(11, 3, 1)
        self.double()

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.coarse(torch.relu(fine))
        raised = torch.nn.functional.interpolate(torch.relu(coarse), scale_factor=2, mode="nearest")
        return 80 * self.head(torch.cat([torch.relu(fine), raised], 1))


def same_network(weights, x, offsets):
    """The same function with the same weights, and taps of the outputs of the convolutions."""
    tap = Taps(offsets)

    def convolution(name, y, stride=1):
        kernel, bias = weights[name]
        padding = [(k // 2, k // 2) for k in kernel.shape[:3]]
        y = jax.lax.conv_general_dilated(
            y, kernel, (stride,) * 3, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return tap(name, y + bias.reshape(1, 1, 1, 1, -1))

    fine = convolution("fine", x)
    coarse = convolution("coarse", jax.nn.relu(fine), 2)
    raised = jax.nn.relu(coarse).repeat(2, 1).repeat(2, 2).repeat(2, 3)
    return 80 * convolution("head", jnp.concatenate([jax.nn.relu(fine), raised], -1)), tap.values


@pytest.fixture(scope="module")
def network():
    """The module, and the predictor of one window."""
    module = Network().eval()
    weights = {
        name: (
            np.moveaxis(c.weight.detach().numpy(), (0, 1), (-1, -2)).astype(np.float32),
            c.bias.detach().numpy().astype(np.float32),
        )
        for name, c in module.named_children()
    }
    tapped_fn = Partial(same_network, jax.tree.map(jnp.asarray, weights))
    return module, StitchedPredictor(Partial(lambda f, x: f(x, {})[0], tapped_fn), SHAPE, tapped_fn=tapped_fn)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 0)[None].copy())


def explained(explain, predictor):
    (found,), (info,) = explain(KEY, predictor, jnp.asarray(IMAGE), [Instance(1, VOXELS)])
    assert info.windows == 1
    assert found.values.shape == (*SHAPE, 1)
    return np.asarray(found.values[..., 0], np.float64)


def equal(found, expected, tolerance=1e-5):
    """To 1e-5 of the largest value: float32 against float64."""
    assert expected.max() > 1e-5
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def to_one(cam):
    """pytorch-grad-cam's scaling: `(M - min M) / (1e-7 + max(M - min M))`, twice."""
    for _ in range(2):
        cam = cam - cam.min()
        cam = cam / (1e-7 + cam.max())
    return cam


def test_the_networks_are_one_function(network):
    module, predictor = network
    with torch.no_grad():
        expected = np.moveaxis(module(to_torch(IMAGE)).numpy()[0], 0, -1)
    equal(np.asarray(predictor(jnp.asarray(IMAGE))), expected)


PAIRS = {
    # ours, theirs, and the bound: GradCAMPlusPlus adds 1e-6 to its denominators, which is little beside 2g² where logits are large
    "Grad-CAM": (seg_gradcam, "GradCAM", 1e-5),
    "HiResCAM": (hirescam, "HiResCAM", 1e-5),
    "LayerCAM": (layercam, "LayerCAM", 1e-5),
    "Grad-CAM++": (lambda layer: gradcam_pp(layer=layer, form="pooled"), "GradCAMPlusPlus", 1e-4),
}


@pytest.mark.parametrize(("ours", "theirs", "bound"), PAIRS.values(), ids=PAIRS)
def test_pytorch_grad_cam(network, ours, theirs, bound):
    """At a tap of the image's grid, since theirs are brought to it by a cubic spline; and scaled to [0, 1] as theirs are."""
    module, predictor = network
    with getattr(grad_cam, theirs)(model=module, target_layers=[module.fine]) as cam:
        expected = cam(to_torch(IMAGE), targets=[SemanticSegmentationTarget(1, MASK)])[0]
    equal(to_one(explained(ours(layer="fine"), predictor)), expected, bound)


@pytest.mark.parametrize(("ours", "theirs", "bound"), PAIRS.values(), ids=PAIRS)
def test_pytorch_grad_cam_at_a_coarse_tap(network, ours, theirs, bound):
    """Before its ReLU, upsampling and scaling; ours is cut off at zero and then upsampled trilinearly."""
    module, predictor = network
    layer, target = module.coarse, SemanticSegmentationTarget(1, MASK)
    with getattr(grad_cam, theirs)(model=module, target_layers=[layer]) as cam:
        cam(to_torch(IMAGE), targets=[target])
        (a,), (g,) = cam.activations_and_grads.activations, cam.activations_and_grads.gradients
        raw = torch.from_numpy(cam.get_cam_image(to_torch(IMAGE), layer, [target], a.numpy(), g.numpy(), False))
    expected = torch.nn.functional.interpolate(torch.relu(raw)[None], SHAPE, mode="trilinear", align_corners=False)
    equal(explained(ours(layer="coarse"), predictor), expected.numpy()[0, 0], bound)


def test_grad_cam_of_a_class(network):
    """Their tutorial's mask: wherever the class is the most probable."""
    module, predictor = network
    with torch.no_grad():
        mask = (module(to_torch(IMAGE))[0].argmax(0) == 1).numpy().astype(np.float64)
    assert 0 < mask.sum() < mask.size
    with grad_cam.GradCAM(model=module, target_layers=[module.fine]) as cam:
        expected = cam(to_torch(IMAGE), targets=[SemanticSegmentationTarget(1, mask)])[0]
    equal(to_one(explained(gradcam(layer="fine", region="class"), predictor)), expected)


class SumOverMask(torch.nn.Module):
    """`(N, classes)`, as a classifier: each class's logits summed over a mask."""

    def __init__(self, net, mask):
        super().__init__()
        self.net, self.mask = net, torch.from_numpy(mask)

    def forward(self, x):
        return (self.net(x) * self.mask).sum((2, 3, 4))


CUBE = (8, 8, 8)
SMALL = np.array([[2, 3, 4], [2, 4, 4], [3, 3, 5]], np.int32)
LAYERS = {"bottleneck.conv": "model.1.submodule.1.submodule.conv", "decoder1.conv": "model.1.submodule.2.conv"}


@pytest.fixture(scope="module")
def monai_unet(tmp_path_factory):
    """MONAI's U-Net of three levels with random weights and statistics, as a classifier, and its conversion."""
    torch.manual_seed(2)
    net = UNet(3, 2, 2, (4, 8, 16), (2, 2), norm="batch", num_res_units=0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith(("adn.N.weight", "running_var")):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("adn.N.bias", "running_mean")):
                value.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("cam") / "net.pth"
    torch.save(net.state_dict(), path)
    mask = np.zeros(CUBE)
    mask[tuple(SMALL.T)] = 1
    return SumOverMask(net, mask).double().eval(), StitchedPredictor.of(convert(path, window=CUBE))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("form", "theirs"), [(None, GradCAM), ("monai", GradCAMpp)], ids=["Grad-CAM", "Grad-CAM++"])
def test_monai(monai_unet, form, theirs, layer):
    """The weights of GradCAMpp carry `exp(score)`, by which its map is divided. Its upsampling is trilinear, as ours."""
    module, predictor = monai_unet
    image = np.random.default_rng(3).standard_normal((*CUBE, 2)).astype(np.float32)
    x, name = to_torch(image), f"net.{LAYERS[layer]}"
    raw = theirs(module, name, postprocessing=lambda cam: cam)(x, class_idx=1).detach().numpy()[0, 0]
    with torch.no_grad():
        factor = np.exp(float(module(x)[0, 1])) if form else 1.0
    explain = gradcam_pp(layer=layer, form=form) if form else seg_gradcam(layer=layer)
    (found,), _ = explain(KEY, predictor, jnp.asarray(image), [Instance(1, SMALL)])
    found = np.asarray(found.values[..., 0], np.float64)
    equal(found, raw / factor)
    # its default post-processing maps the largest value to 0 and the smallest to 1
    scaled = theirs(module, name)(x, class_idx=1).numpy()[0, 0]
    equal((found.max() - found) / (found.max() - found.min()), scaled)
