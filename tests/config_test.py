"""Configurations: what is wrong with one is named, with the nearest name or value."""

import json
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from safetensors import safe_open

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import train
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import atomic, sums
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib

TINY = config_lib.load(str(config_lib.shipped("configs/tiny.py")))
FRAMES = TINY.video.blocks * TINY.video.block_frames


def overridden(*arguments):
    return config_lib.override(TINY, arguments)


def test_overrides_of_every_type():
    config = overridden(
        "--config.train.iterations=3",
        "--config.objective.tau=2",  # a whole number for a float
        "--config.sampler.steps=(1,0.5)",
        "--config.video.switch_frames",
        "(6,)",
        "--config.objective.shuffle_advantages",
        "--config.weights=a b.safetensors",
        "--config.reward.weights.VQ=0.5",
        "--config.reward.weights.mine=2",  # of a scorer that the config knows nothing of
    )
    assert (config.train.iterations, config.objective.tau, config.sampler.steps) == (
        3,
        2.0,
        (1.0, 0.5),
    )
    assert isinstance(config.objective.tau, float) and all(
        isinstance(s, float) for s in config.sampler.steps
    )
    assert (config.video.switch_frames, config.objective.shuffle_advantages) == ((6,), True)
    assert (config.weights, config.reward.weights.VQ) == ("a b.safetensors", 0.5)
    assert config.reward.weights.mine == 2.0 and "mine" not in TINY.reward.weights
    assert overridden("--config.video.switch_frames=()").video.switch_frames == ()
    assert "a b" not in TINY.weights and config.is_locked  # the original is as it was


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.train.iteration=3",
            "no field config.train.iteration; did you mean 'train.iterations'?",
        ),
        ("--config.model.rank=3", "no field config.model.rank; did you mean 'lora.rank'?"),
        (
            "--config.objective=3",
            "config.objective is a section; its fields are objective.adaptive,",
        ),
        ("--config.train.iterations=2.5", "config.train.iterations=2.5: expected int, as in "),
        ("--config.objective.tau=high", "config.objective.tau=high: expected float, as in "),
        (
            "--config.objective.shuffle_advantages=ja",
            "config.objective.shuffle_advantages=ja: expected bool, as in",
        ),
        (
            "--config.video.switch_frames=(1.5,)",
            r"config.video.switch_frames=(1.5,): expected elements of type int",
        ),
        (
            "--config.video.switch_frames=ab",
            r"config.video.switch_frames=('ab',): expected elements of type int",
        ),
        ("--config.train.iterations", "Missing value for flag --config.train.iterations"),
        (
            "--config=configs/tiny.py",
            "--config=configs/tiny.py: the configuration is the run's own;",
        ),
        ("tiny", "unexpected argument 'tiny'"),
    ],
)
def test_a_wrong_override_is_named(argument, message):
    with pytest.raises(ValueError) as error:
        overridden(argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.objective.gate=zer",
            "config.objective.gate='zer' is not one of zero, none, mechanism_1, mechanism_2; di",
        ),
        ("--config.objective.tau=nan", "config.objective.tau=nan is not finite"),
        (
            "--config.rollout.branch_chunk=3",
            "config.rollout.branch_chunk=3 does not divide config.rollout.branches=8",
        ),
        ("--config.objective.tau=0", "config.objective.tau=0.0 is not positive"),
        ("--config.sampler.shift=0", "config.sampler.shift=0.0 is not positive"),
        (
            "--config.video.height=5",
            "config.video.height=5 is not a multiple of 2, config.model.patch[1]",
        ),
        (
            "--config.video.width=5",
            "config.video.width=5 is not a multiple of 2, config.model.patch[2]",
        ),
        (
            "--config.model.patch=(1,0,2)",
            "config.model.patch=(1, 0, 2): expected the frames, height and width of a",
        ),
        (
            "--config.model.patch=(2,2,2)",
            "config.model.patch=(2, 2, 2): a token has one frame, as in Wan2.1",
        ),
        (
            "--config.model.num_heads=5",
            "config.model.dim=96 is not a multiple of 10, twice config.model.num_heads",
        ),
        (
            "--config.model.num_heads=32",
            "config.model.dim=96 is not a multiple of 64, twice config.model.num_heads",
        ),
        (
            "--config.mesh.context=8",
            "config.mesh.context=8 does not divide both config.model.num_heads=4 and the 4 tokens"
            " of a frame; it can be 1, 2, 4",
        ),
        ("--config.model.freq_dim=0", "config.model.freq_dim=0 is less than 2"),
        ("--config.model.freq_dim=65", "config.model.freq_dim=65 is not a multiple of 2"),
        ("--config.train.ema_decay=2", "config.train.ema_decay=2.0 is more than 1"),
        (
            "--config.window.recache_frames=0",
            "config.window.recache_frames=0, but prompts switch at config.video.sw",
        ),
        (
            "--config.window.cache_frames=14",
            "config.window.recache_frames=12 frames do not fit beside config.window.sink=3",
        ),
        (
            "--config.window.recache_frames=10",
            "config.window.recache_frames=10 is not a multiple of 3, config.video.bl",
        ),
        (
            "--config.video.blocks=342",
            "config.video.blocks=342 of config.video.block_frames=3 are 1026 frames",
        ),
        (
            "--config.sampler.context_step=1.5",
            "config.sampler.context_step=1.5: expected levels that fall",
        ),
        ("--config.sampler.steps=(0.5,1.0)", "config.sampler.steps=(0.5, 1.0), "),
        ("--config.rollout.branches=1", "config.rollout.branches=1 is less than 2"),
        (
            "--config.rollout.perturbed_steps=99",
            "config.rollout.perturbed_steps=99, but config.sampler.steps has only",
        ),
        ("--config.eval.batch=5", "config.eval.batch=5 does not divide config.eval.prompts=32"),
        (
            "--config.video.switch_frames=(12,25)",
            "config.video.switch_frames=(12, 25): expected ascending multiples",
        ),
        (
            "--config.video.switch_frames=(24,12)",
            "config.video.switch_frames=(24, 12): expected ascending multiples",
        ),
        (
            f"--config.video.switch_frames=({FRAMES},)",
            f"between 0 and {FRAMES}, the frames of the video",
        ),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(argument, message):
    with pytest.raises(ValueError) as error:
        config_lib.check(overridden(argument))
    assert message in str(error.value)


