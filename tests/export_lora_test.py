"""A LoRA goes back to PyTorch bit for bit, and peft and diffusers compute with it what our model
does.
"""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from convert_weights_test import (
    CFG,
    GIVEN,
    ROOT,
    assert_same,
    block_linears,
    convert,
    diffusers_transformer,
    diffusers_velocity,
    inputs,
    metadata_of,
    official_state,
    random_lora,
    tensors_of,
    tree,
    velocity,
)
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from equipment import fresh_variables, run_command

from kvpo_jax import adapters
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.convert.export_lora import export
from kvpo_jax.convert.wan_lora_weights import lora_table
from kvpo_jax.convert.wan_weights import BLOCK_LINEARS
from kvpo_jax.models.layers import LoRADense
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import write_json

OUTPUTS = {
    "peft": ["adapter", "lora.pt"],
    "diffusers": ["lora.safetensors"],
    "comfyui": ["lora.safetensors"],
}
FORMATS = [(format, output) for format, outputs in OUTPUTS.items() for output in outputs]


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return official_state(diffusers_transformer())


@pytest.fixture(scope="module")
def folder(official, tmp_path_factory) -> Path:
    """base.safetensors and lora.safetensors, converted."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save(official, folder / "model.pt")
    convert([folder / "model.pt"], folder / "base.safetensors", **GIVEN)
    state = {f"base_model.model.{name}": tensor for name, tensor in random_lora().items()}
    torch.save({"generator_lora": state}, folder / "lora.pt")
    convert([folder / "lora.pt"], folder / "lora.safetensors", alpha=CFG.lora_alpha)
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> np.ndarray:
    """Our velocity with the LoRA."""
    params, lora = tensors_of(folder / "base.safetensors"), tensors_of(folder / "lora.safetensors")
    return velocity({"params": tree(params), "lora": tree(lora)}, *inputs())


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("format, output", FORMATS)
def test_round_trip_is_exact(folder, tmp_path, format, output):
    export(tmp_path / output, format, lora=folder / "lora.safetensors")
    alpha = CFG.lora_alpha if output == "lora.pt" else None  # a .pt says nothing of alpha
    convert([tmp_path / output], tmp_path / "back.safetensors", alpha=alpha)
    assert_same(tensors_of(tmp_path / "back.safetensors"), tensors_of(folder / "lora.safetensors"))
    assert (
        metadata_of(tmp_path / "back.safetensors")["config"]
        == metadata_of(folder / "lora.safetensors")["config"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        output,
        "back.safetensors",
        "back.safetensors.manifest.json",
    }


@pytest.mark.golden
def test_the_released_adapter_comes_back(golden_dir, tmp_path):
    """The state dict that peft made in the authors' code, to ours and back."""
    data = np.load(golden_dir / "lora.npz")
    theirs = {
        name.removeprefix("lora."): torch.tensor(data[name])
        for name in data.files
        if name.startswith("lora.")
    }
    torch.save({"generator_lora": theirs, "critic_lora": {}}, tmp_path / "theirs.pt")
    convert([tmp_path / "theirs.pt"], tmp_path / "lora.safetensors")
    export(tmp_path / "ours.pt", "peft", lora=tmp_path / "lora.safetensors")
    back = torch.load(tmp_path / "ours.pt", weights_only=True)["generator_lora"]
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


# ---------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def peft_outputs(folder):
    """(module name, in) -> the output of our LoRADense."""
    params, lora = tensors_of(folder / "base.safetensors"), tensors_of(folder / "lora.safetensors")
    x = {
        width: np.random.default_rng(3).normal(size=(5, width)).astype(np.float32)
        for width in (96, 160)
    }
    outputs = {}
    for name, (path, layer) in lora_table(CFG.num_layers).items():
        path = path.rpartition("/")[0]
        variables = {
            "params": {n: params[f"{path}/{n}"][layer] for n in ("kernel", "bias")},
            "lora": {n: lora[f"{path}/{n}"][layer] for n in "ab"},
        }
        fan_in, features = variables["params"]["kernel"].shape
        dense = LoRADense(features, CFG.lora_rank, CFG.lora_alpha)
        outputs[name.split(".lora_")[0]] = x[fan_in], np.asarray(dense.apply(variables, x[fan_in]))
    return outputs


