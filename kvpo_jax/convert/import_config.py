"""Reads a training YAML of KVPO's PyTorch release, and prints the flags that say the same here.

    python tools/import_config.py train_kvpo_longlive.yaml
    python -m kvpo_jax.main $(python tools/import_config.py train_kvpo_longlive.yaml) ...

The flags go to the standard output: the :release preset, and what differs from it. What has no
counterpart, and the files to convert, go to the standard error. docs/import_config.md has the
table.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvpo_jax.data import prompts
from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.runtime import command
from kvpo_jax.runtime import config as config_lib

Yaml = Mapping[str, Any]  # dotted key -> value of a release's YAML


class Rule(NamedTuple):
    """What a key of the release's YAML is here.

    Attributes:
      fields: (value, the whole YAML) -> config field -> value; ValueError for a value that has no
        counterpart. None if no value has one.
      here: the fields, or why there are none, for the table.
    """

    fields: Callable[[Any, Yaml], dict[str, Any]] | None
    here: str


def same(field: str, kind: Callable[[Any], Any], also: str = "") -> Rule:
    """A field of the same meaning; `kind` reads its value."""
    return Rule(lambda value, _: {field: kind(value)}, f"`{field}`{also}")


def only(wanted: Any, why: str) -> Rule:
    """A switch of which one value is what is done here."""

    def fields(value: Any, _: Yaml) -> dict[str, Any]:
        if value != wanted:
            raise ValueError(f"only {wanted!r} can be had: {why}")
        return {}

    return Rule(fields, f"only `{str(wanted).lower()}`: {why}")


def none(why: str) -> Rule:
    """A key without a counterpart."""
    return Rule(None, why)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError("expected a whole number")
    return int(float(value))


def _get(given: Yaml, name: str) -> int:
    """A whole number that another key is computed with."""
    if name not in given:
        raise ValueError(f"it is computed with {name}, which is not there")
    return _whole(given[name])


# ---------------------------------------------------------------- what is computed


def _steps(value: Any, _: Yaml) -> dict[str, Any]:
    steps = tuple(float(x) / 1000 for x in value)
    return {"sampler.steps": steps, "rollout.perturbed_steps": len(steps)}  # it routes all


def _shift(value: Any, given: Yaml) -> dict[str, Any]:
    return {"sampler.shift": float(value) if given.get("warp_denoising_step", False) else 1.0}


def _past(value: Any, given: Yaml) -> dict[str, Any]:
    around = _get(given, "model_kwargs.sink_size") + _get(given, "num_frame_per_block")
    return {"window.past": _whole(value) - around}


def _cache(value: Any, given: Yaml) -> dict[str, Any]:
    return {"window.cache_frames": _whole(value) + _get(given, "model_kwargs.local_attn_size")}


def _blocks(value: Any, given: Yaml) -> dict[str, Any]:
    blocks, rest = divmod(_whole(value), _get(given, "num_frame_per_block"))
    if rest:
        raise ValueError("expected a multiple of num_frame_per_block")
    return {"video.blocks": blocks}


def _context(value: Any, _: Yaml) -> dict[str, Any]:
    # Level 0 is no level of the release's scheduler, whose lowest is 1 of 1000.
    return {"sampler.context_step": max(float(value), 1.0) / 1000}


def _switches(value: Any, _: Yaml) -> dict[str, Any]:
    frames = value if isinstance(value, list) else [x for x in str(value).split(",") if x.strip()]
    return {"video.switch_frames": tuple(map(_whole, frames))}


def _segments(value: Any, given: Yaml) -> dict[str, Any]:
    switches = _switches(given.get("switch_frame_indices", ""), given)["video.switch_frames"]
    if _whole(value) != len(switches) + 1:
        raise ValueError(
            f"a video here has {len(switches) + 1} prompts, one more than switch_frame_indices"
        )
    return {}


def _nearest(value: Any, given: Yaml) -> dict[str, Any]:
    # The release counts the frames of the current block among the nearest.
    count = _whole(value)
    return {"window.near": count - _get(given, "num_frame_per_block"), "window.excluded": count}


def _replayed(value: Any, given: Yaml) -> dict[str, Any]:
    frames, block_frames = _whole(value), _get(given, "num_frame_per_block")
    return {"replay.blocks": -(-frames // block_frames)} if frames else {}


def _fusion(name: str, train: str) -> Callable[[Any, Yaml], dict[str, Any]]:
    """The weight of the local or global advantage, of whichever key the release reads."""

    def fields(value: Any, given: Yaml) -> dict[str, Any]:
        weight = float(given.get(f"advantage_fusion_{name}_weight", value))
        return {f"objective.{name}_weight": weight if given.get(train, True) else 0.0}

    return fields


def _clip(field: str) -> Callable[[Any, Yaml], dict[str, Any]]:
    return lambda value, _: {field: float(value)}


def _both_clips(value: Any, given: Yaml) -> dict[str, Any]:
    names = {"clip_range_low": "objective.clip_low", "clip_range_high": "objective.clip_high"}
    return {field: float(value) for key, field in names.items() if key not in given}


def _scheduler(value: Any, _: Yaml) -> dict[str, Any]:
    if value == "constant":
        return {"train.warmup": 0}
    if value != "constant_with_warmup":
        raise ValueError("the learning rate is constant here, after a linear warm-up")
    return {}


def _warmup(value: Any, given: Yaml) -> dict[str, Any]:
    return {} if given.get("lr_scheduler") == "constant" else {"train.warmup": _whole(value)}


def _heldout(value: Any, given: Yaml) -> dict[str, Any]:
    count = _get(given, "num_gpus") if value == "world_size" else _whole(value)
    return {"eval.prompts": count, "train.held_out": count}


def _memory(value: Any, _: Yaml) -> dict[str, Any]:
    return {"model.sparse_memory": 3 if _boolean(value) else 0}


# Scorer of the release -> scorer and component here, and what a weight is multiplied by.
SCORERS = {
    "video_hpsv3": ("hpsv3", "VQ", 1.0),
    "videoalign_vq": ("videoalign", "videoalign_VQ", 1.0),
    "videoalign_mq": ("videoalign", "MQ", 1.0),
    "videoalign_ta": ("videoalign", "TA", 1.0),
    "videoalign_overall": ("videoalign", "Overall", 1 / 3),  # the release takes the mean
}


def _scorers(value: Any) -> dict[str, tuple[str, float]]:
    """component -> (scorer, weight) of a list of reward components."""
    out = {}
    for entry in value:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if name not in SCORERS:
            raise ValueError(f"there is no scorer {name!r} here, but one of your own can be added")
        scorer, component, factor = SCORERS[name]
        out[component] = (scorer, factor * float(entry.get("weight", 1.0)))
    return out


def _rewards(value: Any, _: Yaml) -> dict[str, Any]:
    found = _scorers(value)
    weights = {f"reward.weights.{name}": weight for name, (_, weight) in found.items()}
    return {"reward.scorer": ",".join(dict.fromkeys(s for s, _ in found.values())), **weights}


def _watched(value: Any, given: Yaml) -> dict[str, Any]:
    optimised = {scorer for scorer, _ in _scorers(given.get("reward_components") or []).values()}
    names = dict.fromkeys(scorer for scorer, _ in _scorers(value).values())
    more = [name for name in names if name not in optimised]
    return {"eval.scorer": ",".join(["motion", *more])} if more else {}


# ---------------------------------------------------------------- the table

_MEMORY = "memory only; the run fits itself, see docs/memory.md"
_FOLDER = "`--workdir`; a run lies in one folder"
_TRANSITION = "clips lie inside of prompt segments"
FILES = {
    "generator_ckpt": "--config.weights=FILE, made by: kvpo-convert",
    "lora_ckpt": "--config.paths.lora=FILE, made by: kvpo-convert",
    "data_path": "--config.paths.prompts=FILE, the file itself",
}
RULES: dict[str, Rule] = {
    "generator_ckpt": none("`weights`, once converted"),
    "lora_ckpt": none("`paths.lora`, once converted"),
    "denoising_step_list": Rule(
        _steps, "`sampler.steps`, in thousandths, and as many `rollout.perturbed_steps`"
    ),
    "warp_denoising_step": Rule(
        lambda value, _: {} if _boolean(value) else {"sampler.shift": 1.0},
        "`sampler.shift`: 1 if false",
    ),
    "last_step_only": none("of the distillation"),
    "num_frame_per_block": same("video.block_frames", _whole),
    "model_kwargs.local_attn_size": Rule(
        _past, "`window.past`, once sink_size and num_frame_per_block are subtracted"
    ),
    "model_kwargs.timestep_shift": Rule(_shift, "`sampler.shift`, if warp_denoising_step"),
    "model_kwargs.sink_size": same("window.sink", _whole),
    "model_kwargs.bank_size": same("window.bank", _whole),
    "model_kwargs.record_interval": same("window.bank_interval", _whole),
    "model_kwargs.SMA": Rule(_memory, "`model.sparse_memory`: 3 if true"),
    "streaming_chunk_size": none("blocks are streamed one by one; a pivot is any eligible block"),
    "streaming_min_new_frame": none("as streaming_chunk_size"),
    "streaming_max_length": Rule(_blocks, "`video.blocks`, divided by num_frame_per_block"),
    "slice_last_frames": Rule(_cache, "`window.cache_frames`, once local_attn_size is added"),
    "context_noise": Rule(_context, "`sampler.context_step`, in thousandths, at least one"),
    "data_path": none("`paths.prompts`"),
    "prompt_min_segments": none("shorter sequences repeat their last prompt; kvpo-prompts lint"),
    "prompt_max_segments": Rule(_segments, "the number of `video.switch_frames`, and one"),
    "switch_frame_indices": Rule(_switches, "`video.switch_frames`"),
    "align_switch_to_chunk": none("switches are multiples of a block"),
    "global_sink": same("window.global_sink", _boolean),
    "K": same("rollout.branches", _whole),
    "branch_backward_chunk_size": none(_MEMORY),
    "m_nearest_frames": Rule(
        _nearest, "`window.excluded`, and `window.near` without the current block"
    ),
    "perturb_within_first_x_chunks": none("`reward.min_behind` bounds where a video may fork"),
    "perturb_num_blocks": same("rollout.window_blocks", _whole),
    "train_local": Rule(
        lambda value, given: {} if _boolean(value) else {"objective.local_weight": 0.0},
        "`objective.local_weight`: 0 if false",
    ),
    "train_global": Rule(
        lambda value, given: {} if _boolean(value) else {"objective.global_weight": 0.0},
        "`objective.global_weight`: 0 if false",
    ),
    "local_loss_weight": Rule(
        _fusion("local", "train_local"), "`objective.local_weight`, without a fusion weight"
    ),
    "global_loss_weight": Rule(
        _fusion("global", "train_global"), "`objective.global_weight`, without a fusion weight"
    ),
    "anchor_grad_steps": none("of the kl_loss_mode try_kl"),
    "policy_window_frames": Rule(_replayed, "`replay.blocks`, divided by num_frame_per_block"),
    "policy_window_multiple": only(1.0, "`replay.blocks` is the window"),
    "advantage_fusion_mode": same("objective.fusion_normalize", str),
    "advantage_fusion_local_weight": Rule(
        _fusion("local", "train_local"), "`objective.local_weight`"
    ),
    "advantage_fusion_global_weight": Rule(
        _fusion("global", "train_global"), "`objective.global_weight`"
    ),
    "policy_log_prob_mode": only("per_step", "`replay.energy=clean`"),
    "log_prob_grad_steps": same("replay.grad_steps", _whole),
    "log_prob_sigma_floor": same("replay.sigma_floor", float),
    "per_step_protect_mode": same("objective.gate", str),
    "min_update_entropy_ratio": only(0, "no update is skipped for its entropy"),
    "ppo_epochs": same("train.epochs", _whole),
    "clip_range": Rule(_both_clips, "`objective.clip_low`, `objective.clip_high`, where not given"),
    "clip_range_low": Rule(_clip("objective.clip_low"), "`objective.clip_low`"),
    "clip_range_high": Rule(_clip("objective.clip_high"), "`objective.clip_high`"),
    "adv_clip_max": same("objective.advantage_clip", float),
    "kl_coef": same("objective.beta", float),
    "kl_loss_mode": only("discrete_kl", "Eq. 16 of the paper"),
    "kl_reference_initial": only(True, "the reference is the initial policy"),
    "lr": same("train.learning_rate", float),
    "lr_scheduler": Rule(_scheduler, "constant, or constant_with_warmup"),
    "lr_warmup_steps": Rule(_warmup, "`train.warmup`"),
    "weight_decay": same("train.weight_decay", float),
    "gradient_accumulation_steps": same("train.rollouts_per_sync", _whole),
    "max_grad_norm": same("train.grad_clip", float),
    "ema_decay": same("train.ema_decay", float),
    "max_train_steps": same("train.iterations", _whole),
    "log_interval": none("every iteration is recorded"),
    "save_interval_steps": same("train.checkpoint_every", _whole),
    "save_interval_samples": only(0, "checkpoints are counted in iterations"),
    "eval_interval_steps": same("eval.every", _whole),
    "eval_interval_samples": only(0, "evaluations are counted in iterations"),
    "eval_prompts": Rule(
        _heldout, "`eval.prompts` and `train.held_out`, chosen by a hash; world_size is num_gpus"
    ),
    "eval_parallel_online_ema": none("each policy is evaluated on all devices"),
    "eval_parallel_online_ema_mode": none("as eval_parallel_online_ema"),
    "seed": same("seed", _whole),
    "reward_components": Rule(_rewards, "`reward.scorer`, `reward.weights`"),
    "use_raw_weighted_reward_advantage": only(False, "advantages are made per component"),
    "eval_reward_components": Rule(_watched, "`eval.scorer`, of what is not optimised"),
    "reward_batch_size": none(_MEMORY),
    "vae_temporal_stride": only(4, "that of Wan2.1's VAE"),
    "long_reward_enable_normal": only(True, _TRANSITION),
    "long_reward_enable_transition": only(False, _TRANSITION),
    "long_reward_normal_weight": none(_TRANSITION),
    "long_reward_transition_weight": none(_TRANSITION),
    "long_reward_normal_clip_len": same("reward.clip_frames", _whole),
    "long_reward_transition_clip_len": none(_TRANSITION),
    "num_gpus": same("train.prompts_per_iteration", _whole, ", as a GPU has a prompt there"),
    "gpu_ids": none("CUDA_VISIBLE_DEVICES"),
    "multinode": none("docs/cluster.md; with N nodes, N times train.prompts_per_iteration"),
    "gradient_checkpointing": none(_MEMORY),
    "offload_models": none("`reward.resident`; " + _MEMORY),
    "output_dir": none(_FOLDER),
    "run_name": none(_FOLDER),
    "group_outputs_by_run": none(_FOLDER),
    "resume_output_dir_from_checkpoint": none(_FOLDER),
    "show_progress": none("shown on a terminal"),
    "debug_save_first_video_group": none("`train.video_every`"),
    "debug_video_group_fps": none("the generator's 16 fps"),
    "debug_video_group_subdir": none("`videos/` of the run"),
    "adapter.type": only("lora", "what is trained"),
    "adapter.rank": same("lora.rank", _whole),
    "adapter.alpha": same("lora.alpha", float),
    "adapter.dropout": only(0.0, "LoRA has no dropout here"),
    "adapter.dtype": none("LoRA is float32"),
    "adapter.verbose": none("of the log"),
}


def table() -> str:
    """The rows of docs/import_config.md."""
    lines = ["| key of the YAML | here |", "|---|---|"]
    lines += [f"| `{key}` | {rule.here} |" for key, rule in RULES.items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- a file


class Imported(NamedTuple):
    """What a YAML is here.

    Attributes:
      spec: FILE:PRESET of the configuration that it is nearest to.
      overrides: field -> value, where they differ from it.
      missing: (key, value, reason) of what has no counterpart, or might have been meant otherwise.
      files: (key, value, what to do) of the files that it names.
    """

    spec: str
    overrides: dict[str, Any]
    missing: list[tuple[str, Any, str]]
    files: list[tuple[str, Any, str]]

    @property
    def flags(self) -> list[str]:
        """The command line of a run."""
        fields = [f"--config.{name}={_shown(value)}" for name, value in self.overrides.items()]
        return [f"--config={self.spec}", *fields]


def _shown(value: Any) -> str:
    """A value as a flag has it."""
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """dotted key -> value of a YAML file; nothing in it is run.

    Raises:
      UsageError: it is no YAML, or no settings.
    """
    try:
        made = yaml.safe_load(prompts.read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"{path}{line}: not YAML: {what}") from error
    if not isinstance(made, dict):
        raise UsageError(f"{path}: expected a training YAML of the release, key: value")
    out: dict[str, Any] = {}
    for key, value in made.items():
        if isinstance(value, dict) and key not in RULES:
            out |= {f"{key}.{name}": x for name, x in value.items()}
        else:
            out[str(key)] = value
    return out


def imported(path: Path) -> Imported:
    """What the YAML at `path` is here.

    Raises:
      UsageError: it is no training YAML of the release, or its values make no run; it names them.
    """
    given = read_yaml(path)
    if not given.keys() & RULES.keys():
        raise UsageError(
            f"{path}: none of its keys is one of the release's training YAML, as train_kvpo_"
            "longlive.yaml; it has " + ", ".join(list(given)[:5])
        )
    backbone = "memflow" if "model_kwargs.bank_size" in given else "longlive"
    spec = f"configs/{backbone}.py:release"
    preset = config_lib.flat(config_lib.load(spec))
    fields: dict[str, Any] = {}
    missing = []
    for key, value in given.items():
        rule = RULES.get(key)
        if rule is None:
            missing.append((key, value, f"no key that the release reads{nearest(key, RULES)}"))
        elif rule.fields is None:
            if key not in FILES:
                missing.append((key, value, rule.here))
        else:
            try:
                fields |= rule.fields(value, given)
            except (ValueError, TypeError, AttributeError) as error:
                missing.append((key, value, str(error)))
    overrides = {name: value for name, value in fields.items() if preset.get(name) != value}
    if "reward.scorer" in overrides:  # the weights of the preset go with its scorers
        overrides |= {name: x for name, x in fields.items() if name.startswith("reward.weights.")}
    files = [(key, given[key], what) for key, what in FILES.items() if given.get(key)]
    made = Imported(spec, overrides, missing, files)
    try:
        config_lib.check(config_lib.override(config_lib.load(spec), made.flags[1:]))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return made


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    if len(arguments) != 2 or arguments[1].startswith("-"):
        raise UsageError("name one YAML: python tools/import_config.py train_kvpo_longlive.yaml")
    made = imported(Path(arguments[1]))
    print("\n".join(map(shlex.quote, made.flags)), flush=True)
    sections = (("files", made.files), ("no counterpart", made.missing))
    for title, rows in sections:
        if rows:
            print(f"\n{title}:", file=sys.stderr)
        for key, value, what in rows:
            shown = "..." if isinstance(value, dict | list) else value
            print(f"  {key}={shown}: {what.replace('`', '')}", file=sys.stderr)


def define_flags() -> None:
    """It has no flags of its own."""


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.convert.import_config", define_flags, main)


if __name__ == "__main__":
    cli()
