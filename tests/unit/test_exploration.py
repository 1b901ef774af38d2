"""The formulations of the exploration term against hand-written values, and the property that defines each."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import exp, inf, log

import pytest
import torch
from torch.nn import functional as F

from miepo.errors import UserError
from miepo.exploration import (
    CounterfactualAlignment,
    Exploration,
    ExplorationInputs,
    InfoNCE,
    Matching,
    PairwiseInformation,
    draw_anchors,
    infonce_loss,
    information_labels,
    matching_loss,
)
from miepo.losses import alignment_loss
from miepo.metrics import infonce_bound
from miepo.seeding import RandomStream, generator
from tools.study.exploration import ClippedInfoNCE, PerTokenInfoNCE, WarmedInfoNCE


def rewards(b: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def contrast(b: int = 5, c: int = 2, seed: int = 0, gradient: bool = False) -> ExplorationInputs:
    """A pair of responses with random log-probabilities; the reference gives every response -3."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(b, 2, generator=generator).requires_grad_(gradient)
    other = torch.randn(b, 2, c, generator=generator).requires_grad_(gradient)
    weights = torch.rand(b, 1 + c, 1, generator=generator)
    preferences = torch.cat([weights, 1 - weights], -1)  # (B, 1 + C, 2)
    labels = torch.tensor([[1, -1], [-1, 1], [1, 1], [1, 0], [0, 0]]).float()[torch.arange(b) % 5]
    return ExplorationInputs(
        preferences[:, 0], preferences[:, 1:], own, other, own + 3, other + 3, torch.full((b, 2), 4),
        torch.tensor([[[0, 1]]]).expand(b, 1, 2), labels, labels.unsqueeze(1).expand(-1, c, -1), labels.unsqueeze(1),
        torch.ones(b, 2, dtype=torch.bool), 0.1,
    )  # fmt: skip


def contrast_of_four(seed: int = 0) -> ExplorationInputs:
    """Four responses to each of five prompts, a pair for each of two objectives; the third response is in no pair."""
    generator = torch.Generator().manual_seed(seed)
    two = contrast(seed=seed)
    own, other = torch.randn(5, 4, generator=generator), torch.randn(5, 4, 2, generator=generator)
    cross = torch.tensor([[1.0, 0.0], [-1.0, -1.0]]).expand(5, 2, 2)
    labels = torch.tensor([1.0, -1.0]).expand(5, 2)
    return replace(
        two, log_prob=own, counterfactual_log_prob=other, reward=own + 3, counterfactual_reward=other + 3,
        lengths=torch.full((5, 4), 4), pairs=torch.tensor([[0, 1], [0, 3]]).expand(5, 2, 2), labels=labels,
        counterfactual_labels=labels.unsqueeze(1).expand(-1, 2, -1), cross_labels=cross,
        anchors=torch.tensor([True, True, False, True]).expand(5, 4),
    )  # fmt: skip


def test_infonce_loss_is_equation_12_with_one_counterfactual() -> None:
    r, c = rewards(), rewards(seed=5).unsqueeze(-1)
    expected = -torch.nn.functional.logsigmoid(0.01 * r - 0.01 * c.squeeze(-1))
    torch.testing.assert_close(infonce_loss(r, c, 0.01), expected)


def test_infonce_loss_is_infonce_with_more() -> None:
    r = rewards(4)
    c = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    loss = infonce_loss(r, c, 0.7)
    for b in range(4):
        for y in range(2):
            positive = exp(0.7 * r[b, y].item())
            everything = positive + sum(exp(0.7 * c[b, y, j].item()) for j in range(5))
            assert loss[b, y].item() == pytest.approx(-log(positive / everything), rel=1e-12)


def test_exploration_gradient_flows_through_the_counterfactual_only() -> None:
    r, c = rewards(), rewards(seed=5)
    own, other = torch.autograd.grad(infonce_loss(r, c.unsqueeze(-1), 0.5).sum(), [r, c], allow_unused=True)
    assert own is None
    # d/db log(1 + exp(b - a)) = beta sigmoid(b - a) > 0: an unlikelihood term on w-
    torch.testing.assert_close(other, 0.5 * torch.sigmoid(0.5 * (c - r)).detach())


