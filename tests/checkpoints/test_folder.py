"""The model folder: what goes in comes out, without PyTorch; damage and half-written folders are never taken for a model."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from xaiseg.checkpoints import convert, folder, load_model, model_hash, save_model
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SOURCE = FIXTURES / "unet_batch.pth"
# Orbax starts threads of its own, whose clean-up is none of our business
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model():
    return convert(SOURCE, window=(16, 16, 16), threshold=0.4)


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model", model)


@pytest.fixture
def saved(pristine, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(saved, **changes):
    file = saved / "model.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def test_conversion_takes_the_papers_settings():
    spec = convert(SOURCE, window=(96, 96, 96)).spec
    assert spec.channels == ("FLAIR", "T1w")
    assert (spec.window, spec.overlap, spec.blending) == ((96, 96, 96), 0.25, "gaussian")
    assert (spec.threshold, spec.connectivity, spec.target_class) == (0.3, 18, 1)
    assert spec.default_layer == "decoder1.conv"
    assert (spec.source, spec.source_sha256) == (SOURCE.name, hashlib.sha256(SOURCE.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unet_instance", {}, "1 input channels; name them in order with --channels"),
        ("unet_batch", {"channels": ["FLAIR"]}, "2 input channels, --channels names 1"),
        ("unet_batch", {"channels": ["FLAIR", "FLAIR"]}, "channels is .* expected different names"),
        ("unet_batch", {"window": (16, 16, 18)}, "must be a multiple of"),
        ("unet_batch", {"window": (16, 16)}, "three positive integers"),
        ("unet_batch", {"overlap": 1.0}, "overlap is 1.0"),
        ("unet_batch", {"threshold": 0}, "threshold is 0"),
        ("unet_batch", {"connectivity": 8}, "6, 18 or 26"),
        ("unet_batch", {"target_class": 2}, "target_class is 2"),
        ("unet_batch", {"speed": 2}, "unknown field 'speed'"),
        ("unet_batch", {"window": None}, "does not tell the size of its window; .* --window X,Y,Z"),
        ("unet_2d", {}, r"3 classes \(0, 1, 2\); name the lesion's"),
        ("unet_2d", {"target_class": 1}, "a 2-D network needs a window with one side of 1"),
        ("unet_2d", {"target_class": 1, "window": None}, "--window X,Y,1"),
    ],
)
def test_conversion_refuses_what_does_not_fit(name, settings, message):
    with pytest.raises(InputError, match=message):
        convert(FIXTURES / f"{name}.pth", **{"window": (16, 16, 16), **settings})


def test_what_is_saved_is_loaded(model, pristine):
    loaded = load_model(pristine)
    assert loaded.spec == model.spec
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(model.variables)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, model.variables)
    assert model_hash(loaded) == model_hash(model)
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 16, 2))
    np.testing.assert_array_equal(loaded.logits_fn(x), model.logits_fn(x))


def test_the_hash_is_of_architecture_and_parameters(model):
    assert model_hash(model.with_spec(threshold=0.5, source="elsewhere")) == model_hash(model)
    scaled = jax.tree.map(lambda a: a * 2, model.variables)
    assert model_hash(type(model)(model.spec, scaled)) != model_hash(model)


def test_conversion_and_loading_need_no_torch(pristine):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["monai"] = None  # an import of either raises ImportError
from xaiseg.checkpoints import convert, load_model
convert({str(SOURCE)!r}, window=(16, 16, 16))
load_model({str(pristine)!r})
assert sys.modules["torch"] is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_json_says_what_the_model_is(pristine):
    content = json.loads((pristine / "model.json").read_text())
    assert content["options"]["channels"] == [4, 8, 16]
    assert (content["format"], content["threshold"], content["source"]) == (1, 0.4, "unet_batch.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": "absent"}, "field 'window' is missing"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"format": 99}, "does not read; update xaiseg"),
        ({"architecture": "vnet"}, "architecture is 'vnet', expected one of unet"),
        ({"architecture": ["unet"]}, "architecture is"),
        ({"architecture": {}}, "architecture is"),
        ({"options": 3}, "options is 3"),
        ({"options": {"depth": 3}}, "not a network that can be built"),
        ({"options": {"channels": [4], "strides": []}}, "not a network that can be built"),
        ({"options": {"channels": "many"}}, "not a network that can be built"),
        ({"channels": []}, "channels is"),
        ({"channels": "FLAIR"}, "channels is 'FLAIR'"),
        ({"channels": [["FLAIR"], "T1w"]}, "channels is"),
        ({"window": [16, 16, -16]}, "three positive integers"),
        ({"window": [16, 16, 18]}, "must be a multiple of"),
        ({"overlap": "much"}, "overlap is 'much'"),
        ({"blending": "linear"}, "gaussian or constant"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"connectivity": 8}, "6, 18 or 26"),
        ({"min_voxels": 0}, "a positive integer"),
        ({"normalisation": "none"}, "zscore_nonzero"),
        ({"orientation": "RRS"}, "native, or axis codes"),
        ({"target_class": 2}, "target_class is 2"),
        ({"target_class": "lesion"}, "target_class is 'lesion'"),
    ],
)
def test_a_wrong_description_is_named(saved, changes, message):
    edit(saved, **changes)
    text = refusal(saved)
    assert str(saved / "model.json") in text
    with pytest.raises(InputError, match=message):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff"])
def test_json_that_is_none(saved, text):
    (saved / "model.json").write_text(text)
    assert str(saved / "model.json") in refusal(saved)


def test_a_folder_that_is_no_model(tmp_path):
    assert "not a model folder" in refusal(tmp_path)
    assert "not a model folder" in refusal(tmp_path / "absent")


def test_parameters_that_are_missing_or_cut_off(saved):
    files = [f for f in (saved / "parameters").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert ": damaged; copy the model folder again" in refusal(saved)
    (saved / "parameters").rename(saved / "elsewhere")
    assert ": missing; copy the model folder again" in refusal(saved)


def test_parameters_of_another_network(saved):
    edit(saved, options={"channels": [4, 8, 32], "strides": [2, 2]})
    text = refusal(saved)
    assert "['params']['bottleneck_conv']['kernel'] has shape (3, 3, 3, 8, 16), expected (3, 3, 3, 8, 32)" in text
    edit(saved, options={"channels": [4, 8, 16], "strides": [2, 2], "norm": "instance"})
    assert "unknown ['batch_stats']" in refusal(saved)
    edit(saved, options={"channels": [4, 8, 16, 16], "strides": [2, 2, 2]})
    assert "missing ['params']['encoder2_conv']" in refusal(saved)


def test_an_existing_folder_is_kept_unless_overwritten(model, saved):
    with pytest.raises(InputError, match="exists; choose another folder or give --overwrite"):
        save_model(saved, model)
    save_model(saved, model.with_spec(threshold=0.7), overwrite=True)
    assert load_model(saved).spec.threshold == 0.7
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_no_model_is_never_overwritten(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a model folder"):
        save_model(tmp_path, model, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        save_model(tmp_path / "thesis.tex", model, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_destination_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_model(tmp_path / "file" / "model", model)


@pytest.mark.parametrize("existing", [False, True])
def test_a_half_written_folder_is_never_seen(model, saved, monkeypatch, existing):
    target = saved if existing else saved.parent / "new"

    def fails(*_args, **_kwargs):
        raise RuntimeError("the machine went down")

    monkeypatch.setattr(folder.json, "dumps", fails)  # after the parameters, before model.json
    with pytest.raises(RuntimeError, match="went down"):
        save_model(target, model.with_spec(threshold=0.9), overwrite=True)
    monkeypatch.undo()
    assert list(saved.parent.iterdir()) == [saved]
    assert load_model(saved).spec.threshold == 0.4
