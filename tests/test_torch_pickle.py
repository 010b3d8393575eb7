"""Hand-made torch.save files: what the reader takes, and each way a file can be wrong."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from lact_jax import torch_pickle
from lact_jax.torch_pickle import open_torch

P = pickle


class Ops(bytes):
    """A fragment of pickle that leaves one value on the stack."""


def op(value):
    """Plain Python values and fragments to a fragment."""
    if isinstance(value, Ops):
        return value
    if isinstance(value, tuple):
        return Ops(P.MARK + b"".join(map(op, value)) + P.TUPLE)
    if isinstance(value, list):
        return Ops(P.EMPTY_LIST + P.MARK + b"".join(map(op, value)) + P.APPENDS)
    if isinstance(value, dict):
        pairs = b"".join(op(k) + op(v) for k, v in value.items())
        return Ops(P.EMPTY_DICT + P.MARK + pairs + P.SETITEMS)
    return Ops(pickle.dumps(value, protocol=2)[2:-1])


def name(module, attribute):
    return Ops(P.GLOBAL + f"{module}\n{attribute}\n".encode())


def call(function, *args):
    return Ops(function + op(args) + P.REDUCE)


def storage(key="0", kind="FloatStorage", count=6):
    return Ops(op(("storage", name("torch", kind), key, "cpu", count)) + P.BINPERSID)


def tensor(source=None, offset=0, shape=(2, 3), strides=(3, 1)):
    source = storage() if source is None else source
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, source, offset, shape, strides, False, hooks)


DATA = np.arange(6, dtype=np.float32)


def write(path, saved, storages=None, extra=(), compression=zipfile.ZIP_STORED, root="archive"):
    storages = {"0": DATA} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", P.PROTO + b"\x02" + op(saved) + P.STOP)
        for key, value in storages.items():
            archive.writestr(f"{root}/data/{key}", value.tobytes())
        for key, value in extra:
            archive.writestr(f"{root}/{key}", value)
    return path


def test_nested_tensors_scalars_and_views(tmp_path):
    parameter = call(name("torch._utils", "_rebuild_parameter"), tensor(), True, op({}))
    saved = {
        "model": {"w": tensor(), "p": parameter},
        "views": [tensor(offset=1, shape=(2, 2), strides=(1, 3))],
        "step": 3,
    }
    file = open_torch(write(tmp_path / "a.pth", saved, extra=[("byteorder", b"little")]))
    assert file.keys() == ["model.w", "model.p", "views.0"]
    assert file.scalars == {"step": 3}
    np.testing.assert_array_equal(file.get_tensor("model.w"), DATA.reshape(2, 3))
    np.testing.assert_array_equal(file.get_tensor("model.p"), DATA.reshape(2, 3))
    np.testing.assert_array_equal(file.get_tensor("views.0"), [[1, 4], [2, 5]])
    with pytest.raises(KeyError, match="a.pth.*'w'"):
        file.get_tensor("w")


def test_tensors_cannot_be_written_to(tmp_path):
    view = open_torch(write(tmp_path / "a.pth", {"w": tensor()})).get_tensor("w")
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


@pytest.mark.parametrize(
    "forbidden",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("collections", "OrderedDict.__init__"),
        ("lact_jax.torch_pickle", "open_torch"),
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path, forbidden):
    module, attribute = forbidden
    path = write(tmp_path / "evil.pth", {"w": tensor(), "x": name(module, attribute)})
    with pytest.raises(ValueError, match=rf"evil\.pth.*{module}\.{attribute}"):
        open_torch(path)


def test_code_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    command = call(name("os", "system"), f"touch {trace}")
    path = write(tmp_path / "evil.pth", {"w": tensor(), "x": command})
    with pytest.raises(ValueError, match=r"evil\.pth.*os\.system"):
        open_torch(path)
    assert not trace.exists()
    # The payload is real: an unrestricted unpickler runs it.
    pickle.loads(P.PROTO + b"\x02" + command + P.STOP)
    assert trace.exists()


@pytest.mark.parametrize(
    "target",
    [("torch", "FloatStorage"), ("torch._utils", "_rebuild_tensor_v2"),
     ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict")],
)  # fmt: skip
@pytest.mark.parametrize("state", [{"dtype": 1}, (None, {"__call__": 1}), [1], ({}, {"dtype": 1})])
def test_a_pickle_cannot_alter_the_reader(tmp_path, target, state):
    altered = Ops(name(*target) + op(state) + P.BUILD)
    path = write(tmp_path / "evil.pth", {"x": altered})
    before = dict(vars(torch_pickle._Dict)), dict(torch_pickle._GLOBALS)
    with pytest.raises(ValueError, match="evil.pth"):
        open_torch(path)
    assert (dict(vars(torch_pickle._Dict)), dict(torch_pickle._GLOBALS)) == before
    good = open_torch(write(tmp_path / "good.pth", {"w": tensor()}))
    np.testing.assert_array_equal(good.get_tensor("w"), DATA.reshape(2, 3))


def test_attributes_on_a_dict_are_dropped(tmp_path):
    ordered = Ops(call(name("collections", "OrderedDict")) + op({"items": 1}) + P.BUILD)
    filled = Ops(ordered + P.MARK + op("w") + tensor() + P.SETITEMS)
    assert open_torch(write(tmp_path / "a.pth", filled)).keys() == ["w"]


@pytest.mark.parametrize(
    "bad, words",
    [
        (tensor(offset=1), "reaches out"),
        (tensor(shape=(2, 4)), "reaches out"),
        (tensor(shape=(-1, 3)), "shape"),
        (tensor(strides=(3.0, 1)), "strides"),
        (tensor(strides=(1,)), "differ in length"),
        (tensor(source=op(3)), "not from a storage"),
        (tensor(source=storage(count=-1)), "persistent id"),
        (tensor(source=Ops(op("os.system") + P.BINPERSID)), "persistent id"),
        (tensor(source=storage(key="7")), "storage 7 of tensor w is missing"),
        (tensor(source=storage(count=7)), "storage 0 of tensor w has 24 bytes"),
        (tensor(source=storage(kind="DoubleStorage")), "storage 0 of tensor w has 24 bytes"),
        (Ops(P.EMPTY_SET), "neither a tensor nor a plain value"),
        (Ops(P.BINGET + b"\x63"), "damaged index"),
    ],
)
def test_damaged_index_is_an_error_that_names_the_file(tmp_path, bad, words):
    path = write(tmp_path / "bad.pth", {"w": bad})
    with pytest.raises(ValueError, match=rf"bad\.pth.*{words}"):
        open_torch(path)


def test_names_that_collide_are_an_error(tmp_path):
    path = write(tmp_path / "bad.pth", {"a.b": tensor(), "a": {"b": tensor()}})
    with pytest.raises(ValueError, match=r"bad\.pth.*'a\.b'"):
        open_torch(path)


def test_endless_and_exploding_structures_are_errors(tmp_path, monkeypatch):
    own_child = Ops(P.EMPTY_LIST + P.BINPUT + b"\x00" + P.BINGET + b"\x00" + P.APPEND)
    with pytest.raises(ValueError, match=r"loop\.pth.*nested deeper"):
        open_torch(write(tmp_path / "loop.pth", own_child))
    doubled = Ops(op(0))
    for _ in range(12):
        doubled = Ops(doubled + P.BINPUT + b"\x01" + P.BINGET + b"\x01" + P.TUPLE2)
    monkeypatch.setattr(torch_pickle, "_MAX_ENTRIES", 1000)
    with pytest.raises(ValueError, match=r"wide\.pth.*more than 1000"):
        open_torch(write(tmp_path / "wide.pth", doubled))


def test_files_of_other_kinds_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        open_torch(tmp_path / "none.pth")
    cases = {
        "empty.pth": (b"", "not a file written by torch.save"),
        "text.pth": (b"hello, this is text", "not a file written by torch.save"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        "cut.pth": (b"PK\x03\x04" + bytes(100), "truncated"),
    }
    for filename, (content, words) in cases.items():
        (tmp_path / filename).write_bytes(content)
        with pytest.raises(ValueError, match=f"{filename}.*{words}"):
            open_torch(tmp_path / filename)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="other.pth.*no data.pkl"):
        open_torch(tmp_path / "other.pth")


def test_big_endian_compressed_and_script_files_are_errors(tmp_path):
    path = write(tmp_path / "big.pth", {"w": tensor()}, extra=[("byteorder", b"big")])
    with pytest.raises(ValueError, match="big.pth.*big-endian"):
        open_torch(path)
    path = write(tmp_path / "deflated.pth", {"w": tensor()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="deflated.pth.*compressed"):
        open_torch(path)
    path = write(tmp_path / "script.pth", {"w": tensor()}, extra=[("constants.pkl", b"")])
    with pytest.raises(ValueError, match="script.pth.*TorchScript"):
        open_torch(path)


def test_flipped_byte_in_the_index_is_found(tmp_path):
    path = write(tmp_path / "flip.pth", {"w": tensor()})
    content = bytearray(path.read_bytes())
    content[content.index(b"cpu")] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flip\.pth.*data\.pkl.*damaged"):
        open_torch(path)


def test_storage_that_the_directory_puts_outside_the_file(tmp_path):
    path = write(tmp_path / "far.pth", {"w": tensor()})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 42 : entry + 46] = struct.pack("<I", len(content) - 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"far\.pth.*archive/data/0"):
        open_torch(path)
    assert os.path.exists(path)
