from __future__ import annotations

import pytest
import torch

from miepo.policy import log_prob as module
from miepo.policy.log_prob import token_log_prob


@pytest.mark.parametrize("chunk_logits", [1, 64, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_equal_the_whole_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, temperature: float, frozen: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": chunk_logits})
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=g, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(32, 8, generator=g).requires_grad_(not frozen)
    ids = torch.randint(0, 32, (3, 5), generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    upstream = torch.randn(3, 5, generator=g)

    ours = torch.zeros(3, 5).masked_scatter(
        mask, token_log_prob(hidden[mask], ids[mask], lambda s: s @ weight.T, 32, temperature, frozen)
    )
    whole = ((hidden @ weight.T) / temperature).log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)
    expected = torch.where(mask, whole, 0.0)
    torch.testing.assert_close(ours, expected)
    given = [hidden] if frozen else [hidden, weight]
    for o, e in zip(
        torch.autograd.grad((ours * upstream).sum(), given),
        torch.autograd.grad((expected * upstream).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(o, e)


def test_nothing_counts() -> None:
    assert token_log_prob(torch.randn(0, 4), torch.zeros(0).long(), lambda s: s, 4, 1.0).shape == (0,)


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": 4 * 32})
    seen = []

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return states @ torch.ones(8, 32)

    token_log_prob(torch.randn(15, 8), torch.zeros(15).long(), head, 32, 1.0)
    assert seen == [4, 4, 4, 3]


def test_logits_are_computed_once_with_gradient() -> None:
    calls = []

    def head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return states @ torch.ones(8, 32)

    states = torch.randn(3, 8, requires_grad=True)
    token_log_prob(states, torch.zeros(3).long(), head, 32, 1.0).sum().backward()
    assert calls == [3]
    assert states.grad is not None
