"""The programs of a run, traced for devices and compiled for them: nothing is computed.

Letters: B clips, F latent frames, f those of a chunk, h, w latent size, c channels, L text tokens,
Q text width.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lact_jax.config import Config
from lact_jax.flops import step_flops
from lact_jax.models.dit import abstract_params, bind
from lact_jax.models.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from lact_jax.ops import parallel
from lact_jax.ops.layer_scan import PASSES
from lact_jax.pieces import Pieces
from lact_jax.pipeline import commit_branches, denoise_branches
from lact_jax.planning import virtual
from lact_jax.sharding import (
    batch_sharding,
    make_mesh,
    on_mesh,
    replicated,
    state_shardings,
)
from lact_jax.sizes import check_shares, check_sizes, latent_size
from lact_jax.train_state import init_state, make_train_step


@dataclass(frozen=True)
class Sizes:
    """What a codec and a text encoder say of their sizes, without their weights."""

    latent_channels: int
    text_len: int
    text_dim: int
    temporal_stride: int = TEMPORAL_STRIDE
    spatial_stride: int = SPATIAL_STRIDE


@dataclass(frozen=True)
class Program:
    """A program on devices.

    Attributes:
      name: what it does.
      function: what is compiled.
      arguments: shapes with their shardings.
      groups: what the arguments are -> their shapes, for the table of memory.
      updated: those of the arguments that it writes anew.
      gradients: what it computes gradients of; empty if it trains nothing.
      model_flops: of its mathematics over all devices; None to take what the program computes.
      jit: options of `jax.jit`.
      pieces: names of the functions in it that are programs of their own (`Pieces`); empty where it
        is one program.
    """

    name: str
    function: Callable
    arguments: tuple
    groups: dict[str, Any]
    updated: Any = ()
    gradients: Any = ()
    model_flops: int | None = None
    jit: dict[str, Any] = dataclasses.field(default_factory=dict)
    pieces: tuple[str, ...] = ()


def sizes_of(config: Config) -> Sizes:
    """The sizes that codec and text encoder must have for this model."""
    model = config.model
    return Sizes(model.latent_channels, model.text_len, model.text_dim)


def chunk_tokens(config: Config) -> int:
    """Tokens of a chunk."""
    _, height, width = latent_size(config, sizes_of(config))
    sizes = config.objective.frames_per_chunk, height, width
    return math.prod(n // p for n, p in zip(sizes, config.model.patch_size, strict=True))


def plan_mesh(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of `config.mesh` over devices; ValueError where it or the sizes don't fit."""
    sizes = sizes_of(config)
    mesh = make_mesh(config.mesh, devices)
    check_sizes(config, sizes, sizes)
    check_shares(config, sizes, mesh)
    return mesh


def with_whole_batch(config: Config, mesh: Mesh) -> Config:
    """The config with as many clips more as its devices need to share them evenly."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulation
    clips = math.ceil(config.data.batch_size / replicas) * replicas
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=clips))


def _placed(tree: Any, shardings: Any) -> Any:
    """The tree's shapes with shardings: those of a tree of which `shardings` is a prefix."""

    def place(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(
        place, shardings, tree, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)
    )


