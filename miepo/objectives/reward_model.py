"""Reward models: networks that score a response, loaded without executing code that comes with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from miepo.data.datasets.safe_rlhf import TEMPLATE as SAFE_RLHF_TEMPLATE
from miepo.errors import ObjectiveError, UserError, load_reason
from miepo.objectives.base import Objective

# what rounding makes of a score, relative to 1 or to itself
PADDING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def positions(network: nn.Module) -> int:
    """Return how many tokens a network reads at most; without a limit, very many."""
    config: Any = network.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or VERY_LARGE_INTEGER
    for name, module in network.named_modules():
        # RoBERTa's kind counts positions from the one after that of padding
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return int(limit)


class ModelObjective(Objective):
    """An objective that a network computes, in batches of like length.

    Args:
        model: Hub id or folder.
        name: Name of the objective (required: a reward model is not named by its class).
        higher_is_better: False for a cost model; the sign is turned once, here.
        max_length: Inputs are cut to this many tokens; None takes the limit of tokenizer and model.
        batch_size: Inputs per forward pass.
        dtype: Type of the weights: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Where the model stands, such as ``cuda:1`` or ``cpu``; by default where the policy is.
        offload: Keep the weights in the CPU's memory and bring them to the device to score.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    kind: str  # what a message calls the network

    def __init__(
        self,
        model: str,
        name: str,
        higher_is_better: bool = True,
        max_length: int | None = None,
        batch_size: int = 32,
        dtype: str = "auto",
        device: str | None = None,
        offload: bool = False,
        normalisation: dict[str, float] | None = None,
    ) -> None:
        super().__init__(name, normalisation)
        if batch_size < 1:
            raise UserError(f"{name}: batch_size must be at least 1, got {batch_size}")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"{name}: dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        try:
            self.place = None if device is None else torch.device(device)
        except RuntimeError:
            raise UserError(f"{name}: device must be like cpu, cuda or cuda:1, got {device!r}") from None
        self.source, self.higher_is_better = model, higher_is_better
        self.max_length, self.batch_size, self.dtype, self.offload = max_length, batch_size, dtype, offload

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    @abstractmethod
    def load_network(self, dtype: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Return the network and what loading it reported, from ``self.source``."""

    @abstractmethod
    def shape(self, config: Any) -> nn.Module:
        """Return the network of a configuration, without its weights: what it takes of memory shows in it."""

    @abstractmethod
    def tokens(self, prompt: str, response: str) -> dict[str, list[int]]:
        """Return what the tokenizer makes of a prompt and a response."""

    @abstractmethod
    def read(self, inputs: Any) -> Tensor:
        """Return scores ``(n,)`` of inputs ``(n, L)``, padded on the right."""

    # -- the life of the network ---------------------------------------------------------------------------------------

    def load(self, device: torch.device) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
            network, report = self.load_network(self.dtype if self.dtype == "auto" else getattr(torch, self.dtype))
        except UserError:
            raise
        except Exception as error:  # the library raises many kinds, all of them about this source
            reason = load_reason(error)
            raise ObjectiveError(
                f"objective {self.name}: expected {self.kind}, got '{self.source}': {reason}"
            ) from None
        if report["missing_keys"]:  # Transformers would draw them at random
            keys = sorted(report["missing_keys"])
            raise ObjectiveError(
                f"objective {self.name}: expected {self.kind}, got '{self.source}', which lacks {len(keys)} of its "
                f"weights, first {keys[0]}"
            )
        self.tokenizer.padding_side = "right"
        config: Any = network.config
        self._give_padding(getattr(config.get_text_config(), "vocab_size", inf))  # CANINE reads characters
        config.pad_token_id = self.tokenizer.pad_token_id  # classifiers may read the last token that is not padding
        config.use_cache = False  # nothing is generated
        if self.max_length is None:
            self.max_length = min(self.tokenizer.model_max_length, positions(network))
        self.device = self.place or device
        self.model: Any = network.eval().requires_grad_(False).to("cpu" if self.offload else self.device)

    def _give_padding(self, embeddings: float) -> None:
        """Make the end token the padding where the tokenizer has none, or one that the network has no embedding of."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        known = [i for i in found if i is not None and i < embeddings]
        if not known:
            raise ObjectiveError(
                f"objective {self.name}: expected a tokenizer with a padding or end token among the {embeddings} "
                f"tokens that '{self.source}' has an embedding of, got {found[0]} and {found[1]}"
            )
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(known[0])

    def check(self) -> None:
        """Expect a response to score alike alone and beside a longer one."""
        prompts, responses = ["Hello", "What is a garden?"], ["Hi!", "A garden is a place where people grow plants."]
        alone = torch.cat([self.reward(prompts[i : i + 1], responses[i : i + 1]) for i in range(2)])
        gap = (self.reward(prompts, responses) - alone).abs().max() / alone.abs().max().clamp(min=1)
        # "not (<=)", so that what is no number differs
        if not gap <= PADDING_TOLERANCE.get(next(self.model.parameters()).dtype, 0.05):
            raise ObjectiveError(
                f"objective {self.name}: '{self.source}' scores a response otherwise beside a longer one than alone, "
                f"by {float(gap):.2g}: expected a network that does not read its padding"
            )

    def unload(self) -> None:
        self.__dict__.pop("model", None)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self.model.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                self.model.to("cpu")

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        rows = [self.tokens(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores = torch.empty(len(rows))
        with self._at_work():
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                inputs = self.tokenizer.pad([rows[i] for i in part], return_tensors="pt").to(self.device)
                scores[part] = self.read(inputs).float().cpu()
        return scores


class RewardModel(ModelObjective):
    """Any Hugging Face sequence classifier: the raw logit of one label.

    Args:
        input: ``pair`` gives the tokenizer (prompt, response), ``response`` the response alone.
        label: Index of the label whose logit is the score; needed where there are several.
        **kwargs: As for :class:`ModelObjective`.
    """

    kind = "a sequence classifier"
    identity = ("source", "input", "label")

    def __init__(
        self,
        model: str,
        name: str,
        input: Literal["pair", "response"] = "pair",
        label: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, name, **kwargs)
        if input not in ("pair", "response"):
            raise UserError(f"{name}: input must be 'pair' or 'response', got {input!r}")
        self.input, self.label = input, label

    def load_network(self, dtype: Any) -> tuple[nn.Module, dict[str, Any]]:
        network, report = AutoModelForSequenceClassification.from_pretrained(
            self.source, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        labels = network.config.num_labels
        if self.label is None and labels > 1:
            named = ", ".join(f"{i} ({name})" for i, name in network.config.id2label.items())
            raise ObjectiveError(f"objective {self.name}: '{self.source}' has the labels {named}: set label to one")
        if not 0 <= (self.label or 0) < labels:
            raise ObjectiveError(
                f"objective {self.name}: expected a label below {labels}, the number of labels of "
                f"'{self.source}', got {self.label}"
            )
        return network, report

    def shape(self, config: Any) -> nn.Module:
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)

    def tokens(self, prompt: str, response: str) -> dict[str, list[int]]:
        # a tokenizer without a begin token makes nothing of an empty response, and the model needs something
        second = response or self.tokenizer.eos_token or ""
        texts = (prompt, second) if self.input == "pair" else (second,)
        return self.tokenizer(*texts, truncation=True, max_length=self.max_length)

    def read(self, inputs: Any) -> Tensor:
        return self.model(**inputs).logits[:, self.label or 0]


class _ScoreNetwork(LlamaPreTrainedModel):
    """The architecture of PKU-Alignment's reward and cost models: a LLaMA body and a linear score head."""

    config_class = LlamaConfig
    # of its training; scores are normalised by the objective
    _keys_to_ignore_on_load_unexpected = [r"normalizer\."]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score_head = nn.Linear(
            config.hidden_size, getattr(config, "score_dim", 1), bias=bool(getattr(config, "bias", False))
        )
        self.post_init()


class ScoreModel(ModelObjective):
    """A reward or cost model of PKU-Alignment: a LLaMA with a score head, read at the end token (``end_scores``).

    Args:
        template: What the model reads, with ``{prompt}`` and ``{response}``; an end token follows.
        **kwargs: As for :class:`ModelObjective`; ``higher_is_better`` is False for ``beaver-7b-v1.0-cost``, whose
            score is higher for more harm.
    """

    kind = "a LLaMA with a score head"
    identity = ("source", "template")

    def __init__(
        self,
        model: str,
        name: str,
        template: str = SAFE_RLHF_TEMPLATE.replace("{preference}", ""),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, name, **kwargs)
        if template.count("{prompt}") != 1 or template.count("{response}") != 1:
            raise UserError(f"{name}: template must have {{prompt}} and {{response}} once, got {template!r}")
        self.template = template

    def load_network(self, dtype: Any) -> tuple[nn.Module, dict[str, Any]]:
        config = AutoConfig.from_pretrained(self.source, trust_remote_code=False)
        if not isinstance(config, LlamaConfig):
            raise ValueError(f"its configuration is of the type {config.model_type}")
        network: Any
        report: Any
        network, report = _ScoreNetwork.from_pretrained(  # type: ignore[misc]
            self.source, config=config, dtype=dtype, output_loading_info=True
        )
        if network.score_head.out_features != 1:
            raise ValueError(f"it has {network.score_head.out_features} scores and not one")
        return network, report

    def shape(self, config: Any) -> nn.Module:
        return _ScoreNetwork(config)

    def tokens(self, prompt: str, response: str) -> dict[str, list[int]]:
        head, tail = self.template.split("{response}")
        text = head.replace("{prompt}", prompt) + response + tail
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length - 1)["input_ids"]  # type: ignore[operator]
        ids = [*ids, self.tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def read(self, inputs: Any) -> Tensor:
        mask = inputs["attention_mask"]
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state  # (n, L, D)
        end = hidden[torch.arange(len(mask), device=mask.device), mask.sum(-1) - 1]  # (n, D)
        head = self.model.score_head  # in float32: bfloat16 would make ties of scores a tenth apart
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(end.float(), head.weight.float(), bias).squeeze(-1)
