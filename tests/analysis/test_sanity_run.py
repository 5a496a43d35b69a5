"""The command `sanity` on a run: good explainers beat controls, which fail where they must; numbers are the measures' own."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import snapshot, table

from xaiseg import Instance, SaliencyMap, input_gradient
from xaiseg._types import Info
from xaiseg.analysis.control_explainers import edge_map, random_map
from xaiseg.analysis.named_explainers import Named, default_names, named_explainers
from xaiseg.analysis.reopened import Choice, open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_tables import read_run
from xaiseg.analysis.sanity import MEASURES, SanityCase, SanitySettings, sanity
from xaiseg.analysis.sanity_plan import explanations, work_of
from xaiseg.analysis.sanity_run import compare_explainers
from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.demo import write_phantoms
from xaiseg.metrics import instance_score
from xaiseg.metrics.localisation import localisation
from xaiseg.metrics.randomisation import network_layers, parameter_randomisation
from xaiseg.metrics.similarity import instance_similarity
from xaiseg.saliency.linearise import linearise_tile, linearise_window, pull_back

GOOD = "gradient:aggregate=mean"
# measures that take no time
QUICK = "localisation,leakage,random_instance"
TRIED = f"deletion,infidelity,faithfulness_correlation,randomisation,{QUICK}"


def command(run, *options):
    return main([str(o) for o in ("sanity", run.out, "--model", run.model, *options)])


@pytest.fixture(scope="module")
def found(finished, tmp_path_factory):
    """One lesion of each scan by a good explainer and both controls."""
    run = finished._replace(out=Path(shutil.copytree(finished.out, tmp_path_factory.mktemp("sanity") / "out")))
    names = [part for name in (GOOD, "random", "edges") for part in ("--explainer", name)]
    assert (
        command(
            run, *names, "--lesions", 2, "--margin", 3, "--samples", 8, "--steps", 1, "--measures", TRIED, "--chunk", 16
        )
        == 0
    )
    return run


def column(run, explainer, measure, name="value", file="sanity"):
    rows = table(run.out / f"analysis/{file}.tsv")
    return [float(r[name]) for r in rows if (r["explainer"], r["measure"]) == (explainer, measure)]


def test_files_are_complete(found, capsys):
    record = json.loads((found.out / "analysis/sanity.json").read_text())
    assert set(record["files"]) == {"sanity.tsv", "sanity_summary.tsv", "sanity_curves.json", "sanity.png"}
    for name, columns in record["columns"].items():
        assert list(columns) == list(table(found.out / "analysis" / name)[0])
    assert record["explainers"][GOOD]["aggregate"] == "mean"
    assert ",".join(record["measures"]) == TRIED
    assert record["settings"]["replacements"] == ["blur", "road"]
    assert record["settings"]["baseline"] == "zero"
    rows = table(found.out / "analysis/sanity.tsv")
    known = {(r["case"], r["lesion"]): r for r in table(found.out / "lesions.tsv")}
    assert len({(r["case"], r["lesion"]) for r in rows}) == 2
    for row in rows:
        lesion = known[row["case"], row["lesion"]]
        assert (row["group"], float(row["volume_mm3"])) == (lesion["group"], float(lesion["volume_mm3"]))
    curves = json.loads((found.out / "analysis/sanity_curves.json").read_text())["curves"]
    assert {curve["explainer"] for curve in curves} == {GOOD, "random", "edges"}
    assert any(note.startswith("2 patients tell little") for note in record["notes"])


def test_the_good_beats_the_bad_and_the_bad_fail(found):
    for measure in ("deletion_blur", "deletion_road"):
        gain = {e: np.mean(column(found, e, measure, "gain")) for e in (GOOD, "random")}
        assert gain[GOOD] > 3 * abs(gain["random"])
    assert min(column(found, GOOD, "faithfulness_correlation_times_difference")) > 0
    assert max(column(found, GOOD, "infidelity")) < 0.1 < 0.5 < min(column(found, "random", "infidelity"))
    for measure in ("random_instance", "randomisation_signed"):
        assert max(map(abs, column(found, GOOD, measure))) < 0.3
        assert column(found, "edges", measure) == pytest.approx([1, 1])
    assert column(found, "random", "randomisation_signed") == pytest.approx([1, 1])


def test_numbers_are_those_of_the_measures_alone(found):
    run = read_run(found.out)
    predictor = predictor_of(run, reopen_model(run, load_model(str(found.model))))
    rows = {(r["case"], r["lesion"]): r for r in table(found.out / "analysis/sanity.tsv") if r["explainer"] == GOOD}
    checked = 0
    for opened in open_scans(run, range(len(run))):
        maps, _ = input_gradient(reduce="mean")(jax.random.key(0), predictor, opened.scan.image, opened.instances)
        at = np.array([i.voxels.mean(0) for i in opened.instances]) * opened.scan.grid.spacing
        for n, (instance, saliency) in enumerate(zip(opened.instances, maps, strict=True)):
            if (opened.case.name, str(instance.label)) not in rows:
                continue
            mine = {
                r["measure"]: float(r["value"])
                for r in table(found.out / "analysis/sanity.tsv")
                if (r["case"], r["lesion"], r["explainer"]) == (opened.case.name, str(instance.label), GOOD)
            }
            place = localisation(saliency, instance, spacing=opened.scan.grid.spacing)
            assert mine["localisation_rank"] == pytest.approx(place.rank)
            assert mine["localisation_mass_absolute"] == pytest.approx(place.absolute, rel=1e-4)  # float32 sums
            away = [np.inf if m == n else np.linalg.norm(at[m] - at[n]) for m in range(len(at))]
            rho = instance_similarity(saliency, maps[int(np.argmin(away))])
            assert mine["random_instance"] == pytest.approx(rho, abs=1e-3)
            whole = np.zeros(opened.scan.image.shape)
            box = tuple(slice(s, s + k) for s, k in zip(saliency.start, saliency.values.shape, strict=False))
            whole[box] = np.abs(np.asarray(saliency.values))
            mass = [whole[tuple(i.voxels.T)].sum() for i in opened.instances]
            assert mine["leakage"] == pytest.approx(1 - mass[n] / sum(mass), rel=1e-4)
            checked += 1
    assert checked == 2


def test_a_command_repeats_itself_and_replaces_what_was(tiny_run, capsys):
    options = ("--explainer", "random", "--measures", QUICK, "--lesions", 2)
    assert command(tiny_run, *options, "--explainer", "edges", "--seed", 1) == 0
    other = column(tiny_run, "random", "leakage")
    capsys.readouterr()
    assert command(tiny_run, *options) == 0
    text = capsys.readouterr().out
    assert "plan: 2 lesions of 2 scans, 1 explainer" in text
    assert "leakage (less is better)" in text
    names = ("sanity.tsv", "sanity_summary.tsv", "sanity.png")
    first = {name: (tiny_run.out / "analysis" / name).read_bytes() for name in names}
    assert b"edges" not in first["sanity.tsv"]
    assert not column(tiny_run, "edges", "leakage")
    assert command(tiny_run, *options) == 0
    assert {name: (tiny_run.out / "analysis" / name).read_bytes() for name in names} == first
    assert column(tiny_run, "random", "leakage") != other


def keep(run, wanted):
    """Leave of the run's lesions those that are `wanted`."""
    path = run.out / "lesions.tsv"
    head, *lines = path.read_text().splitlines()
    rows = table(path)
    path.write_text("\n".join([head, *(line for line, row in zip(lines, rows, strict=True) if wanted(row))]) + "\n")


