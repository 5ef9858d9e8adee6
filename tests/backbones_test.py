"""Generators of Wan2.1's design beside LongLive: what their files say, and what their presets do.

The checkpoints are random, tiny, and in the formats of their upstreams. tests/longlive_test.py runs
the commands on them.
"""

import json
import math
from pathlib import Path

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from equipment import configure
from full_size_test import shapes_of

from kvpo_jax import backbone, run
from kvpo_jax.algorithm import flow
from kvpo_jax.convert import convert_weights
from kvpo_jax.convert.kind import Options
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import abstract_variables
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import checkpoint, workdir
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config

SIZES = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 16}
SIZES |= {"text_len": 8, "channels": 16, "patch": (1, 2, 2), "eps": 1e-6}
GIVEN = {"num_heads": 2, "text_len": 8}  # what neither a shape nor a config.json shows


# ---------------------------------------------------------------- published files


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a generator of SIZES, under Wan2.1's names."""
    names = ("dim", "ffn_dim", "num_layers", "freq_dim", "text_dim")
    shapes = shapes_of(*(SIZES[name] for name in names))
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(state: dict[str, torch.Tensor], prefix: str, wrapper: str = "") -> dict:
    """The state dict of a wrapper, which may wrap the blocks once more."""
    return {
        prefix + name.replace(".self_attn", f"{wrapper}.self_attn"): state[name] for name in state
    }


