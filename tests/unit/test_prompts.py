from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from miepo.data.prompts import load_prompts, say_repeated, split_rows
from miepo.data.samplers import EvaluationShare, GridPrompts, OnlinePrompts, RunPositions
from miepo.errors import UserError
from miepo.resources import locate


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_jsonl(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": "one"}', "", '{"prompt": "two\\u0000", "x": 1}')
    assert load_prompts(file) == ["one", "two\0"]
    assert load_prompts(write(tmp_path / "q.jsonl", '{"q": "öne"}'), field="q") == ["öne"]


def test_list_and_dataset_and_saved_dataset(tmp_path: Path) -> None:
    assert load_prompts(["one", "two"]) == ["one", "two"]
    data = Dataset.from_dict({"prompt": ["one", "two"]})
    assert load_prompts(data) == ["one", "two"]
    data.save_to_disk(tmp_path / "d")
    assert load_prompts(str(tmp_path / "d")) == ["one", "two"]
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "dd")
    assert load_prompts(str(tmp_path / "dd"), splits=["validation", "test"]) == ["two"]
    with pytest.raises(UserError, match="expected a data set with the split validation, got train, test"):
        load_prompts(str(tmp_path / "dd"), splits=["validation"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: expected a JSON object, got text that is not JSON"),
        ('{"text": "x"}', "line 2: expected a JSON object with the field 'prompt', got text"),
        ('["x"]', "line 2: expected a JSON object, got list"),
        ('{"prompt": 3}', "line 2: expected text or a list in 'prompt', got int"),
        ('{"prompt": "  "}', "line 2: expected a prompt, got empty text"),
        ('{"prompt": "\\ud800"}', "line 2: expected Unicode text, got half a character"),
        ("[" * 100_000, "line 2: expected a JSON object"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_prompts(write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line))
    assert "p.jsonl" in str(error.value)


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at least one row, got none"):
        load_prompts(write(tmp_path / "p.jsonl", ""))
    with pytest.raises(UserError, match=r"expected a file at .*: there is none"):
        load_prompts(str(tmp_path / "missing.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="expected UTF-8"):
        load_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="prompts must be a list"):
        load_prompts(7)
    with pytest.raises(UserError, match="expected a column 'prompt', got text"):
        load_prompts(Dataset.from_dict({"text": ["x"]}))


def test_split_is_seeded_and_whole() -> None:
    prompts = [str(i) for i in range(50)]
    train, held_out = split_rows(prompts, 0.2, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted(train + held_out) == sorted(prompts)
    assert split_rows(prompts, 0.2, seed=3) == (train, held_out)
    assert split_rows(prompts, 0.2, seed=4)[1] != held_out
    assert [len(part) for part in split_rows(["a", "b"], 0.01, 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2 prompts"):
        split_rows(["a"], 0.5, 0)


def test_a_prompt_that_occurs_twice_is_on_one_side(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [str(i % 5) for i in range(20)]
    train, held_out = split_rows(prompts, 0.2, seed=3)
    assert (len(train), len(held_out), set(train) & set(held_out)) == (16, 4, set())
    pairs = [(str(i % 2), str(i)) for i in range(6)]
    parts = split_rows(pairs, 0.5, 0, itemgetter(0))
    assert [{p for p, _ in part} for part in parts] in ([{"0"}, {"1"}], [{"1"}, {"0"}])
    with pytest.raises(UserError, match="at least 2 prompts, got 1"):
        split_rows(["a", "a"], 0.5, 0)
    with caplog.at_level("INFO"):
        say_repeated(train, held_out)
    assert "12 of 16 training prompts repeat another one" in caplog.text
    with pytest.warns(UserWarning, match="1 prompts are in training and in validation"):
        say_repeated(["a", "b"], ["b"])


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Tea?"},
]


def test_prompts_as_messages(tmp_path: Path) -> None:
    one, three = MESSAGES[:1], MESSAGES
    turns = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?"
    assert load_prompts([one, "text"]) == ["Hi", "text"]
    assert load_prompts([one, three], dialogue=True) == ["\n\nHuman: Hi", turns]
    file = write(tmp_path / "m.jsonl", json.dumps({"prompt": three}))
    assert load_prompts(file, dialogue=True) == [turns]
    assert load_prompts(Dataset.from_dict({"prompt": [three]}), dialogue=True) == [turns]
    for wrong, message in (
        (three, "expected policy.dialogue true for a prompt of 3 messages"),
        (MESSAGES[:2], "expected a last message of the user"),
        (MESSAGES[1:], "expected messages of user and assistant in turn"),
        ([{"role": "system", "content": "x"}], "expected messages of user and assistant in turn"),
        ([{"role": "user", "content": " "}], "expected a message, got empty text"),
        ([], "expected a last message of the user"),
        ([3], "expected messages of user and assistant in turn, with text as content, got 3"),
    ):
        with pytest.raises(UserError, match=message):
            load_prompts([wrong])


def test_an_array_and_a_byte_order_mark(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text('\n[{"prompt": "one"},\n {"prompt": "two"}]', encoding="utf-8-sig")
    assert load_prompts(str(array)) == ["one", "two"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8-sig")
    assert load_prompts(str(lines)) == ["one", "two"]
    for content, message in (
        ('[{"prompt": "one"}, 3]', "row 2: expected a JSON object, got int"),
        ('[{"prompt": "one"}', "expected a JSON object, got text that is not JSON"),
        ("[]", "expected at least one row, got none"),
    ):
        array.write_text(content)
        with pytest.raises(UserError, match=message):
            load_prompts(str(array))


def test_epochs_are_permutations_that_differ() -> None:
    data = OnlinePrompts([str(i) for i in range(20)], seed=1)
    first, second = ([data[epoch, i] for i in range(20)] for epoch in (0, 1))
    assert [row[1:] for row in first] == [(0, i) for i in range(20)]
    assert {row[1] for row in second} == {1}
    assert sorted(row[0] for row in first) == sorted(row[0] for row in second)
    assert [row[0] for row in first] != [row[0] for row in second]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_a_batch_and_an_epoch_goes_on_where_it_was(processes: int) -> None:
    """Together they take what one process takes with a batch as large as all of theirs."""
    for done in range(3):
        each = [list(RunPositions(20, 2, lambda: (4, done), rank, processes)) for rank in range(processes)]  # noqa: B023
        assert len({len(mine) for mine in each}) == 1
        step = [[mine[i : i + 2] for mine in each] for i in range(0, len(each[0]), 2)]
        together = [sorted(place for part in parts for place in part) for parts in step]
        first = done * 2 * processes
        whole = 20 // processes * processes
        assert [place for batch in together for place in batch] == [(4, p) for p in range(first, whole)]
    assert len(RunPositions(20, 2, lambda: (0, 0), 0, processes)) == 20 // processes


@given(size=st.integers(1, 40), batch_size=st.integers(1, 9), processes=st.integers(1, 5))
def test_an_evaluation_is_shared_out_in_as_many_batches_each(size: int, batch_size: int, processes: int) -> None:
    if size < processes:
        with pytest.raises(UserError, match=f"at least one row for each of {processes} processes, got {size}"):
            EvaluationShare(size, batch_size, 0, processes)
        return
    shares = [EvaluationShare(size, batch_size, rank, processes) for rank in range(processes)]
    each = [list(share) for share in shares]
    assert {len(batches) for batches in each} == {len(shares[0])}
    assert sorted(row for batches in each for batch in batches for row in batch) == list(range(size))
    sizes = [len(batch) for batches in each for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2)
    if processes == 1:
        assert each[0] == [list(range(i, min(i + batch_size, size))) for i in range(0, size, batch_size)]


def test_every_process_needs_a_prompt() -> None:
    with pytest.raises(UserError, match="at least one prompt for each of 3 processes, got 2"):
        RunPositions(2, 1, lambda: (0, 0), 0, 3)


def test_grid_pairs_every_prompt_with_every_preference() -> None:
    grid = torch.eye(3)
    pairs = GridPrompts(["a", "b"], grid)
    batch = pairs[range(len(pairs))]
    assert batch.prompts == ["a", "a", "a", "b", "b", "b"]
    assert list(batch.positions) == [0, 0, 0, 1, 1, 1]
    assert batch.grid_index.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(batch.preference, torch.cat([grid, grid]))


@pytest.mark.parametrize(("part", "count"), [("train", 400), ("validation", 80)])
def test_shipped_prompts(part: str, count: int) -> None:
    prompts = load_prompts(f"package:miepo/data/everyday_{part}.jsonl")
    assert len(prompts) == count
    assert len({p.casefold() for p in prompts}) == count


def test_shipped_prompts_are_disjoint_and_varied() -> None:
    parts = [[json.loads(line) for line in locate(f"package:miepo/data/everyday_{p}.jsonl").read_text().splitlines()] for p in ("train", "validation")]  # fmt: skip
    assert not {r["prompt"].casefold() for r in parts[0]} & {r["prompt"].casefold() for r in parts[1]}
    topics = [{r["topic"] for r in part} for part in parts]
    assert topics[0] == topics[1]
    assert len(topics[0]) >= 20


def test_packaged_files() -> None:
    with pytest.raises(UserError, match=r"'nothing.jsonl' in an installed package 'miepo'"):
        locate("package:miepo/nothing.jsonl")
    with pytest.raises(UserError, match="installed package 'no_such_package'"):
        locate("package:no_such_package/x")
    with pytest.raises(UserError, match="expected 'pypi:NAME==VERSION/FILE'"):
        locate("pypi:gguf/x")
