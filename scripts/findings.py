"""Which findings of Spagnolo et al. (Scientific Reports 2026) hold for a network and a cohort: every command, then the findings.

    python scripts/findings.py DIR                                         # 40 phantoms, the example network
    python scripts/findings.py DIR --input scans.tsv --model my_model      # your own; references are needed for groups

Each step is a command of `xaiseg`, printed before it runs. Given again, it goes on where it was; what experiments wrote is not
repeated. Tables, pictures and the report are in `DIR/out`; the findings, the sentences of the report, are printed as well.
"""

import argparse
import sys
from pathlib import Path

from xaiseg.cli import main as xaiseg
from xaiseg.demo import write_phantoms
from xaiseg.report.html.findings import VERDICTS, findings
from xaiseg.report.html.material import read_material


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--input", type=Path, help="a manifest or BIDS folder (phantoms)")
    parser.add_argument("--model", default="example", help="a model folder or a name of `xaiseg models` (%(default)s)")
    parser.add_argument("--phantoms", type=int, default=40, help="how many, where no input is given (%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of noise (%(default)s)")
    parser.add_argument("--aggregate", default="signed_max", help="of Jacobian rows (%(default)s)")
    parser.add_argument("--normal", type=int, default=4, help="TN regions in a scan (%(default)s)")
    parser.add_argument("--context", type=int, default=60, help="lesions of the context experiment (%(default)s)")
    parser.add_argument("--volume", default="50:", metavar="A:B", help="their size in mm³ (%(default)s)")
    arguments = parser.parse_args()
    _compute(arguments)
    print()
    for found in findings(read_material(arguments.folder / "out")):
        print("-", found.text, f"**{VERDICTS[found.verdict]}**" if found.verdict else "")
    return 0


def _compute(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    source = arguments.input or folder / "scans" / "manifest.tsv"
    if not source.exists():
        print(f"drawing {arguments.phantoms} phantoms", file=sys.stderr)
        write_phantoms(source.parent, arguments.phantoms)
    out, missed, regions, normal = (folder / name for name in ("out", "missed", "regions", "normal"))
    model = ("--model", arguments.model)
    how = (*model, "--samples", arguments.samples, "--aggregate", arguments.aggregate, "--no-pictures")
    _run("explain", source, out, *how)
    found_all = xaiseg(_said("explain", source, missed, *how, "--instances", "missed")) and not missed.exists()
    if not (regions / "manifest.tsv").exists():
        _run("true-negatives", out, regions, "--most", arguments.normal)
    _run("explain", regions / "manifest.tsv", normal, *how, "--instances", "given")
    _run("analyse", out, *(() if found_all else ("--missed", missed)), "--normal", normal)
    if not (out / "analysis/context.json").exists():
        _run("context", out, *model, "--lesions", arguments.context, "--volume", arguments.volume)
    for experiment in ("synthetic", "counterfactual", "sanity"):
        if not (out / f"analysis/{experiment}.json").exists():
            _run(experiment, out, *model)
    _run("report", out)


def _run(*command: object) -> None:
    if status := xaiseg(_said(*command)):
        raise SystemExit(status)


def _said(*command: object) -> list[str]:
    words = [str(word) for word in command]
    print("\n$ xaiseg", *words, flush=True)
    return words


if __name__ == "__main__":
    sys.exit(main())
