"""The page of `miepo steer` in a real browser."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

import miepo.serving.steer as steer
from miepo.cli.command import main
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.serving.batcher import Batcher
from miepo.serving.command import hosts_of
from miepo.serving.steer import SteerPage, make_app
from miepo.trained.policy import TrainedPolicy
from miepo.trained.streaming import ContinuousDecoder, GenerationRequest, stream
from tests.helpers.browser import open_page
from tests.helpers.serving import running
from tests.helpers.trained import NAMES, trained_policy

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _event_loops() -> Iterator[None]:
    """Gradio leaves event loops open, which are collected here and not in a test of something else."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def trained(tiny_model: Path) -> TrainedPolicy:
    return trained_policy(tiny_model, [PromptConditioning(), GatedConditioning()])


@contextlib.contextmanager
def shown(trained: TrainedPolicy, key: str | None = None) -> Iterator[str]:
    batcher = Batcher(trained.policy)
    try:
        with running(make_app(SteerPage(trained, batcher, 100), key, hosts_of("127.0.0.1"))) as address:
            yield address
    finally:
        batcher.close()


def eventually(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def set_slider(page: Any, slider: str, value: str) -> None:
    page.fill(f"#{slider} input[type=number]", value)
    page.keyboard.press("Tab")


def number(page: Any, slider: str) -> float:
    return float(page.input_value(f"#{slider} input[type=number]"))


def expected(trained: TrainedPolicy, weights: tuple[float, float]) -> str:
    """The answer of the network itself, as a text box has it."""
    question = trained.question("the garden", dict(zip(NAMES, weights, strict=True)), seed=0)
    text = "".join(piece.text for piece in stream(trained.policy, [question]))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def asks(page: Any, a: str, b: str) -> None:
    """Presses the button, and waits for these answers."""
    page.fill("#prompt textarea", "the garden")
    page.click("#ask")
    eventually(lambda: [page.input_value(f"#answer-{side} textarea") for side in "AB"] == [a, b])


@pytest.mark.browser
def test_a_slider_moves_the_answer(trained: TrainedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[list[float]]] = []

    join = ContinuousDecoder.join

    def watched(self: ContinuousDecoder, questions: list[GenerationRequest]) -> list[int]:
        asked.append([[round(w, 4) for w in question.preference.tolist()] for question in questions])
        return join(self, questions)

    first, last, moved = (expected(trained, w) for w in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)))
    assert len({first, last, moved}) == 3
    monkeypatch.setattr(ContinuousDecoder, "join", watched)
    with shown(trained) as address, open_page(address) as page:
        page.wait_for_selector("#ask")
        asks(page, first, last)
        assert asked[-1] == [[1.0, 0.0], [0.0, 1.0]]  # two preferences side by side
        eventually(lambda: page.locator("#front img").count() == 1)
        front = page.get_attribute("#front img", "src")
        page.screenshot(path=tmp_path / "before.png", full_page=True)

        set_slider(page, "A-0", "0.3")
        eventually(lambda: number(page, "A-1") == 0.7)  # the other follows
        assert (number(page, "B-0"), number(page, "B-1")) == (0, 1)
        count = len(asked)
        asks(page, moved, last)
        eventually(lambda: "letter_e 0.30, brevity 0.70" in page.inner_text("#under-A"))
        assert len(asked) == count + 1
        assert asked[-1] == [[0.3, 0.7], [0.0, 1.0]]
        eventually(lambda: page.get_attribute("#front img", "src") != front)  # and so does the mark
        page.screenshot(path=tmp_path / "after.png", full_page=True)

        for text in (moved, last):
            value = trained.score("the garden", text)["brevity"]
            eventually(lambda value=value: f"{round(value, 3):g}" in page.inner_text("#scores"))
        assert all(address.removeprefix("http") in url for url in page.requests if url.startswith("http"))
        assert page.complaints == []
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("before.png", "after.png"))


