"""The chart of a cohort: what is counted are the coloured pixels, and that the same input gives the same bytes."""

import numpy as np
import pytest
from PIL import Image

from xaiseg.report import summary_figure


def lesion(group: str, voxels: int, flair: float, t1w: float) -> dict:
    return {"case": "sub-1", "lesion": 1, "group": group, "voxels": voxels, "peak_FLAIR": flair, "peak_T1w": t1w}


def coloured(path) -> list[int]:
    """Number of dots' pixels in the four panels: groups and volume of FLAIR, then of T1w."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    vivid = np.ptp(rgb, axis=-1) > 40
    return [int(vivid[y : y + 420, x].sum()) for y in (150, 698) for x in (slice(120, 760), slice(820, 1560))]


@pytest.mark.parametrize("group", ["TP", "FN"])
def test_summary_draws_each_finite_peak_once_in_each_panel(tmp_path, group):
    rows = [lesion(group, 10, 0.5, 0.1), lesion(group, 1000, 0.9, np.nan)]
    summary_figure(rows, ("FLAIR", "T1w"), tmp_path / "s.png", unit="Δlogit")
    (tmp_path / "once").mkdir()
    summary_figure(rows[:1], ("FLAIR", "T1w"), tmp_path / "once" / "s.png")
    two, one = coloured(tmp_path / "s.png"), coloured(tmp_path / "once" / "s.png")
    assert min(two + one) > 10
    assert two[1] / one[1] == pytest.approx(2, rel=0.2)  # the edges of dots fall differently on pixels
    assert two[3] / one[3] == pytest.approx(1, rel=0.2)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["s.png"]


@pytest.mark.parametrize("rows", [[], [lesion("unlabelled", 7, np.nan, np.nan)]])
def test_summary_without_a_finite_peak_is_an_empty_chart(tmp_path, rows):
    summary_figure(rows, ("FLAIR", "T1w"), tmp_path / "s.png")
    assert coloured(tmp_path / "s.png") == [0, 0, 0, 0]


def test_summary_repeats_and_does_not_depend_on_the_order_of_lesions(tmp_path):
    rows = [lesion(group, 3 + n, 0.1 * n, -0.05 * n) for n, group in enumerate(("TP", "FN", "TP", "other", "FP", "TP"))]
    summary_figure(rows, ("FLAIR", "T1w"), tmp_path / "a.png")
    summary_figure(rows, ("FLAIR", "T1w"), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    summary_figure(rows[::-1], ("FLAIR", "T1w"), tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