def test_what_is_trained_has_the_positions_of_the_video():
    config = overridden("--config.window.positions=relative", "--config.video.blocks=342")
    config_lib.check(config)  # so long a video can be made, and no longer one be trained on
    assert config_lib.position_span(config) == 3 + 9 + 3  # sink, local slots and block
    config.window.recache_frames = 18
    assert config_lib.position_span(config) == 18 and config_lib.position_span(TINY) == 0
    with pytest.raises(UsageError, match="window.positions='relative' is of generation and eval"):
        config_lib.check_trained(config)
    with pytest.raises(UsageError, match="train with 'absolute'"):
        train.train_and_evaluate(config, "nowhere")
    with pytest.raises(UsageError, match="'near' is not one of absolute, relative"):
        config_lib.check(overridden("--config.window.positions=near"))


def test_a_value_at_its_bound_is_sound():
    config_lib.check(overridden("--config.video.blocks=341", "--config.train.ema_decay=1"))
    config_lib.check(overridden("--config.model.num_heads=48"))
    config_lib.check(
        overridden("--config.video.switch_frames=()", "--config.window.recache_frames=0")
    )


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_the_presets_are_sound_and_have_every_checked_field(preset):
    config = config_lib.load(f"{config_lib.shipped('configs/tiny.py')}:{preset}")
    config_lib.check(config)
    registered = {registry.field for registry in config_lib.REGISTRIES}
    checked = {*registered, *config_lib.MINIMUM, *config_lib.POSITIVE}
    assert checked <= config_lib.flat(config).keys()


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/tiny.py") == TINY  # the shipped one, wherever one stands
    with pytest.raises(
        ValueError, match="no configuration file 'configs/tny.py'; did you mean 'configs/tiny.py'?"
    ):
        config_lib.load("configs/tny.py")
    with pytest.raises(ValueError, match="has the presets paper, release, not 'releas'"):
        config_lib.load("configs/tiny.py:releas")
    (tmp_path / "own.py").write_text(
        "import ml_collections\nget_config = ml_collections.ConfigDict\n"
    )
    (tmp_path / "bare.py").write_text("def get_config():\n    return None\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="bare.py has no presets, so not 'x' either"):
        config_lib.load("bare.py:x")
    with pytest.raises(ValueError, match=r"empty.py defines no get_config\(\)"):
        config_lib.load("empty.py")


def test_a_saved_configuration_is_the_same(tmp_path):
    atomic.write_json(TINY.to_dict(), tmp_path / "config.json")
    assert config_lib.load_saved(tmp_path / "config.json") == TINY
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(ValueError, match="config.json is not a saved configuration"):
        config_lib.load_saved(tmp_path / "config.json")
    with pytest.raises(
        ValueError, match="nowhere is not the directory of a run: there is no .*nowhere/config.json"
    ):
        config_lib.load_saved(tmp_path / "nowhere" / "config.json")


def test_fields_that_a_configuration_lacks_or_has_too_many_are_named(tmp_path):
    newer = TINY.to_dict()
    newer["new"] = 1
    newer["eval"]["new"] = 2
    del newer["reward"]["weights"]["TA"]  # which components there are is the scorers' business
    atomic.write_json(newer, tmp_path / "config.json")
    message = (
        "config.json has other fields than configs/tiny.py, unknown: eval.new, new; correct it"
    )
    with pytest.raises(UsageError, match=message):
        config_lib.load_saved(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; unknown: _class_name, dim; "):
        workdir_lib.resolve(None, tmp_path, [])
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"config.json has other fields .*missing: .* and \d+ more; correct"
    ):
        config_lib.load_saved(tmp_path / "config.json")
    (tmp_path / "own.py").write_text(
        "import ml_collections\nget_config = ml_collections.ConfigDict\n"
    )
    with pytest.raises(ValueError, match="own.py has other fields than configs/tiny.py, missing: "):
        config_lib.load(str(tmp_path / "own.py"))


def test_fields_that_are_newer_than_a_run_take_their_defaults_and_it_says_so(tmp_path, capsys):
    older = TINY.to_dict()
    del older["seed"], older["eval"]["every"], older["mesh"]
    atomic.write_json(older, tmp_path / "config.json")
    for _ in range(2):
        assert config_lib.load_saved(tmp_path / "config.json") == TINY
    out = capsys.readouterr().out
    assert out.count("config.json is older than these fields, which take their defaults: ") == 1
    defaults = f"seed=0, eval.every={TINY.eval.every}, mesh.data=0, mesh.branch=0"
    assert all(field in out for field in defaults.split(", "))


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("train.iterations", 3.5, "expected int, as in 24"),
        ("train.iterations", "5", "expected int, as in 24"),
        ("train.learning_rate", None, "expected float, as in 0.001"),
        ("objective.shuffle_advantages", 1, "expected bool, as in False"),
        ("sampler.steps", 1.0, "expected tuple, as in"),
        ("video.switch_frames", ["a"], "expected elements of type int"),
        ("reward.weights.VQ", "0.4", "expected float"),
    ],
)
def test_a_saved_value_of_another_type_is_named(tmp_path, field, value, expected):
    edited = TINY.to_dict()
    *sections, name = field.split(".")
    section = edited
    for part in sections:
        section = section[part]
    section[name] = value
    atomic.write_json(edited, tmp_path / "config.json")
    with pytest.raises(UsageError, match=f"{field}.*{expected}"):
        config_lib.load_saved(tmp_path / "config.json")


