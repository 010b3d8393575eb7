"""The LaCT fast weights: a SwiGLU MLP per head that is updated once per chunk and read by queries.

Letters: B batch, C clean chunks, M fast-weight heads, S tokens of a chunk, T query tokens,
E head width, H hidden width, X, Y any width. Everything here is a pure function.

    f(x) = w1 (silu(w0 x) * (w2 x)),   loss = -<f(k), v>               (REFERENCE.md 4)

Weights live in float32; a copy in the inputs' dtype feeds each matmul, which accumulates in
float32. w0 and w2 are kept as one (2H, E) matrix so that each token needs one matmul less.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lact_jax.ops.numerics import l2_norm, matmul_precision
from lact_jax.ops.parallel import sum_over_tokens
from lact_jax.ops.swiglu import check_backend, down, einsum, swiglu_gradient

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-5
MUON_EPS = 1e-7


class FastWeights(NamedTuple):
    """Float32 weights: `w02_BMGE` (B, M, 2H, E) holds w0 above w2, `w1_BMEH` is (B, M, E, H)."""

    w02_BMGE: jax.Array
    w1_BMEH: jax.Array


class Chunk(NamedTuple):
    """What one clean chunk writes: k, v (B, M, S, E), lr (B, M, S, 3), momentum (B, M) or None."""

    k_BMSE: jax.Array
    v_BMSE: jax.Array
    lr_BMS3: jax.Array
    momentum_BM: jax.Array | None = None


class State(NamedTuple):
    """The memory between chunks: the weights, and the last raw update where momentum is on."""

    weights: FastWeights
    last_update: FastWeights | None


@dataclass(frozen=True)
class UpdateRule:
    """How a chunk's gradient changes the weights (REFERENCE.md 4, step 4)."""

    momentum: bool = False
    muon: bool = False
    muon_iters: int = 5
    weight_norm: bool = True


def from_matrices(w0_BMHE: jax.Array, w1_BMEH: jax.Array, w2_BMHE: jax.Array) -> FastWeights:
    """Joins the three matrices of REFERENCE.md 4 into float32 `FastWeights`."""
    w02_BMGE = jnp.concatenate([w0_BMHE, w2_BMHE], axis=-2)
    return FastWeights(w02_BMGE.astype(jnp.float32), w1_BMEH.astype(jnp.float32))


