"""nnU-Net's networks beside those that nnunetv2 built (scripts/fixtures/nnunet.py), their taps, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xaiseg.checkpoints import nnunet
from xaiseg.models.nnunet import PlainConvUNet, ResidualEncoderUNet

FIXTURES = Path(__file__).parent.parent / "fixtures"
NETWORKS = {"plain_conv_unet": PlainConvUNet, "residual_encoder_unet": ResidualEncoderUNet}
SMALL = {
    "features": (2, 3, 4),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    "decoder_convs": (1, 2),
}
PLAIN = PlainConvUNet(**SMALL, convs=(2, 1, 1))
RESIDUAL = ResidualEncoderUNet(**SMALL, blocks=(1, 2, 1))


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["plain", "residual", "old_2d"])
def test_logits_and_input_gradients_are_those_of_nnunetv2(name):
    folder = FIXTURES / f"nnunet_{name}"
    reading = nnunet.read(folder)
    network = NETWORKS[reading.architecture](**{k: tuples(v) for k, v in reading.options.items()})
    expected = {k: v.astype(np.float32) for k, v in np.load(folder / "expected.npz").items()}

    @jax.jit
    def logits_and_gradient(variables, x):
        def weighted(x):
            logits, _ = network.apply(variables, x)
            return (logits * expected["cotangent"]).sum(), logits

        (_, logits), gradient = jax.value_and_grad(weighted, has_aux=True)(x)
        return logits, gradient

    assert reading.members
    for fold, variables in reading.members.items():
        logits, gradient = logits_and_gradient(variables, expected["x"])
        wanted = expected[f"{fold}_gradient"]
        assert expected[f"{fold}_y"].std() > 0.5
        # float32 against float64 through ten layers; 5e-6 and 5e-7 were measured
        np.testing.assert_allclose(logits, expected[f"{fold}_y"], atol=3e-5)
        np.testing.assert_allclose(gradient, wanted, atol=5e-6 * np.abs(wanted).max())


def tapped(network, shape=(1, 4, 4, 4, 2)):
    """Names and shapes of the taps in order of computation, and of the variables."""
    order: list[str] = []

    def initialise(x):
        (logits, taps), variables = network.init_with_output(jax.random.key(0), x)
        order.extend(taps)
        return logits, taps, variables

    logits, taps, variables = jax.eval_shape(initialise, jnp.zeros(shape))
    return {name: taps[name].shape[1:] for name in order}, logits.shape, variables


def test_taps_of_the_plain_network():
    taps, logits, _ = tapped(PLAIN)
    assert logits == (1, 4, 4, 4, 2)
    assert list(taps.items()) == [
        ("encoder0.conv0", (4, 4, 4, 2)),
        ("encoder0.conv1", (4, 4, 4, 2)),
        ("encoder0", (4, 4, 4, 2)),
        ("encoder1.conv0", (4, 2, 2, 3)),
        ("encoder1", (4, 2, 2, 3)),
        ("encoder2.conv0", (2, 1, 2, 4)),
        ("encoder2", (2, 1, 2, 4)),
        ("decoder1.up", (4, 2, 2, 3)),
        ("decoder1.conv0", (4, 2, 2, 3)),
        ("decoder1.conv1", (4, 2, 2, 3)),
        ("decoder1", (4, 2, 2, 3)),
        ("head1", (4, 2, 2, 2)),
        ("decoder0.up", (4, 4, 4, 2)),
        ("decoder0.conv0", (4, 4, 4, 2)),
        ("decoder0", (4, 4, 4, 2)),
        ("logits", (4, 4, 4, 2)),
    ]


def test_taps_of_the_residual_encoder():
    taps, _, _ = tapped(RESIDUAL)
    plain, _, _ = tapped(PLAIN)
    assert [name for name in taps if name.startswith(("stem", "encoder"))] == [
        "stem.conv0",
        "stem",
        "encoder0.block0.conv1",
        "encoder0.block0.conv2",
        "encoder0",
        "encoder1.block0.conv1",
        "encoder1.block0.conv2",
        "encoder1.block1.conv1",
        "encoder1.block1.conv2",
        "encoder1",
        "encoder2.block0.conv1",
        "encoder2.block0.conv2",
        "encoder2",
    ]
    shared = {name: shape for name, shape in taps.items() if not name.startswith(("stem", "encoder"))}
    assert shared == {name: shape for name, shape in plain.items() if not name.startswith("encoder")}
    assert all(taps[f"encoder{s}"] == plain[f"encoder{s}"] for s in range(3))


@pytest.mark.slow
def test_each_offset_is_added_at_its_tap():
    shapes, _, empty = tapped(RESIDUAL)
    rng = np.random.default_rng(0)
    variables, x = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), (empty, jnp.zeros((1, 4, 4, 4, 2)))
    )
    weights = rng.standard_normal(x.shape).astype(np.float32)

    @jax.jit
    def taps_and_gradients(offsets):
        def weighted(offsets):
            logits, taps = RESIDUAL.apply(variables, x, offsets)
            return (logits * weights).sum(), taps

        gradients, taps = jax.grad(weighted, has_aux=True)(offsets)
        return taps, gradients

    none = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
    taps, gradients = taps_and_gradients(none)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == ["head1"]
    np.testing.assert_array_equal(gradients["logits"], weights)

    moved, _ = taps_and_gradients(none | {"encoder1": np.ones_like(none["encoder1"])})
    np.testing.assert_allclose(moved["encoder1"], taps["encoder1"] + 1, rtol=1e-6)
    names = list(shapes)
    for name in names[: names.index("encoder1")]:
        np.testing.assert_array_equal(moved[name], taps[name])
    for name in names[names.index("encoder1") :]:
        assert not np.allclose(moved[name], taps[name]), name


@pytest.mark.parametrize("network", [PLAIN, RESIDUAL])
def test_the_alignment_is_the_product_of_the_strides(network):
    assert network.tile_alignment == (2, 4, 2)
    with pytest.raises(ValueError, match=r"a grid of \(4, 6, 4\) does not fit: sides must be multiples of \(2, 4, 2\)"):
        tapped(network, (1, 4, 6, 4, 1))


def test_the_parameters_of_the_default_network():
    """As counted in PyTorch for nnU-Net's default plan of isotropic scans: one channel, two classes."""
    _, _, variables = tapped(PlainConvUNet(), (1, 32, 32, 32, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 31_195_594


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (2, 3)}, "2 stages of features, 3 kernel sizes"),
        ({"decoder_convs": (1, 2, 1)}, "3 decoder stages do not fit"),
        ({"convs": (1,)}, "1 encoder stages"),
        ({"strides": ((1, 1), (2, 2), (2, 2))}, "need 3 axes each"),
        ({"ndim": 2}, "a 2-D network"),
        ({"kernel_sizes": ((3, 3, 3), (2, 2, 2), (3, 3, 3))}, "each must be odd"),
        ({"strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1))}, r"first stage has strides \(2, 2, 2\)"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tapped(PLAIN.clone(**changes))
