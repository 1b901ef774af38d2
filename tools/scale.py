"""How a step grows: ``python -m tools.scale``.

Real steps of MI-EPO, each shape in a process of its own: one shape at hand, and others that differ from it in one
dimension, a larger base among them. And what log-probabilities take of memory with a large vocabulary.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from miepo.policy.log_prob import token_log_prob
from tools.benchmark import BASE, DTYPES, Side, Workload, dtype_on
from tools.gpu_day import random_base
from tools.memory import peak_of

AXES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "batch_size": ("B", (2, 4, 8)),
    "responses": ("n", (2, 4, 8)),
    "response_tokens": ("T", (32, 64, 128)),
    "prompt_tokens": ("P", (53, 106, 212)),
    "objectives": ("K", (2, 3, 4)),
    "counterfactuals": ("C", (1, 2, 4)),
}
# of SmolLM2-360M, whose layers have the width 960 in place of 576
LARGER = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
    "num_key_value_heads": 5, "vocab_size": 49_152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def measured(workload: Workload, side: str, steps: int) -> tuple[float, dict[str, float], float]:
    """Return seconds of a step, of its parts, and GB above the loaded model."""
    with tempfile.TemporaryDirectory() as folder:
        process = Side(side, workload, Path(folder) / "log")
        try:
            process.ready()
            process.step()
            done = [process.step() for _ in range(steps)]
        finally:
            process.close()
    seconds = statistics.median(step["seconds"] for step in done)
    parts = {key: statistics.median(step["parts"][key] for step in done) for key in ("sampling", "reference")}
    return seconds, parts, max(step["memory"] for step in done) - process.loaded


def larger_base(folder: Path, tokenizer: str) -> Path:
    """Write a model of the shape :data:`LARGER` into ``folder``, with random weights in bfloat16."""
    random_base(folder, LARGER, tokenizer)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def steps_table(base: Workload, side: str, steps: int, larger: Path) -> Iterator[str]:
    """Yield the table's lines, each as it is measured."""
    yield "| | s a step | sampling | reference | policy and the rest | GB above the model |"
    yield "|---|---|---|---|---|---|"
    known: dict[Workload, tuple[float, dict[str, float], float]] = {}
    axes = {axis: (letter, {str(value): value for value in values}) for axis, (letter, values) in AXES.items()}
    axes["base"] = ("base", {"135M": base.base, "360M": str(larger)})
    for axis, (letter, values) in axes.items():
        for label, value in values.items():
            workload = replace(base, **{axis: value})
            if workload not in known:
                known[workload] = measured(workload, side, steps)
            seconds, parts, memory = known[workload]
            rest = seconds - sum(parts.values())
            yield (
                f"| {letter} = {label} | {seconds:.1f} | {parts['sampling']:.1f} | {parts['reference']:.1f} | "
                f"{rest:.1f} | {memory:.2f} |"
            )


def head_table(dtype: str, tokens: int = 1024, width: int = 576, vocabulary: int = 151_936) -> list[str]:
    """Forward and backward of log-probabilities, at once and in chunks."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width, dtype=getattr(torch, dtype)) / width**0.5
    states = torch.randn(tokens, width, dtype=weight.dtype)
    targets = torch.randint(vocabulary, (tokens,))

    def plain(x: Tensor) -> Tensor:
        return (x @ weight.T).float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)

    def chunked(x: Tensor) -> Tensor:
        return token_log_prob(x, targets, lambda s: s @ weight.T, vocabulary, 1.0)

    def run(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = states.clone().requires_grad_()
        function(x).sum().backward()
        assert x.grad is not None
        return x.grad

    difference = (run(plain) - run(chunked)).float().norm() / run(plain).float().norm()
    lines = ["| | GB | s |", "|---|---|---|"]
    for name, function in (("(n, V) at once", plain), ("token_log_prob", chunked)):
        seconds = []
        for _ in range(3):
            start = perf_counter()
            run(function)
            seconds.append(perf_counter() - start)
        peak = peak_of(lambda function=function: run(function))  # type: ignore[misc]
        lines.append(f"| {name} | {peak / 1e9:.2f} | {statistics.median(seconds):.2f} |")
    return [
        *lines,
        "",
        f"n = {tokens}, D = {width}, V = {vocabulary}; gradients differ by {difference:.1e} of their norm.",
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.scale", description=__doc__)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--side", default="miepo", choices=["miepo", "miepo_gated"])
    parser.add_argument("--lora_layers", type=int, help="adapt so many of the last layers; by default all")
    parser.add_argument("--steps", type=int, default=2, help="of each shape, after one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the device computes natively")
    options = parser.parse_args(arguments)
    dtype = dtype_on(options.dtype, options.device)
    base = Workload(options.base, 4, 53, 64, 16, False, options.device, dtype=dtype, lora_layers=options.lora_layers)
    print("\n".join([*head_table(dtype), ""]), flush=True)
    print("B = 4, n = 2, T = 64, P = 53, K = 2, C = 1, but for one:\n")
    with tempfile.TemporaryDirectory() as folder:
        larger = larger_base(Path(folder), options.base)
        for line in steps_table(base, options.side, options.steps, larger):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
