"""`miepo serve`, asked by the official client: answers, errors, load, and what must not kill it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miepo.cli.command import main
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.serving import admission
from miepo.serving.app import make_app
from miepo.serving.batcher import Batcher, PendingRequest
from miepo.serving.command import is_loopback
from miepo.trained.export import export
from miepo.trained.policy import TrainedPolicy
from miepo.trained.streaming import Chunk, ContinuousDecoder, stream
from tests.helpers.serving import running
from tests.helpers.trained import saved_policy, trained_policy

HELLO = [{"role": "user", "content": "the garden"}]
HALF = {"letter_e": 0.5, "brevity": 0.5}


@contextlib.contextmanager
def served(trained: TrainedPolicy, waiting: int = 64, max_rows: int = 16, **options: Any) -> Iterator[str]:
    """The address of a server that runs in a thread of this process."""
    batcher = Batcher(trained.policy, max_rows, waiting)
    try:
        with running(make_app(trained, batcher, **options)) as address:
            yield address
    finally:
        batcher.close()


@pytest.fixture(scope="module")
def trained(tiny_model: Path) -> TrainedPolicy:
    return trained_policy(tiny_model, [PromptConditioning(), GatedConditioning()])


@pytest.fixture(scope="module")
def address(trained: TrainedPolicy) -> Iterator[str]:
    with served(trained, hosts=["127.0.0.1"], max_tokens=200) as address:
        yield address


@contextlib.contextmanager
def asking(address: str, **options: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", **{"api_key": "none", "max_retries": 0} | options) as client:
        yield client


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with asking(address) as client:
        yield client


def ask(client: openai.OpenAI, preference: dict[str, float] | None = None, **options: Any) -> Any:
    body = {} if preference is None else {"preference": preference}
    return client.chat.completions.create(**{"model": "miepo", "messages": HELLO, "extra_body": body} | options)


def test_answers_are_those_of_the_policy(client: openai.OpenAI, trained: TrainedPolicy) -> None:
    """The same seed, and every preference its own answer."""
    (model,) = client.models.list().data
    assert model.objectives == ["letter_e", "brevity"]  # type: ignore[attr-defined]
    found = set()
    for weights in ({"letter_e": 1.0}, {"brevity": 1.0}, HALF):
        answer = ask(client, weights, seed=5, max_tokens=20)
        question = trained.question("the garden", weights, 20, seed=5)
        expected = "".join(p.text for p in stream(trained.policy, [question]))
        assert answer.choices[0].message.content == expected
        assert answer.preference == {"letter_e": 0.0, "brevity": 0.0} | weights
        assert answer.usage.prompt_tokens == len(question.ids)
        assert answer.choices[0].finish_reason in ("stop", "length")
        found.add(expected)
    assert len(found) == 3
    assert ask(client, None, seed=5, max_tokens=20).choices[0].message.content == expected  # equal weights


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client, HALF, seed=2, n=3, max_tokens=15, stop=["zz"])
    texts = ["", "", ""]
    finishes: dict[int, str] = {}
    pieces = 0
    for chunk in ask(client, HALF, seed=2, n=3, max_tokens=15, stop="zzzzzz", stream=True, stream_options={"include_usage": True}):  # fmt: skip
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [finishes[i] for i in range(3)] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert pieces > 6


def test_a_conversation_and_parts_of_text(client: openai.OpenAI, trained: TrainedPolicy) -> None:
    turns = [
        *HELLO,
        {"role": "assistant", "content": "food"},
        {"role": "user", "content": [{"type": "text", "text": "rain"}]},
    ]
    answer = ask(client, HALF, messages=turns, max_tokens=4)
    text = trained.policy.tokenizer.decode(trained.encode([{**t, "content": c} for t, c in zip(turns, ("the garden", "food", "rain"), strict=True)], ""))  # fmt: skip
    assert [text.count(f"<|im_start|>{role}") for role in ("user", "assistant")] == [2, 2]
    assert answer.usage.prompt_tokens > ask(client, HALF, max_tokens=4).usage.prompt_tokens


def test_many_at_once_are_answered_together(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = ContinuousDecoder.step

    def counted(self: ContinuousDecoder, *args: Any) -> list[Chunk]:
        sizes.append(len(self))
        return step(self, *args)

    monkeypatch.setattr(ContinuousDecoder, "step", counted)
    with served(trained) as address, asking(address) as client, ThreadPoolExecutor(24) as pool:
        mixed = [{"letter_e": i / 23, "brevity": 1 - i / 23} for i in range(24)]
        answers = list(pool.map(lambda i: ask(client, mixed[i], seed=i, max_tokens=12), range(24)))
        alone = [ask(client, mixed[i], seed=i, max_tokens=12) for i in (0, 11, 23)]
    assert [answers[i].choices[0].message.content for i in (0, 11, 23)] == [a.choices[0].message.content for a in alone]
    assert 1 < max(sizes) <= 16


MISTAKES: list[tuple[dict[str, Any], int, str]] = [
    ({"preference": {"humour": 1.0}}, 400, "unknown objective humour; the objectives are letter_e, brevity"),
    ({"preference": {"brevity": 0.4}}, 400, "expected weights that sum to 1, got a sum of 0.4"),
    ({"preference": {"brevity": 2.0, "letter_e": -1.0}}, 400, "must not be negative"),
    ({"preference": {"brevity": "much"}}, 400, "preference.brevity: Input should be a valid number"),
    ({"preference": {}}, 400, "at least one weight must be positive"),
    ({"preferance": {"brevity": 1.0}}, 400, "preferance: Extra inputs are not permitted"),
    ({"model": "gpt-4"}, 404, "expected the model 'miepo', got 'gpt-4'"),
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "Input should be 'user' or 'assistant'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected messages of user and assistant in turn"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "garden " * 500}]}, 400, "expected at most 256 together"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "a lone surrogate"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 201}, 400, "max_tokens: expected at most 200, got 201"),
    ({"temperature": 3}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 99}, 400, "n: Input should be less than or equal to 8"),
    ({"stop": [""]}, 400, "must not be empty"),
    ({"stop": ["x" * 300]}, 400, "at most 4 texts of at most 256 characters"),
    ({"model": "\ud800"}, 404, "expected the model 'miepo'"),
    ({"preference": {"\ud800": 1}}, 400, "unknown objective"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"top_k": 5}, 400, "top_k"),
    ({"logit_bias": {"7": 1.0}}, 400, "logit_bias"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"seed": -1}, 400, "seed"),
]


@pytest.mark.parametrize(("change", "status", "said"), MISTAKES)
def test_a_mistake_is_told(change: dict[str, Any], status: int, said: str, address: str) -> None:
    body = json.dumps({"model": "miepo", "messages": HELLO, "max_tokens": 4} | change)
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_what_says_nothing_is_no_mistake(address: str) -> None:
    nothing = dict.fromkeys(["functions", "tool_choice", "audio", "top_logprobs", "logit_bias", "seed", "preference"])
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "modalities": ["text"], "frequency_penalty": 0.0, "tools": []}
    for change in (nothing, neutral, {"tool_choice": "none", "logit_bias": {}}):
        body = {"messages": HELLO, "max_tokens": 2} | change
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text


def test_a_request_that_says_no_length_gets_what_fits(trained: TrainedPolicy) -> None:
    """That of training, bounded by the server and by the context."""
    longer = TrainedPolicy(replace(trained.saved, max_new_tokens=200), trained.policy, torch.device("cpu"))
    with served(longer, max_tokens=3) as address, asking(address) as client:
        assert ask(client, HALF, temperature=0).usage.completion_tokens <= 3
        with pytest.raises(openai.BadRequestError, match="expected at most 3, got 4"):
            ask(client, HALF, max_tokens=4)
        assert client.models.retrieve("miepo").id == "miepo"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
    question = longer.question("garden " * 60, HALF)
    assert len(question.ids) + question.max_new_tokens == longer.policy.context_length


def test_a_request_that_does_not_come(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission.Admission.__init__, "__defaults__", (None, None, 0.5))
    with served(trained) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            assert b"408" in connection.recv(100)


def test_lines_end_where_events_do(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ContinuousDecoder, "step", lambda self, _: [self.clear() or Chunk(0, "a\u2028b\x85c", 1, "stop")]
    )
    with served(trained) as address:
        body = {"messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            lines = [json.loads(x[6:]) for x in answer.iter_lines() if x.startswith("data: {")]
    assert "".join(c["delta"].get("content", "") for x in lines for c in x["choices"]) == "a\u2028b\x85c"


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown objective"):
        ask(client, {"x": 1.0})
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")


def test_what_is_no_request(address: str) -> None:
    where = f"{address}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    for answer, status in (
        (httpx.get(where), 405),
        (httpx.get(f"{address}/nothing"), 404),
        (httpx.post(where, content="{", headers=json_type), 400),
        (httpx.post(where, content="[" * 100_000, headers=json_type), 400),
        (httpx.post(where, content=b"\xff\xfe", headers=json_type), 400),
        (httpx.post(where, content=b" " * 300_000, headers=json_type), 413),
        (httpx.post(where, content=(b"{}" for _ in range(2)), headers=json_type), 413),
        (httpx.post(where, content="{}", headers={"content-type": "text/plain"}), 400),
        (httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}), 400),
    ):
        assert answer.status_code == status, answer.text
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "waiting": 0}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["messages", "preference", "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*FIELDS, "stream_options", "metadata", "tools"]), value=JSON)
def test_no_request_kills_it(field: str, value: Any, address: str) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 1} | {field: value})
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), (body, answer.text)


def slowly(seconds: float) -> Any:
    """A step with a pause before it."""
    step = ContinuousDecoder.step

    def paused(self: ContinuousDecoder, *args: Any) -> list[Chunk]:
        time.sleep(seconds)
        return step(self, *args)

    return paused


@pytest.mark.parametrize("joins", [True, False])
def test_who_comes_later_does_not_wait_for_the_others(
    trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """But where the network keeps what cannot be joined."""
    monkeypatch.setattr(ContinuousDecoder, "step", slowly(0.03))
    if not joins:
        monkeypatch.setattr(ContinuousDecoder, "joins", property(lambda self: not len(self)))
    with served(trained) as address, asking(address) as client:
        expected = ask(client, HALF, max_tokens=5, seed=3).choices[0].message.content
        long = ask(client, HALF, max_tokens=150, temperature=0, stream=True, stop=["\n\n\n"])
        next(chunk for chunk in long if chunk.choices[0].delta.content)
        late = ask(client, HALF, max_tokens=5, seed=3)
        begin = time.monotonic()
        rest = [chunk for chunk in long if chunk.choices[0].delta.content]
        after = time.monotonic() - begin
    assert late.choices[0].message.content == expected
    assert rest
    assert (after > 1) is joins, after  # the long one went on


def test_too_many_are_refused(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContinuousDecoder, "step", slowly(0.05))
    with served(trained, waiting=2, max_rows=1) as address, asking(address) as client, ThreadPoolExecutor(12) as pool:

        def one(i: int) -> str:
            try:
                return ask(client, HALF, seed=i, max_tokens=8).choices[0].finish_reason
            except openai.RateLimitError as error:
                return f"refused, retry after {error.response.headers['retry-after']} s"

        ended = list(pool.map(one, range(12)))
        refused = "refused, retry after 1 s"
        assert 0 < ended.count(refused) < 12
        assert set(ended) - {refused} <= {"stop", "length"}
        assert ask(client, HALF, max_tokens=2).choices  # and it goes on


def test_what_takes_too_long_is_given_up(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContinuousDecoder, "step", slowly(0.2))
    with served(trained, timeout=0.5) as address, asking(address) as client:
        with pytest.raises(openai.InternalServerError, match="took too long") as caught:
            ask(client, HALF, max_tokens=100, temperature=0)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="took too long"):
            list(ask(client, HALF, max_tokens=100, temperature=0, stream=True))


@pytest.mark.parametrize("where", ["join", "step", "_take"])
def test_an_error_ends_its_requests_and_no_others(
    trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    asked, broken = getattr(ContinuousDecoder, where), [True]

    def once(self: ContinuousDecoder, *args: Any) -> Any:
        if broken.pop() if broken else False:
            raise RuntimeError("secret: out of memory")
        return asked(self, *args)

    monkeypatch.setattr(ContinuousDecoder, where, once)
    with served(trained) as address, asking(address) as client:
        with pytest.raises(openai.InternalServerError, match="could not be computed") as caught:
            ask(client, HALF, max_tokens=2)
        assert "secret" not in str(caught.value)
        assert "out of memory" in caplog.text
        assert ask(client, HALF, max_tokens=2).choices


def test_who_leaves_is_not_answered(trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContinuousDecoder, "step", slowly(0.05))
    ended: list[bool] = []
    end = Batcher._end

    def watched(self: Batcher, ticket: PendingRequest, last: Any) -> None:
        end(self, ticket, last)
        ended.append(ticket.cancelled)

    monkeypatch.setattr(Batcher, "_end", watched)
    with served(trained) as address, asking(address) as client:
        chunks = ask(client, HALF, max_tokens=200, temperature=0, stream=True)
        next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        chunks.close()
        with asking(address, timeout=0.3) as hasty, pytest.raises(openai.APITimeoutError):
            ask(hasty, HALF, max_tokens=200, temperature=0)
        start = time.monotonic()
        while len(ended) < 2 and time.monotonic() - start < 20:
            time.sleep(0.05)
    assert ended == [True, True]


def test_the_key(trained: TrainedPolicy) -> None:
    with served(trained, key="correct horse") as address:
        with asking(address, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            ask(client)
        with asking(address, api_key="correct horse") as client:
            assert ask(client, max_tokens=1).choices
        for given, status in ((None, 401), ("correct horse", 401), ("bearer correct horse", 200)):
            headers = {} if given is None else {"authorization": given}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{address}/health").status_code == 200


def test_the_command_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, said in (
        (["--port", str(port)], f"cannot listen at 127.0.0.1, port {port}: Address already in use"),
        (["--port", "0"], f"expected a run's folder, a checkpoint or a folder of miepo export, got '{tmp_path}"),
        (["--port", "99999"], "--port: expected a number from 0 to 65535"),
        (["--key", "short"], "--key: expected at least 8 characters, got 5"),
        (["--timeout", "0"], "--timeout must be positive"),
        (["--timeout", "1e12"], "--timeout: expected at most 86400 seconds"),
        (["--batch_size", "0"], "--batch_size must be positive"),
        (["--host", "no such host"], "cannot listen at no such host"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--ckpt_path", str(tmp_path), *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    taken.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Beyond this machine it draws a key. Signals end it, Ctrl-C also where it was started in a script's background."""
    saved, _ = saved_policy(tiny_model, [GatedConditioning()])
    folder = export(saved, tmp_path / "exported")
    command = [sys.executable, "-m", "miepo", "serve", "--ckpt_path", str(folder), "--host", "0.0.0.0", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command, "--name", "mine"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = iter(process.stdout.readline, "")
        first = next(line for line in said if line.startswith("Serving"))
        key = next(said).removeprefix("Key: ").strip()
        port = re.search(r"http://0\.0\.0\.0:(\d+)/v1 as model 'mine'", first)
        assert port is not None, first
        where = f"http://127.0.0.1:{port[1]}"
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{where}/health").status_code == 200:
                    break
            time.sleep(0.05)
        with asking(where, api_key=key) as client:
            assert ask(client, {"brevity": 1.0}, model="mine", max_tokens=3).usage.completion_tokens <= 3
        assert httpx.get(f"{where}/v1/models").status_code == 401
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


SLOW = """
import sys, time
from miepo.cli import main
from miepo.trained.streaming import ContinuousDecoder
step = ContinuousDecoder.step
def slow(self, gone):
    time.sleep({seconds})
    return step(self, gone)
ContinuousDecoder.step = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("seconds", [0.2, 60.0])
def test_who_waits_when_it_ends_is_told(tiny_model: Path, tmp_path: Path, seconds: float) -> None:
    """Within seconds, even if the network is where nobody can stop it."""
    saved, _ = saved_policy(tiny_model, [GatedConditioning()])
    folder = export(saved, tmp_path / "exported")
    command = [sys.executable, "-c", SLOW.format(seconds=seconds), "serve", "--ckpt_path", str(folder), "--port", "0"]
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process,
        ThreadPoolExecutor(2) as pool,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        said = iter(process.stdout.readline, "")
        found = re.search(r"http://[\d.:]+", next(line for line in said if line.startswith("Serving")))
        assert found is not None
        with asking(found[0]) as client:
            long: dict[str, Any] = {"max_tokens": 200, "temperature": 0}
            streamed = pool.submit(lambda: list(ask(client, {"brevity": 1.0}, stream=True, **long)))
            whole = pool.submit(lambda: ask(client, {"brevity": 1.0}, **long))
            time.sleep(2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 128 + signal.SIGTERM
            with pytest.raises(openai.APIError, match="the server is stopping"):
                streamed.result(5)
            with pytest.raises(openai.InternalServerError, match="the server is stopping") as caught:
                whole.result(5)
            assert caught.value.status_code == 503
        assert "Traceback" not in process.stderr.read()


def test_loopback() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "localhost", "::1", "127.9.9.9")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5
