"""One log, several places: metrics.jsonl, TensorBoard (read by its own reader) and wandb."""

import io
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from lact_jax import training_log
from lact_jax.run_logging import read_metrics
from lact_jax.tensorboard_run import TensorboardOptions, start_run
from lact_jax.training_log import Log, StepWork, step_work
from lact_jax.validation import summary, write_heat_map
from lact_jax.video_io import write_png, write_video

SIZE = (6, 4, 4)


def work(latent_Fhw):
    """In proportion to the size; that of SIZE is 1000 tokens."""
    part = np.prod(latent_Fhw) / np.prod(SIZE)
    return StepWork(tokens=int(1000 * part), flops=3e12 * part, peak=100e12)


def row(step):
    rng = np.random.default_rng(step)
    return {
        "loss": jnp.float32(rng.random()),
        "grad_norm": jnp.float32(math.inf if step == 2 else rng.random()),
        "lr": jnp.float32(1e-3 * step),
        "skipped": jnp.asarray(step == 2),
        "loss_by_chunk": jnp.asarray(rng.random(3), jnp.float32),
        "layers": {"fw_w0_norm": jnp.asarray(rng.random(2), jnp.float32)},
    }


def make_log(workdir, step=0, **changes):
    return Log(tiny_config(**{"train__steps": 6, "train__log_every": 2, **changes}), workdir, step,
               work)  # fmt: skip


def read_events(folder):
    """(curves: name -> {step: value}, pictures: name -> {step: PNG bytes}), by TensorBoard."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    curves, pictures = {}, {}
    for name in events.Tags()["tensors"]:
        for event in events.Tensors(name):
            value = tensor_util.make_ndarray(event.tensor_proto)
            if value.dtype == object:  # (width, height, picture)
                pictures.setdefault(name, {})[event.step] = bytes(value[2])
            else:
                curves.setdefault(name, {})[event.step] = float(value)
    for name in events.Tags()["scalars"]:
        curves[name] = {event.step: event.value for event in events.Scalars(name)}
    for name in events.Tags()["images"]:
        pictures[name] = {e.step: e.encoded_image_string for e in events.Images(name)}
    return curves, pictures


def test_tensorboard_shows_what_the_metrics_file_holds(tmp_path):
    log = make_log(tmp_path)
    for step in range(1, 6):
        log.push(step, row(step), SIZE)
    log.close()
    curves, _ = read_events(tmp_path / "tensorboard")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    for r in rows:
        flat = {k: v for k, v in r.items() if not isinstance(v, list)}
        for name, values in r.items():
            if isinstance(values, list):
                flat |= {f"{name}/{i}": value for i, value in enumerate(values)}
        step = flat.pop("step")
        assert {"loss", "loss_by_chunk/2", "layers/fw_w0_norm/1"} < flat.keys()
        assert {name: curves[name][step] for name in flat} == flat
    assert curves["throughput/mfu"].keys() == {2, 4, 5}


@pytest.fixture
def now(monkeypatch):
    """The log's clock: `seconds` can be set."""
    now = types.SimpleNamespace(seconds=100.0)
    clock = types.SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(training_log, "time", clock)
    return now


def test_throughput_counts_tokens_and_flops_and_no_pauses(tmp_path, now):
    log = make_log(tmp_path)
    log.push(1, row(1), SIZE)
    now.seconds += 4  # two steps
    log.push(2, row(2), SIZE)
    now.seconds += 1
    log.push(3, row(3), SIZE)
    with log.untimed():
        now.seconds += 1000
    now.seconds += 2
    log.push(4, row(4), SIZE)
    log.close()
    written = read_metrics(tmp_path / "throughput.jsonl")
    assert [(r["step"], r["steps_per_second"]) for r in written] == [(2, 0.5), (3, 1), (4, 0.5)]
    for r in written:
        assert r["tokens_per_second"] == pytest.approx(1000 * r["steps_per_second"])
        assert r["tflops_per_second"] == pytest.approx(3 * r["steps_per_second"])
        assert r["mfu"] == pytest.approx(0.03 * r["steps_per_second"])


def test_each_batch_counts_with_its_own_size(tmp_path, now):
    log = make_log(tmp_path)
    log.push(1, row(1), SIZE)
    now.seconds += 4
    log.push(2, row(2), (6, 4, 12))
    log.close()
    (written,) = read_metrics(tmp_path / "throughput.jsonl")
    assert written["steps_per_second"] == 0.5
    rates = [written[f"{name}_per_second"] for name in ("tokens", "tflops")]
    assert [*rates, written["mfu"]] == pytest.approx([1000, 3, 0.03])


