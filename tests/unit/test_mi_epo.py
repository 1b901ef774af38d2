"""The step as a whole: equivalences that any implementation of Eq. 13 must show."""

from __future__ import annotations

import threading
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from miepo import MIEPO, OnlinePreferenceDataModule
from miepo.callbacks import EvaluationTable, ParetoFront, PreferenceInformation, SampleTable, Steerability
from miepo.data.rollout import reference_log_prob
from miepo.errors import UserError
from miepo.exploration import InfoNCE, Matching, PairwiseInformation
from miepo.losses import implicit_reward
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.router import SampleRouter
from miepo.types import PreferenceBatch, Responses, Tokens
from tests.helpers.fit import Batches, rollout, step, tiny_run
from tests.helpers.tiny import Chosen, Length, Letters, randomise_adapter
from tools.study.exploration import ClippedInfoNCE


@pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])
def test_beta_w_zero_is_mo_odpo_bit_for_bit(tiny_model: Path, tmp_path: Path, conditioning) -> None:
    """Loss and gradients equal those of sum_k w_k DPO_k written out here; and w- is not even drawn."""
    module, batch, _ = rollout(tiny_model, tmp_path, conditioning=[conditioning], module={"exploration": InfoNCE(0.0)})
    assert batch.counterfactual.shape[1] == 0
    randomise_adapter(module.policy)
    loss, gradients = step(module, batch)

    module.zero_grad()
    log_prob = module.policy.response_log_prob(batch.prompts, batch.preference.unsqueeze(1), batch.responses.tokens)
    reward = implicit_reward(log_prob.squeeze(2), batch.reference_log_prob, batch.responses.tokens.mask)
    margin = torch.stack([reward[:, 0] - reward[:, 1]] * 2, 1)  # (B, K)
    log_ratio = module.beta_c * margin * batch.labels
    mo_odpo = (-torch.nn.functional.logsigmoid(log_ratio) * batch.preference).sum(-1).mean()
    mo_odpo.backward()
    assert torch.equal(loss, mo_odpo)
    for name, parameter in module.policy.adapter_parameters().items():
        assert torch.equal(gradients[name], parameter.grad), name


def test_a_vanishing_beta_w_is_mo_odpo_in_the_limit(tiny_model: Path, tmp_path: Path) -> None:
    """The other path to the same point: the term is computed, and beta_w goes to 0."""
    module, batch, _ = rollout(tiny_model, tmp_path, module={"exploration": InfoNCE(1e-12)})
    randomise_adapter(module.policy)
    _, gradients = step(module, batch)
    module.exploration.beta_w = 0.0
    _, expected = step(module, batch)
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-9)


def test_the_exploration_term_by_a_slow_loop(tiny_model: Path, tmp_path: Path) -> None:
    module, batch, _ = rollout(
        tiny_model, tmp_path, conditioning=[PromptConditioning()], module={"exploration": InfoNCE(0.5, 3)}
    )
    policy = randomise_adapter(module.policy)
    loss, _ = step(module, batch)
    module.exploration.beta_w, total = 0.0, 0.0
    alignment, _ = step(module, batch)
    with torch.no_grad():
        for b, prompt in enumerate(batch.prompts):
            for y in range(2):
                tokens = Tokens(batch.responses.tokens.ids[b, y : y + 1], batch.responses.tokens.mask[b, y : y + 1])

                def reward(w: torch.Tensor, tokens: Tokens = tokens, prompt: str = prompt) -> float:
                    x = policy.encode([prompt], w.unsqueeze(0))
                    own = policy.log_prob(x, w.unsqueeze(0), tokens).sum()
                    return (own - policy.reference_log_prob(x, tokens).sum()).item()

                if batch.responses.texts[b][y].strip():
                    logits = torch.tensor([reward(batch.preference[b]), *map(reward, batch.counterfactual[b])]) * 0.5
                    total += -logits.log_softmax(0)[0].item() / 2 / len(batch)
    assert loss.item() - alignment.item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])