def test_what_may_differ_when_a_run_is_continued():
    longer = overridden(
        "--config.train.iterations=800", "--config.eval.prompts=64", "--config.train.keep=9"
    )
    config_lib.check_resumable(TINY, longer)
    elsewhere = overridden(
        "--config.mesh.data=1", "--config.paths.lora=/b/lora", "--config.weights=/b/base"
    )
    config_lib.check_resumable(TINY, elsewhere)
    with pytest.raises(ValueError, match="config.reward.weights.VQ: the run was started with"):
        config_lib.check_resumable(TINY, overridden("--config.reward.weights.VQ=1"))
    with pytest.raises(ValueError, match="config.seed: the run was started with 0, not with 1"):
        config_lib.check_resumable(TINY, overridden("--config.seed=1"))
    with pytest.raises(ValueError, match="config.new: the run was started with None, not with 1"):
        config_lib.check_resumable(TINY, ConfigDict({**TINY, "new": 1}))
    config_lib.check_resumable(TINY, overridden("--config.train.micro_batch=2"))
    over_prompts = overridden("--config.objective.advantage=batch_std")
    two = config_lib.with_fields(over_prompts, {"train.micro_batch": 2})
    with pytest.raises(ValueError, match="config.train.micro_batch: the run was started with 0,"):
        config_lib.check_resumable(over_prompts, two)


