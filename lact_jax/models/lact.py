"""The LaCT layer: window attention inside and next to a chunk, fast weights for all that is older.

Letters: B batch, C chunks of the sequence, S tokens of a chunk, T key tokens, D width,
N attention heads, K head width, P = K / 2, M fast-weight heads, E fast-weight head width (ME = D),
H fast-weight hidden width, R noise repeats, W chunks of the video.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lact_jax.models.layers import RMSNorm, linear, project_joined_float32, without_bias
from lact_jax.models.mixer import (
    QKVO,
    KeysWithPast,
    KeyValues,
    attend_and_keep,
    attend_with_past,
    can_join_past,
    mean_norm,
    regroup_heads,
    window_attention_parts,
    window_parts,
)
from lact_jax.ops import fast_weights as fw
from lact_jax.ops import kernels, merge_kernels, qk_kernels, swiglu_kernels
from lact_jax.ops.merge_kernels import MergeOptions, merge
from lact_jax.ops.numerics import l2_norm
from lact_jax.ops.parallel import mean_over_tokens
from lact_jax.ops.qk_kernels import QKOptions, window_and_fast
from lact_jax.ops.rope import apply_rope
from lact_jax.ops.sequence import SequenceLayout

L2_EPS = 1e-5


@dataclass(frozen=True)
class LaCTConfig:
    """Options of a LaCT layer (REFERENCE.md 4).

    Attributes:
      fw_head_dim: E, a divisor of the model width.
      inter_multi: H / E.
      qk_l2_norm: divide fast q and k by their L2 norm over E.
      qkv_silu: SiLU on fast q, k and v.
      l2_norm_after_silu: norm after SiLU instead of before it.
      o_norm: RMSNorm over E on the fast output.
      w_init: 'normal' (N(0, 1/fan_in)) or 'identity'.
      momentum, muon, muon_iters, weight_norm: the update rule.
      learnable_ttt_scale: gate the fast output by silu(Linear(x)), starting at 0; else `ttt_scale`.
      ttt_scale: the constant factor of the fast output.
      kv_cache_size: tokens of the clean chunk before that a noise copy sees; None for all.
      base_lr: learning rate of a token at initialisation.
    """

    fw_head_dim: int = 768
    inter_multi: float = 2.0
    qk_l2_norm: bool = True
    qkv_silu: bool = False
    l2_norm_after_silu: bool = False
    o_norm: bool = True
    w_init: str = "normal"
    momentum: bool = False
    muon: bool = False
    muon_iters: int = 5
    weight_norm: bool = True
    learnable_ttt_scale: bool = True
    ttt_scale: float = 1.0
    kv_cache_size: int | None = None
    base_lr: float = 0.001

    def __post_init__(self):
        if self.w_init not in W_INITS:
            raise ValueError(f"lact.w_init={self.w_init!r}: choose one of {sorted(W_INITS)}")
        if self.kv_cache_size is not None and self.kv_cache_size < 0:
            raise ValueError(f"lact.kv_cache_size={self.kv_cache_size}: must be at least 0 or None")
        if self.base_lr <= 0:
            raise ValueError(f"lact.base_lr={self.base_lr}: must be positive")

    @property
    def rule(self) -> fw.UpdateRule:
        return fw.UpdateRule(self.momentum, self.muon, self.muon_iters, self.weight_norm)


def _normal_init(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])


def _identity_init(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    del key
    return jnp.broadcast_to(jnp.eye(*shape[1:], dtype=jnp.float32), shape)


W_INITS = {"normal": _normal_init, "identity": _identity_init}


class LaCTCache(NamedTuple):
    """Memory of the committed chunks: fast weights, and keys and values of the last chunk."""

    fast: fw.State
    past: KeyValues


class PerToken(NamedTuple):
    """What a layer's input says of each of its tokens, in float32.

    Attributes:
      lr: learning rates (..., M, S, 3), order lr0, lr1, lr2.
      gate: the factor of the fast output (..., S, 1), or a constant.
      momentum: (..., S, M), of which a chunk has the mean over its tokens; or None.
    """

    lr: jax.Array
    gate: jax.Array
    momentum: jax.Array | None

    def to_write(self, part=...) -> tuple[jax.Array, jax.Array | None]:
        """Learning rates of the chunks at `part` and their momentum (..., M), as `fw.Chunk`'s."""
        if self.momentum is None:
            return self.lr[part], None
        return self.lr[part], mean_over_tokens(self.momentum[part], axis=-2)


