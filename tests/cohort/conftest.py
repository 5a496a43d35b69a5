from pathlib import Path

import pytest
from tiny import CASE, Explain, write_case, write_manifest, write_model

from xaiseg.cli import main
from xaiseg.cohort import stages, tables


@pytest.fixture(scope="session")
def native_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("native") / "model")


@pytest.fixture(scope="session")
def ras_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("ras") / "model", "RAS")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case with everything."""
    folder = tmp_path_factory.mktemp("input")
    return write_manifest(folder / "cases.tsv", [write_case(folder, CASE)])


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases."""
    folder = tmp_path_factory.mktemp("cohort")
    return write_manifest(folder / "cases.tsv", [write_case(folder, f"sub-0{n}", seed=n) for n in (1, 2, 3)])


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are most of the time of a tiny run, and have tests of their own."""
    monkeypatch.setattr(stages, "lesion_figure", lambda *_, path, **__: path.write_bytes(b"lesion"))
    monkeypatch.setattr(tables, "summary_figure", lambda _rows, _channels, path, **__: path.write_bytes(b"summary"))


@pytest.fixture
def explain(no_figures: None, native_model: Path, manifest: Path, tmp_path: Path) -> Explain:
    """`explain(name, *options)` runs the command on the one case into the folder `name`, which it returns."""

    def call(
        name: str,
        *options: str,
        source: Path = manifest,
        model: Path = native_model,
        status: int = 0,
        level: str | None = None,
    ) -> Path:
        out = tmp_path / name
        where = [str(source), str(out), *([level] if level else [])]
        defaults = ["--samples", "2", "--chunk", "4"]
        assert main(["explain", *where, "--model", str(model), *defaults, *options]) == status
        return out

    return call
