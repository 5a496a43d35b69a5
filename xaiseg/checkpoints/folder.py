"""The model folder: `model.json`, readable, beside `parameters/`, an Orbax checkpoint. Loading it needs no PyTorch."""

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xaiseg._version import __version__
from xaiseg.checkpoints.shipped import shipped_folder, shipped_models
from xaiseg.errors import InputError
from xaiseg.imaging.nnunet import NnunetPreprocessing
from xaiseg.models import NETWORKS, Model, ModelSpec, expected_variables, outputs
from xaiseg.models.spec import BLENDINGS, NORMALISATIONS, OUTPUT_ACTIVATIONS, TILINGS

_FORMAT = 1


def save_model(folder: str | Path, model: Model, overwrite: bool = False) -> Path:
    """Write a model folder. It is assembled beside its destination and renamed, so a half-written one is never seen.

    Raises InputError where the folder exists (without `overwrite`) or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder to write; choose another name")
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: exists; choose another folder or give --overwrite")
    if folder.exists() and not _replaceable(folder):
        raise InputError(f"{folder}: exists and is not a model folder, so it is not overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        (staging / "new").mkdir()  # the staging folder itself is closed to others
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / "new" / "parameters", jax.tree.map(np.asarray, dict(model.variables)))
        description = {
            "format": _FORMAT,
            "xaiseg_version": __version__,
            **dataclasses.asdict(model.spec),
            "files": _hashes(staging / "new" / "parameters"),
        }
        (staging / "new" / "model.json").write_text(json.dumps(description, indent=2) + "\n")
        if folder.exists():
            folder.rename(staging / "old")
        (staging / "new").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _replaceable(folder: Path) -> bool:
    return (folder / "model.json").is_file() or (folder.is_dir() and not any(folder.iterdir()))


def load_model(folder: str | Path) -> Model:
    """Read a model folder, or a model that comes with the package: a name of `shipped_models()` that no folder here has.

    Raises InputError where it is missing, damaged, or its parameters do not fit its architecture.
    """
    if not Path(folder).exists() and str(folder) in shipped_models():
        folder = shipped_folder(str(folder))
    folder = Path(folder).absolute()
    content = _read_description(folder)
    _check_files(folder, content.pop("files", None))
    spec = spec_from_dict(content, str(folder / "model.json"))
    expected = expected_variables(spec)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            _check_tree(checkpointer.metadata(folder / "parameters"), expected, folder)
            variables = checkpointer.restore(folder / "parameters", expected)
    except InputError:
        raise
    except Exception as error:  # Orbax raises many kinds for a damaged checkpoint; each means the same to the user
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{folder}/parameters: cannot be read ({first[:200]}); convert or train the model again"
        ) from error
    return Model(spec, variables)


def model_hash(model: Model) -> str:
    """SHA-256 over architecture and parameters: the same for the same network wherever it is stored."""
    digest = hashlib.sha256()
    digest.update(json.dumps([model.spec.architecture, model.spec.options], sort_keys=True).encode())
    for path, leaf in sorted(
        (jax.tree_util.keystr(p), v) for p, v in jax.tree_util.tree_leaves_with_path(model.variables)
    ):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _hashes(parameters: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path within it."""
    files = sorted(path for path in parameters.rglob("*") if path.is_file())
    return {path.relative_to(parameters).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(folder: Path, recorded: Any) -> None:
    """Raise InputError unless the parameters are the files that were saved; Orbax's own complaints are long and many."""
    if not isinstance(recorded, dict) or not recorded:
        raise InputError(f"{folder}/model.json: field 'files' is missing; convert or train the model again")
    found = _hashes(folder / "parameters")
    for name, digest in recorded.items():
        if found.get(name) != digest:
            state = "damaged" if name in found else "missing"
            raise InputError(
                f"{folder}/parameters/{name}: {state}; copy the model folder again, or convert or train it again"
            )


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    if not file.is_file():
        raise InputError(
            f"{folder}: not a model folder (no model.json inside); make one with `xaiseg convert`, or name one that comes with "
            f"xaiseg: {', '.join(shipped_models())}"
        )
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds {type(content).__name__}, expected an object")
    if content.pop("format", None) != _FORMAT:
        raise InputError(f"{file}: written in a format this xaiseg ({__version__}) does not read; update xaiseg")
    content.pop("xaiseg_version", None)
    return content


def spec_from_dict(content: dict[str, Any], source: str) -> ModelSpec:
    """A checked `ModelSpec`. Raises InputError that names the field, what was found and what was expected."""
    fields = {f.name for f in dataclasses.fields(ModelSpec)}
    if unknown := sorted(set(content) - fields):
        raise InputError(f"{source}: unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    if missing := [name for name in ("architecture", "options", "channels", "window") if name not in content]:
        raise InputError(f"{source}: field {missing[0]!r} is missing")
    content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    spec = ModelSpec(**content)
    reserved = {"case", "reference", "instances"}  # the manifest's own columns
    rules = [
        (
            isinstance(spec.architecture, str) and spec.architecture in NETWORKS,
            "architecture",
            f"one of {', '.join(NETWORKS)}",
        ),
        (isinstance(spec.options, dict), "options", "an object of the network's arguments"),
        (
            isinstance(spec.channels, tuple)
            and all(isinstance(c, str) for c in spec.channels)
            and len(set(spec.channels)) == len(spec.channels) > 0
            and not reserved & set(spec.channels),
            "channels",
            "different names, none of them case, reference or instances",
        ),
        (
            isinstance(spec.window, tuple)
            and len(spec.window) == 3
            and all(isinstance(n, int) and n > 0 for n in spec.window),
            "window",
            "three positive integers",
        ),
        (isinstance(spec.overlap, float | int) and 0 <= spec.overlap < 1, "overlap", "a number from 0 to below 1"),
        (spec.blending in BLENDINGS, "blending", " or ".join(BLENDINGS)),
        (spec.tiling in TILINGS, "tiling", " or ".join(TILINGS)),
        (
            isinstance(spec.mirror_axes, tuple)
            and all(a in (0, 1, 2) for a in spec.mirror_axes)
            and len(set(spec.mirror_axes)) == len(spec.mirror_axes),
            "mirror_axes",
            "different axes out of 0, 1, 2",
        ),
        (
            isinstance(spec.members, tuple)
            and all(isinstance(m, str) for m in spec.members)
            and len(set(spec.members)) == len(spec.members),
            "members",
            "different names",
        ),
        (spec.output_activation in OUTPUT_ACTIVATIONS, "output_activation", " or ".join(OUTPUT_ACTIVATIONS)),
        (
            spec.threshold is None or (isinstance(spec.threshold, float | int) and 0 < spec.threshold < 1),
            "threshold",
            "a number between 0 and 1, or null for the most probable class",
        ),
        (spec.connectivity in (6, 18, 26), "connectivity", "6, 18 or 26"),
        (isinstance(spec.min_voxels, int) and spec.min_voxels >= 1, "min_voxels", "a positive integer"),
        (spec.normalisation in NORMALISATIONS, "normalisation", " or ".join(NORMALISATIONS)),
        (isinstance(spec.preprocessing, dict), "preprocessing", "an object"),
        (isinstance(spec.target_class, int) and spec.target_class >= 0, "target_class", "a class index, 0 or more"),
        (_is_orientation(spec.orientation), "orientation", "native, or axis codes such as RAS"),
    ]
    for holds, name, expected in rules:
        if not holds:
            raise InputError(f"{source}: {name} is {getattr(spec, name)!r}, expected {expected}")
    if spec.normalisation == "nnunet":
        planned = NnunetPreprocessing.from_dict(spec.preprocessing, f"{source}: preprocessing")
        if planned.channels != len(spec.channels):
            raise InputError(
                f"{source}: preprocessing is for {planned.channels} channels, but channels names {len(spec.channels)}"
            )
    try:
        classes, taps = outputs(spec)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{source}: not a network that can be built: {error}; change the window or the network's options"
        ) from error
    if str(spec.options.get("norm", "")).startswith("instance"):
        for name, (*grid, _) in taps.items():
            if math.prod(grid) == 1:
                raise InputError(
                    f"{source}: a window of {spec.window} leaves one voxel at {name}, where an instance norm gives nothing but "
                    "zeros; give a larger window"
                )
    if spec.target_class not in range(classes):
        raise InputError(
            f"{source}: target_class is {spec.target_class!r}, expected 0 to {classes - 1}, see --target-class"
        )
    if spec.default_layer not in taps:
        raise InputError(f"{source}: default_layer is {spec.default_layer!r}, expected one of {', '.join(taps)}")
    return spec


def _is_orientation(codes: Any) -> bool:
    axes = ("LR", "PA", "IS")
    return codes == "native" or (
        isinstance(codes, str) and len(codes) == 3 and all(sum(c in axis for c in codes) == 1 for axis in axes)
    )


def _check_tree(found: Any, expected: Any, folder: Path) -> None:
    found = getattr(found, "item_metadata", found)
    shapes = {jax.tree_util.keystr(p): tuple(v.shape) for p, v in jax.tree_util.tree_leaves_with_path(_plain(found))}
    wanted = {jax.tree_util.keystr(p): tuple(v.shape) for p, v in jax.tree_util.tree_leaves_with_path(expected)}
    if not shapes:
        raise FileNotFoundError("no parameters inside")
    problems = [f"missing {k}" for k in wanted if k not in shapes] + [f"unknown {k}" for k in shapes if k not in wanted]
    problems += [
        f"{k} has shape {shapes[k]}, expected {wanted[k]}" for k in wanted if shapes.get(k, wanted[k]) != wanted[k]
    ]
    if problems:
        raise InputError(f"{folder}/parameters: do not fit the network of model.json: {'; '.join(problems)}")


def _plain(tree: Any) -> Any:
    tree = getattr(tree, "tree", tree)
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
