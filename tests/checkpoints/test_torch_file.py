"""Reading `.pth` files: what a pickle asks to run is refused, damage is named, tensors come out as stored."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from xaiseg.checkpoints import convert, read_state_dict
from xaiseg.checkpoints.torch_file import read_checkpoint
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures"


class Stored:
    """A tensor as `torch.save` pickles it, without PyTorch: persistent storages and the names of rebuilding functions."""

    def __init__(self, array, storage_type="FloatStorage", size=None, stride=None, offset=0, count=None):
        self.array = np.ascontiguousarray(array)
        self.type, self.offset = storage_type, offset
        self.size = self.array.shape if size is None else size
        self.stride = tuple(s // self.array.itemsize for s in self.array.strides) if stride is None else stride
        self.count = self.array.size if count is None else count


class Call:
    """A pickle that calls `module.name(*args)` when it is loaded, and then sets the result's `state`."""

    def __init__(self, module, name, *args, state=None):
        self.module, self.name, self.args, self.state = module, name, args, state


def protocol2(value, storages):
    """Pickle opcodes for nested dicts, lists, tuples, strings, numbers, None, `Stored` and `Call`."""

    def text(s):
        raw = s.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw

    def name(module, attribute):
        return f"c{module}\n{attribute}\n".encode()

    match value:
        case dict():
            items = b"".join(protocol2(k, storages) + protocol2(v, storages) for k, v in value.items())
            return b"}(" + items + b"u"
        case str():
            return text(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case float():
            return b"G" + struct.pack(">d", value)
        case list():
            return b"](" + b"".join(protocol2(v, storages) for v in value) + b"e"
        case int():
            return f"I{value}\n".encode()
        case tuple():
            return b"(" + b"".join(protocol2(v, storages) for v in value) + b"t"
        case Call():
            state = b"" if value.state is None else protocol2(value.state, storages) + b"b"
            return name(value.module, value.name) + protocol2(value.args, storages) + b"R" + state
        case Stored():
            key = str(len(storages))
            storages[key] = value.array.tobytes()
            reference = (
                b"("
                + text("storage")
                + name("torch", value.type)
                + text(key)
                + text("cpu")
                + protocol2(value.count, storages)
                + b"tQ"
            )
            rest = [protocol2(v, storages) for v in (value.offset, tuple(value.size), tuple(value.stride), False)]
            hooks = name("collections", "OrderedDict") + b")R"
            return name("torch._utils", "_rebuild_tensor_v2") + b"(" + reference + b"".join(rest) + hooks + b"tR"
    raise TypeError(value)


def write(path, content, byteorder=b"little"):
    storages: dict[str, bytes] = {}
    pickled = b"\x80\x02" + protocol2(content, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def message(path) -> str:
    with pytest.raises(InputError) as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


@pytest.fixture
def array():
    return np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def test_tensors_come_out_as_stored(tmp_path, array):
    state = read_state_dict(write(tmp_path / "a.pth", {"a": Stored(array), "b": Stored(array[0])}))
    assert list(state) == ["a", "b"]
    np.testing.assert_array_equal(state["a"], array)
    np.testing.assert_array_equal(state["b"], array[0])


def test_views_strides_and_scalars(tmp_path, array):
    transposed = Stored(array, size=(4, 3), stride=(1, 4), offset=12)
    scalar = Stored(np.array([7], np.int64), "LongStorage", size=(), stride=())
    empty = Stored(np.zeros(0, np.float32), size=(0, 3), stride=(3, 1))
    state = read_state_dict(write(tmp_path / "a.pth", {"t": transposed, "s": scalar, "e": empty}))
    np.testing.assert_array_equal(state["t"], array[1].T)
    assert state["s"] == 7
    assert state["s"].shape == ()
    assert state["e"].shape == (0, 3)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("DoubleStorage", np.float64),
        ("BoolStorage", np.bool_),
    ],
)
def test_other_dtypes(tmp_path, array, storage, dtype):
    state = read_state_dict(write(tmp_path / "a.pth", {"a": Stored(array.astype(dtype), storage)}))
    assert state["a"].dtype == dtype
    np.testing.assert_array_equal(state["a"], array.astype(dtype))


def test_a_file_that_pytorch_wrote_with_prefixes_and_a_wrapper():
    plain, wrapped = (read_state_dict(FIXTURES / f"{name}.pth") for name in ("unet_2d", "unet_module_prefix"))
    assert list(plain) == list(wrapped)
    assert "model.0.conv.weight" in plain
    for name in plain:
        np.testing.assert_array_equal(plain[name], wrapped[name])


