"""LoRAs under the names, ranks and scales of other programs, with peft and diffusers as the judges;
and adapters and models that are known and cannot be used.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from convert_weights_test import (
    CFG,
    assert_same,
    block_linears,
    convert,
    diffusers_transformer,
    metadata_of,
    official_state,
    random_lora,
    redrawn,
    tensors_of,
)
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers

from kvpo_jax.convert import unusable
from kvpo_jax.convert.wan_lora_weights import lora_table
from kvpo_jax.convert.wan_weights import DIFFUSERS_BLOCK, diffusers_name
from kvpo_jax.errors import UsageError

TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
ALPHA = 6.0


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    return random_lora()


@pytest.fixture(scope="module")
def linears() -> Callable[[], torch.nn.Module]:
    """Makes a module with the Linears of the blocks, for peft to adapt."""
    return functools.partial(block_linears, official_state(diffusers_transformer()))


def updates(path: Path) -> dict[str, np.ndarray]:
    """Official module -> the update [out, in] that a converted LoRA adds to its weight."""
    tensors, config = tensors_of(path), json.loads(metadata_of(path)["config"])
    out = {}
    for name, (place, layer) in lora_table(CFG.num_layers).items():
        stack = place.rpartition("/")[0]
        a, b = (tensors[f"{stack}/{matrix}"][layer].astype(np.float32) for matrix in "ab")
        out[name.split(".lora_")[0]] = config["alpha"] / config["rank"] * (a @ b).T
    return out


def converted(source: Path, **given) -> dict[str, np.ndarray]:
    output = source.with_name("out.safetensors")
    convert([source], output, **given)
    return updates(output)


def assert_updates(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) == 20
    for name, update in theirs.items():
        np.testing.assert_allclose(ours[name], update.detach(), atol=1e-5, rtol=0, err_msg=name)


# ---------------------------------------------------------------- names


def underscored(module: str) -> str:
    return module.replace(".", "_")


def of_diffusers(module: str) -> str:
    block, number, name = module.split(".", 2)
    return f"{block}.{number}.{DIFFUSERS_BLOCK[name]}"


KOHYA = ("lora_down.weight", "lora_up.weight")
# Program -> (module by official name -> its name there, names of the two matrices).
NAMINGS = {
    "musubi-tuner": (lambda m: f"lora_unet_{underscored(m)}", KOHYA),
    "Wan Fun": (lambda m: f"lora_unet__{underscored(m)}", KOHYA),
    "OneTrainer": (lambda m: f"lora_transformer_{underscored(of_diffusers(m))}", KOHYA),
    "OneTrainer, dotted": (lambda m: f"transformer.{of_diffusers(m)}", KOHYA),
    "LyCORIS": (lambda m: f"lycoris_{underscored(m)}", KOHYA),
    "ComfyUI": (lambda m: f"diffusion_model.{m}", KOHYA),
    "diffusers, unet": (lambda m: f"unet.{of_diffusers(m)}", ("lora_A.weight", "lora_B.weight")),
    "diffusers, old": (
        lambda m: f"transformer.{of_diffusers(m)}",
        ("lora.down.weight", "lora.up.weight"),
    ),
    "peft, default_0": (
        lambda m: f"base_model.model.{m}",
        ("lora_A.default_0.weight", "lora_B.default_0.weight"),
    ),
    "DiffSynth": (lambda m: f"pipe.dit.{m}", ("lora_A.default.weight", "lora_B.default.weight")),
    "LongLive, FSDP": (
        lambda m: f"model.base_model.model._fsdp_wrapped_module.{m}",
        ("lora_A.generator.weight", "lora_B.generator.weight"),
    ),
}


@pytest.mark.parametrize("program", NAMINGS)
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_a_lora_is_read_under_the_names_of(lora, tmp_path, program, alpha):
    rename, (down, up) = NAMINGS[program]
    state = {}
    for name, tensor in lora.items():
        module, matrix = name.split(".lora_")
        state[f"{rename(module)}.{down if matrix[0] == 'A' else up}"] = tensor
        if alpha is not None:
            state[f"{rename(module)}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    safetensors.torch.save_file(state, tmp_path / "lora.safetensors")
    convert([tmp_path / "lora.safetensors"], tmp_path / "out.safetensors")
    torch.save(lora, tmp_path / "plain.pt")
    convert([tmp_path / "plain.pt"], tmp_path / "plain.safetensors", alpha=alpha)
    assert_same(
        tensors_of(tmp_path / "out.safetensors"), tensors_of(tmp_path / "plain.safetensors")
    )
    configs = [metadata_of(tmp_path / f"{name}.safetensors")["config"] for name in ("out", "plain")]
    assert configs[0] == configs[1]


def test_musubis_names_mean_what_diffusers_takes_them_for(lora, tmp_path):
    state = {}
    for i, (name, tensor) in enumerate(lora.items()):
        module, matrix = name.split(".lora_")
        key = f"lora_unet_{underscored(module)}"
        state[f"{key}.{KOHYA[matrix[0] == 'B']}"] = tensor
        state[f"{key}.alpha"] = torch.tensor(1.0 + i // 2 % 3)  # 1, 2 or 3, by module
    safetensors.torch.save_file(state, tmp_path / "lora.safetensors")
    theirs = _convert_musubi_wan_lora_to_diffusers(dict(state))
    expected = {
        name.split(".lora_")[0]: theirs[f"transformer.{diffusers_name(name)}"]
        @ theirs[f"transformer.{diffusers_name(name.replace('lora_B', 'lora_A'))}"]
        for name in lora
        if "lora_B" in name
    }
    assert_updates(converted(tmp_path / "lora.safetensors"), expected)


# ---------------------------------------------------------------- ranks and scales, by peft itself


def adapted(linears, name: str = "default", **fields) -> tuple[peft.PeftModel, dict]:
    """A model with an adapter, and official module -> the update that peft computes."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    model = redrawn(peft.get_peft_model(linears(), config, adapter_name=name))
    layers = {
        module: layer.get_delta_weight(name)
        for module, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    return model, layers


PATTERNS = {
    "one rank": {},
    "rslora": {"use_rslora": True},
    "ranks by module": {"rank_pattern": {"ffn.0": 2, r"blocks\.1\.self_attn\.q": 7}},
    "alphas by module": {"alpha_pattern": {"k": 3, "ffn.2": 5}},
    "both": {
        "rank_pattern": {"cross_attn.v": 3, "o": 5},
        "alpha_pattern": {"v": 1.5, "blocks.0.ffn.2": 12},
    },
    "all of it": {"rank_pattern": {"q": 9}, "alpha_pattern": {"v": 5}, "use_rslora": True},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranks_and_alphas_of_peft(linears, tmp_path, pattern):
    model, expected = adapted(linears, **PATTERNS[pattern])
    model.save_pretrained(tmp_path / "adapter")
    assert_updates(converted(tmp_path / "adapter"), expected)
    # The largest rank, and no larger one.
    ranks = {4, *PATTERNS[pattern].get("rank_pattern", {}).values()}
    config = json.loads(metadata_of(tmp_path / "out.safetensors")["config"])
    assert config["rank"] == max(ranks)


def test_an_adapter_of_any_name(linears, tmp_path):
    """In peft's folder, and in memory."""
    model, expected = adapted(linears, name="generator_2")
    model.save_pretrained(tmp_path / "adapter")
    assert_updates(converted(tmp_path / "adapter" / "generator_2"), expected)
    state = {name: x for name, x in model.state_dict().items() if "lora_" in name}
    assert any(name.endswith("lora_A.generator_2.weight") for name in state)
    torch.save({"generator_lora": state}, tmp_path / "lora.pt")
    assert_updates(converted(tmp_path / "lora.pt", alpha=6.0), expected)

    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=TARGETS))
    state = {name: x for name, x in model.state_dict().items() if "lora_" in name}
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(UsageError, match="it has the adapters generator_2, other; save one of th"):
        converted(tmp_path / "lora.pt")


