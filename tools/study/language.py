"""A synthetic language in which every trade-off has a known best answer, and a small Llama trained on it from scratch.

A prompt is six of twelve concepts. Each concept has a *formal* and a *warm* word, and an answer has at most six words.
The objective ``formality`` rewards naming the prompt's concepts formally, ``warmth`` naming them warmly, both with
diminishing returns. The best answers name ``c`` concepts formally and ``6 - c`` warmly, ``c = 0 .. 6``, and waste no
word on repetitions or other concepts: their rewards are the vertices of the true Pareto front, the same for every
prompt.

The base model answers as :func:`answer` does: at any length, with strangers, in a mixture of registers.
As an instruction-tuned model would, it has some idea of what a preference written in the prompt asks for: it has read
comparisons of numbers (``0.25 0.70 less``), a third of its texts state a preference, a fifth state scores, and half of
the answers to either follow. Without that, conditioning by prompt learns nothing here, and beating it would prove
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from miepo.errors import UserError
from miepo.methods import TargetConditioning
from miepo.objectives import Objective
from miepo.policy import PromptConditioning

CONCEPTS = [a + b for a in ("ba", "do", "ku") for b in ("la", "no", "ri", "tu")]
NAMES = ("formality", "warmth")  # a word is its concept with the register's ending
ENDINGS = dict(zip(NAMES, ("us", "ie"), strict=True))
PROMPT_CONCEPTS = 6
MAX_WORDS = 6
CONTEXT = 64

# mean and sd of either score over 200,000 answers of the language itself (`answer`), to three digits
NORMALISATION = (0.398, 0.320)


# -- the objectives ----------------------------------------------------------------------------------------------------


def coverage(prompt: str, response: str, ending: str) -> float:
    """Return ``1 - (1 - c / 6)^2`` where the first six words of a response name ``c`` of the prompt's concepts so."""
    wanted = {concept + ending for concept in prompt.split()}
    named = wanted & set(response.split()[:MAX_WORDS])
    return 1 - (1 - len(named) / len(wanted)) ** 2


class Register(Objective):
    """How much of the prompt is said formally (``formality``) or warmly (``warmth``)."""

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise UserError(f"a register is one of {', '.join(NAMES)}, got {name!r}")
        super().__init__(name, dict(zip(("mean", "sd"), NORMALISATION, strict=True)))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [coverage(p, r, ENDINGS[self.name]) for p, r in zip(prompts, responses, strict=True)]


def scores(prompt: str, response: str) -> list[float]:
    """Return the normalised rewards of a response, as in ``NAMES``."""
    mean, sd = NORMALISATION
    return [(coverage(prompt, response, ENDINGS[name]) - mean) / sd for name in NAMES]


def true_front() -> np.ndarray:
    """Return vertices of the true Pareto front in normalised rewards, ``(7, 2)``: columns as in ``NAMES``."""
    concepts = CONCEPTS[:PROMPT_CONCEPTS]
    answers = [
        " ".join(concept + ENDINGS[NAMES[int(i >= formal)]] for i, concept in enumerate(concepts))
        for formal in range(PROMPT_CONCEPTS + 1)
    ]
    return np.array([scores(" ".join(concepts), a) for a in answers])


# -- the language ------------------------------------------------------------------------------------------------------


def make_prompt(rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(CONCEPTS)[:PROMPT_CONCEPTS])


def answer(rng: np.random.Generator, prompt: str, weight: float | None = None) -> str:
    """Return an answer of 1 to 6 words: the first concepts of the prompt, a word in seven of any concept instead.

    Words are formal with a probability that is drawn for each answer, or, in half of the answers whose prompt states
    the ``weight`` of formality, with that probability.
    """
    wanted = prompt.split()
    length = rng.integers(1, MAX_WORDS + 1)
    formal = weight if weight is not None and rng.random() < 0.5 else rng.random()
    concepts = [
        CONCEPTS[rng.integers(len(CONCEPTS))] if u < 1 / 7 else concept
        for concept, u in zip(wanted[:length], rng.random(length), strict=True)
    ]
    registers = [ENDINGS[NAMES[int(u >= formal)]] for u in rng.random(length)]
    return " ".join(concept + ending for concept, ending in zip(concepts, registers, strict=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word, per objective's marker and per digit."""
    vocabulary = ["<pad>", "<end>", "<unk>", "Human", "Assistant", *":.-0123456789", "less", "more", "same"]
    vocabulary += [*(f"<{name}{kind}>" for kind in ("", "_score") for name in NAMES), *CONCEPTS]
    vocabulary += [concept + ending for ending in ENDINGS.values() for concept in CONCEPTS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|[A-Za-z]+|[\d.:-]"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def make_text(rng: np.random.Generator) -> tuple[str, str]:
    """Return one training text in two parts: what is read, and what is predicted."""
    kind = rng.random()
    if kind < 0.25:
        a, b = rng.integers(0, 101, 2)
        return f"{a / 100:.2f} {b / 100:.2f}", "less" if a < b else "more" if a > b else "same"
    prompt = make_prompt(rng)
    weight, stated = None, ""
    if kind < 0.6:
        weight = float(np.clip(rng.uniform(-0.1, 1.1), 0, 1))  # with the corners, which read like nothing else
        stated = PromptConditioning().write((weight, 1 - weight), NAMES)
    response = answer(rng, prompt, weight)
    if kind >= 0.8:  # the scores of this answer, or of another one
        other = response if rng.random() < 0.5 else answer(rng, prompt)
        stated = TargetConditioning().write_scores(scores(prompt, other), NAMES)
    return f"Human: {prompt}{stated} Assistant:", response


def make_batch(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Return token ids ``(N, L)`` and labels, -100 where nothing is predicted."""
    rows, labels = [], []
    for read, predicted in texts:
        given, wanted = tokenizer(read)["input_ids"], [*tokenizer(predicted)["input_ids"], tokenizer.eos_token_id]
        rows.append(given + wanted)
        labels.append([-100] * len(given) + wanted)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([row + [-100] * (width - len(row)) for row in labels])


def train_base(folder: Path, seed: int, steps: int = 3000, batch_size: int = 64) -> float:
    """Train the base model from scratch, saves it as a Hugging Face folder; returns its last loss, nats a token."""
    rng = np.random.default_rng([1, seed])
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        ids, labels = make_batch(tokenizer, [make_text(rng) for _ in range(batch_size)])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(np.mean(losses[-20:]))


def prepare(folder: Path, seed: int = 0) -> None:
    """Make what all runs of a study on this language share: ``base/``, ``train.jsonl``, ``validation.jsonl``."""
    rng = np.random.default_rng([2, seed])
    prompts = list(dict.fromkeys(make_prompt(rng) for _ in range(8_000)))
    for name, part in (("validation", prompts[:64]), ("train", prompts[64:])):
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in part]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    train_base(folder / "base", seed)
