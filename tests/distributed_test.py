"""Several processes on one machine, each with CPU devices of its own: the same run as one process
with all of them.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import SMALL, bare_run, batch_of, serving
from jax.extend.core import JaxprEqn, jaxprs_in_params

from kvpo_jax import programs, rollout
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.models.wan import init_variables
from kvpo_jax.rewards import remote
from kvpo_jax.runtime import checkpoint, films, sharding, video
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.runtime.process import STOPPED

PROMPTS, BRANCHES, ITERATIONS = 2, 2, 4
FIELDS = {
    **SMALL,
    "video.blocks": 8,
    "video.switch_frames": (12,),
    "rollout.branches": BRANCHES,
    "rollout.window_blocks": 2,
    "replay.chunk": 4,
    "reward.scorer": "mean_colour:score",
    "reward.weights.VQ": 0.4,
    "reward.weights.MQ": 0.3,
    "reward.weights.TA": 0.3,
    "reward.clip_frames": 6,
    "train.iterations": ITERATIONS,
    "train.prompts_per_iteration": PROMPTS,
    "train.checkpoint_every": 1,
    "train.keep": 10,
    "eval.prompts": 4,
    "eval.batch": 2,
    "eval.every": 0,
}


# A reward on the host, the same in whatever batch a clip comes; the sentences matter.
REWARD = """
import numpy as np

def score(pixels, prompts):
    clips = np.asarray(pixels)
    vq, mq, ta = ([clip[..., c].mean(dtype=np.float64) for clip in clips] for c in range(3))
    marks = [sum(map(ord, prompt)) % 7 for prompt in prompts]
    return {"VQ": np.array(vq), "MQ": np.array(mq), "TA": np.array(ta) * marks}
"""


def make_config(weights: Path, *mesh: int):
    return config_lib.override(config_lib.load("configs/tiny.py"), arguments(weights, *mesh))


def arguments(weights: Path, data: int, branch: int, fsdp: int = 1, context: int = 1) -> list[str]:
    fields = {**FIELDS, "weights": weights, "mesh.data": data, "mesh.branch": branch}
    fields |= {"mesh.fsdp": fsdp, "mesh.context": context}
    return [f"--config.{name}={value}" for name, value in fields.items()]


# ---------------------------------------------------------------- starting processes

# Launcher -> (arguments, environment) by which process i of n learns of the others; the variables
# are those that srun and Open MPI's mpirun set.
LAUNCHERS = {
    "alone": lambda port, n, i: ([], {}),
    "flags": lambda port, n, i: (
        [f"--coordinator=localhost:{port}", f"--num_processes={n}", f"--process_id={i}"],
        {},
    ),
    "srun": lambda port, n, i: (
        [],
        {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_TASKS": f"{n}",
            "SLURM_NTASKS": f"{n}",
            "SLURM_PROCID": f"{i}",
            "SLURM_LOCALID": f"{i}",
            "JAX_COORDINATOR_PORT": f"{port}",
        },
    ),
    "mpirun": lambda port, n, i: (
        [],
        {
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": f"{n}",
            "OMPI_COMM_WORLD_RANK": f"{i}",
            "OMPI_COMM_WORLD_LOCAL_RANK": f"{i}",
            "JAX_COORDINATOR_PORT": f"{port}",
        },
    ),
}


def start(
    launcher: str,
    folder: Path,
    processes: int,
    devices: int,
    command: Sequence[str],
    modules: Path | str = "",
) -> list[subprocess.Popen]:
    """Python with the arguments `command`, so often and with so many devices each; `modules` is on
    its path.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(modules)}
    out = []
    for i in range(processes):
        arguments, variables = LAUNCHERS[launcher](port, processes, i)
        log = (folder / f"{i}.log").open("w+")
        options = {
            "stdout": log,
            "stderr": log,
            "env": environment | variables,
            "cwd": Path(__file__).parents[1],
        }
        out.append(subprocess.Popen([sys.executable, *command, *arguments], **options))
        out[-1].log = log
    return out


