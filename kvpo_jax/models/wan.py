"""The causal Wan2.1 video transformer: a pure function of a block and of the past that it may read.

    velocity, new_kv = Wan(cfg).apply(variables, x, sigma, text, context, start_frame)

The model owns no cache and knows no mode: `routing` decides which past frames are in `context`, and
`rollout` keeps the new keys and values. Attention is bidirectional within a block, and keys are
stored rotated at their absolute frame, unless the past says that positions are counted within its
window (`Context.span`). Names and arithmetic follow Wan2.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from kvpo_jax.algorithm.kv_cache import Context, KVShape, Peers, positions
from kvpo_jax.errors import Registry, UsageError
from kvpo_jax.models import attention as attention_lib
from kvpo_jax.models import tokens as tokens_lib
from kvpo_jax.models.attention import Keys, attention
from kvpo_jax.models.layers import (
    LoRADense,
    RMSNorm,
    apply_rope,
    layer_norm,
    over_layers,
    rope_of_past,
    rope_table,
    sinusoid,
    wide,
)
from kvpo_jax.types import Array, BlockKV, PyTree, TextKV

TIME_SCALE = 1000.0  # Wan is conditioned on 1000 sigma
# Remat policies, by what is saved per block. none: everything. products: the outputs of matrix
# products and attention. block: the block's input only.
REMAT: Registry[Callable[..., Any] | None] = Registry(
    "model.remat",
    {
        "none": None,
        "products": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.save_only_these_names("linear", "attention"),
            attention_lib.saves_cudnn,
        ),
        "block": jax.checkpoint_policies.nothing_saveable,
    },
)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer.

    The comments of configs/tiny.py, sections `model` and `lora`, say what each field is. lora_rank
    0 builds the model without adapters.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_dim: int
    text_len: int
    channels: int
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    sparse_memory: int = 0
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    lora_rank: int = 0
    lora_alpha: float = 1.0

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """N for a latent of this height and width."""
        return (height // self.patch[1]) * (width // self.patch[2])

    def kv_shape(self, height: int, width: int) -> KVShape:
        """Sizes of the keys of a frame, for a latent of this height and width."""
        tokens = self.tokens_per_frame(height, width)
        return KVShape(self.num_layers, tokens, self.num_heads, self.head_dim)


def _linear(cfg: WanConfig, features: int, name: str) -> LoRADense:
    """A Linear of a block; LoRA adapts all of these and no other."""
    return LoRADense(features, cfg.lora_rank, cfg.lora_alpha, jnp.dtype(cfg.dtype), name=name)


def _plain_linear(cfg: WanConfig, features: int) -> LoRADense:
    """A Linear outside the blocks, without LoRA."""
    return LoRADense(features, dtype=jnp.dtype(cfg.dtype))


def _split_heads(x: Array, cfg: WanConfig) -> Array:
    return einops.rearrange(x, "b t (h d) -> b t h d", h=cfg.num_heads)


class TextKVLayer(nn.Module):
    """Keys and values of one layer's text attention.

    They are made once per prompt, so they are not part of `Block`.
    """

    cfg: WanConfig

    @nn.compact
    def __call__(self, text: Array) -> tuple[Array, TextKV]:
        """float[batch, K, dim] -> (text, TextKV of this layer)."""
        cfg = self.cfg
        k = RMSNorm(cfg.eps, name="norm_k")(_linear(cfg, cfg.dim, "k")(text))
        v = _linear(cfg, cfg.dim, "v")(text)
        return text, TextKV(k=_split_heads(k, cfg), v=_split_heads(v, cfg))


class Block(nn.Module):
    """One transformer block: self-attention over past and block (Eq. 4), text attention, MLP.

    `attention.attention` is Eq. 4. Self-attention and MLP are modulated by the noise level.

    Attributes:
      cfg: sizes.
      context_axis: see `Wan`. Below, N of `x` is this device's tokens of a frame; N and H of
        `rope`, keys and values are all tokens and this device's heads.
    """

    cfg: WanConfig
    context_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Array,
        text: TextKV,
        e0: Array,
        rope: tuple[Array, Array],
        context: Context | Peers,
        own_mask: Array | None,
        end: Array,
    ) -> tuple[Array, BlockKV]:
        """Layer `index` of the transformer.

        Args:
          x: float[batch, F*N, dim].
          index: int32[], the layer, which chooses its keys from `context`.
          text: TextKV of this layer, float[batch, K, H, D].
          e0: float32[batch, F, 6, dim], modulation by the noise level.
          rope: the tables of `rope_table`.
          context: the past; its empty entries come last (`Context.valid_first`).
          own_mask: bool[batch, 1, F*N], which of the block's own tokens are attended to, or None.
          end: int32[batch], the frame after the block.
        """
        cfg = self.cfg
        dtype, frames = x.dtype, e0.shape[1]

        def per_frame(y: Array) -> Array:
            return einops.rearrange(y, "b (f n) d -> b f n d", f=frames)

        def per_token(y: Array) -> Array:
            return einops.rearrange(y, "b f n d -> b (f n) d")

        modulation = self.param(
            "modulation", nn.initializers.normal(cfg.dim**-0.5), (6, cfg.dim), jnp.float32
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(
            (e0 + modulation)[:, :, :, None, :], 2, 0
        )

        y = per_token(per_frame(layer_norm(x, cfg.eps)) * (1 + scale1) + shift1).astype(dtype)
        q = RMSNorm(cfg.eps, name="self_norm_q")(_linear(cfg, cfg.dim, "self_q")(y))
        k = RMSNorm(cfg.eps, name="self_norm_k")(_linear(cfg, cfg.dim, "self_k")(y))
        v = _split_heads(_linear(cfg, cfg.dim, "self_v")(y), cfg)
        q, k, v = tokens_lib.to_heads(
            _split_heads(q, cfg), _split_heads(k, cfg), v, frames, self.context_axis
        )
        q, k = apply_rope(q, *rope), k if is_relative(context) else apply_rope(k, *rope)
        k_frames, v_frames = (
            einops.rearrange(t, "b (f n) h d -> b f n h d", f=frames) for t in (k, v)
        )
        if isinstance(context, Peers):
            entries = context.gather(k_frames), context.gather(v_frames)
        else:
            entries = context.layer(index)
        if is_relative(context):
            k = apply_rope(k, *rope)
            places = positions(context.frames(index), end, context.sink, context.span)
            entries = _turned(entries[0], places, rope), entries[1]
        own, learns_past = Keys(k, v, mask=own_mask), isinstance(context, Peers)
        past = self._past(q, context, *entries)
        y = attention(q, own, past, cfg.attention, past_gradient=learns_past)  # Eq. 4
        y = tokens_lib.to_tokens(y, frames, self.context_axis)
        y = einops.rearrange(y, "b t h d -> b t (h d)")
        y = _linear(cfg, cfg.dim, "self_o")(y)
        x = (x + per_token(per_frame(wide(y)) * gate1)).astype(dtype)

        norm3 = nn.LayerNorm(epsilon=cfg.eps, use_fast_variance=False, name="norm3")
        y = norm3(wide(x)).astype(dtype)
        q = RMSNorm(cfg.eps, name="cross_norm_q")(_linear(cfg, cfg.dim, "cross_q")(y))
        q = _split_heads(q, cfg)
        y = attention(q, Keys(text.k.astype(dtype), text.v.astype(dtype)), None, cfg.attention)
        y = einops.rearrange(y, "b t h d -> b t (h d)")
        x = x + _linear(cfg, cfg.dim, "cross_o")(y)

        y = per_token(per_frame(layer_norm(x, cfg.eps)) * (1 + scale2) + shift2).astype(dtype)
        y = nn.gelu(_linear(cfg, cfg.ffn_dim, "ffn_0")(y), approximate=True)
        y = _linear(cfg, cfg.dim, "ffn_2")(y)
        x = (x + per_token(per_frame(wide(y)) * gate2)).astype(dtype)

        return x, BlockKV(k=k_frames, v=v_frames)

    def _past(self, q: Array, context: Context | Peers, k: Array, v: Array) -> Keys:
        """Keys and values of a context, float[batch, A, N, H, D] of one layer.

        Empty entries and inactive ones are left out.
        """
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        mask = None
        if self.cfg.sparse_memory and isinstance(context, Context) and context.far is not None:
            mask = self._activated(q, k, context.far)
        return Keys(
            k=einops.rearrange(k, "b a n h d -> b (a n) h d"),
            v=einops.rearrange(v, "b a n h d -> b (a n) h d"),
            length=jnp.sum(context.frame >= 0, axis=1) * k.shape[2],
            mask=mask,
        )

    def _activated(self, q: Array, past: Array, far: Array) -> Array:
        """MemFlow's sparse memory activation: bool[batch, H, A*N], what each head attends to.

        Of the context entries that `far` marks, each head attends to the `sparse_memory` ones whose
        mean key has the largest product with the block's mean query; it attends to all others.

        Args:
          q: float[batch, F*N, H, D].
          past: float[batch, A, N, H, D], the keys of the context.
          far: bool[batch, A].
        """
        score = jnp.einsum("bhd,bahd->bha", wide(q).mean(axis=1), wide(past).mean(axis=2))
        order = jnp.argsort(jnp.where(far[:, None], -score, jnp.inf), axis=-1, stable=True)
        keep = (jnp.argsort(order, axis=-1) < self.cfg.sparse_memory) | ~far[:, None]
        return jnp.repeat(keep, past.shape[2], axis=-1)


def is_relative(context: Context | Peers) -> TypeGuard[Context]:
    """Whether positions are of the window, and keys are stored without RoPE."""
    return isinstance(context, Context) and context.span > 0


def _turned(k: Array, places: Array, rope: tuple[Array, Array]) -> Array:
    """Stored keys float[batch, A, N, H, D] with the RoPE of their places int32[batch, A]."""
    flat = einops.rearrange(k, "b a n h d -> b (a n) h d")
    turned = apply_rope(flat, *rope_of_past(places, rope, k.shape[2]))
    return turned.reshape(k.shape)


def _but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: all results are saved but those of gathering an array from its parts."""
    return primitive.name != "all_gather"


