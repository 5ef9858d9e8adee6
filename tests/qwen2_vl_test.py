"""Qwen2-VL against transformers at a tiny size; its names and sizes."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvpo_jax.convert.qwen2_vl_weights import (
    config_from_shapes,
    official_name,
    qwen2_vl_table,
    to_ours,
)
from kvpo_jax.convert.table import check_names
from kvpo_jax.models import qwen2_vl
from kvpo_jax.models.layers import config_from_dict
from kvpo_jax.models.qwen2_vl import (
    QWEN2_VL_2B,
    QWEN2_VL_7B,
    Qwen2VL,
    Qwen2VLConfig,
    TextConfig,
    VisionConfig,
)

TINY = Qwen2VLConfig(
    TextConfig(vocab=120, dim=64, heads=4, kv_heads=2, ffn_dim=96, layers=2),
    VisionConfig(dim=32, ffn_dim=128, heads=2, layers=2),
    image_token=101,
    video_token=102,
    dtype="float32",
)
NETWORK = jax.jit(Qwen2VL(TINY).apply, static_argnums=4)
# One frame (repeated) and four, of 56 x 84 pixels: 6 and 12 tokens.
IMAGE, VIDEO = (1, 4, 6), (2, 4, 6)


def hf_config(cfg: Qwen2VLConfig) -> transformers.Qwen2VLConfig:
    text, vision = cfg.text, cfg.vision
    eighth = text.head_dim // 8  # the sections of M-RoPE are 2, 3 and 3 eighths of the frequencies
    return transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": text.vocab,
            "hidden_size": text.dim,
            "intermediate_size": text.ffn_dim,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "rms_norm_eps": text.eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
            },
        },
        vision_config={
            "depth": vision.layers,
            "embed_dim": vision.dim,
            "hidden_size": text.dim,
            "num_heads": vision.heads,
            "mlp_ratio": vision.ffn_dim // vision.dim,
            "patch_size": vision.patch,
        },
        image_token_id=cfg.image_token,
        video_token_id=cfg.video_token,
    )


@pytest.fixture(scope="module")
def hf():
    """transformers' tiny model with every parameter drawn anew, scales of norms around 1."""
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(hf_config(TINY)).eval()
    for name, parameter in model.named_parameters():
        scale = name.endswith(
            ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "ln_q.weight")
        )
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.15)
    return model.model


