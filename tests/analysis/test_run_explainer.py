"""A run's method built again from its record."""

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_model
from xaiseg.analysis.run_explainer import key_of, method_of
from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.methods import METHODS, Settings, build_methods
from xaiseg.errors import InputError


def run_of(*methods):
    identity = {"methods": {method.key: method.settings for method in methods}}
    return Run(Path("out"), {}, [], (), json.loads(json.dumps(identity)))


OPTIONS = {
    "smoothgrad": {"aggregate": "mean", "noise": 0.1, "target": "log_odds", "tolerance": 0.2},
    "vargrad": {"samples": 3, "seed": 5},
    "gradient": {"aggregate": "median"},
    "gradcam": {"layers": ("encoder0.conv", "bottleneck.conv"), "region": "class"},
    "gradcam++": {"form": "monai", "layers": ("encoder0.conv",)},
    "integrated-gradients": {"steps": 7, "baseline": "blur"},
    "smooth-integrated-gradients": {"steps": 3, "noise": 0.2, "baseline": "nawm"},
    "occlusion": {"patch": 4, "margin": 8, "baseline": "blur"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chosen", [False, True])
def test_every_method_comes_back_with_its_settings(name, chosen):
    model = tiny_model()
    (before,) = build_methods(model, Settings(methods=(name,), **(OPTIONS.get(name, {}) if chosen else {})))
    after = method_of(run_of(before), model, name, samples=before.samples if before.samples > 1 else None)
    assert (after.name, after.key, after.title, after.names) == (before.name, before.key, before.title, before.names)
    assert after.settings == before.settings
    assert key_of(name) == before.key


def test_samples_are_few_by_default_and_the_first_method_is_taken():
    model = tiny_model()
    run = run_of(*build_methods(model, Settings(methods=("smoothgrad", "gradient"))))
    assert method_of(run, model).samples == 4
    assert method_of(run, model, samples=9).samples == 9
    assert method_of(run, model, "gradient").key == "gradient"
    fewer = run_of(*build_methods(model, Settings(methods=("smoothgrad",), samples=2)))
    assert method_of(fewer, model).samples == 2


def test_what_cannot_be_had_again_is_said():
    model = tiny_model()
    (method,) = build_methods(model, Settings(methods=("vargrad",)))
    run = run_of(method)
    with pytest.raises(InputError, match="explained by vargrad, not by occlusion"):
        method_of(run, model, "occlusion")
    with pytest.raises(InputError, match="at least 2 samples"):
        method_of(run, model, samples=1)
    run.identity["methods"]["vargrad"]["noise_reference_channel"] = "T1w"
    with pytest.raises(InputError, match="has noise_reference_channel 'T1w', expected 'FLAIR'"):
        method_of(run, model)
    run.identity["methods"] = {"mine": {"samples": 3}}
    with pytest.raises(InputError, match="its method mine is none of smoothgrad"):
        method_of(run, model)
