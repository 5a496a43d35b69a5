"""Read tensors from a PyTorch `.pth` file without PyTorch and without running what a pickle asks for.

A `.pth` is a zip archive: `*/data.pkl` describes tensors, `*/data/<key>` holds their bytes. The unpickler below can build
dicts, lists, numbers, strings and tensors, nothing else: any other global in the stream is refused before it is looked up.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xaiseg.errors import InputError

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# State dicts may be wrapped, as training scripts save them.
_WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, prefixes `module.` and `_orig_mod.` stripped.

    Raises InputError for a file that is missing, damaged, not a PyTorch zip archive, holds anything but plain data, or holds no
    state dict.
    """
    content = _load(Path(path))
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(v, np.ndarray) for v in content.values()):
        raise InputError(f"{path}: holds no state dict (a mapping from names to tensors); save `model.state_dict()`")
    state: dict[str, np.ndarray] = {}
    for name, value in content.items():
        if not isinstance(value, np.ndarray):
            continue
        stripped = _strip(str(name))
        if stripped in state:
            raise InputError(f"{path}: {stripped!r} occurs twice once prefixes are stripped; save one network per file")
        state[stripped] = value
    return state


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _load(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected' if path.is_dir() else 'no such'} checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [n for n in names if n.endswith("/data.pkl") or n == "data.pkl"]
            if len(pickles) != 1:
                raise InputError(f"{path}: a zip archive but not a PyTorch checkpoint (no data.pkl inside)")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() == b"big":
                raise InputError(f"{path}: stored big-endian; save it again on a little-endian machine")
            return _TensorUnpickler(archive, root, path).load()
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: not a PyTorch checkpoint, or cut off (expected the zip format of torch >= 1.6, {error}); "
            "copy it again, or load it in PyTorch and save its state dict"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except InputError:
        raise
    except Exception as error:  # a damaged zip or pickle raises anything from RuntimeError to MemoryError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged checkpoint ({reason}); copy it again") from error


class _Storage:
    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(_STORAGES[name])


# Python's unpickler, not the C one: that allocates its memo by the indices in the file, gigabytes for one damaged byte.
class _TensorUnpickler(pickle._Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root, self._path = archive, root, path
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch", "Size"): tuple,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        raise InputError(
            f"{self._path}: refused, its pickle asks for {module}.{name}, which is not a tensor or plain data; "
            "load it in PyTorch, if you trust it, and save only its state dict"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        if key not in self._storages:
            data = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), storage.dtype)
            if data.size < count:
                raise pickle.UnpicklingError(f"storage {key} holds {data.size} of {count} values")
            self._storages[key] = data
        return self._storages[key]


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or any(s < 0 for s in stride) or (0 not in size and last >= storage.size):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if math.prod(size) > storage.size:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
