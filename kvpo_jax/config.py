"""The configuration of a run: loaded from a file, overridden by flags, checked, saved, and compared on resume.

A configuration is named `FILE[:PRESET]`, as in `configs/tiny.py:release`; FILE defines `get_config(preset)`. Whatever
is wrong with one is a ValueError that names the file or the field, and the nearest name or value where there is one.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

import kvpo_jax

PACKAGE = Path(__file__).resolve().parent
TINY = "configs/tiny.py"  # what runs when nothing else is asked for
MAX_FRAMES = 1024  # positions of models.layers' rotary table, which is clamped: later frames would share the last one

# Fields that name an alternative.
CHOICES = {
    "backbone": ("toy", "longlive", "memflow"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "cudnn", "xla"),
    "model.remat": ("none", "products", "block"),
    "sampler.solver": ("euler", "renoise"),
    "rollout.draw": ("independent", "dispersed"),
    "replay.context": ("anchor", "self_rolled"),
    "replay.text": ("policy", "rollout"),
    "replay.energy": ("velocity", "clean"),
    "objective.tau_unit": ("group_std", "absolute"),
    "objective.advantage": ("group", "anchor"),
    "objective.fusion_normalize": ("none", "std", "zscore"),
    "objective.gate": ("zero", "mechanism_1", "mechanism_2"),
}
# The smallest value that means something; a group needs two branches to have a spread, an interval two prompts.
MINIMUM = {
    "model.dim": 1, "model.num_heads": 1, "model.num_layers": 1, "model.freq_dim": 2, "lora.rank": 1,
    "video.height": 1, "video.width": 1, "video.blocks": 1, "video.block_frames": 1,
    "sampler.context_step": 0.0, "window.sink": 0, "window.recache_frames": 0,
    "window.bank": 0, "window.bank_interval": 1, "model.sparse_memory": 0,
    "rollout.branches": 2, "rollout.branch_chunk": 0, "rollout.window_blocks": 1, "rollout.perturbed_steps": 0,
    "replay.sigma_floor": 0.0, "replay.blocks": 0, "replay.grad_steps": 1, "replay.chunk": 0,
    "objective.beta": 0.0, "objective.clip_low": 0.0, "objective.clip_high": 0.0, "objective.advantage_clip": 0.0,
    "reward.clip_frames": 0,
    "train.iterations": 1, "train.micro_batch": 0,
    "train.prompts_per_iteration": 1, "train.epochs": 1, "train.rollouts_per_sync": 1,
    "train.learning_rate": 0.0, "train.warmup": 0, "train.weight_decay": 0.0, "train.ema_decay": 0.0,
    "train.checkpoint_every": 1, "train.keep": 1, "train.video_every": 0,
    "eval.prompts": 2, "eval.every": 0, "eval.batch": 0, "mesh.data": 0, "mesh.branch": 0,
}  # fmt: skip
POSITIVE = ("sampler.shift", "objective.tau", "lora.alpha", "train.grad_clip")
# Files that the backbones other than the toy read, and what makes them.
FILES = {
    "weights": "python tools/convert_weights.py CHECKPOINT --output=FILE",
    "paths.lora": "python tools/convert_weights.py LORA --output=FILE",
    "paths.vae": "python tools/convert_weights.py Wan2.1_VAE.pth --output=FILE",
    "paths.hpsv3": "python tools/convert_weights.py HPSV3 --output=FILE ... (docs/rewards.md)",
    "paths.videoalign": "python tools/convert_weights.py VIDEOREWARD --output=FILE ... (docs/rewards.md)",
    "paths.umt5": "python tools/convert_weights.py models_t5_umt5-xxl-enc-bf16.pth --output=FILE",
    "paths.tokenizer": "the folder google/umt5-xxl of a Wan2.1 checkpoint",
    "paths.embeddings": "python tools/encode_prompts.py --prompts=FILE --output=FOLDER ...",
    "paths.prompts": "a file of prompt sequences (docs/data.md)",
}
# What may differ when a run is continued: how long it runs, what is only looked at, and the machine: its devices and
# where it has the files, which are taken to be the same ones.
RESUMABLE = (
    "train.iterations", "train.checkpoint_every", "train.keep", "train.video_every", "eval.", "reward.resident",
    "mesh.", "paths.", "weights",
)  # fmt: skip


def nearest(name: str, names: Iterable[str]) -> str:
    """The ending of an error message, "; did you mean 'train.iterations'?", empty if nothing resembles `name`.

    Of a dotted name the last word counts by itself too, so that the wrong section is forgiven.
    """

    def resemblance(other):
        ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
        whole = ratio(name, other)
        return max(whole, ratio(name.rpartition(".")[2], other.rpartition(".")[2])), whole

    best = max(names, key=resemblance, default="")
    return f"; did you mean {best!r}?" if best and resemblance(best)[0] > 0.6 else ""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """dotted field name -> value, of every leaf."""
    out = {}
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
    raise ValueError(f"there is no configuration file {path!r}{nearest(path, names)}")


def load(spec: str) -> ConfigDict:
    """The configuration FILE[:PRESET]."""
    path, _, preset = spec.partition(":")
    file = find(path)
    if file.suffix != ".py":
        raise ValueError(f"{path}: a configuration is a Python file with a get_config()")
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    if preset and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"{path} has no presets, so not {preset!r} either")
    config = module.get_config(*([preset] if preset else [])).lock()
    if file != shipped(TINY):
        check_fields(config, file)
    return config


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes the file at once or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def load_saved(path: Path) -> ConfigDict:
    """The configuration that a run directory's config.json holds."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is not the directory of a run: there is no {path}")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{path} is not a saved configuration: {error}") from error
    config = ConfigDict(_with_tuples(saved) if isinstance(saved, dict) else {}).lock()
    check_fields(config, path)
    return config


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------- overrides


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """A copy of `config` with the flags `--config.FIELD=VALUE` of the command line `arguments` (no program name)."""
    config = config.copy_and_resolve_references()
    for argument in arguments:
        # Which components there are is the scorers' business; those of one's own have a weight of 0 before.
        if match := re.match(r"--?config\.reward\.weights\.(\w+)", argument):
            with config.unlocked():
                config.reward.weights[match[1]] = config.reward.weights.get(match[1], 0.0)
    names, sections = flat(config), {name.rpartition(".")[0] for name in flat(config)}
    for argument in arguments:
        if re.match(r"--?config=", argument):
            raise ValueError(f"{argument}: the configuration is the run's own; --config.FIELD=VALUE changes a field")
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not match or match[1] in names:
            continue
        if match[1] in sections:
            fields = ", ".join(name for name in names if name.startswith(f"{match[1]}."))
            raise ValueError(f"config.{match[1]} is a section; its fields are {fields}")
        raise ValueError(f"there is no field config.{match[1]}{nearest(match[1], names)}")
    values = flags.FlagValues()
    command_line = ["", *arguments]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command_line)
    try:
        left = values(command_line)[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"there is no flag --{error.flagname}{nearest(error.flagname, flags.FLAGS)}") from error
    except flags.IllegalFlagValueError as error:
        name, value = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL).groups()
        raise ValueError(
            f"config.{name}={value}: expected {type(names[name]).__name__}, as in {names[name]!r}"
        ) from error
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if left:
        raise ValueError(f"unexpected argument {left[0]!r}")
    given, scorers = values["config"].override_values, lambda listed: {name.strip() for name in listed.split(",")}
    with values["config"].value.unlocked() as out:
        for name, value in given.items():
            out.update_from_flattened_dict({name: _like(name, value, names[name])})
        # The weights in a configuration are of its scorers' components: they go when none of these is named any more.
        if not scorers(names["reward.scorer"]) & scorers(out.reward.scorer):
            own = {name: weight for name, weight in out.reward.weights.items() if f"reward.weights.{name}" in given}
            out.reward.weights = ConfigDict(own)
    return out.lock()


