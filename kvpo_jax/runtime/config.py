"""The configuration of a run: loaded from a file, overridden by flags, checked and compared.

A configuration is named `FILE[:PRESET]`, as in `configs/tiny.py:release`; FILE defines
`get_config(preset)`. `FILE:METHOD` and `FILE:PRESET+METHOD` have the fields of a method over it
(`methods.METHODS`). Whatever is wrong with one is a UsageError that names the file or the field,
and the nearest name or value if there is one.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from kvpo_jax.algorithm import explore, flow, kv_cache, losses, objective, replay, routing
from kvpo_jax.errors import UsageError, nearest, shortened
from kvpo_jax.methods import METHODS, apply
from kvpo_jax.models import attention, layers, wan, wan_vae
from kvpo_jax.rewards import remote
from kvpo_jax.runtime import web
from kvpo_jax.runtime.records import with_tuples

PACKAGE = Path(__file__).resolve().parents[1]
TINY = "configs/tiny.py"  # what runs when nothing else is asked for

# Where the alternatives of a field are implemented, there they are registered. The registry of
# backbones, whose modules need this one, is checked by `backbone.load`.
REGISTRIES = (
    layers.DTYPES,
    wan_vae.DTYPES,
    attention.IMPLEMENTATIONS,
    wan.REMAT,
    flow.SOLVERS,
    flow.KERNELS,
    explore.EXPLORES,
    explore.MIXES,
    routing.DRAWS,
    kv_cache.POSITIONS,
    replay.STATES,
    replay.STEP_WEIGHTS,
    replay.CONTEXTS,
    replay.TEXTS,
    replay.ENERGIES,
    losses.KINDS,
    objective.TAU_UNITS,
    objective.ADVANTAGES,
    objective.NORMALIZERS,
    objective.GATES,
    remote.FORMATS,
)

# The smallest value that means something; a group needs two branches to have a spread, an interval
# two prompts.
MINIMUM = {
    "model.dim": 1,
    "model.ffn_dim": 1,
    "model.text_dim": 1,
    "model.text_len": 1,
    "model.channels": 1,
    "model.num_heads": 1,
    "model.num_layers": 1,
    "model.freq_dim": 2,
    "lora.rank": 1,
    "video.height": 1,
    "video.width": 1,
    "video.blocks": 1,
    "video.block_frames": 1,
    "sampler.context_step": 0.0,
    "window.sink": 0,
    "window.recache_frames": 0,
    "window.bank": 0,
    "window.bank_interval": 1,
    "model.sparse_memory": 0,
    "rollout.noise_scale": 0.0,
    "rollout.stochasticity": 0.0,
    "rollout.branches": 2,
    "rollout.branch_chunk": 0,
    "rollout.window_blocks": 1,
    "rollout.perturbed_steps": 0,
    "replay.sigma_floor": 0.0,
    "replay.blocks": 0,
    "replay.grad_steps": 1,
    "replay.steps_drawn": 0,
    "replay.chunk": 0,
    "objective.anchors": 1,
    "objective.beta": 0.0,
    "objective.clip_low": 0.0,
    "objective.clip_high": 0.0,
    "objective.advantage_clip": 0.0,
    "reward.clip_frames": 0,
    "reward.clip_spacing": 0,
    "reward.min_behind": 0.0,
    "reward.noise": 0.0,
    "reward.http.retries": 0,
    "reward.http.backoff": 0.0,
    "reward.http.megabytes": 1,
    "reward.http.requests": 1,
    "train.iterations": 1,
    "train.budget_passes": 0,
    "train.micro_batch": 0,
    "train.prompts_per_iteration": 1,
    "train.epochs": 1,
    "train.rollouts_per_sync": 1,
    "train.old_decay_step": 0.0,
    "train.old_decay": 0.0,
    "train.learning_rate": 0.0,
    "train.warmup": 0,
    "train.weight_decay": 0.0,
    "train.ema_decay": 0.0,
    "train.checkpoint_every": 1,
    "train.keep": 1,
    "train.keep_best": 0,
    "train.video_every": 0,
    "eval.prompts": 2,
    "eval.every": 0,
    "eval.batch": 0,
    "mesh.data": 0,
    "mesh.fsdp": 1,
    "mesh.branch": 0,
    "mesh.context": 1,
}
SEEDS = 2**32  # as many keys as JAX makes of a seed; others would repeat them
POSITIVE = (
    "model.eps",
    "sampler.shift",
    "objective.tau",
    "objective.mix",
    "objective.quasi_norm",
    "objective.reward_tau",
    "reward.http.timeout",
    "lora.alpha",
    "train.grad_clip",
)
# What may differ when a run is continued: how long it runs, what is only looked at, and the
# machine: its devices, how much they take at once, and where it has the files, which are taken to
# be the same ones. Reward servers may be elsewhere, too (`another_run`), and be asked otherwise.
RESUMABLE = (
    "train.iterations",
    "train.budget_passes",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_best",
    "train.video_every",
    "train.micro_batch",
    "eval.",
    "reward.resident",
    *(f"reward.http.{name}" for name in ("timeout", "retries", "backoff", "required", "requests")),
    *(f"reward.http.{name}" for name in ("ahead", "token_file")),
    "mesh.",
    "paths.",
    "weights",
)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """dotted field name -> value, of every leaf."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            out |= {f"{key}.{name}": leaf for name, leaf in flat(value).items()}
        else:
            out[key] = value
    return out


