"""Folded against native lowering of the U-Net's convolutions, layer by layer: forward and input gradient."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.measuring import seconds
from xaiseg.models.convolution import conv, conv_transpose

# grid, features in and out, stride
_DOWN = [(96, 2, 32, 2), (48, 32, 64, 2), (24, 64, 128, 2), (12, 128, 256, 2), (6, 256, 512, 1)]
_UP = [(6, 768, 128), (12, 256, 64), (24, 128, 32), (48, 64, 2)]


def layers(repeats: int) -> None:
    cases = [(f"{n}³ {i}→{o} stride {s}", (n, i), (3, 3, 3, i, o), s, False) for n, i, o, s in _DOWN]
    cases += [(f"{n}³ {i}→{o} transposed", (n, i), (3, 3, 3, o, i), 2, True) for n, i, o in _UP]
    print(f"{'layer':28}{'folded':>18}{'native':>18}   (forward / input gradient, ms)")
    for name, (n, c), shape, s, transposed in cases:
        kernel = jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
        x = jnp.ones((1, n, n, n, c))
        strides, padding = (s,) * 3, [(1, 1)] * 3
        line = f"{name:28}"
        for lowering in ("folded", "native"):
            extra = {"output_padding": (s - 1,) * 3} if transposed else {}
            layer = conv_transpose if transposed else conv
            apply = partial(layer, kernel=kernel, strides=strides, padding=padding, lowering=lowering, **extra)
            forward = jax.jit(apply)
            backward = jax.jit(lambda y, f=apply, x=x: jax.linear_transpose(f, x)(y)[0])
            y = jax.block_until_ready(forward(x))
            jax.block_until_ready(backward(y))
            figures = [
                statistics.median(seconds(lambda f=f, a=a: jax.block_until_ready(f(a))) for _ in range(repeats))
                for f, a in ((forward, x), (backward, y))
            ]
            line += "".join(f"{t * 1e3:9.1f}" for t in figures)
        print(line, flush=True)
