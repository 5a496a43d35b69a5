"""The published algorithm in PyTorch, as a baseline: the signed-maximum map of one lesion, a backward pass for each of its voxels.

Equation 3 of Spagnolo et al. (Scientific Reports 2026) for one sample without noise: for each input voxel and channel the
derivative `∂y[v']/∂x`, `v' ∈ Ω`, of largest magnitude, with its sign; ties go to the first voxel of the lesion. Each row takes one
`torch.autograd.grad` of one logit, and every row goes back through everything that the prediction was made of:

- `whole_volume`: the network once over the whole volume, padded to multiples of its stride, half before, half after.
- `sliding_window`: the network over all windows of the volume, logits blended as MONAI's `sliding_window_inference` does with
  `mode="gaussian"`. Most windows do not hold the voxel, and autograd takes the zeros that arrive there through the network all the
  same. Three ways to the same map, of equally many passes through the network:
  `monai`, literally autograd through MONAI's own stitching, which copies volumes for every window and row;
  `together`, the graphs of all windows kept, and no stitched volume: a row costs the passes through the network and little else;
  `apart`, window by window, for networks whose graphs do not fit into memory together: forward, then the backward passes of all
  rows, then the next window. It holds the rows of the whole lesion on the host.

    net: module in inference mode, `(1, C, X, Y, Z)` to `(1, classes, X, Y, Z)`; its device and dtype are used.
    image: `(X, Y, Z, C)`. voxels: `(n, 3)`, the lesion. Results are `(X, Y, Z, C)`.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("the published algorithm runs in PyTorch and MONAI: pip install -e '.[parity]'") from error

STITCHING = ("together", "apart", "monai")

Slices = tuple[slice, ...]


class Published(NamedTuple):
    """A map `(X, Y, Z, C)`; seconds of the forward passes, and of the rows with their running maximum."""

    values: np.ndarray
    forward: float
    rows: float


def whole_volume(
    net: Any, image: np.ndarray, voxels: np.ndarray, *, multiple: Sequence[int] = (16, 16, 16), target_class: int = 1
) -> Published:
    """The map through the network over the whole volume, padded with zeros to multiples of `multiple` along each axis."""
    x, clock = _leaf(net, image), _Clock(net)
    sides = [-(-n // m) * m for n, m in zip(image.shape, multiple, strict=False)]
    logit = net(_padded(x, sides))[0, target_class][_inner(image.shape, sides)]
    forward = clock.lap()
    rows = (torch.autograd.grad(logit[tuple(v)], x, retain_graph=True)[0] for v in voxels.tolist())
    best = _signed_max(rows)
    return Published(_channels_last(best), forward, clock.lap())


def sliding_window(
    net: Any,
    image: np.ndarray,
    voxels: np.ndarray,
    *,
    roi: Sequence[int] = (96, 96, 96),
    overlap: float = 0.25,
    target_class: int = 1,
    stitching: str = "together",
    needless: bool = True,
) -> Published:
    """The map through all windows of the volume. `stitching`: one of `STITCHING`, see above; ValueError for another.

    `needless=False` leaves out the windows without voxels of the lesion, which add zeros only: the same map, to check one with.
    MONAI's stitching has all.
    """
    if stitching not in STITCHING:
        raise ValueError(f"stitching is {stitching!r}, known are {', '.join(STITCHING)}")
    if stitching == "monai":
        return _through_monai(net, image, voxels, roi, overlap, target_class)
    windows = _Windows(net, image, voxels, roi, overlap, target_class, needless)
    best, forward, rows = windows.together() if stitching == "together" else windows.apart()
    return Published(_channels_last(windows.volume(best)), forward, rows)


def _through_monai(
    net: Any, image: np.ndarray, voxels: np.ndarray, roi: Sequence[int], overlap: float, target_class: int
) -> Published:
    from monai.inferers import sliding_window_inference

    x, clock = _leaf(net, image), _Clock(net)
    logit = sliding_window_inference(x, roi, 1, net, overlap=overlap, mode="gaussian")[0, target_class]
    forward = clock.lap()
    rows = (torch.autograd.grad(logit[tuple(v)], x, retain_graph=True)[0] for v in voxels.tolist())
    best = _signed_max(rows)
    return Published(_channels_last(best), forward, clock.lap())


class _Windows:
    """All windows of a volume, and what each holds of a lesion.

    A row is zero outside of the windows that hold its voxel, so rows are kept over the box of the windows that hold any.
    """

    def __init__(
        self,
        net: Any,
        image: np.ndarray,
        voxels: np.ndarray,
        roi: Sequence[int],
        overlap: float,
        target_class: int,
        needless: bool,
    ) -> None:
        self.net, self.target_class, self.shape = net, target_class, image.shape
        sides = [max(n, r) for n, r in zip(image.shape, roi, strict=False)]
        self.image = _padded(_leaf(net, image).detach(), sides)
        self.inner = _inner(image.shape, sides)
        self.voxels = voxels + np.array([s.start for s in self.inner])
        slices = list(_slices(sides, roi, overlap))
        weight = _gaussian(roi, self.image)
        total = self.image.new_zeros(sides)
        for window in slices:
            total[window] += weight
        corners = np.array([[s.start for s in window] for window in slices])
        places = self.voxels[None] - corners[:, None]
        held = ((places >= 0) & (places < np.array(roi))).all(-1)
        touched = corners[held.any(1)]
        self.box = tuple(slice(a, b) for a, b in zip(touched.min(0), touched.max(0) + np.array(roi), strict=True))
        through = [w for w in range(len(slices)) if needless or held[w].any()]
        self.slices = [slices[w] for w in through]
        self.share = [weight / total[slices[w]] for w in through]
        self.places, self.held = places[through], held[through]

    def together(self) -> tuple[Any, float, float]:
        clock = _Clock(self.net)
        graphs = [self.graph(w) for w in range(len(self.slices))]
        forward = clock.lap()
        inputs, logits = [x for x, _ in graphs], [y for _, y in graphs]

        def row(i: int) -> Any:
            cotangents = [self.cotangent(w, i) for w in range(len(self.slices))]
            parts = torch.autograd.grad(logits, inputs, cotangents, retain_graph=True)
            total = self.blank()
            for w in np.flatnonzero(self.held[:, i]).tolist():
                total[self.within(w)] += parts[w]
            return total

        best = _signed_max(row(i) for i in range(len(self.voxels)))
        return best, forward, clock.lap()

    def apart(self) -> tuple[Any, float, float]:
        clock, forward, backward = _Clock(self.net), 0.0, 0.0
        rows: list[Any] = [None] * len(self.voxels)
        for w in range(len(self.slices)):
            x, logit = self.graph(w)
            forward += clock.lap()
            for i in range(len(self.voxels)):
                (part,) = torch.autograd.grad(logit, x, self.cotangent(w, i), retain_graph=True)
                if self.held[w, i]:
                    if rows[i] is None:
                        rows[i] = self.blank("cpu")
                    rows[i][self.within(w)] += part.cpu()
            backward += clock.lap()
        return _signed_max(iter(rows)), forward, backward + clock.lap()

    def graph(self, w: int) -> tuple[Any, Any]:
        """A window as a leaf, and its logits times their share of the blended ones."""
        x = self.image[(slice(None), slice(None), *self.slices[w])].clone().requires_grad_()
        return x, self.net(x)[0, self.target_class] * self.share[w]

    def cotangent(self, w: int, i: int) -> Any:
        """One at the lesion's voxel `i` where the window holds it, else zeros."""
        cotangent = torch.zeros_like(self.share[w])
        if self.held[w, i]:
            cotangent[tuple(self.places[w, i].tolist())] = 1
        return cotangent

    def blank(self, device: Any = None) -> Any:
        """Zeros over the box."""
        sides = [s.stop - s.start for s in self.box]
        return self.image.new_zeros((1, self.shape[-1], *sides), device=device)

    def within(self, w: int) -> Slices:
        """A window's place in the box."""
        along = zip(self.slices[w], self.box, strict=True)
        return (slice(None), slice(None), *(slice(s.start - b.start, s.stop - b.start) for s, b in along))

    def volume(self, values: Any) -> Any:
        """The volume with `values` in the box."""
        whole = torch.zeros_like(self.image)
        whole[(slice(None), slice(None), *self.box)] = values.to(whole.device)
        return whole[(slice(None), slice(None), *self.inner)]