def test_bits_stay_where_one_rank_and_scale_is_stated(lora, tmp_path):
    """Nothing is padded or folded without need."""
    half = {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}
    torch.save(half, tmp_path / "lora.pt")
    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors", alpha=7.3)
    assert json.loads(metadata_of(tmp_path / "out.safetensors")["config"])["alpha"] == 7.3
    b = tensors_of(tmp_path / "out.safetensors")["blocks/ffn_0/b"][1]
    name = "blocks.1.ffn.0.lora_B.weight"
    assert b.dtype.name == "bfloat16" and np.array_equal(b.astype(np.float32), half[name].float().T)


def test_a_padded_lora_has_the_original_numbers_and_zeros(lora, tmp_path):
    a, b = "blocks.0.ffn.0.lora_A.weight", "blocks.0.ffn.0.lora_B.weight"
    state = lora | {a: lora[a][:3].clone(), b: lora[b][:, :3].clone()}
    torch.save(state, tmp_path / "lora.pt")
    convert([tmp_path / "lora.pt"], tmp_path / "out.safetensors")  # a scale of 1 everywhere
    ours = tensors_of(tmp_path / "out.safetensors")
    for name, tensor in state.items():
        place, layer = lora_table(CFG.num_layers)[name]
        expected = np.zeros(ours[place][layer].shape, np.float32)
        expected[: tensor.shape[1], : tensor.shape[0]] = tensor.T
        np.testing.assert_array_equal(ours[place][layer], expected)