def test_the_gradient_of_one_anchor_is_that_of_both_on_average(tiny_model: Path, tmp_path: Path, conditioning) -> None:
    module, batch, logged = rollout(
        tiny_model, tmp_path, conditioning=[conditioning], module={"exploration": InfoNCE(0.5, 2, anchors=1)}
    )
    assert (batch.anchors.sum(1) == 1).all()
    assert logged["information/infonce"] <= log(3)
    y, first = batch.responses.tokens, torch.tensor([[True, False]]).expand(len(batch), 2)
    reference = module.policy.reference_response_log_prob(batch.prompts, batch.counterfactual, y)  # of both
    if isinstance(conditioning, PromptConditioning):
        read = batch.anchors[:, :, None, None] & y.mask.unsqueeze(2)  # no more than that was computed
        assert torch.equal(batch.counterfactual_reference_log_prob != 0, read.expand_as(reference))
    batch = replace(batch, counterfactual_reference_log_prob=reference)
    randomise_adapter(module.policy)
    losses, gradients = zip(*(step(module, replace(batch, anchors=drawn)) for drawn in (first, ~first)), strict=True)
    module.exploration.anchors = 2
    loss, both = step(module, replace(batch, anchors=torch.ones_like(first)))
    torch.testing.assert_close(sum(losses) / 2, loss)
    for name, gradient in both.items():
        torch.testing.assert_close((gradients[0][name] + gradients[1][name]) / 2, gradient, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_the_exploration_term_uses_w_minus_only(tiny_model: Path, tmp_path: Path) -> None:
    """With one-hot preferences and separate blocks: w+ = e_0 and w- = e_1 touch different parameters."""
    module, batch, _ = rollout(
        tiny_model, tmp_path, conditioning=[GatedConditioning(shared=False)], module={"exploration": InfoNCE(0.5)}
    )
    randomise_adapter(module.policy)
    first = torch.tensor([1.0, 0.0]).expand(len(batch), 2)
    batch = replace(
        batch, preference=first, counterfactual=first.flip(1).unsqueeze(1), labels=torch.zeros(len(batch), 2)
    )
    _, gradients = step(module, batch)  # no labels: the exploration term alone
    r = module.policy.lora_rank
    for name, gradient in gradients.items():
        plus, minus = gradient.split(r, 0 if "lora_A" in name else 1)
        assert plus.abs().sum() == 0, name
        assert minus.abs().sum() > 0, name


def test_permuting_the_objectives_permutes_the_gate_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    module, batch, _ = rollout(tiny_model, tmp_path, module={"exploration": InfoNCE(0.3)})
    policy = randomise_adapter(module.policy)
    loss, gradients = step(module, batch)
    r = policy.lora_rank
    order = torch.cat([torch.arange(r), torch.arange(2 * r, 3 * r), torch.arange(r, 2 * r)])  # shared, second, first
    with torch.no_grad():
        for name, p in policy.adapter_parameters().items():
            p.copy_(p[order] if "lora_A" in name else p[:, order])
    flipped = replace(
        batch, preference=batch.preference.flip(-1), counterfactual=batch.counterfactual.flip(-1),
        routing=batch.routing.flip(-1), scores=batch.scores.flip(-1), labels=batch.labels.flip(-1),
    )  # fmt: skip
    other, permuted = step(module, flipped)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        expected = gradient[order] if "lora_A" in name else gradient[:, order]
        torch.testing.assert_close(permuted[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])
def test_padding_changes_no_loss_and_no_logged_number(tiny_model: Path, tmp_path: Path, conditioning) -> None:
    module, batch, _ = rollout(tiny_model, tmp_path, conditioning=[conditioning], module={"exploration": InfoNCE(0.3)})
    randomise_adapter(module.policy)

    def logged(batch: PreferenceBatch) -> dict[str, float]:
        values: dict[str, torch.Tensor] = {}
        module.log = lambda name, value, **_: values.__setitem__(name, value)
        module.log_dict = lambda entries, **_: values.update(entries)
        module.lr_schedulers = lambda: SimpleNamespace(get_last_lr=lambda: [0.0])
        module.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        return {k: float(v) for k, v in values.items()} | {
            n: p.grad.norm().item() for n, p in module.policy.adapter_parameters().items()
        }

    y, extra = batch.responses, 5
    end = module.policy.tokenizer.pad_token_id
    wide = Tokens(
        torch.nn.functional.pad(y.tokens.ids, (0, extra), value=end), torch.nn.functional.pad(y.tokens.mask, (0, extra))
    )
    padded = replace(
        batch,
        responses=Responses(wide, y.texts, y.finished),
        reference_log_prob=torch.nn.functional.pad(batch.reference_log_prob, (0, extra), value=-3.0),  # must not count
        counterfactual_reference_log_prob=torch.nn.functional.pad(
            batch.counterfactual_reference_log_prob, (0, extra), value=-3.0
        ),
    )
    narrow, padded_values = logged(batch), logged(padded)
    assert narrow.keys() == padded_values.keys()
    assert {"loss", "kl", "response/tokens", "exploration", "information/infonce", "reward/length"} <= narrow.keys()
    for key in narrow:
        assert padded_values[key] == pytest.approx(narrow[key], rel=1e-3, abs=1e-6), key


def test_accumulation_1x8_equals_8x1(tiny_model: Path, tmp_path: Path) -> None:
    """For given rollouts: the mean of the gradients of single prompts is the gradient of the batch."""
    module, batch, _ = rollout(tiny_model, tmp_path, module={"exploration": InfoNCE(0.3)}, data={"batch_size": 8})
    randomise_adapter(module.policy)
    _, whole = step(module, batch)
    parts = []
    for b in range(8):
        one = slice(b, b + 1)
        y = batch.responses
        parts.append(
            step(
                module,
                PreferenceBatch(
                    batch.prompts[one], batch.preference[one], batch.counterfactual[one], batch.compared[one],
                    batch.anchors[one], batch.routing[one],
                    Responses(Tokens(y.tokens.ids[one], y.tokens.mask[one]), y.texts[one], y.finished[one]),
                    batch.scores[one], batch.pairs[one], batch.labels[one], batch.counterfactual_labels[one],
                    batch.cross_labels[one], batch.reference_log_prob[one], batch.counterfactual_reference_log_prob[one],
                ),
            )[1]
        )  # fmt: skip
    for name, gradient in whole.items():
        torch.testing.assert_close(torch.stack([p[name] for p in parts]).mean(0), gradient, rtol=1e-3, atol=1e-6)


def test_all_ties_give_zero_alignment_gradient_and_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    same = [Chosen([1.0] * 8, "same"), Chosen([float("nan")] * 8, "none")]
    same[1].has_scored = True  # before
    module, batch, logged = rollout(tiny_model, tmp_path, objectives=same, module={"exploration": InfoNCE(0.0)})
    randomise_adapter(module.policy)
    loss, gradients = step(module, batch)
    assert loss.isfinite()
    assert all((g == 0).all() for g in gradients.values())
    pairs_with_text = int((~batch.responses.empty.any(1)).sum())
    assert logged["count/ties"] == logged["count/not_a_number"] == pairs_with_text
    assert logged["count/labels"] == 0


def test_the_logged_reward_is_the_one_that_makes_the_pairs(tiny_model: Path, tmp_path: Path) -> None:
    """Recomputed from the texts: mean normalised scores by name, and labels by their order."""
    module, batch, logged = rollout(tiny_model, tmp_path)
    for k, objective in enumerate(module.objectives):
        raw = torch.tensor([objective.score(["x", "x"], texts) for texts in batch.responses.texts])  # (B, 2)
        normal = objective.normalise(raw)
        assert logged[f"reward/{objective.name}"] == pytest.approx(normal.mean().item(), rel=1e-5)
        expected = torch.where(batch.responses.empty.any(1), 0.0, torch.sign(raw[:, 0] - raw[:, 1]))
        assert torch.equal(batch.labels[:, k], expected)


def test_kl_is_the_mean_implicit_reward_over_real_tokens(tiny_model: Path, tmp_path: Path) -> None:
    module, batch, _ = rollout(tiny_model, tmp_path)
    policy = randomise_adapter(module.policy)
    values: dict[str, torch.Tensor] = {}
    module.log = lambda *_, **__: None
    module.log_dict = lambda entries, **_: values.update(entries)
    module.lr_schedulers = lambda: SimpleNamespace(get_last_lr=lambda: [0.0])
    module.training_step(batch, 0)
    total = 0.0
    for b, prompt in enumerate(batch.prompts):
        for y in range(2):
            keep = batch.responses.tokens.mask[b, y]
            tokens = Tokens(batch.responses.tokens.ids[b, y][keep].unsqueeze(0), keep[keep].unsqueeze(0))
            x = policy.encode([prompt], batch.preference[b : b + 1])
            own = policy.log_prob(x, batch.preference[b : b + 1], tokens).sum()
            total += (own - policy.reference_log_prob(x, tokens).sum()).item() / 8
    assert values["kl"].item() == pytest.approx(total, rel=1e-4)


def test_the_reference_is_computed_while_an_objective_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    referred = threading.Event()
    reference = reference_log_prob

    def then_tell(*args: Any) -> Any:
        made = reference(*args)
        referred.set()
        return made

    class Waits(Letters):
        concurrent = True

        def score(self, prompts, responses):
            assert "plants grow" in responses[0] or referred.wait(20)  # but for the check when it is loaded
            return super().score(prompts, responses)

    monkeypatch.setattr("miepo.data.rollout.reference_log_prob", then_tell)
    given = {"mean": 0.0, "sd": 1.0}
    rollout(tiny_model, tmp_path, objectives=[Waits("a", normalisation=given), Letters("e", normalisation=given)])
    assert referred.is_set()


def test_how_far_another_engine_is_from_the_trainer_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    class Off(TransformersEngine):
        """As if its log-probabilities were off by a quarter of a nat."""

        def draw(self, policy, prompts, preference, *args):
            found = super().draw(policy, prompts, preference, *args)
            with policy.evaluating():
                exact = policy.response_log_prob(prompts, preference.unsqueeze(1), found.tokens).squeeze(2)
            return replace(found, log_prob=torch.where(found.tokens.mask, exact - 0.25, 7.0))

    _, batch, values = rollout(tiny_model, tmp_path, data={"engine": Off()})
    assert batch.responses[0:1].log_prob.shape == batch.responses.tokens[0:1].ids.shape
    assert values["rollout/gap"] == pytest.approx(0.25, abs=1e-5)


def test_sampled_routing_asks_one_objective_per_prompt(tiny_model: Path, tmp_path: Path) -> None:
    asked: dict[str, int] = {"a": 0, "e": 0}

    class Counting(Letters):
        def score(self, prompts, responses):
            asked[self.letter] += len(responses)
            return super().score(prompts, responses)

    given = {"mean": 0.0, "sd": 1.0}
    objectives = [Counting("a", normalisation=given), Counting("e", normalisation=given)]
    trial = 2  # the trial run of setup asks each objective about two texts
    module, batch, _ = rollout(
        tiny_model, tmp_path, objectives=objectives, module={"router": SampleRouter()}, data={"batch_size": 8}
    )
    assert sorted(batch.routing.flatten().tolist()) == [0.0] * 8 + [1.0] * 8
    assert sum(asked.values()) - 2 * trial == 16  # 8 prompts x 2 responses, one objective each
    assert batch.scores.isnan().sum() == 16
    loss, _ = step(module, batch)
    assert loss.isfinite()


@pytest.mark.parametrize("feedback", ["per_objective", "scalarised"])
def test_feedback_under_w_minus(tiny_model: Path, tmp_path: Path, feedback: str) -> None:
    """An objective's own order does not depend on w; the order of the scalarised reward does."""
    module, opposed = {"exploration": Matching(num_counterfactuals=2)}, [Length("long"), Length("short", -1)]
    data = {"feedback": feedback, "batch_size": 8}
    _, batch, _ = rollout(tiny_model, tmp_path, data=data, module=module, objectives=opposed)
    assert batch.counterfactual_labels.shape == (8, 2, 2)
    if feedback == "per_objective":
        expected = batch.labels.unsqueeze(1).expand(-1, 2, -1)
    else:
        difference = batch.scores[:, 0] - batch.scores[:, 1]  # (B, K)
        order = torch.sign((batch.counterfactual * difference.unsqueeze(1)).sum(-1, keepdim=True))  # (B, C, 1)
        usable = ~batch.responses.empty.any(1)
        expected = torch.where(usable[:, None, None], order, 0.0).expand(-1, -1, 2)
        assert not torch.equal(expected, batch.labels.unsqueeze(1).expand(-1, 2, -1))
    assert torch.equal(batch.counterfactual_labels, expected)


@pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])
def test_a_step_on_more_answers_is_the_loss_on_the_best_and_the_worst(
    tiny_model: Path, tmp_path: Path, conditioning
) -> None:
    """Written out: for each objective a DPO loss on its best and its worst answer; no other answer is read."""
    module, batch, logged = rollout(
        tiny_model, tmp_path, conditioning=[conditioning], data={"responses": 5},
        module={"exploration": InfoNCE(0.4, 2)},
    )  # fmt: skip
    policy, y = randomise_adapter(module.policy), batch.responses
    assert batch.scores.shape == (4, 5, 2)
    assert logged["count/empty"] + logged["count/ties"] + logged["count/labels"] == 8
    loss, _ = step(module, batch)
    expected, read = 0.0, set()
    with torch.no_grad():
        for b, prompt in enumerate(batch.prompts):

            def reward(i: int, w: torch.Tensor, b: int = b, prompt: str = prompt) -> torch.Tensor:
                tokens = Tokens(y.tokens.ids[b, i : i + 1], y.tokens.mask[b, i : i + 1])
                x = policy.encode([prompt], w.unsqueeze(0))
                own = policy.log_prob(x, w.unsqueeze(0), tokens).sum()
                return own - policy.reference_log_prob(x, tokens).sum()

            usable = [i for i in range(5) if y.texts[b][i].strip()]
            mine = set()
            for k in range(2):
                order = sorted(usable, key=lambda i: float(batch.scores[b, i, k]))
                if len(order) < 2 or batch.scores[b, order[0], k] == batch.scores[b, order[-1], k]:
                    expected += batch.preference[b, k] * log(2)
                    continue
                best = next(i for i in usable if batch.scores[b, i, k] == batch.scores[b, order[-1], k])
                worst = next(i for i in usable if batch.scores[b, i, k] == batch.scores[b, order[0], k])
                mine |= {best, worst}
                margin = reward(best, batch.preference[b]) - reward(worst, batch.preference[b])
                expected -= batch.preference[b, k] * torch.nn.functional.logsigmoid(module.beta_c * margin)
            for i in mine:
                logits = torch.stack([reward(i, w) for w in (batch.preference[b], *batch.counterfactual[b])]) * 0.4
                expected -= logits.log_softmax(0)[0] / len(mine)
            read |= {(b, i) for i in mine}
    assert {tuple(place) for place in batch.compared.nonzero().tolist()} == read
    assert len(read) < 20
    assert loss.item() == pytest.approx(float(expected) / 4, rel=1e-4)
    assert not batch.reference_log_prob[~batch.compared].any()


