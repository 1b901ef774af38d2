from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from miepo.callbacks import PreferenceInformation
from miepo.callbacks.preference_information import grid_log_prob
from miepo.errors import UserError
from miepo.losses import alignment_loss
from miepo.metrics import (
    PreferenceInformationMetric,
    feedback_information,
    infonce_bound,
    pointwise_information,
    t_interval,
)
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.preferences import evaluation_grid
from miepo.rollout import TransformersEngine
from miepo.types import EvaluationBatch
from tests.helpers.fit import tiny_run
from tests.helpers.tiny import randomise_adapter, tiny_policy
from tools.study.record import divergence


def channel(m: int, error: float) -> tuple[torch.Tensor, float]:
    """A symmetric channel on m symbols, p(y | w) ``(m, m)``, and its information under uniform input, by its formula."""
    p = torch.full((m, m), error / (m - 1), dtype=torch.float64)
    p.fill_diagonal_(1 - error)
    h = -(1 - error) * log(1 - error) - error * log(error / (m - 1)) if 0 < error < 1 else 0.0
    return p, log(m) - h


@pytest.mark.parametrize("m", [2, 5, 11])
@pytest.mark.parametrize("error", [0.05, 0.3])
def test_the_estimate_is_the_information_of_a_known_channel(m: int, error: float) -> None:
    p, exact = channel(m, error)
    w = torch.arange(m).repeat_interleave(m)
    y = torch.arange(m).repeat(m)
    values = pointwise_information(p.log()[:, y].T, w)  # every (w, y) once
    assert (p[w, y] * values).sum().item() / m == pytest.approx(exact, rel=1e-12)

    g = torch.Generator().manual_seed(0)
    n = 4000
    w = torch.arange(m).repeat(n)
    y = torch.multinomial(p, n, replacement=True, generator=g).T.flatten()  # sampled, as in a run
    metric = PreferenceInformationMetric(m)
    for part in torch.arange(n * m).split(997):
        metric.update(p.log()[:, y[part]].T, w[part], part // m)
    result = metric.compute()
    sd = pointwise_information(p.log()[:, y].T, w).std().item() / (n * m) ** 0.5
    assert result["preference"].item() == pytest.approx(exact, abs=5 * sd)
    assert result["preference_low"] < exact + 2 * sd
    assert result["preference_high"] > exact - 2 * sd
    assert result["ceiling"].item() == pytest.approx(log(m))


@pytest.mark.parametrize("m", [1, 2, 7])
def test_no_value_exceeds_the_ceiling(m: int) -> None:
    log_prob = 1000 * torch.randn(200, m, generator=torch.Generator().manual_seed(1))
    assert pointwise_information(log_prob, torch.arange(200) % m).max() <= torch.tensor(log(m))


def test_perfect_identification_reaches_the_ceiling_and_ignorance_gives_zero() -> None:
    perfect = torch.full((3, 3), -torch.inf).fill_diagonal_(-5.0)
    torch.testing.assert_close(pointwise_information(perfect, torch.arange(3)), torch.full((3,), log(3)))
    torch.testing.assert_close(pointwise_information(torch.full((3, 3), -700.0), torch.arange(3)), torch.zeros(3))


def test_infonce_bound_is_below_the_information_and_its_ceiling() -> None:
    p, exact = channel(6, 0.2)
    g = torch.Generator().manual_seed(0)
    w = torch.randint(0, 6, (40_000,), generator=g)
    y = torch.multinomial(p[w], 1, generator=g).squeeze(1)
    previous = 0.0
    assert infonce_bound(torch.zeros(2, 1), torch.zeros(2, 1, 3)).shape == (2, 1)
    torch.testing.assert_close(
        infonce_bound(torch.zeros(4, 1), torch.full((4, 1, 2), -torch.inf)), torch.full((4, 1), log(3))
    )
    for c in (1, 4, 16):
        others = torch.randint(0, 6, (40_000, c), generator=g)
        bound = infonce_bound(p[w, y].log(), p[others, y.unsqueeze(1)].log())
        assert bound.max() <= log(1 + c) + 1e-9
        assert previous < bound.mean() < exact + 0.01
        previous = bound.mean().item()


def test_feedback_information_is_log_two_minus_the_loss_on_labelled_pairs() -> None:
    rewards, labels = torch.tensor([[[3.0, 1.0], [1.0, 5.0], [0.0, 9.0]]]), torch.tensor([[1.0, 1.0, 0.0]])
    value = feedback_information(rewards[..., 0] - rewards[..., 1], labels, 0.1)
    torch.testing.assert_close(value[0, :2], log(2) - alignment_loss(rewards, labels, 0.1)[0, :2])
    assert value[0, 2].isnan()


def test_information_is_the_mean_of_the_prompts_means() -> None:
    metric = PreferenceInformationMetric(2)
    log_prob = torch.tensor([[-1.0, -3.0], [-1.0, -1.0], [-2.0, -1.0], [-1.0, -9.0]])
    metric.update(log_prob, torch.tensor([0, 0, 0, 0]), torch.tensor([8, 8, 3, 8]))
    each = pointwise_information(log_prob.double(), torch.zeros(4, dtype=torch.long))
    prompts = torch.stack([each[2], each[[0, 1, 3]].mean()])
    found = metric.compute()
    assert set(found) == {"preference", "preference_low", "preference_high", "ceiling"}
    assert torch.equal(
        torch.stack([found[f"preference{s}"] for s in ("", "_low", "_high")]), torch.stack(t_interval(prompts))
    )
    assert found["preference"].dtype == torch.float64


CONDITIONINGS = pytest.mark.parametrize("conditioning", [GatedConditioning(), PromptConditioning()])


def answers(policy: Policy, grid: torch.Tensor) -> EvaluationBatch:
    """Of three prompts, in an order of no kind, more of one than of another."""
    positions = [4, 0, 4, 2, 0, 4]
    index = torch.tensor([0, 0, 1, 1, 1, 0]) * (len(grid) - 1)
    prompts = [("the garden", "food", "rain comes in spring")[p // 2] for p in positions]
    made = TransformersEngine().sample(policy, prompts, grid[index], 1, 5, 0)
    return EvaluationBatch(prompts, positions, index, grid[index], made, None)


@CONDITIONINGS
def test_a_prompt_is_read_once_for_all_its_answers(tiny_model: Path, conditioning) -> None:
    """As if every answer were read by itself, whatever the order of the batch and however many answers a prompt has."""
    policy, grid = randomise_adapter(tiny_policy(tiny_model, [conditioning])), torch.eye(2)
    with policy.evaluating():
        batch = answers(policy, grid)
        found = grid_log_prob(policy, batch, grid)
        each = policy.response_log_prob(batch.prompts, grid.expand(6, -1, -1), batch.responses.tokens).squeeze(1)
        torch.testing.assert_close(found, each.sum(-1))
        wanted = torch.arange(12).view(6, 2) % 3 > 0
        torch.testing.assert_close(grid_log_prob(policy, batch, grid, wanted), torch.where(wanted, found, 0))


@CONDITIONINGS
def test_the_divergence_is_of_the_policy_from_the_base_on_the_plain_prompt(tiny_model: Path, conditioning) -> None:
    policy, grid = randomise_adapter(tiny_policy(tiny_model, [conditioning])), evaluation_grid(2, 3)
    with policy.evaluating():
        batch = answers(policy, grid)
        tokens = batch.responses.tokens.flat()
        own = policy.log_prob(policy.encode(batch.prompts, batch.preference), batch.preference, tokens).sum(-1)
        with policy.silent():
            base = policy.reference_log_prob(policy.encode(batch.prompts, batch.preference), tokens).sum(-1)
    torch.testing.assert_close(divergence(policy, batch, grid), own - base)
    assert ((own - base).abs() > 1e-3).all()


@pytest.mark.parametrize(("every", "left"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_information_of_a_part_of_the_grid(tiny_model: Path, tmp_path: Path, every: int, left: list[int]) -> None:
    """W is uniform on what is left: the answers under the other vectors do not count, nor are any read under them."""
    seen: list[EvaluationBatch] = []

    class Keep(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
            seen.append(batch)

    run = tiny_run(
        tiny_model,
        tmp_path,
        data={"grid": 5, "evaluation_batch_size": 4},
        trainer={"callbacks": [PreferenceInformation(every), Keep()], "limit_val_batches": 1.0},
    )
    run[0].validate(run[1], run[2], verbose=False)
    seen.clear()
    policy = randomise_adapter(run[1].policy)
    run[0].validate(run[1], run[2], verbose=False)
    metric = PreferenceInformationMetric(len(left))
    with policy.evaluating():
        for batch in seen:
            log_prob = grid_log_prob(policy, batch, run[2].grid)
            for row, vector in enumerate(batch.grid_index.tolist()):
                if vector in left:
                    index = torch.tensor([left.index(vector)])
                    metric.update(log_prob[row : row + 1, left], index, torch.tensor([batch.positions[row]]))
    for key, value in metric.compute().items():
        assert run[0].callback_metrics[f"information/{key}"].item() == pytest.approx(value.item(), abs=1e-5), key
    assert run[0].callback_metrics["information/ceiling"].item() == pytest.approx(log(len(left)))


@pytest.mark.parametrize(("every", "message"), [(0, "at least 1, got 0"), (5, "two of the grid's 5 vectors, got 5")])
def test_a_part_of_the_grid_has_two_vectors(tiny_model: Path, tmp_path: Path, every: int, message: str) -> None:
    def validate() -> None:
        run = tiny_run(tiny_model, tmp_path, data={"grid": 5}, trainer={"callbacks": [PreferenceInformation(every)]})
        run[0].validate(run[1], run[2], verbose=False)

    with pytest.raises(UserError, match=message):
        validate()