def test_one_lesion_alone_has_no_other(tiny_run, capsys):
    keep(tiny_run, lambda row: row["case"] == "sub-01" and row["lesion"] == "1")
    assert command(tiny_run, "--explainer", "random", "--measures", QUICK) == 0
    text = capsys.readouterr().out
    assert "all lesions are of one patient: no interval, and no verdict" in text
    assert "not defined for any explainer: leakage, random_instance: no scan has another lesion" in text
    for row in table(tiny_run.out / "analysis/sanity_summary.tsv"):
        assert row["mean_low"] == row["mean_high"] == row["verdict"] == "n/a"
        assert (row["mean"] == "n/a") == (row["measure"] in ("leakage", "random_instance"))


def test_maps_without_numbers_are_told(tiny_run):
    def lost(key, predictor, image, instances, *, progress=None):
        return [SaliencyMap(image * jnp.nan, (0, 0, 0)) for _ in instances], [Info(1, 1) for _ in instances]

    run, said = read_run(tiny_run.out), []
    settings = SanitySettings(measures=("localisation", "leakage"))
    model = load_model(str(tiny_run.model))
    found = compare_explainers(
        run, model, Choice(number=1), settings=settings, own={"lost": lost, "noise": random_map()}, say=said.append
    )
    assert {row["explainer"] for row in found.rows} == {"lost", "noise"}
    assert all(row["value"] is None for row in found.rows if row["explainer"] == "lost")
    assert any(line.startswith("note: lost: no value of localisation_mass_positive") for line in said)


