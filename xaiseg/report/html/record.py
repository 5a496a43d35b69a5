"""The last chapters of a report: what failed, and what the run and this report consist of."""

from collections.abc import Sequence

from xaiseg.imaging.manifest import NONE
from xaiseg.report.html import page
from xaiseg.report.html.material import Material
from xaiseg.report.html.page import Section, text

_MOST = 200  # lines of a table of failures; all are in the TSV
_WHAT = {
    "lesions.tsv": "a row per lesion with the figures of its maps; lesions.json explains the columns",
    "cases.tsv": "a row per scan; cases.json explains the columns",
    "analysis/": "tables and pictures of `xaiseg analyse` and of the experiments; the .json beside them explain the columns",
    "report/": "the figures of this report as PNG and SVG, findings.tsv, and suspicion.tsv: lesions, the likeliest errors first",
    "sub-*.html": "a page per subject with all its lesions and the 3-D viewer",
    "sub-*/": "probabilities, masks, numbered lesions and saliency maps as NIfTI, as BIDS derivatives",
    "logs/": "settings, times, failures",
}


def failures(material: Material) -> Section:
    """Cases that failed, lesions that failed, warnings."""
    cases = [row for row in material.run.cases if row["status"] in ("failed", "partial")]
    warned = [
        row for row in material.run.cases
        if row.get("message", NONE) not in (NONE, "") and row["status"] not in ("failed", "partial")
    ]  # fmt: skip
    empty = sum(row["status"] == "empty" for row in material.run.cases)
    body = ""
    if not cases and not material.failures:
        body += "<p>Nothing failed.</p>"
    columns = {"case": "case", "status": "status", "message": "what went wrong"}
    if cases:
        body += page.table(
            columns, cases[:_MOST], f"{len(cases)} cases that failed, whole or in part (cases.tsv)", wide=("message",)
        )
    if material.failures:
        names = {"case": "case", "unit": "step", "lesion": "lesion", "message": "what went wrong"}
        body += page.table(
            names,
            material.failures[:_MOST],
            f"{len(material.failures)} failures (logs/failures.tsv)",
            wide=("message",),
        )
    if cases or material.failures:
        body += page.note(
            "Give the same xaiseg explain command again: what failed is tried again, what is done is kept."
        )
    if warned:
        body += page.table(columns, warned[:_MOST], f"{len(warned)} scans with a warning", wide=("message",))
    if empty:
        body += f"<p>{empty} scan{'s' * (empty != 1)} had nothing to explain.</p>"
    if max(len(cases), len(material.failures), len(warned)) > _MOST:
        body += page.note(f"The first {_MOST} lines of each table; all are in the files.")
    return Section("failures", "Failures and warnings", body)


def files(material: Material, pages: Sequence[str]) -> Section:
    """What lies where, and by what it was made."""
    rows = [{"file": name, "what": what} for name, what in _WHAT.items()]
    body = page.table({"file": "in the run's folder", "what": "what it is"}, rows, "Files", wide=("what",))
    links = ", ".join(f'<a href="{text(name)}">{text(name.removesuffix(".html"))}</a>' for name in pages)
    body += (
        f"<details{' open' if len(pages) <= 40 else ''}><summary>{len(pages)} pages of "
        f"subjects</summary><p>{links}</p></details>"
    )
    tables = sorted(name for record in material.records.values() for name in record.get("files", ()))
    body += (
        f'<p class="files">In <code>analysis/</code>: {", ".join(f"<code>{text(name)}</code>" for name in tables)}.</p>'
    )
    versions = material.log.get("versions", {})
    analysed = material.records["analysis"].get("versions", {})
    names = list(dict.fromkeys((*versions, *analysed)))
    lines = [{"name": n, "run": versions.get(n, NONE), "analysis": analysed.get(n, NONE)} for n in names]
    body += page.table({"name": "software", "run": "of the run", "analysis": "of the analysis"}, lines, "Versions")
    facts = {
        "started": material.log.get("started"),
        "seconds": material.log.get("seconds"),
        "device": (material.log.get("device") or {}).get("kind"),
        "hash of the network": material.run.identity["model"].get("hash"),
    }
    shown = [{"fact": name, "value": str(value)} for name, value in facts.items() if value is not None]
    if shown:
        body += page.table({"fact": "the run", "value": ""}, shown, "The run", wide=("value",))
    return Section("files", "Files and versions", body)
