"""Every case segmented by the model that has not seen its patient, and all of them evaluated together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from training.files import write_whole
from xaiseg.checkpoints import load_model
from xaiseg.cohort import Request, segment
from xaiseg.cohort.evaluate import EvaluationRequest, evaluate
from xaiseg.cohort.predictions import find_pairs
from xaiseg.imaging import Case
from xaiseg.metrics import EvaluationSettings


def evaluate_held_out(
    out: Path, channels: Sequence[str], held_out: Sequence[Sequence[Case]], patients: Mapping[str, str]
) -> Path:
    """What `xaiseg segment` makes of the held-out cases of `out/fold-0`, …, with each fold's model, and `xaiseg evaluate` of all.

    patients: of each case, by name: the splits' own, so that intervals come from the same patients.
    Writes `segmentation/` into each fold's folder, and `predictions.tsv` and `evaluation/` into `out`; returns the last. Raises
    InputError where a scan cannot be used.
    """
    rows = []
    for number, cases in enumerate(held_out):
        fold = out / f"fold-{number}"
        manifest = fold / "held_out.tsv"
        _write(manifest, ["case", *channels, "reference"], [_cells(case, channels) for case in cases])
        segment(load_model(fold / "model"), Request(manifest, fold / "segmentation", overwrite=True))
        pairs = find_pairs(manifest, channels, fold / "segmentation")
        for pair in pairs:
            name = pair.case.name
            rows.append([name, patients[name], str(pair.reference), str(pair.prediction)])
    _write(out / "predictions.tsv", ["case", "patient", "reference", "prediction"], rows)
    evaluate(EvaluationRequest(out / "predictions.tsv", out / "evaluation", overwrite=True), EvaluationSettings())
    return out / "evaluation"


def _cells(case: Case, channels: Sequence[str]) -> list[str]:
    files = [*(case.images[channel] for channel in channels), case.reference]
    return [case.name, *(str(Path(file).absolute()) for file in files if file)]


def _write(file: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    write_whole(file, "".join("\t".join(row) + "\n" for row in [columns, *rows]))