def test_what_cannot_be_done_is_said(tiny_run, fails):
    before = snapshot(tiny_run.out)
    ask = ("sanity", tiny_run.out, "--model", tiny_run.model)
    assert "give the model of the run" in fails(*ask[:3], "example")
    assert "explainer 'grad' is unknown; known are smoothgrad" in fails(*ask, "--explainer", "grad")
    assert "explainer 'random' takes no options" in fails(*ask, "--explainer", "random:samples=1")
    assert "gradient is given twice" in fails(*ask, *["--explainer", "gradient"] * 2)
    assert "'sample=3', expected OPTION=VALUE" in fails(*ask, "--explainer", "smoothgrad:sample=3")
    assert "samples is 'few', expected int" in fails(*ask, "--explainer", "smoothgrad:samples=few")
    assert "--steps has no effect on gradient" in fails(*ask, "--explainer", "gradient:steps=3")
    assert "aggregate is 'most'" in fails(*ask, "--explainer", "gradient:aggregate=most")
    assert "no layer 'top'" in fails(*ask, "--explainer", "gradcam++:layer=top")
    assert "measures: size; known are deletion" in fails(*ask, "--measures", "size")
    assert "no lesion of group FN" in fails(*ask, "--groups", "FN")
    assert "mm³" in fails(*ask, "--volume", "1e6:")
    assert "none.tsv" in fails(*ask, "--source", "none.tsv")
    assert "samples is 1, expected at least 2" in fails(
        *ask, "--samples", 1, "--explainer", "random", "--measures", "infidelity"
    )
    assert snapshot(tiny_run.out) == before


def test_names_take_the_settings_of_the_run(tiny_run):
    run = read_run(tiny_run.out)
    model = reopen_model(run, load_model(str(tiny_run.model)))
    assert default_names(run) == ["smoothgrad", "gradient", "input-x-gradient", "random", "edges"]
    run.identity["methods"]["smoothgrad"] |= {"samples": 50, "noise": 0.1, "aggregate": "mean"}
    found = {
        e.name: e.settings for e in named_explainers(run, model, ["smoothgrad", "gradient", "smoothgrad:samples=9"])
    }
    assert found["gradient"] == {"method": "gradient", "aggregate": "mean", "target": "logit"}
    assert (found["smoothgrad"]["samples"], found["smoothgrad"]["noise"]) == (4, 0.1)
    assert found["smoothgrad:samples=9"]["samples"] == 9
    (cam,) = named_explainers(run, model, ["gradcam++:layer=encoder0.conv,form=monai"])
    assert (cam.settings["layer"], cam.settings["form"]) == ("encoder0.conv", "monai")
    (smooth,) = named_explainers(run, model, ["smoothgrad:tolerance=0.05"])
    assert smooth.settings["tolerance"] == 0.05


@pytest.fixture
def opened(tiny_run):
    run = read_run(tiny_run.out)
    model = reopen_model(run, load_model(str(tiny_run.model)))
    return model, predictor_of(run, model), next(open_scans(run, [0]))