@pytest.mark.browser
def test_who_asks_while_the_last_answers_are_scored_is_answered(
    trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SteerPage.scores

    def late(*args: Any) -> Any:
        time.sleep(2)
        return scores(*args)

    monkeypatch.setattr(SteerPage, "scores", late)
    first, last, moved = (expected(trained, w) for w in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)))
    with shown(trained) as address, open_page(address) as page:
        page.wait_for_selector("#ask")
        asks(page, first, last)
        set_slider(page, "A-0", "0.3")
        eventually(lambda: number(page, "A-1") == 0.7)
        asks(page, moved, last)
        assert page.complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("seconds", [0.0, 0.15])
def test_a_slider_stays_where_it_is_dragged(
    trained: TrainedPolicy, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """However late the others follow."""
    plain = steer.on_simplex

    def late(*args: Any) -> list[float]:
        time.sleep(seconds)
        return plain(*args)

    monkeypatch.setattr(steer, "on_simplex", late)
    with shown(trained) as address, open_page(address) as page:
        page.wait_for_selector("#ask")
        box = page.locator("#A-0 input[type=range]").bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] - 2, middle)
        page.mouse.down()
        for i in range(40):
            page.mouse.move(box["x"] + box["width"] * (1 - 0.8 * (i + 1) / 40), middle)
        page.mouse.up()
        eventually(lambda: abs(number(page, "A-0") + number(page, "A-1") - 1) < 1e-6 and number(page, "A-1") > 0.7)
        page.wait_for_timeout(500)
        assert number(page, "A-0") == pytest.approx(0.2, abs=0.03)
        assert number(page, "A-0") + number(page, "A-1") == pytest.approx(1)
        assert page.complaints == []


def test_nothing_large_is_taken(trained: TrainedPolicy) -> None:
    with shown(trained) as address:
        file = {"file": ("x", b"0" * 1000)}
        for path in ("upload", "process_recording", "component_server"):
            assert httpx.post(f"{address}/gradio_api/{path}", files=file).status_code == 404
        join = f"{address}/gradio_api/queue/join"
        assert httpx.post(join, content=b" " * 300_000).status_code == 413
        assert httpx.post(join, content=(b"{}" for _ in range(2))).status_code == 413


@pytest.mark.browser
def test_it_fits_a_phone(trained: TrainedPolicy, tmp_path: Path) -> None:
    with shown(trained) as address, open_page(address, 390, 844) as page:
        page.wait_for_selector("#ask")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "phone.png", full_page=True)


@pytest.mark.browser
def test_a_mistake_is_told(trained: TrainedPolicy) -> None:
    with shown(trained) as address, open_page(address) as page:
        page.wait_for_selector("#ask")
        page.fill("#prompt textarea", "garden " * 400)
        page.click("#ask")
        page.wait_for_selector("text=expected at most 256 together")
        asks(page, expected(trained, (1.0, 0.0)), expected(trained, (0.0, 1.0)))  # and the page goes on


@pytest.mark.browser
def test_the_key(trained: TrainedPolicy) -> None:
    with shown(trained, key="correct horse") as address, open_page(address) as page:
        page.wait_for_selector("input[type=password]")
        assert page.locator("#ask").count() == 0
        page.fill("input >> nth=0", "miepo")
        page.fill("input[type=password]", "wrong")
        page.get_by_role("button", name="Login").click()
        page.wait_for_timeout(500)
        page.reload()
        page.wait_for_selector("input[type=password]")
        assert page.locator("#ask").count() == 0
        page.fill("input >> nth=0", "miepo")
        page.fill("input[type=password]", "correct horse")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#ask")


def test_the_command_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        ([], "expected a run's folder, a checkpoint or a folder of miepo export"),
        (["--max_tokens", "1"], "--max_tokens: expected at least 2, between which to choose, got 1"),
        (["--timeout", "inf"], "--timeout: expected at most 86400 seconds, got inf"),
        (["--max_queue", "1"], "--max_queue: expected at least 2"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["steer", "--ckpt_path", str(tmp_path / "none"), "--port", "0", *options])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
