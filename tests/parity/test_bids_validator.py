"""The BIDS validator has no error to report about an output folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CASE, write_case, write_manifest, write_model

from xaiseg.cli import main

pytestmark = pytest.mark.parity


def test_derivatives_are_valid(tmp_path: Path) -> None:
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent)) or shutil.which(
        "bids-validator-deno"
    )
    if validator is None:
        pytest.skip("no bids-validator-deno (pip install bids-validator-deno)")
    lines = [write_case(tmp_path / "in", "sub-01"), write_case(tmp_path / "in", CASE.replace("01", "02"))]
    source, out = write_manifest(tmp_path / "in" / "cases.tsv", lines), tmp_path / "out"
    model = write_model(tmp_path / "model")
    options = ["--samples", "2", "--chunk", "4", "--method", "smoothgrad", "--method", "gradcam++"]
    assert main(["explain", str(source), str(out), "--model", str(model), *options]) == 0
    done = subprocess.run([validator, "--format", "json", str(out)], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in found if issue["severity"] == "error"] == []
    assert done.returncode == 0