def test_the_plan_counts_what_is_done(opened, monkeypatch):
    model, predictor, scan = opened
    calls, windows = [], []
    counted = instance_score._window_logits
    monkeypatch.setattr(
        instance_score, "_window_logits", lambda fn, images, c: windows.append(len(images)) or counted(fn, images, c)
    )

    def counting(key, predictor, image, instances, *, progress=None):
        calls.append(1)
        return random_map()(key, predictor, image, instances)

    settings = SanitySettings(
        measures=[m for m in MEASURES if m != "random_instance"], margin=2, samples=3, radius_samples=2, steps=2,
        smooth_samples=2, orders=2, fractions=(0.0, 0.1, 1.0), resamples=10, chunk=1,
    )  # fmt: skip
    case = SanityCase("sub-01", scan.scan.image, scan.instances)
    work = work_of(predictor, case, [Named("counting", counting)], settings, len(network_layers(model.spec)))
    sanity(jax.random.key(0), model, [case], {"counting": counting}, settings, predictor_of=lambda _: predictor)
    assert len(calls) == explanations(settings, len(network_layers(model.spec)))
    assert sum(windows) == sum(work.forward.values())


def test_random_networks_are_not_compiled_for(opened):
    """Parameters are arguments of the programs: further random networks, and steps, take none of their own."""
    model, _, scan = opened
    explain = input_gradient()

    def cascade(key, steps):
        parameter_randomisation(jax.random.key(key), explain, model, scan.scan.image, scan.instances, steps=steps)

    cascade(0, 1)
    programs = (linearise_tile, linearise_window, pull_back)
    before = [program._cache_size() for program in programs]
    assert sum(before)
    cascade(1, 3)
    assert [program._cache_size() for program in programs] == before


def test_controls():
    image = jax.random.normal(jax.random.key(1), (5, 6, 7, 2))
    lesions = [Instance(n, np.zeros((1, 3), np.int32)) for n in (1, 2)]
    (edges, same), _ = edge_map()(jax.random.key(0), None, image, lesions)
    v, smooth, slope = np.asarray(image, np.float64), np.array([1, 2, 1]), np.array([-1, 0, 1])
    block = v[1:4, 2:5, 3:6, 1]
    parts = [np.einsum("ijk,i,j,k", block, *(slope if a == b else smooth for b in range(3))) for a in range(3)]
    assert edges.values[2, 3, 4, 1] == pytest.approx(np.linalg.norm(parts), rel=1e-5)
    np.testing.assert_array_equal(edges.values, same.values)
    (one, other), _ = random_map()(jax.random.key(0), None, image, lesions)
    (again,), _ = random_map()(jax.random.key(0), None, image, lesions[1:])
    assert (one.values != other.values).all()
    np.testing.assert_array_equal(other.values, again.values)


@pytest.mark.slow
def test_on_phantoms_with_the_example_model(tmp_path, capsys):
    """Six patients, so that there are verdicts: what explains passes, and each control fails tests that it must fail.

    Measures of altered images take minutes a lesion here; the tests above have them.
    """
    manifest = write_phantoms(tmp_path / "scans", 6)
    options = ["--method", "gradient", "--aggregate", "mean", "--no-pictures", "--save-maps", "none"]
    assert main(["explain", str(manifest), str(tmp_path / "out"), "--model", "example", *options]) == 0
    names = [part for name in ("gradient", "random", "edges") for part in ("--explainer", name)]
    measures = ["--measures", "random_instance,randomisation", "--margin", "8", "--steps", "2"]
    assert main(["sanity", str(tmp_path / "out"), "--model", "example", "--lesions", "6", *names, *measures]) == 0
    rows = table(tmp_path / "out/analysis/sanity_summary.tsv")
    found = {(r["explainer"], r["measure"]): r["verdict"] for r in rows}
    for measure in ("random_instance", "randomisation_signed"):
        assert found["gradient", measure] == "passes"
    assert found["random", "randomisation_signed"] == found["edges", "randomisation_signed"] == "fails"
    assert found["edges", "random_instance"] == "fails"
    assert "the control random passes random_instance" in capsys.readouterr().out
