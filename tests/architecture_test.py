"""Every alternative of docs/architecture.md, registered from outside the package and run."""

import dataclasses
import importlib
import re
from itertools import dropwhile, takewhile
from pathlib import Path

import jax.numpy as jnp
import pytest
from equipment import SMALL, configure, random_weights

from kvpo_jax import backbone, programs, train
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import explore, flow, losses, objective, replay, routing
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.process import Clock

DOC = Path(__file__).parents[1] / "docs" / "architecture.md"


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """The names of the outside alternatives that have been called; they are all called "mine"."""
    used = set()

    def register(registry, function):
        def mine(*arguments):
            used.add(registry.field)
            return function(*arguments)

        monkeypatch.setitem(registry, "mine", mine)

    def my_states(*arguments):
        used.add(replay.STATES.field)
        return replay.anchor_states(*arguments)

    monkeypatch.setitem(replay.STATES, "mine", replay.Source(my_states, of_anchor=True))
    register(flow.SOLVERS, lambda x, v, sigma, sigma_next, noise: x + (sigma_next - sigma) * v)
    register(
        routing.DRAWS,
        lambda key, window, g, pool, fork: jnp.sort(
            (window.sink + jnp.arange(g)[:, None] + jnp.arange(window.routed)) % fork, axis=-1
        ),
    )
    register(replay.ENERGIES, lambda v, u, sigma, options: jnp.abs(v - u).mean((1, 2, 3, 4)))
    register(replay.CONTEXTS, replay.anchor_energies)
    register(replay.TEXTS, lambda encode, text: encode())
    register(objective.ADVANTAGES, lambda options, weights, scores, local: scores.branches)
    register(objective.GATES, lambda gate_open, log_pi: jnp.ones(()))
    register(objective.TAU_UNITS, lambda energies, energy_unit: energies.max())

    def my_noise(options, shared, own):
        used.add(explore.EXPLORES.field)
        first = explore.initial_noise(options, shared, own)[:, :, :1]
        return jnp.concatenate([first, explore.step_noise(options, shared, own)[:, :, 1:]], axis=2)

    def my_loss(options, distance, at):
        used.add(losses.KINDS.field)
        loss = at.states.advantage * distance(at.theta, at.states.u)
        return loss, dict.fromkeys(losses.SEEN, 0 * loss)

    mine = explore.Explore(noise=my_noise, common_start=False, draws=True)
    monkeypatch.setitem(explore.EXPLORES, "mine", mine)
    monkeypatch.setitem(losses.KINDS, "mine", losses.Kind(my_loss))
    register(explore.MIXES, lambda shared, own, scale: 0.6 * shared + 0.8 * own)
    register(flow.KERNELS, lambda sigma, strength: (0.8 + 0 * sigma[1:], 0.6 + 0 * sigma[1:]))
    register(replay.STEP_WEIGHTS, lambda drop, std, of_velocity: 1 + drop)
    return used


ALTERNATIVES = {
    "sampler.solver",
    "rollout.draw",
    "replay.states",
    "replay.energy",
    "replay.context",
    "replay.text",
    "objective.advantage",
    "objective.gate",
    "objective.tau_unit",
}


# Those that drawn steps read, with a loss of their own.
OF_DRAWN = {
    "rollout.explore",
    "rollout.noise_mix",
    "rollout.kernel",
    "replay.step_weight",
    "objective.kind",
}
FIELDS = {
    "reward.scorer": f"{__name__}:score",
    "reward.weights.brightness": 1.0,
    "eval.scorer": "",
    "train.iterations": 1,
    "train.prompts_per_iteration": 1,
    "rollout.branches": 3,
    "eval.prompts": 2,
    "eval.batch": 2,
    "video.blocks": 9,
}


def test_alternatives_from_outside_make_a_run(used, tmp_path, monkeypatch):
    made = []

    def my_backbone(config):
        made.append(config.backbone)
        return backbone.toy_backbone(config)

    monkeypatch.setitem(backbone.BACKBONES, "mine", backbone.Kind(my_backbone))
    fields = {**dict.fromkeys(ALTERNATIVES, "mine"), "backbone": "mine"}
    config = configure("configs/tiny.py", FIELDS | fields)
    config_lib.check(config)
    summary = train.train_and_evaluate(config, tmp_path)
    assert used == ALTERNATIVES and made == ["mine"]
    assert set(summary["components"]["online"]) == {"brightness"}