# ---------------------------------------------------------------- files


def shipped(path: str) -> Path:
    """The file that comes with the package: inside an installed one, next to it in a checkout."""
    inside = PACKAGE / path
    return inside if inside.is_file() else PACKAGE.parent / path


def find(path: str) -> Path:
    """The file `path`, or the shipped one of that name."""
    for candidate in (Path(path), shipped(path)):
        if candidate.is_file():
            return candidate
    names = [f"configs/{file.name}" for file in shipped(TINY).parent.glob("*.py")]
    raise UsageError(f"there is no configuration file {path!r}{nearest(path, names)}")


def derive(path: str, preset: str) -> ConfigDict:
    """The configuration `path:preset` as another configuration file changes it: unlocked."""
    return load(f"{path}:{preset}").copy_and_resolve_references().unlock()


def load(spec: str) -> ConfigDict:
    """The configuration FILE[:PRESET], FILE:METHOD or FILE:PRESET+METHOD."""
    path, _, names = spec.partition(":")
    preset, method = _preset_and_method(names)
    file = find(path)
    if file.suffix != ".py":
        raise UsageError(f"{path}: a configuration is a Python file with a get_config()")
    defined = _defined(file)
    if "get_config" not in defined:
        raise UsageError(f"{path} defines no get_config()")
    get_config, presets = defined["get_config"], defined.get("PRESETS", (preset,))
    if preset and not inspect.signature(get_config).parameters:
        raise UsageError(f"{path} has no presets, so not {preset!r} either")
    if preset and preset not in presets:
        raise UsageError(
            f"{path} has the presets {', '.join(presets)}, not {preset!r}"
            f"{nearest(preset, [*presets, *METHODS])}; methods are {', '.join(METHODS)}"
        )
    with _naming_faults(file):
        config = get_config(*([preset] if preset else [])).lock()
    if method:
        config = apply(config, method).lock()
    if file != shipped(TINY):
        check_fields(config, file)
    return config


def presets() -> dict[str, ConfigDict]:
    """FILE:PRESET -> configuration, of every preset that ships."""
    files = sorted(shipped(TINY).parent.glob("*.py"))
    specs = [
        f"configs/{file.name}:{name}"
        for file in files
        for name in _defined(file).get("PRESETS", ())
    ]
    return {spec: load(spec) for spec in specs}


def _defined(file: Path) -> dict[str, Any]:
    """Runs a configuration file: the names that it defines."""
    with _naming_faults(file):
        return runpy.run_path(str(file))


def _preset_and_method(names: str) -> tuple[str, str]:
    """The preset and the method of PRESET, METHOD or PRESET+METHOD; empty where there is none."""
    first, plus, second = names.partition("+")
    if plus and second not in METHODS:
        raise UsageError(f"{second!r} is no method{nearest(second, METHODS)}: {', '.join(METHODS)}")
    if plus and first in METHODS:
        raise UsageError(f"{first} and {second} are two methods; a configuration has one")
    return (first, second) if plus else ("", first) if first in METHODS else (first, "")


