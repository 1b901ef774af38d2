"""Plan, on paper, of a run on a cluster: ``python -m tools.cluster_plan --gpus 8 64 512``.

Rollout servers (vLLM) sample, training GPUs compute the reference and the policy. Nothing here is measured: every time
is floating-point operations or bytes over a rate of a data sheet, times an assumed efficiency. The efficiencies are
options; each default names its public source. A server's measured rate replaces its formula
(``--server_tokens_per_s``). Activations are those of ``tools.memory``, which runs miepo's own pass on tensors without
contents (``--activations_gb`` replaces it, and saves its minutes).

Not in the plan: reward models and whatever else scores, evaluations, checkpoints, the start of servers, responses that
end before the limit, and GPUs that fail.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf
from pathlib import Path

from miepo.errors import UserError
from miepo.policy.prefix_tree import tree_size

GB = 1e9
BF16, FP32 = 2, 4  # bytes
HOUR = 3600  # seconds
NODE = 8  # GPUs that NVLink connects
TENSOR_PARALLEL = (1, 2, 4, 8)  # within a node
PREFERENCE_TEXT = 16  # tokens of a prompt that state a preference, as tools.memory takes it

# -- what is given -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """Shape of a decoder with grouped-query attention and a gated MLP, as Llama's.

    Attributes:
        layers: Transformer layers.
        width: Of the states between layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        mlp: Inner width of the MLP.
        vocabulary: Tokens.
        tied: Whether the output embedding is the input embedding.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU, those of its data sheet.

    Attributes:
        flops: Dense bfloat16 floating-point operations a second.
        bandwidth: Bytes a second from its memory.
        memory: Bytes.
        nvlink: Bytes a second to another GPU of the node, one way.
        network: Bytes a second to another node.
    """

    flops: float
    bandwidth: float
    memory: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the rates: assumptions, which matter more than anything else here.

    Attributes:
        training_mfu: Of the operations a second, in the passes of the trainer. torchtitan reports 33 to 39 % for Llama
            3.1 8B on 8 and 128 H100 with FSDP2 in bfloat16 (pytorch/torchtitan, docs/performance.md).
        prefill_mfu: Of the operations a second, in a server. No public figure was found that isolates it.
        decode_bandwidth: Of the memory's bandwidth while decoding. With the two overheads it is fitted to six
            latencies of vLLM's own benchmark (:data:`PUBLISHED`).
        decode_overhead: Seconds that a decoding step takes beside its reading and computing, on one GPU.
        all_reduce: Seconds of latency of one all-reduce within a node; a step has two a layer under tensor parallelism.
        lora_slowdown: How much longer a server takes with LoRA than without. vLLM's pull request 11267 has 2,694 and
            1,788 output tokens/s for Llama 2 7B on an A100: 1.5.
        server_memory: Share of a GPU that a server takes: vLLM's default.
        trainer_memory: Share of a GPU that a trainer can use, as ``tools.memory`` takes it.
        adapter_rate: Bytes a second at which a server loads adapters from shared storage. A guess.
    """

    training_mfu: float = 0.35
    prefill_mfu: float = 0.5
    decode_bandwidth: float = 0.7
    decode_overhead: float = 0.002
    all_reduce: float = 20e-6
    lora_slowdown: float = 1.5
    server_memory: float = 0.9
    trainer_memory: float = 0.92
    adapter_rate: float = 2e9


@dataclass(frozen=True)
class Workload:
    """A step of MI-EPO.

    Attributes:
        prompts: ``B``, of a step.
        prompt_tokens: ``P``, of every prompt, preference text included.
        response_tokens: ``T``, of every response: all count at the limit.
        responses: ``n``, to each prompt.
        counterfactuals: ``C``, preferences w- for each prompt.
        objectives: ``K``.
        rank: LoRA rank of each rank block.
        gated: Whether the preference gates the adapter; otherwise it is text in the prompt.
        lora_layers: Adapted layers, the upper ones; by default all.
        anchors: Responses read under w-: all that are compared (2), or one of them (1).
        checkpointing: Whether the backward pass computes activations again.
        micro_batch: Tokens of a pass of the trainer, at least one prompt with all that belongs to it.
        max_sequences: That a server decodes at one time (vLLM's ``max_num_seqs``).
        preferences: Distinct preference vectors of a step; by default one a prompt.
        versions: Adapters that a server holds at one time: staleness + 1.
    """

    prompts: int = 64
    prompt_tokens: int = 256
    response_tokens: int = 128
    responses: int = 2
    counterfactuals: int = 1
    objectives: int = 2
    rank: int = 64
    gated: bool = True
    lora_layers: int | None = None
    anchors: int = 2
    checkpointing: bool = True
    micro_batch: int = 4096
    max_sequences: int = 256
    preferences: int | None = None
    versions: int = 2


