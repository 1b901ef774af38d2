"""The command line beside training: help at once, commands in one table, configurations by name, plug-ins by name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import miepo
from miepo.cli import main
from miepo.cli.command import COMMANDS, OTHER_COMMANDS
from miepo.cli.configurations import find_configurations, packaged_configurations
from miepo.errors import UserError
from miepo.objectives import Objective

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse")


def loaded_by(code: str) -> tuple[str, list[str]]:
    """What a new Python prints, and the heavy packages that it imported."""
    check = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    code = f"try:\n    {code}\nfinally:\n    {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout, eval(done.stderr.splitlines()[-1])


# -- light -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command, "--help"] for command in OTHER_COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    printed, heavy = loaded_by(f"from miepo.cli import main; main({arguments})")
    assert printed.startswith("miepo 0." if "--version" in arguments else "usage: miepo")
    assert heavy == []


def test_the_package_imports_nothing_heavy() -> None:
    assert loaded_by("import miepo; print(miepo.__version__, miepo.UserError.__name__)") == ("0.1.0 UserError\n", [])


def test_every_name_of_the_package_is_found() -> None:
    assert sorted(miepo.__all__) == sorted(miepo._MODULES)
    assert {*miepo.__all__, "__version__"} <= set(dir(miepo))
    for name, module in miepo._MODULES.items():
        assert getattr(miepo, name) is getattr(import_module(module), name)
    assert miepo.Objective is Objective
    with pytest.raises(AttributeError, match="module 'miepo' has no attribute 'nothing'"):
        _ = miepo.nothing


# -- commands ----------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command, line in COMMANDS.items():
        assert f"  {command:16}{line}" in lines
    assert max(map(len, lines)) <= 100
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"miepo {miepo.__version__}\n"
    readme = (ROOT / "README.md").read_text()
    assert [c for c in COMMANDS if f"miepo {c}" not in readme] == []


@pytest.mark.parametrize(("arguments", "got"), [([], "none"), (["fitt"], "'fitt'"), (["help"], "'help'")])
def test_what_is_no_command(arguments: list[str], got: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err == f"miepo: error: expected a command ({', '.join(COMMANDS)}), got {got}\n"


# -- configurations ----------------------------------------------------------------------------------------------------


def test_a_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart, ric = str(ROOT / "configs/quickstart.yaml"), str(ROOT / "configs/methods/ric.yaml")
    given = ["fit", "--config", "quickstart", "-c", "methods/ric", "--config=quickstart.yaml", "--x", "quickstart"]
    assert find_configurations(given) == [
        "fit", "--config", quickstart, "-c", ric, f"--config={quickstart}", "--x", "quickstart",
    ]  # fmt: skip
    (tmp_path / "quickstart").write_text("seed_everything: 1\n")  # the user's file comes first
    as_it_is = ["--config", "quickstart", "--config", "{seed_everything: 2}", "--config", "seed_everything: 3"]
    assert find_configurations(as_it_is) == as_it_is
    assert "quickstart" in packaged_configurations()
    assert not any(name.startswith("studies") for name in packaged_configurations())


def test_a_configuration_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"^there is no configuration 'quickstar': expected a file or one of .*methods/ric, quickstart, ",
    ):
        find_configurations(["--config", "quickstar"])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={tmp_path}/none.yaml"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"miepo: error: there is no configuration '{tmp_path}/none.yaml': expected a file or one of "
    )


# -- init --------------------------------------------------------------------------------------------------------------


def test_init_writes_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["init", "mine"])
    assert capsys.readouterr().out == "Configuration: mine.yaml\nRun it: miepo fit --config mine.yaml\n"
    text = (tmp_path / "mine.yaml").read_text()
    assert re.findall(r"^# ([A-Z]\w+(?: on)?):", text, re.M) == [
        "Purpose",
        "Command",
    ]  # what ran elsewhere is not of this file
    written, template = yaml.safe_load(text), yaml.safe_load((ROOT / "configs/template.yaml").read_text())
    for logger in template["trainer"]["logger"]:
        logger["init_args"]["name"] = "mine"
    assert written == template
    main(["init", "1.yaml", "--base", 'my/"Ünï" 😀', "--prompts", "p.jsonl"])
    own = yaml.safe_load((tmp_path / "1.yaml").read_text())
    assert own["model"]["policy"]["init_args"]["base"] == 'my/"Ünï" 😀'
    assert (own["data"]["prompts"], own["data"]["validation_prompts"]) == ("p.jsonl", None)
    assert own["trainer"]["logger"][0]["init_args"]["name"] == "1"
    assert own["objectives"] == written["objectives"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there", "expected a new file for the configuration, got 'there.yaml', which exists"),
        ("there.yaml", "expected a new file for the configuration, got 'there.yaml', which exists"),
        ("no/folder", "expected paths that can be read and written, got 'no/folder.yaml': No such file or directory"),
        ("a b", "expected a name of letters, digits, _, - and dots, got 'a b'"),
        ("", "expected a name of letters, digits, _, - and dots, got '.yaml'"),
    ],
)
def test_init_refuses(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(["init", name])
    assert capsys.readouterr().err == f"miepo: error: {message}\n"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_the_template_has_the_settings_of_the_quickstart() -> None:
    """But for the model's own template and the normalisation, which are of its base, and the batch that measures it."""
    template, quickstart = (
        yaml.safe_load((ROOT / f"configs/{n}.yaml").read_text()) for n in ("template", "quickstart")
    )
    policy = quickstart["model"]["policy"]["init_args"]
    policy["template"] = "auto"
    del policy["dtype"]  # auto is the default
    for objective in quickstart["objectives"]:
        del objective["init_args"]["normalisation"]
    quickstart["data"]["normalise_on"] = 64
    quickstart["trainer"]["accelerator"] = "auto"
    for logger in quickstart["trainer"]["logger"]:
        logger["init_args"]["name"] = "template"
    assert template == quickstart