@pytest.mark.parametrize("term", [Matching(num_counterfactuals=2), PairwiseInformation(), InfoNCE(0.3, anchors=1)])
@pytest.mark.parametrize("feedback", ["per_objective", "scalarised"])
def test_more_answers_with_every_term(tiny_model: Path, tmp_path: Path, term, feedback: str) -> None:
    """A group in which all are alike makes no pair and no gradient; answers without a pair leave no trace."""
    module, batch, _ = rollout(
        tiny_model, tmp_path, data={"responses": 4, "feedback": feedback}, module={"exploration": term}
    )
    assert batch.pairs.shape == (4, 1 if feedback == "scalarised" else 2, 2)
    assert batch.compared.sum(1).max() <= (2 if feedback == "scalarised" else 4)
    randomise_adapter(module.policy)
    loss, gradients = step(module, batch)
    other = torch.where(batch.compared.unsqueeze(-1), batch.responses.tokens.ids, 5)
    changed = replace(batch, responses=replace(batch.responses, tokens=Tokens(other, batch.responses.tokens.mask)))
    again, same = step(module, changed)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    alike = [Chosen([1.0] * 32, "a"), Chosen([2.0] * 32, "b")]
    module, batch, logged = rollout(
        tiny_model,
        tmp_path,
        data={"responses": 4, "feedback": feedback},
        module={"exploration": term},
        objectives=alike,
    )
    assert logged["count/labels"] == 0 < logged["count/ties"]
    assert not batch.compared.any()
    loss, gradients = step(module, batch)
    assert loss.isfinite()
    assert not any(g.any() for g in gradients.values())


