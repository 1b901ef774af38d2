"""``miepo steer``: a page with a slider for each objective, two preferences side by side, their scores, the front."""

from __future__ import annotations

import os
import queue
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any

from miepo.callbacks.evaluation_table import obedience
from miepo.errors import UserError, needs
from miepo.objectives.scoring import in_thread
from miepo.preferences import format_preference, parse_preference
from miepo.serving.batcher import Batcher, PendingRequest, QueueFull, Stopped
from miepo.serving.command import address_of, hosts_of, key_for, opened, serve_app
from miepo.trained.policy import TrainedPolicy
from miepo.trained.streaming import Chunk, GenerationRequest

USER = "miepo"  # of the login, where there is one
SIDES = ("A", "B")
MOST_CHARACTERS = 20_000  # of a prompt
TOLD = (UserError, TimeoutError, Stopped)  # errors that say enough
AT_ONCE = 8  # visitors who are answered at one time
# where the page sends something to
POSTS = ("/login", "/login/", *(f"/gradio_api/{name}" for name in ("queue/join", "run/predict", "cancel", "reset")))

# -- functions ---------------------------------------------------------------------------------------------------------


def on_simplex(moved: int, weights: Sequence[float]) -> list[float]:
    """Return weights that sum to 1 and leave the one that was moved as it is; the others keep their ratios.

    >>> on_simplex(0, [0.5, 0.25, 0.75])
    [0.5, 0.125, 0.375]
    """
    own = min(max(weights[moved], 0.0), 1.0)
    others = [0.0 if k == moved else max(weight, 0.0) for k, weight in enumerate(weights)]
    total = sum(others)
    if len(weights) == 1:
        return [1.0]
    shares = [weight / total if total else float(k != moved) / (len(weights) - 1) for k, weight in enumerate(others)]
    return [own if k == moved else (1 - own) * share for k, share in enumerate(shares)]


