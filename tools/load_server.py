"""Loads ``miepo serve`` with OpenAI's client: requests a second, tokens a second, and how long an answer takes.

Starts the server itself, as a process of its own; every request has a preference of its own.

    python -m tools.load_server runs/quickstart/version_0 --clients 1 4 16 --batch_sizes 1 16
"""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai

from miepo.data.reading import read_rows

PROMPTS = "package:miepo/data/everyday_validation.jsonl"


@contextmanager
def server(run: Path, batch_size: int) -> Iterator[openai.OpenAI]:
    """Yield a client of a server that answers this many requests together."""
    command = [sys.executable, "-u", "-m", "miepo", "serve", "--ckpt_path", str(run), "--port", "0"]
    command += ["--batch_size", str(batch_size), "--max_queue", "256", "--timeout", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("Serving")), "")
        if not line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        client = openai.OpenAI(base_url=line.split(" at ")[1].split(" as ")[0], api_key="none", timeout=600)
        try:
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(0.1)
            yield client
        finally:
            process.terminate()


def measure(client: openai.OpenAI, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """Return ``requests`` streamed answers of ``tokens`` tokens, asked for by ``clients`` at the same time."""
    objectives = client.models.list().data[0].objectives  # type: ignore[attr-defined]
    prompts = [row["prompt"] for row in read_rows(PROMPTS, {"prompt": str})]

    def one(i: int) -> tuple[float, float, int]:
        rng = np.random.default_rng(i)
        weights = dict(zip(objectives, rng.dirichlet(np.ones(len(objectives))).tolist(), strict=True))
        begin, first, written = time.perf_counter(), 0.0, 0
        chunks = client.chat.completions.create(
            model="miepo", messages=[{"role": "user", "content": prompts[i % len(prompts)]}], max_tokens=tokens, seed=i,
            stream=True, stream_options={"include_usage": True}, extra_body={"preference": weights},
        )  # fmt: skip
        for chunk in chunks:
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - begin
            if chunk.usage:
                written = chunk.usage.completion_tokens
        return first, time.perf_counter() - begin, written

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        first, whole, written = map(np.array, zip(*pool.map(one, range(requests)), strict=True))
    seconds = time.perf_counter() - start
    return {
        "requests/s": requests / seconds,
        "tokens/s": float(written.sum()) / seconds,
        "first token, median s": float(np.median(first)),
        "answer, median s": float(np.median(whole)),
        "answer, 95 % s": float(np.quantile(whole, 0.95)),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="what miepo serve takes as --ckpt_path")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    head: list[str] = []
    for batch_size in options.batch_sizes:
        with server(options.run, batch_size) as client:
            measure(client, max(options.clients), max(options.clients), 8)  # warm
            for clients in options.clients:
                found = measure(client, clients, options.requests, options.tokens)
                if not head:
                    head = ["answered together", "clients", *found]
                    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
                cells = [str(batch_size), str(clients), *(f"{value:.2f}" for value in found.values())]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