def test_infonce_is_the_mean_over_the_anchors_that_are_not_empty() -> None:
    pair = contrast()
    each = infonce_loss(pair.reward, pair.counterfactual_reward, 0.3)  # (B, 2)
    torch.testing.assert_close(InfoNCE(0.3, 2).loss(pair), each.mean(-1))
    anchors = pair.anchors.clone()
    anchors[1, 0] = False
    halved = InfoNCE(0.3, 2).loss(replace(pair, anchors=anchors))
    torch.testing.assert_close(halved[1], each[1, 1] / 2)


def test_anchors_are_a_function_of_the_place_in_the_run() -> None:
    both = torch.ones(400, 2, dtype=torch.bool)
    assert draw_anchors(2, both[:2], 0, [0, 0], [0, 1]).all()
    drawn = draw_anchors(1, both, 3, [0] * 400, range(400))
    assert (drawn.sum(1) == 1).all()
    assert 160 < int(drawn[:, 0].sum()) < 240
    assert torch.equal(drawn[100:], draw_anchors(1, both[100:], 3, [0] * 300, range(100, 400)))
    assert not torch.equal(drawn, draw_anchors(1, both, 3, [1] * 400, range(400)))
    assert not torch.equal(drawn, draw_anchors(1, both, 4, [0] * 400, range(400)))


def test_anchors_are_among_the_compared() -> None:
    compared = torch.tensor([[True, False, True, True], [False] * 4] * 300)
    assert torch.equal(draw_anchors(2, compared, 0, [0] * 600, range(600)), compared)
    drawn = draw_anchors(1, compared, 0, [0] * 600, range(600))
    assert (drawn & ~compared).sum() == 0
    assert torch.equal(drawn.any(1), compared.any(1))
    assert drawn[::2].sum(0).tolist()[1] == 0
    assert all(70 < count < 130 for count in drawn[::2].sum(0)[[0, 2, 3]].tolist())


def test_an_anchor_is_the_draw_of_its_own_stream() -> None:
    """Named from the last of the compared: what a run that is taken up again would draw."""
    compared = torch.tensor([[True, False, True, True]]).expand(30, 4)
    drawn = draw_anchors(1, compared, 5, [2] * 30, range(30))
    each = [int(generator(RandomStream.ANCHOR, 5, 2, p).integers(3)) for p in range(30)]
    assert drawn.int().argmax(1).tolist() == [[3, 2, 0][place] for place in each]
    with pytest.raises(ValueError, match="longer"):
        draw_anchors(1, compared, 5, [2], range(30))


def test_one_anchor_stands_for_both() -> None:
    pair = contrast()
    each = infonce_loss(pair.reward, pair.counterfactual_reward, 0.3)  # (B, 2)
    first = torch.tensor([True, False]).expand(5, 2)
    terms = [InfoNCE(0.3, 2, anchors=1).loss(replace(pair, anchors=a)) for a in (first, ~first)]
    torch.testing.assert_close(terms, [each[:, 0], each[:, 1]])
    torch.testing.assert_close((terms[0] + terms[1]) / 2, InfoNCE(0.3, 2).loss(pair))


def test_variants_of_the_study_per_token_and_clipped() -> None:
    pair = contrast()
    per_token = PerTokenInfoNCE(0.3, 2).loss(pair)
    torch.testing.assert_close(per_token, infonce_loss(pair.reward / 4, pair.counterfactual_reward / 4, 0.3).mean(-1))
    far = replace(pair, counterfactual_log_prob=pair.log_prob.unsqueeze(-1) - 5 + torch.zeros(5, 2, 2))
    assert ClippedInfoNCE(0.3, clip=4.0).loss(far).abs().max() == 0
    torch.testing.assert_close(ClippedInfoNCE(0.3, clip=6.0).loss(far), InfoNCE(0.3).loss(far))
    assert (ClippedInfoNCE().reads_information, InfoNCE().reads_information) == (True, False)


def test_a_variant_of_the_study_that_warms_up() -> None:
    pair, term = contrast(), WarmedInfoNCE(0.3, warmup=0.5)
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        torch.testing.assert_close(term(pair, progress), InfoNCE(0.3).loss(pair) * share)
    with pytest.raises(UserError, match=r"WarmedInfoNCE.warmup is a fraction of all steps, above 0 and up to 1, got 2"):
        WarmedInfoNCE(warmup=2.0)