def test_peft_loads_the_folder(official, folder, tmp_path, peft_outputs):
    export(tmp_path / "adapter", "peft", lora=folder / "lora.safetensors")
    model = peft.PeftModel.from_pretrained(block_linears(official), tmp_path / "adapter")
    assert_peft_computes(model, peft_outputs)
    assert set(model.peft_config["default"].target_modules) == set(BLOCK_LINEARS)


def test_longlive_loads_the_pt(official, folder, tmp_path, peft_outputs):
    """As the released inference code does: an adapter of its config, then
    set_peft_model_state_dict.
    """
    export(tmp_path / "lora.pt", "peft", lora=folder / "lora.safetensors")
    targets = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    model = peft.get_peft_model(
        block_linears(official), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    )
    state = torch.load(tmp_path / "lora.pt", weights_only=True)["generator_lora"]
    assert state.keys() == peft.get_peft_model_state_dict(model).keys()
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert_peft_computes(model, peft_outputs)


def assert_peft_computes(
    model: peft.PeftModel, outputs: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    assert len(outputs) == 20
    for name, (x, ours) in outputs.items():
        with torch.no_grad():
            theirs = model.base_model.model.get_submodule(name)(torch.tensor(x))
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=name)


# ---------------------------------------------------------------- diffusers, ComfyUI


def test_diffusers_loads_it(folder, tmp_path, ours):
    export(tmp_path / "lora.safetensors", "diffusers", lora=folder / "lora.safetensors")
    model = diffusers_transformer()
    model.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer")
    theirs = diffusers_velocity(model, *inputs())
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_comfyui_names(official, folder, tmp_path):
    """ComfyUI looks for three tensors by the name of every weight, and adds alpha / rank up down to
    it.
    """
    export(tmp_path / "lora.safetensors", "comfyui", lora=folder / "lora.safetensors")
    state = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    adapter, used = random_lora(), set()
    for module in (name.removesuffix(".weight") for name in official if name.endswith(".weight")):
        keys = [
            f"diffusion_model.{module}.{name}"
            for name in ("lora_up.weight", "lora_down.weight", "alpha")
        ]
        if not state.keys() & set(keys):
            continue
        up, down, alpha = (state[key] for key in keys)
        used |= set(keys)
        assert torch.equal(up, adapter[f"{module}.lora_B.weight"])
        assert torch.equal(down, adapter[f"{module}.lora_A.weight"])
        assert alpha.item() == CFG.lora_alpha
        assert (up @ down).shape == official[f"{module}.weight"].shape
    assert used == state.keys() and len(used) == 60


def test_diffusers_reads_comfyuis_names(folder, tmp_path, ours):
    """diffusers' own reading of such files: it multiplies alpha / rank into the tensors."""
    export(tmp_path / "lora.safetensors", "comfyui", lora=folder / "lora.safetensors")
    state = _convert_non_diffusers_wan_lora_to_diffusers(
        safetensors.torch.load_file(tmp_path / "lora.safetensors")
    )
    model = diffusers_transformer()
    model.load_lora_adapter(state, prefix="transformer")
    np.testing.assert_allclose(ours, diffusers_velocity(model, *inputs()), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- merged


def test_merged_computes_what_the_pair_does(official, folder, tmp_path, ours):
    paths = {"lora": folder / "lora.safetensors", "base": folder / "base.safetensors"}
    export(tmp_path / "merged.safetensors", "merged", **paths)
    merged = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == official.keys()
    adapted = {name.split(".lora_")[0] for name in random_lora()}
    for name, tensor in official.items():
        assert merged[name].shape == tensor.shape
        assert torch.equal(merged[name], tensor) == (name.removesuffix(".weight") not in adapted), (
            name
        )
    convert([tmp_path / "merged.safetensors"], tmp_path / "back.safetensors", **GIVEN)
    params = tree(tensors_of(tmp_path / "back.safetensors"))
    np.testing.assert_allclose(velocity({"params": params}, *inputs()), ours, atol=1e-5, rtol=0)


def test_merged_is_what_the_released_inference_loads(official, folder, tmp_path):
    """torch.load(generator_ckpt)["generator"], strictly into a wrapper whose `model` is the Wan."""
    paths = {"lora": folder / "lora.safetensors", "base": folder / "base.safetensors"}
    for suffix in ("pt", "safetensors"):
        export(tmp_path / f"merged.{suffix}", "merged", **paths)
        convert([tmp_path / f"merged.{suffix}"], tmp_path / f"{suffix}-back.safetensors", **GIVEN)
    state = torch.load(tmp_path / "merged.pt", weights_only=True)["generator"]
    assert state.keys() == {f"model.{name}" for name in official}
    assert_same(*(tensors_of(tmp_path / f"{s}-back.safetensors") for s in ("pt", "safetensors")))


def test_merging_keeps_the_number_format_of_the_base(official, folder, tmp_path):
    torch.save(
        {name: tensor.to(torch.bfloat16) for name, tensor in official.items()},
        tmp_path / "model.pt",
    )
    convert([tmp_path / "model.pt"], tmp_path / "base.safetensors", **GIVEN)
    paths = {"lora": folder / "lora.safetensors", "base": tmp_path / "base.safetensors"}
    export(tmp_path / "merged.safetensors", "merged", **paths)
    name, adapter = "blocks.1.ffn.2", random_lora()
    update = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
    expected = (official[f"{name}.weight"].to(torch.bfloat16).float() + 6 / 4 * update).to(
        torch.bfloat16
    )
    merged = safetensors.torch.load_file(tmp_path / "merged.safetensors")[f"{name}.weight"]
    export(tmp_path / "merged.pt", "merged", **paths)
    state = torch.load(tmp_path / "merged.pt", weights_only=True)["generator"]
    assert torch.equal(state[f"model.{name}.weight"], merged) and merged.dtype == torch.bfloat16
    # The sum in another order may round to the neighbour.
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=0)
    assert (merged == expected).float().mean() > 0.99