# NVIDIA's data sheets. H100 SXM and H200 SXM: 989 TFLOP/s (half of the figure with sparsity), 3.35 and 4.8 TB/s, 80 and
# 141 GB, NVLink 900 GB/s both ways. A100 SXM 80 GB: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s. The network is 400 Gb/s
# a GPU, as on the machines of torchtitan's figures.
GPUS = {
    "H100": Gpu(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Gpu(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "A100": Gpu(312e12, 2.039e12, 80e9, 300e9, 25e9),
}
BASES = {
    "8B": Base(32, 4096, 32, 8, 14_336, 128_256),  # Llama 3.1 8B
    "70B": Base(80, 8192, 64, 8, 28_672, 128_256),  # Llama 3.1 70B
}
# of a config.json
KEYS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
}


def base_of(given: str) -> Base:
    """Return a base by name, or of a ``config.json`` or the folder that has one.

    Raises:
        UserError: It is neither.
    """
    if given in BASES:
        return BASES[given]
    path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    try:
        found = json.loads(path.read_text())
        shape = {name: found[key] for name, key in KEYS.items()}
    except OSError:
        raise UserError(f"expected {', '.join(BASES)} or a config.json as a base, got {given!r}") from None
    except (ValueError, KeyError, TypeError) as error:
        missing = f"none of {error}" if isinstance(error, KeyError) else "no JSON object"
        raise UserError(f"expected {', '.join(KEYS.values())} in '{path}', got {missing}") from None
    kv_heads, tied = found.get("num_key_value_heads") or shape["heads"], bool(found.get("tie_word_embeddings"))
    for name, value in {**shape, "kv_heads": kv_heads}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"expected {KEYS.get(name, 'num_key_value_heads')} of '{path}' from 1 on, got {value!r}")
    return Base(**shape, kv_heads=kv_heads, tied=tied)


# -- parameters and bytes ----------------------------------------------------------------------------------------------


def linear_shapes(base: Base) -> list[tuple[int, int]]:
    """Return inputs and outputs of the seven linear maps of a layer: q, k, v, o, gate, up, down."""
    kv = base.width * base.kv_heads // base.heads
    d, m = base.width, base.mlp
    return [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)]


def layer_parameters(base: Base) -> int:
    """Return weights that every token is multiplied by in a layer."""
    return sum(a * b for a, b in linear_shapes(base))


def head_parameters(base: Base) -> int:
    """Return weights of the output embedding."""
    return base.width * base.vocabulary


def parameters(base: Base) -> int:
    """Return all weights: layers with two norms each, embeddings and the last norm."""
    embeddings = head_parameters(base) * (1 if base.tied else 2)
    return base.layers * (layer_parameters(base) + 2 * base.width) + embeddings + base.width


def decoded_bytes(base: Base) -> int:
    """Return bytes of weights that a decoding step reads: of the input embedding it reads a row a token alone."""
    return BF16 * (base.layers * layer_parameters(base) + head_parameters(base))


def kv_bytes(base: Base) -> int:
    """Return bytes that keys and values of one token take in bfloat16."""
    return 2 * BF16 * base.layers * base.width * base.kv_heads // base.heads


def adapted_layers(base: Base, work: Workload) -> int:
    return min(base.layers, work.lora_layers or base.layers)


def total_rank(work: Workload) -> int:
    """Return the rank of all rank blocks: one shared and one for each objective where the adapter is gated."""
    return work.rank * (1 + work.objectives) if work.gated else work.rank


def adapter_parameters(base: Base, work: Workload, rank: int | None = None) -> int:
    """Return weights of A and B of every linear map of the adapted layers, of this rank or the workload's."""
    each = sum(a + b for a, b in linear_shapes(base)) * (total_rank(work) if rank is None else rank)
    return adapted_layers(base, work) * each


def adapter_file(base: Base, work: Workload) -> int:
    """Return bytes of an adapter as miepo saves it, in float32."""
    return FP32 * adapter_parameters(base, work)


def adapter_slots(base: Base, work: Workload) -> int:
    """Return bytes that a server reserves for its adapters, in bfloat16 and at a rank that vLLM has."""
    from miepo.rollout.vllm_engine import RANKS  # imports much

    fitting = [rank for rank in RANKS if rank >= total_rank(work)]
    if not fitting:
        raise UserError(f"expected rank blocks of {RANKS[-1]} in all, vLLM's highest, got {total_rank(work)}")
    return BF16 * work.versions * adapter_parameters(base, work, fitting[0])


# -- tokens and operations of the trainer ------------------------------------------------------------------------------


def compared(work: Workload) -> int:
    """Return responses to a prompt that are in pairs at most: with more than two each objective has a pair."""
    return min(work.responses, 2 if work.responses == 2 else 2 * work.objectives)