def test_the_judge_prefers_the_response_with_more_pointwise_information() -> None:
    log_prob = torch.tensor([[-1.0, -1.0], [-5.0, -2.0], [-1.0, -1.0]])
    others = torch.tensor([[[-9.0], [-1.0]], [[-5.0], [-2.0]], [[-2.0], [-4.0]]])
    # the first response is unlikely under w- and so tells more; both tell nothing; the second tells more
    assert information_labels(infonce_bound(log_prob, others)).tolist() == [1.0, 0.0, -1.0]


def test_what_rounding_may_have_made_is_no_label() -> None:
    information = torch.tensor([[0.5005, 0.5], [0.5, 0.5005], [0.502, 0.5], [0.5, 0.502], [0.1, 0.1]])
    assert information_labels(information).tolist() == [0.0, 0.0, 1.0, -1.0, 0.0]


def test_the_judge_labels_pairs_of_two_anchors_alone() -> None:
    pair = contrast()
    one = replace(pair, anchors=torch.tensor([True, False]).expand(5, 2))
    torch.testing.assert_close(PairwiseInformation().loss(one), torch.full((5,), log(2)))
    assert (PairwiseInformation().loss(pair) - log(2)).abs().min() > 1e-4


def test_pointwise_information_is_the_score_of_the_gradient_and_pairs_point_its_way() -> None:
    """On a table of three responses: the exact gradient of I(Y; W) is E[pmi d log pi], and pairs ordered by pmi point
    to the same side of it."""
    logits = torch.tensor([[0.5, -0.2, 0.1], [-0.3, 0.4, 0.0]], dtype=torch.float64, requires_grad=True)  # two w
    log_pi = logits.log_softmax(-1)
    pi = log_pi.exp()
    pmi = log_pi - pi.mean(0).log()
    (exact,) = torch.autograd.grad((pi * pmi).sum() / 2, logits, retain_graph=True)
    (score,) = torch.autograd.grad((pi.detach() * pmi.detach() * log_pi).sum() / 2, logits, retain_graph=True)
    torch.testing.assert_close(exact, score)
    loss = torch.zeros((), dtype=torch.float64)
    for w, a, b in product(range(2), range(3), range(3)):  # every pair under w, with its probability
        own = torch.stack([log_pi[w, a], log_pi[w, b]]).unsqueeze(0)
        other = torch.stack([log_pi[1 - w, a], log_pi[1 - w, b]]).view(1, 2, 1)
        label = information_labels(infonce_bound(own.detach(), other.detach()))
        loss = loss + pi[w, a].detach() * pi[w, b].detach() * alignment_loss(own, label.unsqueeze(-1), 1.0).sum()
    (judged,) = torch.autograd.grad(loss, logits)
    assert F.cosine_similarity(-judged.flatten(), exact.flatten(), 0) > 0.9


def test_the_judge_learns_under_w_plus_only() -> None:
    pair = contrast(gradient=True)
    own, other = torch.autograd.grad(
        PairwiseInformation().loss(pair).sum(), [pair.log_prob, pair.counterfactual_log_prob], allow_unused=True
    )
    assert other is None
    assert own.abs().min() > 0
    silent = replace(pair, anchors=torch.zeros(5, 2, dtype=torch.bool))
    torch.testing.assert_close(PairwiseInformation().loss(silent), torch.full((5,), log(2)))  # no label, no gradient


def test_matching_by_hand() -> None:
    reward, other = torch.tensor([[3.0, 1.0]]), torch.tensor([[[0.5], [1.0]]])
    plus, minus = torch.tensor([[0.9, 0.1]]), torch.tensor([[[0.2, 0.8]]])
    labels = torch.tensor([[1.0, -1.0]])
    # g = ((0.9 - 0.2) - (0.1 - 0.8)) / 2 = 0.7; margin = (3 - 1) - (0.5 - 1) = 2.5
    expected = -0.7 * F.logsigmoid(torch.tensor(0.4 * 2.5))
    own = Matching(weight=1.0, reuse=0.0, beta=0.4)
    pair = replace(
        contrast(1, 1), reward=reward, counterfactual_reward=other, preference=plus, counterfactual=minus,
        labels=labels, cross_labels=labels.unsqueeze(1), counterfactual_labels=labels.unsqueeze(1),
    )  # fmt: skip
    torch.testing.assert_close(own.loss(pair), expected.view(1))  # its own scale, and not that of the alignment
    torch.testing.assert_close(
        matching_loss(reward, other, plus, minus, labels, labels.unsqueeze(1), 0.4), expected.view(1, 1)
    )
    flipped = matching_loss(reward, other, plus, minus, -labels, -labels.unsqueeze(1), 0.4)
    torch.testing.assert_close(flipped, -0.7 * F.logsigmoid(torch.tensor(-0.4 * 2.5)).view(1, 1))


