"""Serves a scorer to runs elsewhere, in this environment: docs/rewards.md has the protocol.

    kvpo-reward-server --scorer=hpsv3,videoalign --weights=hpsv3=FILE --weights=videoalign=FILE
    kvpo-reward-server --scorer=mine.py:score --components=brightness [--port=8765]
    python -m kvpo_jax.main --config.reward.scorer=http://localhost:8765 ...

In a checkout, `python tools/reward_server.py` is the same. A function of yours is one like `score`
of kvpo_jax/rewards/motion.py. It is bound to this machine; elsewhere it needs a token, in
--token_file or the environment variable KVPO_REWARD_TOKEN, which the run is given in the same way.
"""

from __future__ import annotations

import hmac
import importlib
import ipaddress
import json
import socket
import sys
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from absl import flags

import kvpo_jax
from kvpo_jax.errors import MissingPackageError, UsageError, nearest
from kvpo_jax.rewards import remote, scorers
from kvpo_jax.runtime import command, progress, sums, web

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOCAL = "127.0.0.1"


def scorer_named(names: str) -> str:
    """The names as `scorers` knows them: FILE.py:function becomes module:function.

    The folder of the file is searched first from now on, so that it can import its neighbours.

    Raises:
      UsageError: there is no such file, or another module is called like it.
    """
    return ",".join(_module_name(name) for name in scorers.names_of(names))


def _module_name(name: str) -> str:
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return name
    path = Path(file).absolute()
    if not path.is_file():
        raise UsageError(f"--scorer={name}: there is no file {file}")
    if not path.stem.isidentifier():
        raise UsageError(f"--scorer={name}: {path.stem!r} is no name of a module; rename the file")
    sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    other = sys.modules.get(path.stem)
    if other is not None and getattr(other, "__file__", None) != str(path):
        raise UsageError(
            f"--scorer={name}: a module {path.stem} is loaded already; rename the file"
        )
    return f"{path.stem}:{function}"


def _weights(given: Sequence[str]) -> dict[str, str]:
    """The files of --weights=NAME=FILE."""
    paths = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in scorers.LEARNED:
            raise UsageError(
                f"--weights={text}: expected SCORER=FILE, as in hpsv3=weights/hpsv3.safetensors"
                f"{nearest(name, scorers.LEARNED)}"
            )
        if not Path(path).expanduser().is_file():
            raise UsageError(f"--weights={text}: there is no such file")
        paths[name] = str(Path(path).expanduser())
    return paths


def prepare(
    given: str, weights: Sequence[str], components: Sequence[str], groups: bool
) -> tuple[scorers.Scorers, dict[str, Any]]:
    """A scorer that can be served, without its weights, and what its server says of itself.

    Args:
      given: the scorers, as `scorers.Scorers` takes them, or FILE.py:function.
      weights: NAME=FILE, their converted weights.
      components: of a function of somebody's own, which does not say them itself.
      groups: whether requests have to be groups.

    Raises:
      UsageError: a scorer cannot be served, or its components are not known.
    """
    names = scorer_named(given)
    wanted, paths = scorers.names_of(names), _weights(weights)
    if not wanted:
        raise UsageError("--scorer names nothing, expected names as config.reward.scorer has them")
    for name in wanted:
        if name in scorers.OF_VIDEOS or web.is_address(name):
            what = "scores whole videos" if name in scorers.OF_VIDEOS else "is a server itself"
            raise UsageError(f"--scorer={name} {what}: name it in the config of the run")
        if name in scorers.LEARNED and name not in paths:
            raise UsageError(f"--scorer={name} needs --weights={name}=FILE")
    scorer = scorers.Scorers(names, paths)
    scorer.check()
    known = scorer.components() or list(components)
    if not known:
        raise UsageError(
            f"--scorer={names}: the components of a function of your own are not known before it"
            " scores; add --components=NAME,..."
        )
    if components and list(components) != known:
        raise UsageError(f"--components={','.join(components)}, but {names} has {', '.join(known)}")
    files = {**scorers.sources(names), **{name: Path(path) for name, path in paths.items()}}
    made_of = "".join(f", {name} {sums.of_path(path)}" for name, path in sorted(files.items()))
    return scorer, {
        "protocol": remote.PROTOCOL,
        "name": names,
        "components": known,
        "version": f"kvpo_jax {kvpo_jax.__version__}{made_of}",
        "groups": groups,
    }


def application(scorer: scorers.Scorers, about: Mapping[str, Any], token: str) -> Starlette:
    """The web application.

    Args:
      scorer: is called by one request at a time.
      about: what it says of itself, see `prepare`.
      token: what every request has to show; empty if it need not.

    Raises:
      MissingPackageError: a web framework is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingPackageError(
            "a reward server needs: pip install 'kvpo_jax[server]'"
        ) from error
    turn = threading.Lock()

    def answer(body: bytes) -> Response:
        try:
            pixels, prompts = remote.unpack(body)
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            return PlainTextResponse(f"no request of protocol {remote.PROTOCOL}: {error}", 400)
        try:
            with turn:
                scores = scorer(jnp.asarray(pixels), prompts)
                lists = {name: np.asarray(x, np.float64).tolist() for name, x in scores.items()}
        except UsageError as error:  # which no further try mends
            progress.warn(f"error: {command.in_a_line(error)}")
            return PlainTextResponse(command.in_a_line(error), 422)
        progress.say(f"scored {len(prompts)} clips of {pixels.shape[1]} frames")
        return Response(json.dumps(lists), media_type="application/json")

    async def handle(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            return PlainTextResponse("the token is missing or another one", 401)
        if request.method != "POST":
            return JSONResponse(about)
        return await run_in_threadpool(answer, await request.body())

    return Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST"])])


def listen(host: str, port: int, token: str) -> socket.socket:
    """The socket of the server.

    Raises:
      UsageError: others could reach it without a token, or it cannot be bound.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not token:
        raise UsageError(
            f"--host={host} can be reached from other machines: put a token in --token_file=FILE or"
            f" in ${remote.TOKEN}, here and where the run is"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UsageError(
            f"{host}:{port} cannot be bound: {reason}; name another --port or --host"
        ) from error


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    token = web.token(given["token_file"].value or "", remote.TOKEN)
    scorer, about = prepare(given.scorer, given.weights, given.components, given.groups)
    served = application(scorer, about, token)
    listening = listen(given.host, given.port, token)
    command.use_compilation_cache()
    scorer.load()
    import uvicorn

    host, port, *_ = listening.getsockname()
    shown = f"[{host}]" if ":" in host else host
    components = ", ".join(about["components"])
    print(f"serving {about['name']} ({components}) at http://{shown}:{port}", flush=True)
    options = uvicorn.Config(served, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(options).run(sockets=[listening])


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "scorer", None, "as config.reward.scorer names them, or FILE.py:function", required=True
    )
    flags.DEFINE_multi_string("weights", [], "NAME=FILE, the converted weights of a scorer")
    flags.DEFINE_list("components", [], "what a function of your own returns")
    flags.DEFINE_bool("groups", False, "it compares the clips of a prompt: send them together")
    flags.DEFINE_string("host", LOCAL, "address to bind; 0.0.0.0 is all of this machine")
    flags.DEFINE_integer("port", 8765, "port to bind; 0 is any that is free", 0, 65535)
    command.define_path("token_file", "", f"has the token; else ${remote.TOKEN}")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.rewards.server", define_flags, main)


if __name__ == "__main__":
    cli()
