"""The picture of compared explainers: what is drawn is what was measured, the same bytes each time."""

import numpy as np
import pytest

from xaiseg.analysis.sanity import summarise_sanity
from xaiseg.report.sanity import sanity_figure

NAMES = ("smoothgrad", "gradient:aggregate=mean", "random", "lost")


def rows(lesions):
    rng = np.random.default_rng(0)
    found = []
    for measure in ("deletion_blur", "deletion_blur_drop", "insertion_noise", "infidelity", "leakage"):
        for name in NAMES:
            for n in range(lesions):
                value = None if name == "lost" else float(rng.normal(0.5, 0.1))
                row = {"case": f"$c{n}", "patient": f"p{n // 2}", "lesion": 1, "explainer": name, "measure": measure}
                row["value"] = value
                if measure.startswith(("deletion", "insertion")):
                    row["gain"] = None if value is None else value - 0.4
                found.append(row)
    return found


@pytest.mark.parametrize("lesions", [1, 8])
def test_sanity(lesions, tmp_path):
    measured = rows(lesions)
    summary = summarise_sanity(measured, resamples=50)
    fig = sanity_figure(measured, summary, None, controls=("random",))
    axes = {ax.get_label(): ax for ax in fig.axes}
    # another replacement has a panel of its own, an area in logits has none
    assert list(axes) == ["deletion_blur", "infidelity", "leakage", "insertion_noise"]
    for measure, column in (("deletion_blur", "gain"), ("leakage", "value")):
        ax = axes[measure]
        marks = [line for line in ax.lines if line.get_marker() == "D"]
        for place, name in enumerate(NAMES[:3]):
            mine = [r[column] for r in measured if (r["explainer"], r["measure"]) == (name, measure)]
            np.testing.assert_allclose(ax.collections[place].get_offsets()[:, 0], mine)
            assert marks[place].get_ydata()[0] == place
            assert marks[place].get_xdata()[0] == pytest.approx(np.mean(mine))
        assert [text.get_text() for text in ax.texts] == ["not defined"]
        bars = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
        assert len(bars) == (3 if lesions > 1 else 0)
    written = [text.get_text() for text in fig.texts]
    assert "(random)" in written
    assert "gradient:aggregate=mean" in written
    assert any("one patient, so no interval" in text for text in written) == (lesions == 1)
    for name in ("a.png", "b.png"):
        assert sanity_figure(measured, summary, tmp_path / name, controls=("random",)) is None
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
