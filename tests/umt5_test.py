"""The UMT5 encoder against the official arrays and transformers; its names and sizes."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kvpo_jax.convert.umt5_weights import config_from_shapes, official_name, to_ours, umt5_table
from kvpo_jax.models import umt5
from kvpo_jax.models.umt5 import UMT5Config, UMT5Encoder

TINY = UMT5Config(vocab=50, dim=32, heads=4, head_dim=6, ffn_dim=40, layers=3, dtype="float32")


def from_official(state):
    """A state dict with official names as (config in float32, `params`)."""
    cfg = dataclasses.replace(
        config_from_shapes({name: x.shape for name, x in state.items()}), dtype="float32"
    )
    table, flat = umt5_table(cfg.layers), {}
    assert state.keys() == table.keys()
    for name, (path, _) in table.items():  # layers in their order
        flat.setdefault(path, []).append(to_ours(path, np.asarray(state[name])))
    flat = {path: np.stack(x) if path.startswith("blocks/") else x[0] for path, x in flat.items()}
    return cfg, flax.traverse_util.unflatten_dict(flat, sep="/")


def hf_config(cfg: UMT5Config) -> transformers.UMT5Config:
    return transformers.UMT5Config(
        vocab_size=cfg.vocab,
        d_model=cfg.dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.ffn_dim,
        num_layers=cfg.layers,
        num_heads=cfg.heads,
        feed_forward_proj="gated-gelu",
    )


@pytest.fixture(scope="module")
def hf():
    """transformers' tiny encoder with every parameter drawn anew."""
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(hf_config(TINY)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def params(hf):
    cfg, params = from_official(
        {official_name(name): x.numpy() for name, x in hf.state_dict().items()}
    )
    assert cfg == TINY
    return params


def prompts(lengths, width):
    """ids int32[n, width] and mask bool[n, width] of random prompts."""
    mask = np.arange(width) < np.asarray(lengths)[:, None]
    ids = np.random.default_rng(0).integers(1, TINY.vocab, (len(lengths), width))
    return jnp.asarray(np.where(mask, ids, 0), jnp.int32), jnp.asarray(mask)


@pytest.mark.golden
def test_golden(golden_dir):
    data = np.load(golden_dir / "t5.npz")
    cfg, params = from_official(
        {name[2:]: data[name] for name in data.files if name.startswith("w.")}
    )
    for case in ("", "_long"):
        ids, mask = (
            jnp.asarray(data[f"ids{case}"], jnp.int32),
            jnp.asarray(data[f"mask{case}"], bool),
        )
        out = UMT5Encoder(cfg).apply({"params": params}, ids, mask)
        np.testing.assert_allclose(out, data[f"out{case}"], atol=2e-5, rtol=0)
        if not case:
            np.testing.assert_allclose(
                umt5.embed(cfg, params, ids, mask), data["prompt_embeds"], atol=2e-5, rtol=0
            )
    table = data["rel_bucket_200"]
    np.testing.assert_array_equal(
        umt5.relative_buckets(len(table), cfg.buckets, cfg.max_distance), table
    )


def test_buckets_at_full_length(hf):
    theirs = hf.encoder.block[0].layer[0].SelfAttention._relative_position_bucket
    offset = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    ours = umt5.relative_buckets(512, TINY.buckets, TINY.max_distance)
    np.testing.assert_array_equal(ours, theirs(offset).numpy())
    # key - query -> bucket: itself, before, after; then -8 and -11 share one. 16 is two of eight
    # half-octaves away from 8.
    near = {0: 0, -1: 1, -7: 7, 1: 17, 7: 23}
    far = {-8: 8, -11: 8, -12: 9, -16: 10, 64: 30, -127: 15, -511: 15, 500: 31}
    for offset, bucket in (near | far).items():
        assert ours[max(0, -offset), max(0, offset)] == bucket, offset


def test_transformers(hf, params):
    """300 tokens: positions beyond max_distance; the second prompt is padded."""
    ids, mask = prompts([300, 170], 300)
    with torch.no_grad():
        theirs = hf(
            torch.tensor(np.asarray(ids)), torch.tensor(np.asarray(mask))
        ).last_hidden_state.numpy()
    ours = UMT5Encoder(TINY).apply({"params": params}, ids, mask)
    np.testing.assert_allclose(
        np.where(mask[..., None], ours, 0), np.where(mask[..., None], theirs, 0), atol=1e-5
    )


def test_padding_changes_nothing_and_is_zero(params):
    ids, mask = prompts([120, 40], 300)
    padded = umt5.embed(TINY, params, ids, mask)
    np.testing.assert_allclose(
        padded[:, :120], umt5.embed(TINY, params, ids[:, :120], mask[:, :120]), atol=5e-6
    )
    assert not padded[0, 120:].any() and not padded[1, 40:].any() and padded[1, 39].any()
    # What stands in the padding is never read.
    other = umt5.embed(TINY, params, jnp.where(mask, ids, 7), mask)
    np.testing.assert_array_equal(padded, other)


def test_valid_embeddings_one_by_one(params):
    """Batches of 2 of 3 prompts; widths 128 and 64 instead of 300."""
    ids, mask = (np.asarray(x) for x in prompts([120, 40, 1], 300))
    shapes = []

    def network(ids, mask):
        shapes.append(ids.shape)
        return umt5.embed(TINY, params, ids, mask)

    ours = list(umt5.embed_valid(network, ids, mask, batch=2))
    assert shapes == [(2, 128), (2, 64)]
    assert [x.shape for x in ours] == [(120, 32), (40, 32), (1, 32)]
    for x, whole in zip(ours, umt5.embed(TINY, params, ids, mask), strict=True):
        np.testing.assert_allclose(x, whole[: len(x)], atol=5e-6)


def test_bfloat16_is_close(params):
    ids, mask = prompts([90], 90)
    exact = umt5.embed(TINY, params, ids, mask)
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    rough = umt5.embed(cfg, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params), ids, mask)
    assert rough.dtype == jnp.bfloat16
    assert jnp.linalg.norm(rough.astype(jnp.float32) - exact) < 2e-2 * jnp.linalg.norm(exact)


