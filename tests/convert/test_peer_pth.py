"""Written .pth files: what PyTorch and our own reader make of them."""

import zipfile

import numpy as np
import pytest
import torch
from convert_fixtures import BF16

from lact_jax.convert.pth import write_pth
from lact_jax.convert.shards import Tensor
from lact_jax.torch_pickle import open_torch


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 50])
@pytest.mark.parametrize("mapped", [False, True])
def test_written_pth_is_loaded_by_torch(tmp_path, monkeypatch, limit, mapped):
    """Every type and rank, aligned, with the sizes of files above 2 GB as well."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    rng = np.random.default_rng(3)
    shapes = {"weight": (3, 5, 2), "row": (1, 70), "scalar": (), "none": (0, 4)}
    values = {
        f"{name}.{dtype}": rng.standard_normal(shape).astype(dtype)
        for name, shape in shapes.items()
        for dtype in (np.dtype(np.float32), np.dtype(np.float16), BF16)
    }
    written = []
    write_pth(
        tmp_path / "a.pth",
        [Tensor(name, v.shape, v.dtype, lambda v=v: v) for name, v in values.items()],
        written.append,
    )
    assert written == [value.nbytes for value in values.values()]
    loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    assert list(loaded) == list(values)
    ours = open_torch(tmp_path / "a.pth")
    for name, value in values.items():
        tensor = loaded[name]
        assert str(tensor.dtype) == f"torch.{value.dtype}" and tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.float().numpy(), value.astype(np.float32))
        view = ours.get_tensor(name)
        assert view.tobytes() == value.tobytes()
        assert view.size == 0 or view.ctypes.data % 64 == 0
