"""The Wan VAE in plain PyTorch, from public building blocks, to run beside ours.

Weights are a dict by the official names. As in the JAX form, a piece of time goes through with the
past that every convolution keeps: here a dict, empty at the start of a video, that a call updates.
Activations are (B, C, T, H, W) in channels-last memory.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lact_jax.models.vae import (
    TEMPORAL_STRIDE,
    BlockSpec,
    VAEConfig,
    decoder_plan,
    encoder_plan,
)


class TorchVAE:
    """Encoder and decoder of WanVAE, without gradients.

    Args:
      state: official tensor name -> float32 tensor.
      config: sizes; its dtype is the type of weights and activations.
      device: where to run.
    """

    def __init__(self, state: dict[str, torch.Tensor], config: VAEConfig, device: str):
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.weights = {name: self._place(x.to(device, self.dtype)) for name, x in state.items()}
        statistics = torch.tensor([config.latent_mean, config.latent_std], device=device)
        self.mean, self.std = statistics[:, :, None, None, None]

    @staticmethod
    def _place(tensor):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        is_kernel = tensor.ndim in formats and tensor.shape[1] > 1
        return tensor.contiguous(memory_format=formats[tensor.ndim]) if is_kernel else tensor

    def _parameters(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _norm(self, name, x):
        gamma = self.weights[f"{name}.gamma"].flatten()
        normalised = F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-24)
        return normalised.movedim(-1, 1)

    def _remember(self, past, name, x):
        """x behind its last two frames of the past, zeros at the start."""
        before = past.get(name)
        if before is None:
            before = x.new_zeros((*x.shape[:2], 2, *x.shape[3:]))
        x = torch.cat([before, x], dim=2)
        past[name] = x[:, :, -2:]
        return x

    def _causal(self, past, name, x):
        x = self._remember(past, name, x).contiguous(memory_format=torch.channels_last_3d)
        return F.conv3d(x, *self._parameters(name), padding=(0, 1, 1))

    def _per_frame(self, function, x):
        batch, _, frames, _, _ = x.shape
        y = function(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (batch, frames)).transpose(1, 2)

    def _residual(self, past, name, x):
        y = self._causal(past, f"{name}.residual.2", F.silu(self._norm(f"{name}.residual.0", x)))
        y = self._causal(past, f"{name}.residual.6", F.silu(self._norm(f"{name}.residual.3", y)))
        if f"{name}.shortcut.weight" in self.weights:
            x = F.conv3d(x, *self._parameters(f"{name}.shortcut"))
        return x + y

    def _attention(self, name, x):
        def attend(frames):
            qkv = F.conv2d(frames, *self._parameters(f"{name}.to_qkv"))
            q, k, v = (part.flatten(2).mT[:, None] for part in qkv.chunk(3, dim=1))
            y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(frames.shape)
            return F.conv2d(y, *self._parameters(f"{name}.proj"))

        return x + self._per_frame(attend, self._norm(f"{name}.norm", x))

    def _middle(self, past, half, x):
        x = self._residual(past, f"{half}.middle.0", x)
        x = self._attention(f"{half}.middle.1", x)
        return self._residual(past, f"{half}.middle.2", x)

    def _head(self, past, half, x):
        return self._causal(past, f"{half}.head.2", F.silu(self._norm(f"{half}.head.0", x)))

    def _halve(self, past, name, x, temporal):
        weight, bias = self._parameters(f"{name}.resample.1")
        x = self._per_frame(lambda y: F.conv2d(F.pad(y, (0, 1, 0, 1)), weight, bias, stride=2), x)
        if not temporal:
            return x
        before, past[name] = past.get(name), x[:, :, -1:]
        first = x[:, :, :1] if before is None else x[:, :, :0]
        window = x if before is None else torch.cat([before, x], dim=2)
        if window.shape[2] < 3:
            return first
        later = F.conv3d(window, *self._parameters(f"{name}.time_conv"), stride=(2, 1, 1))
        return torch.cat([first, later], dim=2)

    def _double(self, past, name, x, temporal):
        if temporal:
            passed = x[:, :, : 0 if name in past else 1]
            window = self._remember(past, name, x[:, :, passed.shape[2] :])
            x = passed
            if window.shape[2] > 2:
                pairs = F.conv3d(window, *self._parameters(f"{name}.time_conv"))
                pairs = pairs.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
                x = torch.cat([passed, pairs], dim=2)
        weight, bias = self._parameters(f"{name}.resample.1")
        return self._per_frame(
            lambda y: F.conv2d(F.interpolate(y, scale_factor=2.0), weight, bias, padding=1), x
        )

    def _blocks(self, past, names, plan: tuple[BlockSpec, ...], x):
        for i, spec in enumerate(plan):
            name = f"{names}.{i}"
            if spec.kind == "residual":
                x = self._residual(past, name, x)
            else:
                resample = {"halve": self._halve, "double": self._double}[spec.kind]
                x = resample(past, name, x, spec.temporal)
        return x

    @torch.no_grad()
    def encode_chunk(self, past: dict, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Normalised latent (B,C,F,h,w) float32 of the next frames, in [-1, 1]; updates `past`."""
        x = self._causal(past, "encoder.conv1", video_BCTHW.to(self.dtype))
        x = self._blocks(past, "encoder.downsamples", encoder_plan(self.config), x)
        x = self._head(past, "encoder", self._middle(past, "encoder", x))
        mean = F.conv3d(x, *self._parameters("conv1"))[:, : self.config.z_dim].float()
        return (mean - self.mean) / self.std

    @torch.no_grad()
    def decode_chunk(self, past: dict, latent_BCFhw: torch.Tensor) -> torch.Tensor:
        """Video (B,3,T,H,W) float32 of the next latent frames; updates `past`."""
        z = (latent_BCFhw * self.std + self.mean).to(self.dtype)
        x = self._causal(past, "decoder.conv1", F.conv3d(z, *self._parameters("conv2")))
        x = self._middle(past, "decoder", x)
        x = self._blocks(past, "decoder.upsamples", decoder_plan(self.config), x)
        return self._head(past, "decoder", x).float()


