"""The tokens of a block over the devices of a mesh axis, by an exchange of heads.

A device has an equal slice of the tokens of every frame. What goes token by token needs nothing
from the others. For attention over the past the devices exchange tokens for heads (DeepSpeed
Ulysses, arXiv 2309.14509): each has then all tokens of its own heads, and keeps the past of these
alone. With the axis None the one device has everything, and each function is the identity.
"""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp

from kvpo_jax.types import Array


def devices(axis: str | None) -> int:
    """How many devices share the tokens."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def own(x: Array, frames: int, axis: str | None) -> Array:
    """This device's slice of every frame, [batch, F*N/c, ...] of [batch, F*N, ...]."""
    if axis is None:
        return x
    parts = einops.rearrange(x, "b (f c n) ... -> b f c n ...", f=frames, c=devices(axis))
    part = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(axis), 2, keepdims=False)
    return einops.rearrange(part, "b f n ... -> b (f n) ...")


def all_of(x: Array, frames: int, axis: str | None) -> Array:
    """The tokens [batch, F*N, ...] of all devices, from each one's [batch, F*N/c, ...].

    All devices have the same; the gradient that reaches each is that of its own tokens.
    """
    if axis is None:
        return x
    by_frame = einops.rearrange(x, "b (f n) ... -> b f n ...", f=frames)
    whole = jax.lax.all_gather(by_frame, axis, axis=2, tiled=True, to="invarying")
    return einops.rearrange(whole, "b f n ... -> b (f n) ...")


def to_heads(
    q: Array, k: Array, v: Array, frames: int, axis: str | None
) -> tuple[Array, Array, Array]:
    """All tokens of this device's heads, float[batch, F*N, H/c, D], in one exchange.

    Each argument has all heads of its tokens, float[batch, F*N/c, H, D].
    """
    if axis is None:
        return q, k, v
    by_frame = einops.rearrange(jnp.stack([q, k, v]), "s b (f n) h d -> s b f n h d", f=frames)
    by_head = jax.lax.all_to_all(by_frame, axis, split_axis=4, concat_axis=3, tiled=True)
    q, k, v = einops.rearrange(by_head, "s b f n h d -> s b (f n) h d")
    return q, k, v


def to_tokens(x: Array, frames: int, axis: str | None) -> Array:
    """All heads of this device's tokens, float[batch, F*N/c, H, D]: `to_heads` back."""
    if axis is None:
        return x
    by_head = einops.rearrange(x, "b (f n) h d -> b f n h d", f=frames)
    by_frame = jax.lax.all_to_all(by_head, axis, split_axis=2, concat_axis=3, tiled=True)
    return einops.rearrange(by_frame, "b f n h d -> b (f n) h d")