@pytest.mark.parametrize(
    "name", ["module.a", "_orig_mod.a", "module._orig_mod.a", "_orig_mod.module.a", "module.module.a"]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "network_weights", "model", "net"])
def test_prefixes_and_wrappers(tmp_path, array, name, wrapper):
    content = {name: Stored(array)}
    path = write(tmp_path / "a.pth", content if wrapper is None else {"epoch": 3, wrapper: content})
    np.testing.assert_array_equal(read_state_dict(path)["a"], array)


def test_names_that_collide_once_stripped_are_refused(tmp_path, array):
    path = write(tmp_path / "a.pth", {"module.a": Stored(array), "a": Stored(array + 1)})
    assert "'a' occurs twice" in message(path)


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (("module.a", "b"), "module.a", "b"),
        (("a", "_orig_mod.b", "_orig_mod.c"), "a", "_orig_mod.b"),
        (("module.a", "module._orig_mod.b"), "module.a", "module._orig_mod.b"),
    ],
)
def test_mixed_prefixes_are_refused(tmp_path, array, names, one, other):
    path = write(tmp_path / "a.pth", {name: Stored(array) for name in names})
    assert f"mixed prefixes, {one!r} beside {other!r}" in message(path)


def test_a_name_that_would_break_the_message_is_refused(tmp_path, array):
    assert "a tensor called 'a\\nb'" in message(write(tmp_path / "a.pth", {"a\nb": Stored(array)}))


def dtype(code, order="<"):
    """As NumPy pickles a dtype."""
    return Call("numpy", "dtype", code, False, True, state=(3, order, None, None, None, -1, -1, 0))


def scalar(value, module="numpy._core.multiarray"):
    """As NumPy pickles a scalar in PyTorch's protocol, which has no bytes."""
    raw = Call("_codecs", "encode", value.tobytes().decode("latin1"), "latin1")
    return Call(module, "scalar", dtype(value.dtype.str[1:], value.dtype.str[0]), raw)


def test_all_of_a_checkpoint_as_plain_data(tmp_path, array):
    content = {
        "loss": [scalar(np.float32(0.1)), scalar(np.float64(-1e300)), 0.25],
        "old": scalar(np.float64(np.pi), "numpy.core.multiarray"),
        "epoch": scalar(np.int64(-3)),
        "best": scalar(np.bool_(True)),
        "axes": (0, 1),
        "nothing": None,
        "device": Call("torch", "device", "cuda", 0),
        "cpu": Call("torch", "device", "cpu"),
        "weights": {"a": Stored(array)},
    }
    read = read_checkpoint(write(tmp_path / "a.pth", content))
    np.testing.assert_array_equal(read.pop("weights")["a"], array)
    assert read == {
        "loss": [float(np.float32(0.1)), -1e300, 0.25],
        "old": np.pi,
        "epoch": -3,
        "best": True,
        "axes": (0, 1),
        "nothing": None,
        "device": "cuda:0",
        "cpu": "cpu",
    }
    assert {type(v) for v in read["loss"]} == {float}
    assert type(read["epoch"]) is int


@pytest.mark.parametrize(
    "value",
    [
        Call("numpy", "dtype", "O8", False, True),
        Call("numpy", "dtype", "V8", False, True),
        Call("numpy", "dtype", "M8[ns]", False, True),
        dtype("f8", ">"),
        Call("numpy._core.multiarray", "scalar", dtype("f8"), Call("_codecs", "encode", "four", "latin1")),
        Call("numpy._core.multiarray", "scalar", dtype("f8"), "12345678"),
        Call("numpy._core.multiarray", "scalar", "O", Call("_codecs", "encode", "12345678", "latin1")),
        Call("_codecs", "encode", "abc", "rot13"),
        Call("_codecs", "encode", "abc", "zip"),
    ],
)
def test_scalars_of_anything_but_numbers_are_refused(tmp_path, value):
    path = write(tmp_path / "a.pth", {"value": value})
    with pytest.raises(InputError, match="damaged checkpoint"):
        read_checkpoint(path)


def test_attributes_set_by_a_pickle_are_dropped(tmp_path, array):
    """PyTorch sets `_metadata` on a state dict; an attribute `items` would hide the method."""
    state = Call("collections", "OrderedDict", state={"_metadata": {"": {"version": 1}}, "items": "x"})
    read = read_checkpoint(write(tmp_path / "a.pth", {"weights": state}))["weights"]
    assert list(read.items()) == []
    assert vars(read) == {}


