"""A finished run of `xaiseg explain` on two tiny scans, made once; tests that change it take a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import write_case, write_manifest, write_model

from xaiseg.cli import main


class TinyRun(NamedTuple):
    out: Path
    model: Path
    manifest: Path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("finished")
    model = write_model(folder / "model", "RAS")
    manifest = write_manifest(folder / "cases.tsv", [write_case(folder, f"sub-0{n}", seed=n) for n in (1, 2)])
    out = folder / "out"
    options = ["--samples", "2", "--chunk", "4", "--no-pictures"]
    assert main(["explain", str(manifest), str(out), "--model", str(model), *options]) == 0
    return TinyRun(out, model, manifest)


@pytest.fixture
def tiny_run(finished: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of the run, to write to."""
    return finished._replace(out=Path(shutil.copytree(finished.out, tmp_path / "out")))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(*arguments)`: what a command that must fail says, its only line."""

    def call(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xaiseg: error: ")]
        return line

    return call
