"""How exactly convolutions and matrix products take their factors: in float32, TF32 or bfloat16.

The factors are activations and kernels, and in the backward pass cotangents. Everything else stays float32: sums, norms, softmax,
activations. What is asked for is read while a function is traced and becomes part of its program, its transpose included.

  precision   mantissa   on NVIDIA GPUs         on TPUs                 on CPU
  float32     23 bits    float32                float32 in 6 passes     float32
  tf32        10 bits    TF32 tensor cores      3 bfloat16 passes       emulated
  bfloat16     7 bits    bfloat16 tensor cores  one bfloat16 pass       emulated

Hardware sums the products of rounded factors in float32; a product of bfloat16 arrays is then a bfloat16 array, so its result is
rounded too. The emulation does the same with float32 arithmetic: it costs time instead of saving it, and measures the error
where there is no accelerator. It rounds half to even; hardware may cut off instead, which can double the error of TF32.
TPUs have no TF32: three bfloat16 passes are more exact than it. GPUs before Ampere have neither format; there `tf32` is float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from xaiseg.models.platform import platform

PRECISIONS = ("float32", "tf32", "bfloat16")

_current: ContextVar[str] = ContextVar("precision", default="float32")


def check_precision(name: str) -> None:
    """Raise ValueError unless `name` is one of `PRECISIONS`."""
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; known are {', '.join(PRECISIONS)}")


@contextmanager
def precision_of(name: str) -> Iterator[None]:
    """Trace networks at this precision, one of `PRECISIONS`; ValueError for another.

    A function that `jax.jit` has traced before keeps the precision it was traced at, whatever is asked for around it: enter the
    context inside the compiled function, as `Forward` does.
    """
    check_precision(name)
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def precision_in_force() -> str:
    """What `precision_of` was told. The backward pass of a custom derivative is traced later and has to be told again."""
    return _current.get()


def at_precision(
    product: Callable[[Array, Array, lax.Precision], Array], a: Array, b: Array, emulated: bool = False
) -> Array:
    """`product(a, b, …)`, a convolution or a matrix product, at the precision in force; the dtype is that of `a`.

    emulated: on an accelerator too.
    """
    name = _current.get()
    if name == "float32":
        return product(a, b, lax.Precision.HIGHEST)
    emulated = emulated or platform() == "cpu"
    if name == "tf32":
        if not emulated:
            # TF32 on GPU, as DEFAULT is; on TPU DEFAULT would be a single bfloat16 pass
            return product(a, b, lax.Precision.HIGH)
        return _round_cotangent(product(_round_factor(a), _round_factor(b), lax.Precision.HIGHEST))
    if not emulated:
        # a float32 result of bfloat16 factors would be transposed to a product of mixed dtypes, which `lax` refuses
        return product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), lax.Precision.DEFAULT).astype(a.dtype)
    # XLA's CPU back end drops conversions to bfloat16 and back where it fuses them; this it keeps. It is its own transpose, which
    # is right here: bfloat16 arrays round factors and results in both directions.
    rounded = partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return rounded(product(rounded(a), rounded(b), lax.Precision.HIGHEST))


def _round_factor(x: Array) -> Array:
    """To TF32. Its cotangent, the result of a product, is not rounded."""
    return _round_p.bind(x, transposed=False)


def _round_cotangent(x: Array) -> Array:
    """The identity, whose cotangent is rounded to TF32: it becomes a factor."""
    return _round_p.bind(x, transposed=True)


def _round(x: Array, *, transposed: bool) -> Array:
    return x if transposed else lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


# A primitive, because JAX has no other linear function with a transpose of one's own under `jvp`, `vjp` and `vmap` alike:
# `custom_vjp` has no `jvp`, `linear_call` no `vmap`. The two directions are each other's transpose.
_round_p = Primitive("round_to_tf32")
_round_p.def_impl(_round)
_round_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_round_p, lambda cotangent, _, transposed: [_round_p.bind(cotangent, transposed=not transposed)])
batching.defvectorized(_round_p)
mlir.register_lowering(_round_p, mlir.lower_fun(_round, multiple_results=False))