def answers(batcher: Batcher, questions: Sequence[GenerationRequest], timeout: float) -> Iterator[list[str]]:
    """Yield what the responses have got so far, whenever one of them gets more.

    Raises:
        UserError: too many wait, or it takes too long.
    """
    pieces: queue.SimpleQueue[tuple[int, Chunk | Exception]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout
    tickets = [PendingRequest(q, deadline, lambda piece, i=i: pieces.put((i, piece))) for i, q in enumerate(questions)]  # type: ignore[misc]
    try:
        batcher.submit(tickets)
    except QueueFull:
        raise UserError("too many wait for answers already: try again later") from None
    texts, unfinished = [""] * len(tickets), len(tickets)
    try:
        while unfinished:
            try:
                index, piece = pieces.get(timeout=max(deadline - time.monotonic(), 0) + 1)
            except queue.Empty:
                raise UserError("the answer took too long") from None
            if isinstance(piece, Exception):
                raise UserError(str(piece) if isinstance(piece, TOLD) else "the answer could not be computed")
            unfinished -= piece.finish is not None
            texts[index] += piece.text
            yield list(texts)
    finally:
        for ticket in tickets:
            ticket.cancelled = True


# -- the page ----------------------------------------------------------------------------------------------------------


class SteerPage:
    """What the page shows; one for all visitors.

    Args:
        trained: What answers.
        batcher: That runs it.
        max_tokens: Of an answer.
        timeout: Seconds after which an answer is given up.
    """

    def __init__(self, trained: TrainedPolicy, batcher: Batcher, max_tokens: int = 512, timeout: float = 120.0) -> None:
        self.trained, self.batcher = trained, batcher
        self.max_tokens, self.timeout = max_tokens, timeout
        self._scoring = Lock()  # beside the policy's own, which waits for ever: behind an objective that hangs none do

    def answer(self, prompt: str, tokens: float, temperature: float, seed: float, *weights: Any) -> Iterator[Any]:
        """Yield two answers as they are written, then their scores and the front: values of the page's outputs."""
        import gradio as gr

        count, deadline = len(self.trained.names), time.monotonic() + self.timeout
        try:
            if not prompt.strip():
                raise UserError("expected a prompt, got none")
            if len(prompt) > MOST_CHARACTERS:
                raise UserError(f"expected a prompt of at most {MOST_CHARACTERS} characters, got {len(prompt)}")
            if tokens is None or not 1 <= tokens <= self.max_tokens:
                raise UserError(f"expected 1 to {self.max_tokens} tokens, got {tokens or 'none'}")
            if None in weights:  # a box that was emptied
                raise UserError("expected a weight for every objective, got none")
            both = [dict(zip(self.trained.names, weights[i : i + count], strict=True)) for i in (0, count)]
            vectors = [parse_preference(normalised(w), self.trained.names) for w in both]
            questions = [
                self.trained.question(prompt, normalised(w), int(tokens), temperature, seed=int(seed or 0))
                for w in both
            ]
            captions = [f"Answered under {format_preference(v, self.trained.names)}" for v in vectors]
            texts = ["", ""]
            for texts in answers(self.batcher, questions, self.timeout):
                yield *texts, *captions, gr.skip(), gr.skip()
            rows, note, points = self.scores(prompt, texts, [v.tolist() for v in vectors], deadline)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield *texts, *[f"{u}{note}" for u in captions], rows, self.front(weights[:count], weights[count:], points)

    def scores(
        self, prompt: str, texts: Sequence[str], vectors: Sequence[Sequence[float]], deadline: float
    ) -> tuple[list[list[Any]], str, list[list[float]]]:
        """Return rows of the table, what is to be said of it, and the reward vector of each answer."""

        def score() -> dict[str, list[float]]:
            if not self._scoring.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            try:
                return self.trained.score([prompt] * len(texts), texts)
            finally:
                self._scoring.release()

        try:
            found = in_thread(score).result(max(deadline - time.monotonic(), 0))
        except UserError as error:
            return [], f" (not scored: {error})", []
        except TimeoutError:
            return [], f" (not scored within {self.timeout:g} s)", []
        rows = [
            [name, *(round(value, 3) for side in range(len(texts)) for value in (vectors[side][k], found[name][side]))]
            for k, name in enumerate(self.trained.names)
        ]
        return rows, "", [[found[name][side] for name in self.trained.names] for side in range(len(texts))]

    def front(self, a: Sequence[float], b: Sequence[float], points: Sequence[Sequence[float]] = ()) -> Any:
        """Return the measured front with what was reached nearest to both preferences.

        And the scores of two answers.
        """
        import gradio as gr

        front = self.trained.front
        if front is None:
            return gr.skip()
        marks: dict[str, Sequence[float]] = {}
        for side, weights in zip(SIDES, (a, b), strict=True):
            vector = parse_preference(normalised(dict(zip(front.names, weights, strict=True))), front.names)
            nearest = front.nearest(vector)
            marks[f"{side}, nearest measured"] = front.means[nearest].tolist()
        marks |= {f"answer {side}": point for side, point in zip(SIDES, points, strict=False)}
        return front.draw(marks)

    def blocks(self) -> Any:
        """Return the Gradio page."""
        import gradio as gr

        names = self.trained.names
        sliders: dict[str, list[Any]] = {}
        boxes, notes = [], []
        with gr.Blocks(title="miepo steer", analytics_enabled=False) as page:
            gr.Markdown(f"## Steer between {', '.join(names)}\nBase: `{self.trained.policy.base}`")
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=MOST_CHARACTERS, elem_id="prompt")
            with gr.Row():
                start = min(self.trained.saved.max_new_tokens, self.max_tokens)
                tokens = gr.Slider(1, self.max_tokens, start, step=1, label="Tokens at most", elem_id="tokens")
                temperature = gr.Slider(0, 2, self.trained.policy.temperature, step=0.05, label="Temperature")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            with gr.Row():
                for side in SIDES:
                    first = [1.0] + [0.0] * (len(names) - 1)
                    with gr.Column():
                        sliders[side] = [
                            gr.Slider(
                                0, 1, weight, step=0.01, label=f"{side}: {name}", elem_id=f"{side}-{k}",
                                interactive=len(names) > 1,
                            )
                            for k, (name, weight) in enumerate(
                                zip(names, first if side == "A" else first[::-1], strict=True)
                            )
                        ]  # fmt: skip
                        boxes.append(
                            gr.Textbox(label=f"Answer {side}", lines=6, buttons=["copy"], elem_id=f"answer-{side}")
                        )
                        notes.append(gr.Markdown("", elem_id=f"under-{side}"))
            ask = gr.Button("Answer", variant="primary", elem_id="ask")
            heads = ["objective", *(f"{what} {side}" for side in SIDES for what in ("weight", "score"))]
            table = gr.Dataframe(
                headers=heads, label="Scores, normalised as in training", interactive=False, elem_id="scores"
            )
            weights = [slider for side in SIDES for slider in sliders[side]]
            evaluations = self.trained.saved.evaluations
            if evaluations and (said := obedience(evaluations[-1].figures, names)):
                gr.Markdown("Measured at the end of training: " + "; ".join(said) + ".", elem_id="obedience")
            known = self.trained.front is not None
            plot = gr.Plot(label="Measured front", format="png", elem_id="front", visible=known)
            quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            for row in sliders.values():
                for k, slider in enumerate(row if len(names) > 1 else []):
                    # the others alone: an answer that comes late would take the slider back from under the hand
                    others = [other for other in row if other is not slider]
                    moved = slider.input(
                        partial(_others, k), row, others, queue=False, trigger_mode="always_last", **quiet
                    )
                    moved.then(self._redraw, weights, plot, **quiet)
            inputs = [prompt, tokens, temperature, seed, *weights]
            shown = [*boxes, *notes, table, plot]
            gr.on(
                [ask.click, prompt.submit], self.answer, inputs, shown, api_visibility="private", time_limit=None,
                trigger_mode="always_last",  # who asks again while the last answers are scored is answered, too
            )  # fmt: skip
            page.load(self._redraw, weights, plot, **quiet)
        page.queue(max_size=self.batcher.limit, default_concurrency_limit=AT_ONCE, api_open=False)
        return page

    def _redraw(self, *weights: float) -> Any:
        import gradio as gr

        half = len(weights) // 2
        return gr.skip() if None in weights else self.front(weights[:half], weights[half:])


