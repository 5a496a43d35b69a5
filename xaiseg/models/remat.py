"""Recompute a block in the backward pass instead of keeping its activations, taps included."""

from collections import OrderedDict
from collections.abc import Mapping

import flax.linen as nn
from jax import Array

from xaiseg.models.taps import Taps


def rematerialised(block: nn.Module, *inputs: Array, tap: Taps, train: bool = False) -> Array:
    """`block(*inputs, tap, train)`, recomputed in the backward pass. The parameters keep their names.

    A recomputed block is traced on its own, so offsets have to enter it as arguments and taps to leave it as results.
    """

    def call(
        block: nn.Module, inputs: tuple[Array, ...], offsets: Mapping[str, Array]
    ) -> tuple[Array, OrderedDict[str, Array]]:
        inner = Taps(offsets)
        y = block(*inputs, inner, train)
        return y, OrderedDict(inner.values)  # JAX would sort the keys of a dict

    y, values = nn.remat(call)(block, inputs, tap.offsets)
    for name, value in values.items():
        tap.record(name, value)
    return y