@contextmanager
def _naming_faults(file: Path) -> Iterator[None]:
    """Turns what a configuration file raises into one line that names its place in the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == str(file)]
        text = "; ".join(map(str.strip, traceback.format_exception_only(error)))
        raise UsageError(f"{file}{lines[-1] if lines else ''} raised {text}") from error


def load_saved(path: Path) -> ConfigDict:
    """The configuration that a run directory's config.json holds."""
    if not path.is_file():
        raise UsageError(f"{path.parent} is not the directory of a run: there is no {path}")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or not even text
        raise UsageError(f"{path} is not a saved configuration: {error}") from error
    return from_record(saved, path)


def from_record(saved: Any, path: Path) -> ConfigDict:
    """The configuration in a JSON value that the file `path` holds."""
    config = ConfigDict(with_tuples(saved) if isinstance(saved, dict) else {})
    fill_defaults(config, path)
    check_fields(config, path)
    return config.lock()


def fill_defaults(config: ConfigDict, path: Path) -> None:
    """Gives fields that are newer than the run in `path` their defaults, and says so once.

    A file that has hardly any of the fields is left alone: it is not of a run.
    """
    defaults, own = flat(load(str(shipped(TINY)))), flat(config)
    missing = [name for name in defaults if name not in own and not _is_weight(name)]
    if not missing or 2 * len(missing) > len(defaults):
        return
    for name in missing:
        *sections, field = name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[field] = defaults[name]
    _say_defaults(str(path), ", ".join(f"{name}={defaults[name]!r}" for name in missing))


@functools.cache
def _say_defaults(path: str, fields: str) -> None:
    print(f"{path} is older than these fields, which take their defaults: {fields}", flush=True)


def _is_weight(name: str) -> bool:
    """Whether a field is a component in reward.weights, which are the scorers' business."""
    return name.startswith("reward.weights.")


# ---------------------------------------------------------------- sizes that follow from it


def recorded_blocks(config: ConfigDict) -> int:
    """Blocks replayed from the pivot on: at least the perturbed window, or replay.blocks."""
    return max(config.replay.blocks, config.rollout.window_blocks)


def prompts_at_once(config: ConfigDict) -> int:
    """Prompts that are rolled out, scored and replayed together.

    All of them, where neither the config nor the devices (`fitting.fitted`) ask for fewer.
    """
    return config.train.micro_batch or config.train.prompts_per_iteration


def branches_at_once(config: ConfigDict) -> int:
    """Branches that are rolled out together, each chunk with an anchor of its own."""
    return config.rollout.branch_chunk or config.rollout.branches


def split_branches(config: ConfigDict) -> int:
    """What the devices over branches divide: the branches that are rolled out or replayed together.

    Where states are compared with all branches, few branches are replayed.
    """
    peers, count = losses.KINDS[config.objective.kind].peers, branches_at_once(config)
    return math.gcd(count, config.objective.anchors) if peers else count


def heldout_at_once(config: ConfigDict, shards: int) -> int:
    """Held-out videos generated at once: eval.batch, or as many as there are prompts in training.

    Raises:
      UsageError: the held-out prompts cannot be divided into such batches, or a batch over the
        `shards` of prompts of the mesh.
    """
    prompts, batch = config.eval.prompts, config.eval.batch
    most = batch or prompts_at_once(config)
    fitting = [n for n in range(1, most + 1) if prompts % n == 0 and n % shards == 0]
    if not fitting or batch not in (0, fitting[-1]):
        also = f"eval.batch={batch}, and that of " if batch else ""
        raise UsageError(
            f"eval.prompts={prompts} must be a multiple of {also}the mesh's {shards} shards of "
            "prompts"
        )
    return fitting[-1]


def wan_config(config: ConfigDict) -> wan.WanConfig:
    """The sizes of the generator: sections `model` and `lora`."""
    return wan.WanConfig(**config.model, lora_rank=config.lora.rank, lora_alpha=config.lora.alpha)


def unrouted_frames(config: ConfigDict) -> int:
    """Frames that a history has room for if none is drawn: the sink, and the last ones.

    The window reads so many of the last ones, or a prompt switch makes them anew.
    """
    window = config.window
    return window.sink + max(window.past, window.recache_frames, config.video.block_frames)


