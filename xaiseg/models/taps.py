"""Named activations of a network, and offsets added to them."""

from collections.abc import Mapping

from jax import Array


class Taps:
    """Collects activations while a network is applied: `x = tap("encoder0", x)`.

    `offsets[name]` is added at the tap of that name, so that the derivative with respect to a zero offset is the gradient there.
    `values` holds the activations, offset included, in order of computation. Never tap inside a scanned block, and inside a
    rematerialised one only by `remat.rematerialised`: its values belong to another trace.
    """

    def __init__(self, offsets: Mapping[str, Array] | None = None, prefix: str = "") -> None:
        self._offsets = offsets or {}
        self._prefix = prefix
        self.values: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        offset = self._offsets.get(self._prefix + name)
        value = value if offset is None else value + offset
        self.record(name, value)
        return value

    def record(self, name: str, value: Array) -> None:
        """Hold `value`, to which no offset is added."""
        self.values[self._prefix + name] = value

    @property
    def offsets(self) -> dict[str, Array]:
        """The offsets within this block, named as there."""
        return {k.removeprefix(self._prefix): v for k, v in self._offsets.items() if k.startswith(self._prefix)}

    def within(self, block: str) -> "Taps":
        """The same collection, for the inside of a block: names get the prefix `block.`."""
        inner = Taps(self._offsets, f"{self._prefix}{block}.")
        inner.values = self.values
        return inner
