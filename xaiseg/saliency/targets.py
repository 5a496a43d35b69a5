"""What of the logits is explained: one number for each voxel, a function of its blended logits.

Blending is linear and the target is applied after it, as softmax is: of `t(y[v])`, `y[v] = Σ_w s_w(v) · y_w[v]`, window `w` gets
the cotangent `s_w(v) · ∇t(y[v])`. For the logit itself the gradient is constant; for the others it is taken at the blended logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

TARGETS = ("logit", "log_odds", "probability", "margin")


@dataclass(frozen=True)
class Target:
    """A target by name, with what the name leaves open. `c` is the lesion class, `p` its probability.

    kind: `logit`, `y_c`; `log_odds`, `log(p / (1 - p))`; `probability`, `p`; `margin`, `y_c - max_{k≠c} y_k`.
    against: for the margin, one other class instead of the strongest: `y_c - y_against`.
    function: instead of a kind, any differentiable function `(..., classes) -> (...)` of the logits.

    With a sigmoid head, or a single logit, `p = sigmoid(y_c)`, whose log-odds are the logit itself; so is the margin, the distance
    to the decision. Units: Δ of the target per unit of normalised intensity.
    """

    kind: str = "logit"
    against: int | None = None
    function: Callable[[Array], Array] | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.kind not in TARGETS:
            raise ValueError(f"target is {self.kind!r}, known are {', '.join(TARGETS)}, or a Target with a function")
        if self.against is not None and (self.kind != "margin" or self.function is not None):
            raise ValueError(f"target {self.kind!r} is against no class; only the margin is")

    @property
    def name(self) -> str:
        if self.function is not None:
            return getattr(self.function, "__name__", "function")
        return f"margin to class {self.against}" if self.against is not None else self.kind.replace("_", "-")


@dataclass(frozen=True)
class Head:
    """A target for one network. Hashable, so that compiled programs are shared.

    classes: the logits it needs, in order; None for all. linear: its gradient does not depend on them.
    """

    target: Target
    target_class: int
    classes: tuple[int, ...] | None
    sigmoid: bool

    @property
    def linear(self) -> bool:
        kind, own = self.target.kind, self.target.function is None
        return own and (
            kind == "logit"
            or (kind in ("log_odds", "margin") and self.sigmoid and self.target.against is None)
            or (kind == "margin" and self.target.against is not None)
        )

    def choose(self, logits: Array) -> Array:
        """The logits `(..., classes)` that the target needs. Raises ValueError where there is no such class."""
        if self.classes is None:
            return logits
        for c in self.classes:
            if c not in range(logits.shape[-1]):
                raise ValueError(
                    f"target_class is {c}, but the network has {logits.shape[-1]} classes, numbered from 0"
                )
        return jnp.stack([logits[..., c] for c in self.classes], -1)

    def __call__(self, chosen: Array) -> Array:
        """The target `(...)` of the chosen logits `(..., n)`."""
        target = self.target
        if target.function is not None:
            return target.function(chosen)
        if self.linear:
            return chosen[..., 0] - chosen[..., 1] if target.against is not None else chosen[..., 0]
        if self.sigmoid:
            return jax.nn.sigmoid(chosen[..., 0])
        c = self.target_class
        if target.kind == "probability":
            return jax.nn.softmax(chosen, axis=-1)[..., c]
        rest = jnp.concatenate([chosen[..., :c], chosen[..., c + 1 :]], -1)
        if target.kind == "log_odds":
            return chosen[..., c] - jax.nn.logsumexp(rest, axis=-1)
        return chosen[..., c] - rest.max(-1)

    def gradient(self, chosen: Array) -> Array:
        """`∇t` `(..., n)` at the chosen logits `(..., n)`."""
        return jax.grad(lambda y: self(y).sum())(chosen)


def head(target: "Target | str", target_class: int, output_activation: str, classes: int) -> Head:
    """The target of a network with so many `classes`.

    Raises ValueError for an unknown target, a class that the network does not have, or a margin of a class to itself.
    """
    if isinstance(target, str):
        target = Target(target)
    against = target.against
    for c in (target_class, against):
        if c is not None and c not in range(classes):
            raise ValueError(f"target_class is {c}, but the network has {classes} classes, numbered from 0")
    if against == target_class:
        raise ValueError(f"the margin of class {against} to itself is zero: choose another class")
    sigmoid = classes == 1 or output_activation == "sigmoid"
    needed: tuple[int, ...] | None = None
    if target.function is None:
        if against is not None:
            needed = (target_class, against)
        elif target.kind == "logit" or sigmoid:
            needed = (target_class,)
    return Head(target, target_class, needed, sigmoid)
