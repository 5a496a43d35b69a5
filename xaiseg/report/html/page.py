"""Pages of HTML that need nothing else: text is escaped, styles and scripts are inlined, the network is forbidden."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import numpy as np

from xaiseg._version import __version__
from xaiseg.imaging.manifest import NONE
from xaiseg.report.canvas import number

# What the page may load: itself. NiiVue is unpacked into a blob, and reads volumes and its font from there.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src data: blob:",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline' blob:",
        "connect-src data: blob:",
        "worker-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
_KNOWN = ("TP", "FP", "FN", "TN")


class Section(NamedTuple):
    """A chapter: its anchor, title, and HTML."""

    anchor: str
    title: str
    body: str


def asset(name: str) -> str:
    return files("xaiseg.report.html").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def niivue() -> str:
    """NiiVue, compressed, in base64."""
    packed = files("xaiseg.report.html").joinpath("assets", "niivue-0.69.0.umd.js.gz").read_bytes()
    return base64.b64encode(packed).decode("ascii")


def text(value: Any) -> str:
    """Any text as HTML, in elements and in quoted attributes."""
    return escape(str(value), quote=True)


def document(
    title: str,
    sections: Sequence[Section],
    scripts: Iterable[str],
    *,
    kicker: str,
    lead: str,
    footer: str,
    data: str = "",
) -> str:
    """A whole page. scripts: names of assets. lead, footer, data: HTML."""
    body = "\n".join(
        f'<section id="{s.anchor}">\n<h2><a href="#{s.anchor}">{text(s.title)}</a></h2>\n{s.body}\n</section>'
        for s in sections
    )
    return Template(asset("page.html")).substitute(
        policy=text(POLICY),
        generator=f"xaiseg {__version__}",
        title=text(title),
        style=Template(asset("style.css")).safe_substitute(bar=_gradient()),
        kicker=kicker,
        lead=lead,
        contents="\n".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections),
        body=body,
        footer=footer,
        data=data,
        script="\n".join(asset(name) for name in scripts),
    )


def inert(name: str, content: str, kind: str = "application/octet-stream") -> str:
    """Data that lie in the page as text until a script asks for them."""
    return f'<script type="{kind}" id="{name}">{content}</script>'


def inert_json(name: str, value: Any) -> str:
    """The same for JSON, in which no text can end the element."""
    content = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return inert(
        name, content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"), "application/json"
    )


def table(
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    caption: str = "",
    wide: Sequence[str] = (),
    html: Sequence[str] = (),
) -> str:
    """A table that scrolls in a box of its own. columns: heading by name. wide: columns of long texts. html: of HTML."""
    lefts = {name for name in columns if any(isinstance(row.get(name), str) for row in rows)}
    head = "".join(f'<th scope="col"{_left(name in lefts)}>{text(title)}</th>' for name, title in columns.items())
    lines = []
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            shown = str(value) if name in html else text(cell(value))
            cells.append(f"<td{_left(name in lefts, name in wide)}>{shown}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    said = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{text(caption or "table")}"><table>{said}<thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def cell(value: Any) -> str:
    """A figure of a table as it is read: three digits, whole numbers whole, n/a for what is not there."""
    if value is None:
        return NONE
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | np.integer):
        whole = int(value)
        return f"{whole:,}".replace(",", "\u202f") if abs(whole) >= 10_000 else str(whole)
    if not np.isfinite(value):
        return "beyond" if np.isinf(value) else NONE
    return number(float(value), "#.3g" if abs(value) < 1000 else ".0f", plus=False)


def p_value(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return NONE
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def group(name: str) -> str:
    """A group with its colour and its mark."""
    return f'<span class="group {name if name in _KNOWN else "any"}">{text(name)}</span>'


def note(message: str) -> str:
    return f'<p class="note">{text(message)}</p>'


def missing(what: str, command: str) -> str:
    """What is not there, and the command it comes by."""
    return f'<p class="note">{text(what)} Run <code>{text(command)}</code>.</p>'


def charts(drawn: Sequence[tuple[str, str, str]]) -> str:
    """Panels beside each other: SVG, file stem and description of each."""
    panels = "\n".join(f'<figure role="img" aria-label="{text(about)}">{svg}</figure>' for svg, _, about in drawn)
    stems = ", ".join(f"<code>{text(stem)}</code>" for _, stem, _ in drawn)
    two = " two" if len(drawn) % 2 == 0 else ""
    files = f'<p class="files">As PNG and SVG in <code>report/</code>: {stems}.</p>'
    return f'<div class="charts{two}">\n{panels}\n</div>\n{files}'


def slug(name: str) -> str:
    """An anchor or file name of any text."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "x"


def _left(yes: bool, wide: bool = False) -> str:
    names = " ".join(filter(None, ["t" if yes else "", "w" if wide else ""]))
    return f' class="{names}"' if names else ""


def _gradient() -> str:
    """The colours of a signed map on the grey of tissue, as CSS."""
    from xaiseg.report.html.thumbnails import colours

    table = colours(True)
    stops = table[np.linspace(0, len(table) - 1, 25).astype(int)]
    mixed = np.rint(255 * (stops[:, :3] * stops[:, 3:] + 0.35 * (1 - stops[:, 3:]))).astype(int)
    return "linear-gradient(90deg, " + ", ".join(f"rgb({r} {g} {b})" for r, g, b in mixed) + ")"
