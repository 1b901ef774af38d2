from __future__ import annotations

import inspect
import json
import shutil
import threading
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import miepo.objectives as package
from miepo.errors import ObjectiveError, UserError
from miepo.objectives import (
    Brevity,
    Cheerfulness,
    CheerfulWords,
    Harmlessness,
    ModelObjective,
    Objective,
    PythonObjective,
    Relevance,
    RetryingObjective,
    RewardModel,
    ScoreModel,
)
from miepo.objectives.base import objectives_of
from miepo.objectives.normalisation import read_normalisation, write_normalisation
from miepo.objectives.scoring import normalise_rewards, score_responses
from miepo.policy.base_model import load_base
from tests.helpers.tiny import Broken, Chosen, Letters, save_tiny_scorer, tiny_tokenizer

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


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_scorer(tmp_path_factory.mktemp("scorer"))


def everyone(classifier: Path, scorer: Path) -> list[Objective]:
    """Every class of the package; a class that is not here fails the test below."""
    return [
        Brevity(),
        Cheerfulness(),
        Cheerfulness(by_sentence=True, name="mood"),
        CheerfulWords(),
        Harmlessness(),
        Relevance(),
        RewardModel(str(classifier), "reward", label=0),
        ScoreModel(str(scorer), "score", batch_size=2),
        PythonObjective("tests.unit.test_objectives.word_count", "words"),
        RetryingObjective(PythonObjective("tests.unit.test_objectives.word_count", "asked")),
    ]


def word_count(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r.split())) for r in responses]


def test_contract_of_every_objective(classifier: Path, scorer: Path) -> None:
    objectives = everyone(classifier, scorer)
    classes = {c for _, c in inspect.getmembers(package, inspect.isclass) if issubclass(c, Objective)}
    classes -= {Objective, ModelObjective}
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
        twin = copy(objective)
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
    objective = RewardModel(str(classifier), "r", input="response", label=0)
    objective.load(torch.device("cpu"))
    assert objective.reward(["x"] * len(responses), responses).isfinite().all()


def test_reward_model_is_cut_to_what_the_model_can_read(classifier: Path) -> None:
    objective = RewardModel(str(classifier), "r", label=0)
    objective.load(torch.device("cpu"))
    assert objective.max_length == 64
    assert objective.reward(["word " * 500], ["word " * 500]).isfinite().all()


SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def save_classifier(folder: Path, network: type, config: type, **settings: Any) -> RewardModel:
    tokenizer = tiny_tokenizer(chat=False)
    torch.manual_seed(0)
    network(config(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RewardModel(str(folder), "r")


def test_a_score_does_not_depend_on_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's padding is not the tokenizer's: GPT-2 like classifiers then read a token of padding."""
    objective = save_classifier(tmp_path, GPT2ForSequenceClassification, GPT2Config, pad_token_id=0, **SMALL_GPT2)
    objective.load_checked(torch.device("cpu"))
    assert objective.tokenizer.pad_token_id == 1
    alone = [objective.reward([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(objective.reward(PROMPTS, RESPONSES), torch.cat(alone), rtol=1e-4, atol=1e-5)

    plain = GPT2ForSequenceClassification.forward
    monkeypatch.setattr(  # a network that reads its padding
        GPT2ForSequenceClassification, "forward", lambda self, input_ids, attention_mask: plain(self, input_ids)
    )
    monkeypatch.setattr(
        RewardModel, "read", lambda self, inputs: self.model(**inputs).logits[:, 0] + inputs["input_ids"].shape[1]
    )
    with pytest.raises(
        ObjectiveError, match=r"objective r: .*scores a response otherwise beside a longer one than alone"
    ):
        objective.load_checked(torch.device("cpu"))


def test_padding_that_the_network_has_no_embedding_of(tmp_path: Path) -> None:
    """As of tokenizers to which [PAD] was added; the end token stands in."""
    objective = save_classifier(tmp_path, GPT2ForSequenceClassification, GPT2Config, **SMALL_GPT2)
    objective.load_checked(torch.device("cpu"))
    expected = objective.reward(PROMPTS, RESPONSES)
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    objective.load_checked(torch.device("cpu"))
    assert objective.tokenizer.pad_token_id == objective.model.config.pad_token_id == 1
    torch.testing.assert_close(objective.reward(PROMPTS, RESPONSES), expected)


def test_a_reward_model_without_padding_and_end(tmp_path: Path) -> None:
    objective = save_classifier(tmp_path, GPT2ForSequenceClassification, GPT2Config, **SMALL_GPT2)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in ("eos_token", "pad_token")})
    )
    with pytest.raises(
        ObjectiveError, match=r"objective r: expected a tokenizer with a padding or end .* got None and None"
    ):
        objective.load(torch.device("cpu"))


def test_positions_that_are_counted_from_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa has 130 positions and reads 128 tokens; a long pair must not end the run."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    objective = save_classifier(
        tmp_path, RobertaForSequenceClassification, RobertaConfig, max_position_embeddings=130, pad_token_id=1, **sizes
    )
    objective.load_checked(torch.device("cpu"))
    assert objective.max_length == 128
    assert objective.reward(["word " * 500], ["word " * 500]).isfinite().all()


@pytest.mark.parametrize("whose", ["tokenizer", "model"])
@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_base(folder, "float32"),
        lambda folder: RewardModel(folder, "r", label=0).load(torch.device("cpu")),
        lambda folder: ScoreModel(folder, "r").load(torch.device("cpu")),
    ],
)
def test_code_that_comes_with_a_model_is_not_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str, load: Callable[[str], Any]
) -> None:
    """Not even where someone would answer yes to the question that Transformers asks."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if whose == "tokenizer":
        file, own = "tokenizer_config.json", {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["m.T", None]}}
    else:
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        file, own = "config.json", {"model_type": "own", "auto_map": dict.fromkeys(names, "m.C")}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | own))
    with pytest.raises(UserError, match="code of its own, which miepo does not execute"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_objective_that_never_gives_a_number_is_named() -> None:
    nan = float("nan")
    silent, some = Chosen([nan] * 4, "silent"), Chosen([1.0, nan, nan, nan], "some")
    with pytest.raises(ObjectiveError, match=r"objective silent gave no number.*of 4 responses"):
        score_responses([some, silent], ["x", "y"], [["a", "b"]] * 2)
    score_responses([some], ["x", "y"], [["a", "b"]] * 2)
    some.scores = [nan] * 4
    score_responses([some], ["x", "y"], [["a", "b"]] * 2)  # it has given one before
    silent.failures = 1  # it may, and is counted elsewhere
    score_responses([silent], ["x", "y"], [["a", "b"]] * 2)
    unasked = torch.zeros(2, 1, dtype=torch.bool)
    score_responses([Chosen([nan] * 4, "silent")], ["x", "y"], [["a", "b"]] * 2, unasked)


def test_a_checkpoints_normalisation_belongs_to_its_objective() -> None:
    first, second = RewardModel("one", "r", label=0), RewardModel("two", "r", label=0)
    first.calibrate(torch.tensor([1.0, 2.0, 4.0]))
    state = first.state_dict()
    RewardModel("one", "r", label=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"r: the checkpoint's normalisation was measured with .*'one'.*'two'"):
        second.load_state_dict(state)
    given = RewardModel("two", "r", label=0, normalisation={"mean": 0.0, "sd": 2.0})
    given.load_state_dict(state)  # has its own
    assert given.normalisation.sd == 2.0
    older = {key: state[key] for key in ("mean", "sd")}
    second.load_state_dict(older)  # of a checkpoint that does not tell
    assert second.normalisation == first.normalisation


class Wordy(Objective):
    """As a user writes one: nothing about what it is."""

    def __init__(self, words: list[str], strict: bool = False, name: str | None = None) -> None:
        super().__init__(name)
        self.words = words

    def score(self, prompts: Any, responses: Any) -> list[float]:
        return [float(sum(r.count(word) for word in self.words)) for r in responses]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Brevity(30), lambda: Brevity(60)),
        (lambda: Relevance("one"), lambda: Relevance("two")),
        (lambda: Cheerfulness(), lambda: Cheerfulness(by_sentence=True)),
        (lambda: PythonObjective("a.f", "q"), lambda: PythonObjective("a.g", "q")),
        (lambda: PythonObjective("a.f", "q"), lambda: PythonObjective("a.f", "q", higher_is_better=False)),
        (lambda: RewardModel("m", "r", label=0), lambda: RewardModel("m", "r", label=1)),
        (lambda: RewardModel("m", "r"), lambda: RewardModel("m", "r", "response")),
        (lambda: ScoreModel("one", "r"), lambda: ScoreModel("two", "r")),
        (lambda: Wordy(["a"]), lambda: Wordy(["b"])),
        (lambda: Wordy(["a"]), lambda: Wordy(["a"], strict=True)),
        (lambda: RetryingObjective(Wordy(["a"])), lambda: RetryingObjective(Wordy(["b"]))),
    ],
)
def test_a_normalisation_is_not_taken_by_what_scores_otherwise(
    one: Callable[[], Objective], other: Callable[[], Objective], tmp_path: Path
) -> None:
    measured = one()
    measured.calibrate(torch.tensor([1.0, 2.0, 4.0]))
    state = measured.state_dict()
    again = one()
    again.load_state_dict(state)
    assert again.normalisation == measured.normalisation
    deepcopy(again).load_state_dict(state)
    with pytest.raises(UserError, match="was measured with"):
        other().load_state_dict(state)
    write_normalisation(tmp_path / "n.json", [measured], None)
    read_normalisation(tmp_path / "n.json", [one()], None)
    with pytest.raises(UserError, match="was measured with"):
        read_normalisation(tmp_path / "n.json", [other()], None)
    renamed = {**state, "of": {"class": state["of"]["class"]}}  # of a version that told less
    other().load_state_dict(renamed)


