"""The two operations of a LaCT layer in plain PyTorch, to run beside ours on the same inputs.

Written from REFERENCE.md 4 with public building blocks, compiled by torch.compile on a GPU.
"""

from collections.abc import Callable

import jax
import torch
import torch.nn.functional as F

from benchmarks import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT_EPS = 1e-5


def _tensor(x: jax.Array) -> torch.Tensor:
    return torch.from_dlpack(x).to(DEVICE).clone()


def differences(ours, theirs) -> dict[str, float]:
    """The largest relative differences of (outputs, gradients) from PyTorch's."""
    return {
        f"{name}, difference from torch": common.largest_error(
            jax.tree.leaves(mine), [x.detach().float().cpu().numpy() for x in yours]
        )
        for name, mine, yours in zip(("output", "gradient"), ours, theirs, strict=True)
    }


def _timed(step: Callable) -> tuple[Callable, tuple]:
    """(a call that waits for the device, its result)."""

    def call():
        result = step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return call, call()


def _compiled(function: Callable) -> Callable:
    return torch.compile(function) if DEVICE == "cuda" else function


def _read(w02, w1, q):
    gate, up = (q @ w02.to(q.dtype).mT).chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(q.dtype) @ w1.to(q.dtype).mT


def _update(w02, w1, k, v, lr, norms):
    dtype = k.dtype
    gate, up = (x.float() for x in (k @ w02.to(dtype).mT).chunk(2, dim=-1))
    d_hidden = (v @ w1.to(dtype)).float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    lr0, lr1, lr2 = lr.split(1, dim=-1)
    dw0 = d_gate.to(dtype).mT @ (lr0 * k).to(dtype)
    dw2 = (d_hidden * silu).to(dtype).mT @ (lr2 * k).to(dtype)
    dw1 = (lr1 * v).to(dtype).mT @ (silu * up).to(dtype)
    w02 = w02 + torch.cat([dw0, dw2], dim=-2).float()
    w1 = w1 + dw1.float()
    return tuple(
        w / (w.norm(dim=-1, keepdim=True) + WEIGHT_EPS) * norm
        for w, norm in zip((w02, w1), norms, strict=True)
    )


def lact(inputs, cotangents) -> tuple[Callable, tuple]:
    """Forward and backward of the LaCT operation without Muon: (call, (outputs, gradients))."""
    leaves = [_tensor(x).requires_grad_() for x in jax.tree.leaves(inputs)]
    grads = [_tensor(x) for x in jax.tree.leaves(cotangents)]

    def forward(w02, w1, k, v, lr, q_first, q_streams):
        norms = tuple(w.norm(dim=-1, keepdim=True) for w in (w02, w1))
        first, outputs = _read(w02, w1, q_first), []
        for c in range(k.shape[0]):
            w02, w1 = _update(w02, w1, k[c], v[c], lr[c], norms)
            outputs.append([_read(w02, w1, q[c]) for q in q_streams])
        return first, *(torch.stack(stream) for stream in zip(*outputs, strict=True))

    run = _compiled(forward)

    def step():
        outputs = run(*leaves)
        return outputs, torch.autograd.grad(outputs, leaves, grads)

    return _timed(step)


def window_attention(q, k, v, cotangent, layout) -> tuple[Callable, tuple]:
    """Forward and backward through scaled_dot_product_attention: (call, (outputs, gradients)).

    The arguments are those of `benchmarks.window_attention.as_in_a_layer`.
    """
    leaves = [_heads_first(x).requires_grad_() for x in (*q, *k, v)]
    grads = [_heads_first(x) for x in cotangent]
    alone, clean, later = slice(0, layout.later.start), layout.clean, layout.later

    def forward(q_alone, q_later, k_alone, k_later, v):
        v_later = torch.cat([v[clean], v[later]], dim=2)
        return (
            F.scaled_dot_product_attention(q_alone, k_alone, v[alone]),
            F.scaled_dot_product_attention(q_later, k_later, v_later),
        )

    run = _compiled(forward)

    def step():
        o = run(*leaves)
        gradients = torch.autograd.grad(o, leaves, grads)
        return tuple(tuple(x.transpose(1, 2)[None] for x in each) for each in (o, gradients))

    return _timed(step)


def _heads_first(x) -> torch.Tensor:
    """(1, C, S, N, K) as (C, N, S, K)."""
    return _tensor(x)[0].transpose(1, 2).contiguous()
