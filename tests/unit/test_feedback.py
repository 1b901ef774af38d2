from __future__ import annotations

import torch

from miepo.feedback import feedback_counts, pairwise_labels, scalarised_labels

NAN, INF = float("nan"), float("inf")
SCORES = torch.tensor(
    [
        [[1.0, 0.0], [0.0, 2.0]],  # the objectives conflict
        [[1.0, 3.0], [1.0, 1.0]],  # a tie for the first
        [[NAN, 1.0], [0.0, 0.0]],  # no score for the first
        [[INF, 1.0], [0.0, 1.0]],
        [[5.0, 5.0], [0.0, 0.0]],  # one response is empty
    ]
)
EMPTY = torch.tensor([[False, False]] * 4 + [[False, True]])


def test_each_objective_orders_the_pair() -> None:
    assert pairwise_labels(SCORES, EMPTY).tolist() == [[1, -1], [0, 1], [0, 1], [0, 0], [0, 0]]


def test_swapping_the_responses_flips_every_label() -> None:
    assert torch.equal(pairwise_labels(SCORES.flip(1), EMPTY.flip(1)), -pairwise_labels(SCORES, EMPTY))


def test_counts_name_each_reason_once() -> None:
    counts = feedback_counts(pairwise_labels(SCORES, EMPTY), SCORES, torch.ones(5, 2, dtype=torch.bool), EMPTY)
    assert counts == {"empty_responses": 1, "empty": 2, "not_a_number": 2, "ties": 2, "labels": 4}
    assert sum(counts.values()) - counts["empty_responses"] == 10


def test_an_objective_that_was_not_asked_is_not_counted() -> None:
    asked = torch.ones(5, 2, dtype=torch.bool)
    asked[2, 0] = False
    assert feedback_counts(pairwise_labels(SCORES, EMPTY), SCORES, asked, EMPTY)["not_a_number"] == 1


def test_scalarised_feedback_differs_where_objectives_conflict() -> None:
    routing = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    labels = scalarised_labels(SCORES, routing, EMPTY)
    # 0.9 > 0.2; 2 > 1; the unscored objective has no weight; infinite; empty
    assert labels[:, 0].tolist() == [1, 1, 1, 0, 0]
    assert torch.equal(labels[:, 0], labels[:, 1])
    assert pairwise_labels(SCORES, EMPTY)[0].tolist() == [1, -1]
