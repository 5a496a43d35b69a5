"""The command `context` on a run: its tables against every image segmented whole."""

import json

import numpy as np
import pytest
from tiny import table

from xaiseg.analysis.reopened import open_scans, predictor_of, reopen_model
from xaiseg.analysis.run_tables import read_run
from xaiseg.checkpoints import load_model
from xaiseg.cli import main

STEPS = (0.0, 2.0, 5.0)


def test_rows_are_those_of_images_cut_out_and_segmented_whole(tiny_run):
    options = ["--model", tiny_run.model, "--distances", "0,2,5", "--background", "0.5,-0.25"]
    assert main([str(o) for o in ("context", tiny_run.out, *options)]) == 0
    rows = {(r["case"], r["lesion"], r["distance_mm"]): r for r in table(tiny_run.out / "analysis/context.tsv")}
    run = read_run(tiny_run.out)
    model = reopen_model(run, load_model(str(tiny_run.model)))
    predictor = predictor_of(run, model)
    found = np.flatnonzero(run.lesions["group"] == "TP")
    assert len(found)
    assert len(rows) == 4 * len(found)
    for opened in open_scans(run, found.tolist()):
        grid = np.stack(np.meshgrid(*map(np.arange, opened.scan.image.shape[:3]), indexing="ij"), -1)
        for instance in opened.instances:
            apart = (grid[..., None, :] - instance.voxels) * opened.scan.grid.spacing
            distance = np.sqrt((apart**2).sum(-1)).min(-1)
            for step in (*STEPS, np.inf):
                cut = np.where((distance <= step)[..., None], opened.scan.image, np.array([0.5, -0.25], np.float32))
                p = np.asarray(predictor.probability(predictor(cut)))[tuple(instance.voxels.T)]
                row = rows[opened.case.name, str(instance.label), f"{step:g}"]
                np.testing.assert_allclose(float(row["mean_probability"]), p.mean(), atol=1e-5)  # float32, other tiles
                np.testing.assert_allclose(float(row["max_probability"]), p.max(), atol=1e-5)
                assert row["detected"] == str(int((p > model.spec.threshold).any()))
    summary = {(r["measure"], r["distance_mm"]): r for r in table(tiny_run.out / "analysis/context_summary.tsv")}
    alone = [float(r["mean_probability"]) for (_, _, d), r in rows.items() if d == "0"]
    np.testing.assert_allclose(float(summary["mean_probability", "0"]["estimate"]), np.mean(alone), rtol=1e-6)
    record = json.loads((tiny_run.out / "analysis/context.json").read_text())
    assert record["settings"]["lesions"]["groups"] == ["TP"]
    assert set(record["files"]) == {"context.tsv", "context_summary.tsv", "context.png"}
    for name in record["columns"]:
        assert list(record["columns"][name]) == list(table(tiny_run.out / "analysis" / name)[0])


def test_a_run_without_groups_takes_all_its_lesions(tiny_run, capsys):
    path = tiny_run.out / "lesions.tsv"
    path.write_text(path.read_text().replace("\tTP\t", "\tunlabelled\t").replace("\tFP\t", "\tunlabelled\t"))
    assert main(["context", str(tiny_run.out), "--model", str(tiny_run.model), "--distances", "0:1:1"]) == 0
    assert f"{len(table(path))} lesions of 2 patients" in capsys.readouterr().out


def test_what_cannot_be_done_is_said(tiny_run, fails, tmp_path):
    ask = ("context", tiny_run.out, "--model", tiny_run.model)
    assert "no lesion of group FN" in fails(*ask, "--groups", "FN")
    assert "mm³" in fails(*ask, "--volume", "1e6:")
    assert "3 background values for 2 channels" in fails(*ask, "--background", "1,2,3")
    assert "the model of the run" in fails(*ask[:3], "example")
    assert "cannot be read" in fails("context", tmp_path / "none", *ask[2:])
    assert not (tiny_run.out / "analysis").exists()
    path = tiny_run.out / "cases.tsv"
    path.write_text(path.read_text().replace("\tdone\t", "\tleft\t", 1))
    assert "left to do" in fails(*ask)


@pytest.mark.parametrize("text", ["3:1:1", "0:5:0", "-1:3:1", "1,1", "a", "0:3"])
def test_distances_that_do_not_rise_are_wrong_usage(tiny_run, text):
    with pytest.raises(SystemExit, match="2"):
        main(["context", str(tiny_run.out), "--model", "example", f"--distances={text}"])
