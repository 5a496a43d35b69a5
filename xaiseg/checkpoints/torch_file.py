"""Read a PyTorch `.pth` file without PyTorch and without running what a pickle asks for.

A `.pth` is a zip archive: `*/data.pkl` describes tensors, `*/data/<key>` holds their bytes. The unpickler below can build
dicts, lists, numbers, strings and tensors, nothing else: any other global in the stream is refused before it is looked up, and
those it knows, such as NumPy's scalars, stand for functions of our own that build plain data.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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
_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# State dicts may be wrapped, as training scripts save them.
_WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, prefixes `module.` and `_orig_mod.` stripped.

    Raises InputError for a file that is missing, damaged, not a PyTorch zip archive, holds anything but plain data, holds no state
    dict, or one in which some names have a prefix and others have not.
    """
    content = read_checkpoint(path)
    while isinstance(content, Mapping):
        held = [content[wrapper] for wrapper in _WRAPPERS if isinstance(content.get(wrapper), Mapping)]
        if not held:
            break
        content = held[0]
    if not isinstance(content, Mapping) or not any(isinstance(v, np.ndarray) for v in content.values()):
        raise InputError(f"{path}: holds no state dict (a mapping from names to tensors); save `model.state_dict()`")
    return strip_prefixes({str(k): v for k, v in content.items() if isinstance(v, np.ndarray)}, str(path))


def read_checkpoint(path: str | Path) -> Any:
    """All that a checkpoint holds, as plain data: dicts, lists, tuples, numbers, strings, and tensors as NumPy arrays.

    NumPy's scalars become Python's, devices become strings. Raises InputError for a file that is missing, damaged, not a PyTorch
    zip archive, or holds anything else.
    """
    return _load(Path(path))


def strip_prefixes(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Tensors by name without `module.` and `_orig_mod.`, which PyTorch's wrappers put in front.

    Raises InputError where the prefixes of two names differ: a wrapper renames all tensors of a network.
    """
    state: dict[str, np.ndarray] = {}
    first: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise InputError(f"{source}: damaged checkpoint (a tensor called {name!r}); copy it again")
        stripped = _strip(name)
        if stripped in state:
            raise InputError(
                f"{source}: {stripped!r} occurs twice once prefixes are stripped; save one network per file"
            )
        state[stripped] = tensor
        first.setdefault(name.removesuffix(stripped), name)
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise InputError(
            f"{source}: mixed prefixes, {one!r} beside {other!r}: tensors of two networks, or a file put together by hand; "
            "save the state dict of the one network again"
        )
    return state


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _load(path: Path) -> Any:
    if not path.is_file():
        found = "is a folder, expected" if path.is_dir() else "no such"
        raise InputError(f"{path}: {found} checkpoint file; give a .pth file, or the result folder of an nnU-Net")
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
            ("torch", "device"): _device,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy._core.multiarray", "scalar"): _scalar,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        raise InputError(
            f"{self._path}: refused, its pickle asks for {module}.{name}, which is not a tensor or plain data; "
            "load it in PyTorch, if you trust it, and save only its state dict"
        )

    def load_build(self) -> None:
        """State that objects are given after they were built: of ours only NumPy's dtypes need it, the rest is dropped.

        PyTorch hangs `_metadata` on a state dict; an attribute of a stranger's choice could stand in for a method of the dict's.
        """
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(self.stack[-1], _Dtype):  # type: ignore[attr-defined]
            self.stack[-1].set_state(state)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

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


def _device(kind: str, index: int | None = None) -> str:
    return str(kind) if index is None else f"{kind}:{index}"


class _Dtype:
    """A pickled `numpy.dtype`, of a number or a boolean only."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _SCALARS:
            raise pickle.UnpicklingError(f"a NumPy dtype {code!r}, expected a number's")
        self.numpy = np.dtype(code)

    def set_state(self, state: tuple) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"a NumPy dtype of byte order {state[1]!r}, expected little-endian")


def _scalar(dtype: _Dtype, raw: bytes) -> float | int | bool:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.numpy.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar that is no number")
    return np.frombuffer(raw, dtype.numpy)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Pickle's way to write bytes in its second protocol."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes as text in {encoding!r}, expected latin1")
    return text.encode("latin1")