def self_forcing(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """self_forcing_dmd.pt: the average is in names that FSDP has wrapped."""
    other = prefixed(random_state(1), "model.")
    average = prefixed(state, "model._fsdp_wrapped_module.", "._fsdp_wrapped_module")
    parts = {"generator": other, "critic": {"w": torch.ones(2)}, "generator_ema": average}
    torch.save(parts, folder / "self_forcing_dmd.pt")
    return folder / "self_forcing_dmd.pt"


def causal_forcing(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """framewise-2step.pt and its like: the average alone."""
    torch.save({"generator_ema": prefixed(state, "model.")}, folder / "causal_forcing.pt")
    return folder / "causal_forcing.pt"


def krea(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """krea-realtime-video-14b.safetensors: bfloat16, under a wrapper's names."""
    path = folder / "krea-realtime-video-14b.safetensors"
    half = {name: x.bfloat16() for name, x in state.items()}
    safetensors.torch.save_file(prefixed(half, "model."), path)
    return path


def krea_folder(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """The repository of Krea: shards with an index and a config.json in transformer/."""
    inside = folder / "krea-realtime-video" / "transformer"
    inside.mkdir(parents=True)
    names, places = sorted(state), {}
    for shard in range(2):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-00002.safetensors"
        part = {name: state[name].bfloat16() for name in names[shard::2]}
        safetensors.torch.save_file(part, inside / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (inside / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    said = {"_class_name": "CausalWanModel", "num_heads": 2, "text_len": 8, "eps": 1e-6}
    (inside / "config.json").write_text(json.dumps(said | {"local_attn_size": -1, "sink_size": 0}))
    return inside.parent


FORMATS = {
    "configs/self_forcing.py": (self_forcing, {"policy": "ema", **GIVEN}),
    "configs/causal_forcing.py:frame": (causal_forcing, {"policy": "ema", **GIVEN}),
    "configs/causal_forcing.py": (causal_forcing, GIVEN),
    "configs/krea14b.py": (krea, GIVEN),
    "configs/krea14b.py:published": (krea_folder, {"kind": "wan"}),
}


def convert(source: Path, output: Path, **options) -> Path:
    convert_weights.convert([source], output, Options(**options))
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A converted generator of SIZES."""
    folder = tmp_path_factory.mktemp("small")
    return convert(krea(random_state(), folder), folder / "small.safetensors", **GIVEN)


@pytest.mark.parametrize("spec", FORMATS)
def test_published_files_need_no_sizes(spec, tmp_path, capsys):
    write, options = FORMATS[spec]
    state = random_state()
    path = convert(write(state, tmp_path), tmp_path / "w.safetensors", **options)
    capsys.readouterr()
    config = workdir.resolve(spec, None, [f"--config.weights={path}"])
    assert {name: config.model[name] for name in SIZES} == SIZES
    assert f"{path} has dim=48, " in (said := capsys.readouterr().out)
    config_says = 5120 if "krea" in spec else 1536
    assert f"taken in place of the config's dim={config_says}, " in said and "eps" not in said

    params = backbone.load_params(path, wan_config(config))
    params = flax.traverse_util.flatten_dict(params, sep="/")
    assert sum(x.size for x in params.values()) == sum(x.numel() for x in state.values())
    q = state["blocks.1.self_attn.q.weight"].numpy().T.astype(ml_dtypes.bfloat16)  # the config's
    np.testing.assert_array_equal(params["blocks/self_q/kernel"][1], q)
    np.testing.assert_array_equal(
        params["patch_embedding/kernel"].astype(np.float32),
        state["patch_embedding.weight"].reshape(48, 64).numpy().T.astype(ml_dtypes.bfloat16),
    )


def test_the_config_json_says_what_no_shape_shows(tmp_path):
    source = krea_folder(random_state(), tmp_path)
    said = source / "transformer" / "config.json"
    said.write_text(said.read_text().replace("1e-06", "0.001").replace(": 8,", ": 9,"))
    path = convert(source, tmp_path / "w.safetensors", kind="wan")
    assert checkpoint.generator_sizes(path) == SIZES | {"eps": 1e-3, "text_len": 9}
    for wrong in ('"2"', "-2", "true"):
        said.write_text(f'{{"num_heads": {wrong}}}')
        with pytest.raises(UsageError, match="json beside it says num_heads=.* a positive int"):
            convert(source, tmp_path / "w.safetensors", kind="wan")


# ---------------------------------------------------------------- sizes from the file


def test_a_flag_that_asks_for_another_size_is_an_error_that_names_both(small):
    flags = [f"--config.weights={small}", "--config.model.dim=1536", "--config.model.num_layers=30"]
    with pytest.raises(UsageError) as error:
        workdir.resolve("configs/self_forcing.py", None, flags)
    assert str(error.value) == (
        f"{small} has dim=48, num_layers=2, the command line config.model.dim=1536,"
        " config.model.num_layers=30; leave out what the file says, or bring weights of these sizes"
    )
    # What agrees may be said, and no weight depends on how far texts are padded.
    flags = [f"--config.weights={small}", "--config.model.dim=48", "--config.model.text_len", "5"]
    config = workdir.resolve("configs/self_forcing.py", None, flags)
    assert (config.model.dim, config.model.text_len, config.model.num_layers) == (48, 5, 2)
    backbone.load_params(small, wan_config(config))


def test_a_configuration_of_the_files_sizes_says_nothing(small, tmp_path, capsys):
    """A run directory has the sizes, and a run is continued with the command that began it."""
    command = ["configs/krea14b.py", tmp_path, [f"--config.weights={small}"]]
    config = workdir.resolve(*command)
    workdir.start_run(config, tmp_path)
    capsys.readouterr()
    assert workdir.resolve(None, tmp_path, []) == config
    assert capsys.readouterr().out == ""
    assert workdir.resolve(*command) == config


def test_a_small_world_names_what_of_a_file_is_not_its_own(small):
    config = workdir.resolve("configs/tiny.py", None, [f"--config.weights={small}"])
    message = f"config.model.channels=16 of {small}: a latent frame of the toy has 12"
    with pytest.raises(UsageError, match=message):
        backbone.load(config)


def test_a_file_that_notes_no_sizes_leaves_the_configs(tmp_path):
    path = tmp_path / "toy.safetensors"  # as tools/pretrain_toy.py writes them, but for the tensors
    checkpoint.save_weights(path, {"x": np.zeros(1)}, {"command": "pretrain"})
    flags = ["--config.model.num_layers=1", f"--config.weights={path}"]
    sized = workdir.resolve("configs/tiny.py", None, flags)
    assert sized.model == configure("configs/tiny.py", {"model.num_layers": 1}).model


@pytest.mark.parametrize("sizes", [{"dim": "48"}, {"patch": [1, 2]}, {"depth": 2}])
def test_a_note_that_is_none_is_one_line(sizes, tmp_path):
    path, note = tmp_path / "w.safetensors", json.dumps(sizes)
    checkpoint.save_weights(path, {}, {"kind": "wan", "config": note})
    ((name, _),) = sizes.items()
    with pytest.raises(
        UsageError, match=f"{path} says {name}=.* no size of one here; make it with"
    ):
        workdir.resolve("configs/longlive.py", None, [f"--config.weights={path}"])


# ---------------------------------------------------------------- presets

FRAMES = 21  # latent, of the videos that these models were distilled on


@pytest.mark.parametrize(
    "spec, published, blocks, pivots",
    [
        # Of 7 blocks of 3, two are perturbed, and 12 past frames fill the window. Behind frame 12
        # lie 6 routable ones for 6 slots, which is one way; behind frame 15 there are 9.
        ("configs/self_forcing.py", "published", 7, (5,)),
        ("configs/causal_forcing.py", "chunk_published", 7, (5,)),
        ("configs/krea14b.py", "published", 7, (5,)),
        # Of 21 blocks of 1, six are. 7 routable frames have 7 subsets for 8 branches, 8 have 28.
        ("configs/causal_forcing.py:frame", "frame_published", 21, (14, 15)),
    ],
)
def test_videos_are_as_long_as_the_models_were_made_for(spec, published, blocks, pivots):
    config, to_pixel = config_lib.load(spec), composite.latent_to_pixel
    config_lib.check(config)
    video = config.video
    assert video.blocks == blocks and blocks * video.block_frames == FRAMES
    assert run.eligible_pivots(config, to_pixel) == pivots
    (clip,) = backbone.scored_clips(config, to_pixel)
    assert (clip.start, clip.end) == (0, 81)  # 5 seconds at 16 frames per second
    assert config.backbone in backbone.BACKBONES

    whole = config_lib.load(f"{spec.partition(':')[0]}:{published}")
    assert whole.video == config.video
    window = whole.window
    assert window.sink + window.past + video.block_frames == FRAMES  # all past frames, always
    with pytest.raises(UsageError, match="no block can be a pivot"):  # and so none to choose from
        run.eligible_pivots(whole, to_pixel)


@pytest.mark.parametrize("spec", FORMATS)
def test_the_sampler_is_the_published_one(spec):
    """Four steps, 1000 to 250 of a table of 1000 timesteps, shifted by 5; a clean context."""
    config = config_lib.load(spec)
    table = [1 - i / 1000 for i in range(1000)]
    shifted = [5 * s / (1 + 4 * s) for s in table]
    schedule = flow.schedule(config.sampler)
    expected = [*(shifted[1000 - step] for step in (1000, 750, 500, 250)), 0]
    np.testing.assert_allclose(schedule.sigma, expected, atol=1e-6)
    np.testing.assert_allclose(schedule.sigma_cond, expected, atol=1e-6)
    assert schedule.solver == "renoise"
    assert (config.video.height, config.video.width) == (60, 104)


def test_krea_has_the_parameters_of_14b():
    config = config_lib.load("configs/krea14b.py")
    variables = abstract_variables(wan_config(config))
    count = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
        for name, tree in variables.items()
    }
    dim, ffn, rank = 5120, 13824, 64
    block = 8 * dim * (dim + 1) + ffn * (dim + 1) + dim * (ffn + 1) + 12 * dim
    assert count["params"] == 40 * block + 232_719_424 == 14_288_491_584
    assert count["lora"] == 40 * rank * (8 * 2 * dim + 2 * (dim + ffn)) == 306_708_480


def test_blocks_of_one_frame_are_scored_with_their_neighbours():
    """The first block is one pixel frame, every other is four."""
    fields = {"eval.by_block": True, "reward.scorer": "motion", "reward.weights.motion": 1.0}
    config = configure("configs/causal_forcing.py:frame", fields)
    to_pixel = composite.latent_to_pixel
    clips = backbone.block_clips(config, to_pixel)
    assert len(clips) == FRAMES
    assert [(clip.start, clip.end) for clip in clips[:3]] == [(0, 3), (1, 5), (5, 9)]
    assert backbone.block_starts(config, to_pixel)[:3] == [1, 5, 9]
    assert backbone.blocks_read(config, to_pixel, ((0, 57),), 14) == 20  # the last that is replayed