def text_of(process: subprocess.Popen) -> str:
    process.log.seek(0)
    return process.log.read()


def finish(processes: Sequence[subprocess.Popen], status: int = 0) -> None:
    try:
        for process in processes:
            assert process.wait(200) == status, text_of(process)
    finally:
        for process in processes:
            process.kill()


# ---------------------------------------------------------------- who starts what

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "32"}


@pytest.mark.parametrize(
    "environment, flags, expected",
    [
        ({}, (None, None, None), None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "32"}, (None, None, None), None),  # not under srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
        (SLURM, (None, None, None), {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None), {}),
        ({"JOB_COMPLETION_INDEX": "0"}, (None, None, None), {}),
        (SLURM, (None, 1, None), None),  # one of many runs that know nothing of each other
    ],
)
def test_a_launcher_is_recognised(environment, flags, expected):
    assert sharding.distributed_arguments(environment, *flags) == expected


@pytest.mark.parametrize(
    "environment, flags, expected",
    [
        ({}, (None, None), (0, 1, None)),
        ({}, (3, 2), (2, 3, None)),
        ({}, (1, None), (0, 1, None)),
        (LAUNCHERS["srun"](1, 4, 3)[1], (None, None), (3, 4, 3)),
        (LAUNCHERS["srun"](1, 4, 3)[1], (1, None), (0, 1, None)),
        (LAUNCHERS["mpirun"](1, 4, 3)[1], (None, None), (3, 4, 3)),
        ({"JOB_COMPLETION_INDEX": "2"}, (4, None), (2, 4, None)),
        ({}, (4, None), "--process_id is missing"),
        ({}, (None, 1), "--num_processes is missing"),
        ({"JOB_COMPLETION_INDEX": "2"}, (None, None), "--num_processes is missing"),
        ({}, (4, 4), "--process_id=4: with --num_processes=4 they are numbered from 0 to 3"),
        ({}, (0, 0), "--process_id=0: with --num_processes=0"),
    ],
)
def test_a_process_that_shares_work_knows_its_part(environment, flags, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            sharding.share_of(environment, *flags)
        return
    share = sharding.share_of(environment, *flags)
    assert share == expected
    assert [number for number in range(8) if share.has(number)] == [*range(8)[share[0] :: share[1]]]


def test_flags_win_over_the_launcher():
    given = sharding.distributed_arguments(SLURM, "a:1", 4, 0)
    assert given == {
        "coordinator_address": "a:1",
        "num_processes": 4,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
    }
    with pytest.raises(ValueError, match="--process_id is missing"):
        sharding.distributed_arguments({}, "a:1", 4, None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "several processes need --workdir=DIR"),
        (
            ["--workdir=w"],
            "or --num_processes=1 if it is a run of its own",
        ),  # Open MPI 5: jax does not see it
    ],
)
def test_processes_that_cannot_join_say_so(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "kvpo_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {"OMPI_COMM_WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not list(tmp_path.iterdir())  # nothing was begun


RUN_AHEAD = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kvpo_jax import main
main.join({"coordinator_address": sys.argv[1], "num_processes": 2, "process_id": int(sys.argv[2])})
rows = NamedSharding(Mesh(np.array(jax.devices()), "rows"), PartitionSpec("rows"))
x = jax.device_put(np.ones((4, 64), np.float32), rows)
add_mean = jax.jit(lambda x: x + x.mean(0), out_shardings=rows)
for _ in range(300):
    x = add_mean(x) / 2
print(float(x.addressable_data(0).sum()), file=sys.stderr)  # only the main one has a stdout
"""


def test_processes_of_several_devices_may_run_ahead(tmp_path):
    """600 programs without a wait, on hosts of two cores: XLA has threads enough (`main.join`)."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = []
    for i in range(2):
        log = (tmp_path / f"{i}.log").open("w+")
        command = ["taskset", "--cpu-list", "0-1", sys.executable, "-c", RUN_AHEAD, address, str(i)]
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        processes[-1].log = log
    finish(processes)
    assert all(text_of(process).splitlines()[-1] == "64.0" for process in processes)


# ---------------------------------------------------------------- what goes over the network


def inside(jaxpr, loops: int = 0) -> Iterator[tuple[JaxprEqn, int]]:
    """Every equation, and the loops around it."""
    for equation in jaxpr.eqns:
        yield equation, loops
        for inner in jaxprs_in_params(equation.params):
            yield from inside(inner, loops + (equation.primitive.name in ("scan", "while")))


@pytest.mark.parametrize("data, fsdp", [(2, 1), (1, 2)])
def test_gradients_are_summed_over_the_devices_once(tmp_path, data, fsdp):
    """Outside all loops, also where each device gets the sum of its own part of LoRA. There no loop
    over the layers leaves whole weights behind for the backward pass.
    """
    config = make_config(tmp_path, data, 2, fsdp)
    mesh = sharding.make_mesh(data, 2, PROMPTS, BRANCHES, fsdp=fsdp, context=2)
    run = bare_run(config, mesh)
    energies = programs.make_energies(config, run.mesh)
    variables = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))

    def gradient(variables, embeddings):
        numbers = jnp.arange(PROMPTS)
        routed_frames = run.programs.draw(jax.random.key(0), numbers, 15)
        noise, changed = keys.NoiseKey(jax.random.key(1), numbers), np.ones((PROMPTS, 2), bool)
        batch = batch_of(embeddings, changed)
        rolled = rollout.rollout(run, variables, batch, noise, routed_frames, 5)

        def total(lora):
            replayed = energies(
                variables["params"], lora, embeddings, rolled.text, rolled.replay, True
            )
            return replayed[0].sum()

        return jax.grad(total)(variables["lora"])

    embeddings = jax.ShapeDtypeStruct(
        (PROMPTS, 2, config.model.text_len, config.model.text_dim), jnp.float32
    )
    jaxpr = jax.make_jaxpr(gradient)(variables, embeddings).jaxpr
    leaves, equations = len(jax.tree.leaves(variables["lora"])), list(inside(jaxpr))
    sums = [loops for found, loops in equations if found.primitive.name.startswith("psum")]
    assert sums == [0] * leaves
    of_weights = [
        (found.primitive.name, loops)
        for found, loops in equations
        if "fsdp" in np.atleast_1d(found.params.get("axis_name", ()))
    ]
    scattered = [loops for name, loops in of_weights if name == "reduce_scatter"]
    assert scattered == [0] * leaves * (fsdp > 1)
    assert any(name == "all_gather" and loops for name, loops in of_weights) == (fsdp > 1)
    scans = [found for found, _ in equations if found.primitive.name == "scan"]
    left = {x.aval.shape for found in scans for x in found.outvars}
    layers = variables["params"]["blocks"]  # no activation has the shape of these two
    assert not left & {layers[name]["kernel"].shape for name in ("ffn_0", "ffn_2")}


