"""Layers of the Wan2.1 VAE, channels-last: functions (carry, x) -> (carry, y) of a piece of time.

Letters: B batch, T frames, H height, W width, C channels.

A carry is what a layer must remember of the frames before: None at the start of a video, an array
(or a tuple of carries) afterwards. None is the empty pytree, so `jax.jit` compiles the start of a
video apart from its continuation, and neither holds a branch. Whatever way a video is cut in time,
the frames that come out are the same.

Norms and SiLU are float32; convolutions run in the module's dtype over float32 parameters.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lact_jax.models.layers import linear
from lact_jax.ops.attention import attend
from lact_jax.ops.numerics import matmul_precision

HISTORY = 2  # frames of the past that a causal convolution of 3 taps looks at


def conv(features, kernel_size, padding, *, dtype, rngs, strides=1):
    """An `nnx.Conv` from features[0] to features[1] channels: float32 parameters, `dtype` math."""
    return nnx.Conv(
        *features,
        kernel_size,
        strides,
        padding=padding,
        dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


def causal_conv(in_channels, out_channels, *, dtype, rngs):
    """The 3×3×3 convolution that `causal` applies: height and width padded, time not."""
    padding = ((0, 0), (1, 1), (1, 1))
    return conv((in_channels, out_channels), (3, 3, 3), padding, dtype=dtype, rngs=rngs)


def extend(history_BtHWC, x_BTHWC):
    """Puts the last two frames before x in front of it: zeros at the start of a video.

    Returns (B,2+T,H,W,C); its own last two frames are the next history.
    """
    if history_BtHWC is None:
        batch, _, *frame = x_BTHWC.shape
        history_BtHWC = jnp.zeros((batch, HISTORY, *frame), x_BTHWC.dtype)
    return jnp.concatenate([history_BtHWC, x_BTHWC], axis=1)


def causal(conv3d, history, x_BTHWC):
    """Applies a `causal_conv`: a frame sees itself and the two before. Returns (history, y)."""
    padded_BTHWC = extend(history, x_BTHWC)
    return padded_BTHWC[:, -HISTORY:], conv3d(padded_BTHWC)


def over_time(time_conv, x_BTHWC):
    """Applies a convolution of kernel (taps, 1) along time, the pixels of a frame on one axis.

    Two spatial axes instead of three: XLA by itself keeps only those channels-last on a GPU.
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    y_BTPC = time_conv(x_BTHWC.reshape(batch, frames, height * width, channels))
    return y_BTPC.reshape(batch, y_BTPC.shape[1], height, width, y_BTPC.shape[-1])


class ChannelRMSNorm(nnx.Module):
    """x / ‖x‖ · √C · scale over the channels of each pixel; the result stays float32."""

    def __init__(self, channels, *, rngs):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x_BTHWC):
        x_BTHWC = x_BTHWC.astype(jnp.float32)
        square_BTHW1 = jnp.sum(x_BTHWC * x_BTHWC, axis=-1, keepdims=True)
        # 1e-24 is the square of the 1e-12 under which the official code stops dividing.
        inverse_BTHW1 = jax.lax.rsqrt(jnp.maximum(square_BTHW1, 1e-24)) * x_BTHWC.shape[-1] ** 0.5
        return x_BTHWC * inverse_BTHW1 * self.scale[...]


class NormSiluConv(nnx.Module):
    """ChannelRMSNorm, SiLU, causal 3×3×3 convolution: what residual blocks and heads consist of."""

    def __init__(self, in_channels, out_channels, *, dtype, rngs):
        self.norm = ChannelRMSNorm(in_channels, rngs=rngs)
        self.conv = causal_conv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, history, x_BTHWC):
        activated_BTHWC = jax.nn.silu(self.norm(x_BTHWC)).astype(self.dtype)
        return causal(self.conv, history, activated_BTHWC)


