"""Plan of a run's peak memory: ``python -m tools.memory --config online.yaml --card 40``.

The run's own code computes on tensors that have shapes and no contents, and what is alive at one time is counted. So
the plan needs the configuration of each model and not its weights, and takes seconds for eight billion parameters.
Every sequence counts at its full length. What the plan cannot see is the allocator: workspaces of the libraries below
PyTorch, fragmentation, the CUDA context.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
import weakref
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from miepo.callbacks.throughput import peak_memory
from miepo.cli.mistakes import user_error
from miepo.cli.trainer import MiepoCLI
from miepo.data.module import OnlinePreferenceDataModule
from miepo.data.rollout import PAIR
from miepo.errors import UserError, first_line
from miepo.exploration import Exploration
from miepo.methods import SupervisedDataModule
from miepo.methods.base import PolicyModule
from miepo.objectives import Objective
from miepo.objectives.base import objectives_of
from miepo.objectives.reward_model import ModelObjective
from miepo.policy import Policy, log_prob, tree_attention
from miepo.policy import policy as policy_file
from miepo.policy.base_model import base_folder, give_padding
from miepo.policy.policy import MAX_TOKENS
from miepo.policy.precision import chosen_dtype
from miepo.policy.prefix_tree import tree_size
from miepo.preferences import evaluation_grid
from miepo.rollout import fused_decoder
from miepo.rollout.fused_decoder import orders_weights
from miepo.rollout.transformers_engine import draw_tokens
from miepo.types import PreferenceBatch, Tokens

GB = 1e9
# Freed blocks go back to the system at once. By default the C library keeps them, a third of the peak and more.
EXACT = "MALLOC_MMAP_THRESHOLD_"
TEXT = 16  # tokens of a prompt that state the preference between two objectives, about
# On a CPU: oneDNN's kernels, one for every shape it met, and the code of libraries that is read when it first runs
# (tools/benchmarks/README.md says how much of either was seen).
LIBRARIES = 0.2 * GB
SPARE = 0.08  # of a card: the CUDA context and what the allocator cannot use

# -- counting ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake = isinstance(args[0] if args else None, FakeTensor)
        if fake and op is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            # which tokens count is not known of tensors without contents: all of them, the largest case
            (mask,) = args[1]
            made = args[0].flatten(0, mask.dim() - 1).clone()
        else:
            made = op(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return made

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted and key not in given:  # a view of a weight is nothing new
            self.counted.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


def peak_of(work: Callable[[], Any]) -> int:
    """Return bytes alive at the peak of ``work``, without those that were there before."""
    with Live() as live:
        work()
    return live.peak


def size_of(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Bytes: what is there all the time, and what each part of the run adds while it lasts."""

    resident: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # objectives whose networks are not known

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.phases.values())