@pytest.mark.parametrize("kind", [CheerfulWords, Brevity, PythonObjective, Wordy])
def test_the_signature_of_an_objective_is_its_constructors(kind: type[Objective]) -> None:
    assert list(inspect.signature(kind).parameters) == list(inspect.signature(kind.__init__).parameters)[1:]


def test_patience_does_not_skip_the_checks_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = save_classifier(tmp_path, GPT2ForSequenceClassification, GPT2Config, pad_token_id=0, **SMALL_GPT2)
    RetryingObjective(objective, timeout=60.0).load_checked(torch.device("cpu"))
    monkeypatch.setattr(
        RewardModel, "read", lambda self, inputs: self.model(**inputs).logits[:, 0] + inputs["input_ids"].shape[1]
    )
    with pytest.raises(ObjectiveError, match="scores a response otherwise beside a longer one than alone"):
        RetryingObjective(objective, timeout=60.0).load_checked(torch.device("cpu"))


def test_cheerful_words_are_counted_once_each() -> None:
    objective = CheerfulWords()
    objective.load(torch.device("cpu"))
    texts = ["Happy, happy, HAPPY day!", "What a lovely, happy day", "The train is sad and late.", ""]
    assert objective.reward(["x"] * 4, texts).tolist() == [1.0, 2.0, 0.0, 0.0]


def test_reward_model_with_a_label_it_lacks(classifier: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"has the labels 0 \(LABEL_0\), 1 \(LABEL_1\): set label to one"):
        RewardModel(str(classifier), "r").load(torch.device("cpu"))
    with pytest.raises(ObjectiveError, match=r"objective r: expected a label below 2.*got 2"):
        RewardModel(str(classifier), "r", label=2).load(torch.device("cpu"))