def _float32(sharding: NamedSharding, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def abstract_state(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """The train state's shapes on a mesh, and its shardings, as the trainer has them."""
    state = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(mesh, state, abstract_params(config.model))
    return _placed(state, shardings), shardings


def train_programs(config: Config, mesh: Mesh) -> list[Program]:
    """The optimiser step, as the trainer compiles it."""
    model, cut, whole = config.model, batch_sharding(mesh), replicated(mesh)
    latent_Fhw = latent_size(config, sizes_of(config))
    clips, text = config.data.batch_size, (model.text_len, model.text_dim)
    state, shardings = abstract_state(config, mesh)
    batch = (
        _float32(cut, clips, *latent_Fhw, model.latent_channels),
        _float32(cut, clips, *text),
        _float32(whole, *text),
    )
    step = Program(
        "train step",
        make_train_step(config),
        (state, *batch),
        {
            "parameters": (state.params, state.frozen),
            "moving average": state.ema,
            "optimiser": state.opt_state,
            "batch": (batch, state.step, state.rng),
        },
        updated=(state.params, state.ema, state.opt_state),
        gradients=state.params,
        model_flops=clips
        * step_flops(model, config.objective, latent_Fhw, config.train.trainable),
        jit={"donate_argnums": 0, "out_shardings": (shardings, whole)},
        pieces=PASSES if model.unroll_layers else (),
    )
    return [step]


def _last_cache(config: Config, branches: int, chunk: jax.ShapeDtypeStruct, text_kv: Any) -> Any:
    """Shapes of the cache that the last chunk of a clip sees, when it is as large as it gets."""
    params = abstract_params(config.model)
    cache = jax.eval_shape(lambda p: bind(config.model, p).init_cache(branches), params)
    for _ in range(config.sample.num_latent_frames // config.objective.frames_per_chunk - 1):
        before = cache
        cache = jax.eval_shape(partial(commit_branches, config), params, text_kv, chunk, cache)
        if jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, before):
            break
    return cache


def sample_programs(config: Config, mesh: Mesh) -> list[Program]:
    """A denoise step of the last chunk, and a chunk's commit, as the pipeline compiles them."""
    model, whole = config.model, replicated(mesh)
    prompts = config.sample.batch_size
    branches = prompts * (2 if config.sample.guided else 1)
    frames = config.objective.frames_per_chunk, *latent_size(config, sizes_of(config))[1:]
    chunk = _float32(whole, prompts, *frames, model.latent_channels)
    abstract = abstract_params(model)
    text = _float32(whole, branches, model.text_len, model.text_dim)
    text_kv = jax.eval_shape(lambda p, t: bind(model, p).text_kv(t), abstract, text)
    cache = _last_cache(config, branches, chunk, text_kv)
    if mesh.size > 1:
        dit = bind(model, abstract)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            axes = parallel.batch_axes(branches)
            specs = dit.cache_specs(axes)
        stacked = NamedSharding(mesh, PartitionSpec(None, axes))
        cache_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    else:
        stacked = cache_shardings = whole
    text_kv, cache = _placed(text_kv, stacked), _placed(cache, cache_shardings)
    params = _placed(abstract, state_shardings(mesh, abstract, abstract))
    known = {"parameters": params, "text": text_kv, "cache": cache}
    return [
        Program(
            "denoise step", partial(denoise_branches, config),
            (params, text_kv, chunk, _float32(whole, prompts), cache), known | {"batch": chunk},
        ),
        Program(
            "commit", partial(commit_branches, config),
            (params, text_kv, chunk, cache), known | {"batch": chunk},
            updated=cache, jit={"donate_argnums": 3},
        ),
    ]  # fmt: skip


JOBS: dict[str, Callable[[Config, Mesh], list[Program]]] = {
    "train": train_programs,
    "sample": sample_programs,
}


def trace(program: Program, mesh: Mesh) -> Any:
    """The program traced for its mesh: a `jax.stages.Traced`, or `TracedPieces`."""
    function = on_mesh(mesh, program.function)
    with virtual.building_for(mesh.devices.flat[0]):
        if program.pieces:
            pieces = Pieces(function, program.pieces, (program.jit["donate_argnums"],))
            return pieces.trace(*program.arguments)
        return jax.jit(function, **program.jit).trace(*program.arguments)


def compile_for(traced: Any, mesh: Mesh) -> Any:
    """A traced program compiled for the devices of its mesh."""
    device = mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    with virtual.building_for(device):
        lowered = traced.lower(lowering_platforms=(platform,))
    return lowered.compile(compiler_options=virtual.compiler_options(platform))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
