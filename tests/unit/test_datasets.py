"""The two public data sets: their fields, filters and splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from miepo.data.datasets import HHRLHF, SafeRLHF
from miepo.data.datasets.hh_rlhf import split_dialogue
from miepo.errors import UserError
from tests.helpers.data import hh_rlhf_rows, safe_rlhf_rows, write_rows


def test_safe_rlhf(tmp_path: Path) -> None:
    rows = safe_rlhf_rows(40)
    data = SafeRLHF(write_rows(tmp_path / "a.jsonl", rows), train=30, test=10)
    by_prompt = {row["prompt"]: row for row in rows}
    assert (len(data.prompts("train")), len(data.prompts("test"))) == (30, 10)
    for comparison in data.comparisons("train") + data.comparisons("test"):
        row = by_prompt[comparison.prompt]
        assert comparison.responses == (row["response_0"], row["response_1"])
        assert comparison.preferred == row["better_response_id"]
    safer = SafeRLHF(write_rows(tmp_path / "a.jsonl", rows), train=30, test=10, preferred_by="safer")
    assert [c.preferred for c in safer.comparisons("test")] == [
        by_prompt[c.prompt]["safer_response_id"] for c in safer.comparisons("test")
    ]


def test_a_split_is_seeded_by_prompt_and_shrinks_alike(tmp_path: Path) -> None:
    rows = safe_rlhf_rows(20)
    file = write_rows(tmp_path / "a.jsonl", rows + [r | {"response_0": "another"} for r in rows])
    data = SafeRLHF(file, train=12, test=8)
    assert len(data.comparisons("train")) == 24  # prompts are split, and both rows of a prompt go with it
    assert not set(data.prompts("train")) & set(data.prompts("test"))
    assert SafeRLHF(file, train=12, test=8).prompts("test") == data.prompts("test")
    assert SafeRLHF(file, train=12, test=8, seed=1).prompts("test") != data.prompts("test")
    with pytest.warns(UserWarning, match="8000 and 2000 prompts were wanted, there are 16 to train and 4 to evaluate"):
        assert len(SafeRLHF(file).prompts("test")) == 4


def test_hh_rlhf(tmp_path: Path, tiny_model: Path) -> None:
    rows = hh_rlhf_rows(30)
    long = "\n\nHuman: " + "water " * 3000 + "\n\nAssistant:"
    extra = [
        {"chosen": "\n\nHuman: a\n\nAssistant: yes.", "rejected": "\n\nHuman: a\n\nAssistant: no."},  # short
        {"chosen": f"{long} yes", "rejected": f"{long} no"},
        {"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]},  # two prompts
        {"chosen": "nothing", "rejected": "nothing"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows + extra)
    short = len(AutoTokenizer.from_pretrained(tiny_model)("\n\nHuman: a\n\nAssistant:")["input_ids"])
    data = HHRLHF(str(tiny_model), min_tokens=short + 1, max_tokens=2000, source=file, train=20, test=10)
    prompts = {row["chosen"][: row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")] for row in rows}
    assert set(data.prompts("train") + data.prompts("test")) == prompts
    first = data.comparisons("train")[0]
    assert first.preferred == 0
    assert any(r["chosen"] == f"{first.prompt} {first.responses[0]}" for r in rows)
    apart = HHRLHF(
        str(tiny_model),
        max_tokens=2000,
        source=file,
        train=9,
        test=5,
        test_source=write_rows(tmp_path / "b.jsonl", hh_rlhf_rows(9, 1)),
    )
    assert (len(apart.prompts("train")), len(apart.prompts("test"))) == (9, 5)


def test_split_dialogue() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c Assistant: d\n\nAssistant: e\nf "
    assert split_dialogue(text) == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c Assistant: d\n\nAssistant:", "e\nf")
    made_up = "\n\nHuman: a\n\nAssistant: b\nHuman: c"
    assert split_dialogue(made_up) == ("\n\nHuman: a\n\nAssistant:", "b")
    assert split_dialogue("\n\nHuman: a") is None
    assert split_dialogue("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") is None
    assert split_dialogue("x\n\nHuman: a\n\nAssistant: c") is None
    assert split_dialogue("\n\nAssistant: a") is None


def test_mistakes(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", safe_rlhf_rows(3))
    with pytest.raises(UserError, match="expected a JSON object with the field 'chosen', got prompt, response_0"):
        HHRLHF("nowhere", source=file).prompts("train")
    with pytest.raises(UserError, match=r"expected comparisons in .*, got none, 3 left out .better_response_id is"):
        SafeRLHF(write_rows(tmp_path / "b.jsonl", [r | {"better_response_id": 7} for r in safe_rlhf_rows(3)])).prompts(
            "train"
        )
    with pytest.raises(UserError, match=r"SafeRLHF.train must be at least 1, got 0"):
        SafeRLHF(file, train=0)
    with pytest.raises(UserError, match="expected a tokenizer at 'nowhere/at/all'"):
        HHRLHF("nowhere/at/all", source=write_rows(tmp_path / "c.jsonl", hh_rlhf_rows(3))).prompts("train")
