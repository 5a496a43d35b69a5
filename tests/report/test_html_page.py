"""Pages: text that is hostile stays text, nothing is loaded from elsewhere, figures as they are read."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from xaiseg.report.html import page
from xaiseg.report.html.page import POLICY, Section, cell, document, inert_json, p_value, slug, table

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


class Elements(HTMLParser):
    """Tags with their attributes, of all elements."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_hostile_text_makes_no_element():
    body = (
        table({"a": HOSTILE}, [{"a": HOSTILE}], HOSTILE)
        + page.group(HOSTILE)
        + page.note(HOSTILE)
        + page.missing(HOSTILE, HOSTILE)
    )
    html = document(
        HOSTILE,
        [Section("one", HOSTILE, body)],
        ("common.js",),
        kicker="",
        lead="",
        footer="",
        data=inert_json("d", [HOSTILE]),
    )
    tags = [tag for tag, _ in Elements(html).found]
    assert "img" not in tags
    assert tags.count("script") == 2
    assert not [name for _, attributes in Elements(html).found for name in attributes if name.startswith("on")]
    (inside,) = re.findall(r'<script type="application/json" id="d">(.*?)</script>', html, re.DOTALL)
    assert json.loads(inside) == [HOSTILE]


def test_nothing_comes_from_elsewhere():
    html = document(
        "t", [Section("one", "One", "<p>x</p>")], ("common.js", "gallery.js"), kicker="", lead="", footer=""
    )
    (policy,) = [a["content"] for tag, a in Elements(html).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == POLICY
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    assert "url(" not in html
    assert "@import" not in html


def test_scripts_are_closed_by_nothing_in_them():
    for name in ("common.js", "gallery.js", "viewer.js"):
        assert "</script" not in page.asset(name)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "n/a"), (float("nan"), "n/a"), (0.0, "0"), (-0.12345, "−0.123"), (3, "3"), (12345, "12\u202f345"), (1234.6, "1235"),
     ("TP", "TP"), (np.int64(7), "7"), (float("inf"), "beyond")],
)  # fmt: skip
def test_figures_as_they_are_read(value, shown):
    assert cell(value) == shown


def test_small_p_values():
    assert [p_value(p) for p in (1e-9, 0.012345, 0.5, float("nan"), None)] == ["< 0.0001", "0.012", "0.5", "n/a", "n/a"]


def test_anchors_are_plain():
    assert slug("sub-01_ses-1") == "sub-01_ses-1"
    assert slug("../<b> x") == "b-x"
    assert slug("//") == "x"


def test_niivue_is_the_vendored_file():
    import base64
    import gzip
    import hashlib

    script = gzip.decompress(base64.b64decode(page.niivue()))
    # of dist/niivue.umd.js in @niivue/niivue 0.69.0
    assert hashlib.sha256(script).hexdigest() == "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
    assert b"</script" not in script
