from __future__ import annotations

import torch

from miepo.feedback import (
    extremes,
    feedback_counts,
    of_pairs,
    pairwise_feedback,
    pairwise_labels,
    scalarised_labels,
    scalarised_rewards,
)

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


def test_the_scalarised_reward_by_hand() -> None:
    scores = torch.tensor([[[1.0, 10.0], [2.0, NAN], [0.5, INF]], [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.25]])
    assert scalarised_rewards(scores, weights).tolist() == [[1.0, 2.0, 0.5], [3.0, 6.0, 9.0]]
    three = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 4.0]]])  # more objectives than responses
    weights = torch.tensor([[0.8, 0.1, 0.1]])
    assert scalarised_labels(three, weights, EMPTY[:1]).tolist() == [[1.0, 1.0, 1.0]]


def test_three_answers_make_a_pair_for_each_objective() -> None:
    scores = torch.tensor([[[1.0, 9.0], [4.0, 3.0], [2.0, 5.0]]])
    empty = torch.zeros(1, 3, dtype=torch.bool)
    made = pairwise_feedback(scores, empty, torch.tensor([[0.5, 0.5]]), torch.zeros(1, 0, 2), "per_objective")
    assert made.pairs.tolist() == [[[0, 1], [0, 1]]]
    assert made.labels.tolist() == [[-1.0, 1.0]]
    assert made.compared.tolist() == [[True, True, False]]


def test_extremes() -> None:
    values = torch.tensor([[1.0, 5.0, -2.0, 5.0], [3.0, NAN, 1.0, 2.0], [7.0, 7.0, 7.0, 7.0], [NAN, 4.0, NAN, NAN]])
    usable = values.isfinite()
    assert extremes(values, usable).tolist() == [[1, 2], [0, 2], [0, 0], [1, 1]]
    usable[0, 1:3] = False
    assert extremes(values, usable)[0].tolist() == [0, 3]
    assert extremes(values, torch.zeros(4, 4, dtype=torch.bool)).tolist() == [[0, 0]] * 4
    assert extremes(values[:, :2], usable[:, :2]).tolist() == [[0, 1]] * 4  # of two both, always


def test_two_answers_are_one_pair_for_all_objectives() -> None:
    routing = torch.full((5, 2), 0.5)
    made = pairwise_feedback(SCORES, EMPTY, routing, torch.zeros(5, 0, 2), "per_objective")
    assert torch.equal(made.labels, pairwise_labels(SCORES, EMPTY))
    assert made.pairs.tolist() == [[[0, 1]]] * 5
    assert made.compared.all()
    assert made.counterfactual_labels.shape == (5, 0, 2)
    scalarised = pairwise_feedback(SCORES, EMPTY, routing, routing.unsqueeze(1), "scalarised")
    assert torch.equal(scalarised.labels, scalarised_labels(SCORES, routing, EMPTY))
    assert torch.equal(scalarised.counterfactual_labels[:, 0], scalarised.labels)


def test_each_objective_compares_its_best_with_its_worst() -> None:
    scores = torch.tensor([[[1.0, 9.0], [4.0, 3.0], [2.0, 5.0], [0.0, 4.0]]])
    empty = torch.tensor([[False, False, False, False]])
    made = pairwise_feedback(scores, empty, torch.tensor([[0.5, 0.5]]), torch.tensor([[[0.1, 0.9]]]), "per_objective")
    assert made.pairs.tolist() == [[[1, 3], [0, 1]]]
    assert made.labels.tolist() == [[1.0, 1.0]]
    assert made.cross_labels.tolist() == [[[1.0, -1.0], [-1.0, 1.0]]]
    assert made.compared.tolist() == [[True, True, False, True]]
    assert torch.equal(made.counterfactual_labels, made.labels.unsqueeze(1))
    assert of_pairs(scores, made.pairs)[0, 0].tolist() == [[4.0, 3.0], [0.0, 4.0]]
    # the best is empty: the next one stands for it
    made = pairwise_feedback(
        scores, torch.tensor([[False, True, False, False]]), torch.tensor([[0.5, 0.5]]), torch.zeros(1, 0, 2),
        "per_objective",
    )  # fmt: skip
    assert made.pairs.tolist() == [[[2, 3], [0, 3]]]


def test_the_scalarised_reward_chooses_one_pair() -> None:
    scores = torch.tensor([[[1.0, 9.0], [4.0, 3.0], [2.0, 5.0], [0.0, 4.0]]])
    empty = torch.zeros(1, 4, dtype=torch.bool)
    routing, under = torch.tensor([[0.9, 0.1]]), torch.tensor([[[0.1, 0.9]]])
    made = pairwise_feedback(scores, empty, routing, under, "scalarised")  # 1.8, 3.9, 2.3, 0.4 and 8.2, 3.1, 4.7, 3.6
    assert made.pairs.tolist() == [[[1, 3]]]
    assert made.labels.tolist() == [[1.0, 1.0]]
    assert made.counterfactual_labels.tolist() == [[[-1.0, -1.0]]]
    assert made.compared.tolist() == [[False, True, False, True]]


def test_a_pair_that_one_objective_alone_orders_is_compared() -> None:
    """Of a scalarised pair one label is all; of pairs of their own each objective's counts for its own."""
    scores = torch.tensor([[[2.0, 5.0, 1.0], [2.0, 5.0, 3.0], [2.0, 5.0, 2.0]]])
    empty, none = torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 0, 3)
    routing = torch.tensor([[0.2, 0.3, 0.5]])
    made = pairwise_feedback(scores, empty, routing, none, "per_objective")
    assert made.pairs.tolist() == [[[0, 0], [0, 0], [0, 1]]]
    assert made.compared.tolist() == [[True, True, False]]
    made = pairwise_feedback(scores, empty, routing, none, "scalarised")
    assert made.pairs.tolist() == [[[0, 1]]]
    assert made.compared.tolist() == [[True, True, False]]
    tied = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    assert not pairwise_feedback(tied, empty, routing, none, "scalarised").compared.any()


def test_what_is_not_usable_in_one_row_is_not_asked_of_another() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    usable = torch.tensor([[False] * 3, [True] * 3])
    assert extremes(values, usable).tolist() == [[0, 0], [0, 2]]


def test_groups_without_a_pair_are_counted() -> None:
    scores = torch.tensor([[[1.0]] * 3, [[NAN], [NAN], [2.0]], [[1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0]]])
    empty = torch.tensor([[False] * 3, [False] * 3, [True, True, False], [False, False, True]])
    made = pairwise_feedback(scores, empty, torch.ones(4, 1), torch.zeros(4, 0, 1), "per_objective")
    assert made.labels.flatten().tolist() == [0, 0, 0, -1]
    counts = feedback_counts(made.labels, scores, torch.ones(4, 1, dtype=torch.bool), empty)
    assert counts == {"empty_responses": 3, "empty": 1, "not_a_number": 1, "ties": 1, "labels": 1}
    assert made.compared.sum(1).tolist() == [0, 0, 0, 2]