def plan_memory(
    module: PolicyModule,
    data: Any,
    objectives: Sequence[Objective],
    prompt_tokens: int,
    response_tokens: int,
    cuda: bool,
) -> Plan:
    """Return the plan of a run whose longest prompt, preference text included, has ``prompt_tokens`` tokens."""
    plan, policy = Plan(), module.policy
    device = "cuda" if cuda else "cpu"
    config = _config(base_folder(policy.base), f"the policy's base '{policy.base}'")
    published = config.dtype  # before a model of it is made in another
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_policy_dtype(policy, cuda))
        policy.adapt(model, [o.name for o in objectives])
        networks = {o.name: _network(o) for o in objectives if isinstance(o, ModelObjective)}
    policy.train()
    samples_in_half = not cuda and _in_half_precision(policy, data, published)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        # the tensors say that they are on a CPU
        patch.dict(log_prob.CHUNK_LOGITS, cpu=log_prob.CHUNK_LOGITS[device]),
        patch.dict(MAX_TOKENS, cpu=MAX_TOKENS[device]),
        patch.object(tree_attention, "PRODUCT_KEYS", 0 if cuda else tree_attention.PRODUCT_KEYS),
        # what is done with the memory of weights, tensors without contents cannot do
        patch.multiple(
            fused_decoder,
            orders_weights=lambda weight: not cuda and orders_weights(weight),
            _packed=_in_order,
            _laid_out=_in_place,
            _in_half=lambda weights: _in_place(weights, ()) if samples_in_half else None,
        ),
    ):
        _materialise(policy)
        adapter = list(policy.adapter_parameters().values())
        trained = size_of(iter(adapter))
        plan.resident = {
            "base model": size_of(policy.parameters()) - trained,
            "adapter": trained,
            "gradients": trained,
            "Adam": 2 * trained,
            **({"weights for sampling": _decoded(policy)} if samples_in_half else {}),
            **({} if cuda else {"kernels and libraries": int(LIBRARIES)}),
        }
        for parameter in adapter:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(data, SupervisedDataModule):
            n = data.batch_size
            plan.phases["training step"] = peak_of(lambda: _imitate(policy, n, prompt_tokens, response_tokens))
            return plan
        _online(plan, module, data, prompt_tokens, response_tokens)
        for objective in objectives:
            if isinstance(objective, ModelObjective):
                _reward_model(plan, objective, networks[objective.name], prompt_tokens + response_tokens)
            else:
                plan.unknown.append(objective.name)
    return plan


