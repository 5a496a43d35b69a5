"""A step of training in PyTorch and xaiseg: the same first weights, the same batches, no augmentation, taking turns."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scripts.benchmarks.measuring import Peak, allocator_of, seconds
from scripts.benchmarks.networks import model_of, state_of, trainable_network
from training.augment import Augmentation
from training.config import Config
from training.step import initial_state, make_step

_SCRIPT = Path(__file__).resolve().parent.parent / "benchmark.py"
_RATE = 1e-4


def compare(network: str, side: int, batch: int, repeats: int) -> None:
    """Times of both, after a check that their losses of three steps agree; then the peak memory of each."""
    ours, theirs = _xaiseg(network, side, batch), _torch(network, side, batch)
    losses = np.array([(ours(), theirs()) for _ in range(3)])
    error = np.abs(losses[:, 0] / losses[:, 1] - 1).max()
    print(f"losses of three steps agree to {error:.1e}", flush=True)
    if not error <= 1e-3:
        sys.exit("losses differ: nothing to time")
    times = np.array([(seconds(theirs), seconds(ours)) for _ in range(repeats)])
    a, b = (statistics.median(column) for column in times.T)
    print(f"{network}, {batch} patches of {side}³: PyTorch {a:.2f} s a step, xaiseg {b:.2f} s, ratio {b / a:.2f}")
    for name in ("torch", "xaiseg"):
        command = [sys.executable, _SCRIPT, "--network", network, "--training", "--patch", side, "--batch", batch]
        done = subprocess.run([*map(str, command), "--peak-of", name], capture_output=True, text=True, check=True)
        print(f"  peak memory beyond imports and weights, {name}: {done.stdout.split()[-1]} MiB", flush=True)


def print_peak(network: str, side: int, batch: int, name: str) -> None:
    """Of two steps of one side alone, in MiB, compiled before."""
    peak: list[Peak] = []
    step = (_torch if name == "torch" else _xaiseg)(network, side, batch, peak)
    step()
    peak[0].restart()
    step()
    print(peak[0].mib())


def _batch(side: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = np.zeros((batch, side, side, side), np.float32)
    reference[:, side // 3 : side // 2, side // 3 : side // 2, side // 3 : side // 2] = 1
    image = rng.normal(size=(batch, side, side, side, 2)) + reference[..., None]
    return image.astype(np.float32), reference


def _xaiseg(network: str, side: int, batch: int, peak: list[Peak] | None = None) -> Callable[[], float]:
    net = trainable_network(network)
    model = model_of(network, state_of(net), (side,) * 3)
    config = replace(
        Config(),
        architecture=network,
        options=dict(model.spec.options),
        patch=(side,) * 3,
        batch=batch,
        learning_rate=_RATE,
        augmentation=Augmentation(),
    )
    images, references = jax.device_put(_batch(side, batch))
    held: list[Any] = [initial_state(config, model.variables)]
    step = make_step(config)
    if peak is not None:
        peak.append(Peak(allocator_of("xaiseg")))

    def one() -> float:
        held[0], loss = step(held[0], images, references, np.int32(0))
        return float(loss)

    return one


def _torch(network: str, side: int, batch: int, peak: list[Peak] | None = None) -> Callable[[], float]:
    import torch

    net = trainable_network(network)
    device = next(net.parameters()).device
    images, references = _batch(side, batch)
    x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(device)
    g = torch.from_numpy(references).to(device)
    optimiser = torch.optim.Adam(net.parameters(), _RATE)
    if peak is not None:
        peak.append(Peak(allocator_of("torch")))

    def one() -> float:
        optimiser.zero_grad()
        logits = net(x)
        p, flat = torch.softmax(logits, 1)[:, 1].flatten(1), g.flatten(1)
        size, voxels = flat.sum(1), flat.shape[1]
        kappa = 0.999 * size / (0.001 * (voxels - size))
        tp, fp, fn = (p * flat).sum(1), (p * (1 - flat)).sum(1), ((1 - p) * flat).sum(1)
        dice = 1 - ((2 * tp + 1e-5) / (kappa * fp + 2 * tp + fn + 1e-5)).mean()
        each = torch.nn.functional.cross_entropy(logits, g.long(), reduction="none")
        loss = 0.5 * dice + ((1 - torch.exp(-each)) ** 2 * each).mean()
        loss.backward()
        optimiser.step()
        return loss.item()

    return one