def test_a_cut_answer_is_penalised_where_pairs_are_made(tiny_model: Path, tmp_path: Path) -> None:
    alike = [Chosen([1.0] * 16, "a"), Chosen([2.0] * 16, "b")]
    _, batch, logged = rollout(
        tiny_model, tmp_path, data={"missing_eos_penalty": 0.5, "max_new_tokens": 12, "batch_size": 8}, objectives=alike
    )
    finished = batch.responses.finished.float()
    expected = torch.sign(finished[:, 0] - finished[:, 1]) * ~batch.responses.empty.any(1)
    assert torch.equal(batch.labels, expected.unsqueeze(1).expand(-1, 2))
    assert expected.any()
    assert logged["reward/a"] == 1.0  # what is reported is without it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"responses": 1}, "data.responses must be at least 2, got 1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must not be negative, got -1"),
    ],
)
def test_bad_numbers_of_answers(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OnlinePreferenceDataModule(["x"], **settings)


def test_scalarised_feedback_is_one_order_for_all(tiny_model: Path, tmp_path: Path) -> None:
    _, batch, _ = rollout(tiny_model, tmp_path, data={"feedback": "scalarised"})
    assert torch.equal(batch.labels[:, 0], batch.labels[:, 1])
    scalar = (batch.scores * batch.preference.unsqueeze(1)).sum(-1)
    expected = torch.where(batch.responses.empty.any(1), 0.0, torch.sign(scalar[:, 0] - scalar[:, 1]))
    assert torch.equal(batch.labels[:, 0], expected)


def test_steps_on_a_batch_teach_each_preference_its_own_order(tiny_model: Path, tmp_path: Path) -> None:
    """The same pairs, opposite judges: after some steps the implicit reward orders them as the asked objective does."""
    module, batch, _ = rollout(
        tiny_model, tmp_path, objectives=[Length("long"), Length("short", sign=-1)], module={"exploration": InfoNCE(0.0)},
        data={"batch_size": 8},
    )  # fmt: skip
    rows = torch.arange(4).repeat(2)  # every pair twice: once for each objective
    y, labels, w = batch.responses, torch.tensor([[1.0, -1.0]] * 8), torch.eye(2).repeat_interleave(4, 0)
    batch = replace(
        batch, prompts=[batch.prompts[i] for i in rows], preference=w, routing=w, labels=labels,
        responses=Responses(
            Tokens(y.tokens.ids[rows], y.tokens.mask[rows]), [y.texts[i] for i in rows], y.finished[rows]
        ),
        reference_log_prob=batch.reference_log_prob[rows],
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.policy.adapter_parameters().values(), lr=2e-2)
    losses = []
    for _ in range(40):
        losses.append(step(module, batch)[0].item())
        optimizer.step()
    assert losses[0] == pytest.approx(log(2), abs=0.05)  # the rollout itself made one step
    assert losses[-1] < 0.5
    log_prob = module.policy.response_log_prob(batch.prompts, w.unsqueeze(1), batch.responses.tokens).squeeze(2)
    reward = implicit_reward(log_prob, batch.reference_log_prob, batch.responses.tokens.mask)
    assert torch.equal(torch.sign(reward[:, 0] - reward[:, 1]), (labels * w).sum(-1))


def test_the_schedule_warms_up_and_decays_to_zero(tiny_model: Path, tmp_path: Path) -> None:
    batches = Batches()
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, module={"learning_rate": 0.1, "warmup": 0.25},
        trainer={"callbacks": [batches], "max_steps": 8, "max_epochs": 8}, data={"batch_size": 8},
    )  # fmt: skip
    trainer.fit(module, data)
    rates = [logged["learning_rate"] for logged in batches.logged]
    assert rates[0] == 0.0
    assert rates[2] == pytest.approx(0.1)
    assert rates[1:3] == sorted(rates[1:3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.02
    assert isinstance(trainer.optimizers[0], torch.optim.Adam)


def test_rollouts_do_not_depend_on_the_batch_size(tiny_model: Path, tmp_path: Path) -> None:
    """Preferences and routing go with the prompt's place in the epoch."""
    drawn = []
    for size in (2, 4):
        batches = Batches()
        trainer, module, data = tiny_run(
            tiny_model, tmp_path, data={"batch_size": size}, trainer={"callbacks": [batches], "max_steps": 8 // size}
        )
        trainer.fit(module, data)
        drawn.append(
            (
                [p for b in batches.batches for p in b.prompts],
                torch.cat([b.preference for b in batches.batches]),
                torch.cat([b.counterfactual for b in batches.batches]),
            )
        )
    assert drawn[0][0] == drawn[1][0]
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(drawn[0][2], drawn[1][2])


def test_the_same_seed_gives_the_same_run(tiny_model: Path, tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # initialises the adapter
        batches = Batches()
        trainer, module, data = tiny_run(
            tiny_model, tmp_path, trainer={"callbacks": [batches], "max_steps": 4, "max_epochs": 2}
        )
        trainer.fit(module, data)
        losses.append([logged["loss"] for logged in batches.logged])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta_c": -1.0}, "beta_c must not be negative, got -1"),
        ({"exploration": Matching(), "router": SampleRouter()}, "Matching needs the feedback of all objectives"),
        ({"warmup": 1.0}, "warmup is a fraction"),
    ],
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MIEPO(Policy("x"), **kwargs)


def test_trainer_precision_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"precision": "bf16-mixed"})
    with pytest.raises(UserError, match=r"expected trainer.precision 32-true, got bf16-mixed"):
        trainer.fit(module, data)


def test_training_step_is_short() -> None:
    import ast
    import inspect
    import textwrap

    for part in (MIEPO.training_step, MIEPO.terms):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body[1:]
        assert body[-1].end_lineno - body[0].lineno < 25


@pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])
@pytest.mark.parametrize(
    "exploration",
    [InfoNCE(0.3, num_counterfactuals=2), InfoNCE(0.3, anchors=1), Matching(), PairwiseInformation(), InfoNCE(0)],
)
def test_prompts_in_several_passes_have_the_same_loss_gradient_and_log(
    tiny_model: Path, tmp_path: Path, conditioning, exploration
) -> None:
    settings = {"conditioning": [conditioning], "module": {"exploration": exploration}}
    module, batch, _ = rollout(tiny_model, tmp_path, data={"batch_size": 5}, **settings)
    randomise_adapter(module.policy)
    results, calls, terms = [], [], module.terms
    module.terms = lambda part: (calls.append(len(part)), terms(part))[1]
    for groups in ([slice(0, 5)], [slice(0, 2), slice(2, 5)], None):
        if groups is None:
            del module.policy.micro_batches
            module.policy.max_tokens_per_micro_batch = 1
        else:
            module.policy.micro_batches = lambda *_: groups  # noqa: B023
        values: dict[str, torch.Tensor] = {}
        log_step = MIEPO.log_terms
        module.log = lambda name, value, **_: values.__setitem__(name, value)  # noqa: B023
        module.log_dict = lambda entries, **_: values.update(entries)  # noqa: B023
        module.lr_schedulers = lambda: SimpleNamespace(get_last_lr=lambda: [0.0])
        module.zero_grad()
        module.log_terms = lambda *args: log_step(module, *args)  # noqa: B023
        module.training_step(batch, 0)["loss"].backward()
        gradients = {
            n: p.grad for n, p in module.policy.adapter_parameters().items() if p.grad is not None and p.grad.any()
        }
        results.append((gradients, {k: float(v) for k, v in values.items()}))
    assert calls == [5, 2, 3, 1, 1, 1, 1, 1]
    for gradients, values in results[1:]:
        torch.testing.assert_close(gradients, results[0][0], rtol=1e-4, atol=1e-6)
        assert values == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)