# ---------------------------------------------------------------- several processes

EXCHANGE = """
import os, sys
import jax, numpy as np
from kvpo_jax.errors import SharedError
from kvpo_jax.runtime import sharding, sums
flags = [argument.partition("=")[2] for argument in sys.argv[1:]]
flags = (flags[0], int(flags[1]), int(flags[2])) if flags else (None, None, None)
jax.distributed.initialize(**sharding.distributed_arguments(os.environ, *flags))
for data, fsdp, branch in ((4, 1, 2), (2, 1, 4), (8, 1, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)):
    mesh = sharding.make_mesh(data, branch, 8, 8, fsdp=fsdp)
    table = np.arange(8 * 8 * 2.0).reshape(8, 8, 2)
    part = sharding.own_part(sharding.place(table, mesh, sharding.TRAJECTORIES))
    own = sharding.own_prompts(mesh, 8)
    assert part.size == table.size / 4
    np.testing.assert_array_equal(part[:, 0, 0] // 16, own)
    whole, column = sharding.gather(lambda: (part[..., 1], part[:, 0, 0] // 16), mesh)
    np.testing.assert_array_equal(whole, table[..., 1])
    np.testing.assert_array_equal(column, np.arange(8))
    rows = sharding.from_own_prompts(table[own], mesh, 8)
    np.testing.assert_array_equal(sharding.own_part(rows), table[own])
    assert rows.shape == table.shape
    placed = sharding.place(table, mesh, sharding.TRAJECTORIES)
    cut = sharding.place_weights(table, mesh)
    assert cut.addressable_data(0).size == table.size / fsdp
    assert sums.of_arrays({"x": placed, "y": sharding.place(table, mesh), "z": cut}) == {
        name: sums.of_bytes(table.astype(placed.dtype)) for name in "xyz"
    }
last = jax.process_index() == 3
assert sharding.any_process(last) and not sharding.any_process(False)
assert sharding.is_main() == (jax.process_index() == 0)

def infinite():
    if last:
        raise FloatingPointError("this one")

def broken():
    if last:
        raise RuntimeError("broken")

for compute, kind, message in (
    (infinite, FloatingPointError, "process 3 of 4: FloatingPointError: this one"),
    (broken, SharedError, "process 3 of 4: RuntimeError: broken"),
):
    try:
        sharding.gather(compute, mesh)
    except kind as error:
        assert str(error) == message, error
    else:
        raise AssertionError
for wrong in ((2, 2), (1, 4)):
    try:
        sharding.make_mesh(*wrong, 8, 8)
    except ValueError as error:
        assert "does not fit 4 processes of 2 devices" in str(error)
    else:
        raise AssertionError
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["flags", "srun", "mpirun"])
def test_four_processes_exchange_what_is_theirs(tmp_path, launcher):
    """On meshes in which a process has rows, columns or a rectangle."""
    finish(start(launcher, tmp_path, 4, 2, ["-c", EXCHANGE]))


ALONE = """
import os, sys, time
import jax
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import process, sharding
failing, kind, *flags = sys.argv[1:]
flags = [flag.partition("=")[2] for flag in flags]
jax.distributed.initialize(
    **sharding.distributed_arguments(os.environ, flags[0], int(flags[1]), int(flags[2]))
)
with process.ending_together():
    sharding.any_process(False)
    print("began", flush=True)
    if jax.process_index() == int(failing):
        raise {"usage": UsageError, "other": RuntimeError}[kind]("the disk is gone")
    sharding.any_process(False)  # waits for the other