@pytest.fixture(scope="module")
def params(hf):
    """The same in our tree, by the tables."""
    state = {official_name(f"model.{name}"): x.numpy() for name, x in hf.state_dict().items()}
    table, flat = qwen2_vl_table(TINY), {}
    check_names("transformers' state dict", state, table)
    for name, (path, _) in table.items():  # layers in their order
        flat.setdefault(path, []).append(to_ours(path, state[name]))
    flat = {
        path: np.stack(x) if "blocks/" in path or path.startswith("layers/") else x[0]
        for path, x in flat.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def batch(grid, lengths, width, seed=0):
    """ids int32[n, width] with each row's clip at another place, lengths, and random patches."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, 100, (len(lengths), width))
    token = TINY.image_token if grid[0] == 1 else TINY.video_token
    for row in range(len(lengths)):
        ids[row, 3 + row :][: TINY.vision.tokens(grid)] = token
    ids = np.where(np.arange(width) < np.asarray(lengths)[:, None], ids, 0)
    patches = random.standard_normal((len(lengths), np.prod(grid), TINY.vision.patch_dim))
    return (
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(patches, jnp.float32),
    )


def hf_inputs(ids, lengths, patches, grid):
    """The same batch as transformers takes it."""
    mask = np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]
    kind, pixels = ("image", "pixel_values") if grid[0] == 1 else ("video", "pixel_values_videos")
    return {
        "input_ids": torch.tensor(np.asarray(ids, np.int64)),
        "attention_mask": torch.tensor(mask.astype(np.int64)),
        pixels: torch.tensor(np.asarray(patches).reshape(-1, patches.shape[-1])),
        f"{kind}_grid_thw": torch.tensor([grid] * len(ids)),
    }


def hf_mrope(hf, inputs):
    """transformers' own positions, int64[3, n, K]."""
    ids = inputs["input_ids"]
    grids = {name: x for name, x in inputs.items() if name.endswith("grid_thw")}
    kinds = (ids == TINY.image_token).int() + 2 * (ids == TINY.video_token).int()
    return hf.get_rope_index(ids, kinds, attention_mask=inputs["attention_mask"], **grids)[0]


def assert_valid_close(ours, theirs, lengths, atol):
    """Equal but for the padding."""
    for a, b, length in zip(np.asarray(ours), np.asarray(theirs), lengths, strict=True):
        np.testing.assert_allclose(a[:length], b[:length], atol=atol, rtol=0)


@pytest.mark.parametrize("grid", [IMAGE, VIDEO], ids=["image", "video"])
def test_transformers(hf, params, grid):
    """Three rows of different lengths at 1-D positions: float32 rounding apart, on a scale of 4."""
    ids, lengths, patches = batch(grid, [40, 19, 31], 40)
    inputs = hf_inputs(ids, lengths, patches, grid)
    one_d = torch.arange(40).expand(3, 3, 40)
    with torch.no_grad():
        expected = hf(**inputs, position_ids=one_d).last_hidden_state.numpy()
        m_rope = hf(**inputs, position_ids=hf_mrope(hf, inputs)).last_hidden_state.numpy()
    ours = NETWORK({"params": params}, ids, lengths, patches, grid)
    assert_valid_close(ours, expected, lengths, atol=2e-5)
    assert np.abs(expected).max() > 2
    # The reward models leave M-RoPE out; with its positions they would say something else.
    assert np.abs(expected - m_rope)[0].max() > 0.5


def test_vision_tower(hf, params):
    """The visual tokens by themselves; a slab's do not depend on another slab."""
    _, _, patches = batch(VIDEO, [20, 20], 20)
    tower = jax.jit(qwen2_vl.VisionTower(TINY).apply, static_argnums=2)
    ours = tower({"params": params["visual"]}, patches, VIDEO)
    with torch.no_grad():
        flat = torch.tensor(np.asarray(patches).reshape(-1, patches.shape[-1]))
        theirs = hf.visual(flat, grid_thw=torch.tensor([VIDEO] * 2)).pooler_output
    np.testing.assert_allclose(ours.reshape(24, 64), theirs, atol=2e-5, rtol=0)

    other = tower({"params": params["visual"]}, patches.at[:, 24:].add(1), VIDEO)
    np.testing.assert_array_equal(other[:, :6], ours[:, :6])
    assert jnp.abs(other[:, 6:] - ours[:, 6:]).max() > 0.1


def test_suffix_changes_nothing(params):
    """A token's hidden state, from the whole text and from the text cut after the last of them."""
    ids, lengths, patches = batch(IMAGE, [90, 90], 90)
    texts = np.asarray(ids).copy()
    texts[0, [30, 55]], texts[1, [62, 41]] = (110, 111), (110, 111)
    whole = NETWORK({"params": params}, jnp.asarray(texts), lengths, patches, IMAGE)
    tokens = qwen2_vl.cut_after(texts.tolist(), [110, 111])
    assert tokens.ids.shape == (2, 64)
    np.testing.assert_array_equal(tokens.at, [[30, 55], [62, 41]])
    np.testing.assert_array_equal(tokens.lengths, [56, 63])
    np.testing.assert_array_equal(tokens.ids[0, 55:], [111, *8 * [0]])
    ours = jax.jit(qwen2_vl.hidden_at, static_argnums=(0, 4))(TINY, params, tokens, patches, IMAGE)
    expected = np.stack([[whole[0, 30], whole[0, 55]], [whole[1, 62], whole[1, 41]]])
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def test_cut_needs_every_token_once():
    for texts in ([[1, 7, 8], [1, 7]], [[1, 7, 8], [8, 7, 8]]):
        with pytest.raises(ValueError, match="text 1 has the token 8 [02] times"):
            qwen2_vl.cut_after(texts, [7, 8])


def test_padding_is_never_read(params):
    ids, lengths, patches = batch(VIDEO, [40, 19, 31], 40)
    padded = NETWORK({"params": params}, ids, lengths, patches, VIDEO)
    alone = NETWORK({"params": params}, ids[1:2, :19], lengths[1:2], patches[1:2], VIDEO)
    np.testing.assert_allclose(padded[1, :19], alone[0], atol=1e-5, rtol=0)
    other = NETWORK({"params": params}, ids.at[1, 19:].set(7), lengths, patches, VIDEO)
    np.testing.assert_array_equal(other[1, :19], padded[1, :19])


def test_wrong_numbers_are_seen(params):
    """A row with a pad token too few or too many is NaN and spoils no other row.

    Wrong shapes are errors.
    """
    ids, lengths, patches = batch(IMAGE, [40, 19, 31], 40)

    def run(ids, patches, grid=IMAGE):
        return NETWORK({"params": params}, ids, lengths, patches, grid)

    for wrong in (ids.at[0, 3].set(5), ids.at[0, 30].set(TINY.image_token)):
        out = run(wrong, patches)
        assert jnp.isnan(out[0, 39]).all() and jnp.isfinite(out[1:]).all()
    with pytest.raises(AssertionError, match="shape"):
        run(ids, patches[:, 1:])
    with pytest.raises(ValueError, match="3 x 8 patches"):
        run(ids, patches, (1, 3, 8))


def test_bfloat16_is_close(params):
    ids, lengths, patches = batch(VIDEO, [40, 40, 40], 40)
    exact = NETWORK({"params": params}, ids, lengths, patches, VIDEO)
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    like = qwen2_vl.abstract_params(cfg)
    rough_params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, like)
    network = jax.jit(Qwen2VL(cfg).apply, static_argnums=4)
    rough = network({"params": rough_params}, ids, lengths, patches, VIDEO)
    assert rough.dtype == jnp.bfloat16
    assert jnp.linalg.norm(rough.astype(jnp.float32) - exact) < 2e-2 * jnp.linalg.norm(exact)