def test_a_tokenizer_without_an_end_token_scores_empty_responses(tmp_path: Path) -> None:
    """The humour classifier of the paper is a DistilBERT."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dogs", "funny"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=7, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=2)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    objective = RewardModel(str(tmp_path), "humor", input="response", label=1)
    objective.load(torch.device("cpu"))
    assert objective.reward(["x", "x"], ["", "funny dogs"]).isfinite().all()


def test_a_classifier_without_a_trained_head_is_refused(tmp_path: Path, tiny_base_model: Path) -> None:
    """Transformers would draw a head at random and warn."""
    with pytest.raises(ObjectiveError, match=r"objective r: expected a sequence classifier.*lacks 1 of its weights"):
        RewardModel(str(tiny_base_model), "r", label=0).load(torch.device("cpu"))


def test_score_model_is_the_head_at_the_end_token(scorer: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaModel

    body, tokenizer = LlamaModel.from_pretrained(scorer).eval(), AutoTokenizer.from_pretrained(scorer)
    head = load_file(scorer / "model.safetensors")["score_head.weight"]
    for better, sign in ((True, 1), (False, -1)):
        objective = ScoreModel(str(scorer), "cost", higher_is_better=better, batch_size=2)
        objective.load(torch.device("cpu"))
        rewards = objective.reward(PROMPTS, RESPONSES)
        for i in range(3):
            text = f"BEGINNING OF CONVERSATION: USER: {PROMPTS[i]} ASSISTANT:{RESPONSES[i]}{tokenizer.eos_token}"
            with torch.no_grad():
                hidden = body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            torch.testing.assert_close(rewards[i], sign * (head @ hidden)[0], rtol=1e-4, atol=1e-5)


def test_score_model_that_is_none(scorer: Path, classifier: Path, tiny_base_model: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"objective c: expected a LLaMA with a score head.*of the type gpt2"):
        ScoreModel(str(classifier), "c").load(torch.device("cpu"))
    with pytest.raises(ObjectiveError, match=r"objective c: .*lacks 1 of its weights, first score_head.weight"):
        ScoreModel(str(tiny_base_model), "c").load(torch.device("cpu"))
    with pytest.raises(UserError, match=r"c: template must have {prompt} and {response} once"):
        ScoreModel(str(scorer), "c", template="{prompt}")


def test_placement(classifier: Path) -> None:
    with pytest.raises(UserError, match="r: device must be like cpu, cuda or cuda:1, got 'gpu'"):
        RewardModel(str(classifier), "r", label=0, device="gpu")
    plain, placed = (
        RewardModel(str(classifier), "r", label=0),
        RewardModel(str(classifier), "r", label=0, device="cpu", offload=True),
    )
    plain.load(torch.device("cpu"))
    placed.load(torch.device("meta"))  # where the policy is, and the model is not
    torch.testing.assert_close(placed.reward(PROMPTS, RESPONSES), plain.reward(PROMPTS, RESPONSES))
    away = RewardModel(str(classifier), "r", label=0, device="meta", offload=True)
    away.load(torch.device("cpu"))
    assert next(away.model.parameters()).device.type == "cpu"  # between rollouts


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
        (
            "raise",
            "objective broken failed to score: ValueError: the reward server is on fire \\(.*tiny.py, line [0-9]+\\)$",
        ),
        ("shape", r"objective broken: expected scores of shape \(2,\), one per response, got \(1, 1\)"),
        ("one", r"expected scores of shape \(2,\), one per response, got \(\)"),
        ("text", r"objective broken failed to score: TypeError: new\(\): invalid data type 'str'$"),
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


def test_objectives_that_wait_are_asked_at_the_same_time() -> None:
    """Each returns when the other has been asked, too; an objective that does not wait is asked in between."""
    both = threading.Barrier(2, timeout=20)

    class Waits(Letters):
        concurrent = True

        def score(self, prompts, responses):
            both.wait()
            return super().score(prompts, responses)

    rewards = score_responses([Waits("a"), Letters("c"), Waits("b")], ["p"], [["ac", "bb"]])
    assert rewards[0].tolist() == [[1, 1, 0], [0, 0, 2]]


def test_an_objective_that_fails_in_its_thread_is_named() -> None:
    broken = Broken("raise")
    broken.concurrent = True
    with pytest.raises(ObjectiveError, match="objective broken failed to score: ValueError: the reward server"):
        score_responses([Letters("a"), broken], ["p"], [["a", "b"]])


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


@pytest.mark.parametrize(
    "normalisation",
    [
        {"mean": 0.0}, {"mean": 0.0, "sd": 0.0}, {"mean": float("nan"), "sd": 1.0}, {"mean": "0", "sd": 1.0},
        {"mean": True, "sd": 1.0}, {"mean": 0.0, "sd": float("inf")}, {"mean": 10**400, "sd": 1.0},
    ],
)  # fmt: skip
def test_bad_normalisation(normalisation: dict) -> None:
    with pytest.raises(UserError, match="normalisation needs a finite mean and a positive sd"):
        Letters("a", normalisation=normalisation)
    objective = Letters("a")
    with pytest.raises(UserError, match="a: expected a normalisation by finite numbers in the checkpoint"):
        objective.load_state_dict(normalisation)
    assert objective.normalisation is None


def test_a_state_of_a_subclass_alone_is_no_normalisation() -> None:
    objective = Letters("a")
    objective.load_state_dict({"calls": 3})
    assert objective.normalisation is None


def test_cheerfulness_by_sentence_does_not_pay_for_length() -> None:
    whole, mean = Cheerfulness(), Cheerfulness(by_sentence=True)
    for objective in (whole, mean):
        objective.load(torch.device("cpu"))
    one, two = "What a wonderful day!", "What a wonderful day! What a wonderful day!"
    assert whole.score(["x"], [two])[0] > whole.score(["x"], [one])[0]
    assert mean.score(["x"], [two]) == pytest.approx(mean.score(["x"], [one]))
    assert mean.score(["x"] * 3, ["", "...", one + " It is a table."]) == pytest.approx(
        [0, 0, mean.score(["x"], [one])[0] / 2]
    )
