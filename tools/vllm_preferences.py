"""Many preferences in one batch of a vLLM server: ``python -m tools.vllm_preferences --python PYTHON_WITH_VLLM``.

A saved gated policy of SmolLM2, whose adapter is random, answers 64 requests under 64 preferences at one time: with
the gate inside the LoRA layers (one adapter), and with a plain adapter for each preference, which the resolver writes.
Tokens a second, when preferences are asked for the first time and again; memory; and how far the log-probabilities are
from those of the policy itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from miepo.cli.rollout_server import command_line, make_parser, settings_of_policy
from miepo.data.prompts import load_prompts
from miepo.policy import GatedConditioning, Policy
from miepo.trained.export import export
from miepo.types import Tokens
from tests.helpers.trained import saved_policy
from tools.benchmark import BASE

NAME = "policy"


@contextmanager
def server(options: Namespace, folder: Path, adapters: int, resolver: bool, port: int) -> Iterator[psutil.Process]:
    """Start a server and yield its process once it answers."""
    words = ["--ckpt_path", str(folder), "--name", NAME, "--port", str(port), "--python", options.python]
    own = make_parser().parse_args([*words, "--adapters", str(adapters)])
    settings = settings_of_policy(own) | {"dtype": options.dtype, "max-model-len": 512}
    if resolver:
        del settings["lora-modules"]
    environment, line = command_line(own, settings, ["--enforce-eager"] if options.eager else [])
    if resolver:
        environment |= {"MIEPO_POLICIES": f"{NAME}={folder}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = Path(tempfile.gettempdir()) / f"vllm_{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, env=os.environ | environment, stdout=file, stderr=file)
        try:
            end = time.monotonic() + options.patience
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start: {log}")
                time.sleep(1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def memory(process: psutil.Process) -> float:
    """Return GB that a server's processes hold."""
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e9


async def ask(url: str, bodies: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Return seconds and answers of requests that are sent at one time."""
    async with httpx.AsyncClient(timeout=1200, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        found = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
        seconds = time.perf_counter() - start
    for one in found:
        if one.status_code != 200:
            raise SystemExit(one.text)
    return seconds, [one.json()["choices"][0] for one in found]


def distance(policy: Policy, prompts: list[str], w: torch.Tensor, answers: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean and the largest distance of log-probabilities from the policy's, in nats a token."""
    found = []
    for i, answer in enumerate(answers):
        ids = torch.tensor([answer["token_ids"]])
        own = policy.log_prob(policy.encode([prompts[i]], w[i : i + 1]), w[i : i + 1], Tokens(ids, ids >= 0))
        found += (own[0] - torch.tensor(answer["logprobs"]["token_logprobs"])).abs().tolist()
    return statistics.mean(found), max(found)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with vLLM and miepo")
    parser.add_argument("--preferences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--rank", type=int, default=16, help="of a block; there are three")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64], help="--max-loras of plain adapters")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="without compilation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600, help="seconds for a server to start")
    parser.add_argument("--port", type=int, default=8200)
    options = parser.parse_args()
    saved, policy = saved_policy(
        BASE, [GatedConditioning()], lora_rank=options.rank, lora_alpha=2 * options.rank, scale=0.03, dtype="float32",
        temperature=1.0,
    )  # fmt: skip
    n = options.preferences
    prompts = load_prompts("package:miepo/data/everyday_train.jsonl", "prompt")[:n]
    first = torch.linspace(0, 1, n)
    w = torch.stack([first, 1 - first], 1)
    bodies: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        stated = ",".join(f"{name}={weight:.6f}" for name, weight in zip(saved.names, w[i].tolist(), strict=True))
        ids = policy.encode([prompt], w[i : i + 1]).ids[0].tolist()
        bodies.append({
            "model": f"{NAME}@{stated}", "prompt": ids, "max_tokens": options.tokens,
            "seed": i, "logprobs": 0, "return_token_ids": True, "temperature": 1.0, "ignore_eos": True,
        })  # fmt: skip
    print(f"{n} requests, {n} preferences, {options.tokens} tokens each, {options.dtype}, rank {policy.rank}")
    print("| | --max-loras | s, first asked | tokens/s, first asked | tokens/s, again | GB | mean, largest gap |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place, policy.evaluating():
        folder = export(saved, Path(place) / "policy")
        modes = [("gate in the layer", 1, False), *(("adapter a preference", most, True) for most in options.adapters)]
        for k, (title, most, resolver) in enumerate(modes):
            port = options.port + k
            with server(options, folder, most, resolver, port) as process:
                url = f"http://127.0.0.1:{port}"
                base = json.loads(httpx.get(f"{url}/v1/models").text)["data"][0]["id"]
                asyncio.run(ask(url, [body | {"model": base} for body in bodies]))  # warm
                cold, answers = asyncio.run(ask(url, bodies))
                warm = statistics.median(asyncio.run(ask(url, bodies))[0] for _ in range(options.repeats))
                mean, largest = distance(policy, prompts, w, answers)
                total = n * options.tokens
                rates = f"{cold:.1f} | {total / cold:.0f} | {total / warm:.0f} | {memory(process):.2f}"
                print(f"| {title} | {most} | {rates} | {mean:.1e}, {largest:.1e} |", flush=True)


if __name__ == "__main__":
    main()
