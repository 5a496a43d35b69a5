"""The loop: it learns, it resumes to the bit, it leaves a model folder, and it refuses what cannot be."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from training import loop
from training.__main__ import main
from training.cases import Cases, read_cases
from training.config import Config
from training.folder import Log, open_folder
from training.nnunet_plan import read_plan
from training.validate import Score
from xaiseg.checkpoints import load_model, model_hash
from xaiseg.cli import main as xaiseg_main
from xaiseg.errors import InputError
from xaiseg.imaging import write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cases(bids) -> Cases:
    folder, add = bids
    for name in ("sub-01", "sub-02", "sub-03"):
        add(name)
    return read_cases([folder], ["sub-03"], ("FLAIR", "T1w"))


def silent(_: str) -> None:
    pass


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_loss_falls_and_the_lesion_is_found(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    config = replace(tiny, steps=80, validate_every=40, checkpoint_every=80, thresholds=(0.3, 0.5, 0.7))
    loop.train(config, cases, tmp_path / "run", "the command", silent)
    log = entries(tmp_path / "run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    best = max((entry for entry in log if "ndsc" in entry), key=lambda entry: entry["ndsc"])
    assert best["ndsc"] > 0.5
    spec = load_model(tmp_path / "run" / "model").spec
    assert (spec.threshold, spec.source, spec.notes["step"]) == (best["threshold"], "the command", best["step"])


def test_resumed_is_uninterrupted(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    """Stopped at step 3, one step after a checkpoint: the parameters, statistics and log end the same, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(tiny, cases, whole, say=silent)

    def fail_after_step_three(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny, cases, parts, say=fail_after_step_three)
    assert entries(parts)[-1]["step"] == 3
    told: list[str] = []
    loop.train(tiny, cases, parts, say=told.append)
    assert "resuming after step 2" in told
    for a, b in zip(*(final_state(folder) for folder in (whole, parts)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model_hash(load_model(whole / "model")) == model_hash(load_model(parts / "model"))
    logs = [
        [{k: v for k, v in entry.items() if k not in ("seconds_per_step", "idle")} for entry in entries(f)]
        for f in (whole, parts)
    ]
    assert logs[0] == logs[1]

    written = (whole / "model" / "model.json").stat().st_mtime_ns
    loop.train(tiny, cases, whole, say=silent)  # a finished run is left as it is
    assert (whole / "model" / "model.json").stat().st_mtime_ns == written


def test_asked_to_stop_it_saves_and_goes_on(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    config = replace(tiny, checkpoint_every=100, validate_every=100)
    loop.train(config, cases, tmp_path / "whole", say=silent)
    steps = iter([False, True])
    with pytest.raises(loop.Stopped, match="stopped after step 2"):
        loop.train(config, cases, tmp_path / "parts", say=silent, stop=lambda: next(steps))
    told: list[str] = []
    loop.train(config, cases, tmp_path / "parts", say=told.append)
    assert "resuming after step 2" in told
    for a, b in zip(*(final_state(tmp_path / name) for name in ("whole", "parts")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_better_for_some_validations_it_stops(
    tiny: Config, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.3, 0.5, 0.5, 0.4, 0.9])
    monkeypatch.setattr(loop, "validate", lambda *_: [Score(0.4, next(scores), 0.1, 0.1, 0.1)])
    config = replace(tiny, steps=12, validate_every=1, patience=2)
    loop.train(config, cases, tmp_path / "run", say=silent)
    assert [entry["ndsc"] for entry in entries(tmp_path / "run") if "ndsc" in entry] == [0.3, 0.5, 0.5, 0.4]
    spec = load_model(tmp_path / "run" / "model").spec
    assert (spec.notes["step"], spec.threshold) == (2, 0.4)
    with loop.ocp.CheckpointManager(tmp_path / "run" / "checkpoints" / "best") as manager:
        assert manager.all_steps() == [2]
    loop.train(config, cases, tmp_path / "run", say=silent)  # and stays stopped: there is no fifth score


def test_a_checkpoint_that_cannot_be_written(
    tiny: Config, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: one error, and the run goes on from the checkpoint before."""
    save, saved = loop.ocp.CheckpointManager.save, []

    def full(manager, step, **options):
        if step == 4:
            raise OSError(28, "No space left on device")
        saved.append(step)
        return save(manager, step, **options)

    config = replace(tiny, validate_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(loop.ocp.CheckpointManager, "save", full)
        with pytest.raises(
            InputError, match=r"checkpoints: a checkpoint could not be written .*No space left.* make room"
        ):
            loop.train(config, Cases(cases.training, []), tmp_path / "run", say=silent)
    assert saved == [2]
    told: list[str] = []
    loop.train(config, Cases(cases.training, []), tmp_path / "run", say=told.append)
    assert "resuming after step 2" in told


def test_a_checkpoint_that_cannot_be_read(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    loop.train(tiny, Cases(cases.training, []), tmp_path / "run", say=silent)
    newest = tmp_path / "run" / "checkpoints" / "last" / "4"
    for file in newest.rglob("*"):
        if file.is_file() and "default" in file.parts:
            file.write_bytes(b"")
    with pytest.raises(InputError, match=r"last/4: cannot be read as a state of this config .*; delete it to go on"):
        loop.train(tiny, Cases(cases.training, []), tmp_path / "run", say=silent)


def test_the_average_is_what_is_exported(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    config = replace(tiny, average=0.5)
    model = load_model(loop.train(config, Cases(cases.training, []), tmp_path / "run", say=silent))
    with loop.ocp.CheckpointManager(tmp_path / "run" / "checkpoints" / "last") as manager:
        params, _, _, average, *_ = manager.restore(4, args=loop.ocp.args.StandardRestore())
    exported = model.variables["params"]["encoder0_conv"]["kernel"]
    np.testing.assert_array_equal(exported, average["encoder0_conv"]["kernel"])
    assert np.abs(exported - params["encoder0_conv"]["kernel"]).max() > 0


def test_folds_are_written_and_read(bids, tiny: Config, tmp_path: Path) -> None:
    folder, add = bids
    for name in ("sub-01_ses-1", "sub-01_ses-2", "sub-02", "sub-03"):
        add(name)
    cases = read_cases([folder], [], tiny.channels, folds=3, fold=1)
    loop.train(replace(tiny, steps=1), cases, tmp_path / "run", say=silent)
    again = read_cases([folder], [], tiny.channels, splits=tmp_path / "run" / "splits.tsv", fold=1)
    assert (again.training, again.validation) == (cases.training, cases.validation)
    assert {case.subject for case in cases.training}.isdisjoint(case.subject for case in cases.validation)
    with pytest.raises(InputError, match="--fold 3: expected one of 0 to 2"):
        read_cases([folder], [], tiny.channels, folds=3, fold=3)
    add("sub-04")
    with pytest.raises(InputError, match=r"--splits .*: case 'sub-04' is in no fold"):
        read_cases([folder], [], tiny.channels, splits=tmp_path / "run" / "splits.tsv")


def test_a_patch_larger_than_a_volume(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    config = replace(tiny, patch=(16, 16, 16))
    with pytest.raises(InputError, match=r"sub-01: \(18, 16, 14\) voxels, fewer than the patch of \(16, 16, 16\)"):
        loop.train(config, cases, tmp_path / "run", say=silent)


def test_a_mask_with_other_values(tiny: Config, bids, tmp_path: Path) -> None:
    folder, add = bids
    add("sub-01")
    mask = folder / "derivatives/manual/sub-01/anat/sub-01_label-L_mask.nii.gz"
    for values, message in ((3, "holds the value 3, expected a mask of 0 and 1"), (0.4, "0.4")):
        write(mask, np.full((18, 16, 14), values, np.float32), np.eye(4))
        cases = read_cases([folder], [], tiny.channels)
        with pytest.raises(InputError, match=message):
            loop.train(tiny, cases, tmp_path / f"run-{values}", say=silent)


def test_tensorboard_has_the_log(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    loop.train(tiny, Cases(cases.training, []), tmp_path / "run", say=silent, tensorboard=True)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"learning_rate" in events.read_bytes()


def final_state(folder: Path) -> list[np.ndarray]:
    with loop.ocp.CheckpointManager(folder / "checkpoints" / "last") as manager:
        return jax.tree.leaves(manager.restore(4, args=loop.ocp.args.StandardRestore()))


def test_without_validation_the_last_state_is_the_model(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    model = load_model(loop.train(tiny, Cases(cases.training, []), tmp_path / "run", say=silent))
    assert (model.spec.threshold, model.spec.notes) == (0.3, {"step": 4, "seed": 0})


def test_another_config_or_a_changed_mask_is_refused(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    out = tmp_path / "run"
    open_folder(out, tiny, cases)
    assert open_folder(out, tiny, cases) == out
    with pytest.raises(InputError, match=r"run: a run with config batch = 2 was begun here, not 3"):
        open_folder(out, replace(tiny, batch=3), cases)
    with pytest.raises(InputError, match=r"a run with training sub-02 = .* was begun here, not None"):
        open_folder(out, tiny, Cases(cases.training[:1], cases.validation))
    assert cases.training[0].reference is not None
    os.utime(cases.training[0].reference, ns=(0, 0))
    with pytest.raises(InputError, match=r"a run with training sub-01 = "):
        open_folder(out, tiny, cases)


def test_a_folder_of_something_else_is_refused(tiny: Config, tmp_path: Path) -> None:
    nothing = Cases([], [])
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no training run"):
        open_folder(tmp_path, tiny, nothing)
    with pytest.raises(InputError, match=r"thesis.txt: exists and is no training run"):
        open_folder(tmp_path / "thesis.txt", tiny, nothing)
    with pytest.raises(InputError, match="cannot be written"):
        open_folder(tmp_path / "thesis.txt" / "run", tiny, nothing)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as the record of a run"):
        open_folder(tmp_path / "broken", tiny, nothing)


def test_leftovers_of_a_killed_run_are_removed(tiny: Config, tmp_path: Path) -> None:
    out = open_folder(tmp_path / "run", tiny, Cases([], []))
    for leftover in (out / ".model-x", out / "volumes" / ".half"):
        leftover.mkdir()
        (leftover / "part").touch()
    open_folder(out, tiny, Cases([], []))
    assert sorted(path.name for path in out.rglob("*")) == ["run.json", "volumes"]


def test_no_lesion_anywhere(tiny: Config, bids, tmp_path: Path) -> None:
    folder, add = bids
    add("sub-01", lesion=False)
    add("sub-02")
    cases = read_cases([folder], ["sub-02"], tiny.channels)
    with pytest.raises(InputError, match=r"sub-01.*: no lesion voxel in any reference"):
        loop.train(tiny, cases, tmp_path / "run", say=silent)


def test_a_diverging_run_stops_before_it_is_saved(tiny: Config, cases: Cases, tmp_path: Path) -> None:
    config = replace(tiny, learning_rate=1e38, schedule="constant")
    with pytest.raises(InputError, match="lower learning_rate"):
        loop.train(config, cases, tmp_path / "run", say=silent)


def test_the_log_forgets_what_comes_again(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    with Log(tmp_path, 1) as log:
        log.write(2, loss=5)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 3},
        {"step": 2, "loss": 5},
    ]


def test_command(bids, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)
    command = ["--config", "unet_cpu", "--data", str(folder), "--validation", "sub-02", "--out", str(tmp_path / "run")]
    command += [
        "--steps",
        "1",
        "--set",
        'options={"channels": [4, 8], "strides": [2]}',
        "--set",
        "patch=8,8,8",
        "--set",
        "window=8,8,8",
    ]
    assert main(command) == 0
    assert f"model folder: {tmp_path}/run/model" in capsys.readouterr().out
    source = load_model(tmp_path / "run" / "model").spec.source
    assert source.startswith(
        f"python -m training --config unet_cpu --data {folder} --validation sub-02 --set 'options="
    )
    assert source.endswith("--set steps=1")
    assert main(["--config", "unet_cpu", "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: --data: missing")
    assert main(["--config", "example", "--data", str(folder), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: --data: config example draws synthetic brains")


@pytest.mark.slow
def test_nnunet_plans_from_the_cases_and_its_model_segments_them(
    bids, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02", "sub-03"):
        add(name)
    command = ["--config", "nnunet", "--data", str(folder), "--validation", "sub-03", "--out", str(tmp_path / "run")]
    # smaller than planned, as a user may wish
    for setting in ("options.features=[4, 8, 8]", "thresholds=0.2", "steps=2", "augmentation.low_resolution=0"):
        command += ["--set", setting]
    assert main(command) == 0, capsys.readouterr().err
    plan = read_plan(tmp_path / "run" / "plans.json")
    spec = load_model(tmp_path / "run" / "model").spec
    assert (spec.normalisation, spec.tiling, spec.mirror_axes) == ("nnunet", "nnunet", (0, 1, 2))
    assert (spec.architecture, spec.window, spec.options["features"]) == (plan.architecture, plan.patch_size, [4, 8, 8])
    assert main(command) == 0  # from the plan it has
    assert xaiseg_main(["segment", str(folder), str(tmp_path / "out"), "--model", str(tmp_path / "run" / "model")]) == 0
    assert len(list((tmp_path / "out").rglob("*_mask.nii.gz"))) == 3
    capsys.readouterr()
    other = ["--config", "unet_cpu", "--data", str(folder), "--out", str(tmp_path / "other"), "--plans", "x.json"]
    assert main(other) == 1
    assert capsys.readouterr().err.startswith("error: --plans: config unet_cpu has no planner")


def test_no_room_for_a_checkpoint(tiny: Config, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything of it is written; the earlier one is left, and with room again the run goes on."""
    config = replace(tiny, steps=6, checkpoint_every=2, validate_every=6)
    usage = shutil.disk_usage(tmp_path)
    asked = []

    def filling(path: Path) -> object:
        asked.append(path)
        return usage if len(asked) < 2 else usage._replace(free=1000)

    monkeypatch.setattr(loop.shutil, "disk_usage", filling)
    with pytest.raises(InputError, match=r"a checkpoint could not be written \(it takes 1 MiB; 0 MiB are free\)"):
        loop.train(config, cases, tmp_path / "run", "", silent)
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "last").iterdir()] == ["2"]
    monkeypatch.undo()
    said: list[str] = []
    loop.train(config, cases, tmp_path / "run", "", said.append)
    assert "resuming after step 2" in said


def test_a_log_line_that_finds_no_room(bids, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, add = bids
    add("sub-01")

    def full(self: Log, step: int, **entry: float) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.file))

    monkeypatch.setattr(Log, "write", full)
    command = [*small_run(folder)[3:], "--out", str(tmp_path / "run")]
    command[command.index("--validation") + 1] = ""
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'run' / 'log.jsonl'}: No space left on device; what was saved before")


def small_run(folder: Path) -> list[str]:
    """The command for 60 quick steps, but for its `--out`."""
    settings = (
        'options={"channels":[4,8],"strides":[2]} patch=8,8,8 window=16,16,16 validate_every=10 checkpoint_every=3 '
        "log_every=1 steps=60 average=0.9"
    )
    command = [sys.executable, "-m", "training", "--config", "unet_cpu"]
    command += ["--data", str(folder), "--validation", "sub-02"]
    return command + [word for setting in settings.split() for word in ("--set", setting)]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(bids, tmp_path: Path) -> None:
    """Killed (SIGKILL) three times, each time some steps on, and then stopped (SIGTERM), a run ends as one that was left alone."""
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)
    command = small_run(folder)

    def run(out: Path, until: int | None = None, how: int = signal.SIGKILL) -> int:
        """Exit status; until a step was logged, for ever if None, and then a signal."""
        with subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if until is not None and line.startswith(f"step {until}/"):
                    process.send_signal(how)
            return process.wait()

    assert run(tmp_path / "whole") == 0
    assert [run(tmp_path / "parts", until) for until in (5, 20, 42)] == [-signal.SIGKILL] * 3
    assert run(tmp_path / "parts", 50, signal.SIGTERM) == 128 + signal.SIGTERM
    assert run(tmp_path / "parts") == 0
    assert model_hash(load_model(tmp_path / "whole" / "model")) == model_hash(load_model(tmp_path / "parts" / "model"))
    assert [e["step"] for e in entries(tmp_path / "parts") if "loss" in e] == list(range(1, 61))


@pytest.mark.slow
def test_a_disk_that_fills_up(bids, tmp_path: Path) -> None:
    """One line says so; with room again, the same command ends as a run that never stopped."""
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here, so no small disk")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        command, run = small_run(folder), disk / "run"
        errors = tmp_path / "errors"
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                [*command, "--out", str(run)], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 6/"):  # the moment at which a checkpoint begins to be written
                    subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'fill'}"], capture_output=True, check=False)
            assert process.wait() == 1
        line = errors.read_text().strip()
        assert "\n" not in line, line
        assert line.startswith(f"error: {run / 'checkpoints'}: a checkpoint could not be written")
        assert "make room and give the same command again" in line
        (disk / "fill").unlink()
        subprocess.run([*command, "--out", str(run)], cwd=ROOT, check=True, capture_output=True)
        subprocess.run([*command, "--out", str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
        ends = [model_hash(load_model(out / "model")) for out in (run, tmp_path / "whole")]
        assert ends[0] == ends[1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