def to_matrices(weights: FastWeights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `from_matrices`: (w0, w1, w2)."""
    w0_BMHE, w2_BMHE = jnp.split(weights.w02_BMGE, 2, axis=-2)
    return w0_BMHE, weights.w1_BMEH, w2_BMHE


def initial_state(weights: FastWeights, rule: UpdateRule) -> State:
    """The state at the start of a sequence."""
    return State(weights, jax.tree.map(jnp.zeros_like, weights) if rule.momentum else None)


@jax.custom_vjp
def sum_of_outer(a_BMSX: jax.Array, b_BMSY: jax.Array) -> jax.Array:
    """Sum over tokens of a b^T: (B, M, X, Y) float32, multiplied in a's dtype in both passes."""
    return einsum("bmsx,bmsy->bmxy", a_BMSX, b_BMSY, preferred_element_type=jnp.float32)


def _sum_of_outer_fwd(a_BMSX, b_BMSY):
    return sum_of_outer(a_BMSX, b_BMSY), (a_BMSX, b_BMSY)


def _sum_of_outer_bwd(residuals, grad_BMXY):
    # The cotangent arrives in float32; unless it is cast, both matmuls below run in float32.
    a_BMSX, b_BMSY = residuals
    grad_BMXY = grad_BMXY.astype(a_BMSX.dtype)
    da_BMSX = einsum("bmxy,bmsy->bmsx", grad_BMXY, b_BMSY)
    db_BMSY = einsum("bmxy,bmsx->bmsy", grad_BMXY, a_BMSX)
    return da_BMSX, db_BMSY


sum_of_outer.defvjp(_sum_of_outer_fwd, _sum_of_outer_bwd)


def _hidden(w02_BMGE: jax.Array, x_BMSE: jax.Array) -> jax.Array:
    """w0 x beside w2 x: (B, M, S, 2H), in x's dtype."""
    gu_BMSG = einsum("bmse,bmge->bmsg", x_BMSE, w02_BMGE.astype(x_BMSE.dtype))
    return checkpoint_name(gu_BMSG, "hidden")


def read(weights: FastWeights, q_BMTE: jax.Array, *, backend: str = "xla") -> jax.Array:
    """f(q) for every query: (B, M, T, E), in q's dtype. For `backend` see `scan_chunks`."""
    check_backend(backend)
    gu_BMTG = _hidden(weights.w02_BMGE, q_BMTE)
    return down(gu_BMTG, weights.w1_BMEH.astype(q_BMTE.dtype), backend)


def gradient(weights: FastWeights, chunk: Chunk, *, backend: str = "xla") -> FastWeights:
    """-grad of the loss -<f(k), v>, each token weighted by its learning rates (float32).

    Learning rates multiply the narrow side (k, v), which has E instead of H columns. For `backend`
    see `scan_chunks`.
    """
    check_backend(backend)
    k_BMSE, v_BMSE = chunk.k_BMSE, chunk.v_BMSE
    dtype = k_BMSE.dtype
    lr0_BMS1, lr1_BMS1, lr2_BMS1 = jnp.split(chunk.lr_BMS3.astype(jnp.float32), 3, axis=-1)
    gu_BMSG = _hidden(weights.w02_BMGE, k_BMSE)
    dh_BMSH = einsum("bmse,bmeh->bmsh", v_BMSE, weights.w1_BMEH.astype(dtype))
    dh_BMSH = checkpoint_name(dh_BMSH, "hidden")
    h_BMSH, dg_BMSH, du_BMSH = swiglu_gradient(gu_BMSG, dh_BMSH, backend)
    dw0_BMHE = sum_of_outer(dg_BMSH, (lr0_BMS1 * k_BMSE).astype(dtype))
    dw1_BMEH = sum_of_outer((lr1_BMS1 * v_BMSE).astype(dtype), h_BMSH)
    dw2_BMHE = sum_of_outer(du_BMSH, (lr2_BMS1 * k_BMSE).astype(dtype))
    return FastWeights(jnp.concatenate([dw0_BMHE, dw2_BMHE], axis=-2), dw1_BMEH)


def newton_schulz(x: jax.Array, iters: int) -> jax.Array:
    """Orthogonalises each matrix (..., X, Y) in float32 (Muon, Jordan et al. 2024)."""
    a, b, c = MUON_COEFFICIENTS
    x = x.astype(jnp.float32)
    x = x / (l2_norm(x, axis=(-2, -1)) + MUON_EPS)
    tall = x.shape[-2] > x.shape[-1]

    matmul = partial(jnp.matmul, precision=matmul_precision(jnp.float32))

    def iterate(x, _):
        gram = matmul(x, x.mT)
        return a * x + matmul(b * gram + c * matmul(gram, gram), x), None

    x, _ = jax.lax.scan(iterate, x.mT if tall else x, length=iters)
    return x.mT if tall else x


def muon(update: FastWeights, iters: int) -> FastWeights:
    """Muon's form of an update. All three matrices are (E, H) or its transpose: one batch."""
    dw0_BMHE, dw1_BMEH, dw2_BMHE = to_matrices(update)
    stacked = jnp.stack([dw0_BMHE.mT, dw1_BMEH, dw2_BMHE.mT])
    w0_BMEH, w1_BMEH, w2_BMEH = newton_schulz(stacked, iters)
    return from_matrices(w0_BMEH.mT, w1_BMEH, w2_BMEH.mT)


def row_norms(weights: FastWeights) -> FastWeights:
    """L2 norms of the rows, (B, M, 2H, 1) and (B, M, E, 1): what weight norm keeps."""
    return jax.tree.map(l2_norm, weights)


def _scaled_to(norm_BMX1: jax.Array, w_BMXY: jax.Array) -> jax.Array:
    """w, each row scaled to its norm in `norm`."""
    return w_BMXY / (l2_norm(w_BMXY) + NORM_EPS) * norm_BMX1


@jax.custom_vjp
def _scaled_and_kept(norm_BMX1: jax.Array, w_BMXY: jax.Array) -> jax.Array:
    """`_scaled_to`, whose backward pass reads its result and the norms that w had.

    Both are kept by name, the result as the weights that the next chunk starts from. So the update
    that led to w is not computed again.
    """
    return _scaled_and_kept_fwd(norm_BMX1, w_BMXY)[0]


def _scaled_and_kept_fwd(norm_BMX1, w_BMXY):
    had_BMX1 = checkpoint_name(l2_norm(w_BMXY), "fast_weights")
    w_BMXY = checkpoint_name(w_BMXY / (had_BMX1 + NORM_EPS) * norm_BMX1, "fast_weights")
    return w_BMXY, (norm_BMX1, had_BMX1, w_BMXY)


def _scaled_and_kept_bwd(residuals, grad_BMXY):
    norm_BMX1, had_BMX1, w_BMXY = residuals
    along_BMX1 = jnp.sum(grad_BMXY * w_BMXY, axis=-1, keepdims=True)
    to_norm_BMX1 = along_BMX1 / _or_one(norm_BMX1)
    scale_BMX1 = norm_BMX1 / (had_BMX1 + NORM_EPS)
    return to_norm_BMX1, grad_BMXY * scale_BMX1 - w_BMXY * (to_norm_BMX1 / _or_one(had_BMX1))


def _or_one(x: jax.Array) -> jax.Array:
    """x, with 1 for 0: a row of norm 0 stays 0, and so is what would be divided by its norm."""
    return jnp.where(x == 0, 1.0, x)


_scaled_and_kept.defvjp(_scaled_and_kept_fwd, _scaled_and_kept_bwd)


def _stepped(state: State, chunk: Chunk, rule: UpdateRule, backend: str) -> State:
    """The state after a gradient step, before weight norm."""
    step = sum_over_tokens(gradient(state.weights, chunk, backend=backend))
    step = checkpoint_name(step, "update")
    last_update = None
    if rule.momentum:
        m_BM11 = chunk.momentum_BM.astype(jnp.float32)[..., None, None]
        step = jax.tree.map(lambda new, old: new + m_BM11 * old, step, state.last_update)
        last_update = step
    if rule.muon:
        step = muon(step, rule.muon_iters)
    return State(jax.tree.map(jnp.add, state.weights, step), last_update)


def update(
    state: State, chunk: Chunk, norms: FastWeights, rule: UpdateRule, *, backend: str = "xla"
) -> State:
    """One gradient step on a finished chunk.

    `norms` are the `row_norms` of the weights at the start of the sequence, which weight norm
    keeps. For `backend` see `scan_chunks`.
    """
    state = _stepped(state, chunk, rule, backend)
    if not rule.weight_norm:
        return state
    return state._replace(weights=jax.tree.map(_scaled_to, norms, state.weights))


# What the backward pass of a chunk finds saved with `keep_hidden`, instead of computing it again.
_HIDDEN = jax.checkpoint_policies.save_only_these_names("hidden", "update")

# More chunks than these are a loop: a program grows with every one, and so does its compilation.
MAX_UNROLLED = 8


def unrolls(count: int, *, keep_hidden: bool, backend: str) -> bool:
    """Whether `scan_chunks` unrolls so many chunks."""
    few = backend != "xla" and count <= MAX_UNROLLED
    return count > 0 and (few or keep_hidden)


def scan_chunks(
    initial: FastWeights,
    chunks_C: Chunk,
    queries_C: tuple[jax.Array, ...],
    rule: UpdateRule,
    *,
    keep_hidden: bool = False,
    in_checkpoint: bool = False,
    backend: str = "xla",
) -> tuple[State, tuple[jax.Array, ...]]:
    """Updates with every clean chunk in turn and reads after each update.

    Up to MAX_UNROLLED chunks are unrolled where kernels run or `keep_hidden` asks for it: a loop
    copies what is kept into and out of arrays of all chunks, and its backward pass computes the raw
    updates again.

    Args:
      initial: weights at the start of the sequence.
      chunks_C: the clean chunks, each array with a leading chunk axis C. Where chunks are unrolled
        (`unrolls`) it may be a list of C arrays instead, which spares the copies of slicing it.
      queries_C: streams of queries (C, B, M, T, E), or lists likewise; chunk c of each reads the
        weights that clean chunk c has just updated. Streams stay apart because joining and slicing
        them costs copies.
      rule: the update rule.
      keep_hidden: keep what the matmuls of the hidden width gave, (3H + 2H for each stream) numbers
        a token in the inputs' dtype, and the raw updates, for the backward pass. Without it that
        pass computes every chunk again from its inputs and the weights before and after it, which
        is the better choice where the layer around it is rematerialised.
      in_checkpoint: a `jax.checkpoint` is around this, whose policy says what is kept (it should
        keep the name "fast_weights"). Unrolled chunks then need none of their own.
      backend: one of `swiglu.BACKENDS` for the elementwise passes between matmuls, see
        `kernels.choose_backend`.

    Returns:
      The final state and one output (C, B, M, T, E) for each stream, a list where the stream is.
    """
    inputs_C, start = (chunks_C, queries_C), initial_state(initial, rule)
    norms = row_norms(initial)
    remat = partial(jax.checkpoint, prevent_cse=False)

    def reads(weights, queries):
        return tuple(read(weights, q_BMTE, backend=backend) for q_BMTE in queries)

    @remat
    def step(state, inputs):
        chunk, queries = inputs
        state = update(state, chunk, norms, rule, backend=backend)
        return state, reads(state.weights, queries)

    def looped(state, inputs):
        return checkpoint_name(step(state, inputs), "fast_weights")

    if not unrolls(len(chunks_C.k_BMSE), keep_hidden=keep_hidden, backend=backend):
        return jax.lax.scan(looped, start, inputs_C)

    stepped = partial(_stepped, rule=rule, backend=backend)
    if not in_checkpoint:
        policy = _HIDDEN if keep_hidden else None
        stepped, reads = remat(stepped, policy=policy), remat(reads, policy=policy)

    def unrolled(state, inputs):
        chunk, queries = inputs
        weights, last_update = stepped(state, chunk)
        if rule.weight_norm:
            weights = jax.tree.map(_scaled_and_kept, norms, weights)
        else:
            weights = checkpoint_name(weights, "fast_weights")
        kept = last_update, reads(weights, queries)
        last_update, outputs = checkpoint_name(kept, "fast_weights")
        return State(weights, last_update), outputs

    state, outputs = _unrolled(unrolled, start, inputs_C)
    stacked = (
        parts if isinstance(queries, list) else jnp.stack(parts)
        for queries, parts in zip(queries_C, outputs, strict=True)
    )
    return state, tuple(stacked)


def _unrolled(body, carry, inputs_C):
    """As jax.lax.scan, without a loop: for each output a list."""
    leaves, tree = jax.tree.flatten(inputs_C, is_leaf=lambda x: isinstance(x, list))
    outputs = []
    for step in zip(*map(_each_chunk, leaves), strict=True):
        carry, output = body(carry, tree.unflatten(step))
        outputs.append(output)
    return carry, [list(parts) for parts in zip(*outputs, strict=True)]


def _each_chunk(x_C: jax.Array | list[jax.Array]) -> list[jax.Array]:
    """The chunks of an array. The gradients of its slices are joined, not added to zeros."""
    if isinstance(x_C, list):
        return x_C
    return [part[0] for part in jax.lax.split(x_C, (1,) * len(x_C), axis=0)]
