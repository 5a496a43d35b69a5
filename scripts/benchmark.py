"""xaiseg beside PyTorch/MONAI on one machine, in one run: forward pass and Jacobian rows of the paper's U-Net, 96³ window.

    pip install -e '.[parity]' && python scripts/benchmark.py [--repeats 7] [--layers]

Both sides get the same weights, input and number of threads and take turns, so that a busy moment hits both; they must agree
before they are timed. Medians and their ratio are printed, and each side's peak memory, measured in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = (96, 96, 96)
CHANNELS = (32, 64, 128, 256, 512)
ROW_VOXELS = [(40 + i % 4, 44 + i // 4 % 4, 47) for i in range(8)]
SIDES = ("torch", "xaiseg")


class Torch:
    def __init__(self) -> None:
        import torch
        from monai.networks.nets import UNet

        torch.manual_seed(0)
        net = UNet(3, 2, 2, channels=CHANNELS, strides=(2, 2, 2, 2), norm="batch", num_res_units=0)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        self.torch, self.net = torch, net.eval().requires_grad_(False)
        self.x = torch.from_numpy(image()).permute(3, 0, 1, 2)[None].contiguous()

    def forward(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.net(self.x)[0].permute(1, 2, 3, 0).numpy()

    def linearise(self) -> Any:
        x = self.x.clone().requires_grad_(True)
        return x, self.net(x)[0, 1]

    def rows(self, linear: Any, chunk: int = 1) -> np.ndarray:
        x, logit = linear
        rows = [self.torch.autograd.grad(logit[v], x, retain_graph=True)[0] for v in ROW_VOXELS]
        return self.torch.stack(rows)[:, 0].permute(0, 2, 3, 4, 1).numpy()


class Xaiseg:
    def __init__(self, state: dict[str, np.ndarray]) -> None:
        import jax
        import jax.numpy as jnp

        from xaiseg.checkpoints import monai_unet
        from xaiseg.checkpoints.mapping import Given
        from xaiseg.models import Model, ModelSpec
        from xaiseg.saliency import rows

        reading = monai_unet.read(state, "benchmark", Given())
        spec = ModelSpec("unet", reading.options, ("FLAIR", "T1w"), WINDOW)
        self.jax, self.module = jax, rows
        model = Model(spec, jax.tree.map(jnp.asarray, reading.variables))
        self.logits_fn, self.local_fn = model.logits_fn, model.local_fn
        self.x = jnp.asarray(image())
        self.apply = jax.jit(lambda f, x: f(x[None])[0])

    def forward(self) -> np.ndarray:
        return np.asarray(self.apply(self.logits_fn, self.x))

    def linearise(self, tiled: bool = True) -> Any:
        """The pull-back of the tile around the voxels, as `explain` uses it, or of the whole window; with place and sides."""
        x, zero = self.x, np.zeros(3, np.int32)
        if not tiled:
            pull = self.module.linearise_window(self.logits_fn, x, zero, WINDOW, 1)
            return self.jax.block_until_ready(pull), zero, WINDOW
        start = np.min(ROW_VOXELS, axis=0).astype(np.int32) // self.local_fn.alignment * self.local_fn.alignment
        pull = self.module._linearise_tile(self.local_fn.function, x, zero, start, WINDOW, 1)
        return self.jax.block_until_ready(pull), start, self.local_fn.tile

    def rows(self, linear: Any, chunk: int | None = None) -> np.ndarray:
        pull, start, sides = linear
        chunk = chunk or self.chunk(linear)
        voxels, share = (np.array(ROW_VOXELS) - start).astype(np.int32), np.ones(len(ROW_VOXELS), np.float32)
        held = [slice(i, i + chunk) for i in range(0, len(voxels), chunk)]
        return np.concatenate([np.asarray(self.module._pull_rows(pull, voxels[h], share[h], sides)) for h in held])

    def chunk(self, linear: Any) -> int:
        pull, _, sides = linear
        return self.module.chunk_size(pull, sides, None, None)


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*WINDOW, 2)).astype(np.float32)


def state_of(net: Any) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in net.state_dict().items()}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(repeats: int) -> None:
    import jax
    import torch

    theirs = Torch()
    ours_is = Xaiseg(state_of(theirs.net))
    tile, window, their_linear = ours_is.linearise(), ours_is.linearise(tiled=False), theirs.linearise()
    agree("logits", ours_is.forward(), theirs.forward())
    agree("rows by tile", ours_is.rows(tile), theirs.rows(their_linear))
    agree("rows by window", ours_is.rows(window), theirs.rows(their_linear))
    n = len(ROW_VOXELS)
    chosen = ours_is.chunk(tile)
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {jax.devices()[0].device_kind}"
    )
    print(f"{'':42}{'PyTorch':>10}{'xaiseg':>10}{'ratio':>8}")
    table: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("forward", theirs.forward, ours_is.forward, 1),
        ("linearise (forward, kept for rows)", theirs.linearise, ours_is.linearise, 1),
    ]
    for what, linear in (("tile", tile), ("window", window)):
        for chunk in sorted({1, 4, 8, chosen}):
            name = f"Jacobian row by {what}, chunk {chunk}{' (as explain does)' if linear is tile and chunk == chosen else ''}"
            table.append((name, lambda: theirs.rows(their_linear), lambda c=chunk, m=linear: ours_is.rows(m, c), n))
    for name, their_work, our_work, count in table:
        our_work(), their_work()
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            times[0].append(seconds(their_work) / count)
            times[1].append(seconds(our_work) / count)
        a, b = (statistics.median(t) for t in times)
        print(f"{name:42}{a * 1e3:8.0f}ms{b * 1e3:8.0f}ms{b / a:8.2f}")


def agree(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what} agree to {error:.1e} of their maximum")
    if error > 1e-4:
        sys.exit(f"{what} differ: nothing to time")


def memory(side: str) -> None:
    """Run one side alone and print by how much its memory peaks above that of imports and weights, in MiB (Linux)."""
    theirs = Torch()
    ours = Xaiseg(state_of(theirs.net)) if side == "xaiseg" else None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    if ours is None:
        theirs.rows(theirs.linearise())
    else:
        ours.rows(ours.linearise())
    print((_status("VmHWM") - before) // 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def layers(repeats: int) -> None:
    """Folded against native lowering, layer by layer: forward and input gradient."""
    import jax
    import jax.numpy as jnp

    from xaiseg.models.convolution import conv, conv_transpose

    sides = [(96, 2, 32, 2), (48, 32, 64, 2), (24, 64, 128, 2), (12, 128, 256, 2), (6, 256, 512, 1)]
    up = [(6, 768, 128), (12, 256, 64), (24, 128, 32), (48, 64, 2)]
    cases = [(f"{n}³ {i}→{o} stride {s}", (n, i), (3, 3, 3, i, o), s, False) for n, i, o, s in sides]
    cases += [(f"{n}³ {i}→{o} transposed", (n, i), (3, 3, 3, o, i), 2, True) for n, i, o in up]
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
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--layers", action="store_true", help="lowerings of each layer instead (minutes: native is slow on CPU)"
    )
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
    elif arguments.layers:
        layers(min(arguments.repeats, 3))
    else:
        compare(arguments.repeats)
        for name in SIDES:
            done = subprocess.run(
                [sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True
            )
            print(f"peak memory of 8 rows beyond imports and weights, {name}: {done.stdout.strip()} MiB")
