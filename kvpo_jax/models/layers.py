"""What several networks are made of: LoRA Linear, norms, rotary tables, a loop over layers.

The arithmetic follows Wan2.1. Norms, softmax and modulation are computed in float32, products in
the model's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kvpo_jax.errors import Registry
from kvpo_jax.types import Array

T = TypeVar("T")

ROPE_THETA = 10000.0
# Length of Wan's rotary table. It is clamped: later frames would share the last position. Positions
# within the window (`kv_cache.positions`) never come near it.
MAX_FRAMES = 1024
# The dtypes of activations and base weights.
DTYPES: Registry[Any] = Registry("model.dtype", {"float32": jnp.float32, "bfloat16": jnp.bfloat16})


def wide(x: Array) -> Array:
    """x in float32 at least.

    float64 stays float64, so that a test can compare a gradient with finite differences.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def exact(function: Callable[..., T]) -> Callable[..., T]:
    """`function` for `jax.jit`, its float32 products in float32.

    A GPU would round their factors to TF32's 10 bits, where an update of the weights by a
    thousandth loses a third of its effect. Products of bfloat16 are not touched.
    """

    @functools.wraps(function)
    def traced(*arguments, **options):
        with jax.default_matmul_precision("highest"):
            return function(*arguments, **options)

    return traced


def config_from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The config that a converted file notes: `dataclasses.asdict`, perhaps read back from JSON.

    Args:
      kind: a dataclass of numbers, strings, tuples of them and other such dataclasses.
      values: its fields.

    Raises:
      TypeError: a field is missing, is none of these, or is of another type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{values!r} has no fields")
    types = typing.get_type_hints(kind)

    def field(name: str, value: Any) -> Any:
        if name not in types:
            raise TypeError(f"there is no field {name!r}")
        number = float | int if types[name] is float else types[name]
        if types[name] in (int, float, str) and not isinstance(value, number):
            raise TypeError(f"{name}={value!r} is no {types[name].__name__}")
        if dataclasses.is_dataclass(types[name]):
            return config_from_dict(types[name], value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: field(name, value) for name, value in values.items()})


def padded_length(tokens: int) -> int:
    """The length to pad a text of so many tokens to.

    It is a multiple of 64, so that texts of all lengths need few compiled shapes.
    """
    return -(-tokens // 64) * 64


def over_layers(layer: Any, layers: int, in_axes: Any = nn.broadcast) -> Callable[..., Any]:
    """The class `layer` as a loop over so many layers.

    Its parameters get a leading axis, the layers. `in_axes` says how each argument but the first
    is split over them, as in `nn.scan`; `nn.broadcast` gives all of them to every layer.
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "lora": True},
        length=layers,
        in_axes=in_axes,
    )


# ---------------------------------------------------------------- LoRA


@jax.custom_vjp
def _folded(x: Array, kernel: Array, a: Array, b: Array) -> Array:
    """x (W + A B) of matrices, in one product."""
    return x @ (kernel + a @ b)


def _folded_forward(x: Array, kernel: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    return _folded(x, kernel, a, b), (x, kernel, a, b)


def _folded_backward(residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, ...]:
    """The gradients; those of A and B cost products of their rank only.

    They do not need the gradient of W, which XLA drops since W is frozen.
    """
    x, kernel, a, b = residuals
    # The barriers keep XLA's CPU backend from moving the transposes to the wide operands, at
    # several times the cost.
    fixed = jax.lax.optimization_barrier
    low, d_low = fixed(x @ a), fixed(d_y @ b.T)
    return d_y @ (kernel + a @ b).T, x.T @ d_y, fixed(d_low.T @ x).T, low.T @ d_y


_folded.defvjp(_folded_forward, _folded_backward)


class LoRADense(nn.Module):
    """A Linear with a low-rank update in its own collection: y = x W + b + (alpha / rank) (x A) B.

    W and b are in the collection `params`; A float32[in, rank] and B float32[rank, features] are in
    `lora`. B starts at zero, so that a fresh adapter changes nothing. rank 0 has no adapter. In
    float32, many rows go through x (W + (alpha / rank) A B) + b, which is less work; half precision
    would round small updates away.

    Attributes:
      features: output width.
      rank: r of LoRA; 0 is a plain Linear.
      alpha: numerator of the LoRA scale.
      dtype: dtype of W, b and the products.
    """

    features: int
    rank: int = 0
    alpha: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[..., in] -> float[..., features]."""
        fan_in = x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (fan_in, self.features), self.dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        # Flattened to a matrix: with more axes, XLA's CPU backend transposes the operands of LoRA's
        # gradients.
        leading, x = x.shape[:-1], x.astype(self.dtype).reshape(-1, fan_in)
        kernel = kernel.astype(self.dtype)
        if self.rank:
            # peft's initialisation: A uniform in +-1/sqrt(in), B zero.
            uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            lora_a = self.variable(
                "lora",
                "a",
                lambda: uniform(self.make_rng("lora"), (fan_in, self.rank), jnp.float32),
            )
            lora_b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features), jnp.float32)
            a = lora_a.value.astype(self.dtype)
            b = (self.alpha / self.rank * lora_b.value).astype(self.dtype)
            single = jnp.finfo(self.dtype).bits >= 32
            # Form W + A B only if that saves at least twice what it costs, i.e. for enough rows.
            if single and len(x) * (fan_in + self.features) > 2 * fan_in * self.features:
                y = _folded(x, kernel, a, b)
            else:
                y = x @ kernel + checkpoint_name(x @ a, "linear") @ b
        else:
            y = x @ kernel
        y = checkpoint_name(y + bias.astype(self.dtype), "linear")
        return y.reshape(*leading, self.features)


