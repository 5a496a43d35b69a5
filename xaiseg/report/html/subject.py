"""The page of one subject: every lesion of all its scans in pictures and figures, and the viewer."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from xaiseg.analysis.run_tables import MapKind
from xaiseg.report.html import viewer
from xaiseg.report.html.page import Section, cell, document, group, note, slug, table, text

_MEASURES = ("peak", "minimum", "mean_inside", "mean_ring")
_TITLES = {"peak": "peak", "minimum": "minimum", "mean_inside": "mean inside", "mean_ring": "mean around"}


class Picture(NamedTuple):
    """A WebP with what it shows, and its size in pixels."""

    about: str
    data: bytes
    width: int
    height: int


@dataclass
class LesionCard:
    """A lesion on its page. show: its place in the viewer, '' without one."""

    number: int
    group: str
    facts: str
    pictures: list[Picture]
    figures: list[dict[str, object]]
    show: str = ""
    flaws: list[str] = field(default_factory=list)


@dataclass
class CaseSheet:
    """A scan on its subject's page. facts: one line. flaws: what could not be read, and warnings."""

    name: str
    facts: str
    lesions: list[LesionCard]
    flaws: list[str] = field(default_factory=list)


def volume(value: float) -> str:
    """In mm³, whole from 10 on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def anchor(case: str, lesion: int) -> str:
    return f"{slug(case)}-lesion-{lesion}"


def map_figures(lesions: dict[str, np.ndarray], place: int, methods: Sequence[MapKind]) -> list[dict[str, object]]:
    """A row for each map of a lesion, with its measures."""
    return [
        {"map": channel if channel == method.key or len(methods) == 1 else f"{method.key} {channel}"}
        | {m: float(lesions[method.column(channel, m)][place]) for m in _MEASURES}
        for method in methods
        for channel in method.channels
    ]


def subject_page(
    subject: str,
    cases: Sequence[CaseSheet],
    rows: Sequence[str],
    payload: viewer.Payload | None,
    why_not: str,
    footer: str,
) -> str:
    """The page. rows: what the rows of a picture show. why_not: there is no viewer."""
    count = sum(len(case.lesions) for case in cases)
    opening = viewer.controls() if payload else note(why_not)
    sections = [Section("viewer-section", "3-D viewer", opening)]
    for case in cases:
        body = f'<p class="intro">{text(case.facts)}</p>' + "".join(note(flaw) for flaw in case.flaws)
        if case.lesions:
            body += f'<p class="files">Rows: {text(", ".join(rows))}. Columns: axial, coronal, sagittal.</p>'
            body += (
                '<div class="lesions">' + "\n".join(_lesion(case.name, lesion) for lesion in case.lesions) + "</div>"
            )
        else:
            body += note("No explained lesion.")
        sections.append(Section(f"case-{slug(case.name)}", case.name, body))
    lead = (
        f"{len(cases)} scan{'s' * (len(cases) != 1)}, {count} explained lesion{'s' * (count != 1)}. "
        '<a href="report.html">To the report of all subjects</a>'
    )
    return document(
        f"Subject {subject}",
        sections,
        ("common.js", *(("viewer.js",) if payload else ())),
        kicker="xaiseg · one subject",
        lead=lead,
        footer=footer,
        data=payload.html() if payload else "",
    )


def _lesion(case: str, lesion: LesionCard) -> str:
    images = "".join(
        f'<span class="pic"><img loading="lazy" decoding="async" width="{width}" height="{height}" alt="{text(about)}" '
        f'src="data:image/webp;base64,{base64.b64encode(data).decode("ascii")}"></span>'
        for about, data, width, height in lesion.pictures
    )
    figures = table(
        {"map": "saliency", **{m: _TITLES[m] for m in _MEASURES}}, lesion.figures, f"Saliency of lesion {lesion.number}"
    )
    show = viewer.button(lesion.show, "Show in 3-D") if lesion.show else ""
    flaws = "".join(note(flaw) for flaw in lesion.flaws)
    return (
        f'<article class="lesion" id="{anchor(case, lesion.number)}">{images}<div><h4>Lesion {lesion.number} · '
        f"{group(lesion.group)}</h4>"
        f"<p>{text(lesion.facts)}</p>{flaws}{show}{figures}</div></article>"
    )


def facts_of(lesions: dict[str, np.ndarray], place: int, score: float | None) -> str:
    """Size, place, probability and score of a lesion in a line."""
    parts = [f"{volume(lesions['volume_mm3'][place])} mm³"] if "volume_mm3" in lesions else []
    if all(f"centroid_{a}_mm" in lesions for a in "xyz"):
        parts.append(
            "at " + ", ".join(cell(round(float(lesions[f"centroid_{a}_mm"][place]))) for a in "xyz") + " mm (R, A, S)"
        )
    if "mean_probability" in lesions:
        parts.append(f"mean probability {cell(float(lesions['mean_probability'][place]))}")
    if score is not None:
        parts.append(f"score of a true lesion {cell(score)}")
    return " · ".join(parts)