def position_span(config: ConfigDict) -> int:
    """Frames within which positions are counted; 0: within the whole video.

    They are those of a context and its block, or those that are made anew at a prompt switch.
    """
    window = config.window
    if not kv_cache.POSITIONS[window.positions]:
        return 0
    return max(window.sink + window.past + config.video.block_frames, window.recache_frames)


def generating(config: ConfigDict) -> ConfigDict:
    """The configuration of videos of which no frame is drawn, so that none is kept to be drawn."""
    out = config.copy_and_resolve_references().unlock()
    out.window.cache_frames = unrouted_frames(config)
    return out.lock()


def check_trained(config: ConfigDict) -> None:
    """UsageError for what only generation and evaluation can have."""
    if kv_cache.POSITIONS[config.window.positions]:
        raise UsageError(
            f"config.window.positions={config.window.positions!r} is of generation and evaluation"
            " alone; train with 'absolute'"
        )


def check_positions(config: ConfigDict, what: str, frames: int) -> None:
    """UsageError, beginning with `what`, if so many frames are more than there are positions."""
    if frames > layers.MAX_FRAMES and not kv_cache.POSITIONS[config.window.positions]:
        raise UsageError(
            f"{what}, but there are positions for {layers.MAX_FRAMES} frames; videos that nobody"
            " trains on may be longer with --config.window.positions=relative"
        )


def segment_of(frame: int, switch_frames: Sequence[int]) -> int:
    """Index of the prompt segment that holds a latent frame."""
    return sum(frame >= switch for switch in switch_frames)


def compares_energies(config: ConfigDict) -> bool:
    """Whether the loss is one of the energies of a group, not of its states one by one."""
    return losses.KINDS[config.objective.kind].of_state is None


def has_energy_unit(config: ConfigDict) -> bool:
    """Whether tau is counted in the spread of the energies of the iterations before."""
    return compares_energies(config) and config.objective.tau_unit == "running_std"


def replayed_steps(config: ConfigDict) -> int:
    """How many states each block of a branch has for the replay, of `replay.STATES`."""
    source = replay.STATES[config.replay.states]
    return source.size(config.replay, len(config.sampler.steps))


def learned_steps(config: ConfigDict) -> int:
    """How many of them have a gradient: the first ones, or some of these that are drawn."""
    options = config.replay
    return options.steps_drawn or min(options.grad_steps, replayed_steps(config))


def old_decay(config: ConfigDict, iteration: int) -> float:
    """The share of itself that pi_old keeps when it follows pi_theta after `iteration` of them."""
    return min(config.train.old_decay_step * iteration, config.train.old_decay)


def is_synced(config: ConfigDict, iteration: int) -> bool:
    """Whether pi_old has just followed pi_theta."""
    return iteration % config.train.rollouts_per_sync == 0


def is_on_policy(config: ConfigDict, iteration: int) -> bool:
    """Whether pi_old has just been set to pi_theta."""
    return is_synced(config, iteration) and (not iteration or not old_decay(config, iteration))


def always_on_policy(config: ConfigDict) -> bool:
    """Whether pi_old is pi_theta in every gradient of a run."""
    train = config.train
    return train.rollouts_per_sync == train.epochs == 1 and not (
        train.old_decay_step and train.old_decay
    )


def replays_old(config: ConfigDict) -> bool:
    """Whether a loss that is taken state by state has the velocities of pi_old in its replay."""
    return losses.KINDS[config.objective.kind].reads_old and not always_on_policy(config)


def settled_from(config: ConfigDict) -> int | None:
    """The first solver step that is not routed, if every gradient is on policy; None if not."""
    routes = explore.EXPLORES[config.rollout.explore].routes
    return (config.rollout.perturbed_steps if routes else 0) if always_on_policy(config) else None


def own_starts(config: ConfigDict) -> int:
    """In how many blocks, from the pivot on, each branch begins with noise of its own."""
    common = explore.EXPLORES[config.rollout.explore].common_start
    return 0 if common else config.rollout.window_blocks


def micro_batches(config: ConfigDict) -> Iterator[np.ndarray]:
    """The numbers of the prompts of an iteration, so many at a time."""
    size = prompts_at_once(config)
    for first in range(0, config.train.prompts_per_iteration, size):
        yield np.arange(first, first + size, dtype=np.int32)


