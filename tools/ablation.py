"""What each way of computing a step brings, on its own: ``python -m tools.ablation``.

The workload of ``tools/benchmark.py``, in one process, the ways in turn. And how far log-probabilities and gradients in
bfloat16 are from those in float32, and those of trees from those of the plain network.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor

from miepo.methods.micro_batches import in_micro_batches
from miepo.policy import Policy, log_prob, tree_attention
from miepo.policy import policy as policy_file
from miepo.policy.trunk import Trunk
from miepo.rollout import TransformersEngine, fused_decoder
from miepo.types import Tokens
from tools.benchmark import BASE, DTYPES, Workload, dtype_on, policy_of, prompts_of
from tools.memory import peak_of

ONE_PASS = 10**9  # tokens


def in_turn(ways: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Return the median seconds of each way, after one call that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(times + 1):
        for name, way in ways.items():
            start = perf_counter()
            way()
            if turn:
                seconds[name].append(perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def policy_pass(policy: Policy, tokens: int, products: bool = True, once: bool = True) -> Iterator[None]:
    """Set up a policy pass of so many tokens, attention by products or by the kernel, logits once or twice."""
    head = log_prob.token_log_prob if once else partial(_logits_twice)
    with (
        patch.object(policy, "max_tokens_per_micro_batch", tokens),
        patch.object(tree_attention, "PRODUCT_KEYS", tree_attention.PRODUCT_KEYS if products else 0),
        patch.object(policy_file, "token_log_prob", head),
    ):
        yield


def _logits_twice(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, temperature: float, frozen: bool
) -> Tensor:
    return log_prob.token_log_prob(states, targets, head, vocabulary, temperature, frozen=False)


def sampling_ways(policy: Policy, prompts: list[str], w: Tensor, tokens: int) -> dict[str, Callable[[], object]]:
    def sample(fused: bool, ordered: bool = False, half: bool = False) -> None:
        orders = fused_decoder.orders_weights if ordered else lambda weight: False
        halves = fused_decoder._in_half if half else lambda weights: None
        with patch.multiple(fused_decoder, orders_weights=orders, _in_half=halves):
            TransformersEngine(fused=fused).sample(policy, prompts, w, 2, tokens, 0)

    return {
        "sampling: Transformers' generate": lambda: sample(False),
        "sampling: fused": lambda: sample(True),
        "sampling: fused, weights in oneDNN's order": lambda: sample(True, ordered=True),
        "sampling: fused, weights as the policy keeps them": lambda: sample(True, ordered=True, half=True),
    }


def step(policy: Policy, prompts: list[str], w: Tensor, responses: Tokens, trunk: Trunk | None = None) -> None:
    """Take log-probabilities under every preference and their gradient, pass by pass."""

    def loss(some: range) -> tuple[Tensor, None]:
        part = slice(some.start, some.stop)
        below = None if trunk is None else trunk[part]
        return policy.response_log_prob(prompts[part], w[part], responses[part], None, below).mean(), None

    parts = [range(g.start, g.stop) for g in policy.micro_batches(prompts, w, responses)]
    value, _ = in_micro_batches(loss, parts, list(policy.adapter_parameters().values()))  # type: ignore[arg-type]
    policy.zero_grad()
    value.backward()


def refer_and_step(policy: Policy, prompts: list[str], w: Tensor, responses: Tokens, shared: bool) -> None:
    """Take those of the reference first, as a rollout does; with ``shared`` all stand on one trunk."""
    read = torch.ones(responses.ids.shape[:2], dtype=torch.bool)
    with nullcontext() if shared else patch.object(policy, "trunk_layers", 0):
        trunk = policy.trunk(prompts, responses, read)
        policy.reference_response_log_prob(prompts, w[:, :1], responses, None, trunk)
        step(policy, prompts, w, responses, trunk)


def one_by_one(policy: Policy, prompts: list[str], w: Tensor, responses: Tokens) -> Tensor:
    """Return the plain network, a sequence at a time: ``(B, n, C, T)``."""
    rows = []
    for b, prompt in enumerate(prompts):
        for n in range(responses.ids.shape[1]):
            y = Tokens(responses.ids[b, n, None], responses.mask[b, n, None])
            rows += [policy.log_prob(policy.encode([prompt], v), v, y)[0] for v in w[b].split(1)]
    return torch.stack(rows).view(len(prompts), responses.ids.shape[1], w.shape[1], -1)


def precision(workload: Workload, prompts: list[str], w: Tensor, responses: Tokens) -> list[str]:
    """Return distance from the plain network in float32."""
    upstream = torch.randn(*responses.ids.shape[:2], w.shape[1], 1, generator=torch.Generator().manual_seed(0))
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for dtype in dict.fromkeys(("float32", workload.dtype)):
        policy = policy_of(workload, gated=False)
        policy.dtype = dtype
        policy.build(["letters", "brevity"]).train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.adapter_parameters().values():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, way in (("one by one", one_by_one), ("trees", Policy.response_log_prob)):
            value = way(policy, prompts, w, responses)
            policy.zero_grad()
            (value * upstream).sum().backward()
            gradients = [p.grad.flatten() for p in policy.adapter_parameters().values() if p.grad is not None]
            found[dtype, name] = value.detach(), torch.cat(gradients)
    value, gradient = found["float32", "one by one"]
    lines = ["| | log-probability, nats a token | gradient, of its norm |", "|---|---|---|"]
    for (dtype, name), (v, g) in found.items():
        distance = (v - value).abs().mean()
        lines.append(f"| {dtype}, {name} | {distance:.1e} | {(g - gradient).norm() / gradient.norm():.1e} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.ablation", description=__doc__)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--times", type=int, default=3, help="calls of each way, after one that warms up")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the CPU computes natively")
    options = parser.parse_args(arguments)
    workload = Workload(options.base, 8, 53, 64, 16, False, "cpu", dtype=dtype_on(options.dtype, "cpu"))
    policy = policy_of(workload, gated=False).build(["letters", "brevity"]).train()
    policy.end_ids = []  # every response has all its tokens
    prompts = prompts_of(policy, workload)
    w = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).expand(8, 2, 2)  # w+ and w-
    responses = TransformersEngine().sample(policy, prompts, w[:, 0], 2, workload.response_tokens, 0).tokens

    sampling = in_turn(sampling_ways(policy, prompts, w[:, 0], workload.response_tokens), options.times)
    settings = {
        "policy pass: by the kernel, logits twice, all at once": {"tokens": ONE_PASS, "products": False, "once": False},
        "policy pass: by products": {"tokens": ONE_PASS, "once": False},
        "policy pass: by products, logits once": {"tokens": ONE_PASS},
        "policy pass: the same, 768 tokens at a time": {"tokens": 768},
    }

    def run(name: str) -> None:
        with policy_pass(policy, **settings[name]):  # type: ignore[arg-type]
            step(policy, prompts, w, responses)

    passes = in_turn({name: partial(run, name) for name in settings}, options.times)
    half = policy.causal_lm.config.num_hidden_layers // 2
    upper = policy_of(replace(workload, lora_layers=half), gated=True).build(["letters", "brevity"]).train()
    trunks = in_turn(
        {
            f"reference and policy, gate on the upper {half} layers{', those below once' if shared else ''}": partial(
                refer_and_step, upper, prompts, w, responses, shared
            )
            for shared in (False, True)
        },
        options.times,
    )
    print("| | s | GB of tensors |\n|---|---|---|")
    for name, seconds in sampling.items():
        print(f"| {name} | {seconds:.1f} | |")
    for name, seconds in passes.items():
        print(f"| {name} | {seconds:.1f} | {peak_of(partial(run, name)) / 1e9:.2f} |")
    for name, seconds in trunks.items():
        print(f"| {name} | {seconds:.1f} | |")
    print("\n".join(["", *precision(workload, prompts[:3], w[:3], responses[:3])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
