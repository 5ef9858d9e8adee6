"""Reward servers: real processes on this machine, one of them killed and started again in a run."""

import dataclasses
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import GROUP_REWARD, SMALL, configure, random_weights, serving, undocumented

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import run as run_lib
from kvpo_jax import train
from kvpo_jax.errors import NotFiniteError, UsageError
from kvpo_jax.rewards import composite, preprocess, remote, scorers, server
from kvpo_jax.runtime import checkpoint, web
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.process import Clock
from kvpo_jax.state import TrainState, init_state, saved_state
from kvpo_jax.types import Judged

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"protocol": 1, "name": "a server", "components": ["q", "r"], "version": "1"}


def settings(**fields):
    section = dict(config_lib.load("configs/tiny.py").reward.http)
    return remote.Settings(**section | {"backoff": 0.01, "timeout": 20.0} | fields)


def sentences_of(*sizes):
    """Sentences of groups of so many clips."""
    return [
        composite.Sentence.with_context(f"group {g}", ("once",) * g, g)
        for g, size in enumerate(sizes)
        for _ in range(size)
    ]


# ---------------------------------------------------------------- our server


def test_a_function_in_another_process_sees_what_one_in_the_run_sees(served, tmp_path, monkeypatch):
    """Pixels to the last bit, sentences, what was said before, and each group alone."""
    url, token = served
    (tmp_path / "here_reward.py").write_text(GROUP_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    there = scorers.Scorers(url, {}, vars(settings(token_file=token)), fps=8)
    assert there.components() == ["light", "over_group", "before", "clips"]
    (version,) = there.versions().values()
    assert re.fullmatch(r"own_reward:judge kvpo_jax \S+, own_reward:judge [0-9a-f]{32}", version)
    prompts = sentences_of(3, 1, 2)
    rng = np.random.default_rng(0)
    for pixels in (
        rng.integers(0, 256, (6, 4, 5, 7, 3), np.uint8),
        rng.random((6, 4, 5, 7, 3), np.float32),
    ):
        got = there(jnp.asarray(pixels), prompts)
        here = scorers.Scorers("here_reward:judge", {})(jnp.asarray(pixels), prompts)
        for name in ("light", "over_group", "before"):
            np.testing.assert_array_equal(got[name], np.asarray(here[name], np.float32))
        assert got["clips"].tolist() == [3, 3, 3, 1, 2, 2]
        assert np.abs(got["over_group"]).max() > 1e-4 and got["before"].tolist() == [
            *(0, 0, 0),
            *(1, 2, 2),
        ]


def test_a_video_file_has_nearly_the_pixels_that_were_sent(served):
    url, token = served
    there = remote.Server(url, settings(token_file=token, format="mp4"), fps=8)
    pixels = np.zeros((2, 6, 16, 24, 3), np.uint8)
    pixels[0], pixels[1, 3:] = 200, 100
    light = there.ask(pixels, ["a", "b"])()["light"]
    np.testing.assert_allclose(light, [200 / 255, 50 / 255], atol=0.01)


@pytest.mark.parametrize(
    ("dtype", "format", "said"),
    [
        (np.uint8, "npz", {"white": 255}),
        (np.float32, "npz", {"white": 1}),
        (np.uint8, "mp4", {"codec": remote.CODEC}),
    ],
)
def test_a_request_says_how_its_clips_are_read(dtype, format, said):
    """What a server of somebody else's goes by: what white is, frames per second, the codec."""
    clips = np.ones((2, 3, 16, 16, 3), dtype)
    with zipfile.ZipFile(io.BytesIO(remote.pack(clips, ["a", "b"], format, 8))) as file:
        request = json.loads(file.read(remote.REQUEST))
    assert {name: request.get(name) for name in ("white", "codec")} == {
        "white": None,
        "codec": None,
        **said,
    }
    assert (request["fps"], request["format"], request["prompts"]) == (8, format, ["a", "b"])


def test_a_fault_of_a_function_is_named_at_once(served):
    url, token = served
    there = remote.Server(url, settings(token_file=token, retries=50, backoff=9.0))
    error = "HTTP 422 .*reward own_reward:judge raised RuntimeError: no memory .* at .*.py:8"
    with pytest.raises(UsageError, match=error):
        there.ask(np.zeros((1, 3, 8, 8, 3), np.uint8), ["fail"])()


def test_a_server_wants_its_token(served, tmp_path, monkeypatch):
    url, token = served
    monkeypatch.delenv(remote.TOKEN, raising=False)
    with pytest.raises(UsageError, match="HTTP 401 .*KVPO_REWARD_TOKEN or reward.http.token_file"):
        _ = remote.Server(url, settings()).about
    monkeypatch.setenv(remote.TOKEN, "another-one")
    with pytest.raises(UsageError, match="HTTP 401") as error:
        _ = remote.Server(url, settings()).about
    assert "another-one" not in str(error.value)
    monkeypatch.setenv(remote.TOKEN, Path(token).read_text())
    assert remote.Server(url, settings()).about.groups
    (tmp_path / "bad").write_text("caf\u00e9 token")
    with pytest.raises(UsageError, match="bad has other letters than ASCII's$"):
        _ = remote.Server(url, settings(token_file=str(tmp_path / "bad"))).about


@pytest.mark.parametrize(
    "body", [b"", b"PK", remote.pack(np.zeros((1, 2, 3, 3, 3), np.uint8), [], "npz", None)]
)
def test_what_is_no_request_is_named(served, body):
    url, token = served
    with pytest.raises(UsageError, match="HTTP 400 .*no request of protocol 1: "):
        web.fetch(url, body, web.bearer(Path(token).read_text().strip()))


def test_no_array_of_a_request_runs_code():
    """An array of objects is a pickle."""
    body = io.BytesIO(remote.pack(np.zeros((1, 2, 3, 3, 3), np.uint8), ["a"], "npz", None))
    with zipfile.ZipFile(body) as file:
        request = file.read(remote.REQUEST)
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as file:
        file.writestr(remote.REQUEST, request)
        with file.open(remote.PIXELS, "w") as entry:
            np.save(entry, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        remote.unpack(evil.getvalue())


@pytest.mark.parametrize(
    "scorer, fields, message",
    [
        ("", {}, "--scorer names nothing"),
        ("stream", {}, "--scorer=stream scores whole videos"),
        ("http://a:1", {}, "--scorer=http://a:1 is a server itself"),
        ("nowhere.py:f", {}, "--scorer=nowhere.py:f: there is no file nowhere.py"),
        ("{own}:nothing", {}, "there is no reward 'own_name:nothing'"),
        ("{own}:score", {}, "add --components=NAME"),
        ("toy", {"components": ["a"]}, "--components=a, but toy has VQ, MQ, TA"),
        ("hpsv3", {}, "--scorer=hpsv3 needs --weights=hpsv3=FILE"),
        ("toy", {"weights": ["hpsv4=a"]}, "--weights=hpsv4=a: .*did you mean 'hpsv3'"),
        ("toy", {"weights": ["hpsv3=a"]}, "--weights=hpsv3=a: there is no such file"),
        ("{folder}/re.py:score", {}, "a module re is loaded already; rename the file"),
        ("{folder}/a-b.py:score", {}, "'a-b' is no name of a module; rename the file"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path, monkeypatch, scorer, fields, message):
    for name in ("own_name", "re", "a-b"):
        (tmp_path / f"{name}.py").write_text("def score(pixels, prompts):\n    return {}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_name", raising=False)
    given = {"weights": [], "components": [], "groups": False} | fields
    with pytest.raises(UsageError, match=message):
        server.prepare(scorer.format(own=tmp_path / "own_name.py", folder=tmp_path), **given)


def test_only_this_machine_needs_no_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "node7"):
        with pytest.raises(UsageError, match=f"--host={host} can be reached from other machines"):
            server.listen(host, 0, "")
    with server.listen("127.0.0.1", 0, "") as taken, server.listen("0.0.0.0", 0, "token"):
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError, match=f"127.0.0.1:{port} cannot be bound: [^(]*; name another --port"
        ):
            server.listen("127.0.0.1", port, "")


# ---------------------------------------------------------------- any server


def answering(*answers, about=ABOUT):
    """A server's answers: of GET, and then of each POST; the last of them again and again."""

    def answer(number, body):
        if not body:
            return 200, {}, json.dumps(about).encode()
        given = answers[min(number - 1, len(answers) - 1)]
        given = given(body) if callable(given) else given
        return given if isinstance(given, tuple) else (200, {}, json.dumps(given).encode())

    return serving(answer)


CLIPS = np.zeros((2, 3, 4, 4, 3), np.uint8)
GOOD = {"q": [0.25, 1], "r": [3, -1.5e-7]}


def scores_of(url, clips=CLIPS, prompts=("a", "b"), **fields):
    return remote.Server(url, settings(**fields)).ask(clips, list(prompts))()


@pytest.mark.parametrize(
    "problem",
    [
        (503, {}, b"loading"),
        (500, {}, b"no room"),
        (429, {"Retry-After": "0"}, b"slowly"),
        (200, {"Content-Length": "999"}, b"{"),  # the connection is closed before its end
    ],
)
def test_a_request_without_an_answer_is_made_again(problem):
    with answering(problem, problem, GOOD) as (url, seen):
        got = scores_of(url)
    np.testing.assert_array_equal(got["q"], np.float32(GOOD["q"]))
    np.testing.assert_array_equal(got["r"], np.float32(GOOD["r"]))
    assert len(seen) == 4 and seen[1][2] == seen[3][2]


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"q": [1, 2]}, "the answer has no component 'r'; it said that it has 'q', 'r'"),
        ({**GOOD, "s": [1, 2]}, "the answer has the unknown component 's'"),
        ({**GOOD, "q": [1]}, "'q' has 1 values, expected a list of 2 numbers, one for each clip"),
        ({**GOOD, "q": 0.5}, "'q' is a float, expected"),
        ({**GOOD, "q": {"0": 1, "1": 2}}, "'q' is a dict, expected"),
        ({**GOOD, "q": [1, None]}, "'q' has null in it, expected"),
        ({**GOOD, "q": [1, True]}, "'q' has true in it, expected"),
        ({**GOOD, "q": [1, "2"]}, "'q' has \"2\" in it, expected"),
        ({**GOOD, "q": [1, [2]]}, r"'q' has \[2\] in it, expected"),
        ({**GOOD, "q": [1, float("nan")]}, "'q' is nan for clip 1 of 2"),
        ({**GOOD, "q": [1e39, 1]}, "'q' is inf for clip 0 of 2"),
        ({**GOOD, "q": [10**400, 1]}, "'q' is inf for clip 0 of 2"),
        ([GOOD], "the answer is a list, no object"),
        ((200, {}, b"<html>"), "the answer is no JSON"),
        ((200, {}, b"\xff\xfe"), "the answer is no JSON"),
        ((413, {}, b"too  \n large"), "HTTP 413 Request Entity Too Large: too large"),
        ((302, {"Location": "http://localhost:1/"}, b""), "HTTP 302 Found"),
    ],
)
def test_a_wrong_answer_is_named_at_once(answer, message):
    """Also where a value may stand for one that is missing."""
    with answering(answer) as (url, seen):
        with pytest.raises(UsageError, match=f"^reward server {url}.*: {message}") as error:
            scores_of(url, required=False)
        assert isinstance(error.value, NotFiniteError) == ("for clip" in message)
        assert len(seen) == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"protocol": 2}, "speaks protocol 2, expected 1"),
        ({"protocol": None}, "speaks protocol null, expected 1; is it a reward server"),
        ({"components": []}, r"its 'components' are \[\]"),
        ({"components": "q"}, "its 'components' is \"q\", expected a list"),
        ({"components": ["q", "q"]}, "its 'components' are"),
        ({"components": ["q", 1]}, "the component 1 is no name"),
        ({"components": ["q r"]}, "the component 'q r' is no name"),
        ({"name": None}, "its 'name' is null, expected a str"),
        ({"groups": "yes"}, "its 'groups' is \"yes\", expected a bool"),
    ],
)
def test_what_a_server_says_of_itself_is_checked(said, message):
    with answering(GOOD, about=ABOUT | said) as (url, _):
        with pytest.raises(UsageError, match=f"^reward server {url}.*{message}"):
            scorers.Scorers(url, {}, vars(settings())).check()


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://", "is no address"),
        ("http://a b", "is no address"),
        ("http://a:port", "is no address"),
        ("http://a:99999", "is no address"),
        ("http://user:secret@a:1", "the address http://a:1 has a password"),
    ],
)
def test_what_is_no_address_is_named(url, message):
    with pytest.raises(UsageError, match=message) as error:
        scorers.Scorers(url, {}, vars(settings())).check()
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("silence", ["of the answer", "within the answer"])
def test_an_answer_has_a_time_limit(silence):
    def slow(number, body):
        time.sleep(0.6 if body and silence == "of the answer" else 0)
        content = json.dumps(GOOD if body else ABOUT).encode()
        longer = {"Content-Length": "999"} if body and silence == "within the answer" else {}
        return 200, longer, content

    with serving(slow) as (url, _):
        begin = time.monotonic()
        with pytest.raises(UsageError, match=r"\(tried 2 times\); start it and give the same comm"):
            scores_of(url, timeout=0.2, retries=1)
        assert time.monotonic() - begin < 1.2