"""


@pytest.mark.parametrize("failing, kind", [(0, "usage"), (1, "other")])
def test_an_error_that_one_process_meets_alone_ends_all(tmp_path, failing, kind):
    """Within seconds and with status 1, while the other waits for it; both say why."""
    processes = start("flags", tmp_path, 2, 1, ["-c", ALONE, f"{failing}", kind])
    while not all("began" in text_of(process) for process in processes):
        assert all(process.poll() in (None, 1) for process in processes), text_of(processes[0])
        time.sleep(0.05)
    begin = time.monotonic()
    finish(processes, 1)
    assert time.monotonic() - begin < 15
    texts = [text_of(process) for process in processes]
    said = {"usage": "the disk is gone", "other": "RuntimeError: the disk is gone"}[kind]
    assert f"error: {said}\n" in texts[failing]
    assert f"error: process {failing} has failed, {said}\n" in texts[1 - failing]
    assert [text.count("Traceback") for text in texts].count(1) == (kind == "other")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A generator whose every parameter is random: zero inits would hide what depends on them.
    REWARD is beside it.
    """
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    like = jax.eval_shape(
        partial(init_variables, wan_config(make_config(path, 1, 1))), jax.random.key(0)
    )["params"]
    rng = np.random.default_rng(0)

    def normal(x):
        return rng.normal(scale=0.15, size=x.shape).astype(x.dtype)

    checkpoint.save_weights(path, jax.tree.map(normal, like), {})
    path.with_name("mean_colour.py").write_text(REWARD)
    return path


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def records_of(workdir: Path) -> list[dict]:
    """branches.jsonl, its lists and objects as arrays and components of their own names."""
    rows = [json.loads(line) for line in (workdir / "branches.jsonl").read_text().splitlines()]
    for row in rows:
        for name, of_component in row.pop("components").items():
            row |= {f"{name} {whose}": value for whose, value in of_component.items()}
        row["routed"] = np.array(row["routed"])
    return rows