def _like(name: str, value: Any, default: Any) -> Any:
    """`value`, the elements of a tuple as the type of those of `default`; a scalar has its type already."""
    if not isinstance(default, tuple) or not default:
        return value
    kind = type(default[0])
    if any(type(x) is not kind and (kind, type(x)) != (float, int) for x in value):
        raise ValueError(f"config.{name}={value}: expected elements of type {kind.__name__}, as in {default}")
    return tuple(kind(x) for x in value)


# ---------------------------------------------------------------- checks


def check_fields(config: ConfigDict, path: Path) -> None:
    """Raises a ValueError if what `path` holds has other fields than configs/tiny.py: another version's, or foreign.

    The components in reward.weights are the scorers' business.
    """
    names = lambda config: {name for name in flat(config) if not name.startswith("reward.weights.")}
    own, known = names(config), names(load(str(shipped(TINY))))
    listed = lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    faults = {"missing": sorted(known - own), "unknown": sorted(own - known)}
    if found := [f"{kind}: {listed(names)}" for kind, names in faults.items() if names]:
        raise ValueError(f"{path} has other fields than {TINY}, {'; '.join(found)}; correct it or name another")


def check(config: ConfigDict) -> None:
    """Raises a ValueError that names the first field whose value cannot be meant."""
    fields = flat(config)
    for name, value in fields.items():
        if name in CHOICES and value not in CHOICES[name]:
            allowed = ", ".join(CHOICES[name])
            raise ValueError(f"config.{name}={value!r} is not one of {allowed}{nearest(value, CHOICES[name])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.{name}={value} is not finite")
        if name in MINIMUM and value < MINIMUM[name]:
            raise ValueError(f"config.{name}={value} is less than {MINIMUM[name]}")
        if name in POSITIVE and value <= 0:
            raise ValueError(f"config.{name}={value} is not positive")
    levels = (*config.sampler.steps, config.sampler.context_step)
    if len(levels) < 2 or levels[0] > 1 or any(after >= before for before, after in itertools.pairwise(levels)):
        raise ValueError(
            f"config.sampler.steps={config.sampler.steps}, config.sampler.context_step={config.sampler.context_step}: "
            "expected levels that fall, from 1 at most"
        )
    model, video = config.model, config.video
    if len(model.patch) != 3 or min(model.patch) < 1:
        raise ValueError(f"config.model.patch={model.patch}: expected the frames, height and width of a token")
    for name, divisor, what in (
        ("model.dim", 2 * model.num_heads, "twice config.model.num_heads"),  # rotary positions turn pairs of channels
        ("model.freq_dim", 2, "a cosine and a sine"),
        ("video.height", model.patch[1], "config.model.patch[1]"),
        ("video.width", model.patch[2], "config.model.patch[2]"),
        ("window.recache_frames", video.block_frames, "config.video.block_frames"),
    ):
        if fields[name] % divisor:
            raise ValueError(f"config.{name}={fields[name]} is no multiple of {divisor}, {what}")
    if video.switch_frames and not config.window.recache_frames:
        raise ValueError(
            f"config.window.recache_frames=0, but prompts switch at config.video.switch_frames={video.switch_frames}"
        )
    if config.train.ema_decay > 1:
        raise ValueError(f"config.train.ema_decay={config.train.ema_decay} is more than 1")
    steps, frames = len(config.sampler.steps), video.blocks * video.block_frames
    if frames > MAX_FRAMES:
        raise ValueError(
            f"config.video.blocks={video.blocks} of config.video.block_frames={video.block_frames} are {frames} "
            f"frames; there are positions for {MAX_FRAMES}"
        )
    for name in ("rollout.perturbed_steps", "replay.grad_steps"):
        if fields[name] > steps:
            raise ValueError(f"config.{name}={fields[name]}, but config.sampler.steps has only {steps}")
    if config.train.micro_batch and config.train.prompts_per_iteration % config.train.micro_batch:
        raise ValueError(
            f"config.train.micro_batch={config.train.micro_batch} does not divide "
            f"config.train.prompts_per_iteration={config.train.prompts_per_iteration}"
        )
    if config.rollout.branch_chunk and config.rollout.branches % config.rollout.branch_chunk:
        raise ValueError(
            f"config.rollout.branch_chunk={config.rollout.branch_chunk} does not divide "
            f"config.rollout.branches={config.rollout.branches}"
        )
    if config.eval.batch and config.eval.prompts % config.eval.batch:
        raise ValueError(
            f"config.eval.prompts={config.eval.prompts} is no multiple of config.eval.batch={config.eval.batch}"
        )
    check_switches(f"config.video.switch_frames={video.switch_frames}", video.switch_frames, video.block_frames, frames)