def test_a_value_may_stand_for_what_is_missing(capfd):
    """It is said and counted, and a server that is away is not waited for again and again."""
    busy = (503, {}, b"busy")
    with answering(busy, busy, busy, busy, GOOD, busy, busy, busy, GOOD) as (url, seen):
        there = remote.Server(url, settings(required=False, missing=-2.0, retries=2))
        posts = []
        for _ in range(4):
            got = there.ask(CLIPS, ["a", "b"])()
            posts.append((len(seen) - 1, got["q"].tolist(), there.missing))
    assert posts == [
        (3, [-2, -2], 2),  # all tries
        (4, [-2, -2], 4),  # one
        (5, [0.25, 1], 4),  # it is back
        (8, [-2, -2], 6),
    ]
    assert "HTTP 503 Service Unavailable: busy" in (said := capfd.readouterr().out)
    assert "2 clips get -2, 6 so far" in " ".join(said.split())


def values_of(body):
    """An answer that says which clips were sent: their first pixels."""
    pixels, prompts = remote.unpack(body)
    return {"q": pixels[:, 0, 0, 0, 0].tolist(), "r": [len(prompts)] * len(prompts)}


@pytest.mark.parametrize(
    "groups, most, sizes",
    [(False, 3, [3, 3, 1]), (False, 1, [2, 1, 3, 1]), (False, 9, [7]), (True, 9, [2, 1, 3, 1])],
)
def test_requests_have_whole_groups_and_answers_their_order(groups, most, sizes):
    """The first answers come last. Of groups of 2, 1, 3 and 1 clips."""
    clips = np.zeros((7, 4, 288, 288, 3), np.uint8)  # 995,328 bytes each
    clips[:, 0, 0, 0, 0] = np.arange(10, 17)
    begun = threading.Barrier(len(sizes), timeout=20)

    def late(body):
        begun.wait()  # all are asked at the same time
        answer = values_of(body)
        time.sleep(0.02 * (20 - answer["q"][0]))
        return answer

    with answering(late, about=ABOUT | {"groups": groups}) as (url, _):
        got = scores_of(url, clips, sentences_of(2, 1, 3, 1), requests=4, megabytes=most)
    assert got["q"].tolist() == [*range(10, 17)]
    assert got["r"].tolist() == [size for size in sizes for _ in range(size)]