def test_a_policy_without_conditioning_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(tiny_model, tmp_path)
    module.policy.conditioning = []
    with pytest.raises(UserError, match="at least one conditioning"):
        trainer.fit(module, data)


def test_of_one_objective_there_is_nothing_to_explore(tiny_model: Path, tmp_path: Path) -> None:
    """Online DPO: w+ = w- = (1), and the term would add noise to the gradient alone; all figures of a run are there."""
    callbacks = [ParetoFront(), Steerability(), PreferenceInformation(), EvaluationTable(), SampleTable()]
    trainer = {"callbacks": [batches := Batches(), *callbacks], "max_steps": 1, "limit_val_batches": 1.0}
    run = tiny_run(
        tiny_model, tmp_path, objectives=[Letters("e")], module={"exploration": InfoNCE(0.3)}, trainer=trainer
    )
    run[0].fit(run[1], run[2])
    module, batch = run[1], batches.batches[0]
    assert batch.counterfactual.shape[1] == 0
    randomise_adapter(module.policy)
    _, gradients = step(module, batch)
    module.exploration.beta_w = 0.0
    _, plain = step(module, batch)
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    run[0].validate(run[1], run[2], verbose=False)
    assert module.evaluation is not None and module.evaluation.means is not None
    ((mean,),) = module.evaluation.means.tolist()
    assert run[0].callback_metrics["front/hv"].item() == pytest.approx(max(mean + 1, 0))
    assert list((tmp_path / "fronts").glob("*.png"))