def check_switches(given: str, switch_frames: Sequence[int], block_frames: int, frames: int) -> None:
    """Raises a ValueError that begins with `given` unless every prompt segment has blocks of its own."""
    bounds = (0, *switch_frames, frames)
    if list(bounds) != sorted(set(bounds)) or any(f % block_frames for f in bounds):
        raise ValueError(
            f"{given}: expected ascending multiples of config.video.block_frames={block_frames} between 0 and "
            f"{frames}, the frames of the video"
        )


def check_files(config: ConfigDict, needed: Sequence[str] = ("weights", "paths.vae", "paths.prompts")) -> None:
    """Raises a ValueError for a file of FILES that is needed and not named, or named and not there.

    Sentences are encoded with paths.embeddings, or else with paths.umt5 and paths.tokenizer.
    """
    fields, needs = flat(config), {}
    if config.backbone != "toy":
        text = ("paths.embeddings",) if config.paths.embeddings else ("paths.umt5", "paths.tokenizer")
        needs |= dict.fromkeys((*needed, *text), f"the {config.backbone} backbone")
    if "paths.prompts" in needed:  # and scored
        scorers = f"{config.reward.scorer},{config.eval.scorer}".replace(" ", "").split(",")
        needs |= {f"paths.{name}": f"the scorer {name}" for name in ("hpsv3", "videoalign") if name in scorers}
    for name, what in needs.items():
        if not fields[name]:
            instead = " (or name config.paths.embeddings)" if name in ("paths.umt5", "paths.tokenizer") else ""
            raise ValueError(f"{what} needs --config.{name}=..., made by: {FILES[name]}{instead}")
    for name in FILES:
        if fields[name] and not Path(fields[name]).exists():
            raise ValueError(f"config.{name}={fields[name]}: there is no such file; it is made by {FILES[name]}")


