"""What the equations take for granted of a network, tried on a few tokens when a policy is built.

The policy reads log-probabilities in ways of its own: padded or as trees, from the states of the last layer, with a
gate inside the adapter. Whether a network computes the same that way its configuration does not tell, so it is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor

from miepo.errors import UserError, first_line
from miepo.policy.prefix_tree import Answers, Prompts

if TYPE_CHECKING:
    from miepo.policy.policy import Policy

# Two right computations of a log-probability differ by less, relative to it or in nats; a wrong one by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
PROMPTS, RESPONSES = (5, 3), ((3, 2), (2, 4))  # lengths: two responses to each of two prompts
WIDTH = 4  # T
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"  # as most networks call them
# what a network that was not made for this raises
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def check_layers(policy: Policy) -> None:
    """Refuse an adapter on layers that cannot be gated, or merged, as the equations say.

    Raises:
        UserError: names the layer, and what to adapt in its place.
    """
    adapted: dict[str, Any] = {n: m for n, m in policy.causal_lm.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in adapted.items():
        if isinstance(layer, ParamWrapper) and policy.gated:
            raise UserError(
                f"policy.lora_targets names experts ({name}), whose weights are adapted alike for all sequences of a "
                f"batch, so that no gate can follow w: expected other layers, say {ATTENTION}, or PromptConditioning"
            )
        if not isinstance(layer, (Linear, ParamWrapper)):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"policy.lora_targets names '{name}' of type {kind}: expected linear layers")
    within = {id(p) for layer in adapted.values() for p in layer.parameters()}
    for name, parameter in policy.adapter_parameters().items():
        if id(parameter) not in within:
            raise UserError(f"expected parameters of LoRA layers alone to train, got '{name}'")


def check_log_prob(policy: Policy) -> None:
    """Choose how log-probabilities are read: the fastest way that gives what the network's own logits say.

    From the last states by the product with the head where that is all that follows them, else by all that the network
    does with them; along trees where its attention allows it, else sequence by sequence.

    Raises:
        UserError: no way gives the network's own log-probabilities.
    """
    prompts, answers = _sequences(policy, preferences=1)
    with policy.evaluating(), policy.model.disable_adapter():
        try:
            truth = _own(policy, prompts, answers)
            shorter = [[[row[:1] for row in rows] for rows in under] for under in answers]
            first = _own(policy, prompts, shorter)[..., 0]
        except FAILURES as error:
            raise _unfit(policy, f"it does not read token ids alone: {_reason(error)}") from None
        if _difference(policy, lambda: first, truth[..., 0]):
            raise _unfit(policy, "it reads tokens that come later")
        found = []
        for own_head in (False, True):
            policy.own_head = own_head
            found.append(_difference(policy, lambda: policy.padded_log_prob(prompts, None, answers, WIDTH), truth))
            if found[-1] is None:
                break
        else:
            raise _unfit(policy, found[-1])
        if policy.plain_attention and _difference(
            policy, lambda: policy.packed_log_prob(prompts, None, answers, WIDTH), truth
        ):
            policy.leave_trees()
            rank_zero_info(f"{type(policy.causal_lm).__name__} takes no trees: its sequences are read one by one")


def check_adapter(policy: Policy) -> None:
    """Compare a batch with a random adapter, under several gates, with each sequence alone, its gate multiplied in.

    Raises:
        UserError: an adapted layer does not compute with its adapter, or the gate does not reach it, or reaches it in
            another order.
    """
    k = len(policy.names)
    if policy.gated and not k:
        return  # nothing can be asked of it
    preferences = torch.full((1, k), 1 / max(k, 1))
    if policy.gated and k > 1:
        preferences = torch.cat([preferences, torch.eye(k)[:1]])  # (C, K)
    prompts, answers = _sequences(policy, preferences=len(preferences))
    gate = policy.gate_of(preferences.repeat(len(prompts), 1))  # (B C, R)
    second = [p.data for name, p in policy.adapter_parameters().items() if ".lora_B." in name]
    before = [p.clone() for p in second]
    draw = torch.Generator().manual_seed(0)
    update = [(torch.randn(p.shape, generator=draw) * 0.05).to(p) for p in second]
    alone = []
    with policy.evaluating():
        try:
            for b, c in product(range(len(prompts)), range(len(preferences))):
                _set(second, update)
                if gate is not None:
                    policy.scale_blocks(gate[b * len(preferences) + c])
                with policy.gate.set(None if gate is None else torch.ones_like(gate[:1])):
                    alone.append(_own(policy, [[prompts[b][c]]], [[answers[b][c]]]))
            truth = torch.cat(alone).view(len(prompts), len(preferences), -1, WIDTH).transpose(1, 2)
            _set(second, update)

            def read() -> Tensor:
                trunk = policy.pass_trunk(prompts, answers) if policy.shares_trunk else None
                return policy.pass_log_prob(prompts, gate, answers, WIDTH, trunk)

            wrong = _difference(policy, read, truth)
            if wrong and policy.shares_trunk:  # the network cannot be entered between its layers
                policy.trunk_layers = 0
                wrong = _difference(policy, read, truth)
        except FAILURES as error:
            wrong = _reason(error)
        finally:
            _set(second, before)
    if wrong:
        what, other = ("gate", ", or PromptConditioning") if policy.gated else ("adapter", "")
        raise UserError(
            f"the {what} does not fit the layers of {type(policy.causal_lm).__name__} that policy.lora_targets names: "
            f"{wrong}; expected other layers, say {ATTENTION}{other}"
        )


def _sequences(policy: Policy, preferences: int) -> tuple[Prompts, Answers]:
    """Return token ids that are neither control tokens nor alike, the same under every preference."""
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    avoid = {*policy.end_ids, policy.tokenizer.pad_token_id}
    ids = (i for n in range(size) if (i := (7 + 13 * n) % size) not in avoid)

    def some(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    prompts = [[some(length)] * preferences for length in PROMPTS]
    answers = [[[some(length) for length in each]] * preferences for each in RESPONSES]
    return prompts, answers


def _own(policy: Policy, prompts: Prompts, answers: Answers) -> Tensor:
    """Return log-probabilities ``(B, n, C, T)`` by the network's own logits, each sequence alone, nothing padded."""
    out = torch.zeros(len(prompts), len(answers[0]), len(answers[0][0]), WIDTH)  # (B, C, n, T)
    for b, (under, each) in enumerate(zip(prompts, answers, strict=True)):
        for c, (prompt, rows) in enumerate(zip(under, each, strict=True)):
            for i, row in enumerate(rows):
                ids = torch.tensor([[*prompt, *row]], device=policy.device)
                with policy.autocast():
                    logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0]
                log_prob = (logits.float() / policy.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
                out[b, c, i, : len(row)] = log_prob.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
    return out.transpose(1, 2)


def _difference(policy: Policy, compute: Callable[[], Tensor], truth: Tensor) -> str | None:
    """Return how another computation of the same differs, as the end of a sentence; None where only rounding does."""
    try:
        found = compute().cpu()
    except FAILURES as error:
        return _reason(error)
    gap = ((found - truth).abs() / truth.abs().clamp(min=1)).max()
    # "not (<=)", so that what is no number differs
    if not gap <= TOLERANCE[policy.weight_dtype]:
        return f"its log-probabilities differ from the network's own by {float((found - truth).abs().max()):.3g} nats"
    return None


def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _reason(error: Exception) -> str:
    """Return what to say of a failure: an attribute that is missing tells a user nothing."""
    unknown = isinstance(error, AttributeError)
    return "it is put together in a way that miepo does not know" if unknown else first_line(error)


def _unfit(policy: Policy, reason: str | None) -> UserError:
    return UserError(
        f"expected a causal language model that reads tokens from left to right, padded or not, got "
        f"{type(policy.causal_lm).__name__}: {reason}"
    )
