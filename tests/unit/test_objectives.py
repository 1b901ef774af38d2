from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

import miepo.objectives as package
from miepo.errors import ObjectiveError, UserError
from miepo.objectives import Brevity, Cheerfulness, Harmlessness, Objective, PythonObjective, Relevance, RewardModel
from miepo.objectives.base import normalise_rewards, objectives_of, score_responses
from tests.helpers.tiny import Broken, Letters, tiny_tokenizer

PROMPTS = ["How do I make tea?", "Tell me about dogs.", "Say something."]
RESPONSES = ["Boil water and pour it over the leaves.", "Dogs are loyal, wonderful friends!", ""]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer(chat=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=2, initializer_range=0.5
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


def everyone(classifier: Path) -> list[Objective]:
    """Every class of the package; a class that is not here fails the test below."""
    return [
        Brevity(),
        Cheerfulness(),
        Harmlessness(),
        Relevance(),
        RewardModel(str(classifier), "reward"),
        PythonObjective("tests.unit.test_objectives.word_count", "words"),
    ]


def word_count(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r.split())) for r in responses]


def test_contract_of_every_objective(classifier: Path) -> None:
    objectives = everyone(classifier)
    classes = {c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, Objective)} - {Objective}
    assert {type(o) for o in objectives} == classes
    for objective in objectives:
        objective.load(torch.device("cpu"))
        rewards = objective.reward(PROMPTS, RESPONSES)
        assert rewards.shape == (3,), objective.name
        assert rewards.dtype == torch.float32
        assert rewards.isfinite().all(), objective.name
        assert torch.equal(objective.reward(PROMPTS, RESPONSES), rewards), objective.name
        # a response's score does not depend on what else is in the batch
        alone = torch.cat([objective.reward([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
        torch.testing.assert_close(alone, rewards, rtol=1e-4, atol=1e-5)
        assert objective.reward([], []).shape == (0,)
        objective.calibrate(torch.tensor([1.0, 3.0, float("nan")]))
        twin = type(objective).__new__(type(objective))
        twin.normalisation = None
        twin.load_state_dict(objective.state_dict())
        assert twin.normalisation == objective.normalisation
    assert len({o.state_key for o in objectives}) == len(objectives)


def test_objectives_mean_what_they_say() -> None:
    short, glued, long = Brevity(13).reward(["x"] * 3, ["one two three", "onetwothreefour", "one two three four five"])
    silent = Brevity(13).reward(["x"], [""])[0]
    assert short > glued > long
    assert short > silent  # silence is not the optimum
    for objective, better, worse in [
        (Cheerfulness(), "What a wonderful, happy day!", "This is terrible and sad."),
        (Harmlessness(), "Have a nice day, my friend.", "You stupid idiot, go to hell."),
        (Relevance(), "Pour boiling water over the tea leaves.", "The train leaves from platform nine."),
    ]:
        objective.load(torch.device("cpu"))
        high, low = objective.reward(["How do I make tea?"] * 2, [better, worse])
        assert high > low, objective.name


def test_a_cost_is_turned_once() -> None:
    cost = PythonObjective("tests.unit.test_objectives.word_count", "words", higher_is_better=False)
    cost.load(torch.device("cpu"))
    assert cost.reward(PROMPTS, RESPONSES).tolist() == [-8.0, -5.0, 0.0]


def test_reward_model_is_the_raw_logit_of_its_label(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier).eval(), tiny_tokenizer(chat=False)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for how, label, sign in (("pair", 0, 1), ("pair", 1, -1), ("response", 1, 1)):
        objective = RewardModel(
            str(classifier), "r", input=how, label=label, higher_is_better=sign > 0, batch_size=2, max_length=12
        )
        objective.load(torch.device("cpu"))
        rewards = objective.reward(PROMPTS[:2], RESPONSES[:2])
        for i in range(2):
            text = (PROMPTS[i], RESPONSES[i]) if how == "pair" else (RESPONSES[i],)
            inputs = tokenizer(*text, return_tensors="pt", truncation=True, max_length=12)
            with torch.no_grad():
                expected = sign * model(**inputs).logits[0, label]
            torch.testing.assert_close(rewards[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("responses", [[""], ["", "dogs", ""]])
def test_reward_model_scores_empty_responses(classifier: Path, responses: list[str]) -> None:
    """A collapsed policy must not end the run: its responses are counted elsewhere."""
    objective = RewardModel(str(classifier), "r", input="response")
    objective.load(torch.device("cpu"))
    assert objective.reward(["x"] * len(responses), responses).isfinite().all()


def test_reward_model_is_cut_to_what_the_model_can_read(classifier: Path) -> None:
    objective = RewardModel(str(classifier), "r")
    objective.load(torch.device("cpu"))
    assert objective.max_length == 64
    assert objective.reward(["word " * 500], ["word " * 500]).isfinite().all()


def test_reward_model_with_a_label_it_lacks(classifier: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"objective r: expected a label below 2.*got 2"):
        RewardModel(str(classifier), "r", label=2).load(torch.device("cpu"))


def test_reward_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="objective r: expected a sequence classifier"):
        RewardModel(str(tmp_path), "r").load(torch.device("cpu"))


@pytest.mark.parametrize("function", ["tests.unit.test_objectives.missing", "no_such_module.f", "json", "math.pi"])
def test_function_that_is_not_there(function: str) -> None:
    with pytest.raises(ObjectiveError, match="expected a function at"):
        PythonObjective(function, "f").load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "objective broken failed to score: ValueError: the reward server is on fire"),
        ("shape", r"objective broken: expected scores of shape \(2,\), one per response, got \(1, 1\)"),
        ("one", r"expected scores of shape \(2,\), one per response, got \(\)"),
        ("text", "objective broken failed to score"),
    ],
)
def test_an_objective_that_fails_is_named(how: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        Broken(how).reward(["a", "b"], ["c", "d"])


def test_only_those_asked_are_scored() -> None:
    calls: list[tuple[list[str], list[str]]] = []

    class Spy(Letters):
        def score(self, prompts, responses):
            calls.append((list(prompts), list(responses)))
            return super().score(prompts, responses)

    asked = torch.tensor([[True, False], [True, True]])
    rewards = score_responses([Spy("a"), Spy("b")], ["p", "q"], [["a", "aa"], ["ab", "bb"]], asked)
    assert calls == [(["p", "p", "q", "q"], ["a", "aa", "ab", "bb"]), (["q", "q"], ["ab", "bb"])]
    assert rewards[:, :, 0].tolist() == [[1, 2], [1, 0]]
    assert rewards[0, :, 1].isnan().all()
    assert rewards[1, :, 1].tolist() == [1, 2]


def test_normalisation() -> None:
    a, b = Letters("a", normalisation={"mean": 1.0, "sd": 2.0}), Letters("b")
    b.calibrate(torch.tensor([0.0, 2.0, 4.0]))
    normal = normalise_rewards([a, b], torch.tensor([[3.0, 2.0], [1.0, 4.0]]))
    assert normal.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_constant_objective_warns() -> None:
    objective = Letters("a")
    with pytest.warns(UserWarning, match="letter_a gave every response the same score"):
        objective.calibrate(torch.ones(5))
    assert objective.normalisation.sd == 1.0


def test_nothing_to_normalise_by() -> None:
    with pytest.raises(ObjectiveError, match="got 1 finite scores of 3"):
        Letters("a").calibrate(torch.tensor([1.0, float("nan"), float("inf")]))


def test_no_objective_and_two_of_one_name() -> None:
    with pytest.raises(UserError, match="expected at least one objective, got none"):
        objectives_of(SimpleNamespace(callbacks=[]))
    with pytest.raises(UserError, match="got two named letter_a"):
        objectives_of(SimpleNamespace(callbacks=[Letters("a"), Letters("b"), Letters("a")]))


@pytest.mark.parametrize("name", ["two words", "a/b", "<x>", "x=1", "a\nb"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UserError, match="name must be one word"):
        Letters("a", name=name)


@pytest.mark.parametrize("normalisation", [{"mean": 0.0}, {"mean": 0.0, "sd": 0.0}, {"mean": float("nan"), "sd": 1.0}])
def test_bad_normalisation(normalisation: dict) -> None:
    with pytest.raises(UserError, match="normalisation"):
        Letters("a", normalisation=normalisation)