def test_matching_ignores_what_both_responses_share_and_pairs_all_agree_on() -> None:
    pair = contrast(gradient=True)
    loss = Matching(reuse=0.0, num_counterfactuals=2).loss(pair)
    shifted = replace(
        pair,
        reward=pair.reward + torch.tensor([[2.0], [-1.0], [0.5], [3.0], [1.0]]),
        counterfactual_reward=pair.counterfactual_reward + torch.arange(10.0).view(5, 1, 2),
    )
    torch.testing.assert_close(loss, Matching(reuse=0.0, num_counterfactuals=2).loss(shifted), rtol=1e-4, atol=1e-6)
    assert loss[2].item() == 0  # both objectives prefer the first response
    assert loss[4].item() == 0  # two ties
    own, other = torch.autograd.grad(loss.sum(), [pair.log_prob, pair.counterfactual_log_prob])
    # no unlikelihood: whatever is taken from one response goes to the other, under w+ and under every w-
    assert own.abs().max() > 0.01
    torch.testing.assert_close(own.sum(-1), torch.zeros(5), rtol=0, atol=1e-7)
    torch.testing.assert_close(other.sum(1), torch.zeros(5, 2), rtol=0, atol=1e-7)


def test_matching_does_not_care_which_preference_is_called_w_plus() -> None:
    pair = contrast(c=1)
    swapped = matching_loss(
        pair.counterfactual_reward[..., 0], pair.reward.unsqueeze(-1), pair.counterfactual[:, 0],
        pair.preference.unsqueeze(1), pair.counterfactual_labels[:, 0], pair.labels.unsqueeze(1), 0.1,
    )  # fmt: skip
    here = matching_loss(
        pair.reward,
        pair.counterfactual_reward,
        pair.preference,
        pair.counterfactual,
        pair.labels,
        pair.counterfactual_labels,
        0.1,
    )
    torch.testing.assert_close(here, swapped)


def test_matching_with_scalarised_feedback() -> None:
    """One order under each preference: a pair counts in full where the two orders differ, and not at all elsewhere."""
    reward, other = torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([[[0.5], [1.0]], [[0.5], [1.0]]])
    plus, minus = torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[[0.2, 0.8]]] * 2)
    first, second = torch.ones(2), -torch.ones(2)
    labels, under = torch.stack([first, first]), torch.stack([second, first]).unsqueeze(1)
    loss = matching_loss(reward, other, plus, minus, labels, under, 0.4)
    torch.testing.assert_close(loss, torch.stack([-F.logsigmoid(torch.tensor([1.0])), torch.zeros(1)]))


def test_matching_reuses_the_pair_under_w_minus() -> None:
    pair = contrast()
    both = Matching(reuse=0.7, num_counterfactuals=2).loss(pair)
    parts = Matching(reuse=0.0, num_counterfactuals=2).loss(pair) + 0.7 * CounterfactualAlignment().loss(pair)
    torch.testing.assert_close(both, parts)


def test_terms_of_several_pairs_by_hand() -> None:
    """Four responses, of which one is in no pair: each term over the pairs or the compared responses."""
    four = contrast_of_four()
    read = [0, 1, 3]
    each = infonce_loss(four.reward, four.counterfactual_reward, 0.3)
    torch.testing.assert_close(InfoNCE(0.3, 2).loss(four), each[:, read].mean(1))

    information = infonce_bound(four.log_prob, four.counterfactual_log_prob)[:, read]
    best, worst = (torch.tensor(read)[i] for i in (information.argmax(1), information.argmin(1)))
    rows = torch.arange(5)
    expected = -F.logsigmoid(0.1 * (four.reward[rows, best] - four.reward[rows, worst]))
    torch.testing.assert_close(PairwiseInformation().loss(four), expected)

    margins = [four.counterfactual_reward[:, 0] - four.counterfactual_reward[:, j] for j in (1, 3)]  # (B, C) each
    under = [-F.logsigmoid(0.1 * margins[0]), -F.logsigmoid(-0.1 * margins[1])]  # as labelled, +1 and -1
    routed = sum(loss * four.counterfactual[..., k] for k, loss in enumerate(under))
    torch.testing.assert_close(CounterfactualAlignment().loss(four), routed.mean(1))

    pairs = []
    for q, j in enumerate((1, 3)):
        own, other = four.reward[:, [0, j]], four.counterfactual_reward[:, [0, j]]
        labels = four.cross_labels[:, q]
        after = labels.unsqueeze(1).expand(-1, 2, -1)
        pairs.append(matching_loss(own, other, four.preference, four.counterfactual, labels, after, 0.1).mean(1))
    torch.testing.assert_close(Matching(reuse=0.0, num_counterfactuals=2).loss(four), (pairs[0] + pairs[1]) / 2)


