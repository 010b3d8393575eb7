"""Files that torch.save wrote, read back without PyTorch: bit-equal, and nothing executed."""

import collections
import os

import ml_dtypes
import numpy as np
import pytest
import torch

from lact_jax.torch_pickle import open_torch

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def assert_bit_equal(got: np.ndarray, want: torch.Tensor):
    assert got.shape == tuple(want.shape)
    want = want.detach().contiguous()
    if want.dtype == torch.bfloat16:
        assert got.dtype == ml_dtypes.bfloat16
        got, want = got.view(np.int16), want.view(torch.int16)
    assert got.dtype == want.numpy().dtype
    np.testing.assert_array_equal(got, want.numpy())


def random_tensor(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(shape, generator=generator)).to(dtype)


def test_every_dtype_bit_equal(tmp_path):
    state = {f"t{i}": random_tensor(d, (3, 5), i) for i, d in enumerate(DTYPES)}
    torch.save(state, tmp_path / "a.pth")
    file = open_torch(tmp_path / "a.pth")
    assert file.keys() == list(state)
    for name, tensor in state.items():
        assert file.tensors[name].shape == (3, 5)
        assert file.tensors[name].nbytes == tensor.nbytes
        assert_bit_equal(file.get_tensor(name), tensor)


def test_module_state_dict_and_parameters(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    saved = {"model": module.state_dict(), "raw": dict(module.named_parameters())}
    torch.save(saved, tmp_path / "m.pt")
    file = open_torch(tmp_path / "m.pt")
    for name, tensor in module.state_dict().items():
        assert_bit_equal(file.get_tensor(f"model.{name}"), tensor)
    for name, tensor in module.named_parameters():
        assert_bit_equal(file.get_tensor(f"raw.{name}"), tensor)
    assert len(file.keys()) == len(module.state_dict()) + len(list(module.parameters()))


def test_views_share_a_storage(tmp_path):
    base = random_tensor(torch.float32, (6, 8), 0)
    state = {
        "base": base,
        "transposed": base.t(),
        "window": base[1:4, 2:7:2],
        "expanded": base[2, :1].expand(3, 5),
        "scalar": base[3, 3],
        "empty": torch.zeros(0, 4),
        "half": base.bfloat16()[:, 3],
    }
    torch.save(state, tmp_path / "views.pth")
    file = open_torch(tmp_path / "views.pth")
    for name, tensor in state.items():
        assert_bit_equal(file.get_tensor(name), tensor)
    keys = {file.tensors[name].key for name in ("base", "transposed", "window", "expanded")}
    assert len(keys) == 1


def test_training_checkpoint_with_scalars_and_generator_state(tmp_path):
    generator = torch.Generator().manual_seed(5)
    weight = torch.nn.Parameter(random_tensor(torch.float32, (4, 4), 1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.square().sum().backward()
    optimizer.step()
    saved = {
        "generator": collections.OrderedDict(model=weight),
        "optimizer": optimizer.state_dict(),
        "rng": generator.get_state(),
        "step": 7,
        "loss": 0.25,
        "name": "run",
        "none": None,
    }
    torch.save(saved, tmp_path / "train.pt")
    file = open_torch(tmp_path / "train.pt")
    assert_bit_equal(file.get_tensor("generator.model"), weight)
    assert_bit_equal(file.get_tensor("rng"), generator.get_state())
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    assert_bit_equal(file.get_tensor("optimizer.state.0.exp_avg"), exp_avg)
    assert file.scalars["optimizer.param_groups.0.betas.1"] == 0.999
    got = {name: file.scalars[name] for name in ("step", "loss", "name", "none")}
    assert got == {"step": 7, "loss": 0.25, "name": "run", "none": None}


def test_bare_tensor_has_the_empty_name(tmp_path):
    tensor = random_tensor(torch.float32, (2, 3), 2)
    torch.save(tensor, tmp_path / "bare.pt")
    assert_bit_equal(open_torch(tmp_path / "bare.pt").get_tensor(""), tensor)


def test_legacy_file_is_an_error(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth.*before 1\.6"):
        open_torch(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_an_error(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    with pytest.raises(ValueError, match=r"script\.pt.*TorchScript"):
        open_torch(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97, 0.999])
def test_truncated_file_is_an_error_that_names_it(tmp_path, keep):
    path = tmp_path / "cut.pth"
    torch.save({f"t{i}": random_tensor(torch.float32, (64, 64), i) for i in range(4)}, path)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ValueError, match=r"cut\.pth.*truncated"):
        open_torch(path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"a": torch.ones(2), "b": Payload(str(trace))}, path)
    with pytest.raises(ValueError, match=r"evil\.pth.*io\.open"):
        open_torch(path)
    assert not trace.exists()
    # The same file does run its code in a reader without restrictions.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_whole_modules_are_refused(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"module\.pth.*torch\.nn\.modules\.linear\.Linear"):
        open_torch(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.pth"
    torch.save({f"t{i}": torch.full((1024, 1024), float(i)) for i in range(24)}, path)

    def anonymous_bytes():
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("Anonymous:")).split()[1])

    before = anonymous_bytes()
    file = open_torch(path)
    views = [file.get_tensor(name) for name in file.keys()]
    total = sum(float(view[::512].sum()) for view in views)
    assert total == sum(range(24)) * 2 * 1024
    assert not any(view.flags.writeable or view.flags.owndata for view in views)
    assert anonymous_bytes() - before < path.stat().st_size / 8