def rolls_ahead(config: ConfigDict) -> int:
    """How many micro-batches may wait for reward servers while the next is rolled out: 0 or 1."""
    http = any(map(web.is_address, _names(config.reward.scorer)))
    several = prompts_at_once(config) < config.train.prompts_per_iteration
    return int(http and several and config.reward.http.ahead)


def is_pictured(config: ConfigDict, iteration: int) -> bool:
    """Whether the branches of an iteration, numbered from 0, are shown.

    Those of the first and the last are, and of every `train.video_every`-th.
    """
    done, every = iteration + 1, config.train.video_every
    return every > 0 and (done in (1, config.train.iterations) or done % every == 0)


# ---------------------------------------------------------------- overrides


def local_path(text: str) -> str:
    """`text` with a leading ~ expanded; UsageError if it is a URL."""
    if re.match(r"\w+://", text):
        raise UsageError(f"{text} is a URL; expected a local or mounted path")
    return os.path.expanduser(text)


def named_fields(arguments: Sequence[str]) -> list[str]:
    """The fields that the flags `--config.FIELD=VALUE` among `arguments` name."""
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in arguments)
    return [match[1] for match in matches if match]


def with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with other values of some fields, dotted name -> value."""
    out = config.copy_and_resolve_references()
    out.update_from_flattened_dict(fields)
    return out.lock()


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """A copy of `config` with the flags `--config.FIELD=VALUE` of the command line `arguments` (no
    program name).
    """
    config = config.copy_and_resolve_references()
    for argument in arguments:
        # A custom scorer may have components that the config does not list: give each a default
        # weight of 0 so that the flag can set it.
        if match := re.match(r"--?config\.reward\.weights\.(\w+)", argument):
            with config.unlocked():
                config.reward.weights[match[1]] = config.reward.weights.get(match[1], 0.0)
    fields = flat(config)
    _check_named(arguments, fields)
    flag = _parsed(config, arguments, fields)
    given = flag.override_values
    with flag.value.unlocked() as out:
        for name, value in given.items():
            if name == "weights" or name.startswith("paths."):
                try:
                    value = local_path(value)
                except UsageError as error:
                    raise UsageError(f"config.{name}: {error}") from error
            out.update_from_flattened_dict({name: _like(name, value, fields[name])})
        # config.reward.weights belong to the configured scorers. If the flags replace all of those,
        # drop their weights.
        if not _names(fields["reward.scorer"]) & _names(out.reward.scorer):
            weights = out.reward.weights.items()
            own = {name: weight for name, weight in weights if f"reward.weights.{name}" in given}
            out.reward.weights = ConfigDict(own)
    return out.lock()


def _check_named(arguments: Sequence[str], fields: Mapping[str, Any]) -> None:
    """UsageError for a flag that names another configuration, a section, or no field."""
    sections = {name.rpartition(".")[0] for name in fields}
    for argument in arguments:
        if re.match(r"--?config=", argument):
            raise UsageError(
                f"{argument}: the configuration is the run's own; --config.FIELD=VALUE changes a"
                " field"
            )
    for named in named_fields(arguments):
        if named in sections:
            inside = ", ".join(name for name in fields if name.startswith(f"{named}."))
            raise UsageError(f"config.{named} is a section; its fields are {inside}")
        if named not in fields:
            raise UsageError(f"there is no field config.{named}{nearest(named, fields)}")


def _parsed(config: ConfigDict, arguments: Sequence[str], fields: Mapping[str, Any]) -> Any:
    """The flag `config` after the command line: its `value`, and its `override_values`.

    Raises:
      UsageError: a value is of another type than its field, or an argument is no field's.
    """
    values = flags.FlagValues()
    command_line = ["", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command_line)
    try:
        left = values(command_line)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(
            f"there is no flag --{error.flagname}{nearest(error.flagname, flags.FLAGS)}"
        ) from error
    except flags.IllegalFlagValueError as error:
        found = re.findall(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        name, value = found[0]
        raise UsageError(
            f"config.{name}={value}: expected {type(fields[name]).__name__}, as in {fields[name]!r}"
        ) from error
    except flags.Error as error:
        raise UsageError(str(error)) from error
    if left:
        raise UsageError(f"unexpected argument {left[0]!r}")
    return values["config"]


def _names(listed: str) -> set[str]:
    """The names in a list that commas separate."""
    return {name.strip() for name in listed.split(",")}


def _like(name: str, value: Any, default: Any) -> Any:
    """`value`, the elements of a tuple as the type of those of `default`; a scalar has its type
    already.
    """
    if not isinstance(default, tuple) or not default:
        return value
    kind = type(default[0])
    if any(type(x) is not kind and (kind, type(x)) != (float, int) for x in value):
        raise UsageError(
            f"config.{name}={value}: expected elements of type {kind.__name__}, as in {default}"
        )
    return tuple(kind(x) for x in value)


# ---------------------------------------------------------------- checks


def check_fields(config: ConfigDict, path: Path) -> None:
    """UsageError if what `path` holds has other fields than configs/tiny.py, or of other types.

    It is another version's, foreign, or was edited.
    """
    fields, defaults = flat(config), flat(load(str(shipped(TINY))))
    own = {name for name in fields if not _is_weight(name)}
    known = {name for name in defaults if not _is_weight(name)}

    faults = {"missing": sorted(known - own), "unknown": sorted(own - known)}
    if found := [f"{kind}: {shortened(names)}" for kind, names in faults.items() if names]:
        raise UsageError(
            f"{path} has other fields than {TINY}, {'; '.join(found)}; correct it or name another"
        )
    for name, value in fields.items():
        default = 1.0 if _is_weight(name) else defaults[name]
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            raise UsageError(
                f"{path}: {name}={value!r}: expected {type(default).__name__}, as in {default!r}"
            )
        _like(name, value, default)


def check(config: ConfigDict) -> None:
    """UsageError that names the first field whose value cannot be meant."""
    fields = flat(config)
    for registry in REGISTRIES:
        registry[fields[registry.field]]  # an unknown name is an error
    _check_ranges(fields)
    _check_model(config, fields)
    _check_video(config, fields)
    _check_batches(config)
    _check_method(config)


def _check_ranges(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"config.{name}={value} is not finite")
        if name in MINIMUM and value < MINIMUM[name]:
            raise UsageError(f"config.{name}={value} is less than {MINIMUM[name]}")
        if name in POSITIVE and value <= 0:
            raise UsageError(f"config.{name}={value} is not positive")
    if not 0 <= fields["seed"] < SEEDS:
        raise UsageError(f"config.seed={fields['seed']}: expected 0 to {SEEDS - 1}")
    for name in ("train.ema_decay", "train.old_decay", "reward.min_behind", "rollout.noise_scale"):
        if fields[name] > 1:
            raise UsageError(f"config.{name}={fields[name]} is more than 1")


def _check_model(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sizes that divide one another, and as many steps as there are levels."""
    model = config.model
    if len(model.patch) != 3 or min(model.patch) < 1:
        raise UsageError(
            f"config.model.patch={model.patch}: expected the frames, height and width of a token"
        )
    if model.patch[0] > 1:
        raise UsageError(f"config.model.patch={model.patch}: a token has one frame, as in Wan2.1")
    for name, divisor, what in (
        # Rotary positions turn pairs of channels.
        ("model.dim", 2 * model.num_heads, "twice config.model.num_heads"),
        ("model.freq_dim", 2, "a cosine and a sine"),
        ("video.height", model.patch[1], "config.model.patch[1]"),
        ("video.width", model.patch[2], "config.model.patch[2]"),
        ("window.recache_frames", config.video.block_frames, "config.video.block_frames"),
    ):
        if fields[name] % divisor:
            raise UsageError(f"config.{name}={fields[name]} is not a multiple of {divisor}, {what}")
    sizes = wan_config(config).kv_shape(config.video.height, config.video.width)
    both = math.gcd(sizes.heads, sizes.tokens)
    if both % config.mesh.context:
        possible = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise UsageError(
            f"config.mesh.context={config.mesh.context} does not divide both"
            f" config.model.num_heads={sizes.heads} and the {sizes.tokens} tokens of a frame; it"
            f" can be {possible}"
        )
    flow.levels(config.sampler)  # no arrays of JAX: processes may still have to join
    routing.window(config.window)
    ring = config.window.cache_frames - config.window.sink
    if config.window.recache_frames > ring:
        raise UsageError(
            f"config.window.recache_frames={config.window.recache_frames} frames do not fit beside "
            f"config.window.sink={config.window.sink} into "
            f"config.window.cache_frames={config.window.cache_frames}"
        )
    steps = len(config.sampler.steps)
    levels = max(steps, replayed_steps(config))
    for name, most, where in (
        ("rollout.perturbed_steps", steps, "config.sampler.steps has"),
        ("replay.grad_steps", levels, "config.sampler.steps and config.replay.times have"),
    ):
        if fields[name] > most:
            raise UsageError(f"config.{name}={fields[name]}, but {where} only {most}")


