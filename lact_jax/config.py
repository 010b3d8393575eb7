"""The whole configuration of a run, as frozen dataclasses, and its form as a ConfigDict.

Config files build a ConfigDict with `default()`, change it, and return it; scripts take overrides
(`--config.train.lr=1e-5`) and call `parse`, after which no ConfigDict is seen any more.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, config_dict

from lact_jax.diffusion.sampler import SamplerConfig
from lact_jax.distributed import DistributedConfig
from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.objective import ObjectiveConfig
from lact_jax.optim import TRAINABLE, OptimConfig
from lact_jax.sharding import MeshConfig
from lact_jax.tensorboard_run import TensorboardOptions
from lact_jax.wandb_run import WandbOptions


@dataclass(frozen=True)
class CodecConfig:
    """The video codec between frames and latents: a name in encoders.CODECS and its options."""

    name: str = "wan"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextConfig:
    """The caption encoder: a name in encoders.TEXT_ENCODERS and its options."""

    name: str = "umt5"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """The training videos.

    Attributes:
      name: a dataset in data.DATASETS.
      path: its folder; '' puts the embedded data beside the runs.
      options: options of that dataset alone (the generator's clip counts, for example).
      num_frames, height, width, fps: every clip is resampled and cropped to these.
      batch_size: clips of an optimiser step, over all devices and accumulation steps.
      num_threads: decoding threads.
      num_workers: processes that read encoded data ahead; 0 reads in threads.
      cache_in_memory: keep decoded clips in memory; for data sets that fit.
      holdout: clips of a folder of videos that are kept out of training, for validation; which
        ones depends on their names alone.
      buckets: (height, width) of several sizes in place of the one above; a clip of a folder of
        videos comes in the size whose aspect ratio is nearest to its own, and a batch has one size.
      random_crop_time: training shows another window of a long clip in every epoch, not its first.
      random_crop_space: where to cut what is too much is drawn too, in place of the centre.
      max_bad_files: unreadable files that are skipped before the run stops and names them.
      module: a user's data module, "package.module" (see data/data_module.py); it sets `name`.
      share: (index, count): which of how many equal parts of a batch this process reads. The run
        sets it from its mesh; () is a part for each process.
    """

    name: str = "video_folder"
    path: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    batch_size: int = 1
    num_threads: int = 4
    num_workers: int = 0
    cache_in_memory: bool = False
    holdout: int = 0
    buckets: tuple[tuple[int, int], ...] = ()
    random_crop_time: bool = False
    random_crop_space: bool = False
    max_bad_files: int = 100
    module: str = ""
    share: tuple[int, ...] = ()

    def __post_init__(self):
        if self.module:
            object.__setattr__(self, "name", "module")
        for name in ("num_frames", "height", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
        for name in ("num_threads", "num_workers", "holdout", "max_bad_files"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must not be negative")
        if self.fps <= 0:
            raise ValueError(f"data.fps={self.fps}: frames a second must be positive")


@dataclass(frozen=True)
class TrainConfig(OptimConfig):
    """The optimiser's options (see OptimConfig) and the run around it.

    Attributes:
      steps: optimiser steps of the whole run.
      accumulation: microbatches a step; divides data.batch_size.
      trainable: 'all', or 'attn_only' for the self-attention (LaCT) modules alone.
      ema_decay: decay of the moving average of the trained parameters; 0 to keep none, which spares
        its 4 bytes a parameter.
      save_every: steps between checkpoints.
      keep_last: checkpoints of this many last steps are kept.
      log_every: steps between writes of the metrics (each step has its own line).
      plot_every: steps between redraws of the loss curve.
    """

    steps: int = 10_000
    accumulation: int = 1
    trainable: str = "attn_only"
    ema_decay: float = 0.995
    save_every: int = 1000
    keep_last: int = 2000
    log_every: int = 10
    plot_every: int = 200

    def __post_init__(self):
        super().__post_init__()
        if self.trainable not in TRAINABLE:
            raise ValueError(
                f"train.trainable={self.trainable!r}: choose one of {sorted(TRAINABLE)}"
            )
        for name in ("steps", "accumulation", "save_every", "keep_last", "log_every", "plot_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay={self.ema_decay}: must be in [0, 1)")


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """The sampler's options (see SamplerConfig) and what sample.py makes.

    Attributes:
      seed: of the initial noise; a prompt's noise does not depend on the others.
      num_latent_frames: length of the clips; whole chunks.
      batch_size: prompts sampled together.
      negative_prompt: caption of the guidance's other branch.
      weights: 'ema' or 'params'.
    """

    seed: int = 0
    num_latent_frames: int = 21
    batch_size: int = 1
    negative_prompt: str = ""
    weights: str = "ema"

    def __post_init__(self):
        super().__post_init__()
        if self.weights not in ("ema", "params"):
            raise ValueError(f"sample.weights={self.weights!r}: choose 'ema' or 'params'")
        for name in ("num_latent_frames", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sample.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at during training.

    Attributes:
      every: steps between validations on the held-out clips; 0 for none.
      num_clips: clips that are validated on, the first of the held-out ones.
      seed: of their noise, which is the same at every validation.
      weights: 'ema' or 'params'; validated and sampled.
      sample_every: steps between clips sampled as `sample` says; 0 for none.
      prompts: what to sample.
      prompts_file: a text file with more of it, one prompt a line.
    """

    every: int = 0
    num_clips: int = 16
    seed: int = 0
    weights: str = "ema"
    sample_every: int = 0
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""

    def __post_init__(self):
        if self.weights not in ("ema", "params"):
            raise ValueError(f"validation.weights={self.weights!r}: choose 'ema' or 'params'")
        for name, least in (("every", 0), ("sample_every", 0), ("num_clips", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"validation.{name}={getattr(self, name)}: must be at least {least}"
                )
        if self.sample_every and not (self.prompts or self.prompts_file):
            raise ValueError(
                f"validation.sample_every={self.sample_every}, but there is nothing to sample: "
                "give validation.prompts or validation.prompts_file"
            )


@dataclass(frozen=True)
class Config:
    """A run. `init_from` names a converted checkpoint to start from; '' starts from scratch."""

    seed: int = 0
    init_from: str = ""
    model: DiTConfig = DiTConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    validation: ValidationConfig = ValidationConfig()
    tensorboard: TensorboardOptions = TensorboardOptions()
    wandb: WandbOptions = WandbOptions()


# ConfigDict side. `model.lact` holds one set of options; `model.lact_cycle` holds, for layers that
# differ, what each changes, cycled over the layers.


def _to_dict(value) -> Any:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return ConfigDict({
            f.name: _placeholder(hints[f.name], getattr(value, f.name))
            for f in dataclasses.fields(value)
        })  # fmt: skip
    if isinstance(value, Mapping):
        return ConfigDict(dict(value))
    return value


def _placeholder(hint, value):
    """None keeps its type, so that an override of it is parsed and checked."""
    if value is None:
        kinds = [t for t in typing.get_args(hint) if t is not types.NoneType]
        return config_dict.placeholder(kinds[0])
    return _to_dict(value)


def default() -> ConfigDict:
    """The default configuration as a ConfigDict, for config files to change."""
    config = _to_dict(Config())
    del config.model["lact"]
    config.model.lact = _to_dict(LaCTConfig())
    config.model.lact_cycle = ()
    return config


def parse(config: Mapping) -> Config:
    """A ConfigDict (or nested dict) as a checked `Config`.

    Raises:
      ValueError: an unknown key, a value of the wrong type or out of range; names the key.
    """
    tree = config.to_dict() if isinstance(config, ConfigDict) else _copy(config)
    model = tree.get("model", {})
    if isinstance(model.get("lact"), Mapping):
        cycle = model.pop("lact_cycle", ()) or ({},)
        if not all(isinstance(changes, Mapping) for changes in cycle):
            raise ValueError(
                f"config key model.lact_cycle={cycle!r}: expected a tuple of dicts, each with what "
                "its layers change in model.lact"
            )
        model["lact"] = tuple(
            _build(LaCTConfig, {**model["lact"], **changes}, "model.lact") for changes in cycle
        )
    parsed = _build(Config, tree, "")
    if parsed.data.batch_size % parsed.train.accumulation:
        raise ValueError(
            f"data.batch_size={parsed.data.batch_size} is not a multiple of "
            f"train.accumulation={parsed.train.accumulation}"
        )
    for name in ("sample", "validation"):
        if not parsed.train.ema_decay and getattr(parsed, name).weights == "ema":
            raise ValueError(
                f"{name}.weights='ema', but train.ema_decay=0 keeps no average: set "
                f"{name}.weights='params'"
            )
    if parsed.sample.context_noise > parsed.objective.context_noise:
        raise ValueError(
            f"sample.context_noise={parsed.sample.context_noise} is over objective.context_noise="
            f"{parsed.objective.context_noise}: the model does not know such context from training"
        )
    return parsed


def _copy(tree):
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _build(cls, tree: Mapping, path: str):
    if not isinstance(tree, Mapping):
        raise ValueError(f"config key {path!r}: expected a group of keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    prefix = f"{path}." if path else ""
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {sorted(hints)}"
            raise ValueError(f"unknown config key {prefix}{key}{hint}")
    return cls(**{k: _convert(hints[k], v, prefix + k) for k, v in tree.items()})


def _convert(hint, value, path: str):
    """`value` as the type `hint` asks for."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        fits = isinstance(value, (tuple, list)) and (args[-1] is ... or len(value) == len(args))
        if not fits:
            size = "" if args[-1] is ... else f" of {len(args)}"
            raise ValueError(f"config key {path}={value!r}: expected a tuple{size}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is types.UnionType:
        return None if value is None else _convert(args[0], value, path)
    if origin is not None:
        if not isinstance(value, Mapping):
            raise ValueError(f"config key {path}={value!r}: expected a group of keys")
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"config key {path}={value!r}: expected {hint.__name__}")
    return value