def test_run_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--resume: there is no run under"):
        workdir_lib.run_directory(None, None, resume=True)
    with pytest.raises(ValueError, match="--resume: there is no run in w"):
        workdir_lib.run_directory(None, "w", resume=True)
    first = workdir_lib.run_directory("configs/tiny.py:release", None, resume=False)
    assert first.parent.name == "runs" and first.name.startswith("tiny-release-20")
    workdir_lib.start_run(TINY, first)
    assert workdir_lib.run_directory("configs/tiny.py:release", None, resume=False) != first
    assert workdir_lib.run_directory(None, None, resume=True) == first
    assert workdir_lib.run_directory(None, str(first), resume=True) == first
    (first / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)  # killed as it saved
    assert not workdir_lib.has_checkpoint(first)
    (first / "checkpoints" / "10").mkdir(parents=True)
    assert workdir_lib.has_checkpoint(first)
    newer = first.with_name("newer")
    workdir_lib.start_run(TINY, newer)
    os.utime(newer / "config.json", (2e9, 2e9))
    assert workdir_lib.run_directory(None, None, resume=True) == newer
    (first / "config.json").unlink()
    assert workdir_lib.run_directory(None, str(first), resume=True) == first
    with pytest.raises(UsageError, match="has checkpoints and no config.json; --resume continues"):
        workdir_lib.run_directory(None, str(first), resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--workdir=file is a file; name a directory"):
        workdir_lib.run_directory(None, "file", resume=False)


def test_a_continued_run_keeps_its_own_configuration(tmp_path, capsys):
    assert workdir_lib.resolve(None, tmp_path, []) == TINY
    workdir_lib.start_run(overridden("--config.seed=3"), tmp_path)
    # Before there is a checkpoint, another configuration may take its place.
    assert workdir_lib.resolve(None, tmp_path, []).seed == 3
    assert workdir_lib.resolve("configs/tiny.py", tmp_path, ["--config.seed=5"]).seed == 5
    workdir_lib.start_run(overridden("--config.seed=5", "--config.train.iterations=7"), tmp_path)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    workdir_lib.start_run(workdir_lib.resolve(None, tmp_path, []), tmp_path)
    assert not capsys.readouterr().out
    continued = workdir_lib.resolve(None, tmp_path, ["--config.train.iterations=9"])
    assert (continued.seed, continued.train.iterations) == (5, 9)
    with pytest.raises(ValueError, match="config.seed: the run was started with 5, not with 0"):
        workdir_lib.resolve("configs/tiny.py", tmp_path, [])
    versions = workdir_lib.versions()
    atomic.write_json({**versions, "jax": "0.1"}, tmp_path / "versions.json")
    workdir_lib.start_run(continued, tmp_path)
    out = capsys.readouterr().out
    assert "continued with another configuration: train.iterations 7 -> 9\n" in out
    assert f"jax 0.1 -> {versions['jax']}" in out


def test_a_continued_run_may_take_other_micro_batches_and_says_so(tmp_path, capsys):
    """The gradient is the same mean, summed in another order."""
    workdir_lib.start_run(TINY, tmp_path, at_once=4)
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    workdir_lib.start_run(workdir_lib.resolve(None, tmp_path, []), tmp_path, at_once=4)
    assert not capsys.readouterr().out
    # Fewer fit the devices of today: the configuration leaves it to them.
    workdir_lib.start_run(workdir_lib.resolve(None, tmp_path, []), tmp_path, at_once=2)
    said = "not bit for bit the run that was interrupted: prompts_at_once 4 -> 2\n"
    assert capsys.readouterr().out == said
    fewer = workdir_lib.resolve(None, tmp_path, ["--config.train.micro_batch=1"])
    workdir_lib.start_run(fewer, tmp_path)
    out = capsys.readouterr().out
    assert "train.micro_batch 0 -> 1\n" in out and "prompts_at_once 2 -> 1\n" in out


def write_checkpoint(workdir, step, record):
    """As much of a checkpoint as says what it was made with."""
    extra = workdir / "checkpoints" / str(step) / "extra"
    extra.mkdir(parents=True)
    atomic.write_json(record, extra / "metadata")


def test_a_run_is_looked_at_with_the_configuration_of_its_checkpoint(tmp_path, capsys):
    """Not with an edited config.json, which only says what may differ: where files are now."""
    trained = overridden("--config.seed=5", "--config.weights=/old/w")
    write_checkpoint(tmp_path, 7, sums.sealed({"config": trained.to_dict()}))
    checkpoint = tmp_path / "checkpoints" / "7"
    assert workdir_lib.trained_config(tmp_path) == trained
    taken = f"; the configuration of {checkpoint} is taken\n"
    assert capsys.readouterr().out == f"there is no {tmp_path / 'config.json'}{taken}"

    workdir_lib.start_run(trained, tmp_path)
    assert workdir_lib.trained_config(tmp_path) == trained
    assert capsys.readouterr().out == ""

    edited = overridden("--config.seed=6", "--config.weights=/new/w", "--config.objective.tau=9.0")
    workdir_lib.start_run(edited, tmp_path)
    capsys.readouterr()
    expected = overridden("--config.seed=5", "--config.weights=/new/w")
    assert workdir_lib.trained_config(tmp_path) == expected
    changes = f"objective.tau=9.0 is not {TINY.objective.tau}, seed=6 is not 5"
    said = f"{tmp_path / 'config.json'} was changed, {changes}{taken}"
    assert capsys.readouterr().out == said

    (tmp_path / "config.json").write_text('{"seed": 6')
    assert workdir_lib.trained_config(tmp_path) == trained
    assert "config.json is not a saved configuration: " in capsys.readouterr().out


def test_a_file_that_has_changed_since_the_checkpoint_is_said(tmp_path, capsys):
    config = overridden("--config.weights=/new/w", "--config.paths.vae=/v")
    files = {"config.weights": "aa", "config.paths.vae": "bb", "scorer mine:score": "cc"}
    workdir_lib.start_run(config, tmp_path, {"config.weights": "00"})
    write_checkpoint(tmp_path, 7, sums.sealed({"config": config.to_dict(), "files": files}))
    capsys.readouterr()
    workdir_lib.start_run(config, tmp_path, files)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "files.json").read_text()) == files
    changed = {"config.weights": "a1", "scorer mine:score": "c1", "config.paths.lora": "dd"}
    for _ in range(2):  # until a checkpoint is made with them
        workdir_lib.start_run(config, tmp_path, changed)
        since = f"has changed since {tmp_path / 'checkpoints' / '7'}: its checksum was"
        assert capsys.readouterr().out.splitlines() == [
            f"config.weights=/new/w {since} aa and is a1",
            f"scorer mine:score {since} cc and is c1",
        ]