def test_a_server_is_asked_so_many_things_at_a_time():
    now, most, lock = 0, 0, threading.Lock()

    def busy(body):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.02)
        with lock:
            now -= 1
        return values_of(body)

    with answering(busy, about=ABOUT | {"groups": True}) as (url, seen):
        scores_of(url, np.zeros((6, 2, 2, 2, 3), np.uint8), "abcdef", requests=2)
    assert len(seen) == 7 and most == 2


def test_servers_and_functions_are_joined_in_the_order_of_the_list():
    with answering(values_of) as (url, _):
        both = scorers.Scorers(f"motion,{url}", {}, vars(settings()))
        pixels = jnp.asarray(preprocess.to_uint8(np.random.default_rng(0).random((2, 3, 4, 4, 3))))
        assert both.components() == ["motion", "smoothness", "q", "r"]
        assert list(both(pixels, ["a", "b"])) == ["motion", "smoothness", "q", "r"]
        with pytest.raises(UsageError, match=f"have a component 'q'; '{url}/b' is the second"):
            scorers.Scorers(f"{url},{url}/b", {}, vars(settings()))(pixels, ["a", "b"])


def test_weights_are_checked_before_anything_is_generated():
    with answering(GOOD) as (url, _):
        fields = {"reward.scorer": url, "reward.weights.quality": 1}
        with pytest.raises(UsageError, match="weights.quality=1: config.reward.scorer has only q"):
            run_lib.load(configure("configs/tiny.py", fields))