def _online(plan: Plan, module: PolicyModule, data: OnlinePreferenceDataModule, p: int, t: int) -> None:
    policy, exploration = module.policy, getattr(module, "exploration", None)
    n, answers, m = data.batch_size, data.evaluation_batch_size, len(evaluation_grid(len(policy.names)))
    if isinstance(data.grid_spec, int):
        m = data.grid_spec
    elif data.grid_spec is not None:
        m = len(data.grid_spec)
    sample = _decode if getattr(data.engine, "fused", False) and fused_decoder.fits(policy) else _generate
    plan.phases["sampling"] = peak_of(lambda: sample(policy, n, data.responses, p, t))
    compared = data.rollout_settings.most_compared(len(policy.names))
    if exploration is None:
        plan.phases["training step"] = peak_of(lambda: _imitate(policy, n, p, t))
    else:
        c = exploration.num_counterfactuals if exploration.active else 0
        read = 1 + c if policy.reference_depends_on_preference else 1
        anchors = anchors_of(exploration, compared)
        plan.phases["reference"] = peak_of(lambda: _read(policy, n, read, compared, p, t, anchors))
        plan.phases["training step"] = peak_of(lambda: _train(policy, exploration, n, c, p, t, compared))
    plan.phases["evaluation: sampling"] = peak_of(lambda: sample(policy, answers, 1, p, t))
    plan.phases["evaluation: information"] = peak_of(lambda: _read(policy, -(-answers // m), m, 1, p, t))


def anchors_of(exploration: Exploration, compared: int) -> int:
    """Return how many of the compared responses are read under w-, too."""
    return compared if exploration.anchors == 2 else 1


def _mask(n: int, length: int) -> Tensor:
    mask = torch.ones(n, length, dtype=torch.bool)
    mask[0, 0] = False  # without any padding attention would do without a mask, which no real batch does
    return mask


def _trees(
    policy: Policy, prompts: int, preferences: int, responses: int, p: int, t: int, others: int | None = None
) -> tuple[Any, Any]:
    """Return token ids of prompts under preferences, and of responses.

    Under all but the first only ``others`` are read.
    """
    written = min(TEXT, p - 1) if policy.reference_depends_on_preference else 0
    under = [[0] * (p - written) + [1 + c] * written for c in range(preferences)]
    read = responses if others is None else others
    rest = [[0] * t] * read + [[]] * (responses - read)
    return [under] * prompts, [[[[0] * t] * responses, *[rest] * (preferences - 1)]] * prompts


def _log_prob(
    policy: Policy, prompts: int, preferences: int, responses: int, p: int, t: int, others: int | None = None
) -> Tensor:
    weights = torch.ones(prompts * preferences, len(policy.names))
    under, answers = _trees(policy, prompts, preferences, responses, p, t, others)
    return policy.trees_log_prob(under, weights, answers, t)


def _train(
    policy: Policy, exploration: Exploration, n: int, counterfactuals: int, p: int, t: int, compared: int = PAIR
) -> None:
    """Run the fullest pass, beside the gradients of those before it."""
    anchors = anchors_of(exploration, compared)
    under, answers = _trees(policy, 1, 1 + counterfactuals, compared, p, t, anchors)
    size = tree_size(under[0], answers[0], share=not policy.gated)
    some, kept = min(n, -(-policy.max_tokens // size)), []  # prompts of several lengths fill it better than whole ones
    if some < n:
        kept = [torch.zeros_like(parameter) for parameter in policy.adapter_parameters().values()]
    if exploration.needs_gradient:
        value = _log_prob(policy, some, 1 + counterfactuals, compared, p, t, anchors)
    else:
        with torch.no_grad():
            _log_prob(policy, some, counterfactuals, compared, p, t)
        value = _log_prob(policy, some, 1, compared, p, t)
    found = torch.autograd.grad(value.sum(), list(policy.adapter_parameters().values()))
    del found, kept


def _imitate(policy: Policy, n: int, p: int, t: int) -> None:
    weights = torch.ones(n, len(policy.names))
    prompts, responses = (Tokens(torch.zeros(n, size, dtype=torch.long), _mask(n, size)) for size in (p, t))
    policy.log_prob(prompts, weights, responses).sum().backward()


def _read(policy: Policy, n: int, preferences: int, responses: int, p: int, t: int, others: int | None = None) -> None:
    with policy.evaluating():
        _log_prob(policy, n, preferences, responses, p, t, others)


def _decode(policy: Policy, n: int, count: int, p: int, t: int) -> None:
    """Decode the first token, and the last one."""
    prompts = Tokens(torch.zeros(n, p, dtype=torch.long), _mask(n, p))
    uniform = torch.zeros(n * count, dtype=torch.float64)
    with policy.evaluating():
        decoder = fused_decoder.FusedDecoder(policy, prompts, torch.ones(n, len(policy.names)), count, t)
        draw_tokens(decoder.start(), uniform)
        decoder.end = p + t - 2
        decoder.place.fill_(p + t - 2)
        decoder.step.fill_(t - 2)
        draw_tokens(decoder.next(torch.zeros(n * count, dtype=torch.long)), uniform)


def _in_half_precision(policy: Policy, data: Any, published: torch.dtype | None) -> bool:
    """Return whether a copy of the weights in half precision is kept for sampling.

    ``published`` is the type in which they can be had.
    """
    return (
        getattr(getattr(data, "engine", None), "fused", False)
        and fused_decoder.fits(policy)
        and policy.weight_dtype == torch.float32
        and published in (torch.bfloat16, torch.float16)
    )


def _decoded(policy: Policy) -> int:
    """Return the bytes, in half precision, of the weights that every token is multiplied by."""
    layers: Any = policy.body.layers
    frozen = {m.weight for m in layers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return 2 * sum(weight.numel() for weight in {*frozen, policy.causal_lm.get_output_embeddings().weight})


def _in_order(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    kept = weight.clone()  # as much as oneDNN's order takes
    return lambda states: nn.functional.linear(states, kept)


def _in_place(weights: Sequence[Tensor], first: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    size = sum(map(len, (*weights, *first)))
    return lambda states: states.new_empty(len(states), size)


def _generate(policy: Policy, prompts: int, count: int, p: int, t: int) -> None:
    """Generate the first token, and the last one, which has the longest cache."""
    n = prompts * count
    with policy.evaluating(), policy.conditioned(torch.ones(n, len(policy.names))):
        model: Any = policy.model
        mask = _mask(n, p).long()
        out = model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=True, logits_to_keep=1)
        _draw(out.logits)
        shapes = [(layer.keys.shape, layer.keys.dtype) for layer in out.past_key_values.layers]
        del out
        cache = DynamicCache()
        for i, ((_, heads, _, size), dtype) in enumerate(shapes):
            keys, values = (torch.zeros(n, heads, p + t - 2, size, dtype=dtype) for _ in range(2))
            cache.update(keys, values, i)
        del keys, values
        mask = _mask(n, p + t - 1).long()
        out = model(
            input_ids=torch.zeros(n, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache, logits_to_keep=1
        )
        _draw(out.logits)


def _draw(logits: Tensor) -> None:
    scores = logits[:, -1].float()
    nn.functional.softmax(scores, -1)


def _network(objective: ModelObjective) -> nn.Module:
    config = _config(objective.source, f"the model of {objective.name}, '{objective.source}'")
    return objective.shape(config).to(_dtype(objective.dtype, config))


def _reward_model(plan: Plan, objective: ModelObjective, network: nn.Module, length: int) -> None:
    _materialise(network)
    size = size_of(network.parameters())
    body: Any = getattr(network, network.base_model_prefix)  # type: ignore[arg-type]
    body.config.use_cache = False
    limits = (length, objective.max_length, getattr(body.config, "max_position_embeddings", None))
    ids = torch.zeros(objective.batch_size, min(n for n in limits if n), dtype=torch.long)
    with torch.no_grad():
        work = peak_of(lambda: body(input_ids=ids, attention_mask=torch.ones_like(ids)))
    if objective.place is not None:
        return  # on a device of its own
    if objective.offload:
        work += size
    else:
        plan.resident[f"reward model {objective.name}"] = size
    plan.phases[f"scoring {objective.name}"] = work


def _policy_dtype(policy: Policy, cuda: bool) -> torch.dtype:
    """On a card that computes bfloat16 natively, or on this machine's CPU."""
    on_card = "bfloat16" if policy.dtype == "auto" else policy.dtype
    found: torch.dtype = getattr(torch, on_card if cuda else chosen_dtype(policy.dtype, torch.device("cpu")))
    return found


def _dtype(given: str, config: Any) -> torch.dtype:
    return (config.dtype or torch.float32) if given == "auto" else getattr(torch, given)


def _materialise(module: nn.Module) -> None:
    """Turn tensors without a device into tensors on one, without contents; what is tied stays tied."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                    )
                part._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _config(source: str, what: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected the configuration of {what}: {first_line(error)} (a folder with its config.json is enough)"
        ) from None


# -- the measurement ---------------------------------------------------------------------------------------------------


def random_weights(base: str, dtype: str) -> tuple[Any, Any]:
    """Make a model of the configuration and the tokenizer in a folder: :func:`load_base` where there are no weights."""
    folder = base_folder(base)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing billions takes a CPU minutes
        model = AutoModelForCausalLM.from_config(_config(folder, f"the policy's base '{base}'"), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    give_padding(model, tokenizer)
    return model.to("cpu"), tokenizer


class Watch(Callback):
    """Notes how much memory the process has before models are loaded, and how long prompts and responses are."""

    def __init__(self) -> None:
        self.before = 0.0  # GB
        self.prompt_tokens = self.response_tokens = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.before = peak_memory(trainer.strategy.root_device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        policy = pl_module.policy
        if isinstance(batch, PreferenceBatch):  # laid out without padding
            prompts, masks = policy.encode(batch.prompts, batch.preference).mask, batch.responses.tokens.mask
            lengths = [ceil(mask.sum(-1).float().mean()) for mask in (prompts, masks)]
        else:
            prompts = policy.encode_text(batch.prompts, [""] * len(batch)).mask
            lengths = [prompts.shape[-1], batch.responses.ids.shape[-1]]
        self.prompt_tokens, self.response_tokens = map(max, (self.prompt_tokens, self.response_tokens), lengths)


def measure(cli: MiepoCLI) -> tuple[float, Watch]:
    """Run two steps, and return the growth of the process, or what the card held, in GB."""
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return peak_memory(cli.trainer.strategy.root_device) - watch.before, watch


# -- the command -------------------------------------------------------------------------------------------------------


def report(plan: Plan, prompt_tokens: int, response_tokens: int, card: float | None) -> str:
    lines = [f"Prompts of {prompt_tokens} tokens, responses of {response_tokens}. GB = 10^9 bytes."]
    base = sum(plan.resident.values())
    rows = [(name, size) for name, size in plan.resident.items()]
    lines += [f"  {name:<32} {size / GB:8.2f}" for name, size in rows]
    lines += [f"  {'there all the time':<32} {base / GB:8.2f}"]
    lines += [f"  + {name:<30} {size / GB:8.2f}  = {(base + size) / GB:.2f}" for name, size in plan.phases.items()]
    lines += [f"Peak: {plan.peak / GB:.2f} GB, in {max(plan.phases, key=plan.phases.__getitem__)}"]
    if plan.unknown:
        lines += [f"Not counted, network unknown: {', '.join(plan.unknown)}"]
    if card is not None:
        fitting = "fits" if fits(plan, card) else "does not fit"
        lines += [f"Card of {card:g} GB: {fitting}, with {SPARE:.0%} left to the allocator"]
    return "\n".join(lines)


def fits(plan: Plan, card: float) -> bool:
    return plan.peak <= (1 - SPARE) * card * GB


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m tools.memory",
        description="Plan of a run's peak memory. All other options are those of miepo fit: --config, and changes to "
        "it. Exit status 1: it does not fit the card.",
    )
    parser.add_argument("--card", type=float, help="memory of a card in GB: plan for CUDA, and say whether it fits")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="longest prompt, preference text included")
    parser.add_argument("--response_tokens", type=int, help="longest response; by default what the config allows")
    parser.add_argument("--measure", action="store_true", help="run two steps, too, and plan for their mean lengths")
    parser.add_argument(
        "--random_weights", action="store_true", help="measure with random weights: a base's configuration is enough"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.measure and sys.platform == "linux" and EXACT not in os.environ and arguments is None:
        os.environ[EXACT] = "65536"
        os.execv(sys.executable, [sys.executable, "-m", "tools.memory", *sys.argv[1:]])
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")
    folder = tempfile.TemporaryDirectory()  # of what the two steps write
    try:
        for name in ("card", "prompt_tokens", "response_tokens"):
            if (value := getattr(options, name)) is not None and value <= 0:
                raise UserError(f"--{name} must be positive, got {value:g}")
        short = ["--trainer.fast_dev_run=2", f"--trainer.default_root_dir={folder.name}"] if options.measure else []
        cli = MiepoCLI(run=False, save_config_callback=None, args=[*rest, *short], seed_everything_default=0)
        objectives = objectives_of(cli.trainer) if cli.model.conditioned else []
        data = cli.datamodule
        p, t = options.prompt_tokens, options.response_tokens
        if t is None:
            t = data.max_response_tokens if isinstance(data, SupervisedDataModule) else data.max_new_tokens
        cuda = options.card is not None
        if options.measure:
            with patch.object(policy_file, "load_base", random_weights) if options.random_weights else nullcontext():
                measured, watch = measure(cli)
            p, t = watch.prompt_tokens, watch.response_tokens
            cuda = cli.trainer.strategy.root_device.type == "cuda"
        plan = plan_memory(cli.model, data, objectives, p, t, cuda)
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        print(f"memory: error: {mistake}", file=sys.stderr)
        return 2
    finally:
        folder.cleanup()
    print(report(plan, p, t, options.card))
    if options.measure:
        print(f"Measured: {measured:.2f} GB; the plan is {plan.peak / GB / measured - 1:+.1%}")
    return 0 if options.card is None or fits(plan, options.card) else 1


if __name__ == "__main__":
    sys.exit(main())
