"""White matter is told alike from raw intensities and from z-scores."""

import numpy as np

from xaiseg.imaging.normalise import zscore_nonzero
from xaiseg.imaging.white_matter import white_matter

SHAPE = (30, 32, 28)


def test_z_scores_give_the_white_matter_of_raw_intensities():
    """A box of fluid, grey and white matter with a lesion: of what is found nearly all is white, and the same either way."""
    rng = np.random.default_rng(0)
    grid = np.indices(SHAPE)
    depth = np.minimum.reduce([np.minimum(i, n - 1 - i) for i, n in zip(grid, SHAPE, strict=True)])
    fluid, grey, brain = depth == 2, (depth == 3) | (depth == 4), depth >= 2
    lesion = ((grid.transpose(1, 2, 3, 0) - (12, 14, 13)) ** 2).sum(-1) <= 6
    flair = np.select([lesion, fluid, grey], [160.0, 40.0, 105.0], 100.0) + 5 * rng.standard_normal(SHAPE)
    t1w = np.select([lesion, fluid, grey], [65.0, 20.0, 60.0], 100.0) + 5 * rng.standard_normal(SHAPE)
    raw = [(volume * brain).astype(np.float32) for volume in (flair, t1w)]
    found = [white_matter(np.stack(v, -1), lesion).mask for v in (raw, [zscore_nonzero(v, "") for v in raw])]
    assert (found[0] != found[1]).sum() <= 0.001 * found[0].sum()  # float32 at a border
    assert (brain & ~fluid & ~grey & ~lesion)[found[1]].all()
    assert found[1].sum() > 0.6 * (depth > 4).sum()
