"""The normalisation file: what it holds, and with what it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from miepo.data.datasets import SafeRLHF
from miepo.errors import UserError
from miepo.objectives.normalisation import calibrate, offline_responses, read_normalisation, write_normalisation
from tests.helpers.data import safe_rlhf_rows, write_rows
from tests.helpers.tiny import Length, Letters


def measured(tmp_path: Path) -> tuple[Path, SafeRLHF]:
    data = SafeRLHF(write_rows(tmp_path / "data.jsonl", safe_rlhf_rows(20)), train=15, test=5)
    objectives = [Letters("e"), Length("length")]
    calibrate(objectives, offline_responses(data))
    write_normalisation(tmp_path / "n.json", objectives, offline_responses(data))
    return tmp_path / "n.json", data


def test_there_and_back(tmp_path: Path) -> None:
    file, data = measured(tmp_path)
    lengths = [float(len(r)) for c in data.comparisons("train") for r in c.responses]
    objectives = [Letters("e"), Length("length")]
    read_normalisation(file, objectives, offline_responses(data))
    assert objectives[1].normalisation.mean == pytest.approx(sum(lengths) / len(lengths))
    given = Length("length")
    given.load_state_dict({"mean": 1.0, "sd": 2.0})
    read_normalisation(file, [given], offline_responses(data))
    assert given.normalisation.mean == 1.0  # what the configuration gives stands
    assert all(
        objective.normalisation_given for objective in objectives
    )  # and counts more than a checkpoint's, as this does
    first = Letters("e", normalisation={"mean": 1.0, "sd": 2.0})
    both = [first, Length("length")]
    read_normalisation(file, both, offline_responses(data))
    assert [o.normalisation.mean for o in both] == [1.0, objectives[1].normalisation.mean]


def test_the_file_is_for_people_too_and_makes_its_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "n.json"
    write_normalisation(file, [Letters("length", normalisation={"mean": 1.0, "sd": 2.0}, name="length")], None)
    text = file.read_text()
    assert text.startswith('{\n  "schema": 1,\n  "objectives": {\n    "length": {\n')
    assert text.endswith("}\n")
    assert [path.name for path in file.parent.iterdir()] == ["n.json"]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    file, data = measured(tmp_path)
    other = SafeRLHF(data.source, train=15, test=5, seed=1)
    with pytest.raises(UserError, match=r"measured on 30 responses of SafeRLHF.*and they differ: measure it again"):
        read_normalisation(file, [Letters("e")], offline_responses(other))
    with pytest.raises(UserError, match="is of letter_e, length, and not of letter_a"):
        read_normalisation(file, [Letters("a")], None)
    cost = Length("length")
    cost.higher_is_better = False
    with pytest.raises(UserError, match=r"the normalisation of length .* was measured with .*'higher_is_better': True"):
        read_normalisation(file, [cost], None)
    write_normalisation(tmp_path / "rollouts.json", [Letters("e", normalisation={"mean": 0.0, "sd": 1.0})], None)
    with pytest.raises(UserError, match="was measured on rollouts; the config has 30 responses"):
        read_normalisation(tmp_path / "rollouts.json", [Letters("e")], offline_responses(data))


@pytest.mark.parametrize("content", ["", "[]", '{"objectives": {"length": {"mean": 1}}}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"expected a normalisation at .*, there is none"):
        read_normalisation(tmp_path / "n.json", [Length("length")], None)
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(UserError, match="a file that miepo normalise did not write"):
        read_normalisation(tmp_path / "n.json", [Length("length")], None)