def prompt_places(work: Workload, counterfactuals: int) -> int:
    """Return places that a prompt and all that continues it take in a pass: :func:`tree_size` of miepo's policy.

    A prompt is computed once for its responses and, where the preference is text after it, for w+ and every w-.
    """
    text = 0 if work.gated else min(PREFERENCE_TEXT, work.prompt_tokens - 1)
    under = [[0] * (work.prompt_tokens - text) + [1 + c] * text for c in range(1 + counterfactuals)]
    read = compared(work)
    others = read if work.anchors == 2 else 1
    response = [0] * work.response_tokens
    answers = [[response] * read, *[[response] * others] * counterfactuals]
    return tree_size(under, answers, share=not work.gated)


def product_flops(base: Base, places: float, layers: int) -> float:
    """Return operations of the linear maps on ``places`` tokens in ``layers``: two for each weight and token."""
    return 2.0 * places * layers * layer_parameters(base)


def attention_flops(base: Base, places: float, layers: int, context: float) -> float:
    """Return operations of attention of ``places`` tokens that see ``context`` tokens: two of each width, twice."""
    return 4.0 * places * layers * base.width * context


def head_flops(base: Base, tokens: float) -> float:
    """Return operations of the logits of ``tokens``; those of a prompt are not computed."""
    return 2.0 * head_parameters(base) * tokens


def mean_context(work: Workload) -> float:
    """Return tokens that a place of a prompt with its compared responses sees on average."""
    p, r = work.prompt_tokens, compared(work) * work.response_tokens
    return (p * p / 2 + r * (p + work.response_tokens / 2)) / (p + r)


def trainer_flops(base: Base, work: Workload) -> dict[str, float]:
    """Return operations for one prompt: reference, and policy forward and backward.

    The reference reads the responses under w+, and under every w- where the preference is text. Frozen weights need
    the gradient of their inputs and none of their own, so that their backward pass is as much as the forward pass;
    attention and the adapter have two operands to go back to, and take twice as much. Nothing goes back below the
    adapted layers. A gate on the upper layers alone leaves those below the same for the reference and every preference:
    they are computed once (``miepo/policy/trunk.py``).
    """
    upper, context = adapted_layers(base, work), mean_context(work)
    lower = base.layers - upper
    under = 0 if work.gated else work.counterfactuals
    read, trained = prompt_places(work, under), prompt_places(work, work.counterfactuals)
    others = compared(work) if work.anchors == 2 else 1
    read_tokens = work.response_tokens * (compared(work) + under * others)
    trained_tokens = work.response_tokens * (compared(work) + work.counterfactuals * others)

    def forward(places: float, layers: int) -> float:
        return product_flops(base, places, layers) + attention_flops(base, places, layers, context)

    shared = work.gated and lower > 0  # the trunk of the reference serves the policy, too
    adapter = 2.0 * adapter_parameters(base, work) * trained
    above = forward(trained, upper) + adapter
    back = product_flops(base, trained, upper) + 2 * attention_flops(base, trained, upper, context) + 2 * adapter
    head = head_flops(base, trained_tokens)
    return {
        "reference": forward(read, base.layers) + head_flops(base, read_tokens),
        "policy forward": (0.0 if shared else forward(trained, lower)) + above + head,
        "policy backward": back + head + (above if work.checkpointing else 0.0),
    }


def trainer_seconds(
    base: Base, work: Workload, gpu: Gpu, efficiency: Efficiency, trainers: int, sharded: bool
) -> dict[str, float]:
    """Return seconds of a step's parts on the trainer that has most prompts.

    A sharded base is gathered for every pass, and again for the backward pass, while the layer before computes: a pass
    takes the longer of both. The exchange is the gradient's ring all-reduce.
    """
    prompts = ceil(work.prompts / trainers)
    rate = gpu.flops * efficiency.training_mfu
    link = gpu.nvlink if trainers <= NODE else gpu.network
    remote = (trainers - 1) / trainers
    passes = ceil(prompts * prompt_places(work, work.counterfactuals) / work.micro_batch)
    gather = passes * BF16 * parameters(base) * remote / link if sharded else 0.0
    seconds = {part: max(prompts * flops / rate, gather) for part, flops in trainer_flops(base, work).items()}
    seconds["exchange"] = 2 * FP32 * adapter_parameters(base, work) * remote / link
    return seconds


# -- servers -----------------------------------------------------------------------------------------------------------


