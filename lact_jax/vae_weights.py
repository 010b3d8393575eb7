"""Where each VAE parameter lives: the JAX tree, Wan's official file, a diffusers folder.

One table serves reading and writing, for both layouts:
- "wan": the keys of `Wan2.1_VAE.pth`;
- "diffusers": the keys of `AutoencoderKLWan`, as in the vae/ of a diffusers folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lact_jax.models.vae import BlockSpec, VAEConfig, decoder_plan, encoder_plan


@dataclass(frozen=True)
class Transform:
    """How a torch tensor's axes become those of the JAX array.

    Attributes:
      torch_ndim: axes of the torch tensor.
      axes: the torch axis that each JAX axis is; the axes left out have size 1.
    """

    torch_ndim: int
    axes: tuple[int, ...]

    @property
    def _order(self) -> tuple[int, ...]:
        left_out = tuple(i for i in range(self.torch_ndim) if i not in self.axes)
        return self.axes + left_out

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """The JAX array of a torch tensor; a ValueError when its shape is not of this kind."""
        left_out = [tensor.shape[i] for i in self._order[len(self.axes) :] if i < tensor.ndim]
        if tensor.ndim != self.torch_ndim or any(size != 1 for size in left_out):
            raise ValueError(
                f"tensor of shape {tuple(tensor.shape)}: need {self.torch_ndim} axes, of size 1 "
                f"but for axes {sorted(self.axes)}"
            )
        ordered = np.transpose(tensor, self._order)
        return ordered.reshape(ordered.shape[: len(self.axes)])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_jax`."""
        if array.ndim != len(self.axes):
            raise ValueError(f"array of shape {tuple(array.shape)}: need {len(self.axes)} axes")
        ordered = array.reshape(array.shape + (1,) * (self.torch_ndim - array.ndim))
        return np.transpose(ordered, np.argsort(self._order))


# Torch kernels are (out, in, [time], [height, width]).
TRANSFORMS = {
    "conv3d": Transform(5, (2, 3, 4, 1, 0)),
    "conv2d": Transform(4, (2, 3, 1, 0)),
    "conv_time": Transform(5, (2, 3, 1, 0)),  # (O,I,3,1,1) to (3,1,I,O)
    "point3d": Transform(5, (1, 0)),  # (O,I,1,1,1) to a matrix
    "point2d": Transform(4, (1, 0)),
    "gamma3d": Transform(4, (0,)),
    "gamma2d": Transform(3, (0,)),
    "bias": Transform(1, (0,)),
}


class Row(NamedTuple):
    """One parameter: its path in the JAX tree, its two torch names, and a name of TRANSFORMS."""

    jax: str
    wan: str
    diffusers: str
    transform: str


def _conv(jax: str, wan: str, diffusers: str, transform: str) -> tuple[Row, Row]:
    return (
        Row(f"{jax}/kernel", f"{wan}.weight", f"{diffusers}.weight", transform),
        Row(f"{jax}/bias", f"{wan}.bias", f"{diffusers}.bias", "bias"),
    )


# The rows of a layer, under the layer's own three names.
RESIDUAL = (
    Row("first/norm/scale", "residual.0.gamma", "norm1.gamma", "gamma3d"),
    *_conv("first/conv", "residual.2", "conv1", "conv3d"),
    Row("second/norm/scale", "residual.3.gamma", "norm2.gamma", "gamma3d"),
    *_conv("second/conv", "residual.6", "conv2", "conv3d"),
)
SHORTCUT = _conv("shortcut", "shortcut", "conv_shortcut", "point3d")
ATTENTION = (
    Row("norm/scale", "norm.gamma", "norm.gamma", "gamma2d"),
    *_conv("qkv", "to_qkv", "to_qkv", "point2d"),
    *_conv("proj", "proj", "proj", "point2d"),
)
RESAMPLE = _conv("conv", "resample.1", "resample.1", "conv2d")
TIME_CONV = _conv("time_conv", "time_conv", "time_conv", "conv_time")
MIDDLE = (
    (("middle/0/", "middle.0.", "mid_block.resnets.0."), RESIDUAL),
    (("middle/1/", "middle.1.", "mid_block.attentions.0."), ATTENTION),
    (("middle/2/", "middle.2.", "mid_block.resnets.1."), RESIDUAL),
)
ENDS = (
    *_conv("conv_in", "conv1", "conv_in", "conv3d"),
    Row("head/norm/scale", "head.0.gamma", "norm_out.gamma", "gamma3d"),
    *_conv("head/conv", "head.2", "conv_out", "conv3d"),
)
LATENT = (
    *_conv("encoder/moments", "conv1", "quant_conv", "point3d"),
    *_conv("decoder/latent_in", "conv2", "post_quant_conv", "point3d"),
)


def _under(names: tuple[str, str, str], rows) -> Iterator[Row]:
    for row in rows:
        yield Row(*(f"{a}{b}" for a, b in zip(names, row[:3], strict=True)), row.transform)


def _block_rows(spec: BlockSpec) -> tuple[Row, ...]:
    if spec.kind == "residual":
        return RESIDUAL + (SHORTCUT if spec.in_channels != spec.out_channels else ())
    return RESAMPLE + (TIME_CONV if spec.temporal else ())


def _decoder_block(spec: BlockSpec) -> str:
    """The diffusers decoder groups its blocks by level; its encoder and both of Wan's do not."""
    kind = f"resnets.{spec.place}" if spec.kind == "residual" else "upsamplers.0"
    return f"up_blocks.{spec.level}.{kind}."


def rows(config: VAEConfig) -> tuple[Row, ...]:
    """The table for this VAE: one row for each of its tensors."""
    table = [*LATENT]
    for half in ("encoder", "decoder"):
        prefix = (f"{half}/", f"{half}.", f"{half}.")
        table += _under(prefix, ENDS)
        for names, layer in MIDDLE:
            table += _under(prefix, _under(names, layer))
    for i, spec in enumerate(encoder_plan(config)):
        names = (f"encoder/blocks/{i}/", f"encoder.downsamples.{i}.", f"encoder.down_blocks.{i}.")
        table += _under(names, _block_rows(spec))
    for i, spec in enumerate(decoder_plan(config)):
        diffusers = f"decoder.{_decoder_block(spec)}"
        names = (f"decoder/blocks/{i}/", f"decoder.upsamples.{i}.", diffusers)
        table += _under(names, _block_rows(spec))
    return tuple(table)