class LaCT(QKVO):
    """Takes the place of self-attention; at initialisation it is exactly window attention."""

    def __init__(self, config, options: LaCTConfig, *, rngs: nnx.Rngs):
        dim, dtype, head_dim = config.dim, config.dtype, options.fw_head_dim
        if dim % head_dim:
            raise ValueError(f"lact.fw_head_dim={head_dim} does not divide the width dim={dim}")
        super().__init__(dim, config.num_heads, config.eps, dtype=dtype, rngs=rngs)
        self.config, self.eps, self.kernels = options, config.eps, config.kernels
        self.in_checkpoint = config.remat != "none"
        heads, hidden = dim // head_dim, int(options.inter_multi * head_dim)
        self.num_fw_heads = heads
        init = W_INITS[options.w_init]
        self.w0 = nnx.Param(init(rngs.params(), (heads, hidden, head_dim)))
        self.w1 = nnx.Param(init(rngs.params(), (heads, head_dim, hidden)))
        self.w2 = nnx.Param(init(rngs.params(), (heads, hidden, head_dim)))
        self.qk_scale = nnx.Param(jnp.ones((dim, 2), jnp.float32))
        self.qk_offset = nnx.Param(jnp.zeros((dim, 2), jnp.float32))
        self.lr_proj = linear(dim, 3 * heads, dtype=dtype, rngs=rngs)
        if options.momentum:
            self.momentum_proj = linear(dim, heads, dtype=dtype, rngs=rngs)
        if options.o_norm:
            self.output_norm = RMSNorm(head_dim, config.eps)
        if options.learnable_ttt_scale:
            zeros = nnx.initializers.zeros_init()
            self.ttt_scale_proj = linear(dim, 1, dtype=dtype, rngs=rngs, kernel_init=zeros)

    # The fast path: q, k, v of the fast weights, their learning rates, and the output.

    def _initial_weights(self, batch: int) -> fw.FastWeights:
        weights = fw.from_matrices(self.w0[...], self.w1[...], self.w2[...])
        return jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), weights)

    def _regroup(self, x: jax.Array) -> jax.Array:
        """(..., S, N, K) to fast-weight heads (..., M, S, E)."""
        return regroup_heads(x, self.num_fw_heads)

    def _activate(self, x: jax.Array, use_l2: bool) -> jax.Array:
        """SiLU and L2 norm of fast q, k or v (..., M, S, E), in the configured order."""
        y = x.astype(jnp.float32)
        options = self.config
        if options.qkv_silu and options.l2_norm_after_silu:
            y = jax.nn.silu(y)
        if use_l2 and options.qk_l2_norm:
            y = y / (l2_norm(y) + L2_EPS)
        if options.qkv_silu and not options.l2_norm_after_silu:
            y = jax.nn.silu(y)
        return y.astype(x.dtype)

    def _fast_qk(self, x_CSNK: jax.Array, rotation_CSP2: jax.Array, column: int) -> jax.Array:
        """Fast q (column 0) or k (column 1) from q or k before RoPE: (..., C, M, S, E)."""
        scale = self.qk_scale[...][:, column].reshape(self.num_heads, self.head_dim)
        offset = self.qk_offset[...][:, column].reshape(self.num_heads, self.head_dim)
        y = (x_CSNK.astype(jnp.float32) * scale + offset).astype(x_CSNK.dtype)
        return self._activate(self._regroup(apply_rope(y, rotation_CSP2)), use_l2=True)

    def _fast_v(self, v_CSNK: jax.Array) -> jax.Array:
        return self._activate(self._regroup(v_CSNK), use_l2=False)

    def _per_token(self, x_SD: jax.Array) -> PerToken:
        """What the narrow projections of the layer's input (..., S, D) give, by one matmul."""
        names = ("lr_proj", "ttt_scale_proj", "momentum_proj")
        layers = {name: getattr(self, name) for name in names if hasattr(self, name)}
        y = checkpoint_name(project_joined_float32(tuple(layers.values()), x_SD), "qkv")
        ends = np.cumsum([layer.out_features for layer in layers.values()])
        part = dict(zip(layers, jnp.split(y, ends[:-1], axis=-1), strict=True))
        lr = jax.nn.softplus(part["lr_proj"] + math.log(math.expm1(self.config.base_lr)))
        gate, momentum = jnp.float32(self.config.ttt_scale), None
        if self.config.learnable_ttt_scale:
            gate = jax.nn.silu(part["ttt_scale_proj"])
        if self.config.momentum:
            momentum = jax.nn.sigmoid(part["momentum_proj"])
        return PerToken(rearrange(lr, "... s (m three) -> ... m s three", three=3), gate, momentum)

    def _merge(self, gate_S1: jax.Array, o_fast: jax.Array, o_window_SNK: jax.Array) -> jax.Array:
        """Gated fast output (..., M, S, E) plus window output, projected: (..., S, D)."""
        if self.config.o_norm:
            o_fast = self.output_norm(o_fast)
        o_fast_SD = rearrange(o_fast, "... m s e -> ... s (m e)").astype(jnp.float32)
        o_window_SD = rearrange(o_window_SNK, "... n k -> ... (n k)").astype(jnp.float32)
        return self.output((gate_S1 * o_fast_SD + o_window_SD).astype(self.dtype))

    # Teacher-forced training.

    def sequence(self, x_BCSD: jax.Array, rotation_CSP2: jax.Array, layout: SequenceLayout):
        """See mixer.py."""
        q, q_fast = self._window_and_fast("q", x_BCSD, rotation_CSP2, layout)
        k, k_fast = self._window_and_fast("k", x_BCSD, rotation_CSP2, layout)
        v = self.heads(checkpoint_name(self.v(x_BCSD), "qkv"))
        per_token = self._per_token(x_BCSD)
        with jax.named_scope("fast_weights"):
            o_fast, fast_stats = self._fast_sequence(per_token, q_fast, k_fast, v, layout)
        with jax.named_scope("window_attention"):
            o_window = window_attention_parts(q, k, v, layout, self.config.kv_cache_size)
        y_BCSD, merge_stats = self._merge_sequence(per_token.gate, o_fast, o_window, layout)
        return y_BCSD, fast_stats | merge_stats

    def _window_and_fast(self, name: str, x_BCSD, rotation_CSP2, layout: SequenceLayout):
        """q or k, projected, normed and rotated, for its two readers.

        Args:
          name: 'q' or 'k'.
          x_BCSD: the layer's input.
          rotation_CSP2, layout: see mixer.py.

        Returns:
          Heads (B, C', S, N, K) of each of `window_parts`; k as `KeysWithPast` where a kernel can
          write that. And fast heads (B, C', M, S, E): q of all `_fast_parts`, k of those of clean
          chunks.
        """
        column = "qk".index(name)
        project, norm = getattr(self, name), getattr(self, f"norm_{name}")
        window = window_parts(layout)
        first, clean, later = self._fast_parts(layout, x_BCSD.dtype)
        fast = (first, *clean, *later) if name == "q" else clean
        backend = self._qk_backend(x_BCSD, (*window, *fast))
        if backend != "xla":
            joins = name == "k" and can_join_past(layout, self.config.kv_cache_size)
            options = QKOptions(
                self.num_fw_heads, self.eps, L2_EPS,
                _ends(window[:1] if joins else window), _ends(fast),
                joined=(_ends((layout.clean, layout.later)),) if joins else (),
                interpret=backend == "interpret",
            )  # fmt: skip
            z_BCSD = checkpoint_name(without_bias(project, x_BCSD), "qkv")
            vectors = norm.scale[...], self.qk_scale[...][:, column], self.qk_offset[...][:, column]
            bias_D = project.bias[...]
            heads, fast = window_and_fast(z_BCSD, bias_D, rotation_CSP2, *vectors, options)
            return KeysWithPast(*heads) if joins else heads, fast
        y_BCSNK = self.heads(norm(checkpoint_name(project(x_BCSD), "qkv")))
        return (
            tuple(apply_rope(y_BCSNK[:, part], rotation_CSP2[part]) for part in window),
            tuple(self._fast_qk(y_BCSNK[:, part], rotation_CSP2[part], column) for part in fast),
        )

    def _fast_backend(self, dtype) -> str:
        """How to compute the fast weights' elementwise passes."""
        fits = swiglu_kernels.fits(self.w1.shape[-1])
        return kernels.choose_backend(self.kernels, dtype, fits)

    def _fast_parts(self, layout: SequenceLayout, dtype):
        """The chunks of every array that the fast weights read or give: of the `first` chunks, then
        lists of `clean` and of `later` ones. Where chunks are unrolled, those that one of them
        updates or reads with are an array, since slices of a larger one would be copied."""
        count, repeat = layout.num_clean, layout.num_repeat
        if not fw.unrolls(count, keep_hidden=False, backend=self._fast_backend(dtype)):
            return layout.first, [layout.clean], [layout.later]

        def apart(chunks: slice, each: int):
            return [slice(i, i + each) for i in range(chunks.start, chunks.stop, each)]

        return layout.first, apart(layout.clean, 1), apart(layout.later, repeat)

    def _qk_backend(self, x_BCSD: jax.Array, ranges: tuple[slice, ...]) -> str:
        """How to compute these chunks with these options: by ops/qk_kernels but for 'xla'."""
        fits = (
            self.config.qk_l2_norm
            and not self.config.qkv_silu
            and all(part.start < part.stop for part in ranges)
            and qk_kernels.fits(self.num_heads, self.head_dim, self.num_fw_heads)
        )
        return kernels.choose_backend(self.kernels, x_BCSD.dtype, fits)

    def _merge_sequence(self, gate, o_fast, o_window, layout):
        """`_merge` of a sequence's outputs, and their statistics.

        Args:
          gate: of `PerToken`.
          o_fast: as `_fast_sequence` gives it.
          o_window: of each of `window_parts`, (B, C', S, N, K).
          layout: the sequence's.
        """
        first, clean, later = self._fast_parts(layout, o_window[0].dtype)
        fast, window = (first, *clean, *later), window_parts(layout)
        batch, _, tokens = o_window[0].shape[:3]
        backend = self._merge_backend(o_window[0].dtype, layout)
        if backend != "xla":
            gate_BCS1 = jnp.broadcast_to(gate, (batch, layout.length, tokens, 1))
            o_window = tuple(rearrange(x, "b c s n k -> b c s (n k)") for x in o_window)
            options = MergeOptions(
                self.eps, _ends(fast), _ends(window), interpret=backend == "interpret"
            )
            y_BCSD, *norms = merge(
                o_fast, o_window, gate_BCS1, self.output_norm.scale[...], options
            )
            y_BCSD, norms = self.output(y_BCSD), [jnp.mean(norm_BCS) for norm_BCS in norms]
        else:
            split = "w b m (r s) e -> b (w r) m s e"
            o_fast = [rearrange(x, split, s=tokens) for x in o_fast]
            o_fast, o_window = (jnp.concatenate(x, axis=1) for x in (o_fast, o_window))
            y_BCSD = self._merge(gate, o_fast, o_window)
            norms = mean_norm(o_fast), mean_norm(rearrange(o_window, "... n k -> ... (n k)"))
        gate_mean = jnp.mean(jax.lax.stop_gradient(gate))
        stats = dict(zip(("tttx_norm", "window_x_norm"), norms, strict=True))
        return y_BCSD, stats | {"gate_mean": gate_mean, "y_norm": self.y_norm(y_BCSD)}

    def _merge_backend(self, dtype, layout: SequenceLayout) -> str:
        """How to merge with these options: by ops/merge_kernels but for 'xla'."""
        fits = (
            self.config.o_norm
            and layout.num_clean > 0
            and merge_kernels.fits(self.num_fw_heads, self.w0.shape[-1])
        )
        return kernels.choose_backend(self.kernels, dtype, fits)

    def _fast_sequence(self, per_token, q_fast, k_fast, v_BCSNK, layout):
        """What the fast weights give every chunk, and the statistics of REFERENCE.md 4.

        Args:
          per_token: of the sequence's tokens, (B, C, ...).
          q_fast: fast q of all `_fast_parts`, (B, C', M, S, E).
          k_fast: fast k of those of clean chunks.
          v_BCSNK: v of all chunks.
          layout: the sequence's.

        Returns:
          Fast output of all `_fast_parts`, (W, B, M, R S, E) for W chunks of the video with R
          copies each, and the statistics.
        """
        _, clean, _ = self._fast_parts(layout, v_BCSNK.dtype)
        parts, repeat, backend = len(clean), layout.num_repeat, self._fast_backend(v_BCSNK.dtype)
        apart = fw.unrolls(layout.num_clean, keep_hidden=False, backend=backend)
        by_chunk = partial(_by_chunk, apart=apart)
        initial = self._initial_weights(v_BCSNK.shape[0])
        q_first, q_clean, q_later = q_fast[0], q_fast[1 : parts + 1], q_fast[parts + 1 :]
        v_clean = jnp.split(v_BCSNK[:, layout.clean], parts, axis=1)
        lr, momentum = jax.tree.map(
            _leading_chunk_axis, per_token.to_write(np.s_[:, layout.clean])
        )
        v_clean = tuple(map(self._fast_v, v_clean))
        chunks = fw.Chunk(by_chunk(k_fast), by_chunk(v_clean), lr, momentum)
        q_first = rearrange(q_first, "b r m s e -> b m (r s) e")
        o_first = checkpoint_name(fw.read(initial, q_first, backend=backend), "fast_weights")
        state, outputs = fw.scan_chunks(
            initial, chunks, (by_chunk(q_clean), by_chunk(q_later, repeat)), self.config.rule,
            in_checkpoint=self.in_checkpoint, backend=backend,
        )  # fmt: skip
        w0, w1, w2 = fw.to_matrices(state.weights)
        stats = {
            "fw_lr_norm": mean_norm(per_token.lr),
            "fw_w0_norm": mean_norm(w0),
            "fw_w1_norm": mean_norm(w1),
            "fw_w2_norm": mean_norm(w2),
        }
        outputs = (
            [x_BMTE[None] for x_BMTE in stream] if isinstance(stream, list) else [stream]
            for stream in outputs
        )
        return (o_first[None], *itertools.chain(*outputs)), stats

    # Sampling.

    def init_cache(self, batch: int) -> LaCTCache:
        """Initial fast weights and an empty window."""
        fast = fw.initial_state(self._initial_weights(batch), self.config.rule)
        return LaCTCache(fast, self.no_past(batch))

    def cache_specs(self, batch_axes: tuple[str, ...]) -> LaCTCache:
        """See mixer.py. Every device that shares a clip's tokens has all of its fast weights."""
        return LaCTCache(PartitionSpec(batch_axes), self.past_specs(batch_axes))

    def denoise(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: LaCTCache) -> jax.Array:
        """See mixer.py."""
        q, k, v = self.project(x_BSD)
        q_fast = self._fast_qk(q, rotation_SP2[None], 0)
        o_fast = fw.read(cache.fast.weights, q_fast)
        q, k = apply_rope(q, rotation_SP2[None]), apply_rope(k, rotation_SP2[None])
        o_window, _ = attend_with_past(q, k, v, cache.past)
        return self._merge(self._per_token(x_BSD).gate, o_fast, o_window)

    def commit(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: LaCTCache):
        """See mixer.py."""
        q, k, v = self.project(x_BSD)
        per_token = self._per_token(x_BSD)
        k_fast = self._fast_qk(k, rotation_SP2[None], 1)
        chunk = fw.Chunk(k_fast, self._fast_v(v), *per_token.to_write())
        initial = self._initial_weights(x_BSD.shape[0])
        fast = fw.update(cache.fast, chunk, fw.row_norms(initial), self.config.rule)
        o_fast = fw.read(fast.weights, self._fast_qk(q, rotation_SP2[None], 0))
        q, k = apply_rope(q, rotation_SP2[None]), apply_rope(k, rotation_SP2[None])
        o_window, past = attend_and_keep(q, k, v, self.config.kv_cache_size)
        return self._merge(per_token.gate, o_fast, o_window), LaCTCache(fast, past)


def _by_chunk(parts: tuple[jax.Array, ...], copies: int = 1, *, apart: bool):
    """Parts (B, W copies, M, S, E) as `fw.scan_chunks` takes them: `apart` a list of
    (B, M, copies S, E), else one array with a leading axis."""
    parts = [rearrange(x, "b (w r) m s e -> w b m (r s) e", r=copies) for x in parts]
    if not apart:
        (part,) = parts
        return part
    return [part[0] for part in parts]


def _leading_chunk_axis(x: jax.Array) -> jax.Array:
    """Swaps batch and chunk axes: scans run over the leading one."""
    return jnp.swapaxes(x, 0, 1)


def _ends(parts: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    """Slices of the chunks as ranges, which are hashable on every Python."""
    return tuple((part.start, part.stop) for part in parts)
