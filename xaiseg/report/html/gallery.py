"""The gallery: a card for each lesion, which the page sorts and filters."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xaiseg.analysis.run_tables import MapKind, present
from xaiseg.report.html import page
from xaiseg.report.html.page import Section, cell, text
from xaiseg.report.html.subject import anchor, volume

MOST = 1000  # cards of a page, by default


class Card(NamedTuple):
    """A lesion: its place in the run's table, the page of its subject, its picture as WebP (none: it could not be drawn) and that
    picture's width and height."""

    place: int
    href: str
    picture: bytes | None
    width: int = 0
    height: int = 0


def chosen(lesions: Mapping[str, np.ndarray], peak: str, scores: np.ndarray, most: int) -> list[int]:
    """Places of the lesions that get a card: all, or `most` of them, the most suspicious and those of the highest peak in turn.

    scores: `(n,)`, of a true lesion, NaN where unknown; where none is known, those of the highest peak alone.
    """
    count = len(lesions["lesion"])
    if count <= most:
        return list(range(count))
    strongest = np.argsort(-np.nan_to_num(lesions[peak], nan=-np.inf), kind="stable").tolist()
    suspicious = (
        np.argsort(np.nan_to_num(scores, nan=np.inf), kind="stable").tolist()
        if np.isfinite(scores).any()
        else strongest
    )
    found: dict[int, None] = {}
    for pair in zip(suspicious, strongest, strict=True):
        for place in pair:
            if len(found) < most:
                found[place] = None
    return sorted(found)


def gallery(
    lesions: Mapping[str, np.ndarray],
    methods: Sequence[MapKind],
    cards: Sequence[Card],
    scores: np.ndarray,
    model: str,
    channels: Sequence[str],
    shown: MapKind,
    why_not: str = "",
) -> Section:
    """The chapter. scores: `(n,)` of `model`, see `chosen`. shown: the method of the pictures' maps. why_not: no pictures."""
    methods = [shown, *(method for method in methods if method is not shown)]
    total = len(lesions["lesion"])
    keys, options = _keys(lesions, methods, scores, model)
    order = _order(cards, keys, options)
    several = len(shown.channels) == len(channels)
    rows = " and ".join(channels) + (" with the saliency of each" if several else f" with {shown.title}")
    body = (
        f'<p class="intro">Rows: {text(rows)}. Columns: axial, coronal, sagittal, through the lesion; the patient\'s right (R) '
        "is on the left. Green: the lesion's outline. Red speaks for the lesion, blue against it; each lesion "
        "has a scale of its own.</p>"
        '<div class="bar" role="img" aria-label="colours from negative to positive"></div><div '
        'class="scale"><span>− peak</span><span>0</span>'
        "<span>+ peak</span></div>"
    )
    if why_not:
        body += page.note(why_not)
    if len(cards) < total:
        body += page.note(
            f"{len(cards)} of {total} lesions are here, the most suspicious and those of the highest peak in "
            f"turn (--gallery N for more); "
            "all of them are on the pages of the subjects."
        )
    groups = "".join(f'<option value="{text(g)}">{text(g)}</option>' for g in present(lesions["group"]))
    body += (
        '<div class="controls"><label>Sort by <select id="sort">'
        + "".join(f'<option data-column="{c}" data-sign="{s}">{text(title)}</option>' for title, c, s in options)
        + f'</select></label><label>Group <select id="group"><option value="">all</option>{groups}</select></label>'
        '<label>Case <input type="search" id="text" placeholder="part of its name" autocomplete="off"></label>'
        '<p id="count" role="status"></p></div>'
    )
    body += (
        '<ul class="cards gallery">\n'
        + "\n".join(_card(lesions, methods, cards[n], keys, scores, channels) for n in order)
        + "\n</ul>"
    )
    if len(cards) > 24:
        body += '<p class="print">In print the first 24 lesions of this order.</p>'
    return Section("gallery", "Gallery of lesions", body)


def _keys(
    lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind], scores: np.ndarray, model: str
) -> tuple[list[np.ndarray], list[tuple[str, int, int]]]:
    """Columns that cards are sorted by, and the options: title, column, 1 for the smallest first and -1 for the largest."""
    keys: list[np.ndarray] = []
    options: list[tuple[str, int, int]] = []
    if np.isfinite(scores).any():
        keys.append(scores)
        options.append((f"suspicion of error ({model})", 0, 1))
    for method in methods:
        for channel in method.channels:
            keys.append(lesions[method.column(channel, "peak")])
            named = channel if channel == method.key or len(methods) == 1 else f"{channel}, {method.key}"
            options.append((f"peak, {named}: highest first", len(keys) - 1, -1))
            options.append((f"peak, {named}: lowest first", len(keys) - 1, 1))
    if "volume_mm3" in lesions:
        keys.append(lesions["volume_mm3"])
        options += [("volume: largest first", len(keys) - 1, -1), ("volume: smallest first", len(keys) - 1, 1)]
    names = sorted(set(lesions["case"].tolist()))
    rank = np.searchsorted(names, lesions["case"]) + lesions["lesion"] / (1 + lesions["lesion"].max())
    keys.append(rank)
    options.append(("case and number", len(keys) - 1, 1))
    return keys, options


def _order(cards: Sequence[Card], keys: Sequence[np.ndarray], options: Sequence[tuple[str, int, int]]) -> list[int]:
    """Places in `cards` by the first option, so that the page is in order before any script runs."""
    _, column, sign = options[0]
    values = sign * np.array([keys[column][card.place] for card in cards])
    return np.argsort(np.nan_to_num(values, nan=np.inf), kind="stable").tolist()


def _card(
    lesions: Mapping[str, np.ndarray],
    methods: Sequence[MapKind],
    card: Card,
    keys: Sequence[np.ndarray],
    scores: np.ndarray,
    channels: Sequence[str],
) -> str:
    place = card.place
    case, number, group = str(lesions["case"][place]), int(lesions["lesion"][place]), str(lesions["group"][place])
    values = [float(f"{key[place]:.7g}") if np.isfinite(key[place]) else None for key in keys]
    method = methods[0]
    peaks = " · ".join(
        f"{'' if c == method.key else c + ' '}{cell(float(lesions[method.column(c, 'peak')][place]))}"
        for c in method.channels
    )
    size = f"{volume(lesions['volume_mm3'][place])} mm³ · " if "volume_mm3" in lesions else ""
    score = f" · score {scores[place]:.2f}" if np.isfinite(scores[place]) else ""
    href = f"{card.href}#{anchor(case, number)}"
    picture = '<span class="pic"></span>'
    if card.picture is not None:
        about = f"Lesion {number} of {case}: three planes of {' and '.join(channels)} with saliency"
        labels = "".join(
            f'<b style="top:{100 * n / len(channels):.0f}%">{text(channel)}</b>' for n, channel in enumerate(channels)
        )
        picture = (
            f'<a class="pic" href="{text(href)}" tabindex="-1"><img loading="lazy" decoding="async" width="{card.width}" '
            f'height="{card.height}" alt="{text(about)}" '
            f'src="data:image/webp;base64,{base64.b64encode(card.picture).decode("ascii")}">{labels}</a>'
        )
    return (
        f'<li class="card" data-group="{text(group)}" data-text="{text(case)}" data-values="{text(json.dumps(values))}">{picture}'
        f'<div><a class="name" href="{text(href)}">{text(case)} · {number}</a> {page.group(group)}<br>'
        f'<span class="figures">{size}peak {peaks}{score}</span></div></li>'
    )
