"""The published algorithm, as `scripts/published.py` runs it in PyTorch, gives xaiseg's maps; so do its ways of stitching."""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch and MONAI deprecate while they are imported
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    from monai.networks.nets import UNet

from scripts import published
from scripts.benchmarks import networks
from xaiseg._types import Instance
from xaiseg.checkpoints import convert
from xaiseg.inference import StitchedPredictor
from xaiseg.models import build_network, expected_variables
from xaiseg.saliency import jacobian_rows, signed_max

pytestmark = pytest.mark.parity

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"

WINDOW = (16, 16, 16)
# Starts {0, 4} × {0, 5} × {0}, the last axis padded to the window; whole, padded to multiples of 4.
SHAPE = (20, 21, 14)
# In one window; in one, two and four of them.
LESIONS = {
    "one": np.array([[0, 0, 0], [0, 1, 0], [0, 2, 1], [1, 1, 0], [2, 1, 1], [3, 4, 1]], np.int32),
    "several": np.array([[3, 4, 7], [3, 5, 7], [9, 4, 6], [9, 9, 7], [9, 10, 7], [17, 10, 7], [19, 20, 13]], np.int32),
}


def networks_of(norm):
    torch.manual_seed(1)
    net = UNet(3, 2, 2, channels=(4, 8, 16), strides=(2, 2), norm=norm, num_res_units=0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.3)
            elif name.endswith("running_var"):
                value.uniform_(0.3, 1)
    return net.eval()


@pytest.fixture(scope="module", params=["batch", "instance"])
def sides(request, tmp_path_factory):
    """The network in PyTorch and as a model."""
    net, path = networks_of(request.param), tmp_path_factory.mktemp("published") / "net.pth"
    torch.save(net.state_dict(), path)
    options = {} if request.param == "batch" else {"norm": request.param}
    return net, convert(path, window=WINDOW, **options)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((*SHAPE, 2)).astype(np.float32)


def xaisegs_map(predictor, image, voxels):
    explain = jacobian_rows(signed_max())
    (found,), (info,) = explain(jax.random.key(0), predictor, jnp.asarray(image), [Instance(1, voxels)])
    whole = np.zeros(image.shape, np.float32)
    values = np.asarray(found.values)
    whole[tuple(slice(s, s + n) for s, n in zip(found.start, values.shape, strict=False))] = values
    return whole, info.windows


def equal(found, expected):
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("lesion", LESIONS)
def test_sliding_window_is_xaisegs_map(sides, image, lesion):
    net, model = sides
    found = published.sliding_window(net, image, LESIONS[lesion], roi=WINDOW)
    expected, windows = xaisegs_map(StitchedPredictor.of(model), image, LESIONS[lesion])
    assert windows == {"one": 1, "several": 4}[lesion]
    equal(found.values, expected)
    assert found.forward > 0
    assert found.rows > 0


@pytest.mark.parametrize("lesion", LESIONS)
def test_whole_volume_is_xaisegs_map(sides, image, lesion):
    net, model = sides
    found = published.whole_volume(net, image, LESIONS[lesion], multiple=model.stride)
    equal(found.values, xaisegs_map(StitchedPredictor.of(model, whole_volume=True), image, LESIONS[lesion])[0])


@pytest.mark.parametrize("stitching", ["apart", "monai"])
@pytest.mark.parametrize("lesion", LESIONS)
def test_ways_of_stitching_are_one(sides, image, lesion, stitching):
    net, _ = sides
    together, other = (
        published.sliding_window(net, image, LESIONS[lesion], roi=WINDOW, stitching=s).values
        for s in ("together", stitching)
    )
    if stitching == "apart":
        np.testing.assert_array_equal(other, together)
    else:
        np.testing.assert_allclose(other, together, rtol=0, atol=1e-5 * np.abs(together).max())


def test_stitching_is_known(sides, image):
    with pytest.raises(ValueError, match="stitching is 'sideways', known are together, apart, monai"):
        published.sliding_window(sides[0], image, LESIONS["one"], roi=WINDOW, stitching="sideways")


def test_ties_go_to_the_first_voxel():
    """Two voxels whose rows are one magnitude with opposite signs where they meet."""

    class Difference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv3d(1, 1, (3, 1, 1), padding=(1, 0, 0), bias=False)
            with torch.no_grad():
                self.layer.weight[0, 0, :, 0, 0] = torch.tensor([-1.0, 0.0, 1.0])

        def forward(self, x):
            return self.layer(x)

    voxels = np.array([[0, 1, 1], [2, 1, 1]], np.int32)
    ones = np.ones((4, 4, 4, 1), np.float32)
    for order, sign in ((voxels, 1), (voxels[::-1], -1)):
        found = published.whole_volume(Difference(), ones, order, multiple=(1, 1, 1), target_class=0)
        assert found.values[:, 1, 1, 0].tolist() == [0, sign, 0, 1]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_benchmarks_without_pytorch_have_the_papers_networks(name):
    state = networks.state_of(networks.torch_network(name))
    read = networks.model_of(name, state, (64, 64, 64))
    own = networks.random_model(name, (64, 64, 64))
    assert build_network(own.spec) == build_network(read.spec)
    assert jax.tree.structure(expected_variables(own.spec)) == jax.tree.structure(dict(read.variables))


def run_benchmark(*options):
    small = ["--shape", "40", "32", "32", "--window", "32", "32", "32", "--lesions", "4", "--variant", "window"]
    done = subprocess.run([sys.executable, str(SCRIPT), *small, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_benchmark_runs():
    printed = run_benchmark("--published", "--network", "unet", "--baseline-rows", "2", "--places", "two", "--no-peaks")
    assert printed.count("2 of 4 rows measured, equal to") == 2
    assert "MONAI's own stitching" in printed


@pytest.mark.slow
@pytest.mark.parametrize("side", ["xaiseg", "torch"])
def test_memory_is_measured(side):
    assert int(run_benchmark("--network", "dynunet", "--peak", side, "1", "4").split()[-1]) > 0