def concurrent_sequences(base: Base, work: Workload, gpu: Gpu, efficiency: Efficiency, tensor_parallel: int) -> int:
    """Return sequences whose keys and values fit a server beside weights and adapters; 0 where these do not fit."""
    room = tensor_parallel * gpu.memory * efficiency.server_memory - BF16 * parameters(base) - adapter_slots(base, work)
    each = kv_bytes(base) * (work.prompt_tokens + work.response_tokens)
    return max(0, min(work.max_sequences, int(room // each)))


def decode_step_seconds(
    base: Base, gpu: Gpu, efficiency: Efficiency, tensor_parallel: int, sequences: int, context: float
) -> float:
    """Return seconds in which a server without LoRA draws one token for each of ``sequences`` of ``context`` tokens.

    The larger of reading the weights and multiplying by them, then reading keys and values, then what is spent beside:
    by the host, and by the latency of two all-reduces a layer.
    """
    bandwidth = tensor_parallel * gpu.bandwidth * efficiency.decode_bandwidth
    rate = tensor_parallel * gpu.flops * efficiency.prefill_mfu
    weights = decoded_bytes(base)
    products = max(weights / bandwidth, sequences * 2 * (weights / BF16) / rate)
    waiting = 2 * base.layers * efficiency.all_reduce if tensor_parallel > 1 else 0.0
    return products + sequences * context * kv_bytes(base) / bandwidth + efficiency.decode_overhead + waiting


def prefill_seconds(base: Base, gpu: Gpu, efficiency: Efficiency, tensor_parallel: int, tokens: float) -> float:
    """Return seconds in which a server without LoRA reads ``tokens`` of prompts."""
    return 2 * base.layers * layer_parameters(base) * tokens / (tensor_parallel * gpu.flops * efficiency.prefill_mfu)


def sampling_seconds(
    base: Base,
    work: Workload,
    gpu: Gpu,
    efficiency: Efficiency,
    servers: int,
    tensor_parallel: int,
    tokens_per_s: float | None = None,
) -> float:
    """Return seconds until the server with most prompts has all their responses.

    Sequences that do not fit at one time go in waves, all of one length. A prompt is read once for its responses.
    ``tokens_per_s``, measured response tokens a second of one server with LoRA, replaces the formula.
    """
    prompts = ceil(work.prompts / servers)
    sequences = prompts * work.responses
    if tokens_per_s is not None:
        return sequences * work.response_tokens / tokens_per_s
    limit = concurrent_sequences(base, work, gpu, efficiency, tensor_parallel)
    if limit == 0:
        return inf
    context = work.prompt_tokens + work.response_tokens / 2
    waves, rest = divmod(sequences, limit)
    steps = sum(
        count * decode_step_seconds(base, gpu, efficiency, tensor_parallel, size, context)
        for count, size in ((waves, limit), (int(rest > 0), rest))
    )
    read = prefill_seconds(base, gpu, efficiency, tensor_parallel, prompts * work.prompt_tokens)
    return efficiency.lora_slowdown * (work.response_tokens * steps + read)


# -- memory ------------------------------------------------------------------------------------------------------------


def server_memory(
    base: Base, work: Workload, gpu: Gpu, efficiency: Efficiency, tensor_parallel: int, sequences: int
) -> dict[str, float]:
    """Return bytes on each GPU of a server: weights, adapters, and keys and values of what it decodes at one time."""
    held = min(sequences, concurrent_sequences(base, work, gpu, efficiency, tensor_parallel))
    kv = held * kv_bytes(base) * (work.prompt_tokens + work.response_tokens)
    found = {"weights": BF16 * parameters(base), "adapters": adapter_slots(base, work), "KV cache": kv}
    return {name: size / tensor_parallel for name, size in found.items()}


def trainer_memory(base: Base, work: Workload, activations: float, trainers: int, sharded: bool) -> dict[str, float]:
    """Return bytes on a training GPU; a sharded base has two layers gathered, the one that computes and the next."""
    trained = FP32 * adapter_parameters(base, work)
    weights: float = BF16 * parameters(base)
    if sharded:
        weights = weights / trainers + 2 * BF16 * layer_parameters(base)
    return {"weights": weights, "adapter, gradient, Adam": 4 * trained, "activations": activations}


def planned_activations(base: Base, work: Workload) -> float:
    """Return bytes that ``tools.memory`` counts for a training step or the reference, whichever takes more."""
    from miepo import MIEPO, OnlinePreferenceDataModule
    from miepo.exploration import InfoNCE
    from miepo.objectives import PythonObjective
    from miepo.policy import GatedConditioning, Policy, PromptConditioning
    from tools.memory import plan_memory

    config = {
        "model_type": "llama",
        "num_key_value_heads": base.kv_heads,
        "tie_word_embeddings": base.tied,
        **{key: getattr(base, name) for name, key in KEYS.items()},
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        policy = Policy(
            folder,
            [GatedConditioning() if work.gated else PromptConditioning()],
            lora_rank=work.rank,
            lora_layers=None if adapted_layers(base, work) == base.layers else work.lora_layers,
            dtype="bfloat16",
            gradient_checkpointing=work.checkpointing,
            max_tokens_per_micro_batch=work.micro_batch,
        )
        beta_w = 0.01 if work.counterfactuals else 0.0
        exploration = InfoNCE(beta_w, max(1, work.counterfactuals), anchors=work.anchors)
        prompts = ceil(work.micro_batch / prompt_places(work, work.counterfactuals)) + 1  # more than one pass
        data = OnlinePreferenceDataModule(
            ["x"],
            batch_size=prompts,
            max_new_tokens=work.response_tokens,
            responses=work.responses,
            evaluation_batch_size=1,
        )
        objectives = [PythonObjective("builtins.len", name=f"objective_{k}") for k in range(work.objectives)]
        plan = plan_memory(
            MIEPO(policy, exploration=exploration),
            data,
            objectives,
            work.prompt_tokens,
            work.response_tokens,
            cuda=True,
        )
    return max(plan.phases["training step"], plan.phases["reference"])


# -- the split ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """GPUs as servers and trainers, and what a step takes.

    Attributes:
        servers: Of ``tensor_parallel`` GPUs each.
        tensor_parallel: GPUs of a server.
        trainers: Training GPUs.
        sharded: Whether the base is sharded over them (FSDP2), or whole on each (DDP).
        sampling: Seconds until all responses are there.
        load: Seconds in which a server loads the step's adapter.
        training: Seconds of the trainer's parts.
    """

    servers: int
    tensor_parallel: int
    trainers: int
    sharded: bool
    sampling: float
    load: float
    training: dict[str, float]

    @property
    def one_after_the_other(self) -> float:
        """Seconds of a step with staleness 0."""
        return self.sampling + self.load + sum(self.training.values())

    @property
    def overlapped(self) -> float:
        """Seconds of a step with staleness 1 or more: the servers sample the next batch in the meantime."""
        return max(self.sampling + self.load, sum(self.training.values()))

    def seconds(self, stale: bool) -> float:
        return self.overlapped if stale else self.one_after_the_other

    def waiting(self, stale: bool) -> tuple[float, float]:
        """Return the share of a step that servers, and trainers, are without work."""
        step = self.seconds(stale)
        return 1 - (self.sampling + self.load) / step, 1 - sum(self.training.values()) / step


def prompts_per_hour(prompts: int, seconds: float) -> float:
    return prompts * HOUR / seconds


def adapter_traffic(base: Base, work: Workload, servers: int) -> tuple[float, float]:
    """Return bytes that all servers load in a step: one gated adapter each, or a file for each distinct preference.

    The prompts of a preference are taken to go to one server, so that its file is loaded once.
    """
    size = adapter_file(base, work)
    return float(servers * size), float((work.preferences or work.prompts) * size)


def split_of(
    base: Base,
    work: Workload,
    gpu: Gpu,
    efficiency: Efficiency,
    activations: float,
    servers: int,
    tensor_parallel: int,
    trainers: int,
    tokens_per_s: float | None = None,
) -> Split | None:
    """Return what a step takes on this split, or none where one of its sides does not fit its memory."""
    room = gpu.memory * efficiency.trainer_memory
    sharded = sum(trainer_memory(base, work, activations, trainers, False).values()) > room
    if sharded and sum(trainer_memory(base, work, activations, trainers, True).values()) > room:
        return None
    if concurrent_sequences(base, work, gpu, efficiency, tensor_parallel) == 0:
        return None
    return Split(
        servers,
        tensor_parallel,
        trainers,
        sharded,
        sampling_seconds(base, work, gpu, efficiency, servers, tensor_parallel, tokens_per_s),
        adapter_file(base, work) / efficiency.adapter_rate,
        trainer_seconds(base, work, gpu, efficiency, trainers, sharded),
    )


def splits(gpus: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield servers, GPUs of a server, and trainers: every way to divide the GPUs with one of each side at least."""
    for size in sizes:
        for servers in range(1, (gpus - 1) // size + 1):
            yield servers, size, gpus - servers * size


def best_split(
    base: Base,
    work: Workload,
    gpu: Gpu,
    efficiency: Efficiency,
    activations: float,
    gpus: int,
    stale: bool,
    sizes: Sequence[int] = TENSOR_PARALLEL,
    tokens_per_s: float | None = None,
) -> Split | None:
    """Return the split with the shortest step; of equal ones the first, whose servers are smallest and fewest."""
    found = (split_of(base, work, gpu, efficiency, activations, *s, tokens_per_s) for s in splits(gpus, sizes))
    return min((s for s in found if s is not None), key=lambda s: s.seconds(stale), default=None)


def why_not(
    base: Base, work: Workload, gpu: Gpu, efficiency: Efficiency, activations: float, gpus: int, sizes: Sequence[int]
) -> str:
    """Say which side does not fit, with as many trainers as leave room for one server."""
    fitting = [t for t in sizes if t < gpus and concurrent_sequences(base, work, gpu, efficiency, t)]
    if not fitting:
        return "does not fit: no server holds the base and a sequence"
    trainers = gpus - min(fitting)
    held = sum(trainer_memory(base, work, activations, trainers, True).values()) / GB
    room = gpu.memory * efficiency.trainer_memory / GB
    return f"does not fit: each of {trainers} trainers would hold {held:.0f} GB, of {room:.0f}"


# -- public figures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A figure of others, and whether the defaults were fitted to it.

    Attributes:
        source: Where it stands.
        base: Of :data:`BASES`.
        gpu: Of :data:`GPUS`.
        tensor_parallel: GPUs of the server.
        sequences: Decoded at one time.
        prompt_tokens: Mean, of a request.
        response_tokens: Mean, of a request.
        tokens_per_s: Response tokens a second, without LoRA.
        fitted: Whether ``decode_bandwidth`` and the overheads were chosen by it.
    """

    source: str
    base: str
    gpu: str
    tensor_parallel: int
    sequences: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_s: float
    fitted: bool


CI = "buildkite.com/vllm/performance-benchmark, build"
# latency of 8 sequences of 32 and 128 tokens; throughput of 200 ShareGPT requests, whose mean lengths vllm#12315 gives
PUBLISHED = (
    Published(f"{CI} 9555", "8B", "H100", 1, 8, 32, 128, 8 * 128 / 0.997542, True),
    Published(f"{CI} 9555", "70B", "H100", 4, 8, 32, 128, 8 * 128 / 2.44447, True),
    Published(f"{CI} 9515", "8B", "H200", 1, 8, 32, 128, 8 * 128 / 0.833421, True),
    Published(f"{CI} 9515", "70B", "H200", 4, 8, 32, 128, 8 * 128 / 2.07753, True),
    Published(f"{CI} 9523", "8B", "A100", 1, 8, 32, 128, 8 * 128 / 1.57927, True),
    Published(f"{CI} 9523", "70B", "A100", 4, 8, 32, 128, 8 * 128 / 3.99059, True),
    Published(f"{CI} 9555", "8B", "H100", 1, 200, 213, 218, 19.5005 * 218, False),
    Published(f"{CI} 9555", "70B", "H100", 4, 200, 213, 218, 8.86239 * 218, False),
    Published("vllm#18566, GPU not named", "8B", "H100", 1, 256, 230, 203, 6582.87, False),
)


def published_rate(figure: Published, efficiency: Efficiency) -> float:
    """Return response tokens a second by the formulae, for a batch whose requests all have the mean lengths."""
    base, gpu, tp, n = BASES[figure.base], GPUS[figure.gpu], figure.tensor_parallel, figure.sequences
    context = figure.prompt_tokens + figure.response_tokens / 2
    seconds = figure.response_tokens * decode_step_seconds(base, gpu, efficiency, tp, n, context)
    seconds += prefill_seconds(base, gpu, efficiency, tp, n * figure.prompt_tokens)
    return n * figure.response_tokens / seconds


# -- the command -------------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Write a number with two or three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head_of(cells: Sequence[str]) -> list[str]:
    return [row_of(cells), f"|{'---|' * len(cells)}"]


def share(values: tuple[float, float]) -> str:
    return " / ".join(f"{max(0.0, value):.0%}" for value in values)


STEP = (
    "base", "GPUs", "staleness", "prompts a step", "servers x GPUs", "trainers", "sampling, s", "adapter, s",
    "reference, s", "policy forward, s", "backward, s", "exchange, s", "step, s", "prompts an hour",
    "servers / trainers wait",
)  # fmt: skip
MEMORY = (
    "base", "GPUs", "server: weights, GB", "adapters", "KV cache", "trainer: weights", "adapter, gradient, Adam",
    "activations", "adapters a step, one a version, GB", "one a preference, GB",
)  # fmt: skip


def report(
    names: Sequence[str],
    counts: Sequence[int],
    works: Callable[[int], Workload],
    gpu: Gpu,
    efficiency: Efficiency,
    activations: dict[str, float],
    sizes: Sequence[int] = TENSOR_PARALLEL,
    tokens_per_s: float | None = None,
) -> list[str]:
    """Return the two tables: what a step takes on the best split, and what lies in memory."""
    steps, memory = head_of(STEP), head_of(MEMORY)
    for name in names:
        base = base_of(name)
        for gpus in counts:
            work = works(gpus)
            given = (base, work, gpu, efficiency, activations[name])
            for stale in (False, True):
                split = best_split(*given, gpus, stale, sizes, tokens_per_s)
                if split is None:
                    why = why_not(*given, gpus, sizes)
                    cells = [name, str(gpus), "1 or more" if stale else "0", str(work.prompts), why]
                    steps.append(row_of([*cells, *[""] * (len(STEP) - len(cells))]))
                    continue
                seconds = split.seconds(stale)
                steps.append(
                    row_of(
                        [
                            name, str(gpus), "1 or more" if stale else "0", str(work.prompts),
                            f"{split.servers} x {split.tensor_parallel}",
                            f"{split.trainers} {'FSDP2' if split.sharded else 'DDP'}",
                            *(digits(x) for x in (split.sampling, split.load, *split.training.values(), seconds)),
                            f"{prompts_per_hour(work.prompts, seconds):,.0f}", share(split.waiting(stale)),
                        ]
                    )
                )  # fmt: skip
            if split is not None:
                sequences = ceil(work.prompts / split.servers) * work.responses
                sides = [
                    *server_memory(base, work, gpu, efficiency, split.tensor_parallel, sequences).values(),
                    *trainer_memory(base, work, activations[name], split.trainers, split.sharded).values(),
                    *adapter_traffic(base, work, split.servers),
                ]
                memory.append(row_of([name, str(gpus), *(digits(size / GB) for size in sides)]))
    return [*steps, "", "Of the split for a staleness of 1 or more, GB = 10^9 bytes on each GPU:", "", *memory]


CHANGED = {
    "training_mfu": 0.5,
    "prefill_mfu": 0.5,
    "decode_bandwidth": 0.5,
    "decode_overhead": 2.0,
    "all_reduce": 2.0,
    "lora_slowdown": 2.0,
    "adapter_rate": 0.5,
}


def sensitivity(
    names: Sequence[str],
    gpus: int,
    works: Callable[[int], Workload],
    gpu: Gpu,
    efficiency: Efficiency,
    activations: dict[str, float],
    sizes: Sequence[int] = TENSOR_PARALLEL,
) -> list[str]:
    """Return a table: how much longer a step takes where an assumption is twice as bad, on the best split then."""
    lines = head_of(["twice as bad", *(f"{name}, {gpus} GPUs" for name in names)])
    for option, factor in {**CHANGED, "network": 0.5}.items():
        worse, slower = efficiency, gpu
        if option == "network":
            slower = replace(gpu, network=gpu.network * factor)
        else:
            worse = replace(efficiency, **{option: getattr(efficiency, option) * factor})
        cells = []
        for name in names:
            before, after = (
                best_split(base_of(name), works(gpus), g, e, activations[name], gpus, True, sizes)
                for g, e in ((gpu, efficiency), (slower, worse))
            )
            cells.append("-" if before is None or after is None else f"{after.overlapped / before.overlapped - 1:+.0%}")
        lines.append(row_of([f"`{option}`", *cells]))
    return lines


def published(efficiency: Efficiency) -> list[str]:
    """Return a table of the figures of others beside the formulae."""
    cells = ["source", "server", "sequences", "tokens in + out", "tokens/s", "on paper", "ratio", "fitted to it"]
    lines = head_of(cells)
    for figure in PUBLISHED:
        rate = published_rate(figure, efficiency)
        lines.append(
            row_of(
                [
                    figure.source, f"{figure.base} on {figure.tensor_parallel} {figure.gpu}", str(figure.sequences),
                    f"{figure.prompt_tokens} + {figure.response_tokens}", digits(figure.tokens_per_s), digits(rate),
                    f"{rate / figure.tokens_per_s:.2f}", "yes" if figure.fitted else "no",
                ]
            )
        )  # fmt: skip
    return lines


def parser_of() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tools.cluster_plan",
        description="Plan, on paper, of a run on a cluster: rollout servers and training GPUs. Nothing is measured.",
    )
    parser.add_argument("--base", nargs="+", default=list(BASES), help=f"{', '.join(BASES)}, or a config.json's path")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}; the next options change its data sheet")
    parser.add_argument("--tflops", type=float, help="dense bfloat16, 10^12 operations a second")
    parser.add_argument("--bandwidth_tb_per_s", type=float, help="of its memory")
    parser.add_argument("--memory_gb", type=float)
    parser.add_argument("--network_gb_per_s", type=float, help="of a GPU to another node, one way")
    parser.add_argument("--tensor_parallel", type=int, help="GPUs of a server; by default what is best")
    parser.add_argument("--server_tokens_per_s", type=float, help="measured of one server with LoRA, for the formula")
    parser.add_argument("--activations_gb", nargs="+", type=float, help="of each base, for the plan of tools.memory")
    parser.add_argument("--prompts", type=int, help="of a step; by default --prompts_per_gpu for each GPU")
    parser.add_argument("--prompts_per_gpu", type=int, default=8, help="64 on 8 GPUs, as the paper's batch")
    parser.add_argument("--prompt_conditioning", action="store_true", help="the preference is text, and gates nothing")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep activations for the backward pass")
    usual = Workload()
    for option in (
        "--prompt_tokens", "--response_tokens", "--responses", "--counterfactuals", "--objectives", "--rank",
        "--lora_layers", "--anchors", "--micro_batch", "--max_sequences", "--preferences", "--versions",
    ):  # fmt: skip
        parser.add_argument(option, type=int, default=getattr(usual, option[2:]))
    for each in fields(Efficiency):
        parser.add_argument(f"--{each.name}", type=float, default=each.default)
    return parser


def check(options: dict[str, object]) -> None:
    """Refuse what no cluster, GPU or step has.

    Raises:
        UserError: A number is out of its range.
    """
    least = {"counterfactuals": 0, "prompt_tokens": 2, "responses": 2, "gpus": 2}
    shares = ("training_mfu", "prefill_mfu", "decode_bandwidth", "server_memory", "trainer_memory")
    for name, given in options.items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            lowest = least.get(name, 1 if isinstance(value, int) else 0)
            if isinstance(value, int) and value < lowest:
                raise UserError(f"expected --{name} from {lowest} on, got {value}")
            zero = name in ("decode_overhead", "all_reduce")
            if isinstance(value, float) and not (0 <= value < inf if zero else 0 < value < inf):
                raise UserError(f"expected --{name} to be {'at least 0' if zero else 'positive'}, got {value:g}")
            if name in shares and value > 1:
                raise UserError(f"expected --{name} to be a share, above 0 and at most 1, got {value:g}")
    if options["anchors"] not in (1, 2):
        raise UserError(f"expected --anchors 1 or 2, got {options['anchors']}")
    if options["gpu"] not in GPUS:
        raise UserError(f"expected --gpu {', '.join(GPUS)}, got {options['gpu']!r}")
    activations, bases = options["activations_gb"], options["base"]
    if isinstance(activations, list) and isinstance(bases, list) and len(activations) != len(bases):
        raise UserError(f"expected --activations_gb for each of {len(bases)} bases, got {len(activations)}")


def main(arguments: list[str] | None = None) -> int:
    options = parser_of().parse_args(arguments)
    given = vars(options)
    try:
        check(given)
        bases = {name: base_of(name) for name in options.base}
        gpu = GPUS[options.gpu]
        sheet = {"flops": options.tflops, "bandwidth": options.bandwidth_tb_per_s}
        changed = {name: value * 1e12 for name, value in sheet.items() if value is not None}
        if options.memory_gb is not None:
            changed["memory"] = options.memory_gb * GB
        if options.network_gb_per_s is not None:
            changed["network"] = options.network_gb_per_s * GB
        gpu = replace(gpu, **changed)
        efficiency = Efficiency(**{each.name: given[each.name] for each in fields(Efficiency)})
        common = {each.name: given[each.name] for each in fields(Workload) if each.name in given}
        common |= {"gated": not options.prompt_conditioning, "checkpointing": not options.no_checkpointing}

        def works(gpus: int) -> Workload:
            return Workload(**common | {"prompts": options.prompts or options.prompts_per_gpu * gpus})

        for name, base in bases.items():
            if options.lora_layers is not None and options.lora_layers > base.layers:
                raise UserError(f"expected --lora_layers up to {base.layers} of {name}, got {options.lora_layers}")
            adapter_slots(base, works(1))
        if options.activations_gb is None:
            activations = {name: planned_activations(base, works(1)) for name, base in bases.items()}
        else:
            activations = {n: size * GB for n, size in zip(bases, options.activations_gb, strict=True)}
    except UserError as error:
        print(f"cluster_plan: error: {error}", file=sys.stderr)
        return 2
    sizes = TENSOR_PARALLEL if options.tensor_parallel is None else (options.tensor_parallel,)
    table = report(options.base, options.gpus, works, gpu, efficiency, activations, sizes, options.server_tokens_per_s)
    assumed = ", ".join(f"{name} {value:g}" for name, value in asdict(efficiency).items())
    print(f"On paper, not measured: {options.gpu}, {assumed}.\n")
    print("\n".join(table))
    if options.server_tokens_per_s is None:
        print("\nHow much longer a step takes, staleness 1 or more, where one assumption is twice as bad:\n")
        middle = sorted(options.gpus)[len(options.gpus) // 2]
        print("\n".join(sensitivity(options.base, middle, works, gpu, efficiency, activations, sizes)))
        print("\nThe servers' formulae, without LoRA, beside figures of others (they are not of our steps):\n")
        print("\n".join(published(efficiency)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
