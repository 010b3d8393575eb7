"""A data module as one writes it in PyTorch: a Dataset, a DataLoader, tensors of any float type."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from run_fixtures import quick_train, restore, tiny_config
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lact_jax.data import data_module, make_dataset
from lact_jax.run_logging import read_metrics


class GreyClips(Dataset):
    """Seven clips, the k-th of them k/255 bright."""

    def __init__(self, config, dtype=torch.float32):
        data = config.data
        self.shape, self.dtype = (3, data.num_frames, data.height, data.width), dtype

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"frames": torch.full(self.shape, index / 255).to(self.dtype), "caption": str(index)}


def shuffled(dataset, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, generator=generator)


def distributed(dataset, batch_size, seed):
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=seed)
    return DataLoader(dataset, batch_size, sampler=sampler)


class TorchData:
    """What a user's get_data_module returns."""

    def __init__(self, config, seed, make_loader, dtype):
        self.config, self.seed = config, seed
        self.make_loader, self.dtype = make_loader, dtype

    def train_dataloader(self):
        clips = GreyClips(self.config, self.dtype)
        return self.make_loader(clips, self.config.data.batch_size, self.seed)


@pytest.fixture
def registered(monkeypatch):
    """A function that makes a module of one loader and returns its name."""

    def register(make_loader, dtype=torch.float32):
        module = types.ModuleType("my_torch_data")
        module.get_data_module = lambda config, data_seed: TorchData(
            config, data_seed, make_loader, dtype
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.__name__

    return register


def batches(name):
    config = tiny_config(data__module=name)
    return iter(make_dataset(config.data.name, config, None, None))


def captions(loader, count):
    return [caption for _ in range(count) for caption in next(loader)["caption"]]


@pytest.mark.parametrize("make_loader", [shuffled, distributed])
def test_shuffling_loaders_come_back_to_their_place(registered, make_loader):
    name = registered(make_loader)
    straight = batches(name)
    first, second = captions(straight, 3), captions(straight, 3)  # six of seven clips an epoch
    assert len(set(first)) == len(set(second)) == 6 and first != second
    captions(straight, 1)
    state = json.loads(json.dumps(straight.get_state()))
    assert state["epoch"] == 2 and state["in_epoch"] == 1
    expected = captions(straight, 6)
    resumed = batches(name)
    resumed.set_state(state)
    assert captions(resumed, 6) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_float_type(registered, dtype):
    batch = next(batches(registered(shuffled, dtype)))
    assert batch["frames"].dtype == np.uint8 and batch["frames"].shape == (2, 21, 32, 32, 3)
    levels = batch["frames"].reshape(2, -1)
    assert levels.tolist() == [[int(caption)] * levels.shape[1] for caption in batch["caption"]]


def test_tensors_with_gradients_are_read_and_bytes_are_refused():
    where = {"where": "here", "num_frames": 1, "sizes": [(4, 4)]}
    frames = torch.rand(1, 3, 1, 4, 4, requires_grad=True)
    read = data_module.to_raw_batch({"frames": frames, "caption": ["a"]}, **where)["frames"]
    expected = (frames.detach() * 255).round().permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_array_equal(read, expected)
    bytes_ = torch.zeros(1, 3, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="here: frames are of type uint8"):
        data_module.to_raw_batch({"frames": bytes_, "caption": ["a"]}, **where)


def test_a_torch_data_module_trains(registered, tmp_path):
    config = tiny_config(data__module=registered(shuffled), train__steps=3)
    assert quick_train(config, tmp_path / "run") == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3
    _, position, _ = restore(tmp_path / "run")
    assert position == {"batches": 3, "epoch": 0, "in_epoch": 3, "loader": None}
