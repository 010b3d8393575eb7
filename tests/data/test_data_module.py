"""The official data contract: users' modules that keep it train and resume, others are told why."""

import dataclasses
import itertools
import json
import logging
import shutil
import textwrap
import types

import ml_dtypes
import numpy as np
import pytest
from batch_checks import assert_same_batches, take
from run_fixtures import assert_same_end, quick_train, tiny_config

from lact_jax.config import DataConfig
from lact_jax.data import data_module, make_dataset

EXAMPLE = "examples.my_data"
NUMBER = itertools.count()


def config(module, **changes):
    data = {"num_frames": 5, "height": 16, "width": 32, "batch_size": 2, "module": module}
    return types.SimpleNamespace(seed=3, data=DataConfig(**data | changes))


def batches(asked, split="train"):
    return iter(make_dataset(asked.data.name, asked, None, None, split))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a module and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        name = f"written_module_{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


COUNTING = """
    import numpy as np

    class Loader:
        # Clip k of the run's data is grey, k/255 bright; an epoch has {length} clips.
        {extra}

        def __iter__(self):
            for first in range(0, {length}, 2):
                grey = np.arange(first, min(first + 2, {length}), dtype=np.float32) / 255
                frames = np.broadcast_to(grey[:, None, None, None, None], (len(grey), 3, 5, 16, 32))
                yield {{"frames": frames + getattr(self, "epoch", 0) / 10,
                       "caption": [str(int(g * 255 + .5)) for g in grey]}}

    class Data:
        train_dataloader = val_dataloader = lambda self: Loader()

    def get_data_module(config, data_seed):
        return Data()
"""


def test_the_module_alone_is_enough_to_name():
    assert dataclasses.replace(config(EXAMPLE).data, name="synthetic").name == "module"
    with pytest.raises(ValueError, match="data.name='module' needs data.module"):
        batches(config("", name="module"))


def test_frames_become_bytes_with_the_time_before_the_colour(written):
    name = written("""
        import numpy as np
        made = np.random.default_rng(7).integers(0, 256, (2, 3, 5, 16, 32))
        def get_data_module(config, data_seed):
            class Data:
                def train_dataloader(self):
                    caption = (f"seed {data_seed}", f"width {config.data.width}")
                    while True:
                        yield {"frames": made / 255, "caption": caption, "more": 1}
            return Data()
    """)
    batch = next(batches(config(name)))
    assert batch["frames"].dtype == np.uint8 and batch["frames"].flags["C_CONTIGUOUS"]
    made = np.random.default_rng(7).integers(0, 256, (2, 3, 5, 16, 32))
    np.testing.assert_array_equal(batch["frames"], np.moveaxis(made, 1, -1))
    assert batch["caption"] == ["seed 3", "width 32"] and len(batch["name"]) == 2


@pytest.mark.parametrize(
    "dtype, wrong", [(np.float16, 1), (ml_dtypes.bfloat16, 1), (np.float64, 0)]
)
def test_any_float_type_is_read(dtype, wrong):
    levels = np.random.default_rng().integers(0, 256, (1, 3, 5, 16, 32))
    frames = (levels / 255).astype(dtype)
    read = data_module.to_raw_batch(
        {"frames": frames, "caption": ["a"]}, where="x", num_frames=5, sizes=[(16, 32)]
    )
    error = read["frames"].astype(int) - np.moveaxis(levels, 1, -1)
    assert np.abs(error).max() <= wrong


def test_a_size_of_the_buckets_may_come():
    sizes = [(16, 32), (32, 16)]
    for height, width in sizes:
        frames = np.zeros((1, 3, 5, height, width), np.float32)
        read = data_module.to_raw_batch(
            {"frames": frames, "caption": ["a"]}, where="x", num_frames=5, sizes=sizes
        )
        assert read["frames"].shape == (1, 5, height, width, 3)


def captions(drawn):
    return [caption for batch in drawn for caption in batch["caption"]]


def test_a_loader_that_ends_is_started_again_and_left_over_clips_are_dropped(written):
    loader = batches(config(written(COUNTING.format(length=5, extra=""))))
    assert captions(take(loader, 5)) == ["0", "1", "2", "3"] * 2 + ["0", "1"]
    assert loader.get_state() == {"batches": 5, "epoch": 2, "in_epoch": 1, "loader": None}


