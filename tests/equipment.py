"""Equipment that several test files need: runs without files, small configurations, commands."""

import http.server
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from kvpo_jax import programs, run
from kvpo_jax.memory import fileless_backbone
from kvpo_jax.models.wan import init_variables
from kvpo_jax.runtime import checkpoint
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import Array, Pixels, PromptBatch, PyTree

ROOT = Path(__file__).resolve().parents[1]
# A generator that compiles in a moment; its latents are the toy's.
SMALL = {
    "model.dim": 16,
    "model.ffn_dim": 32,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.freq_dim": 16,
    "lora.rank": 2,
    "lora.alpha": 2.0,
}
# Of these sizes, an iteration of four groups of four branches in one layer.
SMALL_RUN = {
    **SMALL,
    "model.num_layers": 1,
    "video.blocks": 8,
    "video.switch_frames": (),
    "rollout.branches": 4,
    "train.prompts_per_iteration": 4,
    "eval.prompts": 4,
}
# With texts and latents that are as small; the toy's rewards cannot score them.
SMALLEST = {
    **SMALL,
    "model.text_dim": 4,
    "model.text_len": 3,
    "model.channels": 2,
    "video.height": 4,
    "video.width": 2,
}

# A scorer of somebody's own, which the fixture `served` serves.
GROUP_REWARD = '''
"""A reward of a group, and a fault."""
import numpy as np
from kvpo_jax.errors import UsageError

def judge(pixels, prompts):
    if prompts[0] == "fail":
        raise RuntimeError("no memory for \\n this clip")
    light = np.asarray(pixels, np.float32).mean((1, 2, 3, 4))
    groups = np.array([prompt.group for prompt in prompts])
    return {
        "light": light,
        "over_group": light - np.array([light[groups == g].mean() for g in groups]),
        "before": [len(prompt.before) for prompt in prompts],
        "clips": np.full(len(prompts), len(prompts)),
    }
'''


def configure(spec: str, fields: dict) -> ml_collections.ConfigDict:
    """The configuration `spec` with fields, dotted name -> value, over it."""
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return config_lib.override(config_lib.load(spec), arguments)


def bare_run(config: ml_collections.ConfigDict, mesh: Mesh, params: PyTree = None) -> run.Run:
    """A Run of these base weights that generates, and cannot decode or score."""
    backbone = fileless_backbone(config)
    return run.Run(config, mesh, backbone, params, programs.build(config, mesh), None)


def fresh_variables(config: ml_collections.ConfigDict) -> PyTree:
    """{"params", "lora"} of a generator as a run begins; one program makes them."""
    return jax.jit(partial(init_variables, wan_config(config)))(jax.random.key(0))


def random_variables(config: ml_collections.ConfigDict, scale: float, seed: int = 0) -> PyTree:
    """{"params", "lora"} of a generator, every parameter random, of this std.

    The zeros and ones of the initialisation would hide what depends on them.
    """
    like = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), like)


def pixels_of(videos: Array, anchor: Array | None = None, fork: int = 0) -> Pixels:
    """All frames of videos [P, T, frames, h, w, 3] and of their anchor [P, frames, h, w, 3]."""
    anchor = None if anchor is None else anchor[:, None]
    return Pixels(videos, anchor, ((0, videos.shape[2]),), fork)


def batch_of(embeddings: np.ndarray, changed: np.ndarray) -> PromptBatch:
    """PromptBatch of float[P, M, K, text_dim] and bool[P, M], with sentences that nobody reads."""
    numbers = np.arange(len(embeddings), dtype=np.int32)
    return PromptBatch(embeddings, changed, numbers, (("",) * changed.shape[1],) * len(changed))


def save_lora(path: Path, lora: PyTree, config: ml_collections.ConfigDict) -> Path:
    """Writes a LoRA as kvpo-convert does, of the sizes of the configuration."""
    model = config.model
    sizes = {name: model[name] for name in ("dim", "ffn_dim", "num_layers")}
    made = json.dumps({**sizes, "rank": config.lora.rank, "alpha": config.lora.alpha})
    checkpoint.save_weights(path, lora, {"kind": "wan_lora", "config": made})
    return path


def random_weights(path: Path, config: ml_collections.ConfigDict) -> Path:
    """Writes a generator of random weights, none of which is 0, of the sizes of the config."""

    params = fresh_variables(config)["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    params = jax.tree.map(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape), params, noise)
    checkpoint.save_weights(path, params, {})
    return path


def undocumented(names: Iterable[str], components: Iterable[str] = ()) -> list[str]:
    """The keys of a run's records that are in no table of docs/runs.md.

    NAME in a key there is one of the components; POLICY, LOOK and STAGE are any text.
    """
    page = (Path(__file__).parents[1] / "docs" / "runs.md").read_text()
    columns = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    keys = [key for column in columns for key in re.findall(r"`(\w+)`", column)]
    parts = {
        "NAME": f"({'|'.join(components)})",
        **dict.fromkeys(("POLICY", "LOOK", "STAGE"), r"\w+"),
    }
    forms = [re.sub("[A-Z]+", lambda part: parts[part[0]], key) for key in keys]
    return [name for name in names if not any(re.fullmatch(form, name) for form in forms)]


@contextmanager
def reward_server(folder: Path, *arguments):
    """The address of tools/reward_server.py in a process of its own, in `folder`."""
    tool = Path(__file__).parents[1] / "tools" / "reward_server.py"
    command = [sys.executable, tool, "--port=0", *arguments]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": folder}
    with subprocess.Popen(list(map(str, command)), **options) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("serving"):
                    break
            else:
                raise AssertionError("".join(said))
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield re.search(r"http\S+", line)[0]
        finally:
            process.kill()


@contextmanager
def serving(answer):
    """The address of a web server on this machine, and the requests that it got.

    Args:
      answer: (number of the request, its body) -> status, headers, bytes. A GET is counted too; its
        body is empty.

    Yields:
      The address, and a list of (path, headers, body).
    """
    seen, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                number = len(seen)
                seen.append((self.path, dict(self.headers), body))
            status, headers, content = answer(number, body)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            with suppress(BrokenPipeError, ConnectionResetError):  # of a client that went away
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # It looks every 20 ms whether it has to end.
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- commands

# Most of what a short command takes is the import of its libraries. So it is a fork of a process
# that has imported them, and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"kvpo_jax.{name}" for name in ("evaluate", "generate", "plan_memory", "train")]
)


def run_command(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """What `python WORDS` prints and returns, without the time that its imports take.

    It has no standard input. What Python and JAX read from the environment as they start is of the
    first command. One test of every command starts it for itself.

    Args:
      words: "-m" and a module, or the path of a file; then the command's arguments.
      cwd: where it runs, if not here.
    """
    where, environment = str(cwd or Path.cwd()), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ([*map(str, words)], where, environment, folder)
        process = FORKS.Process(target=_be_command, args=arguments)
        process.start()
        process.join()
        out, error = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, process.exitcode, out, error)


def _be_command(words: list[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    """Runs in the fork."""
    for name in ("stdout", "stderr"):
        with open(f"{folder}/{name}", "wb") as file:
            os.dup2(file.fileno(), getattr(sys, name).fileno())
    os.environ.update(environment)
    os.chdir(cwd)
    if words[0] == "-m":
        _, module, *_ = words
        sys.path.insert(0, cwd)
        sys.argv = words[1:]
        sys.modules.pop(module, None)  # it is imported anew, as __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
