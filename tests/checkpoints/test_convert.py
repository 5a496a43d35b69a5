"""From a file or folder to a model that is saved, loaded and gives PyTorch's logits: every architecture, and what is asked of the user."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_torch_file import Stored, write

from xaiseg.checkpoints import convert, load_model, read_state_dict, save_model
from xaiseg.cli import main
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"


def flat(x, window):
    """The arrays of a 2-D fixture with the window's axis of side 1."""
    return np.expand_dims(x, 1 + window.index(1)) if 1 in window else x


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("unet_batch", {}, "unet"),
        ("unet_residual2_batch", {}, "unet"),
        ("unet_residual1_group_relu_nobias", {"norm": "group:2", "activation": "relu"}, "unet"),
        ("unet_2d", {"target_class": 1}, "unet"),
        ("dynunet_residual", {}, "dynunet"),
        ("dynunet_plain", {}, "dynunet"),
        ("dynunet_2d", {}, "dynunet"),
        ("swin_v1", {"patch_merging": "merging"}, "swin_unetr"),
        ("swin_v2", {"patch_merging": "mergingv2"}, "swin_unetr"),
    ],
)
def test_a_checkpoint_becomes_a_model_folder(name, options, architecture, tmp_path):
    arrays = np.load(FIXTURES / f"{name}.npz")
    x = arrays["x"] if arrays["x"].shape[0] == 1 and arrays["x"].ndim > 3 else arrays["x"][None]
    y = arrays["y"] if arrays["y"].ndim == x.ndim else arrays["y"][None]
    window = x.shape[1:-1] if x.ndim == 5 else (*x.shape[1:-1], 1)
    channels = ["FLAIR", "T1w", "T2w"][: x.shape[-1]]
    model = convert(FIXTURES / f"{name}.pth", channels, window, **options)
    assert model.spec.architecture == architecture
    loaded = load_model(save_model(tmp_path / "m", model))
    found = loaded.logits_fn(jnp.asarray(flat(x, window), jnp.float32))
    np.testing.assert_allclose(found, flat(y, window), atol=1e-4)
    assert loaded.spec == model.spec
    assert model.spec.default_layer in model.taps()