def _others(moved: int, *weights: float | None) -> Any:
    """Return where the other sliders stand when one has moved; a box that was emptied stands at 0."""
    found = [round(weight, 4) for k, weight in enumerate(on_simplex(moved, [w or 0 for w in weights])) if k != moved]
    return found if len(found) > 1 else found[0]


def normalised(weights: dict[str, float]) -> dict[str, float]:
    """Return weights whose sum is 1 up to the sliders' steps, made to sum to 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total > 0 else weights


def make_app(page: SteerPage, key: str | None, hosts: list[str] | None) -> Any:
    """Return the page as an ASGI application; with a key behind a login of the user ``miepo``."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from miepo.serving.admission import Admission

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(Admission, posts=POSTS)  # of all that Gradio takes
    plain = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=plain, font_mono=["ui-monospace", "monospace"])  # none from the network
    return gr.mount_gradio_app(
        app, page.blocks(), path="/", auth=(USER, key) if key else None, footer_links=[], ssr_mode=False, theme=theme,
        auth_message=f"User {USER}, with the key that the command printed or was given.",
    )  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------


def steer(options: Namespace) -> None:
    """Show the page until a signal comes; the options are those of ``miepo steer``."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise needs(error.name or "gradio", "miepo steer") from None
    key = key_for(options)
    with opened(options) as (listening, trained):
        batcher = Batcher(trained.policy, max_queue=options.max_queue)
        page = SteerPage(trained, batcher, options.max_tokens, options.timeout)
        print(f"Steer {trained!r} at {address_of(options.host, listening)}", flush=True)
        if key is not None:
            print(f"User: {USER}; key: {key if options.key is None else 'as given'}", flush=True)
        serve_app(make_app(page, key, hosts_of(options.host)), listening, batcher)
