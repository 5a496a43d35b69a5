"""The methods of a run in prose, from its settings, ready to be pasted into a paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from xaiseg.analysis.run_tables import MapKind
from xaiseg.cohort.tables import TARGET_TEXTS
from xaiseg.report.html.material import Material
from xaiseg.report.html.page import Section, text
from xaiseg.report.html.references import REFERENCES, bibtex
from xaiseg.report.html.references import listed as cited

_ARCHITECTURES = {
    "unet": ("a 3-D U-Net", "cicek2016"),
    "dynunet": ("a DynUNet, after nnU-Net", "isensee2021"),
    "nnunet": ("nnU-Net", "isensee2021"),
    "swin_unetr": ("Swin UNETR", "hatamizadeh2022"),
}
_CONNECTIVITY = {
    6: "faces (6-connectivity)",
    18: "faces or edges (18-connectivity)",
    26: "faces, edges or corners (26-connectivity)",
}
_AGGREGATORS = {
    "signed_max": "of which for each input voxel the one of largest absolute value was kept with its sign (signed maximum)",
    "mean": "which were averaged over the lesion",
}
_STATISTICS = {
    "mean": "averaged",
    "squared": "squared and averaged (SmoothGrad²)",
    "variance": "reduced to their variance (VarGrad)",
}
_ROWS = {"gradient": ("Gradients", "simonyan2014"), "input-x-gradient": ("Input times gradient", "shrikumar2016"),
         "guided-backprop": ("Guided backpropagation", "springenberg2015")}  # fmt: skip
_NOISY = {"smoothgrad": "smilkov2017", "smoothgrad-squared": "hooker2019", "vargrad": "adebayo2018local"}
_CAMS = {
    "gradcam": ("Grad-CAM", ("selvaraju2017", "vinogradova2020")),
    "gradcam++": ("Grad-CAM++", ("chattopadhay2018", "spagnolo2026")),
    "hirescam": ("HiResCAM", ("draelos2020",)),
    "layercam": ("LayerCAM", ("jiang2021",)),
}


_FOLDS = {2: "two", 3: "three", 4: "four", 5: "five"}
# Of the measures of the sanity table, by how they begin: what they are called, and their sources.
_MEASURED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("deletion", "deletion", ("petsiuk2018", "rong2022")),
    ("insertion", "insertion", ("petsiuk2018", "rong2022")),
    ("infidelity", "infidelity", ("yeh2019",)),
    ("faithfulness_correlation", "faithfulness correlation", ("bhatt2020",)),
    ("max_sensitivity", "max-sensitivity", ("yeh2019",)),
    ("localisation", "localisation", ()),
    ("leakage", "leakage into other lesions", ()),
    ("random_instance", "likeness with the maps of other lesions", ()),
    ("randomisation", "randomisation of parameters", ("adebayo2018",)),
    ("smooth_randomisation", "randomisation of parameters with maps averaged over noise", ("adebayo2018",)),
)


class Prose:
    """Paragraphs, and the keys of what they cite, in order."""

    def __init__(self) -> None:
        self.paragraphs: list[tuple[str, str]] = []
        self.cited: list[str] = []

    def cite(self, *keys: str) -> str:
        self.cited += keys
        return "(" + "; ".join(REFERENCES[key].short for key in keys) + ")"

    def add(self, title: str, sentences: Sequence[str]) -> None:
        self.paragraphs.append((title, " ".join(filter(None, sentences))))


def methods(material: Material) -> Prose:
    """What was done: segmentation, explanation, statistics, software; only what the records of the run say."""
    prose = Prose()
    identity = material.run.identity
    prose.add("Segmentation.", _segmentation(prose, identity["model"], identity, material))
    prose.add("Saliency.", _saliency(prose, material))
    prose.add("Statistics.", _statistics(prose, material))
    if experiments := _experiments(prose, material):
        prose.add("Experiments.", experiments)
    prose.add("Software.", _software(material))
    return prose


def section(material: Material) -> Section:
    """The chapter, with a button that copies the text, and BibTeX."""
    prose = methods(material)
    paragraphs = "\n".join(f"<p><strong>{text(title)}</strong> {text(body)}</p>" for title, body in prose.paragraphs)
    listed = "".join(f"<li>{text(cited(key))}</li>" for key in dict.fromkeys(prose.cited))
    body = (
        '<p class="intro">Written from the settings of this run. Add how the network was trained and what the '
        "scans are: the run does "
        "not know.</p>"
        '<p><button type="button" class="main" data-copy="methods-text">Copy the text</button> '
        '<button type="button" data-copy="bibtex">Copy BibTeX</button></p>'
        f'<div class="methods" id="methods-text">\n{paragraphs}\n</div>\n<h3 id="references"><a '
        f'href="#references">References</a></h3>'
        f'<ul>{listed}</ul>\n<details><summary>BibTeX</summary><pre id="bibtex">{text(bibtex(prose.cited))}</pre></details>'
    )
    return Section("methods", "Methods, ready to paste", body)


def _segmentation(prose: Prose, model: Mapping[str, Any], identity: Mapping[str, Any], material: Material) -> list[str]:
    architecture = str(model.get("architecture", "network"))
    name, key = _ARCHITECTURES.get(architecture, (f"the network {architecture}", ""))
    channels = _joined(model["channels"])
    said = [f"Lesions were segmented on {channels} by {name}{' ' + prose.cite(key) if key else ''}."]
    if source := model.get("source"):
        said.append(f"Its parameters came from {source}.")
    normalisation = {
        "zscore_nonzero": "Each image was z-scored over its non-zero voxels.",
        "nnunet": "Images were cropped, resampled and normalised as nnU-Net planned.",
    }
    if "normalisation" in model:
        said.append(normalisation.get(model["normalisation"], f"Images were normalised by {model['normalisation']}."))
    if model.get("orientation", "native") != "native":
        said.append(f"Voxel axes were turned to {model['orientation']}.")
    if identity.get("resample"):
        said.append("Other images were resampled onto the grid of the first by trilinear interpolation.")
    if identity.get("whole_volume"):
        said.append("Each volume was taken in one piece.")
    elif model.get("window"):
        window = " × ".join(map(str, model["window"]))
        blending = (
            f" with {str(model['blending']).replace('gaussian', 'Gaussian')} blending of logits"
            if model.get("blending")
            else ""
        )
        said.append(
            f"Windows of {window} voxels with an overlap of {100 * model.get('overlap', 0):g} % were combined{blending}."
        )
    if axes := model.get("mirror_axes"):
        said.append(f"Logits were averaged over mirrorings along the axes {', '.join(map(str, axes))}.")
    if members := model.get("members"):
        said.append(f"They were averaged over {len(members)} networks.")
    if "threshold" in model:
        threshold = model["threshold"]
        rule = (
            "where the lesion class was the most probable"
            if threshold is None
            else f"where its probability ({model.get('output_activation', 'softmax')}) exceeded {threshold:g}"
        )
        said.append(f"A voxel was called lesion {rule}.")
    if "connectivity" in model:
        joined = _CONNECTIVITY.get(model["connectivity"], f"connectivity {model['connectivity']}")
        least = (
            f", components of fewer than {model['min_voxels']} voxels were dropped"
            if model.get("min_voxels", 1) > 1
            else ""
        )
        said.append(f"Voxels that touch by {joined} made one lesion{least}.")
    if any(str(row.get("ndsc", "n/a")) != "n/a" for row in material.run.cases):
        said.append(
            "Against the reference a predicted lesion that shared at least one voxel was a true positive (TP), "
            "any other a false positive "
            "(FP), and a reference lesion that shared none a false negative (FN); overlap was measured by Dice "
            "and the normalised Dice "
            f"coefficient, nDSC, over the whole array {prose.cite('raina2023')}."
        )
    return said


def _saliency(prose: Prose, material: Material) -> list[str]:
    identity = material.run.identity
    which = {
        "predicted": "Every predicted lesion",
        "reference": "Every lesion of the reference",
        "missed": "Every missed lesion of the reference",
        "given": "Every given region",
    }
    subject = which.get(identity.get("instances", "predicted"), "Every lesion")
    least = f" of at least {identity['min_voxels']} voxels" if identity.get("min_voxels", 1) > 1 else ""
    said = [
        f"{subject}{least} was explained on its own {prose.cite('spagnolo2026')}; maps are signed and not rescaled."
    ]
    if chosen := identity.get("lesions"):
        said.append(f"Only lesions {', '.join(map(str, chosen))} were taken.")
    for method in material.methods:
        said += _method(prose, method, dict(identity["methods"].get(method.key, {})), material)
    if identity.get("precision", "float32") != "float32":
        said.append(f"The network was explained in {identity['precision']}.")
    return said


def _method(prose: Prose, method: MapKind, settings: dict[str, Any], material: Material) -> list[str]:
    name = str(material.sidecars.get(method.key, {}).get("MethodKey") or method.key)
    target = settings.pop("target", None)
    of = TARGET_TEXTS.get(target or "", "").split(",")[0] or "output"
    said: list[str] = []
    if name in _NOISY:
        samples, noise = settings.pop("samples", None), settings.pop("noise", None)
        channel, tolerance = settings.pop("noise_reference_channel", None), settings.pop("tolerance", None)
        statistic = _STATISTICS.get(settings.pop("statistic", "mean"), "combined")
        keys = (_NOISY[name], "smilkov2017") if name != "smoothgrad" else ("smilkov2017",)
        said.append(
            f"{method.title.split(',')[0]} {prose.cite(*keys)}: gradients of the {of} at each of the lesion's "
            f"voxels with respect to the input, " + _aggregated(settings.pop("aggregate", "")) + "."
        )
        if samples is not None and noise:
            said.append(
                f"They were {statistic} over {'up to ' if tolerance else ''}{samples} noisy copies of the "
                f"input, with Gaussian noise of a standard "
                f"deviation of {100 * noise:g} % of the range of {channel or 'the first channel'} in all channels."
            )
        if tolerance:
            said.append(
                f"Sampling of a lesion ended when the standard error of its peak fell to {100 * tolerance:g} % of it."
            )
    elif name in _ROWS:
        title, key = _ROWS[name]
        said.append(
            f"{title} {prose.cite(key)} of the {of} at each of the lesion's voxels, {_aggregated(settings.pop('aggregate', ''))}."
        )
    elif "integrated-gradients" in name or "integratedgradients" in name:
        smooth = "smooth" in name
        said.append(
            f"{'Smoothed integrated' if smooth else 'Integrated'} gradients "
            f"{prose.cite('sundararajan2017', *(('smilkov2017',) if smooth else ()))} of the "
            f"{of}, summed over the lesion, from the baseline {settings.pop('baseline', 'zero')} in "
            f"{settings.pop('steps', '?')} steps."
        )
        if "samples" in settings:
            said.append(
                f"They were averaged over {settings.pop('samples')} noisy copies of the input (standard deviation "
                f"{100 * (settings.pop('noise', 0) or 0):g} % of the range of "
                f"{settings.pop('noise_reference_channel', 'the first channel')})."
            )
    elif name in _CAMS:
        title, cam = _CAMS[name]
        layer = settings.pop("layer", "?")
        layers = layer if isinstance(layer, str) else ", ".join(layer)
        said.append(
            f"{title} {prose.cite(*cam)} of the {of} summed over the {settings.pop('region', 'instance')}, at "
            f"the layer {layers}, upsampled "
            "to the input."
        )
        if "form" in settings:
            said.append(
                f"Weights were of the form “{settings.pop('form')}” with "
                f"{str(settings.pop('derivatives', 'closed_form')).replace('_', ' ')} derivatives."
            )
    elif name == "occlusion":
        said.append(
            f"Occlusion {prose.cite('zeiler2014')}: the change of the {of} when a cube of "
            f"{settings.pop('patch', '?')} voxels was replaced by the "
            f"baseline {settings.pop('baseline', 'zero')}, up to {settings.pop('margin', '?')} voxels from the lesion."
        )
    else:
        said.append(f"{method.title}, of the {of}.")
    if "seed" in settings:
        said.append(f"The seed of the noise was {settings.pop('seed')}.")
    rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)
    if rest:
        said.append(f"Further settings: {rest}.")
    said.append(f"The unit is {method.unit}.")
    return said


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _aggregated(aggregate: str) -> str:
    return _AGGREGATORS.get(aggregate, f"combined by {aggregate.replace('_', ' ')}")


def _statistics(prose: Prose, material: Material) -> list[str]:
    record = material.records["analysis"]
    settings = record.get("settings", {})
    resamples, seed = settings.get("resamples"), settings.get("seed")
    said = [
        f"Intervals are 95 % percentile intervals from {resamples} resamples of patients, each with all lesions "
        f"{prose.cite('field2007')} (seed {seed})."
    ]
    if any(row["n_a"] and row["n_b"] for row in material.rows("comparisons")):
        mixed = any(row["p_mixed"] == row["p_mixed"] for row in material.rows("comparisons"))
        said.append(
            f"Groups were compared by Cliff's delta {prose.cite('cliff1993')} with a test clustered by patient "
            f"(jackknife over patients, Student's t), "
            f"beside the Mann-Whitney U test, which takes lesions for independent {prose.cite('mann1947')}"
            + (", and a linear mixed model of ranks with a random intercept per patient" if mixed else "")
            + f"; p-values were adjusted by Holm's method {prose.cite('holm1979')}."
        )
    if material.rows("modality"):
        said.append(
            f"Channels were compared within lesions by a signed-rank test clustered by patient {prose.cite('rosner2006')}."
        )
    if material.rows("profiles"):
        said.append("Radial profiles are means over lesions of the mean over voxels in bins of 1 mm from the border.")
    if rows := material.rows("error_detection"):
        models = {row["model"] for row in rows}
        boosted = f" and stochastic gradient boosted trees {prose.cite('friedman2002')}" if "boosting" in models else ""
        sources = [name for name in ("maps", "scans") if f"logistic, {name}" in models]
        radiomic = (
            f", and by radiomic features of the {' and of the '.join(sources)} {prose.cite('zwanenburg2020')}"
            if sources
            else ""
        )
        said.append(
            f"TP were told from FP by L2-regularised logistic regression{boosted} on the figures of saliency, "
            f"volume and mean probability{radiomic}, in {_FOLDS[min(5, max(int(r.get('patients', 5)) for r in rows))]}-fold "
            "cross-validation by patient, with the rejection threshold chosen for F1 in the other folds."
        )
    return said


def _experiments(prose: Prose, material: Material) -> list[str]:
    said = []
    if rows := material.rows("context_summary"):
        settings = material.records["context"].get("settings", {})
        steps = [float(d) for d in settings.get("distances_mm", ())]
        reach = f" from {min(steps):g} to {max(steps):g} mm" if steps else ""
        said.append(
            f"Context: for {rows[0]['lesions']:.0f} lesions of {rows[0]['patients']:.0f} patients all beyond a "
            f"distance{reach} was set to "
            f"{settings.get('background', 0)} in the normalised image, and the image segmented again."
        )
    if rows := material.rows("synthetic_summary"):
        said.append(
            f"Synthetic lesions: {rows[0]['lesions']:.0f} lesions of known place, size and contrast were inserted in scans of "
            f"{rows[0]['patients']:.0f} patients."
        )
    if rows := material.rows("counterfactual", role="filled"):
        said.append(f"Counterfactuals: {len(rows)} lesions were filled with normal-appearing tissue, one at a time.")
    if rows := material.rows("sanity_summary"):
        names = ", ".join(dict.fromkeys(row["explainer"] for row in rows))
        said.append(
            f"Explainers ({names}) were compared on {max(row['lesions'] for row in rows):.0f} lesions by "
            + ", ".join(
                f"{said_as}{' ' + prose.cite(*keys) if keys else ''}"
                for start, said_as, keys in _MEASURED
                if any(row["measure"].startswith(start) for row in rows)
            )
            + "."
        )
    return said


def _software(material: Material) -> list[str]:
    versions = material.log.get("versions") or material.records["analysis"].get("versions", {})
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    model = str(material.run.identity["model"].get("hash", ""))
    said = [f"{listed}." if listed else f"xaiseg {material.run.identity.get('xaiseg', '')}."]
    if model:
        said.append(f"Hash of the network's parameters: {model[:16]}.")
    return said
