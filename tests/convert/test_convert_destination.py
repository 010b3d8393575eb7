"""A destination appears whole or not at all, and nothing but a conversion is overwritten."""

import os
import shutil
import signal

import numpy as np
import pytest
from convert_fixtures import PLAIN, random_tensors, write_wan

from lact_jax.convert import Import, destination, import_checkpoint
from lact_jax.convert.errors import ConversionError
from lact_jax.convert.stream import Streamed, read_stream, stored_layout, write_stream


def convert(root, overwrite=False, log=lambda _: None):
    import_checkpoint(Import(root / "src", root / "out", overwrite=overwrite), log=log)


@pytest.fixture
def root(tmp_path):
    write_wan(tmp_path / "src", random_tensors("dit", PLAIN))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_existing_destination(root):
    convert(root)
    before = (root / "out" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="out exists.*--overwrite"):
        convert(root)
    assert (root / "out" / "manifest.json").stat().st_mtime_ns == before
    (root / "out" / "old").write_text("from the first conversion")
    convert(root, overwrite=True)
    assert names(root) == ["out", "src"]
    assert not (root / "out" / "old").exists()


def test_a_dry_run_says_that_the_destination_is_taken(root):
    convert(root)
    for overwrite in (False, True):
        task = Import(root / "src", root / "src", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="--dst=.*src"):
            import_checkpoint(task, dry_run=True, log=lambda _: None)
    import_checkpoint(Import(root / "src", root / "out2"), dry_run=True, log=lambda _: None)
    assert names(root) == ["out", "src"]


def test_other_folders_are_never_overwritten(root):
    (root / "out").mkdir()
    (root / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a folder that a conversion wrote"):
        convert(root, overwrite=True)
    assert names(root) == ["out", "src"] and names(root / "out") == ["thesis.tex"]


def test_leftovers_of_a_killed_conversion_are_removed_and_told(root):
    leftover = root / ".out.unfinished-abc"
    (leftover / "folder" / "dit").mkdir(parents=True)
    (leftover / "lock").touch()
    (root / ".out2.unfinished-abc").mkdir()
    lines = []
    convert(root, log=lines.append)
    assert any("removed" in line and str(leftover) in line for line in lines)
    assert names(root) == [".out2.unfinished-abc", "out", "src"]


def test_what_was_being_overwritten_comes_back(root):
    """Killed between its two renames, --overwrite has left the old folder aside."""
    convert(root)
    (root / "out" / "old").touch()
    (root / ".out.unfinished-abc").mkdir()
    (root / "out").rename(root / ".out.unfinished-abc" / "overwritten")
    with pytest.raises(FileExistsError, match="out exists"):
        convert(root)
    assert names(root) == ["out", "src"] and (root / "out" / "old").exists()


def test_a_running_conversion_is_left_alone(root):
    with destination.new_folder(root / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(ConversionError, match="another conversion to .*out is running"):
            convert(root)
        assert (folder / "file").exists()
    assert names(root / "out") == ["file"]


def test_full_disk_is_noticed_before_writing(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=1000)
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"out needs 0\.0 GB; 0\.0 GB are free"):
        convert(root)
    assert names(root) == ["src"]


def streamed(read):
    return {"a": {"w": Streamed((6, 3, 2), np.dtype(np.float32), True, read)}}


def test_a_failing_read_leaves_nothing(tmp_path):
    def read(layer):
        if layer == 3:
            raise OSError("the disk went away")
        return np.zeros((3, 2), np.float32)

    with pytest.raises(OSError, match="the disk went away"):
        with destination.new_folder(tmp_path / "out") as folder:
            write_stream(folder / "dit", streamed(read))
    assert names(tmp_path) == []


@pytest.fixture
def ctrl_c():
    """Python's own handling of SIGINT, also where the test run was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_ends_the_writing_thread_and_leaves_nothing(tmp_path):
    layers = []

    def read(layer):
        layers.append(layer)
        if layer == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return np.zeros((256, 256), np.float32)

    tree = {"w": Streamed((10**5, 256, 256), np.dtype(np.float32), True, read)}
    with pytest.raises(KeyboardInterrupt):
        with destination.new_folder(tmp_path / "out") as folder:
            write_stream(folder / "dit", tree)
    assert names(tmp_path) == []
    assert 3 <= len(layers) < 10**5


def test_layers_come_back_by_layer_from_any_chunking(tmp_path):
    """Written in one chunk or in many: read by layer, whole, and by plain Orbax alike."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((5, 4, 3)).astype(np.float32)
    large = rng.standard_normal((3, 2500, 1200)).astype(np.float32)
    matrix = rng.standard_normal((4, 2)).astype(np.float32)
    tree = {
        "stacks": {
            "small": Streamed(small.shape, small.dtype, True, small.__getitem__),
            "large": Streamed(large.shape, large.dtype, True, large.__getitem__),
        },
        "matrix": Streamed(matrix.shape, matrix.dtype, False, lambda _: matrix),
    }
    written = []
    write_stream(tmp_path / "ckpt", tree, written.append)
    assert sum(written) == small.nbytes + large.nbytes + matrix.nbytes
    layout = stored_layout(tmp_path / "ckpt")
    assert {path: leaf.shape for path, leaf in layout.items()} == {
        ("stacks", "small"): small.shape,
        ("stacks", "large"): large.shape,
        ("matrix",): matrix.shape,
    }
    read = read_stream(tmp_path / "ckpt", layout)
    for layer in (2, 0, 1):
        np.testing.assert_array_equal(read["stacks", "small"].read(layer), small[layer])
        np.testing.assert_array_equal(read["stacks", "large"].read(layer), large[layer])
    np.testing.assert_array_equal(read["matrix",].read(None), matrix)
