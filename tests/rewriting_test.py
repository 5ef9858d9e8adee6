"""Rewriting through a real HTTP server on this machine, and by commands: order, tries, kills,
records.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import equipment
import pytest

from kvpo_jax.data import prompts, rewriting
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "prompts.py"


@contextmanager
def serving(answer):
    """The address of a server of chat completions, and the requests (path, headers, body) that it
    got.

    Args:
      answer: (number of the request, its body) -> status, headers, and the reply or raw bytes.
    """
    seen = []

    def complete(number, content):
        body = json.loads(content)
        path, headers, _ = got[number]
        seen.append((path, headers, body))
        status, headers, reply = answer(number, body)
        return status, headers, reply if isinstance(reply, bytes) else completion(reply)

    with equipment.serving(complete) as (url, got):
        yield f"{url}/v1", seen


def completion(text, reason="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"model": "served-7b", "choices": [choice]}).encode()


def said(body):
    """What the user says in a request."""
    return body["messages"][-1]["content"]


def loud(number, body):
    return 200, {}, said(body).upper()


def endpoint(url, **fields):
    sampling = {"temperature": 0.5, "max_tokens": 64}
    return rewriting.Endpoint(url, "a-model", sampling, "Be loud.", **({"wait": 0.01} | fields))


def stories_of(count):
    return [PromptSequence((f"A fox {i} runs. It stops.",), i + 1) for i in range(count)]


def refine(sequences, url, shards, wanted=2, **fields):
    def change(sequence, ask):
        return rewriting.refined(sequence, ask, wanted)

    return rewriting.rewrite(sequences, change, endpoint(url, **fields), shards, workers=4)


def test_replies_are_in_the_order_of_the_prompts_whatever_order_they_come_in(tmp_path):
    def slow(number, body):
        time.sleep(0.1 if " 0 " in said(body) else 0)
        return loud(number, body)

    with serving(slow) as (url, seen):
        made = refine(stories_of(6), url, tmp_path, key="secret")
    assert [s.sentences for s in made] == [(f"A FOX {i} RUNS", "IT STOPS") for i in range(6)]
    assert [s.line for s in made] == [1, 2, 3, 4, 5, 6]
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"][0] == {"role": "system", "content": "Be loud."}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-model", 0.5, 64)
    records = [json.loads(x) for p in tmp_path.iterdir() for x in p.read_text().splitlines()]
    assert len(records) == 6
    for record in records:
        assert record["sampling"] == {"temperature": 0.5, "max_tokens": 64}
        assert (record["model"], record["served"]) == ("a-model", "served-7b")
        assert "secret" not in json.dumps(record) and record["reply"] == record["text"].upper()


def test_nothing_is_asked_twice(tmp_path):
    with serving(loud) as (url, seen):
        first = refine(stories_of(3), url, tmp_path)
        (shard,) = tmp_path.iterdir()
        content = shard.read_bytes()
        shard.write_bytes(content[:-20])  # a kill has cut the last line
        assert refine(stories_of(4), url, tmp_path) == [
            *first,
            *refine(stories_of(4), url, tmp_path)[3:],
        ]
        assert len(seen) == 3 + 2  # what was cut, and what is new
        assert shard.read_bytes() == content[:-20]  # a shard is never written again
        refine(stories_of(3), url, tmp_path, wanted=None)
        assert len(seen) == 5
        other = rewriting.Endpoint(url, "a-model", {"temperature": 1.0}, "Be loud.")
        rewriting.rewrite(
            stories_of(1), lambda s, ask: rewriting.refined(s, ask, None), other, tmp_path, 1
        )
        assert len(seen) == 6  # other sampling, another reply


@pytest.mark.parametrize(
    "problem",
    [
        (503, {}, b"busy"),
        (429, {"Retry-After": "0"}, b"slowly"),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[]"),
        (200, {}, completion("A FOX RUNS. IT STO", "length")),
        (200, {}, completion("  <think>hm</think> ")),
        (200, {}, completion(None)),
        (200, {"Content-Length": "999"}, b"{"),  # the connection is closed before its end
        (200, {}, completion("ONE SEGMENT")),
    ],
)
def test_a_try_that_fails_is_made_again(tmp_path, problem):
    with serving(lambda n, body: problem if n < 2 else loud(n, body)) as (url, seen):
        (made,) = refine(stories_of(1), url, tmp_path, timeout=2)
    assert made.sentences == ("A FOX 0 RUNS", "IT STOPS") and len(seen) == 3


def test_thoughts_are_no_reply(tmp_path):
    def thoughtful(number, body):
        return 200, {}, "<think>\nA fox. Two. Three.\n</think>\n\nA fox.\nIt stops."

    with serving(thoughtful) as (url, _):
        assert refine(stories_of(1), url, tmp_path)[0].sentences == ("A fox", "It stops")


def test_what_is_made_stays_when_the_server_gives_up(tmp_path):
    def moody(number, body):
        return (500, {}, b"no room") if " 3 " in said(body) else loud(number, body)

    with serving(moody) as (url, seen):
        with pytest.raises(UsageError) as error:
            refine(stories_of(4), url, tmp_path, tries=2)
    assert "HTTP 500 Internal Server Error: no room (tried 2 times); " in str(error.value)
    assert "of 4 sequences are made" in str(error.value) and str(tmp_path) in str(error.value)
    with serving(loud) as (url, seen):
        assert len(refine(stories_of(4), url, tmp_path)) == 4
    assert len(seen) < 4 and any(" 3 " in said(body) for _, _, body in seen)


def test_a_request_that_no_try_mends_is_made_once(tmp_path):
    with serving(lambda n, body: (401, {}, b"who are you?")) as (url, seen):
        with pytest.raises(UsageError, match="HTTP 401 Unauthorized: who are you.*0 of 1 seq"):
            refine(stories_of(1), url, tmp_path)
    assert len(seen) == 1
    with pytest.raises(UsageError, match=r"refused.*\(tried 2 times\)"):
        refine(stories_of(1), url, tmp_path, tries=2)  # nobody listens any more


def test_a_sequence_keeps_its_number_of_segments_and_its_durations(tmp_path):
    sequence = PromptSequence(("a fox runs", "it stops!"), 7, (6, 9))
    with serving(loud) as (url, seen):
        assert refine([sequence], url, tmp_path, wanted=5) == [
            PromptSequence(("A FOX RUNS", "IT STOPS!"), 7, (6, 9))
        ]
    assert said(seen[0][2]) == "a fox runs. it stops!"


def test_each_moment_continues_those_before_it(tmp_path):
    def moment(number, body):
        return 200, {}, f"moment\n{len(said(body).splitlines())}"

    with serving(moment) as (url, seen):
        (made,) = rewriting.rewrite(
            [PromptSequence(("a fox",), 1)],
            lambda s, ask: rewriting.continued(s, ask, 2),
            endpoint(url),
            tmp_path,
            1,
        )
    assert made.sentences == ("a fox", "moment 1", "moment 2")
    assert [said(body) for _, _, body in seen] == ["a fox", "a fox\nmoment 1"]
    with pytest.raises(UsageError, match="line 4 has durations"):
        rewriting.continued(PromptSequence(("a",), 4, (3,)), None, 1)


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def test_a_killed_command_goes_on_where_it_stopped(tmp_path):
    """The second command gives the same file as one that was never killed."""
    prompts.write(tmp_path / "in.jsonl", stories_of(5))
    gate = threading.Event()

    def answer(number, body):
        if number >= 2:
            gate.wait(30)
        return loud(number, body)

    with serving(answer) as (url, seen):
        arguments = command(
            "refine", tmp_path / "in.jsonl", f"--output={tmp_path / 'out.jsonl'}", "--workers=1"
        )
        arguments += [f"--endpoint={url}", "--model=m", '--extra={"top_k": 20}', "--top_p=0.9"]
        environment = os.environ | {"OPENAI_API_KEY": "very secret"}
        with subprocess.Popen(arguments, env=environment) as killed:
            while len(seen) < 3 and killed.poll() is None:
                time.sleep(0.02)
            killed.send_signal(signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out.jsonl").exists()
        gate.set()
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(seen) == 3 + 3  # the third request was lost with its answer
    made = prompts.load(tmp_path / "out.jsonl")
    assert [s.sentences for s in made] == [(f"A FOX {i} RUNS", "IT STOPS") for i in range(5)]
    body = seen[0][2]
    assert (body["top_k"], body["top_p"], body["temperature"]) == (20, 0.9, 0.7)
    origin = json.loads((tmp_path / "out.jsonl.origin.json").read_text())
    assert (origin["model"], origin["endpoint"], origin["sampling"]["top_k"]) == ("m", url, 20)
    assert origin["rules"] == body["messages"][0]["content"] and "camera" in origin["rules"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5  # input, output, origin and two shards
    for path in written:
        assert "very secret" not in path.read_text()


# ---------------------------------------------------------------- a command


def commanded(sequences, script, shards, rules="", wanted=2, **fields):
    """`refine` by a shell script that reads the text."""
    who = rewriting.Endpoint("", "m", {}, rules, ["sh", "-c", script], **({"wait": 0.01} | fields))

    def change(sequence, ask):
        return rewriting.refined(sequence, ask, wanted)

    return rewriting.rewrite(sequences, change, who, shards, workers=2)


def test_a_command_reads_rules_and_text_and_prints_its_reply(tmp_path):
    thoughtful = "echo '<think>A. B. C.'; echo '</think>'; cat"
    (made,) = commanded(stories_of(1), thoughtful, tmp_path, "Be loud.", wanted=None)
    assert made.sentences == ("Be loud", "A fox 0 runs", "It stops")
    slow = "x=$(cat); case $x in *' 0 '*) sleep 0.3;; esac; echo $x | tr a-z A-Z"
    loud = commanded(stories_of(5), slow, tmp_path)
    assert [s.sentences for s in loud] == [(f"A FOX {i} RUNS", "IT STOPS") for i in range(5)]
    records = [json.loads(x) for p in tmp_path.iterdir() for x in p.read_text().splitlines()]
    assert {record["command"][0] for record in records} == {"sh"}


def test_a_command_that_fails_is_run_again_and_only_for_what_is_missing(tmp_path):
    calls, shards = tmp_path / "calls", tmp_path / "shards"
    moody = f"x=$(cat); echo $x >> {calls}; case $x in *' 2 '*) echo no room >&2; exit 3; esac; "
    with pytest.raises(
        UsageError, match=r"sh: exit status 3: no room \(tried 2 times\); "
    ) as error:
        commanded(stories_of(4), moody + "echo $x", shards, tries=2)
    made = int(re.search(r"(\d) of 4 sequences are made", str(error.value))[1])
    assert calls.read_text().count(" 2 ") == 2
    calls.unlink()
    assert len(commanded(stories_of(4), f"cat | tee -a {calls}", shards)) == 4
    again = calls.read_text().count("fox")
    assert " 2 " in calls.read_text() and 1 <= again <= 4 - made


@pytest.mark.parametrize(
    "script, message",
    [
        ("sleep 30; echo A. B.", "sh: no reply after 0.2 s"),
        ("sleep 30 & echo A. B.", "sh: no reply after 0.2 s"),  # which keeps what it prints to
        ("true", "sh: the reply is empty"),
        (r"printf '\377'", "sh: what it prints is no UTF-8 text"),
        ("echo One.", "the reply 'One.' has 1 segments, not 2"),
        ("kill -9 $$", "sh: exit status -9: "),
    ],
)
def test_what_a_command_does_wrong_is_said(tmp_path, script, message):
    begin = time.monotonic()
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        commanded(stories_of(1), script, tmp_path, tries=1, timeout=0.2 if "sleep" in script else 9)
    assert time.monotonic() - begin < 10 and "\n" not in str(error.value)


def test_the_command_line_names_an_endpoint_or_a_program(tmp_path):
    prompts.write(tmp_path / "in.jsonl", stories_of(2))
    out = tmp_path / "out.jsonl"

    def refine(*arguments):
        given = command("refine", tmp_path / "in.jsonl", f"--output={out}", "--rules=", *arguments)
        return subprocess.run(given, capture_output=True, text=True)

    for arguments, message in (
        ([], "give one of --endpoint"),
        (
            ["--command=no-such-program --fast"],
            "--command=no-such-program --fast: there is no such",
        ),
        (["--command=cat 'a"], "--command=cat 'a: No closing quotation"),
        (["--command=cat", "--top_p=1"], "--top_p is for --endpoint"),
    ):
        done = refine(*arguments)
        assert (done.returncode, done.stdout) == (1, "") and not out.exists()
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    done = refine("--command=tr a-z A-Z")
    assert done.returncode == 0, done.stderr
    assert [s.sentences[0] for s in prompts.load(out)] == ["A FOX 0 RUNS", "A FOX 1 RUNS"]
    origin = json.loads((tmp_path / "out.jsonl.origin.json").read_text())
    assert (origin["command"], origin["model"]) == (["tr", "a-z", "A-Z"], "tr a-z A-Z")


def test_no_password_of_an_address_is_recorded():
    origin = endpoint("http://me:word@host:1/v1").origin
    assert origin["endpoint"] == "http://host:1/v1"
