"""Tiny random checkpoints in the formats of their upstreams, written by torch, diffusers, peft and
transformers, go through the real converter: our models compute what theirs do, and a wrong file is
an error that leaves nothing behind.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path, PurePosixPath

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from equipment import ROOT, run_command
from full_size_test import SIZES, official_shapes
from ml_collections import ConfigDict

from kvpo_jax import backbone
from kvpo_jax.algorithm import flow, kv_cache, routing
from kvpo_jax.algorithm.block import denoise_block
from kvpo_jax.convert import convert_weights, wan_lora_weights, wan_vae_weights, wan_weights
from kvpo_jax.convert.kind import Options
from kvpo_jax.convert.mapping import Mapped, map_tensors
from kvpo_jax.convert.tensors import Tensor
from kvpo_jax.errors import UsageError
from kvpo_jax.models import umt5, wan_vae
from kvpo_jax.models.wan import Wan, WanConfig, empty_context
from kvpo_jax.runtime import checkpoint, weight_file
from kvpo_jax.types import PyTree

CFG = WanConfig(
    dim=96,
    ffn_dim=160,
    num_heads=4,
    num_layers=2,
    freq_dim=32,
    text_dim=40,
    text_len=12,
    channels=6,
    lora_rank=4,
    lora_alpha=6.0,
)
GIVEN = {"num_heads": CFG.num_heads, "text_len": CFG.text_len}
FRAMES, HEIGHT, WIDTH = 3, 8, 10


def convert(sources: list[Path], output: Path | None, **options) -> None:
    """The converter, with its options by name."""
    convert_weights.convert(sources, output, Options(**options))


# ---------------------------------------------------------------- checkpoints


def diffusers_transformer() -> WanTransformer3DModel:
    """CFG in diffusers, with random weights, the same every time."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=CFG.patch,
        num_attention_heads=CFG.num_heads,
        attention_head_dim=CFG.head_dim,
        in_channels=CFG.channels,
        out_channels=CFG.channels,
        text_dim=CFG.text_dim,
        freq_dim=CFG.freq_dim,
        ffn_dim=CFG.ffn_dim,
        num_layers=CFG.num_layers,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    ).eval()
    return redrawn(model)


def redrawn(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random: the zeros and ones of the initialisation would hide what depends on
    them.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


# What official names are to diffusers, in the order in which they are replaced.
OFFICIAL = [
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"to_out\.0", "o"),
    (r"to_([qkv])\.", r"\1."),
    (r"\.norm2\.", ".norm3."),
    (r"net\.0\.proj", "0"),
    (r"ffn\.net\.2", "ffn.2"),
]


def official_state(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """The weights under the names of Wan2.1."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in OFFICIAL:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state


def random_lora() -> dict[str, torch.Tensor]:
    """A LoRA of CFG by peft's name below the model, "blocks.0.self_attn.q.lora_A.weight"."""
    torch.manual_seed(1)
    fan = {"ffn.0": (CFG.dim, CFG.ffn_dim), "ffn.2": (CFG.ffn_dim, CFG.dim)}
    fan |= {
        f"{attention}.{name}": (CFG.dim, CFG.dim)
        for attention in ("self_attn", "cross_attn")
        for name in "qkvo"
    }
    state = {}
    for layer in range(CFG.num_layers):
        for module, (fan_in, fan_out) in fan.items():
            state[f"blocks.{layer}.{module}.lora_A.weight"] = 0.1 * torch.randn(
                CFG.lora_rank, fan_in
            )
            state[f"blocks.{layer}.{module}.lora_B.weight"] = 0.1 * torch.randn(
                fan_out, CFG.lora_rank
            )
    return state


@pytest.fixture(scope="module")
def diffusers_model() -> WanTransformer3DModel:
    return diffusers_transformer()


@pytest.fixture(scope="module")
def official(diffusers_model) -> dict[str, torch.Tensor]:
    return official_state(diffusers_model)


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    return random_lora()


@pytest.fixture(scope="module")
def expected(diffusers_model, tmp_path_factory) -> dict[str, np.ndarray]:
    """Our tensors of `diffusers_model`, by way of a diffusers folder."""
    folder = tmp_path_factory.mktemp("diffusers")
    diffusers_model.save_pretrained(folder / "transformer")
    convert(
        [folder / "transformer"], folder / "out.safetensors", text_len=CFG.text_len
    )  # heads: config.json
    return tensors_of(folder / "out.safetensors")


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.tobytes() == theirs[name].tobytes(), (
            name
        )


def with_prefix(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def tree(flat: dict[str, np.ndarray]) -> PyTree:
    return flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, flat), sep="/")


def diffusers_velocity(
    model: WanTransformer3DModel, x: np.ndarray, t: np.ndarray, text: np.ndarray
) -> np.ndarray:
    """diffusers' velocity, float[batch, C, F, H, W], of x float[batch, F, H, W, C]."""
    with torch.no_grad():
        out = model(
            torch.tensor(np.moveaxis(x, -1, 1)),
            torch.tensor(t),
            torch.tensor(text),
            return_dict=False,
        )
    return out[0].numpy()


def velocity(
    variables: PyTree, x: np.ndarray, t: np.ndarray, text: np.ndarray, cfg: WanConfig = CFG
) -> np.ndarray:
    """Our velocity of a whole video as one block, in diffusers' layout [batch, C, F, H, W]."""
    cfg = cfg if "lora" in variables else dataclasses.replace(cfg, lora_rank=0)
    model, tokens = Wan(cfg), cfg.tokens_per_frame(*x.shape[2:4])
    text_kv = model.apply(variables, text, method="encode_text")
    start = jnp.zeros(len(x), jnp.int32)
    out, _ = model.apply(
        variables, x, t / 1000, text_kv, empty_context(cfg, len(x), 0, tokens), start
    )
    return np.moveaxis(np.asarray(out), -1, 1)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, FRAMES, HEIGHT, WIDTH, CFG.channels)).astype(np.float32)
    text = rng.normal(size=(3, CFG.text_len, CFG.text_dim)).astype(np.float32)
    return x, np.array([1000, 937.5, 0], np.float32), text