def _check_video(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Frames that have positions, and prompt switches that can be made."""
    video, recache_frames = config.video, config.window.recache_frames
    frames, given = (
        video.blocks * video.block_frames,
        f"config.video.switch_frames={video.switch_frames}",
    )
    check_positions(
        config,
        f"config.video.blocks={video.blocks} of config.video.block_frames={video.block_frames} "
        f"are {frames} frames",
        frames,
    )
    if video.switch_frames and not recache_frames:
        raise UsageError(f"config.window.recache_frames=0, but prompts switch at {given}")
    check_switches(given, video.switch_frames, video.block_frames, frames)
    if video.switch_frames and video.switch_frames[0] < recache_frames:
        raise UsageError(
            f"{given}: the first prompt must have config.window.recache_frames={recache_frames} "
            "frames, which are cached anew when it ends"
        )


def check_switches(
    given: str, switch_frames: Sequence[int], block_frames: int, frames: int
) -> None:
    """UsageError, beginning with `given`, unless every prompt segment has blocks of its own."""
    bounds = (0, *switch_frames, frames)
    if list(bounds) != sorted(set(bounds)) or any(f % block_frames for f in bounds):
        raise UsageError(
            f"{given}: expected ascending multiples of config.video.block_frames={block_frames} "
            f"between 0 and {frames}, the frames of the video"
        )


def _check_batches(config: ConfigDict) -> None:
    """Batches that divide what they are of."""
    for name, part, whole_name, whole in (
        (
            "train.micro_batch",
            config.train.micro_batch,
            "train.prompts_per_iteration",
            config.train.prompts_per_iteration,
        ),
        (
            "rollout.branch_chunk",
            config.rollout.branch_chunk,
            "rollout.branches",
            config.rollout.branches,
        ),
        ("eval.batch", config.eval.batch, "eval.prompts", config.eval.prompts),
    ):
        if part and whole % part:
            raise UsageError(f"config.{name}={part} does not divide config.{whole_name}={whole}")


def _check_method(config: ConfigDict) -> None:
    """What is explored, replayed and made a loss of: that they fit together and teach something."""
    explored, source = explore.EXPLORES[config.rollout.explore], replay.STATES[config.replay.states]
    kind, section = losses.KINDS[config.objective.kind], config.objective
    states, context = f"config.replay.states={config.replay.states!r}", config.replay.context
    objective_kind = f"config.objective.kind={section.kind!r}"
    if explored.draws:
        flow.transition_coefficients(config.sampler, config.rollout)
    if config.replay.states == "transitions" and not explored.draws:
        raise UsageError(
            f"{states} are drawn steps, but config.rollout.explore={config.rollout.explore!r} draws"
            " none; set it to transition"
        )
    if config.replay.states == "transitions" and not config.rollout.stochasticity:
        raise UsageError(
            f"{states} have no probability with config.rollout.stochasticity=0, which draws nothing"
        )
    if config.replay.states == "transitions" and config.replay.energy != "velocity":
        raise UsageError(
            f"{states} have a probability by config.replay.energy=velocity, not"
            f" {config.replay.energy!r}"
        )
    if section.kind == "ratio" and config.replay.states != "transitions":
        raise UsageError(f"{objective_kind} needs config.replay.states=transitions, not {states}")
    if section.kind == "nft" and config.replay.states != "ends":
        raise UsageError(f"{objective_kind} needs config.replay.states=ends, not {states}")
    if kind.peers and not source.followed:
        raise UsageError(f"{objective_kind} needs config.replay.states=branch, not {states}")
    if kind.peers and section.anchors > config.rollout.branches:
        raise UsageError(
            f"config.objective.anchors={section.anchors} is more than config.rollout.branches="
            f"{config.rollout.branches}"
        )
    if kind.peers and section.tau_unit == "running_std":
        raise UsageError(
            f"{objective_kind} has a tau for every state: config.objective.tau_unit is group_std or"
            " absolute, not running_std"
        )
    if context == "self_rolled" and (kind.of_state or not source.followed):
        raise UsageError(
            f"config.replay.context='self_rolled' is for config.objective.kind=gibbs and"
            f" config.replay.states=branch, not for {objective_kind} and {states}; own is another"
            " context of each branch"
        )
    if context == "own" and source.of_anchor:
        raise UsageError(f"{states} are read under config.replay.context=anchor, not {context}")
    times = config.replay.times
    if not all(0 < t <= 1 for t in times):
        raise UsageError(f"config.replay.times={times}: expected levels above 0, up to 1")
    _check_steps(config, kind.of_state is not None)
    if kind.of_state is None and source.followed:
        _check_energies(config, explored.routes)


def _check_steps(config: ConfigDict, by_state: bool) -> None:
    """Which steps are replayed, and what their losses count."""
    options, drawn = config.replay, f"config.replay.steps_drawn={config.replay.steps_drawn}"
    if options.steps_drawn and not by_state:
        raise UsageError(
            f"{drawn}: the loss of config.objective.kind={config.objective.kind!r} is one of all"
            " steps together; set it to 0"
        )
    if options.steps_drawn > (most := min(options.grad_steps, replayed_steps(config))):
        raise UsageError(
            f"{drawn} is more than the {most} states of a block that have a gradient"
            " (config.replay.states, config.replay.grad_steps)"
        )
    if options.step_weight != "even" and options.states != "transitions":
        raise UsageError(
            f"config.replay.step_weight={options.step_weight!r} weighs drawn steps, and"
            f" config.replay.states={options.states!r} are none; set it to even"
        )


def _check_energies(config: ConfigDict, routes: bool) -> None:
    """That followed states have an energy: something in the replay is not what the branch read."""
    context = config.replay.context
    if context == "own":
        raise UsageError(
            "config.replay.context='own' is what the branches read: every state that they followed"
            " has an energy of 0, and nothing is learned"
        )
    if not routes and (context == "self_rolled" or recorded_blocks(config) == 1):
        raise UsageError(
            f"config.rollout.explore={config.rollout.explore!r} leaves the history of the pivot as"
            " it is, so that its states have an energy of 0, as have all under"
            " config.replay.context=self_rolled: nothing is learned. Replay more blocks"
            " (config.replay.blocks), or use config.replay.states=ends or anchor"
        )


def without_addresses(names: str) -> str:
    """A list of scorers in which every reward server is called alike, wherever it is."""
    return re.sub(r"https?://[^,]*", "http://", names)


def another_run(saved: ConfigDict, given: ConfigDict) -> list[str]:
    """The fields by which a run of `given` is another one than a run of `saved`: not RESUMABLE.

    The addresses of reward servers may differ, but not their number.
    """
    before, now = flat(saved), flat(given)
    for fields in (before, now):
        if "reward.scorer" in fields:
            fields["reward.scorer"] = without_addresses(fields["reward.scorer"])
    names = sorted(before.keys() | now.keys())
    own = (
        ("train.micro_batch",)
        if before.get("objective.advantage") in objective.OVER_PROMPTS
        else ()
    )
    return [
        n
        for n in names
        if before.get(n) != now.get(n) and (n in own or not n.startswith(RESUMABLE))
    ]


def check_resumable(saved: ConfigDict, given: ConfigDict) -> None:
    """UsageError if continuing a run of `saved` with `given` would be another run."""
    for name in another_run(saved, given):
        raise UsageError(
            f"config.{name}: the run was started with {flat(saved).get(name)!r}, not with"
            f" {flat(given).get(name)!r}; continue it with its own configuration or start another"
            " run"
        )


def with_resumable(saved: ConfigDict, given: ConfigDict) -> ConfigDict:
    """`saved` with the RESUMABLE fields of `given`."""
    out = saved.copy_and_resolve_references()
    fields = {n: value for n, value in flat(given).items() if n.startswith(RESUMABLE)}
    with out.unlocked():
        out.update_from_flattened_dict(fields)
    return out.lock()