def test_without_a_known_peak_there_is_no_utilisation():
    config = tiny_config()
    work = step_work(config, (6, 4, 4), np.array(jax.devices()[:1]))
    assert work.tokens == 2 * 3 * 12 and work.flops > 0 and work.peak is None
    card = types.SimpleNamespace(device_kind="NVIDIA H200")
    assert step_work(config, (6, 4, 4), np.array([card, card])) == work._replace(peak=2 * 989e12)


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path, monkeypatch):
    for step, last, value in ((0, 5, 1.0), (3, 4, 2.0)):
        # TensorBoard reads files in the order of their names, which begin with the second in which
        # they were made: no two starts of a run share one.
        clock = types.SimpleNamespace(time=lambda start=step: 1e9 + start)
        monkeypatch.setattr(event_file_writer, "time", clock)
        run = start_run(TensorboardOptions(), tmp_path, step)
        for s in range(step + 1, last + 1):
            run.log(s, {"loss": value})
        run.finish()
    curves, _ = read_events(tmp_path / "tensorboard")
    assert curves["loss"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_switched_off_there_is_no_folder(tmp_path):
    log = make_log(tmp_path, tensorboard__enabled=False)
    log.push(1, row(1), SIZE)
    log.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that keeps what is logged."""
    logged = []
    package = types.SimpleNamespace(
        init=lambda **_: types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        ),
        Settings=lambda **kwargs: kwargs,
        Image=lambda path: ("image", path),
        Video=lambda path, caption, format: ("video", path, caption, format),
        teardown=lambda: None,
        logged=logged,
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_a_validation_goes_to_its_file_to_tensorboard_and_to_wandb(tmp_path, wandb):
    loss_VW = np.random.default_rng().random((10, 2)) + 0.1
    log = make_log(tmp_path, wandb__mode="offline")
    picture = write_heat_map(tmp_path, loss_VW, 3)
    log.validation(3, summary(loss_VW, 4), picture)
    log.push(4, row(4), SIZE)
    log.close()
    (written,) = read_metrics(tmp_path / "validation.jsonl")
    assert written["step"] == 3 and written["loss_by_noise_and_chunk"] == loss_VW.tolist()
    curves, pictures = read_events(tmp_path / "tensorboard")
    assert curves["validation/loss"][3] == pytest.approx(loss_VW.mean())
    by_noise = [curves[f"validation/loss_by_noise/{i}"][3] for i in range(10)]
    np.testing.assert_allclose(by_noise, loss_VW.mean(axis=1), rtol=1e-6)
    by_chunk = [curves[f"validation/loss_by_chunk/{i}"][3] for i in range(2)]
    np.testing.assert_allclose(by_chunk, loss_VW.mean(axis=0), rtol=1e-6)
    assert pictures["validation/heat_map"][3] == picture.read_bytes()
    sent = {}
    for step, values in wandb.logged:
        sent.setdefault(step, {}).update(values)
    assert sent[3]["validation/loss"] == pytest.approx(loss_VW.mean())
    assert sent[3]["validation/heat_map"] == ("image", str(picture))


def test_a_key_that_wandb_refuses_is_told_before_anything_else_starts(tmp_path, wandb, monkeypatch):
    class Refused(Exception):
        pass

    def refuse(**_):
        raise Refused("API key must have 40+ characters, has 3.")

    wandb.init, wandb.Error = refuse, Refused
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    with pytest.raises(ValueError, match=r"wandb\.mode=online: API key must have.*WANDB_API_KEY"):
        make_log(tmp_path, wandb__mode="online")
    assert not (tmp_path / "tensorboard").exists()


def test_samples_go_to_tensorboard_as_a_sheet_and_to_wandb_as_videos(tmp_path, wandb):
    sheet, clip = tmp_path / "sheet.png", tmp_path / "clip.mp4"
    write_png(sheet, np.full((8, 12, 3), 70, np.uint8))
    log = make_log(tmp_path, wandb__mode="offline")
    log.samples(2, sheet, {"a cat": clip})
    log.push(3, row(3), SIZE)
    log.close()
    _, pictures = read_events(tmp_path / "tensorboard")
    assert pictures["samples"] == {2: sheet.read_bytes()}
    assert wandb.logged[0] == (
        2,
        {"samples": ("image", str(sheet)), "videos": [("video", str(clip), "a cat", "mp4")]},
    )


def test_wandb_itself_keeps_pictures_and_clips(tmp_path, monkeypatch):
    """The real package, offline, resumed under the same id."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    sheet, clip = tmp_path / "sheet.png", tmp_path / "clip.mp4"
    write_png(sheet, np.full((16, 16, 3), 70, np.uint8))
    write_video(clip, np.zeros((4, 32, 32, 3), np.uint8), fps=8)
    for step in (1, 2):
        log = make_log(tmp_path, step=step - 1, wandb__mode="offline")
        log.push(step, row(step), SIZE)
        log.samples(step, sheet, {"a cat": clip})
        log.close()
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1
    kept = [path.suffix for path in (tmp_path / "wandb").glob("*/files/media/**/*.*")]
    assert sorted(set(kept)) == [".mp4", ".png"]


def test_metrics_wait_on_the_device_until_they_are_due(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log = make_log(tmp_path)
    log.push(1, row(1), SIZE)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    log.push(2, row(2), SIZE)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["skipped"] is True
