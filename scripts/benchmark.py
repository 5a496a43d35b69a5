"""xaiseg beside PyTorch/MONAI on one machine, in one run: forward pass and Jacobian rows of the paper's networks, 96³ window.

    pip install -e '.[parity]' && python scripts/benchmark.py [--network unet dynunet swin_unetr] [--repeats 7] [--layers]

Both sides get the same weights, input and number of threads, or the same GPU in float32, and take turns, so that a busy moment hits
both; they must agree before they are timed. Medians and their ratio are printed, and each side's peak memory, measured in a process
of its own.
"""

import argparse
import os
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
ROW_VOXELS = [(40 + i % 4, 44 + i // 4 % 4, 47) for i in range(8)]
SIDES = ("torch", "xaiseg")
NETWORKS = ("unet", "dynunet", "swin_unetr")


def papers_network(name: str) -> Any:
    from monai.networks import nets

    if name == "unet":
        return nets.UNet(3, 2, 2, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), norm="batch", num_res_units=0)
    if name == "dynunet":
        sizes = {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [16, 32, 64],
        }
        return nets.DynUNet(3, 2, 2, **sizes, dropout=0.1, res_block=True, norm_name="instance", act_name="leakyrelu")
    return nets.SwinUNETR(in_channels=2, out_channels=2, feature_size=24)


class Torch:
    def __init__(self, network: str) -> None:
        import torch

        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        net = papers_network(network)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.torch, self.net = torch, net.eval().requires_grad_(False).to(self.device)
        self.x = torch.from_numpy(image()).permute(3, 0, 1, 2)[None].contiguous().to(self.device)

    def forward(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.net(self.x)[0].permute(1, 2, 3, 0).cpu().numpy()

    def linearise(self) -> Any:
        x = self.x.clone().requires_grad_(True)
        return x, self.net(x)[0, 1]

    def rows(self, linear: Any, chunk: int = 1, count: int = len(ROW_VOXELS)) -> np.ndarray:
        x, logit = linear
        rows = [self.torch.autograd.grad(logit[v], x, retain_graph=True)[0] for v in ROW_VOXELS[:count]]
        return self.torch.stack(rows)[:, 0].permute(0, 2, 3, 4, 1).cpu().numpy()


class Xaiseg:
    def __init__(self, network: str, state: dict[str, np.ndarray], remat: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        from xaiseg.checkpoints import monai_dynunet, monai_swin_unetr, monai_unet
        from xaiseg.checkpoints.mapping import Given
        from xaiseg.models import Model, ModelSpec
        from xaiseg.saliency import rows

        reader = {"unet": monai_unet, "dynunet": monai_dynunet, "swin_unetr": monai_swin_unetr}[network]
        reading = reader.read(state, "benchmark", Given(patch_merging="merging" if network == "swin_unetr" else None))
        options = {**reading.options, **({"remat": True} if remat else {})}
        spec = ModelSpec(reading.architecture, options, ("FLAIR", "T1w"), WINDOW)
        self.jax, self.module = jax, rows
        model = Model(spec, jax.tree.map(jnp.asarray, reading.variables))
        self.logits_fn, self.local_fn = model.logits_fn, model.local_fn
        self.x = jnp.asarray(image())
        self.apply = jax.jit(lambda f, x: f(x[None])[0])

    def forward(self) -> np.ndarray:
        return np.asarray(self.apply(self.logits_fn, self.x))

    def gradient(self) -> Callable[[], np.ndarray]:
        """The input gradient of one logit, forward and backward in one program, compiled."""
        one = self.jax.jit(self.jax.grad(lambda x, f: f(x[None])[(0, *ROW_VOXELS[0], 1)]))
        compiled = one.lower(self.x, self.logits_fn).compile()
        return lambda: np.asarray(compiled(self.x, self.logits_fn))

    def linearise(self, tiled: bool = True) -> Any:
        """The pull-back as `explain` uses it, of a tile where the network has one, or of the window; with place and sides."""
        x, zero = self.x, np.zeros(3, np.int32)
        if not tiled or self.local_fn is None:
            pull = self.module.linearise_window(self.logits_fn, x, zero, WINDOW, 1)
            return self.jax.block_until_ready(pull), zero, WINDOW
        start = np.min(ROW_VOXELS, axis=0).astype(np.int32) // self.local_fn.alignment * self.local_fn.alignment
        pull = self.module._linearise_tile(self.local_fn.function, x, zero, start, WINDOW, 1)
        return self.jax.block_until_ready(pull), start, self.local_fn.tile

    def rows(self, linear: Any, chunk: int | None = None, count: int = len(ROW_VOXELS)) -> np.ndarray:
        pull, start, sides = linear
        chunk = chunk or self.chunk(linear)
        voxels, share = (np.array(ROW_VOXELS[:count]) - start).astype(np.int32), np.ones(count, np.float32)
        held = [slice(i, i + chunk) for i in range(0, len(voxels), chunk)]
        return np.concatenate([np.asarray(self.module._pull_rows(pull, voxels[h], share[h], sides)) for h in held])

    def chunk(self, linear: Any) -> int:
        pull, _, sides = linear
        return self.module.chunk_size(pull, sides, None, None)


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*WINDOW, 2)).astype(np.float32)


def state_of(net: Any) -> dict[str, np.ndarray]:
    return {k: v.cpu().numpy() for k, v in net.state_dict().items()}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(network: str, repeats: int) -> None:
    theirs = Torch(network)
    ours_is = Xaiseg(network, state_of(theirs.net))
    window, their_linear = ours_is.linearise(tiled=False), theirs.linearise()
    linear = {"window": window} if ours_is.local_fn is None else {"tile": ours_is.linearise(), "window": window}
    count = (
        len(ROW_VOXELS) if network == "unet" else 1
    )  # rows a measurement; those of the other two take seconds each on CPU
    agree("logits", ours_is.forward(), theirs.forward())
    for what, own in linear.items():
        agree(f"rows by {what}", ours_is.rows(own, count=count), theirs.rows(their_linear, count=count))
    print(f"{network:46}{'PyTorch':>10}{'xaiseg':>10}{'ratio':>8}")
    table: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("forward", theirs.forward, ours_is.forward, 1),
        ("linearise (forward, kept for rows)", theirs.linearise, partial(ours_is.linearise, "tile" in linear), 1),
    ]
    first = next(iter(linear))
    for what, own in linear.items():
        chosen = ours_is.chunk(own)
        for chunk in sorted({1, 4, 8, chosen} if network == "unet" else {1}):
            default = " (as explain does)" if what == first and chunk == min(chosen, count) else ""
            name = f"Jacobian row by {what}, chunk {chunk}{default}"
            work = partial(ours_is.rows, own, chunk, count)
            table.append((name, partial(theirs.rows, their_linear, 1, count), work, count))
    for name, their_work, our_work, n in table:
        our_work(), their_work()
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            times[0].append(seconds(their_work) / n)
            times[1].append(seconds(our_work) / n)
        a, b = (statistics.median(t) for t in times)
        print(f"{name:46}{a * 1e3:8.0f}ms{b * 1e3:8.0f}ms{b / a:8.2f}", flush=True)