def test_alternatives_of_drawn_steps_from_outside_make_an_update(used, tmp_path):
    spec, fields = "configs/tiny.py:flow_grpo", {**FIELDS, **SMALL}
    weights = random_weights(tmp_path / "generator.safetensors", configure(spec, SMALL))
    fields |= {**dict.fromkeys(OF_DRAWN, "mine"), "weights": weights, "mesh.branch": 1}
    run = run_lib.load(configure(spec, fields))
    config_lib.check(run.config)
    state = state_lib.init_state(run.config, run.mesh, run.initial_lora())
    _, metrics, [group] = train.improve(run, state, 0, Clock())
    assert used == OF_DRAWN and metrics["update_norm"] > 0
    assert group.judged.scores.branches.std() > 1e-4


def score(pixels, prompts):
    return {"brightness": pixels.mean((1, 2, 3, 4))}


@pytest.mark.parametrize("registry", config_lib.REGISTRIES, ids=lambda r: r.field)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(registry):
    config = config_lib.load("configs/tiny.py").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({registry.field: "mien"})
    with pytest.raises(UsageError) as error:
        config_lib.check(config)
    assert str(error.value).startswith(
        f"config.{registry.field}='mien' is not one of {', '.join(registry)}"
    )


def test_every_registry_is_in_the_table():
    """And the table names no registry that there is not."""
    table = set(re.findall(r"`([A-Z_]{4,})`", DOC.read_text()))
    of_methods = {**vars(explore), **vars(replay), **vars(losses), **vars(objective)}
    modules = {**vars(flow), **vars(routing), **of_methods, **vars(backbone)}
    registries = {n for n, value in modules.items() if type(value).__name__ == "Registry"}
    assert table - {"METHODS"} == registries - {"TEXTS", "NORMALIZERS"}


def cells(text, heading):
    """The rows of the first table below a heading, without its head."""
    lines = text.partition(f"## {heading}\n")[2].splitlines()
    table = takewhile(
        lambda x: x.startswith("|"), dropwhile(lambda x: not x.startswith("|"), lines)
    )
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in [*table][2:]]


def found(name):
    """What a dotted name of a page means, as `objective.loss` does."""
    module, _, attribute = name.partition(".")
    (path,) = (DOC.parents[1] / "kvpo_jax").rglob(f"{module}.py")
    dotted = ".".join(path.relative_to(DOC.parents[1]).with_suffix("").parts)
    made = importlib.import_module(dotted)
    return path, getattr(made, attribute) if attribute else made


def test_an_iteration_calls_every_program():
    """And the table names no program or function that there is not."""
    named = set()
    for _, functions, called in cells(DOC.read_text(), "An iteration"):
        assert all(callable(found(name)[1]) for name in re.findall("`(.+?)`", functions))
        named |= set(re.findall("`(.+?)`", called))
    assert named == {field.name for field in dataclasses.fields(programs.Programs)}


def test_every_equation_of_the_readme_is_found_where_it_says():
    """The linked file defines the function, and a docstring of the row's names its equation."""
    readme = DOC.parents[1] / "README.md"
    numbers = set()
    for paper, _, functions in cells(readme.read_text(), "The paper, equation by equation"):
        said = []
        for names, link in re.findall(r"\[([^]]+)\]\((\S+?)\)", functions):
            assert (readme.parent / link).is_file()
            for name in re.findall("`(.+?)`", names):
                path, value = found(name)
                assert path == readme.parent / link, name
                said.append(value.__doc__ or "")
        for number in re.findall(r"^Eq\. (\d+)$", paper):
            numbers.add(int(number))
            assert re.search(rf"Eq\. {number}\b", "".join(said)), paper
    assert numbers == {*range(1, 10), 15, 16}


def test_the_rooms_of_the_layout_exist():
    layout = DOC.read_text().partition("```\n")[2].partition("```")[0]
    package = DOC.parents[1] / "kvpo_jax"
    files = set(re.findall(r"(\w+\.py)\b", layout.partition("kvpo_jax/")[2]))
    folders = set(re.findall(r"^  (?:(\w+)/)", layout, re.MULTILINE))
    assert files == {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert folders and all((package / folder).is_dir() for folder in folders)


def test_the_config_names_the_registry_of_every_alternative():
    """configs/tiny.py does not list the alternatives again."""
    comments = {
        "model.dtype": "layers.DTYPES",
        "model.attention": "attention.IMPLEMENTATIONS",
        "model.remat": "wan.REMAT",
    }
    source = config_lib.shipped("configs/tiny.py").read_text()
    named = set(re.findall(r"# in (\w+\.[A-Z_]+)", source))
    modules = {"flow": flow, "routing": routing, "replay": replay, "objective": objective}
    modules |= {"explore": explore, "losses": losses}
    for module, registries in modules.items():
        for name, value in vars(registries).items():
            if type(value).__name__ == "Registry" and value.field.split(".")[0] != "backbone":
                comments[value.field] = f"{module}.{name}"
    comments["backbone"] = "backbone.BACKBONES"
    assert named == set(comments.values())