def check_resumable(saved: ConfigDict, given: ConfigDict) -> None:
    """Raises a ValueError if continuing a run of `saved` with `given` would be another run: see RESUMABLE."""
    before, now = flat(saved), flat(given)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and not name.startswith(RESUMABLE):
            raise ValueError(
                f"config.{name}: the run was started with {before.get(name)!r}, not with {now.get(name)!r}; continue "
                "it with its own configuration or start another run"
            )


def explain(error: Exception) -> NoReturn:
    """Ends the program with one line if the package raised the error itself, to say what is wrong with a flag or file.

    Any other is a fault of a program, of this one or of somebody's scorer, and keeps its traceback.
    """
    origin = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(Path(origin.filename).is_relative_to(folder) for folder in (PACKAGE, shipped(TINY).parent))
    if isinstance(error, OSError) or (ours and origin.line.startswith("raise")):
        sys.exit(f"error: {': '.join([*getattr(error, '__notes__', ()), *map(str, error.args[:1] or [error])])}")
    raise error


# ---------------------------------------------------------------- run directories


def has_checkpoint(workdir: Path) -> bool:
    """Whether there is something to continue; what is being saved has a longer name."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def run_directory(spec: str | None, workdir: str | None, resume: bool) -> Path:
    """Where the run is or will be: `workdir`, or the newest run under runs/ to resume, or a new directory there."""
    if workdir:
        if Path(workdir).is_file():
            raise ValueError(f"--workdir={workdir} is a file; name a directory")
        if resume and not (Path(workdir) / "config.json").exists():
            raise ValueError(f"--resume: there is no run in {workdir}")
        return Path(workdir)
    if resume:
        configs = list(Path("runs").glob("*/config.json"))
        if not configs:
            raise ValueError(f"--resume: there is no run under {Path('runs').absolute()}")
        return max(configs, key=lambda file: file.stat().st_mtime).parent
    path, _, preset = (spec or TINY).partition(":")
    name = "-".join([Path(path).stem, *([preset] if preset else []), time.strftime("%Y%m%d-%H%M%S")])
    candidates = (Path("runs", f"{name}-{i}" if i else name) for i in itertools.count())
    return next(path for path in candidates if not path.exists())


def resolve(spec: str | None, workdir: Path | None, arguments: Sequence[str]) -> ConfigDict:
    """The checked configuration of the run in `workdir`, new or continued; None is no run at all.

    A continued run that is given no `spec` keeps its own configuration, with `arguments` over it. Before there is a
    checkpoint, any configuration may replace the one that is saved.
    """
    record = workdir and workdir / "config.json"
    saved = load_saved(record) if record and record.exists() else None
    base = saved if saved is not None and spec is None else load(spec or str(shipped(TINY)))
    config = override(base, arguments)
    check(config)
    if saved is not None and has_checkpoint(workdir):
        check_resumable(saved, config)
    return config


def start_run(config: ConfigDict, workdir: Path) -> None:
    """Leaves config.json and versions.json in `workdir`; says in what a run that is continued differs from them."""
    workdir.mkdir(parents=True, exist_ok=True)
    for record, now, what in (
        (workdir / "config.json", config.to_dict(), "continued with another configuration"),
        (workdir / "versions.json", versions(), "not bit for bit the run that was interrupted"),
    ):
        if has_checkpoint(workdir) and record.exists():
            before = flat(_with_tuples(json.loads(record.read_text())))
            pairs = [(name, before.get(name), value) for name, value in flat(now).items()]
            if changed := [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]:
                print(f"{what}: {', '.join(changed)}", flush=True)
        write_json(now, record)


def versions() -> dict[str, Any]:
    """What this run's numbers depend on besides its configuration."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    devices = jax.devices()
    return {
        "kvpo_jax": kvpo_jax.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that the package stands in, "-dirty" if it has changes; None outside of one."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------- of every command


def parse_flags(argv: list[str]) -> list[str]:
    """Leaves every --config.FIELD=VALUE in place: the fields are known once the configuration is loaded."""
    flags.FLAGS.set_gnu_getopt()
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {error}")


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, under ~/.cache/kvpo_jax unless JAX's own variables say otherwise."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kvpo_jax/xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
