"""Panels: every point is drawn, SVG repeats, and may stand in a page beside others."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from xaiseg.cohort.output import Files
from xaiseg.report.html.charts import GROUPS, Line, dots, intervals, lines, save, scatter, svg

LINES = [Line("TP", [0, 1, 2], [1, 2, 3.0], [0.5, 1.5, 2], [1.5, 2.5, 4]), Line("all, logistic", [0, 1], [1, 1.0])]


def figures():
    rng = np.random.default_rng(0)
    groups = np.array(["TP"] * 9 + ["FP"] * 5 + ["other"] * 4 + ["FN"] * 3)
    values = rng.standard_normal(21)
    values[0] = np.nan
    yield dots(values, groups, "Peak, FLAIR", "Δlogit")
    yield scatter(values, -values, groups, "Peak", "T1w", "FLAIR")
    yield lines(LINES, "A", "x", "y", border=True, diagonal=True, level=0.5, faint=LINES)
    yield intervals(
        [("one", 0.5, 0.1, 0.9), ("a name that is very long indeed", 0.2, np.nan, np.nan)],
        "B",
        "x",
        reference=0.0,
        dots_of=[values],
    )


@pytest.mark.parametrize("number", range(4))
def test_svg_repeats_and_is_readable_in_a_page(number, tmp_path):
    first, second = (list(figures())[number] for _ in range(2))
    text = svg(first, "salt")
    assert text == svg(second, "salt")
    ElementTree.fromstring(text)
    assert "<metadata" not in text
    inline = save(first, Files(tmp_path), "chart")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")
    with Image.open(tmp_path / "chart.png") as image:
        assert image.width == 720
    assert "http" not in inline
    assert "<style" not in inline
    assert "DejaVu" not in inline
    assert re.match(r'<svg [^>]*width="360" height="\d+"', inline)
    sizes = [float(s) for s in re.findall(r"([\d.]+)px", inline)]
    assert min(sizes) * 100 / 72 >= 9


def test_every_lesion_is_a_dot():
    counts = {"TP": 300, "FP": 40, "FN": 7, "TN": 5}
    groups = np.repeat(list(counts), list(counts.values()))
    text = svg(dots(np.linspace(-1, 2, len(groups)), groups, "Peak", "unit"), "salt")
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', text)
    ends = [(path.count("M"), style) for path, style in paths if "stroke-linecap" in style and path.count("M") > 1]
    assert [count for count, _ in ends] == [300, 40]
    assert "round" in ends[0][1]
    assert "square" in ends[1][1]
    assert len(re.findall("<use", text)) >= 12  # triangles are marks of their own
    for group in GROUPS:
        assert f"{group}, {counts[group]}" in text


def test_dots_are_in_the_png_too(tmp_path):
    values, groups = np.linspace(0, 1, 40), np.array(["TP"] * 40)
    save(dots(values, groups, "Peak", "unit"), Files(tmp_path), "chart")
    with Image.open(tmp_path / "chart.png") as image:
        pixels = np.asarray(image.convert("RGB"), int)
    blue = (pixels[..., 2] > pixels[..., 0] + 60) & (pixels[..., 2] > 150)
    assert ndimage.label(blue[:450])[1] >= 30  # some touch, some lie under a bar
