"""Slow, obvious twins in float64 numpy, written from the equations: loops over heads and tokens.

Letters: S, T tokens, N attention heads, K head width, M fast-weight heads, E fast-weight head
width, H hidden width, D width, R noise repeats, W chunks. One sample at a time: no batch axis.
"""

import numpy as np

RMS_EPS = 1e-6


def relative_error(got, want) -> float:
    """Relative L2 error; NaN wherever one is in, so `error < tolerance` fails."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def silu_slope(x):
    s = sigmoid(x)
    return s + x * s * (1 - s)


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + RMS_EPS) * scale


def attention(q_SNK, k_TNK, v_TNK):
    """softmax(q k^T / sqrt(K)) v, one head after the other."""
    out = np.zeros_like(q_SNK)
    for n in range(q_SNK.shape[1]):
        logits = q_SNK[:, n] @ k_TNK[:, n].T / np.sqrt(q_SNK.shape[-1])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out[:, n] = weights / weights.sum(axis=-1, keepdims=True) @ v_TNK[:, n]
    return out


def positions(frames, height, width):
    """(frame, row, column) of every token, frame by frame: (S, 3)."""
    return np.array([(f, y, x) for f in frames for y in range(height) for x in range(width)])


def rotate(x_SNK, positions_S3):
    """3-D RoPE by multiplication with unit complex numbers."""
    head_dim = x_SNK.shape[-1]
    side = head_dim // 6
    pairs = (head_dim // 2 - 2 * side, side, side)
    out = np.zeros_like(x_SNK, dtype=np.float64)
    for s, position in enumerate(positions_S3):
        angle = np.concatenate(
            [p * 10000.0 ** (-np.arange(n) / n) for p, n in zip(position, pairs, strict=True)]
        )
        z_NP = (x_SNK[s, :, 0::2] + 1j * x_SNK[s, :, 1::2]) * np.exp(1j * angle)
        out[s, :, 0::2], out[s, :, 1::2] = z_NP.real, z_NP.imag
    return out


# Fast weights of one head.


def read(weights, q_TE):
    w0, w1, w2 = weights
    return np.stack([w1 @ (silu(w0 @ q) * (w2 @ q)) for q in q_TE])


def newton_schulz(x, iters):
    x = x / (np.sqrt(np.sum(x**2)) + 1e-7)
    if x.shape[0] > x.shape[1]:
        return newton_schulz_wide(x.T, iters).T
    return newton_schulz_wide(x, iters)


def newton_schulz_wide(x, iters):
    for _ in range(iters):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ a @ x)
    return x


def update(weights, initial, last, k_SE, v_SE, lr_S3, momentum, rule):
    """One step on a chunk, token by token: (weights, raw update)."""
    w0, w1, w2 = weights
    step = [np.zeros_like(w) for w in weights]
    for k, v, (lr0, lr1, lr2) in zip(k_SE, v_SE, lr_S3, strict=True):
        g, u, dh = w0 @ k, w2 @ k, w1.T @ v
        step[0] += np.outer(dh * u * silu_slope(g), lr0 * k)
        step[1] += np.outer(v, lr1 * silu(g) * u)
        step[2] += np.outer(dh * silu(g), lr2 * k)
    if rule.momentum:
        step = [new + momentum * old for new, old in zip(step, last, strict=True)]
    last = step
    if rule.muon:
        step = [newton_schulz(dw, rule.muon_iters) for dw in step]
    weights = [w + dw for w, dw in zip(weights, step, strict=True)]
    if rule.weight_norm:
        for w, w_init in zip(weights, initial, strict=True):
            for row, row_init in zip(w, w_init, strict=True):
                row *= np.linalg.norm(row_init) / (np.linalg.norm(row) + 1e-5)
    return weights, last


# The LaCT layer on one sample.


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def activate(x, options, use_l2):
    def l2(y):
        if not (use_l2 and options.qk_l2_norm):
            return y
        return y / (np.linalg.norm(y, axis=-1, keepdims=True) + 1e-5)

    if not options.qkv_silu:
        return l2(x)
    return l2(silu(x)) if options.l2_norm_after_silu else silu(l2(x))


class ChunkParts:
    """What the layer makes of one chunk (S, D): attention heads, fast-weight heads, rates."""

    def __init__(self, p, options, num_heads, x_SD, positions_S3):
        def heads(y):
            return y.reshape(len(y), num_heads, -1)

        def fast_heads(y):
            return y.reshape(len(y), -1, options.fw_head_dim).swapaxes(0, 1)

        def fast_qk(y, column):
            y = y * p["qk_scale"][:, column] + p["qk_offset"][:, column]
            return activate(fast_heads(rotate(heads(y), positions_S3)), options, use_l2=True)

        q = rms_norm(linear(p["q"], x_SD), p["norm_q"]["scale"])
        k = rms_norm(linear(p["k"], x_SD), p["norm_k"]["scale"])
        v = linear(p["v"], x_SD)
        self.q, self.k = rotate(heads(q), positions_S3), rotate(heads(k), positions_S3)
        self.v = heads(v)
        self.fast_q_MSE, self.fast_k_MSE = fast_qk(q, 0), fast_qk(k, 1)
        self.fast_v_MSE = activate(fast_heads(v), options, use_l2=False)
        rates = linear(p["lr_proj"], x_SD) + np.log(np.expm1(options.base_lr))
        rates = np.log1p(np.exp(rates)).reshape(len(x_SD), -1, 3)
        self.lr_MS3 = rates.swapaxes(0, 1)
        self.momentum_M = [None] * len(self.lr_MS3)
        if options.momentum:
            self.momentum_M = sigmoid(linear(p["momentum_proj"], x_SD)).mean(axis=0)
        self.gate = options.ttt_scale
        if options.learnable_ttt_scale:
            self.gate = silu(linear(p["ttt_scale_proj"], x_SD))


class LaCTTwin:
    """The layer over the teacher-forcing sequence, in the order in which things happen.

    After a call `stats` holds the statistics of the sample.
    """

    def __init__(self, params, options, num_heads):
        self.p = as_float64(params)
        self.options, self.num_heads = options, num_heads

    def __call__(self, noise_RWSD, clean_WSD, positions_WS3):
        """Outputs of the noise copies (R, W, S, D) and of the clean chunks but the last."""
        repeats, chunks = noise_RWSD.shape[:2]
        self.chunks, self.fast, self.window, self.outputs = [], [], [], []
        heads = self.p["w0"].shape[0]
        initial = [[self.p[w][m].copy() for w in ("w0", "w1", "w2")] for m in range(heads)]
        weights = list(initial)
        last = [[np.zeros_like(w) for w in head] for head in initial]
        noise_out, clean_out = np.zeros_like(noise_RWSD), []
        before = None
        for i in range(chunks):
            if i > 0:
                before = self._parts(clean_WSD[i - 1], positions_WS3[i - 1])
                for m in range(heads):
                    weights[m], last[m] = update(
                        weights[m], initial[m], last[m], before.fast_k_MSE[m],
                        before.fast_v_MSE[m], before.lr_MS3[m], before.momentum_M[m],
                        self.options.rule,
                    )  # fmt: skip
                clean_out.append(self._output(before, weights, None))
            for r in range(repeats):
                copy = self._parts(noise_RWSD[r, i], positions_WS3[i])
                noise_out[r, i] = self._output(copy, weights, before)
        self._make_stats(weights)
        return noise_out, np.stack(clean_out)

    def _parts(self, x_SD, positions_S3):
        parts = ChunkParts(self.p, self.options, self.num_heads, x_SD, positions_S3)
        self.chunks.append(parts)
        return parts

    def _output(self, parts, weights, before):
        o_MSE = np.stack([read(w, q) for w, q in zip(weights, parts.fast_q_MSE, strict=True)])
        self.fast.append(o_MSE)
        if self.options.o_norm:
            o_MSE = rms_norm(o_MSE, self.p["output_norm"]["scale"])
        o_SD = o_MSE.swapaxes(0, 1).reshape(o_MSE.shape[1], -1)
        k, v = parts.k, parts.v
        if before is not None:
            size = self.options.kv_cache_size
            start = 0 if size is None else max(len(k) - size, 0)
            k, v = np.concatenate([before.k[start:], k]), np.concatenate([before.v[start:], v])
        window_SD = attention(parts.q, k, v).reshape(o_SD.shape)
        self.window.append(window_SD)
        self.outputs.append(linear(self.p["o"], parts.gate * o_SD + window_SD))
        return self.outputs[-1]

    def _make_stats(self, weights):
        def mean_norm(arrays):
            return np.mean([np.linalg.norm(a, axis=-1) for a in arrays])

        self.stats = {
            "gate_mean": np.mean([c.gate for c in self.chunks]),
            "fw_lr_norm": mean_norm([c.lr_MS3 for c in self.chunks]),
            "tttx_norm": mean_norm(self.fast),
            "window_x_norm": mean_norm(self.window),
            "y_norm": mean_norm(self.outputs),
        } | {f"fw_w{i}_norm": mean_norm([head[i] for head in weights]) for i in range(3)}


def as_float64(tree):
    """A nested dict of arrays as float64."""
    if isinstance(tree, dict):
        return {k: as_float64(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)
