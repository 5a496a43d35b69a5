"""The chart of peaks against samples: coloured pixels, texts, and that the same input gives the same bytes."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from xaiseg._types import Course, Info
from xaiseg.report import convergence as module
from xaiseg.report.convergence import convergence_figure

COLOURS = [np.round(np.array(to_rgb(colour)) * 255) for colour, _ in module._STYLES]


def lesion(peaks, spread=0.2, samples=30):
    """Peaks that settle as 1/√N, with a spread in units of the largest; one per channel."""
    n = np.arange(1, samples + 1)[:, None]
    error = np.broadcast_to(spread * max(map(abs, peaks)) / np.sqrt(n), (samples, len(peaks))).copy()
    peak = np.array(peaks) + 0.5 * error
    error[0] = math.nan
    course = Course(tuple(map(tuple, peak.tolist())), tuple(map(tuple, error.tolist())))
    return Info(rows=1, windows=1, samples=samples, course=course)


def draw(path, infos, channels=("FLAIR", "T1w"), tolerance=0.05, unit="Δlogit"):
    convergence_figure(
        infos, [f"lesion {n}" for n in range(len(infos))], channels, path, unit=unit, tolerance=tolerance
    )
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels(rgb, colour):
    """Pixels of the lines' own colour, below the legend."""
    return int((np.abs(rgb[module._TOP - 20 :] - colour).max(-1) <= 2).sum())


@pytest.fixture
def texts(monkeypatch):
    """All that is written outside the axes."""
    written: list[str] = []

    def keep(fig, x, y, text, *args, **style):
        written.append(text)
        original(fig, x, y, text, *args, **style)

    original = module.write
    monkeypatch.setattr(module, "write", keep)
    return written


@pytest.mark.parametrize("count", [1, 2, 6, 60])
def test_every_lesion_has_a_line_per_channel_whatever_their_number(tmp_path, count, texts):
    rgb = draw(tmp_path / "c.png", [lesion([1.0, 0.4])] * count)
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
    assert rgb.shape[1] == 1600
    labels = [t for t in texts if t.startswith("lesion ")]
    assert labels == [f"lesion {n}" for n in range(count)]
    columns, *_ = module._grid(count)
    wide = (1600 - module._LEFT - module._RIGHT) / columns
    # a solid line at least 2 pixels thick over a third of the cell, a dashed one of half as much
    assert pixels(rgb, COLOURS[0]) > count * wide / 3 * 2
    assert pixels(rgb, COLOURS[1]) > count * wide / 3
    assert pixels(rgb, COLOURS[2]) == pixels(rgb, COLOURS[3]) == 0


def test_the_subtitle_recommends_and_headings_say_who_needs_what(tmp_path, texts):
    # SE after 30 samples: 0.2/√30 = 3.7 % of the peak, below 5 % from sample 16 on; 0.4/√30 = 7.3 %
    infos = [lesion([1.0, 0.4]), lesion([1.0, 0.4], spread=0.4), lesion([2.0, 0.4], spread=0.3)]
    infos = [i._replace(course=Course(((1.0, 0.4),) * 29 + ((1.0, 0.4),), i.course.standard_error)) for i in infos[:2]]
    draw(tmp_path / "c.png", infos)
    assert "met at 16" in texts
    assert "needs 64" in texts
    (subtitle,) = [t for t in texts if "recommended" in t]
    assert subtitle == (
        "2 lesions · 30 samples · standard error within 5 % of the largest peak: 1 of 2 · recommended: 64 samples"
    )


def test_the_subtitle_of_several_lesions_gives_the_median_and_the_span(tmp_path, texts):
    draw(tmp_path / "c.png", [lesion([1.0, 0.4], samples=n) for n in (20, 30, 40)] + [Info(1, 1)])
    (subtitle,) = [t for t in texts if "recommended" in t]
    assert subtitle.startswith("4 lesions · 1 without a course of a peak · 20 to 40 samples · ")
    assert "(half of the lesions need no more than " in subtitle


def test_a_tolerance_once_met_and_lost_again_is_not_met_before(tmp_path, texts):
    errors = [math.nan, 0.04, 0.06, 0.045, 0.04]
    course = Course(((1.0,),) * 5, tuple((e,) for e in errors))
    draw(tmp_path / "c.png", [Info(1, 1, samples=5, course=course)], channels=["FLAIR"])
    assert "met at 4" in texts


@pytest.mark.parametrize(
    "infos",
    [
        [],
        [Info(1, 1)],
        [lesion([0.0, 0.0])._replace(course=Course(((0.0, 0.0),) * 30, ((0.0, 0.0),) * 30))],
        [lesion([1.0, 0.4])._replace(course=Course(((1.0, math.nan),) * 30, ((0.1, 0.1),) * 30))],
    ],
    ids=["none", "one sample", "zero", "not a number"],
)
def test_without_a_course_of_a_peak_the_chart_is_empty(tmp_path, infos, texts):
    rgb = draw(tmp_path / "c.png", infos)
    assert np.ptp(rgb, axis=-1).max() < 20
    assert "no lesion with a course of its peak" in texts


def test_a_merged_course_has_a_gap(tmp_path):
    whole = lesion([1.0, 0.4])
    gap = ((math.nan, math.nan),) * 20
    parts = Course(*((*known[:9], *gap, known[-1]) for known in whole.course))
    full, holed = (draw(tmp_path / "c.png", [i]) for i in (whole, whole._replace(course=parts)))
    assert 0.1 < pixels(holed, COLOURS[0]) / pixels(full, COLOURS[0]) < 0.7


def test_negative_peaks_are_drawn_on_their_side_of_zero(tmp_path):
    rgb = draw(tmp_path / "c.png", [lesion([1.0, -0.8])])
    rows = [np.flatnonzero((np.abs(rgb - colour).max(-1) <= 2).any(1)) for colour in COLOURS[:2]]
    assert rows[0][rows[0] > module._TOP].mean() < rows[1][rows[1] > module._TOP].mean()


def test_the_chart_is_the_same_every_time(tmp_path):
    infos = [lesion([1.0, 0.4], spread) for spread in (0.1, 0.3, 0.5)]
    draw(tmp_path / "a.png", infos)
    draw(tmp_path / "b.png", infos)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_text_that_looks_like_mathematics_is_drawn_as_it_is(tmp_path):
    convergence_figure([lesion([1.0])], ["$x"], ["$y$"], tmp_path / "c.png", unit="$z", tolerance=0.05)
    assert (tmp_path / "c.png").is_file()


def test_what_does_not_fit_is_refused(tmp_path):
    infos, path = [lesion([1.0, 0.4])], tmp_path / "c.png"
    with pytest.raises(ValueError, match="1 infos but 2 labels"):
        convergence_figure(infos, ["a", "b"], ["FLAIR", "T1w"], path, unit="", tolerance=0.05)
    with pytest.raises(ValueError, match="a has peaks of 2 channels, expected 1: FLAIR"):
        convergence_figure(infos, ["a"], ["FLAIR"], path, unit="", tolerance=0.05)
    with pytest.raises(ValueError, match="5 channels: between 1 and 4"):
        convergence_figure(infos, ["a"], list("abcde"), path, unit="", tolerance=0.05)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        convergence_figure(infos, ["a"], ["FLAIR", "T1w"], path, unit="", tolerance=0.0)
    assert not list(tmp_path.iterdir())