# ---------------------------------------------------------------- sums


@pytest.fixture(scope="module")
def other(folder) -> dict[str, torch.Tensor]:
    """A LoRA of another rank and alpha, 2 and 3, converted to other.safetensors."""
    torch.manual_seed(2)
    state = {}
    for name, tensor in random_lora().items():
        rows, columns = tensor.shape
        size = (2, columns) if ".lora_A." in name else (rows, 2)
        state[name] = 0.1 * torch.randn(size)
    torch.save({f"base_model.model.{name}": x for name, x in state.items()}, folder / "other.pt")
    convert([folder / "other.pt"], folder / "other.safetensors", alpha=3.0)
    return state


def test_a_sum_adds_the_updates_of_its_files(official, folder, other, tmp_path):
    """W + 0.75 * 6/4 B A - 0.5 * 3/2 B' A', and no product of one file with the other."""
    text = f"{folder / 'lora.safetensors'}:0.75, {folder / 'other.safetensors'}:-0.5"
    export(tmp_path / "merged.pt", "merged", lora=text, base=folder / "base.safetensors")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)["generator"]
    first, adapted = random_lora(), 0
    for name, tensor in official.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in first:
            adapted += 1
            for scale, state in ((0.75 * 6 / 4, first), (-0.5 * 3 / 2, other)):
                a, b = (state[f"{module}.lora_{x}.weight"].double() for x in "AB")
                tensor = tensor.double() + scale * b @ a
        torch.testing.assert_close(merged[f"model.{name}"], tensor.float())
    assert adapted == 20
    export(tmp_path / "lora.pt", "peft", lora=text)
    state = torch.load(tmp_path / "lora.pt", weights_only=True)["generator_lora"]
    shapes = {tuple(x.shape) for name, x in state.items() if "self_attn.q" in name}
    assert shapes == {(6, CFG.dim), (CFG.dim, 6)}  # the ranks 4 and 2
    name = "blocks.0.self_attn.q.lora_A.weight"
    assert torch.equal(state[f"base_model.model.{name}"], torch.cat([first[name], other[name]]))


def test_a_sum_computes_what_the_merged_weights_do(folder, other, tmp_path):
    text = f"{folder / 'lora.safetensors'},{folder / 'other.safetensors'}:2"
    found = adapters.parse(text)
    made = adapters.sizes(found)
    cfg = dataclasses.replace(CFG, lora_rank=made["rank"], lora_alpha=made["alpha"])
    assert (cfg.lora_rank, cfg.lora_alpha) == (6, 6.0)
    lora = adapters.load(found, cfg)
    export(tmp_path / "merged.safetensors", "merged", lora=text, base=folder / "base.safetensors")
    convert([tmp_path / "merged.safetensors"], tmp_path / "back.safetensors", **GIVEN)
    merged = velocity({"params": tree(tensors_of(tmp_path / "back.safetensors"))}, *inputs())
    base = tree(tensors_of(folder / "base.safetensors"))
    pair = velocity({"params": base, "lora": lora}, *inputs(), cfg)
    np.testing.assert_allclose(pair, merged, atol=1e-5, rtol=0)


