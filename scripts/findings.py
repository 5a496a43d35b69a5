"""Which findings of Spagnolo et al. (Scientific Reports 2026) hold for a network and a cohort: every command of it, then a table.

    python scripts/findings.py DIR                                         # 40 phantoms, the example network
    python scripts/findings.py DIR --input scans.tsv --model my_model      # your own; references are needed for groups

Each step is a command of `xaiseg`, printed before it runs. Given again, it goes on where it was; experiments that are written are not
repeated. Tables, pictures and the report are in `DIR/out`; the table of findings is printed and written to `DIR/findings.md`.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from xaiseg.cli import main as xaiseg
from xaiseg.demo import write_phantoms

Rows = list[dict[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--input", type=Path, help="a manifest or BIDS folder (phantoms)")
    parser.add_argument("--model", default="example", help="a model folder or a name of `xaiseg models` (%(default)s)")
    parser.add_argument("--phantoms", type=int, default=40, help="how many, where no input is given (%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of noise (%(default)s)")
    parser.add_argument("--aggregate", default="signed_max", help="of Jacobian rows (%(default)s)")
    parser.add_argument("--normal", default=None, metavar="1,2,…", help="labels of the TN regions to explain (all)")
    parser.add_argument("--context", type=int, default=60, help="lesions of the context experiment (%(default)s)")
    parser.add_argument("--volume", default="50:", metavar="A:B", help="their size in mm³ (%(default)s)")
    arguments = parser.parse_args()
    _compute(arguments)
    lines = list(_table(arguments.folder / "out"))
    (arguments.folder / "findings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
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
    _run("explain", source, missed, *how, "--instances", "missed")
    if not (regions / "manifest.tsv").exists():
        _run("true-negatives", out, regions)
    which = ("--lesions", arguments.normal) if arguments.normal else ()
    _run("explain", regions / "manifest.tsv", normal, *how, "--instances", "given", *which)
    _run("analyse", out, "--missed", missed, "--normal", normal)
    if not (out / "analysis/context.json").exists():
        _run("context", out, *model, "--lesions", arguments.context, "--volume", arguments.volume)
    for experiment in ("synthetic", "sanity"):
        if not (out / f"analysis/{experiment}.json").exists():
            _run(experiment, out, *model)
    _run("report", out)


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    print("\n$ xaiseg", *words, flush=True)
    if status := xaiseg(words):
        raise SystemExit(status)


def _table(out: Path) -> Iterator[str]:
    yield "| finding of the paper | here | holds |"
    yield "|---|---|---|"
    read = {name: _read(out / f"analysis/{name}.tsv") for name in ("groups", "comparisons", "modality", "error_detection")}
    for row in read["modality"]:
        if row["group"] == "all" and row["quantity"] in ("peak", "mass"):
            a, b = row["channel_a"], row["channel_b"]
            ratio, low, high = (float(row[name]) for name in ("ratio", "ratio_low", "ratio_high"))
            text = f"{row['quantity']}: {a} / {b} {ratio:.3g} ({low:.3g} to {high:.3g}), larger in {float(row['larger_a']):.0%} of lesions"
            yield f"| {a} over {b} | {text} | {_holds(low > 1, high < 1)} |"
    for channel in dict.fromkeys(row["channel"] for row in read["groups"]):
        inside, around = (
            next(r for r in read["groups"] if (r["group"], r["channel"], r["measure"]) == ("TP", channel, measure))
            for measure in ("mean_inside", "mean_ring")
        )
        text = f"TP: median mean inside {float(inside['median']):+.3g}, in the ring around {float(around['median']):+.3g}"
        yield f"| positive inside, negative around: {channel} | {text} | {_holds(_above(inside) and _below(around), not (_above(inside) and _below(around)))} |"
    for row in read["comparisons"]:
        pair = row["group_a"], row["group_b"]
        if row["measure"] == "peak" and pair in (("TP", "FP"), ("FP", "FN"), ("FN", "TN")):
            if "n/a" in (row["cliffs_delta"], row["delta_low"]):
                yield f"| {' > '.join(pair)}: peak, {row['channel']} | too few | n/a |"
                continue
            delta, low, high = (float(row[name]) for name in ("cliffs_delta", "delta_low", "delta_high"))
            text = f"δ {delta:+.2f} ({low:+.2f} to {high:+.2f}), n {row['n_a']} and {row['n_b']}, clustered p {row['p_clustered_holm']}"
            yield f"| {' > '.join(pair)}: peak, {row['channel']} | {text} | {_holds(low > 0, high < 0)} |"
    for row in _read(out / "analysis/context_summary.tsv"):
        if row["distance_mm"] == "n/a":
            estimate = "not reached" if row["estimate"] == "n/a" else f"{float(row['estimate']):.3g} mm ({row['low']} to {row['high']})"
            verdict = _holds(row["estimate"] != "n/a" and 7 <= float(row["estimate"]) <= 15, True)
            yield f"| context of 7 to 15 mm | {row['measure'].removesuffix('_mm').replace('_', ' ')}: {estimate} | {verdict} |"
    for row in read["error_detection"]:
        text = ", ".join(
            f"{name} {float(row[f'{key}_before']):.2f} to {float(row[f'{key}_after']):.2f}" for name, key in (("PPV", "ppv"), ("F1", "f1"))
        )
        interval = f"{float(row['auroc']):.3f} ({float(row['auroc_low']):.3f} to {float(row['auroc_high']):.3f})"
        yield f"| saliency tells TP from FP | {row['model']}: AUROC {interval}; {text} | {_holds(float(row['auroc_low']) > 0.5, float(row['auroc_high']) < 0.5)} |"


def _holds(yes: bool, no: bool) -> str:
    return "yes" if yes else "no" if no else "unclear"


def _above(row: dict[str, str]) -> bool:
    return float(row["q1"]) > 0


def _below(row: dict[str, str]) -> bool:
    return float(row["q3"]) < 0


def _read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


if __name__ == "__main__":
    sys.exit(main())