# ---------------------------------------------------------------- what cannot be used


def of_peft(config: peft.PeftConfig, linears) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(peft.get_peft_model(linears(), config))


TINY_DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
}


def image_to_video(linears) -> dict[str, torch.Tensor]:
    """diffusers' Wan2.1-I2V, tiny."""
    image = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
    return WanTransformer3DModel(**TINY_DIFFUSERS, **image).state_dict()


def vace(linears) -> dict[str, torch.Tensor]:
    return WanVACETransformer3DModel(**TINY_DIFFUSERS, vace_layers=[0]).state_dict()


def vae_of_wan22(linears) -> dict[str, torch.Tensor]:
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    ).state_dict()


def with_names(*names: str) -> Callable[..., dict[str, torch.Tensor]]:
    """A LoRA of every Linear that has these tensors too."""
    return lambda linears: random_lora() | {name: torch.ones(2) for name in names}


def wan_with(*names: str, dtype: torch.dtype = torch.float32) -> Callable[..., dict]:
    """A Wan with tensors of these names too."""

    def make(linears):
        state = official_state(diffusers_transformer())
        return {n: x.to(dtype) for n, x in state.items()} | {n: torch.ones(2) for n in names}

    return make


UNUSABLE = {
    "a DoRA": functools.partial(
        of_peft, peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    ),
    "a DoRA, ": with_names("diffusion_model.blocks.0.ffn.0.dora_scale"),
    "an adapter of LyCORIS": functools.partial(
        of_peft, peft.LoHaConfig(r=4, target_modules=TARGETS)
    ),
    "an adapter of LyCORIS ": functools.partial(
        of_peft, peft.LoKrConfig(r=4, target_modules=TARGETS)
    ),
    "a LoRA that changes whole weights or biases": with_names("blocks.0.norm3.diff"),
    "a LoRA that changes whole weights": with_names("lora_unet_blocks_0_ffn_0.diff_b"),
    "a LoRA that changes": functools.partial(
        of_peft, peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True)
    ),
    "a LoRA that adapts the text encoder": with_names("lora_te_encoder.lora_down.weight"),
    "an image-to-video Wan": image_to_video,
    "an image-to-video": with_names("lora_unet_blocks_0_cross_attn_k_img.lora_down.weight"),
    "an image": with_names("diffusion_model.blocks.0.cross_attn.v_img.lora_A.weight"),
    "VACE": vace,
    "VACE, a": wan_with("vace_blocks.0.self_attn.q.weight", "vace_patch_embedding.weight"),
    "scaled float8": wan_with("blocks.0.ffn.0.scale_weight", "scaled_fp8"),
    "float8 ": wan_with(dtype=torch.float8_e4m3fn),
    "quantised": wan_with("blocks.0.ffn.0.weight.absmax", "blocks.0.ffn.0.weight.quant_map"),
    "a Wan with inputs of its own": wan_with("control_adapter.conv.weight"),
    "CLIP": lambda linears: {"visual.transformer.0.attn.to_qkv.weight": torch.ones(2)},
    "Wan2.2's VAE": vae_of_wan22,
    "Wan2.2's VAE, of": lambda linears: {
        "encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.ones(2),
        "decoder.conv1.weight": torch.ones(2),
    },
    "a shard of FSDP": wan_with("_flat_param"),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("what", UNUSABLE)
def test_one_sentence_says_what_a_checkpoint_is_and_what_to_do(linears, tmp_path, what, suffix):
    state = {name: x.contiguous() for name, x in UNUSABLE[what](linears).items()}
    path = tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pt" else safetensors.torch.save_file)(state, path)
    with pytest.raises(UsageError) as error:
        convert([path], tmp_path / "out.safetensors")
    message = str(error.value).removeprefix(f"{path}: ")
    assert message.startswith(f"this is {what.strip(', ')}") and "; " in message
    assert "\n" not in message and len(message) < 300
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_every_sentence_is_reached(linears):
    shown = [f"this is {what.strip(', ')}" for what in UNUSABLE]
    for sentence in unusable._MARKS:
        assert any(f"this is {sentence}".startswith(start) for start in shown), sentence
