"""Instance-level SmoothGrad (Spagnolo et al. 2026, eqs. 2 and 3)."""

from xaiseg._types import Explainer
from xaiseg.saliency.aggregators import AGGREGATORS
from xaiseg.saliency.noise import noisy_mean
from xaiseg.saliency.rows import jacobian_rows


def smoothgrad(
    *,
    samples: int = 50,
    noise: float = 0.05,
    aggregate: str = "signed_max",
    chunk: int | None = None,
    memory: int | None = None,
    reference_channel: int = 0,
) -> Explainer:
    """Mean over noisy copies of the aggregated rows of the instance's Jacobian.

    Maps are `(x, y, z, C)`, signed and unscaled, in Δlogit per unit of normalised intensity. `aggregate` is `signed_max`
    (eq. 3, the quantitative form) or `mean` (eq. 2). `samples=1, noise=0` gives the plain gradient. See `jacobian_rows` for
    `chunk` and `memory` (bytes), `noisy_mean` for the noise.
    """
    if aggregate not in AGGREGATORS:
        raise ValueError(f"aggregate is {aggregate!r}, known are {', '.join(AGGREGATORS)}")
    rows = jacobian_rows(AGGREGATORS[aggregate](), chunk=chunk, memory=memory)
    return noisy_mean(rows, samples=samples, noise=noise, reference_channel=reference_channel)
