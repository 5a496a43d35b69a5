"""A finished run with scans, label maps and saliency maps, written by hand: what its report shows is then known."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.analysis import simulated_run
from xaiseg.analysis.analyse import analyse
from xaiseg.analysis.errors import detect_errors
from xaiseg.models import ModelSpec

CHANNELS = ("FLAIR", "T1w")
SHAPE = (24, 28, 20)
# Stored to the left and to the back: pictures have to turn it.
AFFINE = np.array([[-2.0, 0, 0, 24], [0, -2.0, 0, 28], [0, 0, 2.0, -20], [0, 0, 0, 1]])
SPEC = ModelSpec(
    "unet", {"channels": [4, 8], "strides": [2], "out_channels": 2, "norm": "none"}, CHANNELS, (16, 16, 16),
    default_layer="bottleneck.conv", threshold=0.45, source="tiny.pth",
)  # fmt: skip
SETTINGS = {
    "aggregate": "signed_max", "target": "logit", "statistic": "mean", "samples": 37, "noise": 0.07,
    "noise_reference_channel": "FLAIR",    "tolerance": None, "seed": 11,
}  # fmt: skip
CORNERS = [(4, 5, 4), (13, 5, 4), (4, 15, 4), (13, 15, 4), (4, 5, 12), (13, 5, 12)]


def lesion_box(number):
    """The voxels of lesion 1, 2, …: a box of 3 x 4 x 2 at its own corner."""
    return tuple(slice(a, a + n) for a, n in zip(CORNERS[number - 1], (3, 4, 2), strict=True))


def write_report_run(
    root, patients=3, levels=None, each=2, maps=True, method="smoothgrad", channels=CHANNELS, hostile="", **more
):
    """A run in `root/run` on scans in `root/scans`; returns the former. levels: mean peak by group. hostile: part of names."""
    rng = np.random.default_rng(0)
    rows = simulated_run.lesions(rng, patients, levels or {"TP": 3.0, "FP": 1.5}, each)
    for row in rows:
        row["case"] = f"sub-{row['subject']}{hostile}" if hostile else row["case"]
        for n, axis in enumerate("xyz"):
            centre = np.array([b.start + (b.stop - b.start - 1) / 2 for b in lesion_box(row["lesion"])])
            row[f"centroid_{axis}_mm"] = (AFFINE[:3, :3] @ centre + AFFINE[:3, 3])[n]
        if method != "smoothgrad" or channels != CHANNELS:
            figures = {k: row.pop(k) for k in list(row) if k.startswith("smoothgrad_")}
            for channel in channels:
                source = "FLAIR" if channel not in CHANNELS else channel
                for measure in simulated_run.MEASURES:
                    column = f"{method}_{measure}" if channel == method else f"{method}_{channel}_{measure}"
                    row[column] = figures[f"smoothgrad_{source}_{measure}"]
    run = simulated_run.write_run(root / "run", rows, source=root / "scans/manifest.tsv", **more)
    settings = json.loads((run / "logs/settings.json").read_text())
    settings["identity"] |= {"model": {**asdict(SPEC), "hash": "abc"}, "methods": {method: SETTINGS}, "min_voxels": 6}
    (run / "logs/settings.json").write_text(json.dumps(settings))
    sidecar = {"Method": "SmoothGrad, signed maximum", "MethodKey": method, "Units": "Δlogit", "Channels": channels}
    (run / f"desc-{method}_saliency.json").write_text(json.dumps(sidecar))
    lines = ["case\tFLAIR\tT1w\tpatient"]
    (root / "scans").mkdir()
    for case, subject in dict.fromkeys((row["case"], row["subject"]) for row in rows):
        mine = [row for row in rows if row["case"] == case]
        image, labels = scan(rng, [row["lesion"] for row in mine])
        for c, channel in enumerate(CHANNELS):
            nib.save(nib.Nifti1Image(image[..., c], AFFINE), root / f"scans/{subject}_{channel}.nii.gz")
        lines.append(f"{case}\t{subject}_FLAIR.nii.gz\t{subject}_T1w.nii.gz\t{subject}")
        row = {"subject": subject, "case": f"sub-{subject}"}
        simulated_run.write_volume(run, row, "space-orig_desc-instances_dseg.nii.gz", labels, AFFINE)
        for one in mine if maps else ():
            values, affine = saliency(rng, one["lesion"], len(channels))
            name = f"space-orig_desc-{method}_lesion-{one['lesion']:03d}_saliency.nii.gz"
            simulated_run.write_volume(run, row, name, values, affine)
    (root / "scans/manifest.tsv").write_text("\n".join(lines) + "\n")
    return run


def scan(rng, lesions):
    """`(X, Y, Z, 2)` intensities, 0 at the edge, and the label map."""
    image = np.zeros((*SHAPE, 2), np.float32)
    image[2:-2, 2:-2, 2:-2] = 100 + 10 * rng.standard_normal((*(n - 4 for n in SHAPE), 2))
    labels = np.zeros(SHAPE, np.uint8)
    for number in lesions:
        labels[lesion_box(number)] = number
        image[lesion_box(number)] += (60, -40)
    return image, labels


def saliency(rng, number, channels):
    """A map that begins two voxels before the lesion: high in it, slightly negative around, with its affine."""
    start = np.array([b.start for b in lesion_box(number)]) - 2
    values = -0.1 * rng.random((7, 8, 6, channels)).astype(np.float32)
    values[2:5, 2:6, 2:4] = 1 + rng.random((3, 4, 2, channels))
    affine = AFFINE.copy()
    affine[:3, 3] = AFFINE[:3, :3] @ start + AFFINE[:3, 3]
    return values, affine


def quick(patch, figures=False):
    """Without what takes long and has tests of its own: mixed models, boosting, the analysis' pictures, figures."""
    for name in ("group_figure", "profile_figure", "error_figure"):
        patch.setattr(
            f"xaiseg.analysis.analyse.{name}", lambda *args, **_: next(a for a in args if isinstance(a, Path)).touch()
        )
    patch.setattr("xaiseg.analysis.groups.has_mixed_models", lambda: False)
    patch.setattr("xaiseg.report.html.sections.MEASURES", ("peak", "minimum"))
    patch.setattr(detect_errors, "__defaults__", (40, 0, ("logistic",)))
    patch.setattr("xaiseg.report.html.material.analyse", partial(analyse, resamples=40))
    if not figures:
        for name in ("dots", "lines", "intervals", "scatter"):
            patch.setattr(f"xaiseg.report.html.charts.{name}", lambda *_, **__: None)
        patch.setattr("xaiseg.report.html.charts.save", no_figure)


def no_figure(_, files, stem):
    for end in ("svg", "png"):
        files.text(files.root / f"{stem}.{end}", "")
    return "<svg></svg>"
