"""A trained policy to use: ``miepo.load`` reads a run, a checkpoint or an exported folder."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from miepo.errors import UserError, first_line
from miepo.objectives import Objective
from miepo.objectives.scoring import normalise_rewards, score_responses
from miepo.policy import Policy
from miepo.preferences import parse_preference
from miepo.seeding import check_seed, prompt_seeds
from miepo.text import REPLY, dialogue_of, split_turns
from miepo.trained.build import build_objectives, build_policy
from miepo.trained.saved import (
    Saved,
)
from miepo.trained.streaming import GenerationRequest, check_length, stream

MOST_AT_ONCE = 16  # responses


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


class TrainedPolicy:
    """One policy for every trade-off: answers under a preference, and scores answers.

    Attributes:
        names: Of the objectives.
        front: What was measured at the last evaluation, or None; renders in a notebook.
        policy: The network with its adapter, in evaluation mode.
    """

    def __init__(
        self,
        saved: Saved,
        policy: Policy,
        device: torch.device,
        objectives: Sequence[Objective] | None = None,
        trust: bool = False,
    ) -> None:
        self.saved, self.policy, self.names, self.front = saved, policy, saved.names, saved.front
        self._given, self._device, self._trust = objectives, device, trust
        self._objectives: list[Objective] = []
        # a tokenizer's settings change while it encodes, and must not under one that decodes in another thread
        tokenizer = copy.deepcopy(policy.tokenizer)
        self._template = policy.make_template(tokenizer, policy.dialogue)
        self._turns = policy.make_template(tokenizer, True) if self._template.chat else None
        self._encoding, self._scoring = threading.Lock(), threading.Lock()

    def encode(self, prompt: str | Sequence[Mapping[str, str]], preference: str) -> list[int]:
        """Return a prompt, or messages with ``role`` and ``content``, as token ids.

        One message is a prompt. Several are a dialogue, which a policy with a chat template can read, too, and others
        where they were trained on dialogues.

        Raises:
            UserError: roles that do not alternate, or more messages than the policy reads.
        """
        template = self._template
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence) or not all(map(_is_message, prompt)):
                raise UserError("expected a prompt as text, or messages with role and content")
            messages: Any = prompt
            turns = [(message["role"], message["content"]) for message in messages]
            expected_roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
            if len(turns) % 2 == 0 or [role for role, _ in turns] != expected_roles:
                raise UserError(
                    "expected messages of user and assistant in turn, from user to user, "
                    f"got {', '.join(role for role, _ in turns) or 'none'}"
                )
            if len(turns) > 1 and not template.dialogue:
                if self._turns is None:
                    raise UserError(f"this policy reads one message: expected one, got {len(turns)}")
                template = self._turns
            prompt = dialogue_of(turns) if template.dialogue else turns[0][1]
        else:
            prompt = self._as_trained(prompt)
        with self._encoding:
            return template.encode_once(prompt, preference)

    def _as_trained(self, prompt: str) -> str:
        """Return a prompt alone as the dialogue that it begins, where the policy was trained on dialogues."""
        if self._template.dialogue and split_turns(prompt) is None:
            return dialogue_of([("user", prompt)]) + REPLY
        return prompt

    def question(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        preference: Mapping[str, float],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> GenerationRequest:
        """Return a prompt, or messages, under a preference by name, checked.

        For :func:`~miepo.trained.streaming.stream`.

        Raises:
            UserError: names the setting that cannot be used.
        """
        if not isinstance(preference, Mapping):
            raise UserError(f"expected a preference by objective name, got {type(preference).__name__}")
        vector = parse_preference(preference, self.names, strict=True)
        temperature = self.policy.temperature if temperature is None else temperature
        ends = (stop,) if isinstance(stop, str) or not isinstance(stop, Sequence) else tuple(stop)
        if not all(isinstance(end, str) and end for end in ends):
            raise UserError(f"what ends the response must be text, and not empty, got {stop!r}")
        check_seed(seed)
        if max_new_tokens is not None and (not _is_number(max_new_tokens, Integral) or max_new_tokens < 1):
            raise UserError(f"max_new_tokens must be at least 1, a whole number, got {max_new_tokens!r}")
        if not _is_number(temperature, Real) or not 0 <= temperature <= 100:
            raise UserError(f"temperature must lie between 0 and 100, got {temperature!r}")
        if not _is_number(top_p, Real) or not 0 < top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {top_p!r}")
        ids = self.encode(prompt, self.policy.preference_text(vector.tolist()))
        tokens = max_new_tokens or self.saved.max_new_tokens
        if max_new_tokens is None and self.policy.context_length is not None:
            tokens = max(1, min(tokens, self.policy.context_length - len(ids)))
        question = GenerationRequest(ids, vector, tokens, temperature, top_p, (*self.saved.stop, *ends), seed)
        check_length(self.policy, question)
        return question

    def generate(
        self,
        prompts: str | Sequence[str],
        preference: Mapping[str, float] | Sequence[Mapping[str, float]],
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Any:
        """Answer prompts under a preference, or each under its own.

        Args:
            prompts: One or several.
            preference: Weights by objective name that sum to 1; objectives not named weigh nothing. One for all, or
                one for each.
            seed: Fixes the draws.
            settings: ``max_new_tokens`` (by default that of training, or what the context has room for),
                ``temperature`` (that of training; 0 takes the most probable tokens), ``top_p``, ``stop``.

        Returns:
            A response, or a list of them where ``prompts`` is one.

        Raises:
            UserError: an unknown objective, weights off the simplex, a prompt that does not fit the context.
        """
        one = isinstance(prompts, str)
        every: list[Any] = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Sequence) else list(prompts)
        if not isinstance(preference, (Mapping, Sequence)) or not all(isinstance(prompt, str) for prompt in every):
            raise UserError("expected prompts as text, and a preference by objective name for all or for each of them")
        preferences = [preference] * len(every) if isinstance(preference, Mapping) else list(preference)
        if len(preferences) != len(every):
            raise UserError(
                f"expected one preference for all or one for each of {len(every)} prompts, got {len(preferences)}"
            )
        questions = [
            self.question(prompt, weights, seed=own, **settings)
            for prompt, weights, own in zip(every, preferences, prompt_seeds(seed, len(every)), strict=True)
        ]
        responses = [""] * len(every)
        for start in range(0, len(questions), MOST_AT_ONCE):
            for piece in stream(self.policy, questions[start : start + MOST_AT_ONCE]):
                responses[start + piece.row] += piece.text
        return responses[0] if one else responses

    def stream(self, prompt: str, preference: Mapping[str, float], **settings: Any) -> Iterator[str]:
        """Yield the response to one prompt piece by piece; arguments as for :meth:`generate`."""
        settings["seed"] = prompt_seeds(settings.get("seed", 0), 1)[0]
        return (piece.text for piece in stream(self.policy, [self.question(prompt, preference, **settings)]))

    def score(self, prompts: str | Sequence[str], responses: str | Sequence[str]) -> dict[str, Any]:
        """Return what every objective says of responses, normalised as in training: higher is better, 0 its mean there.

        Of a policy that was trained on dialogues a prompt is one, too, as in :meth:`encode`.

        Returns:
            By objective name a number, or a list of them where ``prompts`` is one; NaN where there is none.

        Raises:
            UserError: an objective cannot be built from what was saved, or fails.
        """
        if not all(isinstance(given, Sequence) for given in (prompts, responses)):
            raise UserError("expected prompts and responses as text")
        one = isinstance(prompts, str)
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [responses] if isinstance(responses, str) else list(responses)
        if len(asked) != len(texts):
            raise UserError(f"expected one response for each of {len(asked)} prompts, got {len(texts)}")
        if not all(isinstance(text, str) for text in (*asked, *texts)):
            raise UserError("expected prompts and responses as text")
        if not asked:
            return {name: [] for name in self.names}
        asked = [self._as_trained(prompt) for prompt in asked]
        with self._scoring:  # objectives need not stand being asked by two threads
            objectives = self.objectives
            raw = score_responses(objectives, asked, [[text] for text in texts])
        rewards = normalise_rewards(objectives, raw)[:, 0].T.tolist()  # K x N
        return {name: row[0] if one else row for name, row in zip(self.names, rewards, strict=True)}

    @property
    def objectives(self) -> list[Objective]:
        """The objectives, loaded and with the normalisation of training."""
        if not self._objectives:
            found = list(self._given or build_objectives(self.saved, self._trust))
            for objective in found:
                objective.load_state_dict(self.saved.normalisations.get(objective.name, {}))
                if objective.normalisation is None:
                    raise UserError(f"'{self.saved.source}' has no normalisation of {objective.name}")
                objective.load_checked(self._device)
                objective.has_scored = True  # a text without a score is an answer here, and no sign of a mistake
            self._objectives = found
        return self._objectives

    def __repr__(self) -> str:
        return f"TrainedPolicy({', '.join(self.names)}; base '{self.policy.base}')"


def load(
    path: str | Path,
    *,
    objectives: Sequence[Objective] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust: bool = False,
) -> TrainedPolicy:
    """Load a trained policy from a run's folder, a checkpoint or a folder of ``miepo export``.

    Args:
        path: One of them.
        objectives: What :meth:`TrainedPolicy.score` asks; by default built as they were in training.
        base: Where the base model is now, if it has moved.
        dtype: Of the base weights, if not as in training.
        device: By default a GPU where there is one.
        trust: Build classes that are not miepo's own, where the file names them. That imports their code: only for
            files that you know.

    Raises:
        UserError: there is none at ``path``, or it does not fit the base model.

    Source: the policy is pi_theta(y | x, w) of arXiv 2607.01392; nothing of it is chosen at load time but w.
    """
    saved = Saved.read(path)
    if not saved.names:
        raise UserError(f"'{saved.source}' has no objectives: it is of a stage without preferences")
    if objectives is not None and not (
        isinstance(objectives, Sequence) and all(isinstance(o, Objective) for o in objectives)
    ):
        raise UserError(f"expected a list of objectives, got {objectives!r}")
    if objectives is not None and (given_names := tuple(o.name for o in objectives)) != saved.names:
        raise UserError(
            f"'{saved.source}' has the objectives {list(saved.names)}, in this order, got {list(given_names)}"
        )
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where).item()  # one that keeps no numbers fails, too
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"expected a device such as cpu or cuda, got '{device}': {first_line(error)}") from None
    policy = build_policy(saved, {"base": None if base is None else str(base), "dtype": dtype}, trust, where)
    policy.to(where).eval()
    return TrainedPolicy(saved, policy, where, objectives, trust)
