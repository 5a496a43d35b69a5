"""Whole lesions: xaiseg beside the published algorithm, see `scripts/published.py`, which takes each row through everything."""

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.lesions import PLACES, ball, centre_at
from scripts.benchmarks.measuring import CompileClock, error_of, seconds
from scripts.benchmarks.networks import model_of, random_image, state_of, threads, torch_network
from scripts.benchmarks.peaks import print_peaks
from scripts.benchmarks.setup import Baseline, Setup, baseline
from xaiseg._types import Instance
from xaiseg.inference import StitchedPredictor, WindowPlan
from xaiseg.models import Model
from xaiseg.saliency import jacobian_rows, signed_max

# Maps must agree to the first fraction of their maximum, or in float64 to the second: where rounding turns an activation's sign
# its slope changes, and float32 gradients of one network with LeakyReLU, by two programs, then differ by up to the third.
_EQUAL, _EQUAL_IN_FLOAT64, _KINKS = 1e-4, 1e-6, 0.05
# A lesion that takes xaiseg no longer than this many seconds is timed before and after PyTorch's turn, and the mean is taken.
_TWICE_BELOW = 60


class Ours(NamedTuple):
    """A map over the volume, how many windows hold the lesion, seconds."""

    values: np.ndarray
    windows: int
    seconds: float


class Xaiseg:
    """The map of one lesion, as a user asks for it, and what it took."""

    def __init__(self, predictor: StitchedPredictor, image: np.ndarray) -> None:
        self.predictor, self.image = predictor, jnp.asarray(image)
        self.explain, self.compiling = jacobian_rows(signed_max()), CompileClock()

    def __call__(self, voxels: np.ndarray) -> Ours:
        found: list[Any] = []

        def work() -> None:
            (saliency,), (info,) = self.explain(jax.random.key(0), self.predictor, self.image, [Instance(1, voxels)])
            found.extend((np.asarray(saliency.values), saliency.start, info.windows))

        took = seconds(work)
        values, start, windows = found
        whole = np.zeros(self.image.shape, values.dtype)
        whole[tuple(slice(s, s + n) for s, n in zip(start, values.shape, strict=False))] = values
        return Ours(whole, windows, took)

    def warm(self, voxels: np.ndarray) -> Ours:
        """With everything compiled: once more, if something had to be."""
        before = self.compiling.seconds
        found = self(voxels)
        return found if self.compiling.seconds == before else self(voxels)


def compare(network: str, setup: Setup, peaks: bool) -> None:
    setup = setup.resolved(network)
    net, image = torch_network(network), random_image(setup.shape)
    model = model_of(network, state_of(net), setup.window)
    by_window = StitchedPredictor.of(model).plan(image.shape)
    for variant in setup.variants:
        predictor = StitchedPredictor.of(model, whole_volume=variant == "whole")
        theirs, how = baseline(network, net, image, setup.window, variant, model.stride)
        ours, plan = Xaiseg(predictor, image), predictor.plan(image.shape)
        agreement = Agreement(lambda part, v=variant: _error_in_float64(network, net, model, image, setup, v, part))
        print(
            f"\n{network}: {_by(setup.shape)} in {len(plan.starts)} of {_by(plan.window)}; PyTorch: {how}; {threads()} threads"
        )
        print(
            f"{'lesion':14}{'voxels':>7}{'windows':>9}{'PyTorch':>12}{'xaiseg':>11}{'ratio':>9}{'PyTorch/row':>13}{'xaiseg/row':>12}"
        )
        rows: list[tuple[int, float, float]] = []
        for place, voxels in _lesions(by_window, setup, variant):
            figures = _one_lesion(place, voxels, ours, theirs, setup.rows or len(voxels), agreement)
            if place == PLACES[0]:
                rows.append((len(voxels), *figures))
        for side, i in (("PyTorch", 1), ("xaiseg", 2)):
            print(f"{side}'s row by size of the lesion: {', '.join(f'{r[0]} voxels {r[i]:.4g} s' for r in rows)}")
        if network == "unet" and variant == "window":
            _monai(net, image, setup, by_window)
        if peaks and rows:
            print_peaks(network, setup, variant, [n for n, *_ in rows])


