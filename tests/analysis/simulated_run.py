"""The folder of a finished run, written by hand: what an analysis finds in it is then known."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

CHANNELS = ("FLAIR", "T1w")
MEASURES = ("peak", "minimum", "mean_inside", "mean_ring", "positive_mass", "negative_mass")
COUNTED = ("TP", "FP", "FN")


def figures(level, rng, ratio=3.0):
    """Figures of one lesion whose FLAIR peak is `level` and whose T1w peak is `ratio` times smaller, up to noise."""
    row = {}
    for name, peak in (("FLAIR", level), ("T1w", level / ratio * np.exp(0.1 * rng.standard_normal()))):
        values = peak, -0.4 * peak, 0.5 * peak, -0.1 * peak, 40 * peak, -20 * peak
        row |= {f"smoothgrad_{name}_{m}": v for m, v in zip(MEASURES, values, strict=True)}
    return row


def lesions(rng, patients, levels, each=3, spread=0.3):
    """`each` lesions of every group for each patient, with a level of its own; `levels`: the mean peak by group."""
    rows = []
    for patient in range(patients):
        base = spread * rng.standard_normal()
        for number in range(each * len(levels)):
            group = list(levels)[number % len(levels)]
            peak = max(levels[group] + base + 0.3 * rng.standard_normal(), 0.05)
            size = int(rng.integers(10, 90))
            rows.append(
                {"case": f"sub-{patient:02d}", "subject": f"{patient:02d}", "session": "n/a", "lesion": number + 1}
                | {"group": group, "voxels": size, "volume_mm3": float(size), "mean_probability": rng.uniform(0.4, 1)}
                | figures(peak, rng)
            )
    return rows


def write_run(root: Path, rows, instances="predicted", missed=2, hashed="abc", status="done", source="", samples=50):
    """`rows`: of lesions.tsv; every case of theirs has `missed` FN."""
    (root / "logs").mkdir(parents=True)
    identity = {
        "command": "explain",
        "instances": instances,
        "model": {"hash": hashed, "channels": list(CHANNELS)},
        "methods": {"smoothgrad": {"samples": samples}},
    }
    (root / "logs/settings.json").write_text(json.dumps({"identity": identity, "input": str(source)}))
    sidecar = {"Method": "SmoothGrad", "Units": "Δlogit", "Channels": CHANNELS}
    (root / "desc-smoothgrad_saliency.json").write_text(json.dumps(sidecar))
    table(root / "lesions.tsv", rows)
    cases = []
    for case in dict.fromkeys(row["case"] for row in rows):
        groups = [row["group"] for row in rows if row["case"] == case]
        counts = {"TP": groups.count("TP"), "FP": groups.count("FP"), "FN": missed}
        cases.append({"case": case, "status": status, **(counts if "unlabelled" not in groups else {})})
    table(root / "cases.tsv", cases)
    return root


def table(path, rows):
    lines = ["\t".join(rows[0])] + ["\t".join(str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def write_volume(root, row, name, array, affine):
    folder = root / f"sub-{row['subject']}" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), folder / f"{row['case']}_{name}")