def test_which_files_a_run_depends_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_for_files.py").write_text("def score(pixels, prompts): ...")
    config = overridden(
        "--config.reward.scorer=motion,mine_for_files:score", "--config.paths.vae=v"
    )
    assert backbone_lib.files_read(config) == {
        "config.weights": backbone_lib.ASSETS / "toy_generator.safetensors",
        "config.paths.vae": Path("v"),
        "scorer mine_for_files:score": tmp_path / "mine_for_files.py",
    }
    assert backbone_lib.files_read(config_lib.load("configs/return.py")) == {
        "config.weights": backbone_lib.ASSETS / "return_generator.safetensors"
    }


def test_small_worlds_have_frames_of_their_size_and_a_generator():
    config = config_lib.override(config_lib.load("configs/return.py"), ["--config.video.height=8"])
    with pytest.raises(UsageError, match="video.height=8: a latent frame of the return has 4"):
        backbone_lib.load(config)
    for spec in ("configs/return.py", "configs/return.py:weak"):
        config = config_lib.load(spec)
        with safe_open(backbone_lib.shipped_weights(config), "numpy") as file:
            metadata = file.metadata()
        assert f"--config={spec} " in metadata["command"]
        assert metadata["model"] == str({**config.model})


def test_a_run_is_finished_if_its_summary_is_of_its_last_checkpoint(tmp_path):
    config = overridden("--config.train.iterations=7")
    evaluated = {"eval": config.eval.to_dict()}
    summary = {"iterations": 7, **evaluated}
    assert workdir_lib.finished(config, tmp_path) is None
    atomic.write_json(summary, tmp_path / "summary.json")
    assert workdir_lib.finished(config, tmp_path) is None  # there is no checkpoint
    write_checkpoint(tmp_path, 7, {})
    assert workdir_lib.finished(config, tmp_path) == summary
    longer = overridden("--config.train.iterations=8")
    wider = overridden("--config.train.iterations=7", "--config.eval.prompts=16")
    assert workdir_lib.finished(longer, tmp_path) is None
    assert workdir_lib.finished(wider, tmp_path) is None
    write_checkpoint(tmp_path, 8, {})  # continued, and killed before its evaluation
    assert workdir_lib.finished(config, tmp_path) is None
    assert workdir_lib.finished(longer, tmp_path) is None
    for limit, further, over in (70, 71, True), (71, 71, False), (0, 71, False):
        summary = {"iterations": 8, "passes_with_another_iteration": further, **evaluated}
        atomic.write_json(summary, tmp_path / "summary.json")
        limited = overridden("--config.train.iterations=9", f"--config.train.budget_passes={limit}")
        assert (workdir_lib.finished(limited, tmp_path) is not None) == over
    for damaged in ("{", "[]", '{"iterations": "8", "eval": {}}', "{}"):
        (tmp_path / "summary.json").write_text(damaged)
        assert workdir_lib.finished(longer, tmp_path) is None


