"""The Wan2.1 video VAE: pixels to latents, and latents back to pixels frame by frame.

Every temporal convolution is causal and remembers its last two input frames. These memories are the
collection `cache`, an ordinary pytree with the batch as leading axis: a prefix can be decoded once,
and its cache can be repeated for every branch that continues it. Latent frame 0 is one pixel frame;
every other latent frame is four.

    pixels, cache = decode(cfg, params, first_latents)
    pixels, cache = decode(cfg, params, next_latents, cache)

A decoder whose pixels are read here and there need not run in between: `depths` says how far it has
to, and `decode` does no more.

Pixels are in [-1, 1], latents are normalised per channel. The arithmetic is that of Wan2.1.

The rows of a frame can lie over devices: inside `shard_map`, `decode` is told of `SplitRows`. Each
device then decodes its rows, and remembers their past. A convolution asks the neighbours for the
row beyond either end, the attention asks all for their keys and values. Nothing is computed twice.

A run only decodes and loads `abstract_decoder_params`. A converted file holds the encoder too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import Registry, UsageError
from kvpo_jax.models import layers
from kvpo_jax.models.layers import wide
from kvpo_jax.types import Array, PyTree, SplitRows

# Mean and standard deviation of each channel of Wan2.1's latents.
LATENT_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
LATENT_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)
MEMORY = 2  # input frames that a temporal convolution of three taps remembers
# The dtypes of the decoder's weights and activations; the release's is bfloat16.
DTYPES: Registry[Any] = Registry("decoder.dtype", dict(layers.DTYPES))
ENCODER = ("encoder", "conv1")  # the branches of `abstract_params` that only `encode` needs


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
      base_dim: channels at full resolution.
      z_dim: latent channels, C.
      dim_mult: channels of each stage divided by base_dim, from full resolution down; every stage
        but the last halves height and width.
      num_res_blocks: residual blocks per stage of the encoder; the decoder has one more.
      temporal_downsample: which of the halvings halve time too.
      latent_mean: mean of each latent channel.
      latent_std: standard deviation of each latent channel.
      dtype: dtype of weights and activations; norms and the latent statistics are float32.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    dtype: str = "float32"

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def stages(self) -> int:
        """Stages of the decoder, from the lowest resolution up."""
        return len(self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return 2 ** len(self.temporal_downsample)


def _with_neighbours(x: Array, rows: SplitRows) -> Array:
    """float[..., h, w, c] -> float[..., h + 2, w, c]: rows of a frame with the row beyond each end.

    Beyond the frame they are 0, as a convolution pads it.
    """
    h, last = x.shape[-3], rows.devices - 1
    if rows.padded > rows.count:  # The last devices have rows that the frame has not.
        number = jax.lax.axis_index(rows.axis) * h + jnp.arange(h)
        inside = number < rows.count * (h // rows.of_device)
        x = jnp.where(inside[:, None, None], x, 0)
    before = jax.lax.ppermute(x[..., -1:, :, :], rows.axis, [(i, i + 1) for i in range(last)])
    after = jax.lax.ppermute(x[..., :1, :, :], rows.axis, [(i + 1, i) for i in range(last)])
    return jnp.concatenate([before, x, after], axis=-3)


def _conv(cfg: VAEConfig, features: int, kernel: tuple[int, ...], **options: Any) -> nn.Conv:
    dtype = jnp.dtype(cfg.dtype)
    return nn.Conv(features, kernel, dtype=dtype, param_dtype=dtype, **options)


class CausalConv(nn.Module):
    """A 3-D convolution whose taps in time reach back; before the first frame all is zero."""

    cfg: VAEConfig
    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    rows: SplitRows | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[n, t, h, w, c] -> float[n, t, h, w, features]."""
        cfg, (taps, *space) = self.cfg, self.kernel
        kernel_init = nn.initializers.lecun_normal()
        kernel = self.param(
            "kernel", kernel_init, (*self.kernel, x.shape[-1], self.features), jnp.dtype(cfg.dtype)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.dtype(cfg.dtype))
        if taps > 1:
            n, t, *rest = x.shape
            past = self.variable("cache", "past", lambda: jnp.zeros((n, MEMORY, *rest), x.dtype))
            x = jnp.concatenate([past.value, x], axis=1)
            past.value = x[:, -MEMORY:]
            if not t:
                return jnp.zeros((n, 0, *rest[:-1], self.features), x.dtype)
        padding = [(0, 0), *((k // 2, k // 2) for k in space)]
        if self.rows and space[0] > 1:
            x, padding[1] = _with_neighbours(x, self.rows), (0, 0)
        numbers = ("NTHWC", "THWIO", "NTHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), padding, dimension_numbers=numbers)
        return y + bias


class Norm(nn.Module):
    """Scales each channel vector to length sqrt(channels), then by gamma; in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), x.dtype)
        y = wide(x)
        y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
        return (y * x.shape[-1] ** 0.5).astype(x.dtype) * gamma


class Residual(nn.Module):
    """Two causal convolutions beside a shortcut."""

    cfg: VAEConfig
    features: int
    rows: SplitRows | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(CausalConv, self.cfg, self.features, rows=self.rows)
        y = conv(name="residual_2")(nn.silu(Norm(name="residual_0")(x)))
        y = conv(name="residual_6")(nn.silu(Norm(name="residual_3")(y)))
        return y + (x if x.shape[-1] == self.features else conv((1, 1, 1), name="shortcut")(x))


class Attention(nn.Module):
    """One head over the pixels of each frame."""

    cfg: VAEConfig
    rows: SplitRows | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, t, h, w, c = x.shape
        y = Norm(name="norm")(x).reshape(n * t, h, w, c)
        qkv = _conv(self.cfg, 3 * c, (1, 1), name="to_qkv")(y).reshape(n * t, h * w, 3 * c)
        q, k, v = (y[:, :, None] for y in jnp.split(qkv, 3, axis=-1))
        if self.rows:
            k, v = jax.lax.all_gather((k, v), self.rows.axis, axis=1, tiled=True)
            k, v = k[:, : self.rows.count * w], v[:, : self.rows.count * w]
        y = jax.nn.dot_product_attention(q, k, v)[:, :, 0].reshape(n * t, h, w, c)
        return x + _conv(self.cfg, c, (1, 1), name="proj")(y).reshape(x.shape)


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` the frames after the first."""

    cfg: VAEConfig
    temporal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, _, _, _, c = x.shape
        conv = _conv(self.cfg, c, (3, 3), strides=2, padding=[(0, 1), (0, 1)], name="resample_1")
        x = conv(einops.rearrange(x, "n t h w c -> (n t) h w c"))
        x = einops.rearrange(x, "(n t) ... -> n t ...", n=n)
        if not self.temporal:
            return x
        conv = _conv(self.cfg, c, (3, 1, 1), strides=(2, 1, 1), padding="VALID", name="time_conv")
        if x.shape[1] < 3:  # A single frame: call the convolution only to make its parameters.
            x = jnp.concatenate([x[:, :1]] * 3, axis=1)
            return jnp.concatenate([x[:, :1], conv(x)[:, :0]], axis=1)
        return jnp.concatenate([x[:, :1], conv(x)], axis=1)


class Upsample(nn.Module):
    """Doubles height and width, and with `temporal` the frames after the first."""

    cfg: VAEConfig
    features: int
    temporal: bool
    rows: SplitRows | None = None

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        """float[n, t, h, w, c] -> float[n, t', 2 h, 2 w, features].

        `first` says that x begins with the first frame of the video. That frame is not doubled, and
        no later frame sees it as its past.
        """
        n, _, _, _, c = x.shape
        if self.temporal:
            alone, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            x = CausalConv(self.cfg, 2 * c, (3, 1, 1), name="time_conv")(x)
            x = einops.rearrange(x, "n t h w (two c) -> n (t two) h w c", two=2)
            x = jnp.concatenate([alone, x], axis=1)
        x = einops.rearrange(x, "n t h w c -> (n t) h w c").repeat(2, axis=1).repeat(2, axis=2)
        padding = [(1, 1), (1, 1)]
        if self.rows:
            x, padding[0] = _with_neighbours(x, self.rows), (0, 0)
        x = _conv(self.cfg, self.features, (3, 3), padding=padding, name="resample_1")(x)
        return einops.rearrange(x, "(n t) ... -> n t ...", n=n)


class Encoder(nn.Module):
    """Pixels to mean and log variance of the latent."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[n, frames, h, w, 3] -> float[n, t, Y, X, 2 C]."""
        cfg, index = self.cfg, 0
        x = CausalConv(cfg, cfg.base_dim, name="conv1")(x)
        for stage, mult in enumerate(cfg.dim_mult):
            for _ in range(cfg.num_res_blocks):
                x = Residual(cfg, mult * cfg.base_dim, name=f"downsamples_{index}")(x)
                index += 1
            if stage < len(cfg.temporal_downsample):
                x = Downsample(cfg, cfg.temporal_downsample[stage], name=f"downsamples_{index}")(x)
                index += 1
        x = _middle(cfg, x)
        return CausalConv(cfg, 2 * cfg.z_dim, name="head_2")(nn.silu(Norm(name="head_0")(x)))


class Decoder(nn.Module):
    """Latents to pixels."""

    cfg: VAEConfig
    rows: SplitRows | None = None

    @nn.compact
    def __call__(self, x: Array, first: bool, stages: Sequence[int]) -> Array:
        """What these stages make of x; `first` as in `Upsample`.

        All of them make pixels float[n, frames, h, w, 3] of float[n, t, Y, X, C].
        """
        cfg, rows = self.cfg, self.rows
        for stage in stages:
            width, index = cfg.dim_mult[::-1][stage] * cfg.base_dim, stage * (_convs(cfg) // 2 + 1)
            if stage == 0:
                x = _middle(cfg, CausalConv(cfg, width, rows=rows, name="conv1")(x), rows)
            for _ in range(_convs(cfg) // 2):
                x = Residual(cfg, width, rows, name=f"upsamples_{index}")(x)
                index += 1
            if stage < cfg.stages - 1:
                temporal = cfg.temporal_downsample[::-1][stage]
                x = Upsample(cfg, width // 2, temporal, rows, name=f"upsamples_{index}")(x, first)
            else:
                head = CausalConv(cfg, 3, rows=rows, name="head_2")
                x = head(nn.silu(Norm(name="head_0")(x)))
        return x


def _convs(cfg: VAEConfig) -> int:
    """Temporal convolutions in the residual blocks of a stage of the decoder, two in each."""
    return 2 * (cfg.num_res_blocks + 1)


def _middle(cfg: VAEConfig, x: Array, rows: SplitRows | None = None) -> Array:
    """The blocks at the lowest resolution, which encoder and decoder both have."""
    x = Residual(cfg, x.shape[-1], rows, name="middle_0")(x)
    x = Attention(cfg, rows, name="middle_1")(x)
    return Residual(cfg, x.shape[-1], rows, name="middle_2")(x)


class WanVAE(nn.Module):
    """Encoder and decoder, with the 1x1 convolutions around the latent.

    Attributes:
      cfg: sizes.
      rows: those that are decoded, if they lie over devices.
    """

    cfg: VAEConfig
    rows: SplitRows | None = None

    def setup(self):
        cfg = self.cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg, self.rows)
        self.conv1 = CausalConv(cfg, 2 * cfg.z_dim, (1, 1, 1))
        self.conv2 = CausalConv(cfg, cfg.z_dim, (1, 1, 1))

    def encode(self, pixels: Array) -> Array:
        """Pixels to the mean of the latent, before it is normalised."""
        return jnp.split(self.conv1(self.encoder(pixels)), 2, axis=-1)[0]

    def decode(self, x: Array, first: bool, stages: Sequence[int] | None = None) -> Array:
        """Latents that are not normalised to pixels, or what some stages make; see `Decoder`."""
        stages = range(self.cfg.stages) if stages is None else stages
        return self.decoder(self.conv2(x) if 0 in stages else x, first, stages)

    def touch_all(self, pixels: Array) -> Array:
        """Encoder and decoder in one call, so that `init` makes every variable."""
        return self.decode(self.encode(pixels), True)


def abstract_params(cfg: VAEConfig) -> PyTree:
    """Shapes and dtypes of all parameters: the tree that a converted file holds."""
    side = cfg.spatial_factor
    pixels = jax.ShapeDtypeStruct((1, 1, side, side, 3), cfg.dtype)
    init = partial(WanVAE(cfg).init, method="touch_all")
    return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


def abstract_decoder_params(cfg: VAEConfig) -> PyTree:
    """Shapes and dtypes of the parameters that `decode` needs: `abstract_params` but ENCODER."""
    return {name: x for name, x in abstract_params(cfg).items() if name not in ENCODER}


def _statistics(cfg: VAEConfig) -> tuple[Array, Array]:
    """Mean and standard deviation of the latent channels, float32[C]."""
    return jnp.asarray(cfg.latent_mean, jnp.float32), jnp.asarray(cfg.latent_std, jnp.float32)


def encode(cfg: VAEConfig, params: PyTree, pixels: Array) -> Array:
    """Pixels to normalised latents.

    Args:
      cfg: sizes.
      params: see `abstract_params`.
      pixels: float[n, 1 + 4 (t - 1), 8 Y, 8 X, 3] in [-1, 1].

    Returns:
      float32[n, t, Y, X, C].

    Raises:
      UsageError: the number of frames is not 1 + 4 (t - 1), or a side is not a multiple of 8.
    """
    chex.assert_shape(pixels, (None, None, None, None, 3))
    (_, frames, height, width, _), side = pixels.shape, cfg.spatial_factor
    if (frames - 1) % cfg.temporal_factor or height % side or width % side:
        raise UsageError(
            f"a video of {frames} frames, {height}x{width}: expected 1 + {cfg.temporal_factor} k"
            f" frames and multiples of {side} pixels"
        )
    mean, std = _statistics(cfg)
    apply = partial(WanVAE(cfg).apply, {"params": params}, method="encode", mutable=["cache"])
    return (apply(pixels.astype(cfg.dtype))[0].astype(jnp.float32) - mean) / std


def first_latents(cfg: VAEConfig, frame: int) -> list[int]:
    """The latent frame from which on each stage of the decoder has to run for a pixel frame.

    A temporal convolution reads two frames before its own, at the rate of its stage. The decoder of
    Wan2.1 has these, from the pixels down, with r frames per latent frame:

        stage 3, r = 4: head, 6 in residual blocks       14 frames =  3.5 latents,  3.5 in all
        stage 2, r = 4: 6 in residual blocks             12 frames =  3 latents,    6.5
        stage 1, r = 2: upsampling, 6 in residual blocks 14 frames =  7 latents,   13.5
        stage 0, r = 1: upsampling, 6 in residual blocks,
                        4 in the middle, conv1           24 latents,               37.5

    A stage that begins to run remembers frames that are out of date. Its first convolution is right
    from the third frame on, the next one two frames later, and so on: after as many frames as the
    table has it is what it would be had it always run, to the last bit. A stage starts before a
    read frame by the last column. Stages 2 and 3 are 78 % of the work.

    Returns:
      For each stage, the lowest resolution first.
    """
    rate, firsts = cfg.temporal_factor, []
    for stage in reversed(range(cfg.stages)):
        convs = _convs(cfg) + (5 if stage == 0 else 0)
        if stage == cfg.stages - 1:
            convs += 1  # the head
        elif cfg.temporal_downsample[::-1][stage]:
            convs += 1  # the upsampling's, before it doubles the frames but the first
            frame, rate = -(-frame // 2), rate // 2
        frame = max(frame - MEMORY * convs, 0)
        firsts.append(-(-frame // rate))
    return firsts[::-1]


def depths(cfg: VAEConfig, windows: Sequence[tuple[int, int]], latents: int) -> np.ndarray:
    """How many stages of the decoder each latent frame passes if some pixel frames are read.

    Args:
      cfg: sizes.
      windows: the pixel frames [start, end) that are read.
      latents: latent frames of the video.

    Returns:
      int32[latents], for `decode`.
    """
    depth = np.zeros(latents, np.int32)
    for start, end in windows:
        after = -(-(end - 1) // cfg.temporal_factor) + 1  # behind the latent frame of the last
        for stage, first in enumerate(first_latents(cfg, start)):
            depth[first:after] = np.maximum(depth[first:after], stage + 1)
    return depth


def decode(
    cfg: VAEConfig,
    params: PyTree,
    latents: Array,
    cache: PyTree | None = None,
    depth: Array | None = None,
    rows: SplitRows | None = None,
) -> tuple[Array, PyTree]:
    """Decodes the next latent frames of n videos.

    It works on one latent frame at a time, so that its activations are those of four pixel frames,
    whatever the length. The program that skips a stage is the one that runs it, so that it serves
    every `depth`, and its pixels are the same to the last bit.

    Args:
      cfg: sizes.
      params: see `abstract_decoder_params`; the encoder may be there too.
      latents: float[n, t, Y, X, C], normalised.
      cache: what the previous call returned, every leaf with n first; None at the beginning.
      depth: int32[t], how many stages each latent frame passes, see `depths`; the first of a video
        passes all. None runs all.
      rows: inside `shard_map`, how a frame lies over devices. Latents, pixels and cache are then
        those of the rows of a device; see `SplitRows`. None: of all rows.

    Returns:
      pixels float32[n, 4 t, 8 Y, 8 X, 3] in [-1, 1] (4 t - 3 frames at the beginning), and cache.
      Of a latent frame that does not pass all stages the pixels are 0.
    """
    depth = jnp.full(latents.shape[1], cfg.stages) if depth is None else depth
    chex.assert_shape(depth, latents.shape[1:2])
    chex.assert_shape(latents, (None, None, None, None, cfg.z_dim))
    mean, std = _statistics(cfg)
    latents = (latents.astype(jnp.float32) * std + mean).astype(cfg.dtype)

    def run(stage: int, x: Array, cache: PyTree | None) -> tuple[Array, PyTree]:
        variables = {"params": params} if cache is None else {"params": params, "cache": cache}
        apply = partial(WanVAE(cfg, rows).apply, method="decode", mutable=["cache"])
        x, state = apply(variables, x, cache is None, (stage,))
        return x, state["cache"]

    def skip(like: Array, x: Array, cache: PyTree) -> tuple[Array, PyTree]:
        return jax.lax.full_like(x, 0, like.dtype, like.shape), cache

    def step(caches: PyTree, frame: tuple[Array, Array]) -> tuple[PyTree, Array]:
        x, depth = frame
        x, after = x[:, None], []
        for stage, cache in enumerate(caches):
            like, _ = jax.eval_shape(partial(run, stage), x, cache)
            x, cache = jax.lax.cond(
                depth > stage, partial(run, stage), partial(skip, like), x, cache
            )
            after.append(cache)
        return after, to_pixels(x)

    def to_pixels(x: Array) -> Array:
        return jnp.clip(x.astype(jnp.float32), -1, 1)

    pixels = []
    if cache is None:
        x, cache = latents[:, :1], []
        for stage in range(cfg.stages):
            x, own = run(stage, x, None)
            cache.append(own)
        pixels, latents, depth = [to_pixels(x)], latents[:, 1:], depth[1:]
    if latents.shape[1]:
        frames = jnp.moveaxis(latents, 1, 0), depth
        cache, rest = jax.lax.scan(step, cache, frames)
        pixels.append(einops.rearrange(rest, "s n t ... -> n (s t) ..."))
    return jnp.concatenate(pixels, axis=1), cache
