"""How many FLOPs a training step is: counted from the config, and of any function from its jaxpr.

The model's FLOPs are those of its matmuls, two for each multiply-add: what the mathematics asks
for, whatever is recomputed to save memory. Their rate over the card's peak is the model FLOP
utilisation (MFU; Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

Letters: W chunks of the video, R noise repeats, C chunks of the sequence, S tokens of a chunk,
D width, L text tokens, M fast-weight heads, E fast-weight head width, H fast-weight hidden width.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

from lact_jax.models.dit import DiTConfig
from lact_jax.objective import ObjectiveConfig
from lact_jax.ops.sequence import SequenceLayout

# The backward pass over the forward pass, by the place of a matmul in the network: one for each
# operand that needs a gradient. 'attention': the self-attention modules. 'stream': between them and
# the loss. 'side': what depends on text or time alone. 'input': the first matmul of an input.
BACKWARD = {
    "all": {"attention": 2, "stream": 2, "side": 2, "input": 1},
    "attn_only": {"attention": 2, "stream": 1, "side": 0, "input": 0},
}

# Dense bfloat16 FLOP/s by the beginning of the device's name, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}


class Work(NamedTuple):
    """FLOPs of one clip."""

    forward: int
    backward: int


class _Matmul(NamedTuple):
    part: str
    place: str
    flops: int


class _Sizes(NamedTuple):
    """What the mixers' counts depend on."""

    model: DiTConfig
    layout: SequenceLayout
    tokens: int

    @property
    def all_tokens(self) -> int:
        return self.layout.length * self.tokens


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device (`jax.Device.device_kind`), None if it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def sequence_sizes(
    model: DiTConfig, objective: ObjectiveConfig, latent_Fhw: tuple[int, int, int]
) -> tuple[SequenceLayout, int]:
    """The teacher-forcing sequence of a clip with F latent frames of h x w: (layout, S)."""
    frames, height, width = latent_Fhw
    layout = SequenceLayout(frames // objective.frames_per_chunk, objective.num_repeat)
    return layout, objective.frames_per_chunk * height * width // math.prod(model.patch_size)


def count_sequence(
    model: DiTConfig, layout: SequenceLayout, tokens: int, trainable: str = "all"
) -> dict[str, Work]:
    """FLOPs of `DiT.sequence` for one clip, by part of the network.

    Args:
      model: sizes and mixers.
      layout: the sequence's layout.
      tokens: S, tokens of a chunk.
      trainable: what the backward pass is for, a key of `optim.TRAINABLE`.
    """
    sizes = _Sizes(model, layout, tokens)
    total: dict[str, Work] = {}
    for part, place, flops in _matmuls(sizes):
        before = total.get(part, Work(0, 0))
        backward = BACKWARD[trainable][place] * flops
        total[part] = Work(before.forward + flops, before.backward + backward)
    return total


def step_flops(
    model: DiTConfig, objective: ObjectiveConfig, latent_Fhw: tuple[int, int, int], trainable: str
) -> int:
    """FLOPs of forward and backward pass for one clip; arguments as above."""
    layout, tokens = sequence_sizes(model, objective, latent_Fhw)
    parts = count_sequence(model, layout, tokens, trainable).values()
    return sum(work.forward + work.backward for work in parts)


def _matmuls(sizes: _Sizes) -> Iterator[_Matmul]:
    model, chunks, tokens = sizes.model, sizes.layout.length, sizes.all_tokens
    dim, text_len = model.dim, model.text_len
    patch_width = model.latent_channels * math.prod(model.patch_size)
    yield _Matmul("dense", "input", 2 * tokens * patch_width * dim)
    yield _Matmul("dense", "input", 2 * text_len * model.text_dim * dim)
    yield _Matmul("dense", "side", 2 * text_len * dim * dim)
    yield _Matmul("dense", "input", 2 * chunks * model.freq_dim * dim)
    yield _Matmul("dense", "side", 2 * chunks * dim * 7 * dim)  # fc2 and the projection to 6 D
    yield _Matmul("dense", "stream", 2 * tokens * dim * patch_width)
    for mixer, options in model.layer_specs:
        yield _Matmul("dense", "attention", 4 * 2 * tokens * dim * dim)  # q, k, v, o
        yield from MIXER_MATMULS[mixer](sizes, options)
        yield _Matmul("dense", "side", 2 * 2 * text_len * dim * dim)
        yield _Matmul("dense", "stream", 2 * 2 * tokens * dim * dim)
        yield _Matmul("cross-attention", "stream", 4 * tokens * text_len * dim)
        yield _Matmul("dense", "stream", 2 * 2 * tokens * dim * model.ffn_dim)


def _window(sizes: _Sizes, options) -> Iterator[_Matmul]:
    """Every chunk sees itself; noise copies but the first also a window of the chunk before."""
    _, layout, tokens = sizes
    size = tokens if options.kv_cache_size is None else min(options.kv_cache_size, tokens)
    later = layout.num_clean * layout.num_repeat
    pairs = tokens * (sizes.all_tokens + later * size)
    yield _Matmul("window attention", "attention", 4 * pairs * sizes.model.dim)


def _full(sizes: _Sizes, options) -> Iterator[_Matmul]:
    """Clean chunk i sees i + 1 chunks, noise copies of chunk i too."""
    del options
    _, layout, tokens = sizes
    clean = sum(range(1, layout.num_chunks))
    noise = layout.num_repeat * sum(range(1, layout.num_chunks + 1))
    pairs = tokens * tokens * (clean + noise)
    yield _Matmul("full attention", "attention", 4 * pairs * sizes.model.dim)


def _lact(sizes: _Sizes, options) -> Iterator[_Matmul]:
    """Window attention; six matmuls of H x E a token to update, three to read; Newton-Schulz."""
    model, layout, tokens = sizes
    dim, head_dim, clean = model.dim, options.fw_head_dim, layout.num_clean
    heads, hidden = dim // head_dim, int(options.inter_multi * head_dim)
    yield from _window(sizes, options)
    matmuls = 3 * sizes.all_tokens + 6 * clean * tokens
    yield _Matmul("fast weights", "attention", matmuls * 2 * dim * hidden)
    columns = 3 * heads + (1 if options.learnable_ttt_scale else 0)
    yield _Matmul("fast weights", "attention", 2 * sizes.all_tokens * dim * columns)
    if options.momentum:
        yield _Matmul("fast weights", "attention", 2 * clean * tokens * dim * heads)
    if options.muon:
        short, long = sorted((head_dim, hidden))
        iteration = 4 * short * short * long + 2 * short**3
        steps = 3 * heads * clean * options.muon_iters
        yield _Matmul("fast weights", "attention", steps * iteration)


def _gla(sizes: _Sizes, options) -> Iterator[_Matmul]:
    """Window attention; one matmul of E x E a token to update, one to read; the decay."""
    model, layout, tokens = sizes
    dim, written = model.dim, layout.num_clean * tokens
    yield from _window(sizes, options)
    matmuls = sizes.all_tokens + written
    yield _Matmul("linear state", "attention", matmuls * 2 * dim * (model.gla.head_dim or dim))
    yield _Matmul("linear state", "attention", 2 * 2 * written * dim * model.gla.gate_rank)
    if options.learnable_ttt_scale:
        yield _Matmul("linear state", "attention", 2 * sizes.all_tokens * dim)


# Mixer name -> the matmuls of a layer beside q, k, v and o.
MIXER_MATMULS: dict[str, Callable[..., Iterator[_Matmul]]] = {
    "lact": _lact,
    "full": _full,
    "window": _window,
    "gla": _gla,
}


def _convolution(equation) -> int:
    kernel = equation.invars[1].aval.shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]