def test_full_size():
    """UMT5-XXL, without its memory: every name and shape, both ways, and 5.681 B parameters."""
    cfg = UMT5Config()
    ours = flax.traverse_util.flatten_dict(umt5.abstract_params(cfg), sep="/")
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64
    assert (
        sum(x.size for x in ours.values()) == 256384 * 4096 + 24 * per_layer + 4096 == 5_680_910_336
    )
    with torch.device("meta"):
        theirs = transformers.UMT5EncoderModel(hf_config(cfg)).state_dict()
    state = {official_name(name): x for name, x in theirs.items()}
    table = umt5_table(cfg.layers)
    assert state.keys() == table.keys() and {path for path, _ in table.values()} == ours.keys()
    for name, (path, layer) in table.items():
        stacked = () if layer is None else (cfg.layers,)
        assert ours[path].shape == (*stacked, *to_ours(path, state[name]).shape), name
    assert config_from_shapes({name: tuple(x.shape) for name, x in state.items()}) == cfg
    out = jax.eval_shape(
        UMT5Encoder(cfg).apply,
        {"params": umt5.abstract_params(cfg)},
        jax.ShapeDtypeStruct((2, 512), jnp.int32),
        jax.ShapeDtypeStruct((2, 512), bool),
    )
    assert (out.shape, out.dtype) == ((2, 512, 4096), jnp.bfloat16)


def test_names():
    assert (
        official_name("shared.weight")
        == official_name("encoder.embed_tokens.weight")
        == "token_embedding.weight"
    )
    assert (
        official_name("encoder.block.23.layer.1.DenseReluDense.wi_0.weight")
        == "blocks.23.ffn.gate.0.weight"
    )
    for name in (
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "lm_head.weight",
        "encoder.block.0.layer.0.x",
    ):
        with pytest.raises(ValueError, match=name):
            official_name(name)
    shapes = {"token_embedding.weight": (8, 4), "blocks.0.pos_embedding.embedding.weight": (32, 2)}
    with pytest.raises(ValueError, match="blocks.0.attn.q.weight is missing"):
        config_from_shapes(shapes)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.q.weight has the shape \[4\], expected 2 axes"
    ):
        config_from_shapes(
            {**shapes, "blocks.0.attn.q.weight": (4,), "blocks.0.ffn.fc1.weight": (4, 4)}
        )
