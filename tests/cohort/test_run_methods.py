"""Every method of the command line in one run, and the options that only some of them have."""

import nibabel as nib
import numpy as np
import pytest
from test_run_options import assert_same_maps, column, maps, sidecar
from tiny import SHAPE, Explain, table

from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.cohort import methods
from xaiseg.cohort.methods import METHODS, Settings, build_methods, build_predictor
from xaiseg.instances import instances_of
from xaiseg.models.precision import PRECISIONS
from xaiseg.saliency import AGGREGATORS, BASELINES, FORMS, TARGETS

SIGNED = ("gradient", "smoothgrad", "inputxgradient", "integratedgradients", "smoothintegratedgradients", "occlusion")


@pytest.fixture(scope="module")
def everything(tmp_path_factory, manifest, native_model):
    """One run of all methods, as small as they go, pictures included."""
    out = tmp_path_factory.mktemp("everything") / "out"
    methods = [part for name in METHODS for part in ("--method", name)]
    small = ["--samples", "2", "--steps", "2", "--patch", "6", "--margin", "2", "--lesions", "1"]
    assert main(["explain", str(manifest), str(out), "--model", str(native_model), *methods, *small]) == 0
    return out


def test_every_method_writes_its_maps_columns_and_description(everything):
    (row,) = table(everything / "lesions.tsv")
    for name in METHODS:
        key = name.replace("-", "").replace("++", "pp")
        assert list(everything.rglob(f"*_desc-{key}_lesion-001_saliency.nii.gz"))
        assert list(everything.rglob(f"*_desc-{key}_lesion-001_saliency.png"))
        assert sidecar(everything, key)["target"] == "logit"
        peak = f"{key}_FLAIR_peak" if f"{key}_FLAIR_peak" in row else f"{key}_peak"
        assert np.isfinite(float(row[peak]))
        assert int(row[f"{key}_rows"]) >= int(row[f"{key}_windows"]) >= 1
    for key in SIGNED:
        assert float(row[f"{key}_FLAIR_peak"]) > 0  # bright FLAIR speaks for a lesion
    assert int(row["smoothgrad_samples_for_5_percent"]) >= 1
    assert row["gradient_samples_for_5_percent"] == "n/a"


def test_maps_of_squares_are_not_negative(everything):
    for name, values in maps(everything).items():
        if "squared" in name or "vargrad" in name:
            assert values.min() >= 0


def test_the_plan_counts_the_passes_that_are_made(everything, native_model):
    """So that the progress bar ends where the work does."""
    (row,) = table(everything / "lesions.tsv")
    model = load_model(native_model)
    settings = Settings(methods=tuple(METHODS), samples=2, steps=2, patch=6, margin=2)
    predictor = build_predictor(model, settings, whole_volume=False)
    (labels,) = everything.rglob("*_dseg.nii.gz")
    (lesion,) = instances_of(np.asarray(nib.load(labels).dataobj), [1])
    for method in build_methods(model, settings):
        planned = method.cost(predictor, (*SHAPE, 2), lesion)
        assert planned == (int(row[f"{method.key}_rows"]), int(row[f"{method.key}_windows"]))


def test_a_target(explain: Explain) -> None:
    logit, odds = explain("a", "--noise", "0"), explain("b", "--noise", "0", "--target", "log_odds")
    probability = explain("c", "--noise", "0", "--target", "probability")
    peaks = [float(column(out, "smoothgrad_FLAIR_peak")[0]) for out in (logit, odds, probability)]
    # p(1 - p) of the log-odds' derivative, at most a quarter
    assert 0 < peaks[2] <= peaks[1] / 4
    assert peaks[0] != peaks[1]


def test_sampling_to_a_tolerance(explain: Explain) -> None:
    out = explain("out", "--samples", "12", "--tolerance", "0.5")
    assert column(out, "smoothgrad_samples") == ["8", "8"]
    assert column(out, "smoothgrad_converged") == ["1", "1"]


def test_the_whole_volume_at_once(explain: Explain) -> None:
    windows, whole = explain("a", "--noise", "0"), explain("b", "--noise", "0", "--whole-volume")
    assert set(column(whole, "smoothgrad_windows")) == {"1"}
    assert set(column(windows, "smoothgrad_windows")) != {"1"}


def test_two_devices(explain: Explain) -> None:
    assert_same_maps(explain("a"), explain("b", "--devices", "2"))


def test_more_devices_than_there_are(explain: Explain, capsys) -> None:
    explain("out", "--devices", "5", status=1)
    assert "--devices 5: a mesh of 5 × 1 devices: there are 2" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_precision_is_told_with_its_error(explain: Explain, precision: str, capsys) -> None:
    options = ("--noise", "0", "--aggregate", "mean")
    exact, rounded = explain("a", *options), explain("b", *options, "--precision", precision)
    assert f"{precision}: one row differs from float32 by up to" in capsys.readouterr().out
    a, b = maps(exact), maps(rounded)
    for name, values in a.items():
        error = np.linalg.norm(b[name] - values) / np.linalg.norm(values)
        # 10 and 7 bits of mantissa through a few layers, and slopes of activations near zero that rounding turns
        assert 1e-6 < error < {"tf32": 0.05, "bfloat16": 0.2}[precision]


def test_several_taps_are_channels(explain: Explain) -> None:
    out = explain("out", "--method", "hirescam", "--layer", "encoder0,bottleneck.conv")
    assert all(values.shape[-1] == 2 for values in maps(out).values())
    assert len(column(out, "hirescam_bottleneck.conv_peak")) == 2


def test_baselines_differ(explain: Explain) -> None:
    options = ("--method", "integrated-gradients", "--steps", "3")
    peaks = {
        name: column(explain(name, *options, "--baseline", name), "integratedgradients_FLAIR_peak")
        for name in BASELINES
    }
    assert len({tuple(values) for values in peaks.values()}) == 3


def test_a_class_that_is_nowhere(explain: Explain) -> None:
    """The reference's lesions are explained though nothing is found: a map of zeros, no pass, no crash."""
    options = ("--method", "gradcam", "--region", "class", "--instances", "reference", "--threshold", "0.999999")
    out = explain("out", *options)
    assert set(column(out, "gradcam_peak")) <= {"0", "0.0"} or all(float(p) >= 0 for p in column(out, "gradcam_peak"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch", "4"), "--patch has no effect on smoothgrad; it is for occlusion"),
        (("--method", "gradcam", "--tolerance", "0.1"), "--tolerance has no effect on gradcam"),
        (("--tolerance", "0.1", "--noise", "0"), "--tolerance needs noise and at least 2 --samples"),
    ],
)
def test_options_that_would_do_nothing(explain: Explain, options, message, capsys) -> None:
    explain("out", *options, status=1)
    assert message in capsys.readouterr().err


def test_what_an_explainer_refuses_is_one_line(explain: Explain, capsys, monkeypatch) -> None:
    def refuse(*_, **__):
        raise ValueError("no activation")

    monkeypatch.setattr(methods, "guided_backprop", lambda base: refuse)
    explain("out", "--method", "guided-backprop", status=1)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xaiseg: error")]
    assert len(error) == 1


def test_the_command_line_knows_every_name(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens
    for name in (*METHODS, *AGGREGATORS, *TARGETS, *BASELINES, *FORMS, *PRECISIONS):
        assert name in text
