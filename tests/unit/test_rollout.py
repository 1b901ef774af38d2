from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from miepo.errors import UserError
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.rollout import RolloutEngine, ServerEngine, TransformersEngine, VLLMEngine
from miepo.rollout.engine import make_responses, response_mask
from miepo.text import cut_at
from miepo.types import Tokens
from tests.helpers.tiny import randomise_adapter, tiny_policy

# those have their own tests: integration/test_vllm.py, unit/test_server_engine.py
ENGINES = [engine for engine in RolloutEngine.__subclasses__() if engine not in (VLLMEngine, ServerEngine)]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
PROMPTS = ["the garden", "people like rain"]


def test_response_mask_counts_the_first_end_token_and_nothing_after() -> None:
    mask, finished = response_mask(torch.tensor([[5, 9, 9, 5], [5, 5, 5, 5], [8, 5, 9, 9]]), [8, 9])
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert finished.tolist() == [True, False, True]


def test_an_end_token_alone_is_an_empty_response(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    end = policy.end_ids[0]
    text = policy.tokenizer(" food", add_special_tokens=False)["input_ids"]
    made = make_responses(policy, torch.tensor([[[end, 5, 5], [*text, end, 7][:3]]]))
    assert made.texts == [["", "food"]]
    assert made.empty.tolist() == [[True, False]]
    assert made.tokens.mask.sum(-1)[0, 0] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("conditioning", [GatedConditioning, PromptConditioning])
def test_contract_samples_are_shaped_seeded_and_leave_the_random_state(
    tiny_model: Path, engine: type[RolloutEngine], conditioning: type
) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [conditioning()])).train()
    state = torch.get_rng_state()
    first, again, other = (engine().sample(policy, PROMPTS, W, 2, 6, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.training
    assert first.tokens.ids.shape == first.tokens.mask.shape
    assert first.tokens.ids.shape[:2] == (2, 2)
    assert first.tokens.ids.shape[2] <= 6
    assert torch.equal(first.tokens.ids, again.tokens.ids)
    assert first.texts != other.texts
    assert first.texts[0][0] != first.texts[0][1]


@pytest.mark.parametrize("engine", ENGINES)
def test_contract_a_stop_text_ends_a_response_as_an_end_token_does(
    tiny_model: Path, engine: type[RolloutEngine]
) -> None:
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()]))
    free = engine().sample(policy, PROMPTS, W, 8, 24, seed=3)
    stop = [next(t[4:6] for t in texts if t[4:6].isalpha()) for texts in free.texts]  # two texts that do come up
    made = engine(stop).sample(policy, PROMPTS, W, 8, 24, seed=3)
    ended = 0
    for n in range(2):
        for i in range(8):
            kept = made.tokens.ids[n, i][made.tokens.mask[n, i]]
            text = policy.tokenizer.decode(kept, skip_special_tokens=True)
            assert made.texts[n][i] == cut_at(text, stop).strip()
            assert cut_at(made.texts[n][i], stop) == made.texts[n][i]
            before = policy.tokenizer.decode(kept[:-1], skip_special_tokens=True)
            assert cut_at(before, stop) == before  # the last token completes the stop text
            if cut_at(text, stop) != text:
                ended += 1
                assert made.finished[n, i]
    assert ended >= 2
    assert engine(stop).sample(policy, PROMPTS, W, 8, 24, seed=3).texts == made.texts


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(UserError, match="list of texts that are not empty"):
        TransformersEngine(["x", ""])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_contract_samples_follow_the_policy(tiny_model: Path, engine: type[RolloutEngine], temperature: float) -> None:
    """First tokens are distributed as log_prob says: G-test against every token's probability under its own w."""
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()], temperature=temperature))
    n = 4000
    ids = engine().sample(policy, PROMPTS, W, n, 1, seed=5).tokens.ids[..., 0]  # (2, n)
    vocabulary = len(policy.tokenizer)
    for i in range(2):
        x, w = policy.encode([PROMPTS[i]], W[i : i + 1]), W[i : i + 1]
        with policy.evaluating(), policy.conditioned(w):
            logits = policy.model(input_ids=x.ids, attention_mask=x.mask.long()).logits[0, -1] / temperature
        probability = logits.softmax(-1).double()
        observed = torch.bincount(ids[i], minlength=vocabulary).double()
        common = probability * n >= 5
        expected, seen = probability[common] * n, observed[common]
        expected = torch.cat([expected, n - expected.sum(0, keepdim=True)])
        seen = torch.cat([seen, n - seen.sum(0, keepdim=True)])
        chi2 = ((seen - expected) ** 2 / expected).sum().item()
        freedom = len(expected) - 1
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations
        uniform = torch.full_like(expected, n / len(expected))
        assert ((seen - uniform) ** 2 / uniform).sum() > 10 * chi2  # the test could fail


def test_sampling_ignores_the_generation_settings_of_the_model(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    settings = policy.model.generation_config
    assert (settings.top_k, settings.top_p, settings.do_sample) == (0, 1.0, True)
    assert settings.repetition_penalty in (None, 1.0)


def test_rows_do_not_depend_on_their_neighbours_padding(tiny_model: Path) -> None:
    """A prompt alone and beside a longer one is the same conditional distribution."""
    policy = randomise_adapter(tiny_policy(tiny_model, [GatedConditioning()])).double()
    y = TransformersEngine().sample(policy, ["food"], W[:1], 1, 5, 0).tokens.flat()
    alone = policy.log_prob(policy.encode(["food"], W[:1]), W[:1], y)
    both = policy.log_prob(
        policy.encode(["food", "people like rain when it comes in spring"], W),
        W,
        type(y)(y.ids.repeat(2, 1), y.mask.repeat(2, 1)),
    )
    torch.testing.assert_close(both[:1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("side", "width"), [("left", 0), ("right", 0), ("left", 5), ("right", 2)])
def test_rows_of_tokens_are_padded_on_one_side(side: Any, width: int) -> None:
    rows, long = [[4, 5, 6], [7], []], max(3, width)
    tokens = Tokens.of_rows(rows, 9, side, width)
    for row, ids, mask in zip(rows, tokens.ids.tolist(), tokens.mask.tolist(), strict=True):
        gap = [9] * (long - len(row))
        assert ids == ([*gap, *row] if side == "left" else [*row, *gap])
        assert [i for i, counts in zip(ids, mask, strict=True) if counts] == row
        assert mask == sorted(mask, reverse=side == "right")