def test_sharded_over_rows(params):
    """Four rows on four devices and on one."""
    ids, lengths, patches = batch(VIDEO, [40, 19, 31, 25], 40)
    place = NamedSharding(Mesh(np.array(jax.devices()[:4]), "data"), PartitionSpec("data"))
    out = NETWORK({"params": params}, *jax.device_put((ids, lengths, patches), place), VIDEO)
    assert out.sharding.is_equivalent_to(place, 3)
    alone = NETWORK({"params": params}, ids, lengths, patches, VIDEO)
    np.testing.assert_allclose(out, alone, atol=1e-5, rtol=0)


# Parameters of the vision tower and of the language model without embeddings, from the sizes.
PATCH, BLOCK = 1176 * 1280, 4 * 1280 * 1280 + 4 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
MERGER = 2 * 1280 + 5120 * 5120 + 5120


def text_params(dim, kv, ffn):
    attention = 2 * dim * dim + dim + 2 * (dim * kv + kv)
    return 28 * (attention + 3 * dim * ffn + 2 * dim) + dim


HPSV3_HEAD = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2


@pytest.mark.parametrize(
    "cfg, rows, kv, count",
    [(QWEN2_VL_2B, 151660, 256, 2_208_561_664), (QWEN2_VL_7B, 151658, 512, 7_744_923_136)],
    ids=["2B", "7B"],
)
def test_full_size(cfg, rows, kv, count):
    """Every name and shape, both ways, and the count, with the rows of the reward models.

    No memory is needed for the weights.
    """
    text = dataclasses.replace(cfg.text, vocab=rows)
    cfg = dataclasses.replace(cfg, text=text)
    abstract = qwen2_vl.abstract_params(cfg)
    ours = flax.traverse_util.flatten_dict(abstract, sep="/")
    vision = PATCH + 32 * BLOCK + MERGER + 5120 * text.dim + text.dim
    expected = vision + rows * text.dim + text_params(text.dim, kv, text.ffn_dim)
    assert sum(x.size for x in ours.values()) == expected == count

    with torch.device("meta"):
        state = transformers.Qwen2VLModel(hf_config(cfg)).state_dict()
    shapes = {official_name(f"model.{name}"): tuple(x.shape) for name, x in state.items()}
    table = qwen2_vl_table(cfg)
    assert shapes.keys() == table.keys() and {path for path, _ in table.values()} == ours.keys()
    for name, (path, layer) in table.items():
        stacked = () if layer is None else (ours[path].shape[0],)
        tensor = np.broadcast_to(np.float32(0), shapes[name])
        assert ours[path].shape == (*stacked, *to_ours(path, tensor).shape), name
    assert config_from_shapes(shapes) == cfg

    grid = (1, 24, 42)  # a frame of 336 x 588
    out = jax.eval_shape(
        lambda params, *inputs: Qwen2VL(cfg).apply({"params": params}, *inputs, grid),
        abstract,
        jax.ShapeDtypeStruct((2, 960), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.ShapeDtypeStruct((2, 1008, 1176), jnp.float32),
    )
    assert (out.shape, out.dtype) == ((2, 960, text.dim), jnp.bfloat16)
    assert cfg.vision.tokens(grid) == 252


def test_published_counts():
    """HPSv3 has 8.29 B, 7.75 B of them without its language head; VideoAlign has 2.21 B."""
    hpsv3 = 7_744_923_136 + HPSV3_HEAD
    assert HPSV3_HEAD == 3_687_474
    assert round((hpsv3 + 151658 * 3584) / 1e9, 2) == 8.29
    assert round(hpsv3 / 1e9, 2) == 7.75
    assert round((2_208_561_664 + 3 * 1536) / 1e9, 2) == 2.21


def test_names():
    for name in (
        "model.layers.27.mlp.up_proj.weight",
        "model.language_model.layers.27.mlp.up_proj.weight",
        "language_model.layers.27.mlp.up_proj.weight",
        "layers.27.mlp.up_proj.weight",
    ):
        assert official_name(name) == "model.layers.27.mlp.up_proj.weight"
    for name in ("visual.merger.mlp.2.bias", "model.visual.merger.mlp.2.bias"):
        assert official_name(name) == "visual.merger.mlp.2.bias"
    for name in (
        "lm_head.weight",
        "rm_head.weight",
        "visual.blocks.0.norm3.weight",
        "model.layers.0.self_attn.x",
    ):
        with pytest.raises(ValueError, match=name):
            official_name(name)


def test_config():
    """From shapes, with the heads given since none shows a head dim of 16; from a file's notes."""
    with torch.device("meta"):
        state = transformers.Qwen2VLModel(hf_config(TINY)).state_dict()
    shapes = {official_name(name): tuple(x.shape) for name, x in state.items()}
    found = config_from_shapes(shapes, heads=4, vision_heads=2)
    assert (found.text, found.vision) == (TINY.text, TINY.vision)
    with pytest.raises(ValueError, match="num_attention_heads"):
        config_from_shapes(shapes, heads=3)
    with pytest.raises(ValueError, match="visual.merger.mlp.0.weight is missing"):
        config_from_shapes({name: x for name, x in shapes.items() if "merger" not in name})
    noted = json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert config_from_dict(Qwen2VLConfig, noted) == TINY
