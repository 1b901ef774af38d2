"""A tiny random Llama with a real tokenizer, and objectives without models: for unit tests, in memory, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from miepo.objectives import Objective
from miepo.policy import Conditioning, Policy

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the garden is a good place to grow food and people like it when rain comes in spring Human Assistant user"


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [WORDS] * 4,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT if chat else None,
    )


def save_tiny_model(folder: Path, seed: int = 0, chat: bool = True, context: int = 256) -> Path:
    tokenizer = tiny_tokenizer(chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # far from uniform, so that a wrong position or mask shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_scorer(folder: Path, seed: int = 0) -> Path:
    """A LLaMA with a score head as PKU-Alignment saves its reward and cost models."""
    save_tiny_model(folder, seed, chat=False)
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if not name.startswith("lm_head")}
    generator = torch.Generator().manual_seed(seed)
    extra = {
        "score_head.weight": torch.randn(1, 32, generator=generator),
        "normalizer.mean": torch.zeros(1),
        "normalizer.var": torch.ones(1),
        "normalizer.count": torch.ones(1, dtype=torch.long),
    }
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaModelForScore"], "score_dim": 1, "bias": False, "do_normalize": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_policy(
    folder: Path, conditioning: Sequence[Conditioning] | None = None, names: Sequence[str] = ("a", "b"), **kwargs
) -> Policy:
    kwargs = {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "dtype": "float32"} | kwargs
    return Policy(str(folder), None if conditioning is None else list(conditioning), **kwargs).build(names)


def randomise_adapter(policy: Policy, seed: int = 0, scale: float = 0.3) -> Policy:
    """LoRA starts at zero, where a wrong gate would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


class Letters(Objective):
    """How often a letter occurs."""

    def __init__(
        self, letter: str = "a", name: str | None = None, normalisation: dict[str, float] | None = None
    ) -> None:
        super().__init__(name or f"letter_{letter}", normalisation)
        self.letter = letter

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(response.count(self.letter)) for response in responses]


class Length(Objective):
    def __init__(self, name: str | None = None, sign: int = 1) -> None:
        super().__init__(name)
        self.sign = sign

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(self.sign * len(response)) for response in responses]


class Broken(Objective):
    """Raises, or returns something that is not one number per response."""

    def __init__(self, how: str = "raise", name: str | None = None) -> None:
        super().__init__(name or "broken")
        self.how = how

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> object:
        if self.how == "raise":
            raise ValueError("the reward server is on fire")
        return {"shape": [[1.0]], "text": "seven", "one": 1.0}[self.how]


class Nameless(Objective):
    """Forgets what its base class must do."""

    def __init__(self) -> None:
        pass

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)


class Homeless(Logger):
    """A logger without a folder, as one of a remote service is.

    Args:
        account: Without one it takes no run.
    """

    name, version = "homeless", 0

    def __init__(self, account: bool = True) -> None:
        self.account = account

    def log_hyperparams(self, params: Any) -> None:
        if not self.account:
            raise RuntimeError("no account")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


class Chosen(Objective):
    """Scores written down beforehand, in the order in which responses are asked about."""

    def __init__(self, scores: Sequence[float], name: str) -> None:
        super().__init__(name, {"mean": 0.0, "sd": 1.0})
        self.scores = list(scores)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.scores[: len(responses)]


class Moody(Objective):
    """Does what a list says, call by call; then it answers."""

    higher_is_better = False

    def __init__(self, moods: Sequence[Callable[[], Any]], name: str = "moody") -> None:
        super().__init__(name, {"mean": 0.0, "sd": 1.0})
        self.moods, self.calls = list(moods), 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
        self.calls += 1
        if self.moods and (made := self.moods.pop(0)()) is not None:
            return made
        return [float(len(r)) for r in responses]


def fails() -> None:
    raise ConnectionError("the server is down")
