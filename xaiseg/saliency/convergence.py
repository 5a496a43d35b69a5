"""How well a peak is known after some noise samples, and how many it takes to know it well enough."""

import math
from collections.abc import Sequence

from xaiseg._types import Info


def relative_error(peak: Sequence[float], standard_error: Sequence[float]) -> float:
    """`r = max_c SE_c / max_c |P_c|`: the largest standard error of a peak in units of the instance's largest peak.

    peak, standard_error: of one instance, a number per channel. Channels share the scale of the strongest because maps are
    compared between channels: one that hardly matters need not be known to a fraction of its own small peak. 0 where nothing
    varies, infinite where something does around peaks of zero, NaN where a number is.

    >>> relative_error([0.5, 0.1], [0.01, 0.025])
    0.05
    """
    if any(map(math.isnan, (*peak, *standard_error))):
        return math.nan
    error, scale = max(standard_error), max(map(abs, peak))
    if error == 0:
        return 0.0
    return error / scale if scale else math.inf


def recommended_samples(info: Info, tolerance: float) -> int | None:
    """Noise samples that bring the standard error at each channel's peak down to `tolerance` times the largest |peak|.

    Samples are independent: `SE_c = s_c / √N`, with a spread `s_c` that does not depend on `N`. The rule of `noisy` holds from

        `N* = ⌈max_c (s_c / (tolerance · max_k |P_k|))²⌉ = ⌈N · (r / tolerance)²⌉`,

    with `r` the `relative_error` after `N` samples.

    info: of an explanation with `noisy`; the last point of its course is used. None where no number of samples is enough or the
    course does not tell: all peaks are zero and their errors are not, or one is NaN.

    It is an estimate from the samples at hand, to plan with:

    - `s` is estimated from `N` values. Were they normal, `N*` would be off by a factor of `1 ± √(2/(N - 1))` (one standard
      deviation): 20 % after 50 samples, half after 8. Where sampling stopped because the tolerance was met, `s` is more
      likely too small than too large.
    - The peak is the maximum of a mean of noisy maps and biased upwards: of voxels with similar means, the one that the noise
      favoured is taken. The bias shrinks with `N`, and the peak with it, so that `N*` from few samples is rather too small.
    - The error is that of the map at the voxel of the peak. That the peak may move to another voxel is not in it.

    Raises ValueError where the tolerance is not positive or there is no course, that is, fewer than two samples.

    >>> from xaiseg._types import Course, Info
    >>> course = Course(peak=((0.5, 0.1),) * 20, standard_error=((0.05, 0.01),) * 20)
    >>> info = Info(rows=1, windows=1, samples=20, course=course)
    >>> recommended_samples(info, 0.05)
    80
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {tolerance}")
    if info.course is None:
        raise ValueError(
            f"no course of the peak after {info.samples} sample(s): explain with two noisy samples or more"
        )
    needed = info.samples * (relative_error(info.course.peak[-1], info.course.standard_error[-1]) / tolerance) ** 2
    # a hair's breadth less, so that rounding does not ask for one more than was enough
    return max(1, math.ceil(needed - 1e-6)) if math.isfinite(needed) else None
