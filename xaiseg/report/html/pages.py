"""The report of a finished run: one page for all, one per subject, and the figures in files of their own."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xaiseg.analysis.run_tables import MapKind, Run, read_run
from xaiseg.cohort.output import Files
from xaiseg.errors import InputError
from xaiseg.imaging import Case
from xaiseg.imaging.manifest import NONE
from xaiseg.report.canvas import count
from xaiseg.report.html import experiments, methods_text, record, sections
from xaiseg.report.html.findings import VERDICTS, findings
from xaiseg.report.html.gallery import MOST, Card, chosen, gallery
from xaiseg.report.html.material import Material, read_material
from xaiseg.report.html.page import cell, document, slug, text
from xaiseg.report.html.scans import Scans, lesion_voxels, map_file, read_map
from xaiseg.report.html.subject import CaseSheet, LesionCard, Picture, facts_of, map_figures, subject_page
from xaiseg.report.html.subject import volume as size_of
from xaiseg.report.html.thumbnails import Layer, picture, webp
from xaiseg.report.html.viewer import Payload

CARD_PIXELS, PAGE_PIXELS = 88, 132  # sides of a plane


def report(
    out: str | Path,
    *,
    source: str | Path | None = None,
    viewer: bool = True,
    gallery: int = MOST,
    method: str | None = None,
    say: Callable[[str], Any] = print,
) -> list[Path]:
    """Write `OUT/report.html`, `OUT/sub-*.html`, each of which needs no other file, and figures and tables in `OUT/report`.

    A run that is not analysed yet is analysed first. The same run gives the same bytes.

    Args:
        out: the folder of a finished run of `xaiseg explain`.
        source: the run's manifest or BIDS folder, where it is no longer where it was.
        viewer: pages of subjects carry their scans and maps for the 3-D viewer. Without it they are small, and scans that cannot be
            read only mean that there are no pictures.
        gallery: cards of the report, at most; all lesions are on the pages of their subjects.
        method: key of the one whose maps the gallery shows; the run's first by default.
        say: called with the lines of a summary.

    Returns:
        The pages, `report.html` first.

    Raises:
        InputError: the run is unfinished or cannot be read, has no such method, or, with the viewer, none of its scans can be read;
            the folder cannot be written.
    """
    _method(read_run(out), method)  # before an analysis, which takes long
    material = read_material(out, say)
    shown = _method(material.run, method)
    scans, why_not = _open(material, source, viewer)
    pages = _Pages(material, scans, shown, viewer, why_not, gallery)
    root = material.run.root
    staged = Files(root / f".report-{os.getpid()}")  # a report that fails leaves the earlier one as it was
    names = []
    try:
        for subject, cases in tqdm(pages.subjects.items(), desc="report", unit="subject", disable=None):
            names.append(pages.names[subject])
            staged.text(staged.root / names[-1], pages.page(subject, cases))
        if scans and not pages.read and (viewer or source is not None):
            raise InputError(
                f"{pages.flaws[0]}; no scan could be read: give the run's input as --source, or --no-viewer"
            )
        figures = Files(root / "report")
        before = set(figures.root.glob("*"))
        content = _report_page(material, pages, figures, names)
        _write_tables(material, pages, figures)
        for path in before - _written(figures.root, content):
            if path.suffix in (".svg", ".png"):
                path.unlink()
        staged.text(staged.root / "report.html", content)
        for stale in _earlier(root) - {root / name for name in names}:
            stale.unlink()
        written = [root / name for name in ("report.html", *names)]
        for path in written:
            os.replace(staged.root / path.name, path)
    finally:
        shutil.rmtree(staged.root, ignore_errors=True)
    sizes = [path.stat().st_size for path in written]
    say(
        f"{written[0]}: {_size(sizes[0])}, {len(material.run)} lesions, {min(gallery, len(material.run))} of them in the gallery"
    )
    if names:
        say(f"{count(len(names), 'page')} of subjects: {_size(sum(sizes[1:]))}, the largest {_size(max(sizes[1:]))}")
    for flaw in pages.flaws[:3]:
        say(f"note: {flaw}")
    if len(pages.flaws) > 3:
        say(f"note: and {len(pages.flaws) - 3} more scans or maps that cannot be read")
    return written


class _Pages:
    """The pages of subjects, made one after another, and the cards that they leave for the gallery."""

    def __init__(
        self, material: Material, scans: Scans | None, shown: MapKind, viewer: bool, why_not: str, most: int
    ) -> None:
        self.material, self.run, self.scans, self.shown, self.viewer, self.why_not = (
            material,
            material.run,
            scans,
            shown,
            viewer,
            why_not,
        )
        self.channels: tuple[str, ...] = tuple(self.run.identity["model"]["channels"])
        self.model, by_lesion = material.scores()
        lesions = self.run.lesions
        keys = zip(lesions["case"].tolist(), lesions["lesion"].astype(int).tolist(), strict=True)
        self.scores = np.array([by_lesion.get(key, np.nan) for key in keys])
        self.wanted = set(chosen(lesions, shown.column(shown.channels[0], "peak"), self.scores, most))
        self.signed = {m.key: material.signed(m) for m in material.methods}
        self.cards: list[Card] = []
        self.flaws: list[str] = []
        self.read = 0
        self.subjects = _subjects(material)
        self.names = _names(self.subjects)

    def page(self, subject: str, cases: Sequence[str]) -> str:
        payload = Payload() if self.viewer and self.scans else None
        sheets = [self._sheet(name, self.names[subject], payload) for name in cases]
        if payload and not payload.scans:
            payload = None
        why = self.why_not or (
            "No scan of this subject could be read." if self.viewer else "Made without the viewer (--no-viewer)."
        )
        layers = _layers(self.shown, self.channels, with_scan=True)
        rows = [self.channels[c] + ("" if m is None else " with saliency") for c, m in layers]
        return subject_page(subject, sheets, rows, payload, why, _footer(self.material))

    def _sheet(self, name: str, href: str, payload: Payload | None) -> CaseSheet:
        """A case with its lesions; adds to the payload and to the cards."""
        row = next((r for r in self.run.cases if r["case"] == name), {})
        named = {"status": "", "dice": "Dice", "ndsc": "nDSC", "TP": "TP", "FP": "FP", "FN": "FN"}
        facts = [f"{label} {row[key]}" for key, label in named.items() if row.get(key, NONE) != NONE]
        sheet = CaseSheet(name, " · ".join(facts).strip(), [])
        if row.get("message", NONE) not in (NONE, ""):
            sheet.flaws.append(row["message"])
        places = np.flatnonzero(self.run.lesions["case"] == name).tolist()
        volume, voxels = None, {}
        if self.scans and places:
            try:
                volume = self.scans.volume(places[0])
                voxels = lesion_voxels(volume)
                self.read += 1
            except InputError as error:
                self._flaw(sheet, str(error))
        if volume is not None and payload:
            payload.add_scan(name, volume, self.channels)
        for place in places:
            number, group = int(self.run.lesions["lesion"][place]), str(self.run.lesions["group"][place])
            score = self.scores[place]
            facts_line = facts_of(self.run.lesions, place, float(score) if np.isfinite(score) else None)
            card = LesionCard(number, group, facts_line, [], map_figures(self.run.lesions, place, self.run.methods))
            sheet.lesions.append(card)
            own = voxels.get(number)
            small = Card(place, href, None)
            if volume is not None and own is None:
                card.flaws.append("the label map has no such lesion")
            if volume is not None and own is not None:
                if payload:
                    size = (
                        f"{size_of(self.run.lesions['volume_mm3'][place])} mm³"
                        if "volume_mm3" in self.run.lesions
                        else ""
                    )
                    card.show = payload.add_lesion(number, group, size, volume, own)
                for method in self.run.methods:
                    saliency = self._map(place, method, volume, card)
                    if saliency is None and method is not self.shown:
                        continue
                    rows = _layers(method, self.channels, with_scan=method is self.shown)
                    large = picture(volume, own, saliency, rows, PAGE_PIXELS, self.signed[method.key])
                    about = f"Lesion {number} of {name}, {method.title}: axial, coronal and sagittal planes"
                    card.pictures.append(Picture(about, webp(large, 70), large.shape[1], large.shape[0]))
                    if method is self.shown and place in self.wanted:
                        rows = _layers(method, self.channels, with_scan=False)
                        tiles = picture(volume, own, saliency, rows, CARD_PIXELS, self.signed[method.key])
                        small = Card(place, href, webp(tiles), tiles.shape[1], tiles.shape[0])
                    if payload and saliency is not None:
                        names = [
                            c if len(self.run.methods) == 1 or c == method.key else f"{c}, {method.key}"
                            for c in method.channels
                        ]
                        payload.add_map(names, self.signed[method.key], volume, saliency, own)
            if place in self.wanted:
                self.cards.append(small)
        return sheet

    def _map(self, place: int, method: MapKind, volume: Any, card: LesionCard) -> Any:
        path = map_file(self.run, place, method)
        if not path.is_file():
            card.flaws.append(f"no map of {method.key} was saved (xaiseg explain --save-maps crop)")
            return None
        try:
            return read_map(path, volume)
        except InputError as error:
            self._flaw(card, str(error))
            return None

    def _flaw(self, where: CaseSheet | LesionCard, message: str) -> None:
        where.flaws.append(message)
        self.flaws.append(message)


def _report_page(material: Material, pages: _Pages, figures: Files, names: Sequence[str]) -> str:
    run = material.run
    parts = [
        sections.summary(material),
        gallery(
            run.lesions, run.methods, pages.cards, pages.scores, pages.model, pages.channels, pages.shown, pages.why_not
        ),
        sections.groups(material, figures),
        sections.modality(material, figures),
        sections.profiles(material, figures),
        sections.errors(material, figures),
        experiments.context(material, figures),
        experiments.synthetic(material, figures),
        experiments.sanity(material, figures),
        record.failures(material),
        methods_text.section(material),
        record.files(material, names),
    ]
    titles = ", ".join(method.title for method in run.methods)
    started = str(material.log.get("started", ""))[:10]
    return document(
        "What the network saw, lesion by lesion",
        parts,
        ("common.js", "gallery.js"),
        kicker=text(" · ".join(filter(None, ["xaiseg report", material.name, started and f"run of {started}"]))),
        lead=f"{cell(len(run))} lesions in {cell(len(run.cases))} scans, each explained on its own by {text(titles)}.",
        footer=_footer(material),
    )


def _write_tables(material: Material, pages: _Pages, figures: Files) -> None:
    rows = [{"finding": f.text, "compared": VERDICTS[f.verdict] or None} for f in findings(material)]
    figures.table(figures.root / "findings.tsv", ("finding", "compared"), rows)
    lesions = material.run.lesions
    order = np.argsort(np.nan_to_num(pages.scores, nan=np.inf), kind="stable")
    peaks = [m.column(c, "peak") for m in material.methods for c in m.channels]
    columns = ("case", "lesion", "group", *(["volume_mm3"] if "volume_mm3" in lesions else []), *peaks)
    listed = (
        {name: lesions[name][n] for name in columns} | {"lesion": int(lesions["lesion"][n]), "score": pages.scores[n]}
        for n in order
    )
    figures.table(figures.root / "suspicion.tsv", (*columns, "score"), listed)


def _written(folder: Path, content: str) -> set[Path]:
    """The figures that the page names."""
    return {path for path in folder.glob("*") if f"<code>{path.stem}</code>" in content}


def _open(material: Material, source: str | Path | None, viewer: bool) -> tuple[Scans | None, str]:
    """The scans, or why there are none."""
    try:
        return Scans(material.run, source), ""
    except InputError as error:
        if viewer or source is not None:
            raise InputError(
                f"{error}; the report shows the scans: give --source INPUT if they were moved, or --no-viewer"
            ) from None
        return None, f"No pictures, for the scans cannot be read: {error}."


def _earlier(root: Path) -> set[Path]:
    """The pages of subjects that an earlier report left, and nobody else's."""
    made = []
    for path in root.glob("sub-*.html"):
        with path.open(encoding="utf-8", errors="replace") as file:
            made += [path] if '<meta name="generator" content="xaiseg' in file.read(2000) else []
    return set(made)