def test_a_run_goes_on_with_a_server_that_is_elsewhere():
    here = configure("configs/tiny.py", {"reward.scorer": "toy,http://a:1"})
    there = configure("configs/tiny.py", {"reward.scorer": "toy,https://b/score"})
    config_lib.check_resumable(here, there)
    with pytest.raises(UsageError, match="config.reward.scorer: the run was started with"):
        config_lib.check_resumable(here, configure("configs/tiny.py", {"reward.scorer": "toy"}))


# ---------------------------------------------------------------- in a run

SIZES = {
    **SMALL,
    "video.blocks": 8,
    "video.switch_frames": (12,),
    "rollout.branches": 3,
    "rollout.window_blocks": 2,
    "train.iterations": 2,
    "train.prompts_per_iteration": 2,
    "train.micro_batch": 1,
    "train.video_every": 0,
    "train.keep_best": 0,
    "eval.prompts": 2,
    "eval.batch": 1,
    "eval.every": 0,
    "eval.by_block": False,
    "eval.scorer": "",
    "mesh.data": 1,
    "mesh.branch": 1,
    "reward.scorer": f"{__name__}:brightness",
    "reward.weights.brightness": 1,
    "reward.http.backoff": 0.1,
    "reward.http.retries": 6,
}


def brightness(pixels, prompts):
    """What the server of docs/rewards.md returns."""
    return {"brightness": np.asarray(pixels).mean((1, 2, 3, 4))}


