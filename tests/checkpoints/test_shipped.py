"""Models that come with the package: found by name, small, and with a card that says what they are."""

import pytest

from xaiseg.checkpoints import load_model, model_card, model_hash, save_model, shipped_models
from xaiseg.checkpoints.shipped import shipped_folder
from xaiseg.cli import main
from xaiseg.errors import InputError

MEBIBYTE = 2**20


def test_the_example_is_there():
    assert "example" in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_it_loads_by_name_and_is_small(name):
    model = load_model(name)
    assert model.spec.channels == ("FLAIR", "T1w")
    assert sum(file.stat().st_size for file in shipped_folder(name).rglob("*")) <= 4 * MEBIBYTE


@pytest.mark.parametrize("name", shipped_models())
def test_its_card(name):
    text = model_card(name)
    assert text.startswith(f"# {name}: ")
    assert "not for clinical use" in text.lower()
    for part in ("**Recipe**", "**Results**", "**Licence**"):
        assert part in text


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = load_model("example").with_spec(threshold=0.9)
    save_model("example", changed)
    assert load_model("example").spec.threshold == 0.9
    assert model_hash(load_model("example")) == model_hash(changed)


def test_another_name():
    with pytest.raises(InputError, match=r"no model.json.*or name one that comes with xaiseg: .*example"):
        load_model("exampel")
    with pytest.raises(KeyError):
        model_card("../shipped/example")


def test_the_command(capsys):
    assert main(["models"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == shipped_models()
    assert main(["models", "example"]) == 0
    assert capsys.readouterr().out == model_card("example")
    assert main(["models", "exampel"]) == 1
    assert capsys.readouterr().err.startswith("xaiseg: error: exampel: is no model of this package; known are ")
