"""Named activations of a network, and offsets added to them."""

from collections.abc import Mapping

from jax import Array


class Taps:
    """Collects activations while a network is applied: `x = tap("encoder0", x)`.

    `offsets[name]` is added at the tap of that name, so that the derivative with respect to a zero offset is the gradient there.
    `values` holds the activations, offset included, in order of computation. Never tap inside a rematerialised or scanned block:
    its values belong to another trace.
    """

    def __init__(self, offsets: Mapping[str, Array] | None = None, prefix: str = "") -> None:
        self._offsets = offsets or {}
        self._prefix = prefix
        self.values: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        name = self._prefix + name
        if name in self._offsets:
            value = value + self._offsets[name]
        self.values[name] = value
        return value

    def within(self, block: str) -> "Taps":
        """The same collection, for the inside of a block: names get the prefix `block.`."""
        inner = Taps(self._offsets, f"{self._prefix}{block}.")
        inner.values = self.values
        return inner