def agree(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what} agree to {error:.1e} of their maximum")
    if error > 1e-4:
        sys.exit(f"{what} differ: nothing to time")


def memory(network: str, side: str) -> None:
    """Run one side alone and print by how much its memory peaks above that of imports and weights, in MiB.

    Of a window linearised and two rows (`torch`, `xaiseg`, `rows-remat`), or of an input gradient in one program (`gradient…`).
    """
    theirs = Torch(network)
    state = state_of(theirs.net)
    torch, on_gpu = theirs.torch, theirs.device == "cuda"
    if side != "torch":
        del theirs
        ours = Xaiseg(network, state, remat=side.endswith("remat"))
        gradient = ours.gradient() if side.startswith("gradient") else None
        before = 0
        if on_gpu:
            before = ours.jax.local_devices()[0].memory_stats()["bytes_in_use"]
    if not on_gpu:  # Linux
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS") * 1024
    if side == "torch":
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        theirs.rows(theirs.linearise(), count=2)
        peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM") * 1024
    else:
        if gradient is not None:
            gradient()
        else:
            ours.rows(ours.linearise(), count=2)
        peak = ours.jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] if on_gpu else _status("VmHWM") * 1024
    print((peak - before) // 2**20)


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
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--layers", action="store_true", help="lowerings of each layer instead (minutes: native is slow on CPU)"
    )
    parser.add_argument(
        "--memory", choices=(*SIDES, "gradient", "gradient-remat", "rows-remat"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.network[0], arguments.memory)
    elif arguments.layers:
        layers(min(arguments.repeats, 3))
    else:
        import jax
        import torch

        device = jax.devices()[0].device_kind
        print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
        for network in arguments.network:
            compare(network, arguments.repeats)
            more = ("gradient", "gradient-remat", "rows-remat") if network == "swin_unetr" else ()
            for name in (*SIDES, *more):
                command = [sys.executable, __file__, "--network", network, "--memory", name]
                # XLA's CPU scheduler trades memory for concurrency, and with it what rematerialisation saves; see the README
                sequential = " --xla_cpu_enable_concurrency_optimized_scheduler=false" if name in more else ""
                flags = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + sequential}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=flags)
                print(f"peak memory beyond imports and weights, {name}: {done.stdout.split()[-1]} MiB", flush=True)