def test_the_epoch_is_told_before_it_begins(written):
    extra = "def set_epoch(self, epoch): self.epoch = epoch"
    loader = batches(config(written(COUNTING.format(length=4, extra=extra))))
    levels = [int(batch["frames"][0].min()) for batch in take(loader, 6)]
    assert levels == [0, 2, 26, 28, 51, 53]  # 25.5 more in every epoch


def test_validation_is_one_pass_over_all_clips_in_batches_of_the_modules_own(written):
    asked = config(written(COUNTING.format(length=5, extra="")), batch_size=1)
    for _ in range(2):
        assert captions(batches(asked, "validation")) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("source", "kind"), [
    ("def get_data_module(config, data_seed: pass", SyntaxError),
    ("x = config", NameError),
    ("def get_data_module(config, data_seed): return config.data.my_root", AttributeError),
])  # fmt: skip
def test_errors_of_the_modules_own_say_whose_they_are(written, source, kind):
    name = written(source)
    with pytest.raises(kind) as error:
        batches(config(name))
    assert f"data.module='{name}'" in error.value.__notes__[0]


RESUMED = {
    "plain": ("", 7),
    "set_epoch": ("def set_epoch(self, epoch): self.epoch = epoch", 1),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_loader_is_drawn_up_to_its_position(written, caplog, kind):
    extra, again = RESUMED[kind]
    asked = config(written(COUNTING.format(length=5, extra=extra)))
    straight = batches(asked)
    take(straight, 7)
    state = json.loads(json.dumps(straight.get_state()))
    expected = take(straight, 5)
    resumed = batches(asked)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same_batches(take(resumed, 5), expected)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"{again} batches are drawn again" in (
        record.getMessage()
    )
    straight.set_state(state)  # and back in the same iterator
    assert_same_batches(take(straight, 5), expected)


STATEFUL = """
    import numpy as np
    DRAWN = []

    class Loader:
        place = 0
        def state_dict(self):
            return {{"place": {state}}}
        def load_state_dict(self, state):
            self.place = state["place"]
        def __iter__(self):
            while True:
                DRAWN.append(self.place)
                grey = np.full((2, 3, 5, 16, 32), self.place / 255)
                self.place += 1
                yield {{"frames": grey, "caption": ["a", "b"]}}

    class Data:
        train_dataloader = lambda self: Loader()

    def get_data_module(config, data_seed):
        return Data()
"""


@pytest.mark.parametrize("state, drawn", [("self.place", [0, 1, 2, 3, 4, 5]),
                                          ("{self.place}", [0, 1, 2, 3, 0, 1, 2, 3, 4, 5])])
def test_a_loader_that_keeps_its_position_is_asked_for_it_unless_json_can_not_hold_it(
    written, state, drawn
):
    name = written(STATEFUL.format(state=state))
    straight = batches(config(name))
    take(straight, 4)
    resumed = batches(config(name))
    resumed.set_state(json.loads(json.dumps(straight.get_state())))
    levels = [int(batch["frames"].max()) for batch in take(resumed, 2)]
    assert levels == [4, 5]
    assert __import__(name).DRAWN == drawn


def broken(frames="np.zeros((2, 3, 5, 16, 32))", caption="['a', 'b']", batch=None):
    batch = batch or f"{{'frames': {frames}, 'caption': {caption}}}"
    return f"""
        import numpy as np
        class Data:
            train_dataloader = lambda self: [{batch}] * 3
        def get_data_module(config, data_seed):
            return Data()
    """


@pytest.mark.parametrize("source, match", [
    (broken(batch="(1, 2)"), "yields a tuple: it must yield dicts with 'frames' and 'caption'"),
    (broken(batch="{'video': 1, 'caption': ['a']}"), r"yields no frames, but \['caption', 'video'"),
    (broken("np.zeros((2, 5, 3, 16, 32))"), r"frames have the shape \(2, 5, 3, 16, 32\)"),
    (broken("np.zeros((2, 3, 5, 32, 16))"), r"is \(2, 3, 5, 16, 32\)"),
    (broken("np.zeros((3, 3, 5, 16, 32))"), r"frames have the shape \(3,.*with 2 captions"),
    (broken("np.zeros((2, 3, 5, 16, 32), np.uint8)"), "frames are of type uint8.*divide bytes"),
    (broken("np.full((2, 3, 5, 16, 32), -1.0)"), r"frames go from -1 to -1, .* in \[0, 1\]"),
    (broken("np.full((2, 3, 5, 16, 32), 1.5)"), "frames go from 1.5 to 1.5"),
    (broken("np.full((2, 3, 5, 16, 32), np.nan)"), "frames go from nan"),
    (broken(caption="'a cat'"), "caption must be a list of strings, got 'a cat'"),
    (broken(caption="['a', 2]"), r"caption must be a list of strings, got \['a', 2\]"),
    (broken("np.zeros((1, 3, 5, 16, 32))", "['a']"), "yields batches of 1 clips, but data.batch_s"),
    (broken("np.zeros((3, 3, 5, 16, 32))", "['a'] * 3"), "yields batches of 3 clips"),
    (COUNTING.format(length=0, extra=""), "yields no batch of 2 clips in epoch 0"),
    ("x = 1", r"written_module_\d+.py has no function get_data_module"),
    ("def get_data_module(config): pass", r"must take \(config, data_seed\)"),
    ("def get_data_module(config, data_seed): pass", r"\(a NoneType\) has no train_dataloader\(\)"),
    ("""
     class Data:
         train_dataloader = lambda self: None
     def get_data_module(config, data_seed): return Data()
     """, r"train_dataloader\(\) returns a NoneType, which is not iterable"),
])  # fmt: skip
def test_modules_that_break_the_contract(written, source, match):
    name = written(source)
    with pytest.raises(ValueError, match=match) as error:
        next(batches(config(name)))
    assert f"data.module='{name}'" in str(error.value)


def test_a_generator_that_ends_can_not_be_started_again(written):
    source = COUNTING.format(length=4, extra="").replace("Loader()", "iter(Loader())")
    loader = batches(config(written(source)))
    take(loader, 2)
    with pytest.raises(ValueError, match="yields no batch of 2 clips in epoch 1: it must return"):
        next(loader)


def test_a_module_without_validation(written):
    name = written(broken())
    with pytest.raises(ValueError, match=rf"{name}.*\(a Data\) has no val_dataloader\(\)"):
        batches(config(name), "validation")


@pytest.mark.parametrize("name, kind, match", [
    ("nowhere.my_data", ImportError, "'nowhere.my_data' can't be imported: No module named 'nowhe"),
    ("data/my_data.py", ValueError, "'data/my_data.py': must be a module's name, such as"),
])
def test_modules_that_can_not_be_imported(name, kind, match):
    with pytest.raises(kind, match=match):
        batches(config(name))


def test_an_import_that_fails_inside_the_module(written):
    name = written("import nowhere_to_be_found")
    with pytest.raises(ImportError, match=f"data.module='{name}' can't be imported.*nowhere_to_be"):
        batches(config(name))


def test_the_example_gives_what_the_contract_asks_for():
    asked = config(EXAMPLE)
    trained = take(batches(asked), 65)
    assert trained[0]["frames"].shape == (2, 5, 16, 32, 3)
    assert not np.array_equal(trained[0]["frames"], trained[64]["frames"])  # of another epoch
    for batch in trained[:5]:
        for frames, caption in zip(batch["frames"], batch["caption"], strict=True):
            brightest = frames.reshape(-1, 3).max(0)
            assert caption == f"a {('red', 'green', 'blue')[brightest.argmax()]} square"
    shared = config(EXAMPLE, batch_size=4, share=(1, 2))
    assert len(next(batches(shared))["caption"]) == 2
    assert len(list(batches(asked, "validation"))) == 2


def test_the_example_trains_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    config = tiny_config(data__module=EXAMPLE, train__steps=3, train__save_every=2)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert quick_train(config, straight) == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "3")
    assert quick_train(config, resumed) == 0
    assert_same_end(resumed, straight)