def _signed_max(rows: Iterator[Any]) -> Any:
    best = torch.zeros_like(first := next(rows))
    for row in itertools.chain([first], rows):
        best = torch.where(row.abs() > best.abs(), row, best)
    return best


def _slices(sides: Sequence[int], roi: Sequence[int], overlap: float) -> Iterator[Slices]:
    def along(n: int, r: int) -> list[slice]:
        starts = [*range(0, n - r, max(int(r * (1 - overlap)), 1)), n - r]
        return [slice(s, s + r) for s in starts]

    return itertools.product(*(along(n, r) for n, r in zip(sides, roi, strict=True)))


def _gaussian(roi: Sequence[int], like: Any) -> Any:
    """Blend weights of a window, of the dtype and on the device of a tensor."""
    weight = like.new_ones(())
    for n in roi:
        t = torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1) / 2
        weight = weight[..., None] * torch.exp(-(t**2) / (2 * (0.125 * n) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))


def _padded(x: Any, sides: Sequence[int]) -> Any:
    """Zeros around `(1, C, X, Y, Z)`, half before, half after; PyTorch takes the last axis first."""
    pads: list[int] = []
    for have, n in zip(reversed(x.shape[2:]), reversed(sides), strict=True):
        pads += [(n - have) // 2, n - have - (n - have) // 2]
    return torch.nn.functional.pad(x, pads)


def _inner(shape: Sequence[int], sides: Sequence[int]) -> Slices:
    """Where the volume lies in the padded one."""
    return tuple(slice((n - have) // 2, (n - have) // 2 + have) for n, have in zip(sides, shape, strict=False))


def _leaf(net: Any, image: np.ndarray) -> Any:
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)[None]))
    return x.to(next(net.parameters())).requires_grad_()


def _channels_last(values: Any) -> np.ndarray:
    return np.moveaxis(values[0].cpu().numpy(), 0, -1)


class _Clock:
    """Seconds since the last lap, once the network's device is done."""

    def __init__(self, net: Any) -> None:
        self._on_gpu, self._since = next(net.parameters()).is_cuda, 0.0
        self.lap()

    def lap(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        last, self._since = self._since, time.perf_counter()
        return self._since - last
