"""Checkpoints in and out: PyTorch files are read without PyTorch, models are stored as folders (Orbax and JSON)."""

from xaiseg.checkpoints.convert import convert
from xaiseg.checkpoints.folder import load_model, model_hash, save_model
from xaiseg.checkpoints.shipped import model_card, shipped_models
from xaiseg.checkpoints.torch_file import read_state_dict

__all__ = ["convert", "load_model", "model_card", "model_hash", "read_state_dict", "save_model", "shipped_models"]
