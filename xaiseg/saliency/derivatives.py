"""Second and third derivatives of a scalar along single coordinates, and through a transform of that scalar.

Grad-CAM++ weighs each activation by the curvature of its own coordinate: the diagonals of the second and third derivative. Random
probes estimate them badly (59 % error with 64 of them), so each is computed, by forward mode along its coordinate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

Three = tuple[Any, Any, Any]
"""First, second and third derivative."""


def directional_derivatives(
    f: Callable[[Array], Array], x: Array, elements: Sequence[int] | np.ndarray, *, chunk: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`φ_i'(0)`, `φ_i''(0)`, `φ_i'''(0)` of `φ_i(t) = f(x + t·e_i)` for each index `i` in `elements`, exactly.

    The n-th is `∂ⁿf/∂x_iⁿ`, in units of `f` per unit of `x` to the n-th power. Kinks, such as ReLU's, have the derivatives that
    JAX gives their pieces.

    f: pure, `x`'s shape to a scalar; differentiable in forward mode. A `jax.tree_util.Partial` keeps its leaves as arguments of the
      compiled program, which equal functions then share; another function is compiled anew for each object.
    x: a floating array. elements: `(n,)` indices into the flattened `x`, C order; see `np.ravel_multi_index`.
    chunk: elements at once. It bounds memory, about eight times that of `f` for each, and does not change the result beyond float
      addition order.

    Three nested `jvp`, vectorised over the elements of a chunk: what `f` computes before `x` enters runs once per chunk, without
    tangents. A chunk costs about eight evaluations of the rest of `f` per element.
    Returns three arrays `(n,)` in the dtype of `f`. Raises ValueError for indices out of range, a chunk below 1, an `x` that is
    not floating, or a result that is no scalar.

    >>> first, second, third = directional_derivatives(lambda x: x[0] ** 3 * x[1], jnp.array([2.0, 5.0]), [0, 1])
    >>> first.tolist(), second.tolist(), third.tolist()
    ([60.0, 8.0], [60.0, 0.0], [30.0, 0.0])
    """
    indices = np.asarray(elements, np.int32)
    if chunk < 1 or indices.ndim != 1:
        raise ValueError(f"expected a chunk of at least 1 and a list of indices, not {chunk} and {indices.ndim} axes")
    if indices.size and not (indices.min() >= 0 and indices.max() < x.size):
        raise ValueError(f"elements from {indices.min()} to {indices.max()}, but x has {x.size}, numbered from 0")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, expected a floating type")
    f = f if isinstance(f, Partial) else Partial(f)
    if not indices.size:
        return (np.zeros(0, x.dtype),) * 3
    found = []
    for first in range(0, len(indices), chunk):
        part = indices[first : first + chunk]
        # the last chunk repeats an element, so that one program serves all
        filled = np.pad(part, (0, chunk - len(part)), mode="edge")
        found.append(np.asarray(_along(f, x, filled))[:, : len(part)])
    one, two, three = np.concatenate(found, axis=1)
    return one, two, three


def scalar_derivatives(h: Callable[[Array], Array], s: Array) -> tuple[Array, Array, Array]:
    """`h'(s)`, `h''(s)`, `h'''(s)` of a smooth function from scalar to scalar; may be traced.

    >>> [float(d) for d in scalar_derivatives(lambda s: s**4, jnp.array(1.0))]
    [4.0, 12.0, 24.0]
    """
    first = jax.grad(h)
    second = jax.grad(first)
    return first(s), second(s), jax.grad(second)(s)


def through_transform(outer: Three, inner: Three) -> Three:
    """The derivatives of `h(φ(t))` from those of `h` and of `φ` (Faà di Bruno), elementwise:

    `h'φ'`,  `h''φ'² + h'φ''`,  `h'''φ'³ + 3h''φ'φ'' + h'φ'''`.

    >>> through_transform((2.0, 2.0, 0.0), (3.0, 0.0, 0.0))  # h(s) = s² at s = 1, φ = 1 + 3t
    (6.0, 18.0, 0.0)
    """
    h1, h2, h3 = outer
    s1, s2, s3 = inner
    return h1 * s1, h2 * s1 * s1 + h1 * s2, h3 * s1 * s1 * s1 + 3 * h2 * s1 * s2 + h1 * s3


@jax.jit
def _along(f: Partial, x: Array, elements: Array) -> Array:
    """`(3, n)` for the elements of one chunk."""
    flat, zero, one = x.reshape(-1), jnp.zeros((), x.dtype), jnp.ones((), x.dtype)

    def of(i: Array) -> Array:
        def moved(t: Array) -> Array:
            y = f(flat.at[i].add(t).reshape(x.shape))
            if y.shape != ():
                raise ValueError(f"the function has a result of shape {y.shape}, expected a scalar")
            return y

        def derived(g: Callable[[Array], Any], t: Array) -> Any:
            return jax.jvp(g, (t,), (one,))

        # value and derivative of value and derivative of value and derivative
        (_, (first, second)), (_, (_, third)) = derived(partial(derived, partial(derived, moved)), zero)
        return jnp.stack([first, second, third])

    return jax.vmap(of, out_axes=1)(elements)
