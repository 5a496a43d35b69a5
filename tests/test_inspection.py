"""`xaiseg inspect`: operations and receptive field against closed forms, memory against what is really kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xaiseg.cli import main
from xaiseg.inspection import flops, inspect, receptive_field
from xaiseg.models import Model, ModelSpec, build_network
from xaiseg.saliency.linearise import linearise_window
from xaiseg.saliency.targets import head


def unet(channels, strides, window, norm="batch", ndim=3, **changes):
    options = {"channels": channels, "strides": strides, "out_channels": 2, "norm": norm, "ndim": ndim}
    spec = ModelSpec("unet", options, ("FLAIR", "T1w"), window, **changes)
    sides = tuple(n for n in window if ndim == 3 or n > 1)
    return Model(spec, build_network(spec).init(jax.random.key(0), jnp.zeros((1, *sides, 2))))


def test_operations_are_counted():
    """2 · voxels · window · inputs · outputs of each convolution, of a transposed one on its smaller grid."""
    model = unet([4, 16], [2], (8, 8, 8))
    tap = 2 * 27 * 4**3
    expected = tap * (2 * 4 + 4 * 16 + 20 * 2)
    found = inspect(model)
    assert found.forward_flops == expected
    # a row is the transpose of a linear map: as many operations
    assert found.row_flops == expected


def test_operations_of_other_programs():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert flops(jax.make_jaxpr(lambda a, b: a @ b)(a, b)) == 2 * 3 * 4 * 5
    assert flops(jax.make_jaxpr(jax.checkpoint(lambda a, b: jnp.sin(a @ b)))(a, b)) == 2 * 3 * 4 * 5
    scanned = jax.make_jaxpr(lambda a, b: jax.lax.scan(lambda c, _: (c @ jnp.eye(4), None), a, None, length=7))(a, b)
    assert flops(scanned) == 7 * 2 * 3 * 4 * 4


def reach(out, n, steps):
    """Input indices along one axis that output `out` depends on: connections followed one by one."""
    sides = [n]
    for s in steps:
        sides.append(sides[-1] // s)
    below = {0: {i for i in range(sides[1]) if abs(i * steps[0] - out) <= 1}}
    for level in range(1, len(steps)):
        below[level] = {i for o in below[level - 1] for i in range(sides[level + 1]) if abs(i * steps[level] - o) <= 1}
    # what is needed of the encoder's levels: the skips, and below all the bottleneck's neighbours
    last = len(steps) - 1
    needed = below[last] | {i + k for i in below[last] for k in (-1, 0, 1) if 0 <= i + k < sides[-1]}
    for level in reversed(range(len(steps))):
        needed = {i * steps[level] + k for i in needed for k in (-1, 0, 1) if 0 <= i * steps[level] + k < sides[level]}
        if level > 0:
            needed |= below[level - 1]
    return max(needed) - min(needed) + 1


@pytest.mark.parametrize(
    ("channels", "strides", "window"),
    [([2, 3], [2], (32, 16, 16)), ([2, 3, 4], [2, 2], (64, 16, 16)), ([2, 3], [(1, 2, 2)], (16, 16, 16))],
)
def test_receptive_field(channels, strides, window):
    steps = [s if isinstance(s, tuple) else (s,) * 3 for s in strides]
    along = [[s[axis] for s in steps] for axis in range(3)]
    total = max(int(np.prod(s)) for s in along)
    widest = [
        max(reach(n // 2 // total * total + k, n, s) for k in range(total)) for n, s in zip(window, along, strict=True)
    ]
    assert receptive_field(unet(channels, strides, window)) == tuple(widest)


def test_statistics_of_the_window_widen_it():
    assert inspect(unet([2, 3], [2], (16, 16, 16), norm="instance")).whole_window
    assert not inspect(unet([2, 3], [2], (16, 16, 16))).whole_window


def test_what_is_kept_of_a_window():
    model = unet([4, 8], [2], (16, 16, 16))
    lesion = head("logit", 1, "softmax", 2)
    _, pull = linearise_window(model.logits_fn, jnp.ones((16, 16, 16, 2)), np.zeros(3, np.int32), (16, 16, 16), lesion)
    found = inspect(model)
    assert found.linearised_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert found.row_bytes >= 16**3 * 2 * 4
    assert found.forward_bytes > 0


def test_a_flat_window_of_a_two_dimensional_network():
    found = inspect(unet([2, 3], [2], (1, 16, 16), ndim=2))
    assert found.receptive_field == (1, 9, 9)
    assert found.taps["encoder0"] == (1, 8, 8, 2)


def test_the_command(tmp_path, capsys):
    assert main(["inspect", str(tiny.write_model(tmp_path / "m"))]) == 0
    out = capsys.readouterr().out.splitlines()
    facts = {line[:17].strip(): line[17:] for line in out if not line.startswith(" ")}
    count = tiny.tiny_model().parameter_count
    assert facts["architecture"] == "unet"
    assert facts["parameters"].startswith(f"{count:,} (")
    assert facts["input"] == "FLAIR, T1w; zscore_nonzero, orientation native"
    assert facts["receptive field"] == "up to 9×9×9 voxels"
    assert "  * bottleneck.conv  8×8×8 × 8" in out
    assert {"compute", "memory", "window", "lesions"} <= facts.keys()


def test_the_command_without_a_model(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "not a model folder" in capsys.readouterr().err
