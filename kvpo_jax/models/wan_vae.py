"""The Wan VAE: pixels to normalised latents and back, frame by frame in time, as pure functions of its parameters.

Pixels are float[n, frames, height, width, 3] in [-1, 1], latents float[n, T, Y, X, C], normalised by the published
statistics. Pixel frame 0 is one latent frame and every further latent frame stands for four, at an eighth of the side.

Everything is causal in time, and each temporal convolution remembers the last frames that it read. That memory is the
flax collection `cache`, a dict of arrays with a leading batch axis that the steps take and return, so a stream can be
forked by repeating its cache. The first frame of a stream passes no temporal resampling and is no history of it, which
is why it has a step of its own. With the zeros that it leaves there, the second frame is a step like all the others.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.models.layers import attention
from kvpo_jax.types import Array, PyTree

# Statistics of the latents of Wan2.1's VAE, per channel.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan VAE; the defaults are Wan2.1's.

    Attributes:
      base_dim: channels of the encoder's first convolution.
      z_dim: C, channels of the latent.
      dim_mult: channels of each stage of the encoder, in base_dims; the decoder's are the same from the end.
      num_res_blocks: residual blocks per stage of the encoder; the decoder has one more.
      temporal_downsample: for each stage but the last, whether its downsampling halves time as well as space.
      latent_mean: of each latent channel, subtracted by `encode`.
      latent_std: of each latent channel, divided by.
      dtype: of weights, products and the cache.

    Raises:
      ValueError: if the lengths do not agree.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    dtype: str = "bfloat16"

    def __post_init__(self):
        stages = len(self.dim_mult)
        lengths = {"temporal_downsample": stages - 1, "latent_mean": self.z_dim, "latent_std": self.z_dim}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; a VAE of {stages} stages and z_dim {self.z_dim} needs {length}"
                )
        for name in ("dim_mult", *lengths):  # lists, as JSON has them, would not hash
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def time_stride(self) -> int:
        """Pixel frames per latent frame, but for the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_stride(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** len(self.temporal_downsample)


def _conv2d(cfg: VAEConfig, features: int, size: int, name: str, **kwargs) -> nn.Conv:
    """A convolution of every frame by itself."""
    return nn.Conv(features, (size, size), dtype=cfg.dtype, param_dtype=cfg.dtype, name=name, **kwargs)


class CausalConv(nn.Module):
    """A 3-D convolution that sees, of time, only this call's frames and the end of the last call's.

    Attributes:
      cfg: VAEConfig.
      features: output channels.
      kernel: (frames, height, width); space is zero-padded to keep its size.
      stride: in time.
    """

    cfg: VAEConfig
    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[n, t, y, x, c] -> float[n, t / stride, y, x, features]."""
        dtype = jnp.dtype(self.cfg.dtype)
        history = self.kernel[0] - self.stride
        x = x.astype(dtype)
        if history:
            past = self.variable("cache", "past", jnp.zeros, (x.shape[0], history, *x.shape[2:]), dtype)
            x = jnp.concatenate([past.value, x], axis=1)
            past.value = x[:, -history:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.kernel, x.shape[-1], self.features), dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(dtype),
            window_strides=(self.stride, 1, 1),
            padding=[(0, 0), *((size // 2, size // 2) for size in self.kernel[1:])],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return y + bias.astype(dtype)


class L2Norm(nn.Module):
    """Divides by the root mean square over channels, as sqrt(c) x / |x| in float32, and scales by gamma."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), x.dtype)
        y = x.astype(jnp.float32)
        y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return (y * x.shape[-1] ** 0.5 * gamma.astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Two normed and activated convolutions beside a shortcut."""

    cfg: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, features = self.cfg, self.features
        y = CausalConv(cfg, features, name="residual_2")(nn.silu(L2Norm(name="residual_0")(x)))
        y = CausalConv(cfg, features, name="residual_6")(nn.silu(L2Norm(name="residual_3")(y)))
        return y + (x if x.shape[-1] == features else CausalConv(cfg, features, (1, 1, 1), name="shortcut")(x))


class AttentionBlock(nn.Module):
    """Self-attention among the pixels of each frame, with one head."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        qkv = _conv2d(self.cfg, 3 * channels, 1, "to_qkv")(L2Norm(name="norm")(x))
        q, k, v = einops.rearrange(qkv, "n t y x (three c) -> three (n t) (y x) 1 c", three=3)
        y = attention(q, k, v).reshape(x.shape)
        return x + _conv2d(self.cfg, channels, 1, "proj")(y)


class Downsample(nn.Module):
    """Halves the sides, then, if `temporal`, the frames."""

    cfg: VAEConfig
    features: int
    temporal: bool

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        x = _conv2d(self.cfg, self.features, 3, "resample_1", strides=2, padding=((0, 1), (0, 1)))(x)
        if self.temporal:
            y = CausalConv(self.cfg, self.features, (3, 1, 1), stride=2, name="time_conv")(x)
            x = x if first else y  # the first frame is history, but has too little of its own: y is empty
        return x


class Upsample(nn.Module):
    """Doubles the frames, if `temporal`, then the sides."""

    cfg: VAEConfig
    features: int
    temporal: bool

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        if self.temporal:
            # Shown no frame, the convolution starts its cache with zeros: the first frame is no history.
            shown = x[:, :0] if first else x
            y = CausalConv(self.cfg, 2 * x.shape[-1], (3, 1, 1), name="time_conv")(shown)
            x = x if first else einops.rearrange(y, "n t y x (two c) -> n (t two) y x c", two=2)
        x = einops.repeat(x, "n t y x c -> n t (y 2) (x 2) c")
        return _conv2d(self.cfg, self.features, 3, "resample_1")(x)


class Middle(nn.Module):
    """Residual block, attention, residual block: part of `Encoder` and `Decoder`, whose names they have."""


class Encoder(nn.Module):
    """float[n, frames, height, width, 3] -> float[n, t, Y, X, 2 C], mean and log-variance before the last 1x1x1."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        cfg = self.cfg
        x = CausalConv(cfg, cfg.base_dim, name="conv1")(x)
        for i, (layer, features) in enumerate(encoder_layers(cfg)):
            x = _resampling_layer(cfg, layer, features, f"downsamples_{i}", x, first)
        x = _middle(cfg, x)
        return CausalConv(cfg, 2 * cfg.z_dim, name="head_2")(nn.silu(L2Norm(name="head_0")(x)))