def wait_for_lines(workdir: Path, count: int, processes: Sequence[subprocess.Popen]) -> None:
    end = time.monotonic() + 200
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert all(process.poll() is None for process in processes), "\n".join(
            map(text_of, processes)
        )
        assert time.monotonic() < end
        time.sleep(0.02)


def saved_state(workdir: Path, config) -> state_lib.TrainState:
    """On one device, whatever mesh has saved it."""
    mesh = sharding.make_mesh(1, 1, PROMPTS, BRANCHES)
    like = state_lib.abstract_state(config, mesh)
    with checkpoint.manager(workdir / "checkpoints", config.train.keep) as checkpoints:
        return checkpoint.restore_latest(checkpoints, like)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, mesh, sent, tolerance",
    [
        ("flags", (2, 2), signal.SIGKILL, 1e-6),
        ("srun", (1, 2), signal.SIGTERM, 0),
        ("flags", (1, 1, 2), signal.SIGKILL, 0),
        ("flags", (1, 1, 1, 2), signal.SIGKILL, 0),
    ],
    ids=["killed", "terminated", "killed, weights in shards", "killed, tokens of a block"],
)
def test_two_processes_stopped_and_resumed_are_one_uninterrupted(
    weights, tmp_path, launcher, mesh, sent, tolerance
):
    """Prompts, then branches, then prompts with half of every weight, then half the tokens of every
    block lie on two processes, of which the second gets the signal.

    Two addends have one sum, so on two devices every bit is the same; four are added up in another
    order.
    """
    one, two = tmp_path / "one", tmp_path / "two"

    def command(workdir):
        return ["-m", "kvpo_jax.main", f"--workdir={workdir}", *arguments(weights, *mesh)]

    devices = math.prod(mesh)

    def start_two():
        return start(launcher, tmp_path, 2, devices // 2, command(two), weights.parent)

    finish(start("alone", tmp_path, 1, devices, [*command(one), "--profile"], weights.parent))
    assert list((one / "profile").rglob("*.xplane.pb"))

    first, second = processes = start_two()
    try:
        wait_for_lines(two, 2, processes)
        second.send_signal(sent)
        if sent == signal.SIGTERM:  # both agree on the iteration to stop after, save and leave
            finish(processes, STOPPED)
            assert "stopped after iteration" in text_of(first)
            for said in ("stopped", "iteration", "reward=", "training"):  # it prints nothing
                assert said not in text_of(second)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(lines(two)) < ITERATIONS
    finish(start_two())

    config = make_config(weights, *mesh)
    ours, theirs = saved_state(two, config), saved_state(one, config)
    assert ours.iteration == theirs.iteration == ITERATIONS
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
        ours.lora,
        theirs.lora,
    )
    for row, expected in zip(lines(two), lines(one), strict=True):
        assert row == pytest.approx(expected, rel=1000 * tolerance, abs=tolerance)
    records = [records_of(workdir) for workdir in (two, one)]
    assert [len(of_run) for of_run in records] == [ITERATIONS * PROMPTS] * 2
    for row, expected in zip(*records, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            if name == "prompt":
                assert value == expected[name]
            else:
                assert value == pytest.approx(expected[name], rel=1000 * tolerance, abs=tolerance)
    assert (two / "report" / "before_after.png").exists()
    assert_same_videos(two, one, whole=sent == signal.SIGTERM)


def assert_same_videos(workdir: Path, other: Path, whole: bool) -> None:
    """A kill loses those that wait to be written; the last evaluation has them all."""
    ours, theirs = films.films_in(workdir), films.films_in(other)
    assert ours.keys() == theirs.keys() if whole else ours.keys() <= theirs.keys()
    last = [film for film in theirs if film.kind == "heldout" and film.step == ITERATIONS]
    assert last and set(last) <= ours.keys()
    for film, path in ours.items():
        error = video.read(path).astype(int) - video.read(theirs[film])
        assert np.abs(error).mean() < 0.5, film


@pytest.mark.slow
def test_an_error_of_a_scorer_on_one_process_ends_both_and_loses_nothing(weights, tmp_path):
    """At its ninth call, after those for the reference's held-out videos and for an iteration."""
    reward = weights.with_name("failing_colour.py")
    reward.write_text(
        f"{REWARD}\nimport jax\ncalls, score_well = 0, score\n\n\ndef score(pixels, prompts):\n"
        "    global calls\n    calls += 1\n    if calls == 9 and jax.process_index() == 1:\n"
        "        raise ValueError('the reward server is gone')\n"
        "    return score_well(pixels, prompts)\n"
    )
    workdir = tmp_path / "run"
    fields = {"reward.scorer": "failing_colour:score", "train.checkpoint_every": 100}
    command = ["-m", "kvpo_jax.main", f"--workdir={workdir}", *arguments(weights, 2, 1)]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    processes = start("flags", tmp_path, 2, 1, command, weights.parent)
    finish(processes, 1)
    for process in processes:
        last = text_of(process).strip().splitlines()[-1]
        raised = "reward failing_colour:score raised ValueError: the reward server is gone"
        assert last.startswith(f"error: process 1 of 2: {raised}, at {reward}:")
    done = len(lines(workdir))
    assert done >= 1
    config = make_config(weights, 1, 1)
    assert saved_state(workdir, config).iteration == done


@pytest.mark.slow
def test_a_server_of_whole_groups_gets_them_from_the_process_that_has_them(weights, tmp_path):
    """Where two processes have branches of one prompt, nothing is loaded, and a line says so."""
    asked: list[list[str]] = []

    def answer(number, body):
        about = {"protocol": 1, "name": "groups", "components": ["VQ"], "version": "1"}
        if not body:
            return 200, {}, json.dumps(about | {"groups": True}).encode()
        pixels, prompts = remote.unpack(body)
        asked.append(prompts)
        return 200, {}, json.dumps({"VQ": pixels.mean((1, 2, 3, 4)).tolist()}).encode()

    with serving(answer) as (url, _):
        fields = {
            "reward.scorer": url,
            "train.iterations": 1,
            "train.video_every": 0,
            "eval.prompts": 2,
            "eval.scorer": "",
            "eval.by_block": False,
        }
        fields |= {f"reward.weights.{name}": 0 for name in ("MQ", "TA")}
        given = [f"--config.{name}={value}" for name, value in fields.items()]

        def started(name, mesh):
            where = f"--workdir={tmp_path / name}"
            command = ["-m", "kvpo_jax.main", where, *arguments(weights, *mesh), *given]
            return start("flags", tmp_path, 2, 1, command)

        finish(processes := started("split", (1, 2)), 1)
        for process in processes:
            assert "mesh.branch=2 spreads the branches of a prompt over" in text_of(process)
            assert "Traceback" not in text_of(process)
        assert not asked
        finish(started("whole", (2, 1)))
    # Three policies with two prompts of two segments each, and the anchor and two branches of two
    # prompts: what is the same in all is sent once.
    of_groups = [prompts for prompts in asked if len(prompts) > 1]
    assert len(asked) >= 3 * 4 + 4 and {len(prompts) for prompts in of_groups} == {BRANCHES + 1}
    assert all(len({prompt.group for prompt in prompts}) == 1 for prompts in asked)
    assert len({(prompts[0], prompts[0].before) for prompts in of_groups}) == PROMPTS
    (record, other) = records_of(tmp_path / "whole")
    assert record["prompt"] != other["prompt"] and record["VQ branches"] != other["VQ branches"]