# ---------------------------------------------------------------- the transformer


def test_our_model_computes_what_that_of_diffusers_does(diffusers_model, expected):
    theirs = diffusers_velocity(diffusers_model, *inputs())
    np.testing.assert_allclose(
        velocity({"params": tree(expected)}, *inputs()), theirs, atol=2e-5, rtol=0
    )


def test_names_are_those_of_diffusers_own_converter(diffusers_model, official):
    names = json.loads((ROOT / "tests" / "golden" / "lora_names.json").read_text())[
        "base_state_dict_names"
    ]
    assert official.keys() == names.keys() == wan_weights.wan_table(2).keys()
    theirs = convert_wan_transformer_to_diffusers(dict(official))
    assert theirs.keys() == diffusers_model.state_dict().keys()
    for name, tensor in official.items():
        assert theirs[wan_weights.diffusers_name(name)] is tensor
        assert wan_weights.official_name(wan_weights.diffusers_name(name)) == name


def in_blocks(name: str, wrapper: str) -> str:
    return re.sub(r"^(blocks\.\d+\.)", rf"\1{wrapper}.", name)


WRAPPINGS = {
    "bare": lambda state: state,
    "LongLive": lambda state: {
        "generator": with_prefix(state, "model."),
        "critic": {"w": torch.ones(2)},
        "step": 7,
    },
    "LongLive, FSDP": lambda state: {
        "generator": {
            f"model._fsdp_wrapped_module.{in_blocks(name, '_fsdp_wrapped_module')}": tensor
            for name, tensor in state.items()
        }
    },
    "compiled, checkpointed": lambda state: {
        "model": {
            f"_orig_mod.model.{in_blocks(name, '_checkpoint_wrapped_module')}": tensor
            for name, tensor in state.items()
        }
    },
    "Self-Forcing": lambda state: {"generator_ema": with_prefix(state, "model.")},
    "KVPO without LoRA": lambda state: {
        "generator": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        "step": 3,
        "ema": {},
    },
    "ComfyUI": lambda state: with_prefix(state, "model.diffusion_model."),
    "DDP": lambda state: {"model_state_dict": with_prefix(state, "module."), "epoch": 3},
    "Lightning": lambda state: {
        "state_dict": with_prefix(state, "model."),
        "optimizer_states": [{"state": {}}],
        "hyper_parameters": {"lr": 1e-4},
    },
    "DeepSpeed": lambda state: {"module": state, "optimizer": None, "mp_world_size": 1},
    "nested": lambda state: {"model": {"state_dict": state, "epoch": 3}},
    "a part of any name": lambda state: {
        "student": with_prefix(state, "net."),
        "critic": {"w": torch.ones(2)},
        "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []},
        "step": 3,
    },
    "DiffSynth": lambda state: with_prefix(state, "pipe.dit."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_same_file(official, expected, tmp_path, wrapping):
    torch.save(WRAPPINGS[wrapping](official), tmp_path / "model.pt")
    convert([tmp_path / "model.pt"], tmp_path / "out.safetensors", **GIVEN)
    assert_same(tensors_of(tmp_path / "out.safetensors"), expected)


def test_the_state_dict_of_the_policy_is_read(official, expected, tmp_path):
    others = {name: torch.zeros_like(tensor) for name, tensor in official.items()}
    for policy, part in (
        ("online", "generator"),
        ("ema", "generator_ema"),
        ("initial", "initial_generator"),
    ):
        parts = dict.fromkeys(("generator", "generator_ema", "initial_generator"), others) | {
            part: official
        }
        torch.save(parts, tmp_path / "model.pt")
        convert([tmp_path / "model.pt"], tmp_path / "out.safetensors", policy=policy, **GIVEN)
        assert_same(tensors_of(tmp_path / "out.safetensors"), expected)
        (source,) = json.loads((tmp_path / "out.safetensors.manifest.json").read_text())["sources"]
        assert source["part"] == part
    torch.save({"generator": official}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model.pt has nothing for the policy 'ema' \(ema, .*\), only generator"
    ):
        convert([tmp_path / "model.pt"], tmp_path / "out.safetensors", policy="ema", **GIVEN)


def save_shards(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Two shards with an index, as Wan2.1-T2V-14B has them."""
    folder.mkdir(exist_ok=True)
    names, places = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / shard)
        places |= dict.fromkeys(part, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_a_sharded_wan_folder_by_the_command(official, expected, tmp_path):
    save_shards(official, tmp_path / "Wan2.1")
    (tmp_path / "Wan2.1" / "config.json").write_text(
        json.dumps({"num_heads": 4, "text_len": 12, "dim": 96})
    )
    torch.save({}, tmp_path / "Wan2.1" / "Wan2.1_VAE.pth")  # lies there too
    run("Wan2.1", "--output=weights/wan.safetensors", cwd=tmp_path)
    output = tmp_path / "weights" / "wan.safetensors"
    assert_same(tensors_of(output), expected)
    metadata = metadata_of(output)
    assert metadata["kind"] == "wan"
    config = json.loads(metadata["config"])
    assert (
        WanConfig(**config | {"patch": tuple(config["patch"])}, lora_rank=4, lora_alpha=6.0) == CFG
    )
    manifest = json.loads(metadata["manifest"])
    assert manifest == json.loads(output.with_name("wan.safetensors.manifest.json").read_text())
    for source in manifest["sources"]:
        content = (tmp_path / source["file"]).read_bytes()
        assert (source["sha256"], source["bytes"]) == (
            hashlib.sha256(content).hexdigest(),
            len(content),
        )
    assert manifest["tensors"]["blocks/self_q/kernel"] == {
        "shape": [2, 96, 96],
        "dtype": "float32",
        "sources": [f"blocks.{layer}.self_attn.q.weight: float32[96, 96]" for layer in (0, 1)],
    }
    assert sorted(path.name for path in output.parent.iterdir()) == [
        output.name,
        f"{output.name}.manifest.json",
    ]


def run(*arguments: str, cwd: Path) -> str:
    done = run_command(ROOT / "tools" / "convert_weights.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_prints_the_mapping_and_writes_nothing(official, tmp_path):
    torch.save({"generator": with_prefix(official, "model.")}, tmp_path / "model.pt")
    said = run("model.pt", "--dry-run", "--num_heads=4", "--dtype=bfloat16", cwd=tmp_path)
    lines = said.splitlines()
    words = [line.split() for line in lines]
    for row in (
        (
            "model.blocks.1.self_attn.q.weight float32[96, 96] -> blocks/self_q/kernel[1]"
            " bfloat16[96, 96]"
        ),
        "model.blocks.1.ffn.2.weight float32[96, 160] -> blocks/ffn_2/kernel[1] bfloat16[160, 96]",
        "model.head.modulation float32[1, 2, 96] -> head_modulation float32[2, 96]",
    ):
        assert row.split() in words
    assert sum("->" in line for line in words) == len(official)
    assert lines[-2] == "model.pt, its generator"
    numbers = sum(tensor.numel() for tensor in official.values())
    assert lines[-1].startswith(
        f"wan: {numbers:,} parameters, 0.00 GB; dim 96, ffn_dim 160, num_heads 4,"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_number_formats(official, tmp_path, dtype):
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in official.items()}
    torch.save(halves, tmp_path / "model.pt")
    safetensors.torch.save_file(halves, tmp_path / "model.safetensors")
    for source in ("model.pt", "model.safetensors"):
        convert([tmp_path / source], tmp_path / "out.safetensors", dtype=dtype, **GIVEN)
        ours = tensors_of(tmp_path / "out.safetensors")
        exact = halves["blocks.1.self_attn.norm_q.weight"].float().numpy()
        np.testing.assert_array_equal(ours["blocks/self_norm_q/scale"][1].astype(np.float32), exact)
        types = {name: tensor.dtype for name, tensor in ours.items()}
        assert types["blocks/self_q/kernel"] == (
            np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        )
        assert types["blocks/self_norm_q/scale"] == (
            ml_dtypes.bfloat16 if dtype == "keep" else np.float32
        )
    # What has more digits is rounded to nearest, as torch does it.
    torch.save(official, tmp_path / "model.pt")
    convert([tmp_path / "model.pt"], tmp_path / "out.safetensors", dtype="bfloat16", **GIVEN)
    ours = tensors_of(tmp_path / "out.safetensors")["head/kernel"]
    np.testing.assert_array_equal(
        ours.astype(np.float32), halves["head.head.weight"].float().numpy().T
    )


def test_loading_casts_to_what_the_model_has(official, expected, tmp_path):
    torch.save(
        official, tmp_path / "model.pth", _use_new_zipfile_serialization=False
    )  # PyTorch before 1.6
    convert([tmp_path / "model.pth"], tmp_path / "out.safetensors", **GIVEN)
    params = checkpoint.load_weights(tmp_path / "out.safetensors", wan_weights.abstract_params(CFG))
    assert_same(flax.traverse_util.flatten_dict(jax.device_get(params), sep="/"), expected)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_are_recognised(size):
    base = official_shapes(size)
    mapped = mapped_shapes(base)
    assert mapped.config == {
        **SIZES[size],
        "freq_dim": 256,
        "text_dim": 4096,
        "text_len": 512,
        "channels": 16,
        "patch": (1, 2, 2),
        "eps": 1e-6,
    }
    assert count(mapped) == {"1.3B": 1_418_996_800, "14B": 14_288_491_584}[size]

    lora = {}
    for module, (fan_out, fan_in) in linears(base).items():
        lora[f"base_model.model.{module}.lora_A.weight"] = (256, fan_in)
        lora[f"base_model.model.{module}.lora_B.weight"] = (fan_out, 256)
    mapped = mapped_shapes(lora)
    assert (
        len(lora) == 20 * SIZES[size]["num_layers"]
        and mapped.config["rank"] == mapped.config["alpha"] == 256
    )
    assert size != "1.3B" or count(mapped) == 349_962_240


def mapped_shapes(shapes: dict[str, tuple[int, ...]]) -> Mapped:
    """The mapping of tensors of one number each, seen in these shapes."""
    tensors = [
        Tensor(Path("checkpoint.pt"), None, name, np.broadcast_to(np.float32(0), shape))
        for name, shape in shapes.items()
    ]
    return map_tensors(tensors, Options())


def count(mapped: Mapped) -> int:
    """Parameters, which are float32 here."""
    return sum(t.nbytes for t in mapped.tensors) // 4


def linears(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Official name -> (out, in) of the Linears in the blocks."""
    named = re.compile(r"(blocks\..*\.(?:q|k|v|o|0|2))\.weight")
    return {m[1]: tuple(shape) for name, shape in shapes.items() if (m := named.fullmatch(name))}


# ---------------------------------------------------------------- LoRA


def block_linears(official: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with the Linears of the blocks under their official names: what peft adapts."""
    root = torch.nn.Module()
    for name, (fan_out, fan_in) in linears(
        {name: tensor.shape for name, tensor in official.items()}
    ).items():
        module, (*parents, last) = root, name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        linear = torch.nn.Linear(fan_in, fan_out)
        linear.load_state_dict({n: official[f"{name}.{n}"] for n in ("weight", "bias")})
        module.add_module(last, linear)
    return root


def in_memory(state: dict) -> dict:
    """The parameters of a wrapped model, as KVPO's EMA names them."""

    def rename(name):
        return f"model.base_model.model.{name}".replace(".weight", ".default.weight")

    return {rename(name): tensor for name, tensor in state.items()}


LORAS = {
    "LongLive": lambda state, other: {
        "generator_lora": with_prefix(state, "base_model.model."),
        "critic_lora": other,
    },
    "bare": lambda state, other: with_prefix(state, "base_model.model."),
    "KVPO online": lambda state, other: kvpo(
        with_prefix(state, "base_model.model."), in_memory(other), other
    ),
    "KVPO ema": lambda state, other: kvpo(
        with_prefix(other, "base_model.model."), in_memory(state), other
    ),
    "KVPO initial": lambda state, other: kvpo(
        other, in_memory(other), with_prefix(state, "base_model.model.")
    ),
}


def kvpo(online: dict, ema: dict, initial: dict) -> dict:
    return {
        "step": 5,
        "_accum_count": 0,
        "samples_seen": 160,
        "rollout_count": 10,
        "generator_lora": online,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-5}]},
        "lr_scheduler": {"last_epoch": 5},
        "ema": ema,
        "initial_generator_lora": initial,
    }


@pytest.mark.parametrize("release", LORAS)
def test_lora_checkpoints(lora, tmp_path, release):
    others = {name: torch.zeros_like(tensor) for name, tensor in lora.items()}
    torch.save(LORAS[release](lora, others), tmp_path / "lora.pt")
    policy = release.removeprefix("KVPO ") if release.startswith("KVPO") else "online"
    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors", policy=policy, alpha=6.0)
    ours = tensors_of(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(
        ours["text_kv/k/a"][1], lora["blocks.1.cross_attn.k.lora_A.weight"].T
    )
    np.testing.assert_array_equal(ours["blocks/ffn_0/b"][0], lora["blocks.0.ffn.0.lora_B.weight"].T)
    metadata = metadata_of(tmp_path / "out.safetensors")
    config = wan_lora_weights.LoRAConfig(**json.loads(metadata["config"]))
    assert metadata["kind"] == "wan_lora"
    assert config == wan_lora_weights.LoRAConfig(
        dim=96, ffn_dim=160, num_layers=2, rank=4, alpha=6.0
    )
    checkpoint.load_weights(tmp_path / "out.safetensors", wan_lora_weights.abstract_lora(config))


def test_alpha_is_upstreams_default_or_what_the_adapter_says(lora, tmp_path):
    torch.save(with_prefix(lora, "base_model.model."), tmp_path / "lora.pt")

    def alpha():
        return json.loads(metadata_of(tmp_path / "out.safetensors")["config"])["alpha"]

    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")
    assert alpha() == 4.0  # the rank
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")
    assert alpha() == 12.0
    with pytest.raises(ValueError, match=r"alpha is not one: 6 \(--alpha\), 12 \(.*lora.pt\)"):
        convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors", alpha=6.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(ValueError, match="states no lora_alpha, for which peft takes 8; .*--alpha"):
        convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")
    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors", alpha=8.0)
    assert alpha() == 8.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 64}))
    with pytest.raises(ValueError, match="config says that blocks.* has rank 64, its .* rank 4"):
        convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")
    (tmp_path / "adapter_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="adapter_config.json holds a list, expected a JSON obj"):
        convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")


def test_an_alpha_that_is_not_a_number(lora, tmp_path):
    state = with_prefix(lora, "diffusion_model.")
    pair = {"diffusion_model.blocks.0.ffn.0.alpha": torch.ones(2)}
    safetensors.torch.save_file(state | pair, tmp_path / "lora.safetensors")
    fails(r"ffn.0.alpha has the shape \[2\], expected one number", tmp_path, tmp_path)
    for adapter, message in (
        ("[1]", "its lora_adapter_metadata is not a JSON object"),
        ("{", "its lora_adapter_metadata is not a JSON object"),
        ('{"transformer.lora_alpha": "4"}', r"alpha is '4' \(.*lora.safetensors\), expected a n"),
    ):
        metadata = {"lora_adapter_metadata": adapter}
        safetensors.torch.save_file(state, tmp_path / "lora.safetensors", metadata)
        fails(message, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["head"]},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa_niter_4"},
        {"rank_pattern": [2]},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_diffusers_metadata_says_and_is_not_supported(lora, tmp_path, said):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    named = {
        wan_lora_weights.LORA_NAMES["diffusers"](name): tensor for name, tensor in lora.items()
    }

    def convert_with(config):
        adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
        safetensors.torch.save_file(named, path, {"lora_adapter_metadata": adapter})
        convert([path], out)

    convert_with({"r": 4, "lora_alpha": 12, **dict.fromkeys(said)})
    assert json.loads(metadata_of(out)["config"])["alpha"] == 12.0
    # What stands beside the file does not overrule it, nor the other way round.
    for beside, within, place in (
        ({}, said, "lora.safetensors"),
        (said, {}, "adapter_config.json"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
        with pytest.raises(ValueError) as error:
            convert_with({"r": 4, "lora_alpha": 4, **within})
        assert next(iter(said)) in str(error.value) and f"{place} " in str(error.value)


def test_an_adapter_that_peft_saved(official, tmp_path):
    """peft's own files, of a module with the official names."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"]
    )
    adapted = redrawn(peft.get_peft_model(block_linears(official), config))
    adapted.save_pretrained(tmp_path / "adapter")
    convert([tmp_path / "adapter"], tmp_path / "out.safetensors")
    config = json.loads(metadata_of(tmp_path / "out.safetensors")["config"])
    assert (config["rank"], config["alpha"]) == (4, 6.0)
    ours = tensors_of(tmp_path / "out.safetensors")
    for name, tensor in peft.get_peft_model_state_dict(adapted).items():
        path, layer = wan_lora_weights.lora_table(2)[name.removeprefix("base_model.model.")]
        np.testing.assert_array_equal(ours[path][layer], tensor.T)


@pytest.mark.golden
def test_golden_lora_forward(golden_dir, tmp_path):
    """Two blocks of the released generator with a LoRA, from its own state dicts through the
    converter.
    """
    sizes = json.loads((golden_dir / "config_tiny.json").read_text())
    names = json.loads((golden_dir / "lora_names.json").read_text())
    data, weights = np.load(golden_dir / "lora.npz"), np.load(golden_dir / "longlive_weights.npz")
    adapter = {
        name.removeprefix("lora."): torch.tensor(data[name])
        for name in data.files
        if name.startswith("lora.")
    }
    assert {name: list(tensor.shape) for name, tensor in adapter.items()} == names[
        "peft_state_dict"
    ]
    torch.save({"generator_lora": adapter}, tmp_path / "lora.pt")
    torch.save(
        {"generator": {f"model.{n}": torch.tensor(weights[n]) for n in weights.files}},
        tmp_path / "model.pt",
    )
    convert([tmp_path / "lora.pt"], tmp_path / "lora.safetensors", alpha=names["alpha"])
    convert(
        [tmp_path / "model.pt"],
        tmp_path / "model.safetensors",
        num_heads=sizes["num_heads"],
        text_len=sizes["text_len"],
    )
    lora = wan_lora_weights.LoRAConfig(
        **json.loads(metadata_of(tmp_path / "lora.safetensors")["config"])
    )
    config = json.loads(metadata_of(tmp_path / "model.safetensors")["config"])
    cfg = WanConfig(
        **config | {"patch": tuple(config["patch"])}, lora_rank=lora.rank, lora_alpha=lora.alpha
    )
    variables = {
        "params": checkpoint.load_weights(
            tmp_path / "model.safetensors", wan_weights.abstract_params(cfg)
        ),
        "lora": checkpoint.load_weights(
            tmp_path / "lora.safetensors", wan_lora_weights.abstract_lora(lora)
        ),
    }

    frames, tokens = sizes["num_frame_per_block"], sizes["tokens_per_frame"]
    window = routing.Window(
        sizes["sink_size"],
        sizes["local_attn_size"] - sizes["sink_size"] - frames,
        0,
        frames,
        cache_frames=33,
    )
    sampler = {
        "steps": tuple(s / 1000 for s in sizes["denoising_step_list"]),
        "shift": sizes["timestep_shift"],
        "solver": "renoise",
        "context_step": 0.001,
    }
    schedule = flow.schedule(ConfigDict(sampler))

    def latent(name):
        return jnp.asarray(np.moveaxis(data[f"fwd.{name}"], -3, -1))  # [..., F, Y, X, C]

    shape = kv_cache.KVShape(cfg.num_layers, tokens, cfg.num_heads, cfg.head_dim)
    history = kv_cache.empty(shape, (1,), 33, window.sink, jnp.float32)
    text = Wan(cfg).apply(variables, data["fwd.prompt_embeds"], method="encode_text")
    network = functools.partial(Wan(cfg).apply, variables)
    step = jax.jit(functools.partial(denoise_block, network, schedule))
    for block, first in enumerate(data["fwd.start_frame"]):
        start = latent("init_noise")[:, block * frames : (block + 1) * frames]
        noise = jnp.concatenate([start, latent("noise")[block]])[None]
        default = routing.deployment_frames(window, first)
        context = jnp.broadcast_to(default, (1, 1, noise.shape[1], window.slots))
        record, kv = step(text, history, None, context, noise, first)
        history = kv_cache.append(history, kv, first)
        np.testing.assert_allclose(record.u[0, 0], latent("flow")[block, :-1], atol=2e-5, rtol=0)
        np.testing.assert_allclose(record.x_clean[0, 0], latent("x0")[block, -2], atol=2e-5, rtol=0)


# ---------------------------------------------------------------- text encoder


UMT5 = transformers.UMT5Config(
    vocab_size=64,
    d_model=32,
    d_kv=6,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=1,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)


def umt5_output(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    cfg = umt5.UMT5Config(**json.loads(metadata_of(path)["config"]))
    params = checkpoint.load_weights(path, umt5.abstract_params(cfg))
    return np.asarray(umt5.UMT5Encoder(cfg).apply({"params": params}, ids, mask))


@pytest.mark.parametrize(
    "model", [transformers.UMT5EncoderModel, transformers.UMT5ForConditionalGeneration]
)
def test_a_umt5_folder_of_transformers(tmp_path, model):
    """The encoder alone, or the whole model that Hugging Face has, in .bin shards as there."""
    torch.manual_seed(2)
    theirs = redrawn(model(UMT5)).eval()
    folder = tmp_path / "text_encoder"
    if model is transformers.UMT5EncoderModel:
        theirs.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
    else:
        theirs.config.save_pretrained(folder)
        torch.save(
            theirs.state_dict(), folder / "pytorch_model.bin"
        )  # with the tied embedding twice
    convert([tmp_path], tmp_path / "umt5.safetensors", kind="umt5")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, 64, (2, 40)), np.arange(40) < np.array([[40], [23]])
    with torch.no_grad():
        out = theirs.get_encoder()(
            torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).last_hidden_state.numpy()
    ours = umt5_output(tmp_path / "umt5.safetensors", ids, mask)
    np.testing.assert_allclose(ours[mask], out[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "prefix", ["", "text_encoders.umt5xxl.transformer.", "cond_stage_model.umt5xxl.transformer."]
)
def test_the_text_encoder_of_comfyui(tmp_path, prefix):
    """It has the names of transformers, and the tokenizer and a scale beside them."""
    theirs = redrawn(transformers.UMT5EncoderModel(UMT5))
    state = {name: x for name, x in theirs.state_dict().items() if "embed_tokens" not in name}
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    beside = {"spiece_model": torch.ones(9, dtype=torch.uint8), "logit_scale": torch.tensor(4.6)}
    root = prefix.removesuffix("transformer.")
    both = with_prefix(state, prefix) | with_prefix(beside, root)
    safetensors.torch.save_file(both, tmp_path / "comfyui.safetensors")
    files = [tmp_path / f"{name}-umt5.safetensors" for name in ("plain", "comfyui")]
    for file in files:
        convert([tmp_path / file.name.replace("-umt5", "")], file)
    assert_same(*map(tensors_of, files))


@pytest.mark.golden
def test_golden_umt5(golden_dir, tmp_path):
    data = np.load(golden_dir / "t5.npz")
    state = {
        name.removeprefix("w."): torch.tensor(data[name])
        for name in data.files
        if name.startswith("w.")
    }
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "google").mkdir()
    convert([tmp_path], tmp_path / "umt5.safetensors", kind="umt5")
    out = umt5_output(tmp_path / "umt5.safetensors", data["ids"], data["mask"].astype(bool))
    valid = data["mask"].astype(bool)
    np.testing.assert_allclose(out[valid], data["out"][valid], atol=2e-5, rtol=0)


# ---------------------------------------------------------------- VAE


STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}


@pytest.mark.parametrize("res_blocks", [1, 2])
def test_both_releases_of_the_vae(tmp_path, res_blocks):
    """A folder of diffusers and the official file of the same weights; the official names are
    diffusers' to check.
    """
    torch.manual_seed(3)
    model = redrawn(AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=res_blocks, **STATISTICS))
    model.save_pretrained(tmp_path / "vae")
    convert([tmp_path], tmp_path / "vae.safetensors", kind="wan_vae")
    config = json.loads(metadata_of(tmp_path / "vae.safetensors")["config"])
    statistics = dict(zip(STATISTICS, (config["latent_mean"], config["latent_std"]), strict=True))
    assert (config["base_dim"], config["z_dim"], config["num_res_blocks"], statistics) == (
        8,
        4,
        res_blocks,
        STATISTICS,
    )
    cfg = wan_vae.VAEConfig(**config)
    checkpoint.load_weights(tmp_path / "vae.safetensors", wan_vae.abstract_params(cfg))

    theirs = model.state_dict()
    official = {wan_vae_weights.official_name(name, cfg): tensor for name, tensor in theirs.items()}
    torch.save(official, tmp_path / "Wan2.1_VAE.pth")
    convert([tmp_path / "Wan2.1_VAE.pth"], tmp_path / "official.safetensors")
    assert_same(
        tensors_of(tmp_path / "official.safetensors"), tensors_of(tmp_path / "vae.safetensors")
    )
    if res_blocks == 2:  # the published size, which alone diffusers converts
        back = convert_wan_vae_to_diffusers(dict(official))
        assert back.keys() == theirs.keys() and all(
            torch.equal(back[name], tensor) for name, tensor in theirs.items()
        )


@pytest.mark.golden
def test_golden_vae(golden_dir, tmp_path):
    """The released decoder's weights through the converter; its own arithmetic is in the tests of
    the VAE.
    """
    data = np.load(golden_dir / "vae.npz")
    state = {
        name.removeprefix("w."): torch.tensor(data[name])
        for name in data.files
        if name.startswith("w.")
    }
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    convert([tmp_path / "Wan2.1_VAE.pth"], tmp_path / "vae.safetensors")
    assert metadata_of(tmp_path / "vae.safetensors")["kind"] == "wan_vae"
    ours = tensors_of(tmp_path / "vae.safetensors")
    assert len(ours) == len(state)
    np.testing.assert_array_equal(
        ours["decoder/conv1/kernel"], np.transpose(data["w.decoder.conv1.weight"], (2, 3, 4, 1, 0))
    )
    names = json.loads((golden_dir / "lora_names.json").read_text())
    assert count(mapped_shapes(names["vae_official_param_shapes"])) == 126_892_531


# ---------------------------------------------------------------- what is wrong with a file


def fails(match: str, source: Path, folder: Path, **given) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=match):
        convert([source], folder / "out" / "out.safetensors", **{**GIVEN, **given})
    assert sorted(folder.rglob("*")) == before  # nothing is left behind


def without(state: dict, name: str) -> dict:
    return {other: tensor for other, tensor in state.items() if other != name}


NAME = "blocks.1.self_attn.q.weight"


def test_missing_left_over_and_misshapen_tensors(official, lora, tmp_path):
    def save(state):
        torch.save({"generator": with_prefix(state, "model.")}, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    fails(
        rf"model.pt: missing \['{NAME}'\], left over \[\]", save(without(official, NAME)), tmp_path
    )
    more = official | {"blocks.1.img_emb.weight": torch.ones(3)}
    fails(r"model.pt: missing \[\], left over \['blocks.1.img_emb.weight'\]", save(more), tmp_path)
    wide = official | {NAME: torch.ones(96, 95)}
    fails(
        rf"model.pt: model.{NAME} makes blocks/self_q/kernel \[95, 96\]; the others make",
        save(wide),
        tmp_path,
    )
    flat = official | {"patch_embedding.weight": torch.ones(96, 24)}
    fails(r"patch_embedding.weight has the shape \[96, 24\], expected 5 axes", save(flat), tmp_path)
    image = official | {"patch_embedding.weight": torch.ones(96, 9, 1, 2, 2)}
    fails("model.pt: 9 channels in, 6 out: not a text-to-video Wan", save(image), tmp_path)
    fails(
        "a width of 96 is not made of heads of 128 .* --num_heads",
        save(official),
        tmp_path,
        num_heads=None,
    )
    fails("model.pt: the kind is wan, not umt5", save(official), tmp_path, kind="umt5")
    few = without(lora, "blocks.0.cross_attn.k.lora_B.weight")
    fails(r"missing \['blocks.0.cross_attn.k.lora_B.weight'\]", save(few), tmp_path)
    ranks = lora | {"blocks.1.ffn.0.lora_B.weight": torch.ones(160, 3)}
    fails(
        r"model.pt: model.blocks.1.ffn.0.lora_A.weight \[4, 96\] and .*lora_B.weight \[160, 3\] are"
        " not the two matrices of a LoRA",
        save(ranks),
        tmp_path,
    )
    bytes_ = official | {NAME: torch.ones(96, 96, dtype=torch.int8)}
    fails(
        f"model.pt: model.{NAME} is of type int8; expected one of F64, F32, F16, BF16",
        save(bytes_),
        tmp_path,
    )


def test_files_that_are_none(official, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(official, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    fails("model.safetensors is not a whole safetensors file", path, tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    fails("model.safetensors is not .* but a Git LFS pointer .56 bytes.; `git lfs", path, tmp_path)

    path = tmp_path / "model.pt"
    torch.save({"generator": official}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails("model.pt is cut short: its end is missing", path, tmp_path)
    path.write_bytes(b"<!DOCTYPE html>")
    fails("model.pt is not a weight file but a web page", path, tmp_path)
    path.write_bytes(b"\x01\xff" * 40)
    fails("model.pt is not a weight file: it begins neither", path, tmp_path)
    torch.save({"generator": official | {"blocks": [1, 2]}}, path)
    fails("model.pt: blocks is a list, expected a tensor", path, tmp_path)
    torch.save(torch.ones(3), path)
    fails("model.pt holds a Tensor, expected a state dict", path, tmp_path)
    torch.save({"encoder.weight": torch.ones(3)}, path)
    fails(
        "model.pt: not a checkpoint of wan_lora, wan, .*: it has 1 tensors, encoder.weight",
        path,
        tmp_path,
    )

    fails("there is no .*nothing.pt", tmp_path / "nothing.pt", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    fails("notes.txt is not a weight file but plain text", tmp_path / "notes.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    fails("empty has no weights", tmp_path / "empty", tmp_path)
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(official, tmp_path / "two" / name)
    fails("two has more than one checkpoint: name one of a.pt, b.pt", tmp_path / "two", tmp_path)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_not_finite(official, tmp_path, number):
    state = official | {NAME: official[NAME].clone()}
    state[NAME][95, 3] = number
    torch.save(state, tmp_path / "model.pt")
    for output in (tmp_path / "out.safetensors", None):  # None: a dry run
        with pytest.raises(ValueError, match=f"model.pt: {NAME} has numbers that are not finite"):
            convert([tmp_path / "model.pt"], output, **GIVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Settings:
    """An object of the program that trained a model."""


def test_what_could_run_code_is_not_read_and_no_message_advises_it(official, tmp_path):
    path, model = tmp_path / "model.pt", torch.nn.Linear(2, 2)
    known = {"generator": official, "optimizer": None}
    files = {
        "pathlib.PurePosixPath": lambda: torch.save(known | {"a": PurePosixPath("/x")}, path),
        "argparse.Namespace": lambda: torch.save(known | {"args": Namespace(lr=1)}, path),
        f"{__name__}.Settings": lambda: torch.save(known | {"cfg": Settings()}, path),
        "Settings": lambda: torch.save(
            {"cfg": Settings()}, path, _use_new_zipfile_serialization=False
        ),
        "torch.nn": lambda: torch.save(model, path),
        "such as print,": lambda: path.write_bytes(b"\x80\x02cbuiltins\nprint\n."),
        "zip archive": lambda: zipfile.ZipFile(path, "w").writestr("a", "b"),
        "or is damaged": lambda: path.write_bytes(b"\x80\x02\xff\xff\xff"),
    }
    for what, write in files.items():
        write()
        with pytest.raises(UsageError, match=f"model.pt .*{re.escape(what)}") as error:
            convert([path], tmp_path / "out.safetensors", **GIVEN)
        message = str(error.value)
        assert "weights_only" not in message and "\n" not in message and "\x1b" not in message
        assert "; " in message  # what to do


def test_a_distributed_checkpoint_is_an_error_with_a_command(official, tmp_path):
    torch.distributed.checkpoint.save(
        {NAME: official[NAME]}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    fails(
        r"dcp is a distributed checkpoint; .*dcp_to_torch .*dcp FILE.pt", tmp_path / "dcp", tmp_path
    )


def test_the_same_weights_in_another_format_beside_them(official, expected, tmp_path):
    safetensors.torch.save_file(official, tmp_path / "diffusion_pytorch_model.safetensors")
    half = {name: tensor.half() for name, tensor in official.items()}
    safetensors.torch.save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    convert([tmp_path], tmp_path / "out" / "out.safetensors", **GIVEN)
    assert_same(tensors_of(tmp_path / "out" / "out.safetensors"), expected)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model", "model.pt"])
def test_the_first_bytes_say_what_a_file_is_not_its_name(official, expected, tmp_path, name):
    for save in (torch.save, safetensors.torch.save_file):
        save(official, tmp_path / name)
        convert([tmp_path / name], tmp_path / "out.safetensors", **GIVEN)
        assert_same(tensors_of(tmp_path / "out.safetensors"), expected)


def test_a_model_of_another_size_is_one_sentence(official, lora, tmp_path):
    torch.save(official, tmp_path / "model.pt")
    torch.save(lora, tmp_path / "lora.pt")
    base, adapter = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    convert([tmp_path / "model.pt"], base, **GIVEN)
    convert([tmp_path / "lora.pt"], adapter, alpha=6.0)
    backbone.load_params(base, dataclasses.replace(CFG, text_len=3))
    backbone.load_lora(adapter, CFG)
    other = dataclasses.replace(CFG, dim=1536, num_layers=30)
    message = (
        "is for a model of another size: it has dim 96, num_layers 2, the config model.dim=1536,"
        " model.num_layers=30; bring weights of the config's size"
    )
    for path, load in ((base, backbone.load_params), (adapter, backbone.load_lora)):
        with pytest.raises(UsageError, match=f"{path.name} {message}"):
            load(path, other)
    with pytest.raises(UsageError, match="lora.safetensors holds 'wan_lora', expected 'wan'"):
        backbone.load_params(adapter, CFG)


def test_shards_that_do_not_belong_together(official, tmp_path):
    index = save_shards(official, tmp_path)
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    content["weight_map"]["blocks.0.extra"] = first
    index.write_text(json.dumps(content))
    fails(f"index.json: blocks.0.extra is in None, the index says {first}", tmp_path, tmp_path)
    save_shards(official, tmp_path)
    (tmp_path / first).unlink()
    fails(f"there is no .*{first}", tmp_path, tmp_path)
    index.write_text("{")
    fails("index.json is not the index of a sharded checkpoint", index, tmp_path)
    index.unlink()
    safetensors.torch.save_file(
        official, tmp_path / first
    )  # a whole checkpoint beside a shard of another
    safetensors.torch.save_file({NAME: torch.ones(96, 96)}, tmp_path / "other.safetensors")
    fails(f"are different tensors for {NAME}", tmp_path, tmp_path)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def broken():
        raise OSError("no space left on device")

    stored = [
        weight_file.Stored(
            "a", (4, 2), np.dtype(np.float32), (lambda: np.ones((2, 2), np.float32), broken)
        )
    ]
    with pytest.raises(OSError, match="no space left"):
        weight_file.write_safetensors(tmp_path / "out.safetensors", stored, {})
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    for arguments, message in (
        (["nothing.pt", "--output=out.safetensors"], "error: there is no nothing.pt"),
        (
            ["nothing.pt", "--output=out.bin"],
            "error: --output=out.bin does not end in .safetensors",
        ),
        (
            ["nothing.pt"],
            "error: expected one or more sources, and either --output=FILE or --dry-run",
        ),
        (
            ["nothing.pt", "--ouput=out.safetensors"],
            "error: there is no flag --ouput; did you mean 'output'?",
        ),
    ):
        done = run_command("-m", "kvpo_jax.convert.convert_weights", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, flags",
    [
        (
            "convert_weights",
            "alpha base [no]dry-run dtype [no]ema kind num_heads output policy templates text_len",
        ),
        ("export_lora", "base format iteration lora output policy workdir"),
        ("encode_prompts", "batch dtype max_length output prompts tokenizer weights"),
    ],
)
def test_help_is_the_command_s_own_however_it_is_started(command, flags, tmp_path):
    module = f"kvpo_jax.convert.{command}"
    usage = (importlib.import_module(module).__doc__ or "").strip()
    for entry in ([ROOT / "tools" / f"{command}.py"], ["-m", module]):
        done = subprocess.run(
            [sys.executable, *entry, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.startswith(usage) and not done.stderr
        assert re.findall(r"^  --([^:]+):", done.stdout, re.MULTILINE) == flags.split()


def test_nothing_else_in_the_package_imports_the_converter():
    package = ROOT / "kvpo_jax"
    for path in package.rglob("*.py"):
        if package / "convert" not in path.parents:
            assert not re.search(
                r"kvpo_jax\.convert\b|kvpo_jax import .*\bconvert\b", path.read_text()
            )


# ---------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_peak_memory_is_below_the_largest_group(tmp_path, suffix):
    """2 GB, 21 blocks of the width of Wan2.1-1.3B: the largest group, 21 kernels of the MLP, has
    578 MB.

    What is counted is the memory that the whole process has for itself, interpreter and libraries
    included; pages of the mapped checkpoint are the system's to take back.
    """
    sizes = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 21}
    shapes = {
        n: s for n, s in official_shapes("1.3B").items() if not re.match(r"blocks\.2[1-9]\.", n)
    }
    state = {
        name: torch.full(shape, i / 512, dtype=torch.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    source, output = tmp_path / f"model.{suffix}", tmp_path / "out.safetensors"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(state, source)
    assert source.stat().st_size > 2e9
    group = sizes["num_layers"] * sizes["dim"] * sizes["ffn_dim"] * 2
    command = [sys.executable, ROOT / "tools" / "convert_weights.py", source, f"--output={output}"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(
            [peak, *(1024 * int(kb) for kb in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))]
        )
        time.sleep(0.005)
    try:
        assert process.returncode == 0
        assert peak < 1.3 * group
        with safetensors.safe_open(output, framework="numpy") as file:
            last = file.get_slice("blocks/ffn_0/kernel")[20]
            assert last.shape == (1536, 8960)
            assert np.all(last == state["blocks.20.ffn.0.weight"][0, 0].float().numpy())
            assert sum(np.prod(file.get_slice(name).get_shape()) for name in file.keys()) == sum(
                tensor.numel() for tensor in state.values()
            )
    finally:
        source.unlink()
        output.unlink(missing_ok=True)
    print(f"peak {peak / 1e6:.0f} MB, largest group {group / 1e6:.0f} MB")
