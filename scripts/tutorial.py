"""A tutorial: from two scans to the report, in cells that a notebook or an editor runs one by one (`# %%`), or all at once:

    python scripts/tutorial.py [FOLDER]

It needs no data: the scans are phantoms, the network is the example that comes with the package. For your own, put a manifest and a
model folder in their places. Every step is a command, too, which its first line names.
"""

# %% Where everything goes
import sys
from pathlib import Path

import jax
import numpy as np

import xaiseg
from xaiseg.demo import write_phantoms

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "xaiseg-tutorial")

# %% Two scans: FLAIR, T1w and a mask by an expert, listed in a manifest. Voxels of 2.4 mm, so that this takes minutes on a laptop
manifest = write_phantoms(folder / "scans", 2, shape=(72, 88, 72), spacing=2.4, lesions=7)
print(manifest.read_text())

# %% A network: a pure function of a window, and its prediction for a whole scan, blended over windows  (xaiseg segment)
model = xaiseg.load_model("example")
predictor = xaiseg.StitchedPredictor.of(model)
case = xaiseg.read_input(manifest, model.spec.channels)[0]
scan = xaiseg.load_scan(case, model.spec)
probability = np.asarray(predictor.probability(predictor(scan.image)))
labels = xaiseg.label_components(probability > model.spec.threshold, model.spec.connectivity, model.spec.min_voxels)
lesions = xaiseg.instances_of(labels)
print(f"{case.name}: {len(lesions)} lesions of {[len(lesion.voxels) for lesion in lesions]} voxels")

# %% One lesion, explained: what in FLAIR and T1w speaks for it (positive) and against it (negative)?
largest = max(lesions, key=lambda lesion: len(lesion.voxels))
explain = xaiseg.smoothgrad(samples=2, noise=0.05, aggregate="signed_max")
(saliency,), (info,) = explain(jax.random.key(0), predictor, scan.image, [largest])
peaks = np.asarray(saliency.values).max((0, 1, 2))
print(
    f"lesion {largest.label}: peak {dict(zip(model.spec.channels, peaks.round(2).tolist(), strict=True))}, {info.rows} rows"
)

# %% A picture of it: the whole slice, each sequence close up, the saliency on top
whole = np.zeros(scan.image.shape, np.float32)
box = tuple(slice(a, a + n) for a, n in zip(saliency.start, saliency.values.shape[:3], strict=True))
whole[box] = saliency.values
xaiseg.lesion_figure(
    scan.image,
    model.spec.channels,
    labels == largest.label,
    whole,
    scan.grid.affine,
    title=f"{case.name} · lesion {largest.label}",
    subtitle="SmoothGrad, signed maximum, 2 samples",
    unit="Δlogit per unit of normalised intensity",
    path=folder / "lesion.png",
)

# %% The cohort: every lesion of every scan, with tables, recorded so that it can be interrupted  (xaiseg explain)
out = folder / "out"
settings = xaiseg.Settings(samples=2)
request = xaiseg.Request(manifest, out, pictures=False)
xaiseg.explain(model, request, settings)

# %% The lesions that were missed, and normal tissue of the same shapes, by the same engine  (explain --instances, true-negatives)
from xaiseg.analysis.run_tables import read_run
from xaiseg.analysis.true_negatives import write_true_negatives

missed, normal = folder / "missed", folder / "normal"
xaiseg.explain(model, xaiseg.Request(manifest, missed, instances="missed", min_voxels=3, pictures=False), settings)
regions = write_true_negatives(read_run(out), folder / "regions", most=3)
xaiseg.explain(model, xaiseg.Request(regions, normal, instances="given", pictures=False), settings)

# %% Groups, sequences, profiles, errors: tests that know that lesions of a patient are alike  (xaiseg analyse)
from xaiseg.analysis.analyse import analyse

analyse(out, missed=missed, normal=normal)

# %% How much of its surroundings does a lesion need?  (xaiseg context)
from xaiseg.analysis.context_run import context
from xaiseg.analysis.reopened import Choice

context(read_run(out), model, Choice(volume_mm3=(50.0, float("inf")), number=4), distances_mm=range(0, 25, 4))

# %% From which contrast on is a lesion found, and what changes without one?  (xaiseg synthetic, counterfactual)
from xaiseg.analysis.counterfactual_run import counterfactual
from xaiseg.analysis.synthetic import Design, synthetic

synthetic(read_run(out), model, Design(places=1, diameters_mm=(10.0,)), scans=2, samples=1)
counterfactual(read_run(out), model, Choice(number=2), samples=1)

# %% Can the explanations be trusted? Beside them stand a map of noise and an edge detector, which must fail  (xaiseg sanity)
from xaiseg.analysis.sanity import SanitySettings
from xaiseg.analysis.sanity_run import compare_explainers

quick = SanitySettings(measures=("infidelity", "faithfulness_correlation", "localisation"), margin=6, samples=20)
compare_explainers(read_run(out), model, Choice(number=2), ("smoothgrad", "random", "edges"), quick)

# %% All of it on one page, with pages for the subjects: open out/report.html in a browser  (xaiseg report)
from xaiseg.report.html import report

pages = report(out)
print(f"open {pages[0]}")
