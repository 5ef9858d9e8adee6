"""The causal Wan2.1 video transformer as a pure function of a block and of the context that it may read.

`Wan.apply(variables, x, sigma, text, context, start_frame) -> velocity, BlockKV`. The model owns no cache and knows
no mode: which past frames stand in `context` is decided by `routing`, and who keeps the new keys and values by
`rollout`. Names and arithmetic follow Wan2.1 (bidirectional within a block; keys are rotated at their absolute frame).
"""

from __future__ import annotations

import dataclasses

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from kvpo_jax.models import attention as attention_lib
from kvpo_jax.models.attention import Keys, attention
from kvpo_jax.models.layers import LoRADense, RMSNorm, apply_rope, layer_norm, rope_table, sinusoid, wide
from kvpo_jax.types import Array, BlockKV, Context, PyTree, TextKV

TIME_SCALE = 1000.0  # Wan is conditioned on 1000 sigma
# What the backward pass finds of a block: everything; what products gave, not what is elementwise; its input alone.
REMAT = {
    "none": None,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("linear", "attention"), attention_lib.saved
    ),
    "block": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer; see configs/ for what each is. lora_rank 0 builds the model without adapters."""

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
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """N for a latent of this height and width."""
        return (height // self.patch[1]) * (width // self.patch[2])


def wan_config(config: ml_collections.ConfigDict) -> WanConfig:
    """The WanConfig of a run's config: its `model` section and its `lora` section."""
    return WanConfig(**config.model, lora_rank=config.lora.rank, lora_alpha=config.lora.alpha)


def _linear(cfg: WanConfig, features: int, name: str) -> LoRADense:
    """A Linear of a block: the ones that LoRA adapts."""
    return LoRADense(features, cfg.lora_rank, cfg.lora_alpha, jnp.dtype(cfg.dtype), name=name)


def _plain_linear(cfg: WanConfig, features: int, name: str) -> LoRADense:
    return LoRADense(features, dtype=jnp.dtype(cfg.dtype), name=name)


def _split_heads(x: Array, cfg: WanConfig) -> Array:
    return einops.rearrange(x, "b t (h d) -> b t h d", h=cfg.num_heads)


