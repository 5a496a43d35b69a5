import importlib
from dataclasses import replace

import pytest

from training.augment import PAPER
from training.config import Config, check, known_configs, load_config
from xaiseg.errors import InputError


@pytest.mark.parametrize("name", known_configs())
def test_every_config_is_valid_and_says_what_it_was_measured_to_give(name: str) -> None:
    config = check(load_config(name))
    assert config.spec(0.5).architecture == config.architecture
    text = importlib.import_module(f"training.configs.{name}").__doc__ or ""
    assert "easured" in text or "not trained here" in text


def test_the_paper_s_network() -> None:
    config = load_config("unet")
    assert (config.options["channels"], config.patch, config.batch) == ([32, 64, 128, 256, 512], (96, 96, 96), 4)
    assert (config.optimiser, config.learning_rate) == ("adam", 1e-5)
    assert (config.loss, config.augmentation) == ({"normalised_dice": 0.5, "focal": 1.0}, PAPER)


def test_parts_of_a_field() -> None:
    config = load_config(
        "unet",
        ["augmentation.affine=0", "augmentation.flips=1,0,1", "loss.blob=2", "options.norm=instance", "forced=true"],
    )
    assert (config.augmentation.affine, config.augmentation.flips) == (0.0, (1, 0, 1))
    assert config.loss == {"normalised_dice": 0.5, "focal": 1.0, "blob": 2.0}
    assert (config.options["norm"], config.options["strides"], config.forced) == ("instance", [2, 2, 2, 2], True)
    assert load_config("unet", ['options={"channels": [4, 8], "strides": [2]}']).options["strides"] == [2]


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
        ("nothing", "batch=1", "--config nothing: unknown; known are dynunet, example"),
        ("unet", "colour=red", "--set colour=red: expected FIELD=VALUE with a field among architecture"),
        ("unet", "batch", "--set batch: expected FIELD=VALUE"),
        ("unet", "batch=many", "--set batch=many: expected int"),
        ("unet", "forced=perhaps", "--set forced=perhaps: expected bool"),
        ("unet", "augmentation.colour=1", "--set augmentation.colour=1: augmentation has no part colour"),
        ("unet", "batch.size=1", "--set batch.size=1: batch has no part size"),
        ("unet", "options=[", "--set options=[: expected dict"),
        (
            "unet",
            "loss.hinge=1",
            "config: loss is {'normalised_dice': 0.5, 'focal': 1.0, 'hinge': 1}, expected weights of",
        ),
        ("unet", "loss.focal=-1", "config: loss is"),
        ("unet", "optimiser=lion", "config: optimiser is 'lion', expected one of adam"),
        ("unet", "precision=half", "config: precision is 'half', expected one of float32"),
        ("unet", "warmup=100000", "config: warmup is 100000, expected fewer than the updates"),
        ("unet", "batch=0", "config: batch is 0, expected 1 or more"),
        ("unet", "augmentation.affine=2", "augmentation.affine: 2.0; expected a number from 0 to 1"),
        ("unet", "learning_rate=nan", "config: learning_rate is nan, expected a positive number"),
        ("unet", "schedule=linear", "config: schedule is 'linear', expected one of constant"),
        ("unet", "patch=96,96", "config: patch is (96, 96), expected three positive"),
        ("unet", "patch=40,40,40", "config: patch is (40, 40, 40): a grid of (40, 40, 40) does not fit"),
        ("unet", "window=40,40,40", "training config: not a network that can be built"),
        (
            "unet",
            "patch=96,96,64",
            "augmentation.quarter_turns: (0.5, 0.5, 0.5) for patches of (96, 96, 64) voxels; expected equal",
        ),
        ("unet", "thresholds=0.5,1.5", "training config: threshold is 1.5"),
        ("unet", "thresholds=()", "config: thresholds is (), expected at least one"),
        ("unet", "orientation=up", "training config: orientation is 'up'"),
        ("unet", "patch=a,b,c", "--set patch=a,b,c: expected tuple"),
        ("unet", "patch=16.5,16,16", "--set patch=16.5,16,16: expected tuple"),
        ("unet", "loss=5", "--set loss=5: expected dict"),
        ("unet", 'loss.dice="x"', "config: loss is"),
        ("unet", "loss.dice=true", "config: loss is"),
        ("unet", "options=[]", "--set options=[]: expected dict"),
        ("unet", "options.channels=5", "--set options.channels=5: expected list"),
        ("unet", "options.strides=2", "--set options.strides=2: expected list"),
        (
            "unet",
            "augmentation=5",
            "--set augmentation=5: augmentation has parts; expected one of them, as augmentation.",
        ),
        ("unet", "augmentation.flips=a,b,c", "--set augmentation.flips=a,b,c: expected tuple"),
        ("unet", "learning_rate=inf", "config: learning_rate is inf, expected a positive number"),
        ("unet", "dice_r=1", "config: dice_r is 1.0, expected a number between 0 and 1"),
        ("example", "phantoms=1.5,2.5", "--set phantoms=1.5,2.5: expected tuple"),
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
    assert check(Config()) == Config() == load_config("unet")