def example(port: int, dies_at: int) -> str:
    """The program of docs/rewards.md, on another port, which is killed in some request."""
    text = (ROOT / "docs" / "rewards.md").read_text()
    (program,) = re.findall(r"```python\n(import io, json\n.*?)```", text, re.DOTALL)
    post = "    def do_POST(self):\n"
    assert program.count("8765") == program.count(post) == 1
    dies = f"""        import os, signal
        Handler.posts = getattr(Handler, "posts", 0) + 1
        if Handler.posts == {dies_at}:
            os.kill(os.getpid(), signal.SIGKILL)
"""
    return program.replace("8765", str(port)).replace(post, post + dies)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def example_server(dies_at=0, back_after=None):
    """The address of the server of docs/rewards.md.

    Args:
      dies_at: the scored request in which it is killed; 0 is none.
      back_after: seconds after which it starts again, for good; None is never.
    """
    port, ended, processes = free_port(), threading.Event(), []

    def start(dies_at):
        command = [sys.executable, "-c", example(port, dies_at)]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    def start_again():
        processes[0].wait()
        if back_after is not None and not ended.wait(back_after):
            start(0)

    start(dies_at)
    again = threading.Thread(target=start_again)
    try:
        listens(port)
        again.start()
        yield f"http://127.0.0.1:{port}"
    finally:
        ended.set()
        processes[0].kill()
        again.join()
        for process in processes:
            process.kill()
            process.wait()