def over_chunks(step, x_BCT: torch.Tensor, latents_per_call: int, stride: int) -> torch.Tensor:
    """A whole clip in the pieces that `lact_jax.models.vae.over_chunks` cuts it into."""
    size = latents_per_call * stride
    first = x_BCT.shape[2] - (x_BCT.shape[2] - 1) // size * size
    past = {}
    pieces = [x_BCT[:, :, :first], *x_BCT[:, :, first:].split(size, dim=2)]
    return torch.cat([step(past, piece) for piece in pieces if piece.shape[2]], dim=2)


def codec(
    state: dict[str, np.ndarray], config: VAEConfig, latents_per_call: int, compiled: bool
) -> tuple[Callable[[np.ndarray], Callable], Callable[[np.ndarray], Callable]]:
    """Encode and decode between uint8 frames and latents, both (B, T, H, W, C) as ours are.

    Each takes its input once, onto the device, and returns a function of no arguments that does the
    work, waits for the device and returns the result there, (B, C, T, H, W).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    vae = TorchVAE({name: torch.tensor(x) for name, x in state.items()}, config, device)
    wrap = torch.compile if compiled else (lambda step: step)

    def encode_uint8(past, frames):
        return vae.encode_chunk(past, frames.float() / 127.5 - 1)

    def decode_uint8(past, latent):
        video = vae.decode_chunk(past, latent).clamp(-1, 1)
        return ((video + 1) * 127.5).round().to(torch.uint8)

    def prepare(step, stride, x_BTHWC):
        x_BCTHW = torch.tensor(np.moveaxis(x_BTHWC, -1, 1)).to(device)

        def call():
            result = over_chunks(step, x_BCTHW, latents_per_call, stride)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    return (
        partial(prepare, wrap(encode_uint8), TEMPORAL_STRIDE),
        partial(prepare, wrap(decode_uint8), 1),
    )


def peak_gigabytes() -> float | None:
    """Peak of PyTorch's memory on the GPU in GB, None without one."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