def test_a_policy_that_orders_no_pair_agrees_by_half(tiny_model: Path, tmp_path: Path) -> None:
    """At the first step all margins are 0; after it, agreement is the share of pairs in the objective's order."""
    module, batch, logged = rollout(tiny_model, tmp_path)
    for k, name in enumerate(module.names):
        assert (batch.labels[:, k] != 0).any()
        assert logged[f"agreement/{name}"] == 0.5
    randomise_adapter(module.policy)
    seen: dict[str, float] = {}
    module.log, module.log_dict = lambda *_, **__: None, lambda values, **_: seen.update(values)
    module.training_step(batch, 0)
    log_prob = module.policy.response_log_prob(batch.prompts, batch.preference.unsqueeze(1), batch.responses.tokens)
    reward = implicit_reward(log_prob.squeeze(2), batch.reference_log_prob, batch.responses.tokens.mask)
    for k, name in enumerate(module.names):
        labelled = batch.labels[:, k] != 0
        right = torch.sign(reward[:, 0] - reward[:, 1])[labelled] == batch.labels[labelled, k]
        assert float(seen[f"agreement/{name}"]) == pytest.approx(right.float().mean().item())
    assert any(seen[f"agreement/{name}"] != 0.5 for name in module.names)  # with the sign turned it would be another


