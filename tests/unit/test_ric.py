"""Rewards-in-Context: targets, the quantile filter, stages, relabelling, equal work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from miepo.errors import UserError
from miepo.methods import RewardsInContext, RewardsInContextDataModule, TargetConditioning
from miepo.methods.ric.conditioning import preference_to_target, score_range
from miepo.methods.ric.data import Pool, good_at_something, join, non_dominated
from miepo.objectives import RetryingObjective
from miepo.policy import GatedConditioning, Policy
from miepo.seeding import RandomStream, generator, torch_seeds
from miepo.types import SupervisedBatch, Tokens
from tests.helpers.fit import PROMPTS, tiny_run
from tests.helpers.tiny import Length, Letters, Moody, fails


def ric_run(
    model: Path, root: Path, trainer: dict[str, Any] | None = None, **data: Any
) -> tuple[Trainer, RewardsInContext, RewardsInContextDataModule]:
    fitted, _, _ = tiny_run(model, root, trainer={"max_steps": -1, "max_epochs": 2, **(trainer or {})})
    policy = Policy(str(model), [TargetConditioning()], lora_rank=2, lora_alpha=4, lora_dropout=0.0, dtype="float32")
    module = RewardsInContext(policy, learning_rate=1e-2, online_learning_rate=1e-3)
    settings = {"validation_prompts": ["the rain"], "batch_size": 2, "max_new_tokens": 12, "normalise_on": 8}
    return fitted, module, RewardsInContextDataModule(prompts=PROMPTS, **settings | data)


class Watch:
    """The batches a module trains on and the stage and rate at each."""

    def __init__(self, module: RewardsInContext, data: RewardsInContextDataModule) -> None:
        self.batches: list[SupervisedBatch] = []
        self.stages: list[int] = []
        self.rates: list[float] = []
        self.pools: dict[int, Any] = {}
        step = module.training_step

        def training_step(batch: SupervisedBatch, batch_idx: int) -> Any:
            self.batches.append(batch)
            self.stages.append(data.stage)
            self.pools[data.stage] = data.pool
            self.rates.append(module.optimizers().param_groups[0]["lr"])
            return step(batch, batch_idx)

        module.training_step = training_step


def test_preference_to_target_by_hand() -> None:
    assert preference_to_target([1.0, 0.0], -3.0, 4.0) == [4.0, -3.0]
    middle = preference_to_target([0.5, 0.5], -3.0, 4.0)
    assert middle == pytest.approx([0.5**0.5 * 7 - 3] * 2)  # not half-way: w / ||w||
    low, high = score_range(5000)
    assert -5 < low < -3
    assert 3 < high < 5
    assert score_range(5000) == (low, high)


def test_the_quantile_filter_keeps_what_is_good_at_anything() -> None:
    scores = torch.tensor([[0.0, 9.0], [1.0, 0.0], [2.0, 1.0], [3.0, 2.0], [float("nan"), 3.0]])
    # thresholds at 0.7: 2.1 of (0, 1, 2, 3) and 2.8 of (0, 1, 2, 3, 9)
    assert good_at_something(scores, 0.7).tolist() == [True, False, False, True, True]


def test_each_score_has_a_quantile_of_its_own_and_reaching_it_is_enough() -> None:
    scores = torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0]])  # medians 1 and 20; of all six it is 6
    assert good_at_something(scores, 0.5).tolist() == [False, True, True]
    nothing = good_at_something(scores[:0], 0.5)
    assert nothing.tolist() == []
    assert nothing.dtype == torch.bool


def test_a_pool_keeps_by_either_rule() -> None:
    scores = torch.tensor([[0.0, 9.0], [1.0, 8.0], [1.0, 7.0], [2.0, 0.0]])
    tokens = Tokens(torch.arange(8).view(4, 2), torch.ones(4, 2, dtype=torch.bool))
    pool = Pool(["a", "b", "c", "d"], tokens, scores)
    assert pool.good("quantile", 0.9).prompts == ["a", "d"]
    assert pool.good("non_dominated", 0.9).prompts == ["a", "b", "d"]
    assert pool.good("non_dominated", 0.9).responses.ids.tolist() == [[0, 1], [2, 3], [6, 7]]


def test_pools_join_at_the_width_of_the_widest() -> None:
    narrow = Pool(["a"], Tokens(torch.tensor([[5]]), torch.tensor([[True]])), torch.tensor([[0.5]]))
    wide = Pool(["b"], Tokens(torch.tensor([[6, 7]]), torch.tensor([[True, True]])), torch.tensor([[1.5]]))
    both = join([narrow, wide], 3)
    assert both.prompts == ["a", "b"]
    assert both.responses.ids.tolist() == [[5, 3], [6, 7]]
    assert both.responses.mask.tolist() == [[True, False], [True, True]]
    assert both.scores.tolist() == [[0.5], [1.5]]


def test_the_non_dominated_set_keeps_what_nothing_beats() -> None:
    nan = float("nan")
    scores = torch.tensor([[0.0, 9.0], [1.0, 0.0], [2.0, 1.0], [3.0, 2.0], [3.0, 2.0], [nan, 30.0], [0.0, 8.0]])
    assert non_dominated(scores).tolist() == [True, False, False, True, True, False, False]
    assert non_dominated(torch.tensor([[1.0], [3.0], [nan], [3.0]])).tolist() == [False, True, False, True]
    assert non_dominated(torch.full((2, 2), nan)).tolist() == [False, False]
    assert non_dominated(torch.zeros(0, 2)).tolist() == non_dominated(torch.zeros(0, 1)).tolist() == []
    many = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    beaten = ((many.unsqueeze(0) >= many.unsqueeze(1)).all(-1) & (many.unsqueeze(0) > many.unsqueeze(1)).any(-1)).any(1)
    assert non_dominated(many).tolist() == (~beaten).tolist()


def test_what_is_written() -> None:
    c = TargetConditioning()
    assert c.write_scores([1.26, -0.04], ["a", "b"]) == " <a_score> 1.3 <b_score> 0.0"
    low, high = score_range(5000)
    assert c.write([1.0, 0.0], ["a", "b"]) == f" <a_score> {high:.1f} <b_score> {low:.1f}"
    assert c.markers(["a"]) == ["<a_score>"]


def test_stages_relabelling_filter_and_equal_work(tiny_model: Path, tmp_path: Path) -> None:
    """8 prompts, 2 a step, 2 epochs: 8 steps; 4 offline, then 2 rounds of 2."""
    trainer, module, data = ric_run(tiny_model, tmp_path)
    watch = Watch(module, data)
    trainer.fit(module, data)
    assert data.plan(8) == [4, 6, 8]
    assert watch.stages == [0, 0, 0, 0, 1, 1, 2, 2]
    assert watch.rates == pytest.approx([1e-2] * 4 + [1e-3] * 4)
    assert [len(b) for b in watch.batches] == [4] * 8  # rows of a step: two for each prompt, as for a pair
    assert data.scored_responses == 2 * 8 * 2  # every prompt of the run, twice, as for any online method
    objectives = module.objectives
    for batch in watch.batches:  # relabelled: the scores written are those that the response got
        texts = [module.policy.tokenizer.decode(i[m], skip_special_tokens=True).strip() for i, m in zip(batch.responses.ids, batch.responses.mask, strict=True)]  # fmt: skip
        got = torch.stack([o.normalise(o.reward(batch.prompts, texts)) for o in objectives], -1)
        torch.testing.assert_close(batch.scores, got)
    first = watch.pools[0]
    for stage in (1, 2):  # both parts were filtered, so the rounds hold fewer rows than were scored
        pool = watch.pools[stage]
        assert len(pool) < 8 + len(first)
        kept = first.good("quantile", 0.7)
        assert len(kept) < len(first)
        assert pool.prompts[-len(kept) :] == kept.prompts  # the rest is fresh
        assert torch.equal(pool.scores[-len(kept) :], kept.scores)
    assert len(first) > 8


def test_the_rule_of_the_configuration_filters_the_rounds(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path, selection="non_dominated")
    watch = Watch(module, data)
    trainer.fit(module, data)
    kept = watch.pools[0].good("non_dominated", 0.7)
    assert 0 < len(kept) < len(watch.pools[0].good("quantile", 0.7))
    assert torch.equal(watch.pools[1].scores[-len(kept) :], kept.scores)


def test_a_step_is_the_likelihood_of_responses_under_their_scores(tiny_model: Path, tmp_path: Path) -> None:
    """The loss of every step, again, one response at a time, before the step changed the policy."""
    trainer, module, data = ric_run(tiny_model, tmp_path)
    losses: list[float] = []
    expected: list[float] = []
    step = module.training_step

    def training_step(batch: SupervisedBatch, batch_idx: int) -> Any:
        policy, total, count = module.policy, 0.0, 0
        with torch.no_grad():
            for n, prompt in enumerate(batch.prompts):
                text = TargetConditioning().write_scores(batch.scores[n].tolist(), module.names)
                given = policy.template.encode(prompt, text)
                wanted = batch.responses.ids[n][batch.responses.mask[n]].tolist()
                logits = policy.model(input_ids=torch.tensor([given + wanted])).logits[0].log_softmax(-1)
                total += sum(logits[len(given) - 1 + t, token].item() for t, token in enumerate(wanted))
                count += len(wanted)
        expected.append(-total / count)
        result = step(batch, batch_idx)
        losses.append(result["loss"].item())
        means = dict(zip(figures, batch.scores.mean(0).tolist(), strict=True))
        for key, value in (means | {"loss": expected[-1]}).items():
            assert trainer.callback_metrics[key].item() == pytest.approx(value, rel=1e-4), key
        assert trainer.progress_bar_metrics["loss"] == pytest.approx(expected[-1], rel=1e-4)
        return result

    module.training_step = training_step
    figures = ["reward/letter_e", "reward/length"]
    trainer.fit(module, data)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses)) == 8


def test_prompts_preferences_and_seeds_are_those_of_an_online_method(tiny_model: Path, tmp_path: Path) -> None:
    """The same prompts in the same order, under the same draws, whatever the stage."""
    trainer, module, data = ric_run(tiny_model, tmp_path, seed=5)
    asked: list[tuple[Any, ...]] = []
    sample = data.engine.sample

    def watched(policy: Policy, texts: Any, preference: Any, count: int, length: int, seeds: Any) -> Any:
        if data.stage >= 0 or data.scored_responses or data.offline_pool or trainer.training:
            asked.append((list(texts), preference.clone(), count, length, seeds))
        return sample(policy, texts, preference, count, length, seeds)

    data.engine.sample = watched
    trainer.fit(module, data)
    prompts, order = data._train_prompts, data._positions
    wanted = []
    for batch in range(8):
        epoch, positions = batch // 4, order[batch % 4 * 2 : batch % 4 * 2 + 2]
        draws = [data.preferences.draw(generator(RandomStream.PREFERENCE, 5, epoch, p), 1, 2)[0] for p in positions]
        seeds = torch_seeds(RandomStream.SAMPLING, 5, [epoch] * 2, positions)
        wanted.append(([prompts.at(epoch, p) for p in positions], torch.tensor(np.array(draws)).float(), seeds))
    asked = asked[-8:]
    assert [row[0] for row in asked] == [row[0] for row in wanted]
    assert all(torch.equal(row[1], other[1]) for row, other in zip(asked, wanted, strict=True))
    assert [row[4] for row in asked] == [row[2] for row in wanted]
    assert {row[2:4] for row in asked} == {(2, 12)}


def test_a_step_imitates_the_next_rows_of_a_shuffled_pool(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path, seed=5)
    watch = Watch(module, data)
    trainer.fit(module, data)
    for stage, begin, end in ((0, 0, 4), (1, 4, 6), (2, 6, 8)):
        pool, rng = watch.pools[stage], generator(RandomStream.SHUFFLE, 5, stage, 1)
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(2)])  # once more where the pool is too small
        for step in range(begin, end):
            rows = pool.rows(order[(step - begin) * 4 :][:4])
            batch = watch.batches[step]
            assert batch.prompts == rows.prompts
            assert torch.equal(batch.responses.ids, rows.responses.ids)
            assert torch.equal(batch.scores, rows.scores)
            assert batch.tokens == rows.responses.mask.sum()


@pytest.mark.parametrize(
    ("trainer", "asked"),
    [
        ({"max_epochs": 2}, {8}),
        ({"max_epochs": 1}, {4}),
        ({"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 2}, {3, 6}),  # of steps, of batches
        ({"max_epochs": -1, "max_steps": 1}, {1}),
        ({"max_epochs": 2, "max_steps": 100}, {8}),
    ],
)
def test_stages_divide_what_the_run_has(
    tiny_model: Path, tmp_path: Path, trainer: dict[str, Any], asked: set[int]
) -> None:
    fitted, module, data = ric_run(tiny_model, tmp_path, trainer={"limit_val_batches": 1, **trainer})
    plan, seen = data.plan, set()

    def watched(steps: int) -> list[int]:
        seen.add(steps)
        return plan(steps)

    data.plan = watched
    fitted.fit(module, data)
    assert seen == asked


def test_where_stages_end() -> None:
    def ends(steps: int, offline: float, rounds: int) -> list[int]:
        return RewardsInContextDataModule(prompts=PROMPTS, offline=offline, rounds=rounds).plan(steps)

    assert ends(8, 0.5, 2) == [4, 6, 8]
    assert ends(8, 0.01, 1) == [1, 8]  # at least one
    assert ends(10, 0.4, 3) == [4, 6, 8, 10]
    assert ends(8, 1.0, 0) == [8]


@pytest.mark.parametrize(("rate", "rates"), [(0.03, [0.01, 0.02, 0.03, 0.03] + [0.006] * 4), (0.0, [0.0] * 8)])
def test_the_rate_rises_in_the_offline_stage_and_is_constant_online(
    tiny_model: Path, tmp_path: Path, rate: float, rates: list[float]
) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path)
    module = RewardsInContext(module.policy, learning_rate=rate, online_learning_rate=0.006, warmup=0.25)
    watch = Watch(module, data)
    trainer.fit(module, data)
    assert watch.rates == pytest.approx(rates)


def test_what_has_no_score_or_no_text_is_not_imitated(tiny_model: Path, tmp_path: Path) -> None:
    """One response without a score among the sixteen of the offline stage, and one that is empty."""
    trainer, module, data = ric_run(tiny_model, tmp_path, rounds=0, offline=1.0, trainer={"max_epochs": 1})
    unscored, sample = [float("nan")], data.engine.sample

    def judge(prompts: Any, responses: Any) -> list[float]:
        return [unscored.pop() if unscored and len(responses) == 4 else float(len(r)) for r in responses]

    def watched(*args: Any) -> Any:
        made = sample(*args)
        if trainer.training and not emptied:
            emptied.append(True)
            made.tokens.mask[-1, -1] = False
            made.texts[-1][-1] = ""
        return made

    emptied: list[bool] = []
    data.engine.sample = watched
    for objective in (o for o in trainer.callbacks if hasattr(o, "normalisation")):
        objective.calibrate(torch.tensor([0.0, 1.0]))
    next(o for o in trainer.callbacks if isinstance(o, Length)).score = judge
    watch = Watch(module, data)
    trainer.fit(module, data)
    assert emptied
    assert not unscored
    assert data.scored_responses == 16
    assert len(watch.pools[0]) == 14
    assert watch.pools[0].scores.isfinite().all()


def test_the_offline_stage_samples_the_base_on_the_plain_prompt(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path)
    written: list[tuple[int, str]] = []
    sample = data.engine.sample

    def watched(policy: Policy, *args: Any) -> Any:
        if trainer.training and data.scored_responses < 32:  # not the calibration and not an evaluation
            written.append((data.stage, policy.preference_text([1.0, 0.0])))
        return sample(policy, *args)

    data.engine.sample = watched
    for o in (objectives := [c for c in trainer.callbacks if hasattr(c, "normalisation")]):
        o.calibrate(torch.tensor([0.0, 1.0]))
    assert objectives
    trainer.fit(module, data)
    offline = [text for stage, text in written if stage == -1]
    online = [text for stage, text in written if stage >= 0]
    assert offline == [""] * 4
    assert len(online) == 4
    assert all("_score>" in text for text in online)


def test_offline_rows_from_a_file(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": f"{p} eee"} for p in PROMPTS] + [{"prompt": "the garden", "response": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    trainer, module, data = ric_run(
        tiny_model, tmp_path, offline_rows=str(tmp_path / "rows.jsonl"), max_new_tokens=20, rounds=0, offline=1.0
    )
    watch = Watch(module, data)
    trainer.fit(module, data)
    assert len(watch.pools[0]) == 8  # silence is nothing to imitate
    assert watch.batches[0].responses.mask.sum(-1).min() > 2
    tokens = watch.pools[0].responses
    ends = {int(i[m][-1]) for i, m in zip(tokens.ids, tokens.mask, strict=True) if m.sum() < 20}
    assert ends == {module.policy.end_ids[0]}  # whole responses end
    assert data.scored_responses == 9
    for prompt, row, mask in zip(watch.pools[0].prompts, tokens.ids, tokens.mask, strict=True):
        assert module.policy.tokenizer.decode(row[mask], skip_special_tokens=True) == f"{prompt} eee"[:20]


def test_one_offline_row_is_enough_and_a_long_prompt_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "food", "response": "eee"}, {"prompt": "food " * 500, "response": "eee"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    trainer, module, data = ric_run(
        tiny_model, tmp_path, offline_rows=str(tmp_path / "rows.jsonl"), rounds=0, offline=1.0, overlong="drop"
    )
    with pytest.warns(UserWarning, match="1 of 2 offline prompts do not fit the context"):
        trainer.fit(module, data)
    assert data.pool.prompts == ["food"]


def test_a_resume_in_a_stage_goes_on_with_its_rows(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path)
    trainer.fit(module, data)
    copy = RewardsInContextDataModule(prompts=PROMPTS, batch_size=2)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    copy.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert copy.stage == data.stage == 2
    assert copy.scored_responses == data.scored_responses
    assert copy.pool.prompts == data.pool.prompts
    assert torch.equal(copy.pool.responses.ids, data.pool.responses.ids)
    assert torch.equal(copy.offline_pool.scores, data.offline_pool.scores)


def test_the_target_reaches_the_policy_at_evaluation(tiny_model: Path) -> None:
    policy = Policy(str(tiny_model), [TargetConditioning()], lora_rank=2, dtype="float32").build(("a", "b"))
    high = score_range(5000)[1]
    assert f"<a_score> {high:.1f}" in policy.template.text("x", policy.preference_text([1.0, 0.0]))
    with policy.silent():
        assert policy.preference_text([1.0, 0.0]) == ""


def test_what_an_objective_gave_up_while_a_pool_was_made_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = ric_run(tiny_model, tmp_path)
    moody = Moody([lambda: None] * 2 + [fails] * 3)  # loaded, normalised by what it has; then down for three batches
    trainer.callbacks.append(RetryingObjective(moody, retries=0, on_failure="skip"))
    counted = []
    step = module.training_step

    def training_step(batch: SupervisedBatch, batch_idx: int) -> Any:
        made = step(batch, batch_idx)
        counted.append(float(trainer.callback_metrics["count/failed/moody"]))
        return made

    module.training_step = training_step
    with pytest.warns(UserWarning, match="moody is left out of a batch"):
        trainer.fit(module, data)
    assert counted[0] == 3
    assert sum(counted) == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"offline": 0.0}, "data.offline is a share of the steps, above 0 and at most 1, got 0"),
        ({"rounds": -1}, "data.rounds must be positive, or 0 with data.offline 1, got -1"),
        ({"rounds": 0}, "data.rounds must be positive, or 0 with data.offline 1, got 0 with 0.5"),
        ({"selection": "best"}, "data.selection must be quantile or non_dominated, got 'best'"),
        ({"quantile": 1.0}, "data.quantile must be at least 0 and below 1"),
    ],
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardsInContextDataModule(prompts=PROMPTS, **kwargs)


def test_targets_span_what_was_asked_for() -> None:
    assert TargetConditioning(draws=2).bounds == score_range(2)
    assert TargetConditioning(bounds=(-1.0, 2.0)).bounds == (-1.0, 2.0)
    for bounds in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(UserError, match=r"TargetConditioning.bounds must be the lowest and the highest target"):
            TargetConditioning(bounds=bounds)
    with pytest.raises(UserError, match=r"TargetConditioning.draws must be at least 2, got 1"):
        TargetConditioning(draws=1)


def test_rates(tiny_model: Path) -> None:
    policy = Policy(str(tiny_model), [TargetConditioning()])
    module = RewardsInContext(policy)
    assert (module.learning_rate, module.online_learning_rate, module.warmup) == (1e-4, 1e-5, 0.0)
    assert RewardsInContext(policy, online_learning_rate=0.0).online_learning_rate == 0
    for rate in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="online_learning_rate must not be negative, got"):
            RewardsInContext(policy, online_learning_rate=rate)
    with pytest.raises(UserError, match="got GatedConditioning, TargetConditioning"):
        RewardsInContext(Policy(str(tiny_model), [GatedConditioning(), TargetConditioning()]))


def test_defaults_of_the_stages() -> None:
    data = RewardsInContextDataModule(prompts=PROMPTS)
    assert (data.offline, data.rounds, data.selection, data.quantile) == (0.5, 2, "quantile", 0.7)
    assert (data.stage, data.pool, data.offline_pool) == (-1, None, None)
    assert RewardsInContextDataModule(prompts=PROMPTS, quantile=0.0).quantile == 0
    assert RewardsInContextDataModule(prompts=PROMPTS, selection="non_dominated").selection == "non_dominated"
    with pytest.raises(UserError, match=r"data.offline is a share of the steps, above 0 and at most 1, got 1.5"):
        RewardsInContextDataModule(prompts=PROMPTS, offline=1.5)


def test_parts_that_do_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs one conditioning, TargetConditioning, got GatedConditioning"):
        RewardsInContext(Policy("x", [GatedConditioning()]))
    trainer, module, _ = ric_run(tiny_model, tmp_path)
    with pytest.raises(UserError, match="needs data RewardsInContextDataModule, got OnlinePreferenceDataModule"):
        trainer.fit(module, tiny_run(tiny_model, tmp_path)[2])
    trainer, module, _ = tiny_run(tiny_model, tmp_path, objectives=[Letters("e"), Length()])
    with pytest.raises(UserError, match="needs model RewardsInContext, got MIEPO"):
        trainer.fit(module, RewardsInContextDataModule(prompts=PROMPTS))