class Agreement:
    """Whether maps of both sides are equal, and in which words; the run ends where they are not.

    in_float64: the error of a lesion's map, computed by both in float64. One lesion is: the first whose float32 maps differ.
    """

    def __init__(self, in_float64: Callable[[np.ndarray], float]) -> None:
        self._in_float64, self._shown = in_float64, ""

    def __call__(self, what: str, part: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> str:
        error = error_of(ours, theirs)
        if error <= _EQUAL:
            return f"equal to {error:.0e}"
        if not error <= _KINKS:
            sys.exit(f"{what}: maps differ by {error:.1e} of their maximum: nothing to time")
        if self._shown:
            return f"equal to {error:.0e} by float32's rounding at kinks"
        exact = self._in_float64(part)
        if not exact <= _EQUAL_IN_FLOAT64:
            sys.exit(f"{what}: maps differ by {error:.1e}, in float64 by {exact:.1e} of their maximum: nothing to time")
        self._shown = f"equal to {error:.0e}, in float64 to {exact:.0e}"
        return self._shown


def _error_in_float64(
    network: str, net: Any, model: Any, image: np.ndarray, setup: Setup, variant: str, part: np.ndarray
) -> float:
    double = copy.deepcopy(net).double()
    theirs, _ = baseline(network, double, image, setup.window, variant, model.stride, needless=False)
    expected = theirs(part).values
    with jax.enable_x64(True):
        exact = Model(model.spec, jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.variables))
        predictor = StitchedPredictor.of(exact, whole_volume=variant == "whole")
        return error_of(Xaiseg(predictor, image.astype(np.float64))(part).values, expected)


def _lesions(plan: WindowPlan, setup: Setup, variant: str) -> list[tuple[str, np.ndarray]]:
    """Those in one window, the smallest first; then, where windows matter, one of the smallest size in several."""
    wanted = [(PLACES[0], n) for n in setup.sizes]
    if variant == "window":
        wanted += [(place, setup.sizes[0]) for place in setup.places]
    found = []
    for place, count in wanted:
        centre = centre_at(plan, place, count)
        if centre is None:
            print(f"left out: this volume has no place for a lesion of {count} voxels in {place}")
        else:
            found.append((place, ball(centre, count)))
    return found


def _one_lesion(
    place: str, voxels: np.ndarray, ours: Xaiseg, theirs: Baseline, rows: int, agreement: Agreement
) -> tuple[float, float]:
    """Print a line, if the maps agree; seconds of a row in PyTorch and in xaiseg."""
    part = voxels[:rows]
    before = ours.compiling.seconds
    first = ours(part)
    compiled = ours.compiling.seconds - before
    timed = [ours.warm(voxels)]
    published = theirs(part)
    if timed[0].seconds < _TWICE_BELOW:
        timed.append(ours(voxels))
    equal = agreement(f"{place}, {len(part)} rows", part, first.values, published.values)
    own, row = statistics.mean(t.seconds for t in timed), published.rows / len(part)
    other = published.forward + row * len(voxels)
    about = "" if len(part) == len(voxels) else "≈"
    print(
        f"{place:14}{len(voxels):7}{timed[0].windows:9}{f'{about}{other:.1f} s':>12}{own:9.2f} s{about:>2}{other / own:7.1f}"
        f"{row:11.3f} s{own / len(voxels):10.4f} s   {len(part)} of {len(voxels)} rows measured, {equal}; "
        f"xaiseg's first call {first.seconds:.1f} s, of which compiling {compiled:.1f} s",
        flush=True,
    )
    return row, own / len(voxels)


def _monai(net: Any, image: np.ndarray, setup: Setup, plan: WindowPlan) -> None:
    """What a row costs where autograd goes through MONAI's stitching itself."""
    from scripts import published

    centre = centre_at(plan, PLACES[0], setup.sizes[0])
    if centre is not None:
        two = ball(centre, setup.sizes[0])[:2]
        found = published.sliding_window(net, image, two, roi=setup.window, stitching="monai")
        print(f"PyTorch's row through MONAI's own stitching: {found.rows / 2:.3f} s (2 rows measured)", flush=True)


def _by(sides: tuple[int, ...]) -> str:
    return "×".join(map(str, sides))