def listens(port):
    """Waits until a server listens, without a request."""
    for _ in range(300):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.1)
    raise AssertionError("the server does not listen")


class Trained(NamedTuple):
    """A run with the function in it: its equipment, its last state, and what was judged."""

    run: run_lib.Run
    state: TrainState
    judged: list[Judged]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Trained:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    config = configure("configs/tiny.py", SIZES | {"weights": path})
    config_lib.check(config)
    random_weights(path, config)
    run = run_lib.load(config)
    return Trained(run, *improved(run, 2))


def improved(run, iterations) -> tuple[TrainState, list[Judged]]:
    """The state after some iterations from the first, and what was judged in them."""
    state, clock, judged = init_state(run.config, run.mesh, run.initial_lora()), Clock(), []
    for iteration in range(iterations):
        state, _, groups = train.improve(run, state, iteration, clock)
        judged += [group.judged for group in groups]
    return state, judged


def asking(run, url, **fields):
    """The run with a server instead of its function, and the programs that it has compiled."""
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    given += [f"--config.reward.scorer={url}", "--config.reward.weights.brightness=1"]
    config = config_lib.override(run.config, given)
    config_lib.check(config)
    rewards = scorers.Scorers(url, {}, config.reward.http, fps=8)
    backbone = dataclasses.replace(run.backbone, rewards=rewards)
    backbone_lib.check_rewards(config, backbone)
    return dataclasses.replace(run, config=config, backbone=backbone)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_waits_for_its_server_and_is_that_with_the_function_in_it(here, capfd):
    """The server is killed at the third of four requests of the first iteration, and comes back."""
    with example_server(dies_at=3, back_after=0.2) as url:
        state, judged = improved(asking(here.run, url), 2)
    assert "; try 2 of 7 in 0 s" in capfd.readouterr().out
    assert_equal(state, here.state)
    assert_equal(judged, here.judged)
    assert np.ptp(judged[0].scores.branches) > 0


def test_prompts_are_rolled_out_while_a_server_scores(here, monkeypatch):
    """No answer comes before the second prompt has been rolled out."""
    rolled, second = [], threading.Event()
    explore = train.explore

    def counted(*arguments, **named):
        made = explore(*arguments, **named)
        rolled.append(made)
        if len(rolled) == 2 + 2:  # two were to calibrate tau
            second.set()
        return made

    monkeypatch.setattr(train, "explore", counted)

    def answer(number, body):
        about = {**ABOUT, "components": ["brightness"]}
        if not body:
            return 200, {}, json.dumps(about).encode()
        assert second.wait(30), "the second prompt is not rolled out"
        pixels, prompts = remote.unpack(body)
        scores = {name: x.tolist() for name, x in brightness(pixels, prompts).items()}
        return 200, {}, json.dumps(scores).encode()

    with serving(answer) as (url, _):
        _, judged = improved(asking(here.run, url), 1)
    assert_equal(judged, here.judged[:2])


def test_a_run_without_its_server_ends_and_goes_on_with_one_elsewhere(here, tmp_path):
    """The server goes in the second iteration, after the evaluation and the first, of 4 requests
    each. The first is saved.
    """
    with example_server(dies_at=10) as url:
        run = asking(here.run, url, reward__http__retries=1)
        with pytest.raises(UsageError, match="reward server http.*give the same command again"):
            train.train(run, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
    with example_server() as url:
        run = asking(here.run, url, reward__http__required=False)
        train.train(run, tmp_path)
    assert_equal(saved_state(tmp_path, run.config, run.mesh), here.state)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("reward_missing") for row in rows] == [None, 0]
    assert not undocumented(rows[-1], ["brightness"])