class Wan(nn.Module):
    """The causal Wan transformer at any size.

    Attributes:
      cfg: sizes.
      context_axis: the mesh axis over whose devices the tokens of a block are split (`tokens`);
        None: there is one. Latents, text, noise level and velocity are the same on all of them. H
        of a context and of new keys and values are a device's own heads.
      regather: for weights that are in parts, boxes that flax unboxes: whether the backward pass
        gathers them again. Else the forward pass keeps every layer's whole weights for it.
    """

    cfg: WanConfig
    context_axis: str | None = None
    regather: bool = False

    def setup(self):
        cfg = self.cfg
        self.patch_embedding = _plain_linear(cfg, cfg.dim)
        self.text_embedding_0 = _plain_linear(cfg, cfg.dim)
        self.text_embedding_2 = _plain_linear(cfg, cfg.dim)
        self.time_embedding_0 = _plain_linear(cfg, cfg.dim)
        self.time_embedding_2 = _plain_linear(cfg, cfg.dim)
        self.time_projection_1 = _plain_linear(cfg, 6 * cfg.dim)
        text_layer, block, policy = TextKVLayer, Block, REMAT[cfg.remat]
        if self.regather:
            text_layer = nn.remat(TextKVLayer, prevent_cse=False, policy=_but_gathered)
            policy = policy or _but_gathered
        if policy is not None:
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.text_kv = over_layers(text_layer, cfg.num_layers)(cfg)
        # index and text differ from layer to layer; e0, rope, context, own_mask and end do not.
        in_axes = (0, 0, *[nn.broadcast] * 5)
        self.blocks = over_layers(block, cfg.num_layers, in_axes)(cfg, self.context_axis)
        self.head = _plain_linear(cfg, cfg.channels * math.prod(cfg.patch))
        self.head_modulation = self.param(
            "head_modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim), jnp.float32
        )

    def encode_text(self, text: Array) -> TextKV:
        """The keys and values of the text attention, for all layers.

        Padding is attended to, as in Wan: the MLP turns its zeros into a constant.

        Args:
          text: token embeddings float[batch, K, text_dim], zero past the prompt's end.
        """
        chex.assert_shape(text, (None, self.cfg.text_len, self.cfg.text_dim))
        text = self.text_embedding_2(nn.gelu(self.text_embedding_0(text), approximate=True))
        return self.text_kv(text)[1]

    def encode_prompts(self, embeddings: Array) -> TextKV:
        """`encode_text` of every segment: float[P, M, K, text_dim] to TextKV [L, P, M, K, H, D]."""
        chex.assert_rank(embeddings, 4)
        p, m = embeddings.shape[:2]
        text = self.encode_text(embeddings.reshape(p * m, *embeddings.shape[2:]))
        return jax.tree.map(lambda x: x.reshape(x.shape[0], p, m, *x.shape[2:]), text)

    def __call__(
        self,
        x: Array,
        sigma: Array,
        text: TextKV,
        context: Context | Peers,
        start_frame: Array,
        own_keys: Array | None = None,
    ) -> tuple[Array, BlockKV]:
        """The velocity of one block per batch row, and the keys and values of its frames.

        Args:
          x: float[batch, F, Y, X, C], the noisy latent.
          sigma: float[batch], the noise level that conditions the network.
          text: TextKV float[L, batch, K, H, D].
          context: the past of each batch row; A may be any number.
          start_frame: int32[batch], absolute index of the first frame.
          own_keys: bool[F] or bool[batch, F], which of the block's own frames are attended to; None
            is all. Used by the recache at a prompt switch, whose oldest frames are queries only.

        Returns:
          velocity float32[batch, F, Y, X, C] (noise - clean, see flow.py), BlockKV.
        """
        cfg, axis = self.cfg, self.context_axis
        batch, frames, height, width, _ = x.shape
        pt, ph, pw = cfg.patch
        tokens = cfg.tokens_per_frame(height, width)
        heads = cfg.num_heads // tokens_lib.devices(axis)
        chex.assert_shape(x, (None, None, None, None, cfg.channels))
        chex.assert_shape(sigma, (batch,))
        chex.assert_shape(start_frame, (batch,))
        chex.assert_shape(context.frame, (batch, None))
        if isinstance(context, Context):
            for store in context.stores:
                chex.assert_shape(
                    [store.k, store.v], (cfg.num_layers, None, None, tokens, heads, cfg.head_dim)
                )
            chex.assert_shape([context.frame, *context.slot], context.frame.shape)
            chex.assert_shape(list(context.row), (batch,))
        if cfg.sparse_memory and getattr(context, "far", None) is None:
            raise UsageError(
                "model.sparse_memory needs a Context whose `far` marks the entries of the far past"
            )
        chex.assert_shape(
            [text.k, text.v], (cfg.num_layers, batch, None, cfg.num_heads, cfg.head_dim)
        )

        # Wan flattens a patch as (c, pt, ph, pw) going in and as (pt, ph, pw, c) coming out.
        h = einops.rearrange(
            x, "b (f pt) (y ph) (x pw) c -> b (f y x) (c pt ph pw)", pt=pt, ph=ph, pw=pw
        )
        h = self.patch_embedding(tokens_lib.own(h, frames, axis))
        e = self.time_embedding_0(sinusoid(TIME_SCALE * sigma, cfg.freq_dim))
        e = self.time_embedding_2(nn.silu(e))
        e0 = wide(self.time_projection_1(nn.silu(e))).reshape(batch, 1, 6, cfg.dim)
        e0 = jnp.broadcast_to(e0, (batch, frames, 6, cfg.dim))

        own_mask = None
        if own_keys is not None:
            own_keys = jnp.broadcast_to(own_keys, (batch, frames))
            own_mask = jnp.repeat(own_keys, tokens, axis=1)[:, None]
        end, place = start_frame + frames, start_frame
        if is_relative(context):
            place = jnp.minimum(start_frame, context.span - frames)  # at the end of the window
        rope = rope_table(place, frames, height // ph, width // pw, cfg.head_dim)
        h, new_kv = self.blocks(
            h, jnp.arange(cfg.num_layers), text, e0, rope, context.valid_first(), own_mask, end
        )

        shift, scale = jnp.moveaxis(wide(e)[:, None, :] + self.head_modulation, 1, 0)
        h = layer_norm(h, cfg.eps) * (1 + scale[:, None]) + shift[:, None]
        velocity = einops.rearrange(
            tokens_lib.all_of(wide(self.head(h)), frames, axis),
            "b (f y x) (pt ph pw c) -> b (f pt) (y ph) (x pw) c",
            f=frames // pt,
            y=height // ph,
            x=width // pw,
            pt=pt,
            ph=ph,
            pw=pw,
        )
        return velocity, new_kv

    def touch_all(
        self, x: Array, sigma: Array, text: Array, context: Context, start_frame: Array
    ) -> Array:
        """Text layers and transformer in one call, so that `init` makes every variable."""
        return self(x, sigma, self.encode_text(text), context, start_frame)[0]


def empty_context(cfg: WanConfig, batch: int, slots: int, tokens: int) -> Context:
    """A context of `slots` empty (masked) frames."""
    kv = jnp.zeros((cfg.num_layers, batch, slots, tokens, cfg.num_heads, cfg.head_dim), cfg.dtype)
    frame = jnp.full((batch, slots), -1, jnp.int32)
    return Context.of(kv, kv, frame, far=frame >= 0)


def init_variables(cfg: WanConfig, key: Array) -> PyTree:
    """Fresh `params` and (rank > 0) `lora` collections."""
    params_key, lora_key = jax.random.split(key)
    side = 2 * cfg.patch[1]
    x = jnp.zeros((1, cfg.patch[0], side, side, cfg.channels), cfg.dtype)
    context = empty_context(cfg, 1, 1, cfg.tokens_per_frame(side, side))
    return Wan(cfg).init(
        {"params": params_key, "lora": lora_key},
        x,
        jnp.zeros(1),
        jnp.zeros((1, cfg.text_len, cfg.text_dim), cfg.dtype),
        context,
        jnp.zeros(1, jnp.int32),
        method=Wan.touch_all,
    )


@functools.cache
def abstract_variables(cfg: WanConfig) -> PyTree:
    """Shapes and dtypes of `init_variables`."""
    return jax.eval_shape(functools.partial(init_variables, cfg), jax.random.key(0))