def _method(run: Run, key: str | None) -> MapKind:
    known = {method.key: method for method in run.methods}
    if key is not None and key not in known:
        raise InputError(f"{run.root}: has no method {key}; its methods are {', '.join(known)}: name one of them")
    return known[key] if key is not None else run.methods[0]


def _layers(method: MapKind, channels: Sequence[str], with_scan: bool) -> list[Layer]:
    """Each channel, alone and with its map; a method's only map is put on each."""
    own = len(method.channels) == len(channels)
    pairs: Iterable[tuple[Layer, Layer]] = ((Layer(c, None), Layer(c, c if own else 0)) for c in range(len(channels)))
    return [layer for pair in pairs for layer in (pair if with_scan else pair[1:])]


def _subjects(material: Material) -> dict[str, list[str]]:
    """The cases of each subject, in the order of the table of cases, but for those of which nothing could be read."""
    lesions = material.run.lesions
    subject_of = dict(zip(lesions["case"].tolist(), lesions["subject"].tolist(), strict=True))
    found: dict[str, list[str]] = {}
    for row in material.run.cases:
        if row["status"] == "failed" and row["case"] not in subject_of:
            continue
        subject = subject_of.get(row["case"]) or Case(row["case"], {}).subject
        found.setdefault(str(subject), []).append(row["case"])
    return found


def _names(subjects: Iterable[str]) -> dict[str, str]:
    """File names of pages, each once whatever the subjects are called."""
    names: dict[str, str] = {}
    for subject in subjects:
        stem, number = f"sub-{slug(subject)}", 1
        while f"{stem}{f'-{number}' * (number > 1)}.html" in names.values():
            number += 1
        names[subject] = f"{stem}{f'-{number}' * (number > 1)}.html"
    return names


def _footer(material: Material) -> str:
    return (
        f"Made by xaiseg {text(material.run.identity.get('xaiseg', ''))} · A saliency map tells what the "
        f"network's output depends on, not what is "
        "true of the patient. Not for clinical use. · The 3-D viewer is NiiVue (BSD-2-Clause, © 2021 niivue)."
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