class ResidualBlock(nnx.Module):
    """Two NormSiluConv and a shortcut, which is a linear map where the width changes."""

    def __init__(self, in_channels, out_channels, *, dtype, rngs):
        self.first = NormSiluConv(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.second = NormSiluConv(out_channels, out_channels, dtype=dtype, rngs=rngs)
        self.shortcut = (
            linear(in_channels, out_channels, dtype=dtype, rngs=rngs)
            if in_channels != out_channels
            else None
        )

    def __call__(self, carry, x_BTHWC):
        first, second = (None, None) if carry is None else carry
        first, y_BTHWC = self.first(first, x_BTHWC)
        second, y_BTHWC = self.second(second, y_BTHWC)
        if self.shortcut is not None:
            x_BTHWC = self.shortcut(x_BTHWC)
        return (first, second), x_BTHWC + y_BTHWC


class FrameAttention(nnx.Module):
    """Single-head attention among the pixels of one frame, with its residual. Remembers nothing."""

    def __init__(self, channels, *, dtype, rngs):
        self.norm = ChannelRMSNorm(channels, rngs=rngs)
        self.qkv = linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, carry, x_BTHWC):
        batch, frames, height, width, channels = x_BTHWC.shape
        qkv = self.qkv(self.norm(x_BTHWC).astype(self.dtype))
        qkv = qkv.reshape(batch * frames, height * width, 1, 3 * channels)
        y = attend(*jnp.split(qkv, 3, axis=-1))
        return carry, x_BTHWC + self.proj(y.reshape(x_BTHWC.shape))


class Downsample(nnx.Module):
    """Halves height and width, and with `temporal` time: T = 1 + 2n frames become 1 + n.

    The video's first frame passes the time convolution by, but is in the window of the next.
    """

    def __init__(self, channels, *, temporal, dtype, rngs):
        features = (channels, channels)
        padding = ((0, 1), (0, 1))
        self.conv = conv(features, (3, 3), padding, strides=2, dtype=dtype, rngs=rngs)
        self.time_conv = (
            conv(features, (3, 1), "VALID", strides=(2, 1), dtype=dtype, rngs=rngs)
            if temporal
            else None
        )

    def __call__(self, last_B1HWC, x_BTHWC):
        x_BTHWC = self.conv(x_BTHWC)
        if self.time_conv is None:
            return None, x_BTHWC
        if last_B1HWC is not None:
            window_BTHWC = jnp.concatenate([last_B1HWC, x_BTHWC], axis=1)
            return x_BTHWC[:, -1:], over_time(self.time_conv, window_BTHWC)
        if x_BTHWC.shape[1] == 1:
            return x_BTHWC, x_BTHWC
        later_BTHWC = over_time(self.time_conv, x_BTHWC)
        return x_BTHWC[:, -1:], jnp.concatenate([x_BTHWC[:, :1], later_BTHWC], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width, halves the channels; with `temporal` doubles time but for frame 0.

    The time convolution never sees the video's first frame, which passes it by: the frame after
    that starts from a past of zeros.
    """

    def __init__(self, channels, *, temporal, dtype, rngs):
        features = (channels, channels // 2)
        self.conv = conv(features, (3, 3), ((1, 1), (1, 1)), dtype=dtype, rngs=rngs)
        self.time_conv = (
            conv((channels, 2 * channels), (3, 1), "VALID", dtype=dtype, rngs=rngs)
            if temporal
            else None
        )

    def __call__(self, history, x_BTHWC):
        if self.time_conv is not None:
            history, x_BTHWC = self._double_time(history, x_BTHWC)
        batch, frames, height, width, channels = x_BTHWC.shape
        x = jnp.broadcast_to(
            x_BTHWC[:, :, :, None, :, None, :], (batch, frames, height, 2, width, 2, channels)
        )
        return history, self.conv(x.reshape(batch, frames, 2 * height, 2 * width, channels))

    def _double_time(self, history, x_BTHWC):
        passed_BtHWC = x_BTHWC[:, : 1 if history is None else 0]
        padded_BTHWC = extend(history, x_BTHWC[:, passed_BtHWC.shape[1] :])
        history = padded_BTHWC[:, -HISTORY:]
        if padded_BTHWC.shape[1] == HISTORY:  # a first call with frame 0 alone
            return history, passed_BtHWC
        y = over_time(self.time_conv, padded_BTHWC)
        batch, frames, height, width, channels = y.shape
        # Output channels are (frame of the pair, channel).
        y = jnp.moveaxis(y.reshape(batch, frames, height, width, 2, channels // 2), 4, 2)
        y = y.reshape(batch, 2 * frames, height, width, channels // 2)
        return history, jnp.concatenate([passed_BtHWC, y], axis=1)


def run_layers(layers, carries, x_BTHWC):
    """Runs layers in order on a piece of time.

    Args:
      layers: sequence of (carry, x) -> (carry, y).
      carries: None at the start of a video, else the tuple that the call before returned.
      x_BTHWC: (B,T,H,W,C).

    Returns:
      (carries, y), carries a tuple of one carry per layer.
    """
    carries = (None,) * len(layers) if carries is None else carries
    after = []
    for layer, carry in zip(layers, carries, strict=True):
        carry, x_BTHWC = layer(carry, x_BTHWC)
        after.append(carry)
    return tuple(after), x_BTHWC