# ---------------------------------------------------------------- norms


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm over the last axis without parameters, in float32."""
    x = wide(x)
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """RMS norm over the whole last axis (Wan normalises queries and keys before the head split)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[..., dim] -> float[..., dim], in float32 within."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


# ---------------------------------------------------------------- sines and cosines


def sinusoid(t: Array, width: int) -> Array:
    """float32[..., width]: [cos | sin] of t 10000^(-i / half).

    The frequencies are made in float64 and rounded once.
    """
    frequency = ROPE_THETA ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    angle = t.astype(jnp.float32)[..., None] * frequency.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _axis_angles(positions: int, pairs: int) -> np.ndarray:
    """float64[positions, pairs]: the rotary angles of one axis with 2 * pairs channels."""
    frequency = ROPE_THETA ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    return np.arange(positions, dtype=np.float64)[:, None] * frequency[None, :]


def rope_table(
    start_frame: Array, frames: int, height: int, width: int, head_dim: int
) -> tuple[Array, Array]:
    """cos and sin of the rotary angles of tokens ordered (frame, y, x).

    The channel pairs of a head are split into frame, y and x parts: c - 2 (c // 3), c // 3 and
    c // 3 of c pairs. The angles are made in float64 on the host.

    Args:
      start_frame: int32[batch], absolute index of the first frame.
      frames: number of frames.
      height: patches per column.
      width: patches per row.
      head_dim: channels of a head.

    Returns:
      two arrays float32[batch, frames * height * width, head_dim / 2].
    """
    chex.assert_rank(start_frame, 1)
    pairs = head_dim // 2
    spatial = pairs // 3
    time = _axis_angles(MAX_FRAMES, pairs - 2 * spatial)
    y, x = _axis_angles(height, spatial), _axis_angles(width, spatial)
    grid = (height, width, spatial)
    yx = np.concatenate(
        [np.broadcast_to(y[:, None], grid), np.broadcast_to(x[None], grid)], axis=-1
    ).reshape(height * width, 2 * spatial)
    frame = start_frame[:, None] + jnp.arange(frames)

    def table(function: Callable[[np.ndarray], np.ndarray]) -> Array:
        per_frame = jnp.asarray(function(time), jnp.float32)[frame]  # [batch, frames, pairs]
        per_token = jnp.asarray(function(yx), jnp.float32)  # [tokens of a frame, pairs]
        batch = (start_frame.shape[0], frames, height * width)
        both = [
            jnp.broadcast_to(per_frame[:, :, None], (*batch, per_frame.shape[-1])),
            jnp.broadcast_to(per_token[None, None], (*batch, per_token.shape[-1])),
        ]
        return jnp.concatenate(both, axis=-1).reshape(batch[0], -1, pairs)

    return table(np.cos), table(np.sin)


def rope_of_past(positions: Array, block: tuple[Array, Array], tokens: int) -> tuple[Array, Array]:
    """cos and sin for all tokens of single frames, two arrays float32[batch, A * N, D / 2].

    Args:
      positions: int32[batch, A].
      block: the tables of the block, from `rope_table`, which have the places in a frame.
      tokens: N.
    """
    pairs = block[0].shape[-1]
    batch, frames = positions.shape
    time = jnp.arange(pairs) < pairs - 2 * (pairs // 3)
    turned = rope_table(positions.reshape(-1), 1, 1, 1, 2 * pairs)

    def table(of_time: Array, of_block: Array) -> Array:
        of_time = of_time.reshape(batch, frames, 1, pairs)
        both = jnp.where(time, of_time, of_block[:, None, :tokens])
        return both.reshape(batch, frames * tokens, pairs)

    cos, sin = (table(*parts) for parts in zip(turned, block, strict=True))
    return cos, sin


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the channel pairs (2i, 2i + 1) of x by the tables, in float32.

    x is float[batch, tokens, H, D], the tables are float32[batch, tokens, D / 2].
    """
    chex.assert_shape([cos, sin], (*x.shape[:2], x.shape[-1] // 2))
    pairs = wide(x).reshape(*x.shape[:-1], -1, 2)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
