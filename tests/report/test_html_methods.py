"""The methods text says every setting of a run, and cites what it used; BibTeX has just that."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.report.simulated_report import SPEC
from xaiseg.analysis.run_tables import MapKind, Run
from xaiseg.cohort.methods import METHODS, Settings, build_methods
from xaiseg.models import Model, build_network
from xaiseg.report.html.material import Material
from xaiseg.report.html.methods_text import methods, section
from xaiseg.report.html.references import REFERENCES, bibtex, listed

ANALYSIS = {"settings": {"resamples": 1234, "seed": 56}, "versions": {"xaiseg": "0.1"}}


def material(spec=SPEC, settings=None, tables=None, log=None, **identity):
    """settings: of `explain`, by the network of `spec`."""
    network = build_network(spec)
    window = jax.ShapeDtypeStruct((1, *spec.window, len(spec.channels)), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), window)  # nothing is computed with them
    made = build_methods(Model(spec, variables), settings or Settings())
    kinds = tuple(MapKind(m.key, m.title, m.unit, tuple(m.names)) for m in made)
    sidecars = {m.key: {"MethodKey": m.name} for m in made}
    identity = {
        "model": {**asdict(spec), "hash": "0123456789abcdef0123"}, "methods": {m.key: m.settings for m in made},
        "instances": "predicted", "min_voxels": 6, "precision": "float32", **identity,
    }  # fmt: skip
    run = Run(Path("out"), {}, [{"case": "a", "ndsc": "0.7"}], kinds, identity)
    return Material(run, {}, tables or {}, {"analysis": ANALYSIS}, [], log or {"versions": {"jax": "9.9.9"}}, sidecars)


def prose(found):
    return " ".join(text for _, text in methods(found).paragraphs)


def test_the_segmentation():
    spec = replace(
        SPEC,
        window=(16, 24, 32),
        overlap=0.35,
        threshold=0.45,
        connectivity=26,
        min_voxels=7,
        orientation="LAS",
        mirror_axes=(0, 2),
    )
    text = prose(material(spec, min_voxels=9, resample=True, precision="bfloat16"))
    for said in (
        *(
            "FLAIR and T1w",
            "3-D U-Net",
            "tiny.pth",
            "z-scored over its non-zero voxels",
            "turned to LAS",
            "16 × 24 × 32",
        ),
        *(
            "overlap of 35 %",
            "Gaussian blending of logits",
            "mirrorings along the axes 0, 2",
            "softmax",
            "exceeded 0.45",
        ),
        *("26-connectivity", "fewer than 7 voxels", "at least 9 voxels", "resampled", "bfloat16", "nDSC"),
        *("0123456789abcdef", "jax 9.9.9", "1234 resamples", "seed 56"),
    ):
        assert said in text, said
    assert "most probable" in prose(material(replace(SPEC, threshold=None)))
    assert "in one piece" in prose(material(whole_volume=True))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_setting_of_every_method_is_said(name):
    changed = {"samples": 37, "noise": 0.07, "seed": 11, "target": "margin", "aggregate": "l2_norm"}
    own = {"steps": 23, "baseline": "blur"} if "integrated" in name else {}
    own |= {"patch": 5, "margin": 13} if name == "occlusion" else {}
    own |= {"tolerance": 0.03} if name == "smoothgrad" else {}
    own |= {"form": "monai"} if name == "gradcam++" else {}
    found = material(settings=Settings(methods=(name,), **changed, **own))
    text = prose(found)
    (settings,) = found.run.identity["methods"].values()
    for key, value in settings.items():
        if value is None:
            continue
        said = {"noise": "7 %", "tolerance": "3 %", "target": "logit of the lesion class minus"}.get(
            key, str(value).replace("_", " ")
        )
        said = {"mean": "averaged", "squared": "squared", "variance": "variance"}[value] if key == "statistic" else said
        assert said in text, (key, said)
    assert "Spagnolo et al. 2026" in text


def test_statistics_that_were_used_are_cited():
    tables = {
        "comparisons": [{"n_a": 3.0, "n_b": 3.0, "p_mixed": 0.1}], "modality": [{}], "profiles": [{}],
        "error_detection": [{"model": "logistic"}, {"model": "boosting"}],
    }  # fmt: skip
    found = methods(material(tables=tables))
    assert {"mann1947", "holm1979", "cliff1993", "field2007", "rosner2006", "friedman2002"} <= set(found.cited)
    assert "mann1947" not in methods(material()).cited


def test_what_is_cited_is_listed():
    page = section(material()).body
    cited = methods(material()).cited
    entries = re.findall(r"@\w+\{(\w+),", page)
    assert entries == list(dict.fromkeys(cited))
    assert "Grad-CAM++" not in page


@pytest.mark.parametrize("key", list(REFERENCES))
def test_references_are_whole(key):
    reference = REFERENCES[key]
    assert {"author", "title", "year"} <= set(reference.fields)
    assert "journal" in reference.fields or "booktitle" in reference.fields
    assert reference.short.startswith(listed(key).split(",")[0])
    entry = bibtex([key, key])
    assert entry.count("{") == entry.count("}")
    assert entry.count("@") == 1
    assert not re.search(r"[{}\\]", listed(key))