class TextKVLayer(nn.Module):
    """Keys and values of one layer's text attention; apart from `Block` because they are made once per prompt."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, text: Array) -> tuple[Array, TextKV]:
        """float[batch, K, dim] -> (text, TextKV of this layer)."""
        cfg = self.cfg
        k = RMSNorm(cfg.eps, name="norm_k")(_linear(cfg, cfg.dim, "k")(text))
        v = _linear(cfg, cfg.dim, "v")(text)
        return text, TextKV(k=_split_heads(k, cfg), v=_split_heads(v, cfg))


class Block(nn.Module):
    """One transformer block: modulated self-attention over context and block, text attention, modulated MLP."""

    cfg: WanConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Array,
        text: TextKV,
        e0: Array,
        rope: tuple[Array, Array],
        context: Context,
        own_mask: Array | None,
    ) -> tuple[Array, BlockKV]:
        """Layer `index` on x float[batch, F*N, dim]; e0 float32[batch, F, 6, dim], rope of `rope_table`.

        The entries of `context` that are not empty come first; own_mask bool[batch, 1, F*N] or None is for own keys.
        """
        cfg = self.cfg
        dtype, frames = x.dtype, e0.shape[1]
        per_frame = lambda y: einops.rearrange(y, "b (f n) d -> b f n d", f=frames)
        per_token = lambda y: einops.rearrange(y, "b f n d -> b (f n) d")
        modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (6, cfg.dim), jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis((e0 + modulation)[:, :, :, None, :], 2, 0)

        y = per_token(per_frame(layer_norm(x, cfg.eps)) * (1 + scale1) + shift1).astype(dtype)
        q = RMSNorm(cfg.eps, name="self_norm_q")(_linear(cfg, cfg.dim, "self_q")(y))
        k = RMSNorm(cfg.eps, name="self_norm_k")(_linear(cfg, cfg.dim, "self_k")(y))
        v = _split_heads(_linear(cfg, cfg.dim, "self_v")(y), cfg)
        q, k = (apply_rope(_split_heads(t, cfg), *rope) for t in (q, k))
        past_k, past_v = (past.astype(dtype) for past in context.layer(index))
        past = Keys(
            *(einops.rearrange(past, "b a n h d -> b (a n) h d") for past in (past_k, past_v)),
            length=jnp.sum(context.frame >= 0, axis=1) * past_k.shape[2],
            mask=self._activated(q, past_k, context.chunk) if cfg.sparse_memory else None,
        )
        y = attention(q, Keys(k, v, mask=own_mask), past, cfg.attention)
        y = einops.rearrange(y, "b t h d -> b t (h d)")
        y = _linear(cfg, cfg.dim, "self_o")(y)
        x = (x + per_token(per_frame(wide(y)) * gate1)).astype(dtype)

        y = nn.LayerNorm(epsilon=cfg.eps, use_fast_variance=False, name="norm3")(wide(x)).astype(dtype)
        q = _split_heads(RMSNorm(cfg.eps, name="cross_norm_q")(_linear(cfg, cfg.dim, "cross_q")(y)), cfg)
        y = attention(q, Keys(text.k.astype(dtype), text.v.astype(dtype)), None, cfg.attention)
        y = einops.rearrange(y, "b t h d -> b t (h d)")
        x = x + _linear(cfg, cfg.dim, "cross_o")(y)

        y = per_token(per_frame(layer_norm(x, cfg.eps)) * (1 + scale2) + shift2).astype(dtype)
        y = _linear(cfg, cfg.dim, "ffn_2")(nn.gelu(_linear(cfg, cfg.ffn_dim, "ffn_0")(y), approximate=True))
        x = (x + per_token(per_frame(wide(y)) * gate2)).astype(dtype)

        k, v = (einops.rearrange(t, "b (f n) h d -> b f n h d", f=frames) for t in (k, v))
        return x, BlockKV(k=k, v=v)

    def _activated(self, q: Array, past: Array, chunk: Array) -> Array:
        """MemFlow's sparse memory activation, bool[batch, H, A*N]: False for the chunks that a head leaves out.

        Of the context entries that `chunk` bool[batch, A] marks, each head attends to the `sparse_memory` whose mean
        key has the largest product with the block's mean query.
        q is float[batch, F*N, H, D], past float[batch, A, N, H, D].
        """
        score = jnp.einsum("bhd,bahd->bha", wide(q).mean(axis=1), wide(past).mean(axis=2))
        order = jnp.argsort(jnp.where(chunk[:, None], -score, jnp.inf), axis=-1, stable=True)
        keep = (jnp.argsort(order, axis=-1) < self.cfg.sparse_memory) | ~chunk[:, None]
        return jnp.repeat(keep, past.shape[2], axis=-1)


class Wan(nn.Module):
    """The causal Wan transformer at any size."""

    cfg: WanConfig

    def setup(self):
        cfg = self.cfg
        if cfg.remat not in REMAT:
            raise ValueError(f"model.remat is {cfg.remat!r}; expected one of {', '.join(REMAT)}")
        self.patch_embedding = _plain_linear(cfg, cfg.dim, None)
        self.text_embedding_0 = _plain_linear(cfg, cfg.dim, None)
        self.text_embedding_2 = _plain_linear(cfg, cfg.dim, None)
        self.time_embedding_0 = _plain_linear(cfg, cfg.dim, None)
        self.time_embedding_2 = _plain_linear(cfg, cfg.dim, None)
        self.time_projection_1 = _plain_linear(cfg, 6 * cfg.dim, None)
        over_layers = {
            "variable_axes": {"params": 0, "lora": 0},
            "split_rngs": {"params": True, "lora": True},
            "length": cfg.num_layers,
        }
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat])
        self.text_kv = nn.scan(TextKVLayer, **over_layers)(cfg)
        same = nn.broadcast
        self.blocks = nn.scan(block, **over_layers, in_axes=(0, 0, same, same, same, same))(cfg)
        self.head = _plain_linear(cfg, cfg.channels * cfg.patch[0] * cfg.patch[1] * cfg.patch[2], None)
        self.head_modulation = self.param(
            "head_modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim), jnp.float32
        )

    def encode_text(self, text: Array) -> TextKV:
        """Token embeddings float[batch, K, text_dim], zero past the prompt's end, to the text keys and values.

        Padding is attended to, as in Wan: the MLP turns its zeros into a constant.
        """
        chex.assert_shape(text, (None, self.cfg.text_len, self.cfg.text_dim))
        text = self.text_embedding_2(nn.gelu(self.text_embedding_0(text), approximate=True))
        return self.text_kv(text)[1]

    def __call__(
        self,
        x: Array,
        sigma: Array,
        text: TextKV,
        context: Context,
        start_frame: Array,
        own_keys: Array | None = None,
    ) -> tuple[Array, BlockKV]:
        """The velocity of one block of every batch row, and the keys and values of its frames.

        Args:
          x: float[batch, F, Y, X, C], the noisy latent.
          sigma: float[batch], the noise level that the network is told.
          text: TextKV of batch rows.
          context: Context of batch rows; A may be any number.
          start_frame: int32[batch], absolute index of the first frame.
          own_keys: bool[F], which of the block's own frames are attended to (None: all). Used by the recache at a
            prompt switch, whose oldest frames are queries only.

        Returns:
          velocity float32[batch, F, Y, X, C] (noise - clean, see flow.py), BlockKV.
        """
        cfg = self.cfg
        batch, frames, height, width, _ = x.shape
        pt, ph, pw = cfg.patch
        tokens = cfg.tokens_per_frame(height, width)
        chex.assert_shape(x, (None, None, None, None, cfg.channels))
        chex.assert_shape(sigma, (batch,))
        chex.assert_shape(start_frame, (batch,))
        for store in context.stores:
            chex.assert_shape([store.k, store.v], (cfg.num_layers, None, None, tokens, cfg.num_heads, cfg.head_dim))
        chex.assert_shape([context.frame, *context.slot], (batch, context.frame.shape[1]))
        if cfg.sparse_memory and context.chunk is None:
            raise ValueError("model.sparse_memory needs a Context that says which entries are chunks")
        chex.assert_shape([text.k, text.v], (cfg.num_layers, batch, None, cfg.num_heads, cfg.head_dim))

        # Wan flattens a patch as (c, pt, ph, pw) going in and as (pt, ph, pw, c) coming out.
        h = einops.rearrange(x, "b (f pt) (y ph) (x pw) c -> b (f y x) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        h = self.patch_embedding(h)
        e = self.time_embedding_0(sinusoid(TIME_SCALE * sigma, cfg.freq_dim))
        e = self.time_embedding_2(nn.silu(e))
        e0 = wide(self.time_projection_1(nn.silu(e))).reshape(batch, 1, 6, cfg.dim)
        e0 = jnp.broadcast_to(e0, (batch, frames, 6, cfg.dim))

        own_mask = (
            None if own_keys is None else jnp.broadcast_to(jnp.repeat(own_keys, tokens), (batch, 1, frames * tokens))
        )
        rope = rope_table(start_frame, frames, height // ph, width // pw, cfg.head_dim)
        h, new_kv = self.blocks(h, jnp.arange(cfg.num_layers), text, e0, rope, context.valid_first(), own_mask)

        shift, scale = jnp.moveaxis(wide(e)[:, None, :] + self.head_modulation, 1, 0)
        h = layer_norm(h, cfg.eps) * (1 + scale[:, None]) + shift[:, None]
        velocity = einops.rearrange(
            wide(self.head(h)),
            "b (f y x) (pt ph pw c) -> b (f pt) (y ph) (x pw) c",
            f=frames // pt, y=height // ph, x=width // pw, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        return velocity, new_kv

    def touch_all(self, x: Array, sigma: Array, text: Array, context: Context, start_frame: Array) -> Array:
        """Text encoder and transformer in one call: what `init` runs to make every variable."""
        return self(x, sigma, self.encode_text(text), context, start_frame)[0]


def empty_context(cfg: WanConfig, batch: int, slots: int, tokens: int) -> Context:
    """A context of `slots` empty (masked) frames."""
    kv = jnp.zeros((cfg.num_layers, batch, slots, tokens, cfg.num_heads, cfg.head_dim), cfg.dtype)
    frame = jnp.full((batch, slots), -1, jnp.int32)
    return Context.of(kv, kv, frame, chunk=frame >= 0)


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
