"""The README's ten lines run as they stand, on a small phantom and the built-in model."""

import re
from pathlib import Path

import numpy as np
import pytest

from xaiseg import demo
from xaiseg.imaging import phantom

ROOT = Path(__file__).resolve().parent.parent


def test_the_api_in_ten_lines(tmp_path, monkeypatch):
    small = phantom.phantom(seed=3, shape=(80, 96, 80), spacing=2.0)
    monkeypatch.setattr(demo, "phantom", lambda seed: small)
    (tmp_path / "my_model").symlink_to(ROOT / "xaiseg" / "example" / "model")
    demo.write_phantoms(tmp_path, 1).rename(tmp_path / "scans.tsv")
    monkeypatch.chdir(tmp_path)

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    quick = code.replace("samples=50", "samples=2").replace("image, lesions)", "image, lesions[:1])")
    assert quick.count("samples=2") == quick.count("lesions[:1]") == 1
    names: dict = {}
    exec(quick, names)
    saliency, lesion = names["maps"][0], names["lesions"][0]
    assert saliency.values.shape[-1] == len(names["model"].spec.channels)
    inside = saliency.values[tuple((lesion.voxels - np.array(saliency.start)).T)]
    # the model looks for what is bright on FLAIR, so a brighter voxel inside a lesion raises its logit
    assert inside[:, 0].mean() > 0
    assert saliency.standard_error is not None
    assert names["infos"][0].samples == 2


@pytest.mark.parametrize("command", ["xaiseg demo", "pip install -e '.[test]'"])
def test_ci_runs_the_commands_of_the_readme(command):
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
