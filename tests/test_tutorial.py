"""The tutorial runs as it stands, from two scans to the report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "tutorial.py"


@pytest.mark.slow
def test_from_two_scans_to_the_report(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")  # for what it says about errors
    folder = tmp_path / "tutorial"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    for experiment in ("context", "synthetic", "counterfactual", "sanity"):
        assert (folder / f"out/analysis/{experiment}.json").is_file()
        assert f"xaiseg {experiment} " not in page, f"the report takes {experiment} for missing"
    assert len(list((folder / "out").glob("sub-*.html"))) == 2
    assert (folder / "lesion.png").stat().st_size > 10_000


def test_its_cells_are_python_that_imports_what_there_is() -> None:
    """In the ordinary suite, without running it: names that it imports exist."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(imports) > 10
    exec("\n".join(imports), {})