@pytest.mark.parametrize("term", [PairwiseInformation(), ClippedInfoNCE(0.3, clip=1.0), InfoNCE(0.3)])
@pytest.mark.parametrize("every", [1, 50])
def test_information_is_of_the_policy_without_dropout(tiny_model: Path, tmp_path: Path, term: Any, every: int) -> None:
    """Where it is learnt from at every step, and where it is logged alone at the steps that are logged."""
    settings = {"policy": {"lora_dropout": 0.5}, "module": {"exploration": term}}
    module, batch, _ = rollout(tiny_model, tmp_path, **settings, trainer={"log_every_n_steps": every})
    policy = randomise_adapter(module.policy).train()
    seen, passes = {}, []
    plain, read = module.contrast, policy.response_log_prob
    module.contrast = lambda *arguments: seen.setdefault("contrast", plain(*arguments))
    policy.response_log_prob = lambda *arguments: (passes.append(policy.training), read(*arguments))[1]
    module.log_terms = lambda *_: None
    torch.manual_seed(0)
    module.training_step(batch, 0)
    needed = every == 1 or term.reads_information
    assert (False in passes) == needed  # another pass, without dropout, or none
    with policy.evaluating():
        both = torch.cat([batch.preference.unsqueeze(1), batch.counterfactual], 1)
        found = read(batch.prompts, both, batch.responses.tokens, batch.read_under).sum(-1)
    if needed:
        torch.testing.assert_close(seen["contrast"].log_prob, found[:, :, 0])
        torch.testing.assert_close(seen["contrast"].counterfactual_log_prob, found[:, :, 1:])
    else:
        assert not torch.allclose(seen["contrast"].log_prob, found[:, :, 0])
    assert policy.training


