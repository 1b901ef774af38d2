"""All that a GPU is asked, in one command of less than nine minutes: ``python -m tools.gpu_day --out gpu.md``.

The tests that need one, decoding in every way beside its floor, a step beside TRL's online DPO, the compiled policy
pass, and the memory plan beside measured peaks for 0.1 and, with random weights, 1 and 8 billion parameters. Each part
is a process of its own, and what it printed is written down before the next begins: a part that fails or is too slow
takes no other with it. ``--device cpu --tiny`` tries the whole on any machine, with shapes that say nothing.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoTokenizer, LlamaConfig

from miepo.policy.base_model import base_folder
from miepo.rollout import RolloutEngine, TransformersEngine, VLLMEngine
from tools.ablation import step
from tools.benchmark import BASE, Workload, copy_rate, matrix_rate, median_seconds, policy_of, prompts_of

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 4096}
SHAPES = {  # of Llama 3.2 and 3.1
    "1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 50_000, "max_position_embeddings": 512}


@dataclass(frozen=True)
class Part:
    """A process, and how many seconds it may take."""

    title: str
    command: list[str]
    seconds: int


def parts_of(options: Namespace, folder: Path) -> list[Part]:
    """Return all parts, what matters most first."""
    tiny, here = options.tiny, ["--device", options.device, "--base", options.base]
    own = [*here, *(["--tiny"] if tiny else [])]
    parts = [Part("Tests", ["pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_gpu.py"], 45)]
    parts += [Part("Decoding", ["tools.gpu_day", "--only", "decoding", *own], 75)]
    sides = ["--sides", "trl", "mo_odpo_gated", "miepo_gated"]
    sizes = ["--batch_size", "2", "--response_tokens", "8", "--steps", "1", "--rank", "2"] if tiny else (
        ["--batch_size", "32", "--response_tokens", "64", "--steps", "3"]
    )  # fmt: skip
    for dtype in ("float32",) if tiny else ("bfloat16", "float32"):  # a CPU may have to emulate the other
        command = ["tools.benchmark", *here, *sides, *sizes, "--dtype", dtype]
        parts.append(Part(f"A step beside TRL, {dtype}", command, 100))
    for name, shape in ({"tiny": TINY} if tiny else {"0.1B": None, **SHAPES}).items():
        base = options.base if shape is None else str(random_base(folder / name, shape, options.base))
        plan = ["tools.memory", "--measure", *([] if shape is None else ["--random_weights"])]
        for config in ("configs/quickstart.yaml", "tools/benchmarks/memory.yaml"):
            plan += ["--config", config]
        plan += ["--model.policy.init_args.base", base, "--trainer.accelerator", options.device.replace("cuda", "gpu")]
        plan += ["--trainer.enable_progress_bar", "false", "--model.policy.init_args.lora_layers", "null"]
        parts.append(Part(f"Memory plan, {name}", [*plan, "--data.max_new_tokens", "8" if tiny else "256"], 70))
    return [*parts, Part("Compiled policy pass", ["tools.gpu_day", "--only", "compiled", *own], 60)]


def random_base(folder: Path, shape: dict[str, object], tokenizer: str) -> Path:
    """Write the configuration of a Llama, and a tokenizer of fewer tokens, into ``folder``."""
    LlamaConfig(**shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder(tokenizer)).save_pretrained(folder)
    return folder


# -- parts of this file ------------------------------------------------------------------------------------------------


def workload_of(options: Namespace, dtype: str) -> Workload:
    if options.tiny:
        return Workload(options.base, 2, 40, 8, 2, False, options.device, dtype=dtype)
    return Workload(options.base, 32, 53, 64, 16, False, options.device, dtype=dtype)


def decoding(options: Namespace) -> Iterator[str]:
    """Compare ways of sampling by milliseconds a token of all rows, beside what the weights and products take."""
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    workload = workload_of(options, dtype)
    policy = policy_of(workload, gated=False).build(["letters", "brevity"]).to(options.device)
    policy.end_ids = []  # every response has all its tokens
    ways: dict[str, RolloutEngine] = {
        "Transformers' generate": TransformersEngine(fused=False),
        "fused": TransformersEngine(),
        "fused, CUDA graph": TransformersEngine(cuda_graph=True),
    }
    notes = []
    if find_spec("vllm") is None:
        notes.append("vLLM is not installed here: not compared.")
    else:
        ways["vLLM"] = VLLMEngine(options={"disable_log_stats": True})
    rate, copy = matrix_rate(options.device, dtype), copy_rate(options.device)
    weights = sum(p.numel() for p in policy.parameters())
    yield f"{dtype}; ms for a token of every row ({workload.response_tokens} tokens each, median of 2). Ceilings: "
    yield from (f"{rate / 1e9:.0f} GFLOP/s (product), {copy / 1e9:.0f} GB/s (copy).", *notes, "")
    yield from (f"| rows | floor | {' | '.join(ways)} |", f"|---|---|{'---|' * len(ways)}")
    for batch in (2, 4) if options.tiny else (4, 32, 128):
        prompts = (prompts_of(policy, workload) * batch)[:batch]
        w = torch.full((batch, 2), 0.5, device=options.device)
        floor = max(2 * weights * 2 * batch / rate, weights * getattr(torch, dtype).itemsize / copy)
        cells = []
        for engine in ways.values():
            seeds = list(range(batch))
            draw = partial(engine.draw, policy, prompts, w, 2, workload.response_tokens, seeds)
            cells.append(f"{1e3 * median_seconds(draw, options.device, 2) / workload.response_tokens:.2f}")
        yield f"| {2 * batch} | {1e3 * floor:.2f} | {' | '.join(cells)} |"


def compiled(options: Namespace) -> Iterator[str]:
    """Compare the policy pass, forward and backward under w+ and w-, as it is and through ``torch.compile``."""
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    workload = workload_of(options, dtype)
    policy = policy_of(workload, gated=True).build(["letters", "brevity"]).to(options.device).train()
    policy.end_ids = []
    prompts = prompts_of(policy, workload)
    n = len(prompts)
    w = torch.tensor([[0.5, 0.5], [0.9, 0.1]], device=options.device).expand(n, 2, 2)
    drawn = TransformersEngine().draw(policy, prompts, w[:, 0], 2, workload.response_tokens, list(range(n)))
    work = partial(step, policy, prompts, w, drawn.tokens)
    yield from (f"{dtype}, {n} prompts, gated", "", "| | s |", "|---|---|")
    yield f"| plain | {median_seconds(work, options.device, 2):.3f} |"
    for layer in policy.body.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=True)  # all of them share what was compiled for one
    start = perf_counter()
    work()
    first = perf_counter() - start
    yield f"| compiled (first call {first:.0f} s) | {median_seconds(work, options.device, 2):.3f} |"


# -- the parent --------------------------------------------------------------------------------------------------------


def said(part: Part, limit: float) -> tuple[str, float]:
    """Run a part; return what it printed by its end or the limit, of a failure its last lines, and its seconds."""
    start = perf_counter()
    command = [sys.executable, "-u", "-m", *part.command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode().strip()
        return f"not finished in {limit:.0f} s:\n\n{printed}", perf_counter() - start
    if done.returncode == 0:
        return done.stdout.strip(), perf_counter() - start
    tail = "\n".join(done.stderr.strip().splitlines()[-12:])
    return f"exit status {done.returncode}:\n\n{done.stdout.strip()}\n\n```\n{tail}\n```", perf_counter() - start


def heading(device: str) -> list[str]:
    where = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "lightning"))
    return [f"# {where}", "", f"{versions}, Python {platform.python_version()}.", ""]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_day.md"), help="what was printed, part by part")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="shapes of a trial")
    parser.add_argument("--parts", nargs="+", help="titles that begin so, in place of all")
    parser.add_argument("--only", choices=["decoding", "compiled"], help="(the parent's)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_day: error: expected a GPU, there is none (--device cpu --tiny tries the command)", file=sys.stderr)
        return 2
    if options.only:
        for line in {"decoding": decoding, "compiled": compiled}[options.only](options):
            print(line, flush=True)
        return 0
    end = perf_counter() + 60 * options.minutes
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = parts_of(options, Path(folder))
        if options.parts:
            parts = [part for part in parts if part.title.startswith(tuple(options.parts))]
        lines = heading(options.device)
        for part in parts:
            limit = min(part.seconds, end - perf_counter())
            text, seconds = said(part, limit) if limit > 5 else ("not begun: the time was over", 0.0)
            failed += text.startswith(("exit status", "not "))
            lines += [f"## {part.title}", "", f"`python -m {' '.join(part.command)}` ({seconds:.0f} s)", "", text, ""]
            options.out.write_text("\n".join(lines))
            print(f"{part.title}: {seconds:.0f} s", flush=True)
    print(options.out.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