def test_one_file_of_weight_one_stays_as_it_is(folder, tmp_path):
    file = folder / "lora.safetensors"
    for text in (file, f"{file}:1.0"):
        export(tmp_path / "lora.safetensors", "comfyui", lora=text)
        convert([tmp_path / "lora.safetensors"], tmp_path / "back.safetensors")
        assert_same(tensors_of(tmp_path / "back.safetensors"), tensors_of(file))
    odd = tmp_path / "a:1,b.safetensors"
    shutil.copyfile(file, odd)
    assert [(x.path, x.weight) for x in adapters.parse(str(odd))] == [(odd, 1.0)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{a}:1,{a}:x", "'x' is no number and .* no file; expected FILE, or FILE:WEIGHT"),
        ("{a}:1,", "'' is no file with a finite weight; expected FILE, or"),
        ("{a}:nan", "is no file with a finite weight"),
        (":1", "':1' is no file with a finite weight"),
        ("{a}:1,nowhere.safetensors:2", "there is no file nowhere.safetensors; expected"),
        ("{a}:1,https://host/b.safetensors:2", "is a URL; expected a local"),
        ("{a}:1,{base}:1", "base.safetensors holds 'wan', expected 'wan_lora'"),
        ("{a}:1,{wide}:1", "wide.safetensors has dim 8 and .*/lora.safetensors 96; they are for"),
    ],
)
def test_what_is_no_sum_is_one_line(folder, tmp_path, text, message):
    wide = {"dim": 8, "ffn_dim": 384, "num_layers": 2, "rank": 1, "alpha": 1.0}
    metadata = {"kind": "wan_lora", "config": json.dumps(wide)}
    checkpoint.save_weights(tmp_path / "wide.safetensors", {}, metadata)
    files = {"a": folder / "lora.safetensors", "base": folder / "base.safetensors"}
    with pytest.raises(ValueError, match=message) as error:
        adapters.parse(text.format(**files, wide=tmp_path / "wide.safetensors"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "format, output", [*FORMATS, ("merged", "merged.pt"), ("merged", "merged.safetensors")]
)
def test_the_group_can_read_what_is_exported(folder, tmp_path, format, output):
    """Modes are those of the umask."""
    paths = {"lora": folder / "lora.safetensors", "base": folder / "base.safetensors"}
    before = os.umask(0o027)
    try:
        export(tmp_path / output, format, **paths)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in files)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> tuple[Path, state_lib.TrainState]:
    """A run of configs/tiny.py with a checkpoint whose policies are all random."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_lib.load("configs/tiny.py")
    edited = config.copy_and_resolve_references()
    edited.lora.alpha = 4.0  # by hand: the checkpoint says 8
    write_json(edited.to_dict(), workdir / "config.json")
    mesh = run_lib.make_mesh(config)
    lora = fresh_variables(config)["lora"]
    state = state_lib.init_state(config, mesh, lora)
    rng = np.random.default_rng(4)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), state)
    state = state.replace(iteration=jnp.int32(3))
    before = jax.tree.map(lambda x: 2 * x, state).replace(iteration=jnp.int32(2))
    with checkpoint.manager(workdir / "checkpoints", keep=2) as checkpoints:
        for saved, reward in ((before, 0.7), (state, 0.6)):
            extra = {"config": config.to_dict()}
            step, placed = int(saved.iteration), sharding.place(saved, mesh)
            checkpoint.save(checkpoints, step, placed, extra, reward)
    return workdir, state


@pytest.mark.parametrize(
    "policy, field", [("online", "lora"), ("ema", "ema"), ("reference", "reference")]
)
def test_a_policy_of_a_run(workdir, tmp_path, policy, field):
    workdir, state = workdir
    export(tmp_path / "lora.pt", "peft", workdir=workdir, policy=policy)
    convert([tmp_path / "lora.pt"], tmp_path / "back.safetensors")
    lora = flax.traverse_util.flatten_dict(jax.device_get(getattr(state, field)), sep="/")
    assert_same(tensors_of(tmp_path / "back.safetensors"), lora)
    config = json.loads(metadata_of(tmp_path / "back.safetensors")["config"])
    assert config == {"dim": 96, "ffn_dim": 384, "num_layers": 3, "rank": 8, "alpha": 8.0}


@pytest.mark.parametrize("iteration, times", [("newest", 1), (3, 1), (2, 2), ("best", 2)])
def test_a_checkpoint_of_a_run(workdir, tmp_path, iteration, times):
    workdir, state = workdir
    export(tmp_path / "lora.pt", "peft", workdir=workdir, iteration=iteration)
    convert([tmp_path / "lora.pt"], tmp_path / "back.safetensors")
    lora = flax.traverse_util.flatten_dict(jax.device_get(state.lora), sep="/")
    expected = {name: times * x for name, x in lora.items()}
    assert_same(tensors_of(tmp_path / "back.safetensors"), expected)


def test_a_run_is_merged_with_its_own_base_by_the_command(workdir, tmp_path):
    workdir, state = workdir
    arguments = (
        f"--workdir={workdir}",
        "--policy=ema",
        "--format=merged",
        "--output=merged.safetensors",
    )
    done = run_command(ROOT / "tools" / "export_lora.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ema policy of {workdir} after iteration 3" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["merged.safetensors"]
    base = tensors_of(ROOT / "kvpo_jax" / "assets" / "toy_generator.safetensors")[
        "text_kv/v/kernel"
    ][2]
    update = state.ema["text_kv"]["v"]["a"][2] @ state.ema["text_kv"]["v"]["b"][2]
    merged = tensors_of(tmp_path / "merged.safetensors")["blocks.2.cross_attn.v.weight"]
    np.testing.assert_allclose(merged.T, base + update, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"format": "peft", "output": "a"}, "expected either --workdir or --lora"),
        (
            {"format": "peft", "output": "a.safetensors", "lora": "lora"},
            "a.safetensors: peft has a folder, or LongLive",
        ),
        (
            {"format": "peft", "output": "a", "lora": "lora", "iteration": "best"},
            "--iteration=best is of --workdir; --lora is a file",
        ),
        (
            {"format": "comfyui", "output": "a.pt", "lora": "lora"},
            "a.pt does not end in .safetensors",
        ),
        (
            {"format": "merged", "output": "a.safetensors", "lora": "lora"},
            "--format=merged needs --base",
        ),
        (
            {"format": "merged", "output": "a", "lora": "lora", "base": "base"},
            "a: merged weights end in .pt, as LongLive loads them, or .safetensors",
        ),
        (
            {"format": "peft", "output": "a", "lora": "base"},
            "base.safetensors holds 'wan', expected 'wan_lora'",
        ),
        (
            {"format": "peft", "output": "a", "workdir": Path("nowhere")},
            "nowhere is not the directory of a run with checkpoints: there is none in",
        ),
        (
            {"format": "merged", "output": "a.safetensors", "lora": "lora", "base": "lora"},
            r"lora.safetensors: missing \[",
        ),
    ],
)
def test_errors_leave_nothing_behind(folder, tmp_path, arguments, message):
    files = {
        name: folder / f"{arguments[name]}.safetensors"
        for name in ("lora", "base")
        if name in arguments
    }
    with pytest.raises(ValueError, match=message):
        export(**arguments | files | {"output": tmp_path / arguments["output"]})
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_not_merged(folder, tmp_path):
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("lora", "base")}
    for name in paths:
        for other, path in paths.items():
            content = bytearray((folder / path.name).read_bytes())
            content[-1] ^= 2 if other == name else 0
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors: .* is damaged"):
            export(tmp_path / "out" / "merged.safetensors", "merged", **paths)
        assert not (tmp_path / "out").exists()


def test_a_lora_for_another_base(folder, tmp_path):
    toy = ROOT / "kvpo_jax" / "assets" / "toy_generator.safetensors"
    with pytest.raises(
        ValueError,
        match=r"toy_generator.safetensors: .*/kernel is \(3, 96, .*, the LoRA is for \(2, 96",
    ):
        export(
            tmp_path / "merged.safetensors", "merged", lora=folder / "lora.safetensors", base=toy
        )
    assert not list(tmp_path.iterdir())