def test_a_checkpoint_without_any_configuration_is_not_continued_with_another(tmp_path):
    write_checkpoint(tmp_path, 7, {"seconds": {}})
    with pytest.raises(UsageError, match="does not say what it was made with, and there is no con"):
        workdir_lib.resolve("configs/tiny.py", tmp_path, [])
    with pytest.raises(UsageError, match="there is no .*config.json"):
        workdir_lib.trained_config(tmp_path)


def test_a_damaged_record_says_nothing(tmp_path):
    """Its damage is named when the checkpoint is restored."""
    record = sums.sealed({"config": overridden("--config.seed=5").to_dict()})
    record["config"]["seed"] = 4
    write_checkpoint(tmp_path, 7, record)
    workdir_lib.start_run(overridden("--config.seed=5"), tmp_path)
    assert workdir_lib.resolve(None, tmp_path, []).seed == 5


def test_a_checkpoint_says_what_the_run_is(tmp_path):
    """config.json is edited, then lost: the run that its checkpoint was made with is continued, or
    none.
    """
    config = overridden("--config.seed=5")
    workdir_lib.start_run(config, tmp_path)
    write_checkpoint(tmp_path, 7, {"seconds": {}, "config": config.to_dict()})
    longer = workdir_lib.resolve(None, tmp_path, ["--config.train.iterations=99"])
    workdir_lib.start_run(longer, tmp_path)
    assert workdir_lib.resolve(None, tmp_path, []) == longer
    edited = json.loads((tmp_path / "config.json").read_text()) | {"seed": 6}
    atomic.write_json(edited, tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.seed: the run was started with 5, not with 6"):
        workdir_lib.resolve(None, tmp_path, [])
    (tmp_path / "config.json").unlink()
    assert workdir_lib.resolve(None, tmp_path, []) == config
    with pytest.raises(ValueError, match="config.seed: the run was started with 5, not with 0"):
        workdir_lib.resolve("configs/tiny.py", tmp_path, [])


@pytest.mark.parametrize("name", ["hpsv3", "videoalign", "clip", "dino", "aesthetic"])
def test_files_of_scorers(name):
    config = overridden(f"--config.reward.scorer=toy, {name}")
    message = f"the scorer {name} needs --config.paths.{name}=..., made by: kvpo-convert "
    with pytest.raises(ValueError, match=message):
        backbone_lib.check_files(config)
    backbone_lib.check_files(config, scored=False, listed=False)


def test_weights_go_with_the_scorers_that_they_are_of():
    def weights(*arguments):
        return overridden(*arguments).reward.weights.to_dict()

    mine = "--config.reward.weights.brightness=1"
    assert weights("--config.reward.scorer=mine:score", mine) == {"brightness": 1.0}
    assert weights("--config.reward.scorer", "mine:score") == {}
    beside = {**TINY.reward.weights.to_dict(), "brightness": 1.0}
    assert weights(mine) == weights("--config.reward.scorer=toy, mine:score", mine) == beside


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n1 / 0", r"mine.py:2 raised ZeroDivisionError: division by zero$"),
        (
            "def get_config():\n    return x",
            r"mine.py:2 raised NameError: name 'x' is not defined$",
        ),
        ("def get_config(:", r"mine.py raised File .*line 1; .*SyntaxError"),
        ("a\0b", r"mine.py raised .*null bytes"),
    ],
)
def test_a_fault_in_a_configuration_file_is_one_line_with_its_place(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config_lib.load(str(tmp_path / "mine.py"))
    assert isinstance(error.value, UsageError)