def _dot(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * summed


def _fused_attention(matmuls: int) -> Callable[..., int]:
    """cuDNN's kernels: so many matmuls of every query with every key."""

    def count(equation) -> int:
        (batch, queries, heads, width), keys = (x.aval.shape for x in equation.invars[:2])
        return matmuls * 2 * batch * heads * queries * keys[1] * width

    return count


# The backward kernel computes the scores again and the gradients of q, k, v and the probabilities.
COUNTED = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dot_product_attention_fwd_wrapper": _fused_attention(2),
    "dot_product_attention_bwd_wrapper": _fused_attention(5),
}


def count_jaxpr_flops(jaxpr) -> int:
    """FLOPs of what a `jax.extend.core.Jaxpr` computes: see `count_flops`. In a `jax.shard_map`
    shapes are those of one device, and so are the FLOPs."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in COUNTED:
            total += COUNTED[name](equation)
        repeats = equation.params["length"] if name == "scan" else 1
        inner = map(count_jaxpr_flops, jaxprs_in_params(equation.params))
        total += repeats * sum(inner)
    return total


def count_flops(function: Callable, *args) -> int:
    """FLOPs of the convolutions and matmuls in `function(*args)`, two for each multiply-add.

    Arguments may be `jax.ShapeDtypeStruct`s; nothing is computed. A scan counts each of its steps;
    a while loop, whose number is not known, counts one.
    """
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)
