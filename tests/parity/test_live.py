"""Beside PyTorch and MONAI, at full size: the paper's network with random weights and random batch-norm statistics."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch and MONAI deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    from monai.inferers import sliding_window_inference
    from monai.networks.nets import UNet

from xaiseg._types import Instance
from xaiseg.checkpoints import convert, read_state_dict
from xaiseg.inference import StitchedPredictor
from xaiseg.saliency import gradcam_pp, smoothgrad

pytestmark = pytest.mark.parity

KEY = jax.random.key(0)
WINDOW = (96, 96, 96)
# Two windows along each axis: starts {0, 4}, {0, 5}, {0, 2}
SHAPE = (100, 101, 98)
LESIONS = {
    "one": np.array([[0, 0, 0], [0, 1, 0], [0, 2, 1], [1, 1, 0], [2, 1, 1], [3, 4, 1]], np.int32),
    "eight": np.array([[49, 50, 47], [50, 49, 47], [50, 50, 46], [50, 50, 47], [50, 51, 47], [51, 50, 48]], np.int32),
}


def papers_network():
    return UNet(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        channels=(32, 64, 128, 256, 512),
        strides=(2, 2, 2, 2),
        norm="batch",
        num_res_units=0,
    )


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = papers_network()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("adn.N.weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("adn.N.bias", "running_mean")):
                value.normal_(0, 0.2)
            elif name.endswith("running_var"):
                value.uniform_(0.1, 1)
            elif name.endswith("adn.A.weight"):
                value.uniform_(0.05, 0.4)
    return net.eval()


@pytest.fixture(scope="module")
def model(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "net.pth"
    torch.save(net.state_dict(), path)
    return convert(path, window=WINDOW)


def volume(shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, 2)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 0)[None]))


def channels_last(y):
    return np.moveaxis(y.detach().numpy()[0], 0, -1)


def stitched(net, x):
    return sliding_window_inference(x, WINDOW, 1, net, overlap=0.25, mode="gaussian")


def whole(saliency, shape):
    volume = np.zeros((*shape, saliency.values.shape[-1]), np.float32)
    volume[tuple(slice(s, s + n) for s, n in zip(saliency.start, saliency.values.shape, strict=False))] = (
        saliency.values
    )
    return volume


def test_logits_of_a_window(net, model):
    assert model.parameter_count == sum(p.numel() for p in net.parameters()) == 7_916_170
    x = volume(WINDOW)
    with torch.no_grad():
        expected = channels_last(net(to_torch(x)))
    assert expected.std() > 0.1
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(model.logits_fn, x[None])[0], expected, atol=1e-4)


def probabilities_agree(net, model, shape):
    x = volume(shape)
    with torch.no_grad():
        expected = channels_last(torch.softmax(stitched(net, to_torch(x)), 1))
    predictor = StitchedPredictor.of(model)
    assert expected[..., 1].std() > 0.01
    np.testing.assert_allclose(predictor.probability(predictor(jnp.asarray(x))), expected[..., 1], atol=1e-4)


def test_stitched_probabilities_below_and_above_the_window(net, model):
    probabilities_agree(net, model, (75, 101, 130))


@pytest.mark.slow
def test_stitched_probabilities_of_a_scan(net, model):
    probabilities_agree(net, model, (182, 218, 182))


@pytest.fixture(scope="module")
def brute_force(net):
    """One autograd call per voxel through MONAI's sliding-window output; rows `(n, X, Y, Z, C)` of each lesion."""
    x = to_torch(volume(SHAPE)).requires_grad_()
    y = stitched(net, x)[0, 1]
    return {
        name: np.stack([channels_last(torch.autograd.grad(y[tuple(v)], x, retain_graph=True)[0]) for v in voxels])
        for name, voxels in LESIONS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregate", "chunk"), [("signed_max", None), ("signed_max", 1), ("signed_max", 4), ("mean", None)]
)
@pytest.mark.parametrize("lesion", ["one", "eight"])
def test_maps_are_brute_force(model, brute_force, lesion, aggregate, chunk):
    rows = brute_force[lesion]
    largest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    expected = {"signed_max": largest, "mean": rows.mean(0)}[aggregate]
    explain = smoothgrad(samples=1, noise=0, aggregate=aggregate, chunk=chunk)
    image = jnp.asarray(volume(SHAPE))
    (found,), (info,) = explain(KEY, StitchedPredictor.of(model), image, [Instance(1, LESIONS[lesion])])
    assert info.windows == {"one": 1, "eight": 8}[lesion]
    np.testing.assert_allclose(whole(found, SHAPE), expected, atol=1e-4 * np.abs(expected).max())


def test_gradcam_pp_is_the_papers_equations(net, model):
    """Equations 8 to 10 term by term, at the published layer, for a lesion in one window."""
    x, voxels = volume(WINDOW), np.argwhere(np.ones((2, 3, 4))).astype(np.int32) + 40
    kept = {}
    hook = net.get_submodule("model.1.submodule.2.conv").register_forward_hook(
        lambda module, inputs, output: kept.update(A=output)
    )
    logits = net(to_torch(x))[0, 1]
    hook.remove()
    g = torch.autograd.grad(logits[tuple(torch.from_numpy(voxels.T).long())].sum(), kept["A"])[0][0].double()
    A = kept["A"][0].detach().double()
    alpha = g**2 / (2 * g**2 + A.sum((1, 2, 3), keepdim=True) * g**3)
    omega = torch.where(g > 0, alpha * torch.relu(g), torch.zeros_like(g))
    cam = torch.relu((omega * A).sum(0))[None, None]
    expected = torch.nn.functional.interpolate(cam, WINDOW, mode="trilinear", align_corners=False)[0, 0].numpy()
    explain = gradcam_pp(layer="decoder1.conv")
    (found,), _ = explain(KEY, StitchedPredictor.of(model), jnp.asarray(x), [Instance(1, voxels)])
    np.testing.assert_allclose(found.values[..., 0], expected, atol=1e-4 * expected.max())


@pytest.mark.data
def test_the_trained_checkpoint(shared):
    path = shared / "models" / "monai_unet_ms.pth"
    state = torch.load(path, weights_only=True)
    ours = read_state_dict(path)
    assert list(ours) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy())
    net = papers_network()
    net.load_state_dict(state)
    x = volume(WINDOW)
    with torch.no_grad():
        expected = channels_last(net.eval()(to_torch(x)))
    found = jax.jit(lambda f, x: f(x))(convert(path, window=WINDOW).logits_fn, x[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