def test_scalarised_feedback_orders_each_preference_by_itself() -> None:
    """Of one pair for all objectives the labels under w- are those given, not those under w+ once more."""
    pair = contrast()
    under = -pair.counterfactual_labels
    given = replace(pair, counterfactual_labels=under)
    expected = matching_loss(
        pair.reward, pair.counterfactual_reward, pair.preference, pair.counterfactual, pair.labels, under, 0.1
    ).mean(1)
    torch.testing.assert_close(Matching(reuse=0.0, num_counterfactuals=2).loss(given), expected)


def test_what_is_not_reused_is_not_read() -> None:
    pair = contrast()
    lost = replace(pair, counterfactual_labels=torch.zeros_like(pair.counterfactual_labels))
    broken = replace(lost, beta_c=float("nan"))
    assert Matching(reuse=0.0, beta=0.1, num_counterfactuals=2).loss(broken).isfinite().all()


@pytest.mark.parametrize("formulation", [InfoNCE, PairwiseInformation, Matching, CounterfactualAlignment])
def test_defaults(formulation: type[Exploration]) -> None:
    term = formulation()
    wanted = {InfoNCE: (1.0, 1), PairwiseInformation: (1.0, 4), Matching: (0.5, 1), CounterfactualAlignment: (1.0, 1)}
    assert (term.weight, term.num_counterfactuals) == wanted[formulation]
    assert term(contrast(), 0.0).abs().max() > 0  # in full from the first step


def test_defaults_of_their_own() -> None:
    assert (InfoNCE().beta_w, InfoNCE().anchors) == (0.01, 2)
    assert (Matching().reuse, Matching().beta) == (1.0, None)
    assert Matching(beta=0.5).beta == 0.5


def test_the_control_is_the_alignment_loss_under_w_minus() -> None:
    pair = contrast(c=1)
    expected = alignment_loss(pair.counterfactual_reward[..., 0], pair.labels, 0.1) * pair.counterfactual[:, 0]
    torch.testing.assert_close(CounterfactualAlignment().loss(pair), expected.sum(-1))


@pytest.mark.parametrize("formulation", [InfoNCE, PairwiseInformation, Matching, CounterfactualAlignment])
def test_weight(formulation: type[Exploration]) -> None:
    pair, term = contrast(), formulation()
    for progress in (0.0, 1.0):
        torch.testing.assert_close(term(pair, progress), term.loss(pair) * term.weight)
    if formulation is not InfoNCE:
        assert not formulation(weight=0.0).active
        torch.testing.assert_close(formulation(weight=3.0)(pair, 1.0), 3 * formulation().loss(pair))
    assert formulation().active
    assert not InfoNCE(beta_w=0.0).active


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCE(beta_w=-0.1), "beta_w must not be negative, got -0.1"),
        (lambda: InfoNCE(num_counterfactuals=0), r"InfoNCE.num_counterfactuals must be at least 1, got 0"),
        (lambda: InfoNCE(anchors=3), r"InfoNCE.anchors must be 1 or 2, got 3"),
        (lambda: InfoNCE(beta_w=inf), "beta_w must not be negative, got inf"),
        (lambda: Matching(beta=0.0), r"Matching.beta must be positive, got 0"),
        (lambda: Matching(beta=inf), r"Matching.beta must be positive, got inf"),
        (lambda: Matching(reuse=-1.0), r"Matching.reuse must not be negative, got -1"),
        (lambda: Matching(reuse=inf), r"Matching.reuse must not be negative, got inf"),
        (lambda: Matching(weight=inf), r"weight of Matching must not be negative, got inf"),
        (lambda: PairwiseInformation(weight=-1.0), "weight of PairwiseInformation must not be negative, got -1"),
    ],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