def test_a_prompt_is_trained_on_or_evaluated_on(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [f"food {i % 5}" for i in range(20)]
    run = tiny_run(
        tiny_model, tmp_path, data={"prompts": prompts, "validation_prompts": None}, trainer={"max_steps": 1}
    )
    with caplog.at_level("INFO"):
        run[0].fit(run[1], run[2])
    assert (len(run[2].train_set), len(set(run[2].train_set)), len(set(run[2].validation_set))) == (16, 4, 1)
    assert not set(run[2].train_set) & set(run[2].validation_set)
    assert "12 of 16 training prompts repeat another one" in caplog.text


class Seeds(TransformersEngine):
    """Keeps the seed of every prompt and what its preference was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[float, ...], str]] = []

    def draw(self, policy, prompts, preference, count, max_new_tokens, seeds) -> Responses:
        self.seen += zip(seeds, map(tuple, preference.tolist()), prompts, strict=True)
        return super().draw(policy, prompts, preference, count, max_new_tokens, seeds)


def test_every_draw_has_a_seed_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """Of training, of the measurement of the normalisation and of an evaluation, under every vector of its grid."""
    data = {"engine": Seeds(), "grid": 3, "normalise_on": 4}
    trainer, module, online = tiny_run(
        tiny_model, tmp_path, data=data, trainer={"max_steps": 2, "limit_val_batches": 1.0}
    )
    trainer.fit(module, online)
    seeds = [seed for seed, _, _ in data["engine"].seen]
    assert len(seeds) == 4 + 2 * 4 + 2 * 3
    assert len(set(seeds)) == len(seeds)
    before = data["engine"].seen[-6:]
    data["engine"].seen.clear()
    trainer.validate(module, online, verbose=False)  # the same draws at every evaluation, so that they compare
    assert data["engine"].seen == before


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")
@pytest.mark.parametrize("callback", [StochasticWeightAveraging(0.1), EMAWeightAveraging()])
def test_averages_of_whole_networks_are_refused(tiny_model: Path, tmp_path: Path, callback: Callback) -> None:
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"callbacks": [callback]})
    with pytest.raises(UserError, match=f"{type(callback).__name__} averages whole networks and not an adapter"):
        trainer.fit(module, data)
