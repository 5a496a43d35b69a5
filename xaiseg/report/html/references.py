"""The literature that a report may cite, `assets/references.json`, as text and as BibTeX."""

import json
from collections.abc import Iterable
from typing import NamedTuple

from xaiseg.report.html.page import asset

_MARKS = {"{\\'e}": "é", "{\\`e}": "è", '{\\"u}': "ü", '{\\"O}': "Ö", "{\\c{C}}": "Ç", "{\\c{c}}": "ç"}


class Reference(NamedTuple):
    """short: as cited in a text. kind, fields: of BibTeX."""

    short: str
    kind: str
    fields: dict[str, str]


REFERENCES = {
    key: Reference(entry.pop("short"), entry.pop("kind"), entry)
    for key, entry in json.loads(asset("references.json")).items()
}


def bibtex(keys: Iterable[str]) -> str:
    """The entries, each once, in the order they are cited."""
    entries = []
    for key in dict.fromkeys(keys):
        reference = REFERENCES[key]
        fields = ",\n".join(f"  {name} = {{{value}}}" for name, value in reference.fields.items())
        entries.append(f"@{reference.kind}{{{key},\n{fields}\n}}")
    return "\n\n".join(entries)


def listed(key: str) -> str:
    """The entry of a list of references."""
    fields = REFERENCES[key].fields
    author = fields["author"].replace(" and others", " et al.").replace(" and ", "; ")
    for mark, letter in _MARKS.items():
        author = author.replace(mark, letter)
    place = f"arXiv:{fields['eprint']}" if "eprint" in fields else fields.get("journal") or fields["booktitle"]
    volume = f" {fields['volume']}" if "volume" in fields else ""
    pages = f":{fields['pages'].replace('--', '–')}" if "pages" in fields else ""
    doi = f". doi:{fields['doi']}" if "doi" in fields else ""
    title = fields["title"].replace("{", "").replace("}", "")
    return f"{author.removesuffix('.')}. {title}. {place}{volume}{pages}, {fields['year']}{doi}."