# -- plug-ins ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def polite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with an objective and a callback, with one that is no objective and one that is broken."""
    (tmp_path / "polite_words.py").write_text(
        "from lightning.pytorch import Callback\n"
        "from miepo import Objective\n\n\n"
        "class Politeness(Objective):\n"
        '    """How often a response says ``please``. Nothing else counts."""\n\n'
        "    def score(self, prompts, responses):\n"
        "        return [float(r.count('please')) for r in responses]\n\n\n"
        "class Bow(Callback):\n    pass\n"
    )
    info = tmp_path / "polite-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polite\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[miepo.objectives]\nBroken = polite_gone:Broken\nNone = polite_words:Bow\nPoliteness = polite_words:Politeness\n"
        "[miepo.callbacks]\nBow = polite_words:Bow\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_objectives_are_listed(polite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["objectives"])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["polite_words.Politeness"] == "How often a response says please."
    assert rows["miepo.objectives.Brevity"].startswith("Few characters, with a floor: ")
    assert rows["polite_gone.Broken"] == (
        "'Broken = polite_gone:Broken' of the package polite cannot be imported: No module named 'polite_gone'"
    )
    assert "expected a subclass of miepo.Objective, got <class 'polite_words.Bow'>" in rows["polite_words.Bow"]
    bases = {"Objective", "ModelObjective"}  # which score nothing themselves
    names = {f"miepo.objectives.{name}" for name in import_module("miepo.objectives").__all__ if name not in bases}
    assert {name for name in rows if name.startswith("miepo.")} == names
    assert all(line.strip() for line in rows.values())


def test_a_configuration_names_a_plug_in_by_its_name_alone(polite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "--objectives=[{class_path: Politeness}, {class_path: Brevity}]"
    with pytest.warns(UserWarning, match="of the package polite cannot be imported"), pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", own, "--trainer.callbacks=[{class_path: Bow}]", "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    paths = ["polite_words.Politeness", "miepo.objectives.Brevity"]
    assert [entry["class_path"] for entry in config["objectives"]] == paths
    assert [entry["class_path"] for entry in config["trainer"]["callbacks"]] == ["polite_words.Bow"]
