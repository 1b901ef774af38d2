from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from miepo.errors import ObjectiveError, UserError
from miepo.objectives.base import Objective


class RewardModel(Objective):
    """Any Hugging Face sequence classifier: the raw logit of one label.

    Args:
        model: Hub id or folder.
        name: Name of the objective (required: a reward model is not named by its class).
        input: ``pair`` gives the tokenizer (prompt, response), ``response`` the response alone.
        label: Index of the label whose logit is the score.
        higher_is_better: False for a cost model; the sign is turned once, here.
        max_length: Inputs are cut to this many tokens; None takes the limit of tokenizer and model.
        batch_size: Inputs per forward pass, taken in order of length.
        dtype: Type of the weights.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def __init__(
        self,
        model: str,
        name: str,
        input: Literal["pair", "response"] = "pair",
        label: int = 0,
        higher_is_better: bool = True,
        max_length: int | None = None,
        batch_size: int = 32,
        dtype: str = "auto",
        normalisation: dict[str, float] | None = None,
    ) -> None:
        super().__init__(name, normalisation)
        if input not in ("pair", "response"):
            raise UserError(f"{name}: input must be 'pair' or 'response', got {input!r}")
        if batch_size < 1:
            raise UserError(f"{name}: batch_size must be at least 1, got {batch_size}")
        self.source, self.input, self.label, self.higher_is_better = model, input, label, higher_is_better
        self.max_length, self.batch_size, self.dtype = max_length, batch_size, dtype

    def load(self, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.source)
            dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
            model = AutoModelForSequenceClassification.from_pretrained(self.source, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ObjectiveError(
                f"objective {self.name}: expected a sequence classifier, got '{self.source}': {reason}"
            ) from None
        if not 0 <= self.label < model.config.num_labels:
            raise ObjectiveError(
                f"objective {self.name}: expected a label below {model.config.num_labels}, the number of labels of "
                f"'{self.source}', got {self.label}"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if model.config.pad_token_id is None:  # GPT-2 like classifiers read the last token that is not padding
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.max_length is None:
            positions = getattr(model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
            self.max_length = min(self.tokenizer.model_max_length, positions)
        self.model = model.eval().requires_grad_(False).to(device)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        order = sorted(range(len(responses)), key=lambda i: len(prompts[i]) + len(responses[i]))
        scores = torch.empty(len(responses))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            # a tokenizer without a begin token makes nothing of an empty response, and the model needs something
            first, second = [prompts[i] for i in rows], [responses[i] or self.tokenizer.eos_token for i in rows]
            inputs = self.tokenizer(
                *([first, second] if self.input == "pair" else [second]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            scores[rows] = self.model(**inputs).logits[:, self.label].float().cpu()
        return scores

    def unload(self) -> None:
        self.__dict__.pop("model", None)