@pytest.mark.parametrize(
    "call",
    [
        ("posix", "system"),
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("subprocess", "getoutput"),
        ("torch", "load"),
        ("collections", "namedtuple"),
        ("numpy", "load"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("_codecs", "decode"),
        ("pathlib", "PosixPath"),
    ],
)
def test_a_pickle_that_asks_for_code_is_refused_unrun(tmp_path, array, call):
    touched = tmp_path / "touched"
    argument = f"open({str(touched)!r}, 'w')" if call[1] == "eval" else f"touch {touched}"
    path = write(tmp_path / "a.pth", {"a": Stored(array), "b": Call(*call, argument)})
    assert f"asks for {call[0]}.{call[1]}" in message(path)
    assert not touched.exists()


def test_the_payload_would_have_run(tmp_path):
    """The test above can fail: Python's own unpickler runs the same bytes."""
    touched = tmp_path / "touched"
    path = write(tmp_path / "a.pth", {"b": Call("os", "system", f"touch {touched}")})
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert touched.exists()


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_reduced_object_in_a_zip_with_data_pkl_at_its_root(tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": Payload(f"touch {touched}")}))
    assert "system, which is not a tensor" in message(path)
    assert not touched.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_loaded(tmp_path, protocol):
    touched, path = tmp_path / "touched", tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(OrderedDict(a=Payload(f"touch {touched}")), protocol))
    assert "not a PyTorch checkpoint" in message(path)
    assert not touched.exists()


def test_a_missing_file(tmp_path):
    assert "no such checkpoint file" in message(tmp_path / "absent.pth")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.95])
def test_a_truncated_file(tmp_path, kept):
    raw = (FIXTURES / "unet_2d.pth").read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    assert "cut off" in message(path)


def test_flipped_bytes_are_errors_or_harmless(tmp_path):
    """Whatever is damaged, the reader raises InputError or returns arrays, never anything else."""
    raw = (FIXTURES / "unet_2d.pth").read_bytes()
    path = tmp_path / "a.pth"
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(300):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            state = read_state_dict(path)
        except InputError as error:
            refused.append(str(error))
        else:
            assert all(isinstance(value, np.ndarray) for value in state.values())
    assert refused
    assert not any("\n" in text for text in refused)


def test_flipped_bytes_within_the_pickle(tmp_path):
    """As above, past the archive's check sums."""
    with zipfile.ZipFile(FIXTURES / "unet_2d.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    path = tmp_path / "a.pth"
    rng = np.random.default_rng(1)
    refused: list[str] = []
    for _ in range(300):
        damaged = bytearray(members[pickled])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, bytes(damaged) if name == pickled else raw)
        try:
            read_state_dict(path)
        except InputError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in text for text in refused)


@pytest.mark.parametrize(
    "layout",
    [
        {"size": (5, 5), "stride": (5, 1)},
        {"size": (2, 3), "stride": (3, 1), "offset": 19},
        {"size": (2,), "stride": (1,), "offset": -1},
        {"size": (2,), "stride": (-1,), "offset": 5},
        {"size": (-2,), "stride": (1,)},
        {"size": (2, 2), "stride": (1,)},
        {"count": 10**6},
        # a tensor of 64 TB in a file of 100 bytes
        {"size": (4_000_000, 4_000_000), "stride": (0, 0)},
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, array, layout):
    assert "damaged checkpoint" in message(write(tmp_path / "a.pth", {"a": Stored(array, **layout)}))


def test_a_missing_storage(tmp_path, array):
    path = write(tmp_path / "a.pth", {"a": Stored(array)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    assert "damaged checkpoint" in message(path)


def test_other_archives_and_contents(tmp_path, array):
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    assert "not a PyTorch checkpoint" in message(tmp_path / "other.pth")
    assert "big-endian" in message(write(tmp_path / "big.pth", {"a": Stored(array)}, byteorder=b"big"))
    assert "holds no state dict" in message(write(tmp_path / "numbers.pth", {"epoch": 3}))
    assert "holds no state dict" in message(write(tmp_path / "tensor.pth", Stored(array)))


@pytest.mark.parametrize(
    ("storage", "dtype", "value"),
    [
        ("FloatStorage", np.float32, np.nan),
        ("BFloat16Storage", ml_dtypes.bfloat16, np.inf),
        ("DoubleStorage", np.float64, 1e300),
    ],
)
def test_weights_that_are_not_finite_are_not_converted(tmp_path, storage, dtype, value):
    content = {name: Stored(array) for name, array in read_state_dict(FIXTURES / "unet_instance_affine.pth").items()}
    content["model.2.conv.bias"] = Stored(np.array([0, value], dtype), storage)
    path = write(tmp_path / "a.pth", content)
    with pytest.raises(InputError, match=r"model\.2\.conv\.bias holds NaN or infinite values"):
        convert(path)
