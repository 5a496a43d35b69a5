from dataclasses import replace

import pytest

from training.config import Config, check, load_config
from xaiseg.errors import InputError


@pytest.mark.parametrize("name", ["unet", "unet_cpu", "example"])
def test_every_config_is_valid(name: str) -> None:
    assert check(load_config(name)).spec(0.5).architecture == "unet"


def test_the_paper_s_network() -> None:
    config = load_config("unet")
    assert (config.features, config.patch, config.batch) == ((32, 64, 128, 256, 512), (96, 96, 96), 4)
    assert (config.learning_rate, config.dice_weight, config.focal_weight) == (1e-5, 0.5, 1.0)


def test_settings_take_the_type_of_their_field() -> None:
    config = load_config(
        "unet", ["patch=32,32,32", "learning_rate=1e-3", "batch=1", "schedule=cosine", "thresholds=0.5"]
    )
    assert config.patch == (32, 32, 32)
    assert (config.learning_rate, config.batch, config.schedule, config.thresholds) == (1e-3, 1, "cosine", (0.5,))
    assert load_config("example", ["phantoms=()"]).phantoms == ()


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("nothing", "batch=1", "--config nothing: unknown; known are example"),
        ("unet", "colour=red", "--set colour=red: expected FIELD=VALUE with a field among channels"),
        ("unet", "batch", "--set batch: expected FIELD=VALUE"),
        ("unet", "batch=many", "--set batch=many: expected <class 'int'>"),
        ("unet", "batch=0", "config: batch is 0, expected 1 or more"),
        ("unet", "flips=2", "config: flips is 2.0, expected a number from 0 to 1"),
        ("unet", "learning_rate=nan", "config: learning_rate is nan, expected a positive number"),
        ("unet", "schedule=linear", "config: schedule is 'linear', expected one of constant"),
        ("unet", "patch=96,96", "config: patch is (96, 96), expected three positive"),
        ("unet", "patch=40,40,40", "config: patch is (40, 40, 40): a grid of (40, 40, 40) does not fit"),
        ("unet", "window=40,40,40", "training config: not a network that can be built"),
        ("unet", "patch=96,96,64", "config: quarter_turns is 0.5, expected 0 unless the patch is a cube"),
        ("unet", "thresholds=0.5,1.5", "training config: threshold is 1.5"),
        ("unet", "thresholds=()", "config: thresholds is (), expected at least one"),
        ("unet", "orientation=up", "training config: orientation is 'up'"),
        ("example", "phantoms=5,5", "config: phantoms is (5, 5), expected two seeds"),
        ("example", "channels=FLAIR", "config: channels is ('FLAIR',), expected FLAIR,T1w"),
    ],
)
def test_refused_in_one_line(name: str, setting: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(name, [setting])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_spec_carries_what_the_model_needs() -> None:
    config = replace(load_config("example"), orientation="LAS")
    spec = config.spec(0.6, "made by", {"step": 3})
    assert (spec.window, spec.channels, spec.orientation, spec.threshold) == (
        (64, 64, 64),
        ("FLAIR", "T1w"),
        "LAS",
        0.6,
    )
    assert (spec.source, spec.notes, spec.options["norm"]) == ("made by", {"step": 3}, "batch")


def test_defaults_are_a_config_of_their_own() -> None:
    assert check(Config()) == Config()
