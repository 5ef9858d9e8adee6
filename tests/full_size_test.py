"""The real sizes of Wan2.1, by shapes alone: nothing is allocated."""

import math
from collections import Counter
from functools import cache

import flax.traverse_util
import jax
import numpy as np
import pytest

from kvpo_jax.convert.wan_weights import to_ours, wan_table
from kvpo_jax.models.wan import WanConfig, init_variables

SIZES = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}
TEXT_DIM, FREQ_DIM, CHANNELS, PATCH = 4096, 256, 16, (1, 2, 2)


def config(size: str) -> WanConfig:
    return WanConfig(
        **SIZES[size],
        freq_dim=FREQ_DIM,
        text_dim=TEXT_DIM,
        text_len=512,
        channels=CHANNELS,
        patch=PATCH,
        dtype="bfloat16",
        lora_rank=256,
        lora_alpha=256.0,
    )


@cache
def shapes(size: str, collection: str) -> dict[str, tuple[int, ...]]:
    """path -> shape of every variable of a collection."""
    variables = jax.eval_shape(lambda key: init_variables(config(size), key), jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(variables[collection], sep="/")
    return {path: x.shape for path, x in flat.items()}


def count(size: str, collection: str) -> int:
    return sum(math.prod(shape) for shape in shapes(size, collection).values())


def official_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the published checkpoint, by the published architecture."""
    dim, ffn, layers = (SIZES[size][name] for name in ("dim", "ffn_dim", "num_layers"))
    return shapes_of(dim, ffn, layers, FREQ_DIM, TEXT_DIM)


def shapes_of(
    dim: int, ffn: int, layers: int, freq_dim: int, text_dim: int
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of Wan2.1's architecture in these sizes."""
    out = {}

    def linear(name, features, *fan_in):
        out[f"{name}.weight"], out[f"{name}.bias"] = (features, *fan_in), (features,)

    linear("patch_embedding", dim, CHANNELS, *PATCH)
    linear("text_embedding.0", dim, text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", CHANNELS * math.prod(PATCH), dim)
    out["head.modulation"] = (1, 2, dim)
    for block in (f"blocks.{layer}" for layer in range(layers)):
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attention}.{name}", dim, dim)
            for name in "qk":
                out[f"{block}.{attention}.norm_{name}.weight"] = (dim,)
        linear(f"{block}.ffn.0", ffn, dim)
        linear(f"{block}.ffn.2", dim, ffn)
        out[f"{block}.norm3.weight"] = out[f"{block}.norm3.bias"] = (dim,)
        out[f"{block}.modulation"] = (1, 6, dim)
    return out


@pytest.mark.parametrize(
    "size, parameters",
    [
        # A block has 8 dim (dim + 1) + ffn (dim + 1) + dim (ffn + 1) + 12 dim, which is 46,440,704
        # and 351,394,304.
        ("1.3B", 30 * 46_440_704 + 25_775_680),
        ("14B", 40 * 351_394_304 + 232_719_424),
    ],
)
def test_parameters(size, parameters):
    """The published count of the 1.3B model; 14B in bfloat16 is the published file of 28.6 GB."""
    assert parameters == {"1.3B": 1_418_996_800, "14B": 14_288_491_584}[size]
    assert count(size, "params") == parameters
    assert sum(math.prod(shape) for shape in official_shapes(size).values()) == parameters


@pytest.mark.parametrize(
    "size, parameters",
    [("1.3B", 349_962_240), ("14B", 40 * 256 * (16 * 5120 + 2 * (5120 + 13824)))],
)
def test_lora_parameters(size, parameters):
    """Rank 256 on the ten Linears of each block: 256 (in + out) each."""
    dim, ffn, layers = (SIZES[size][name] for name in ("dim", "ffn_dim", "num_layers"))
    assert parameters == layers * 256 * (8 * (dim + dim) + 2 * (dim + ffn))
    assert count(size, "lora") == parameters
    assert len(shapes(size, "lora")) == 20


@pytest.mark.parametrize("size, tensors", [("1.3B", 15 + 30 * 27), ("14B", 15 + 40 * 27)])
def test_official_tensors_are_ours_one_to_one(size, tensors):
    """Every published tensor has one place here, of its shape, and no place is left over."""
    official, ours = official_shapes(size), shapes(size, "params")
    layers = SIZES[size]["num_layers"]
    table = wan_table(layers)
    assert table.keys() == official.keys() and len(table) == tensors
    for name, (path, layer) in table.items():
        tensor = np.broadcast_to(np.float32(0), official[name])  # one number, seen in this shape
        place = ours[path] if layer is None else ours[path][1:]
        assert to_ours(path, tensor).shape == place, name
    places = Counter(table.values())
    stacked = {path for path, layer in places if layer is not None}
    assert stacked == {path for path in ours if path.startswith(("blocks/", "text_kv/"))}
    expected = [
        (path, layer) for path in ours for layer in (range(layers) if path in stacked else [None])
    ]
    assert places == Counter(expected)
    assert all(ours[path][0] == layers for path in stacked)
