"""One window: forward pass and Jacobian rows in PyTorch and xaiseg, the same weights, the same input, taking turns."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.measuring import Peak, agree, allocator_of, seconds
from scripts.benchmarks.networks import model_of, random_image, state_of, torch_network
from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.saliency.linearise import Linear, Views, chunk_sizes, pull_rows, row_chunks
from xaiseg.saliency.rows import head_of
from xaiseg.saliency.schedule import Geometry, Portion, portions

WINDOW = (96, 96, 96)
# In C order, and in one tile.
ROW_VOXELS = [(40 + i // 4, 44 + i % 4, 47) for i in range(8)]
MEMORY_OF = ("torch", "xaiseg", "gradient", "gradient-remat", "rows-remat")


class Torch:
    def __init__(self, net: Any) -> None:
        import torch

        self.torch, self.net = torch, net
        device = next(net.parameters()).device
        self.x = torch.from_numpy(random_image(WINDOW)).permute(3, 0, 1, 2)[None].contiguous().to(device)

    def forward(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.net(self.x)[0].permute(1, 2, 3, 0).cpu().numpy()

    def linearise(self) -> Any:
        x = self.x.clone().requires_grad_(True)
        return x, self.net(x)[0, 1]

    def rows(self, linear: Any, count: int = len(ROW_VOXELS)) -> np.ndarray:
        x, logit = linear
        rows = [self.torch.autograd.grad(logit[v], x, retain_graph=True)[0] for v in ROW_VOXELS[:count]]
        return self.torch.stack(rows)[:, 0].permute(0, 2, 3, 4, 1).cpu().numpy()


class View(NamedTuple):
    """A window, or a tile of it, linearised as `explain` does it."""

    geometry: Geometry
    portion: Portion
    linear: Linear
    values: Any

    @property
    def chunk(self) -> int:
        return chunk_sizes(self.linear, None, None)[0]


class Xaiseg:
    def __init__(self, model: Model) -> None:
        self.predictor = StitchedPredictor.of(model)
        self.x = jnp.asarray(random_image(WINDOW))
        self.apply = jax.jit(lambda f, x: f(x[None])[0])

    @property
    def ways(self) -> tuple[str, ...]:
        """How rows can be computed; `explain` takes the first."""
        return ("window",) if self.predictor.local_fn is None else ("tile", "window")

    def forward(self) -> np.ndarray:
        return np.asarray(self.apply(self.predictor.logits_fn, self.x))

    def gradient(self) -> Callable[[], np.ndarray]:
        """The input gradient of one logit, forward and backward in one program, compiled."""
        one = jax.jit(jax.grad(lambda x, f: f(x[None])[(0, *ROW_VOXELS[0], 1)]))
        compiled = one.lower(self.x, self.predictor.logits_fn).compile()
        return lambda: np.asarray(compiled(self.x, self.predictor.logits_fn))

    def linearise(self, way: str) -> View:
        predictor = self.predictor if way == "tile" else replace(self.predictor, local_fn=None)
        geometry = Geometry.of(predictor.plan(WINDOW), predictor.local_fn)
        (portion,) = portions(geometry, [Instance(1, np.array(ROW_VOXELS, np.int32))])
        views = Views(predictor, geometry, self.x, head_of(predictor, "logit", self.x))
        return View(
            geometry, portion, jax.block_until_ready(views[portion.views[0]]), np.asarray(views.values(portion))
        )

    def rows(self, view: View, chunk: int | None = None, count: int = len(ROW_VOXELS)) -> np.ndarray:
        """`(count, *field, C)`."""
        part, values = view.portion.part(slice(count)), view.values[:count]
        chunks = row_chunks(part, values, (chunk or view.chunk,))
        return np.concatenate([np.asarray(pull_rows(view.linear, c, 0, view.geometry.sides))[: c.rows] for c in chunks])


def in_window(rows: np.ndarray, view: View) -> np.ndarray:
    """Rows over the window: what of the field lies in it, zeros elsewhere."""
    corner, whole = (
        view.geometry.corner(view.portion.views[0]),
        np.zeros((len(rows), *WINDOW, rows.shape[-1]), rows.dtype),
    )
    bounds = [(int(a), n, side) for a, n, side in zip(corner, rows.shape[1:4], WINDOW, strict=True)]
    there = tuple(slice(max(a, 0), min(a + n, side)) for a, n, side in bounds)
    here = tuple(slice(max(-a, 0), min(n, side - a)) for a, n, side in bounds)
    whole[(slice(None), *there)] = rows[(slice(None), *here)]
    return whole


def compare(network: str, repeats: int) -> None:
    theirs = Torch(torch_network(network))
    ours = Xaiseg(model_of(network, state_of(theirs.net), WINDOW))
    their_linear, views = theirs.linearise(), {way: ours.linearise(way) for way in ours.ways}
    # rows a measurement; those of the other two take seconds each on CPU
    count = len(ROW_VOXELS) if network == "unet" else 1
    agree("logits", ours.forward(), theirs.forward())
    for way, view in views.items():
        rows = in_window(ours.rows(view, count=count), view)
        agree(f"rows by {way}", rows, theirs.rows(their_linear, count))
    first = ours.ways[0]
    table: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("forward", theirs.forward, ours.forward, 1),
        ("linearise (forward, kept for rows)", theirs.linearise, partial(ours.linearise, first), 1),
    ]
    for way, view in views.items():
        for chunk in sorted({1, 4, 8, view.chunk} if network == "unet" else {1}):
            default = " (as explain does)" if way == first and chunk == min(view.chunk, count) else ""
            name = f"Jacobian row by {way}, chunk {chunk}{default}"
            table.append(
                (name, partial(theirs.rows, their_linear, count), partial(ours.rows, view, chunk, count), count)
            )
    print(f"{network:50}{'PyTorch':>10}{'xaiseg':>10}{'ratio':>8}")
    for name, their_work, our_work, n in table:
        our_work(), their_work()
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            times[0].append(seconds(their_work) / n)
            times[1].append(seconds(our_work) / n)
        a, b = (statistics.median(t) for t in times)
        print(f"{name:50}{a * 1e3:8.0f}ms{b * 1e3:8.0f}ms{b / a:8.2f}", flush=True)


def memory(network: str, side: str) -> None:
    """Run one side alone and print by how much its memory peaks above that of imports and weights, in MiB.

    Of a window linearised and two rows (`torch`, `xaiseg`, `rows-remat`), or of an input gradient in one program (`gradient…`).
    All of it is compiled before: the compiler's own memory does not count.
    """
    theirs = Torch(torch_network(network))
    if side == "torch":
        peak = Peak(allocator_of(side))
        theirs.rows(theirs.linearise(), 2)
    else:
        state = state_of(theirs.net)
        del theirs
        ours = Xaiseg(model_of(network, state, WINDOW, remat=side.endswith("remat")))
        gradient = ours.gradient() if side.startswith("gradient") else None
        work = gradient or (lambda: ours.rows(ours.linearise(ours.ways[0]), count=2))
        peak = Peak(allocator_of(side))
        if gradient is None:
            work()
            peak.restart()
        work()
    print(peak.mib())
