"""The real command line on a tiny model: everything a user does, and every mistake the README names."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from miepo.cli.command import main
from miepo.objectives import Objective
from tests.helpers.fit import MEASURES, PROMPTS
from tests.helpers.tiny import save_tiny_model


def callbacks(*extra: dict) -> list[dict]:
    return [*({"class_path": f"miepo.callbacks.{name}"} for name in MEASURES), *extra]


def config(model: Path, root: Path, **changes: Any) -> dict:
    values: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(root),
            "logger": [
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(root), "name": "run"},
                }
            ],
            "callbacks": callbacks(),
        },
        "objectives": [
            {"class_path": "tests.helpers.tiny.Letters", "init_args": {"letter": "e"}},
            {"class_path": "miepo.objectives.Brevity"},
        ],
        "model": {
            "policy": {
                "class_path": "miepo.policy.Policy",
                "init_args": {
                    "base": str(model),
                    "dtype": "float32",
                    "conditioning": [{"class_path": "miepo.policy.GatedConditioning"}],
                    "lora_rank": 2,
                },
            },
            "learning_rate": 0.01,
        },
        "data": {
            "prompts": PROMPTS[:6],
            "validation_prompts": ["the rain", "a garden", "food in spring"],
            "batch_size": 3,
            "max_new_tokens": 5,
            "normalise_on": 4,
            "grid": 3,
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    return values


def run(command: str, values: dict, root: Path, *args: str) -> None:
    file = root / f"{command}.yaml"
    file.write_text(yaml.safe_dump(values))
    main([command, "--config", str(file), *args])


@pytest.fixture(scope="module")
def fitted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A run of two steps, its configuration, and what it printed."""
    import contextlib
    import io
    import logging

    root = tmp_path_factory.mktemp("fit")
    values = config(tiny_model, root)
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    with contextlib.redirect_stdout(output):
        run("fit", values, root)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(handler)
    return root, values, output.getvalue()


def table(printed: str) -> dict[str, list[str]]:
    rows = [line.split("  ") for line in printed.splitlines()]
    return {cells[0]: [c.strip() for c in cells[1:] if c.strip()] for cells in rows if len(cells) > 1}


def checkpoint(root: Path) -> Path:
    (path,) = root.glob("run/version_0/checkpoints/last.ckpt")
    return path


def test_fit_prints_before_and_after_and_writes_the_picture(fitted: tuple[Path, dict, str]) -> None:
    root, _, printed = fitted
    rows = table(printed)
    assert rows["metric"] == ["before (step 0)", "after (step 2)"]
    for metric in ("HV (up)", "MIP (up)", "CRD (down)", "I(Y;W|X), nats (up)"):
        assert len(rows[metric]) == 2, printed
    assert float(rows["I(Y;W|X), nats (up)"][0].split()[0]) == pytest.approx(0, abs=1e-6)  # the adapter starts at 0
    assert rows["I(Y;W|X), nats (up)"][1].endswith("of 1.10")
    pictures = sorted(root.glob("run/version_0/fronts/*.png"))
    assert [p.name for p in pictures] == ["step_000000.png", "step_000002.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert f"Pareto front: {pictures[1]}" in printed
    assert "reference point is -1 on every axis" in printed
    assert "letter_e (weight 1.00):" in printed
    assert "brevity (weight 1.00):" in printed
    assert f"Checkpoint: {checkpoint(root)}" in printed


def test_every_answer_is_kept_with_the_run(fitted: tuple[Path, dict, str]) -> None:
    root, values, _ = fitted
    folder = root / "run/version_0/evaluations"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000000.jsonl", "step_000002.jsonl"]
    head, *rows = [json.loads(line) for line in (folder / "step_000002.jsonl").read_text().splitlines()]
    prompts = values["data"]["validation_prompts"]
    assert [(row["prompt"], row["position"], row["grid_index"]) for row in rows] == [
        (prompt, p, m) for p, prompt in enumerate(prompts) for m in range(3)
    ]
    assert rows[1]["preference"] == {"letter_e": 0.5, "brevity": 0.5}
    first, last = torch.load(checkpoint(root), weights_only=True)["miepo"]["evaluations"]
    assert (first["step"], last) == (0, head)  # one record of an evaluation, wherever it is kept
    rewards = torch.tensor([list(row["rewards"].values()) for row in rows]).view(3, 3, 2).double()
    means = torch.tensor(last["arrays"]["front/means"]).double()
    torch.testing.assert_close(rewards.mean(0), means, rtol=1e-5, atol=1e-5)  # of each preference vector
    assert last["grid"] == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert last["arrays"]["front/reference_point"] == [-1.0, -1.0]
    assert {"front/hv", "information/preference", "steerability/brevity_low"} <= last["figures"].keys()
    assert any(row["response"] for row in rows)


def rainless(prompts: list[str], responses: list[str]) -> list[float]:
    """Has nothing to say of rain."""
    return [float("nan") if "rain" in p else float(len(r)) for p, r in zip(prompts, responses, strict=True)]


def test_responses_that_are_not_in_the_front_are_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = config(tiny_model, tmp_path, trainer__limit_train_batches=1)
    function = {"function": f"{__name__}.rainless"}
    values["objectives"][0] = {"class_path": "miepo.objectives.PythonObjective", "init_args": function}
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="3 responses are not in the front: an objective"):
        run("fit", values, tmp_path)
    assert table(caplog.text)["answers without a score"] == ["3.000", "3.000"]  # one prompt of three, three preferences


def test_everything_numeric_reaches_the_csv(fitted: tuple[Path, dict, str]) -> None:
    import csv

    root, _, _ = fitted
    rows = list(csv.DictReader((root / "run/version_0/metrics.csv").read_text().splitlines()))
    filled = {key for row in rows for key, value in row.items() if value}
    expected = {"loss", "kl", "exploration", "information/infonce", "learning_rate", "response/tokens", "time/step"}
    for name in ("letter_e", "brevity"):
        expected |= {f"reward/{name}", f"front/sd/{name}", f"information/feedback/{name}"}
    expected |= {"front/hv", "front/mip", "front/crd", "information/preference", "information/preference_low"}
    expected |= {"count/ties", "count/empty_responses", "memory/peak_gb", "tokens_per_second/sampling"}
    assert expected <= filled
    assert [int(row["step"]) for row in rows if row["front/hv"]] == [0, 1]  # before and after


def test_the_whole_configuration_reaches_the_logger(fitted: tuple[Path, dict, str]) -> None:
    root, values, _ = fitted
    for name in ("config.yaml", "hparams.yaml"):
        saved = yaml.safe_load((root / "run/version_0" / name).read_text())
        assert saved["model"]["init_args"]["beta_c"] == 0.1, name
        assert saved["objectives"][0]["init_args"]["letter"] == "e", name
        assert saved["data"]["init_args"]["prompts"] == values["data"]["prompts"], name


def test_a_checkpoint_holds_the_adapter_and_plain_data_only(fitted: tuple[Path, dict, str]) -> None:
    root, _, _ = fitted
    saved = torch.load(checkpoint(root), weights_only=True)  # executes nothing from the file
    assert saved["miepo"]["objectives"] == ["letter_e", "brevity"]
    assert saved["state_dict"]
    assert all("lora_" in name for name in saved["state_dict"])
    assert set(saved["callbacks"]["Objective[brevity]"]) == {"mean", "sd", "of"}


def test_a_later_list_of_objectives_replaces_the_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """None keeps the name or the normalisation of the one whose place it takes."""
    first = {
        "class_path": "miepo.objectives.Cheerfulness",
        "init_args": {"name": "x", "normalisation": {"mean": 1.0, "sd": 2.0}},
    }
    files = []
    for i, entries in enumerate(
        [[first, first], [{"class_path": "miepo.objectives.Relevance"}, {"class_path": "miepo.objectives.Brevity"}]]
    ):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({"objectives": entries}))
        files += ["--config", str(tmp_path / f"{i}.yaml")]
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *files,
                "--model.policy.class_path",
                "miepo.policy.Policy",
                "--model.policy.init_args.base",
                "x",
                "--data.prompts",
                "[x]",
                "--print_config",
            ]
        )
    entries = yaml.safe_load(capsys.readouterr().out)["objectives"]
    assert [entry["class_path"] for entry in entries] == ["miepo.objectives.Relevance", "miepo.objectives.Brevity"]
    for entry in entries:
        settings = entry.get("init_args") or {}
        assert settings.get("normalisation") is None
        assert settings.get("name") is None


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_print_the_same_table(
    fitted: tuple[Path, dict, str], command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, values, printed = fitted
    values = json.loads(json.dumps(values))
    values["trainer"]["default_root_dir"] = values["trainer"]["logger"][0]["init_args"]["save_dir"] = str(tmp_path)
    with caplog.at_level("INFO"):  # of the checkpoint, or of the folder of its run
        of = checkpoint(root) if command == "test" else checkpoint(root).parents[1]
        run(command, values, tmp_path, "--ckpt_path", str(of))
    assert [f.name for f in tmp_path.rglob("evaluations/*")] == [f"{command}.jsonl"]
    again, after = table(caplog.text.replace("\n\n", "\n")), table(printed)
    for metric in ("HV (up)", "MIP (up)", "CRD (down)", "I(Y;W|X), nats (up)"):
        assert again[metric] == [after[metric][1]]


def test_predict_answers_by_name(fitted: tuple[Path, dict, str], tmp_path: Path) -> None:
    root, values, _ = fitted
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "the garden"}\n{"prompt": "people"}\n')
    answers = tmp_path / "answers.jsonl"
    args = ["--ckpt_path", str(checkpoint(root)), "--data.predict_prompts", str(asked), "--writer.path", str(answers)]
    args += ["--data.predict_preferences", '[{"brevity": 1.0}, {"letter_e": 0.25, "brevity": 0.75}]']
    run("predict", values, tmp_path, *args)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the garden", "the garden", "people", "people"]
    assert rows[0]["preference"] == {"letter_e": 0.0, "brevity": 1.0}
    assert rows[1]["preference"] == {"letter_e": 0.25, "brevity": 0.75}
    assert all(isinstance(row["response"], str) for row in rows)
    with pytest.raises(SystemExit) as error:  # it does not overwrite answers
        run("predict", values, tmp_path, *args)
    assert error.value.code == 2


def test_fit_goes_on_from_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    values = config(tiny_model, tmp_path, trainer__max_epochs=1)
    run("fit", values, tmp_path)
    values = config(tiny_model, tmp_path, trainer__max_epochs=2)
    run("fit", values, tmp_path, "--ckpt_path", str(checkpoint(tmp_path)))  # a folder of its own: a branch
    saved = torch.load(tmp_path / "run/version_1/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    run("fit", values, tmp_path, "--ckpt_path", "last")  # it is over
    assert not (tmp_path / "run/version_2").exists()


def test_what_differs_from_the_checkpoint_is_said_and_counts(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = config(tiny_model, tmp_path, trainer__max_epochs=1, model__warmup=0.0)
    run("fit", values, tmp_path)
    values = config(tiny_model, tmp_path, trainer__max_epochs=2, model__warmup=0.0, model__learning_rate=0.5)
    values["objectives"][0]["init_args"]["normalisation"] = {"mean": 3.0, "sd": 2.0}
    caplog.clear()
    with caplog.at_level("INFO"):
        run("fit", values, tmp_path, "--ckpt_path", "last")
    said = caplog.text
    assert "trainer.max_epochs: 1 in the checkpoint, 2 now, which counts" in said
    assert "model.init_args.learning_rate: 0.01 in the checkpoint, 0.5 now, which counts" in said
    assert "letter_e: normalised by Normalisation(mean=" in said
    assert "ckpt_path" not in said.replace("--ckpt_path", "")
    saved = torch.load(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.5]
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5
    kept = saved["callbacks"]["Objective[letter_e]"]
    assert (kept["mean"], kept["sd"]) == (3.0, 2.0)
    assert kept["of"]["class"] == "tests.helpers.tiny.Letters"


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_last_checkpoint_of_no_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    """A job's script may always ask to go on; an evaluation of nothing is a mistake."""
    values = config(tiny_model, tmp_path)
    if command == "fit":
        run("fit", values, tmp_path, "--ckpt_path", "last")
        assert (tmp_path / "run/version_0/checkpoints/last.ckpt").exists()
        run("validate", values, tmp_path, "--ckpt_path", "last")
        return
    with pytest.raises(SystemExit):
        run(command, values, tmp_path, "--ckpt_path", "last")
    assert "expected a run with a checkpoint, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("best", "--ckpt_path takes last or a checkpoint's file, got best: which trade-off is best no run can say"),
        ("hpc", "--ckpt_path hpc: expected what Lightning writes when SLURM ends a job in '"),
    ],
)
def test_checkpoints_that_no_run_keeps(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path), tmp_path, "--ckpt_path", asked)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wandb_offline_run_reads_back(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, tables, images and the whole configuration are in the file that the offline run leaves."""
    import wandb

    from tests.helpers.wandb_file import read_records

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "miepo", "save_dir": str(tmp_path), "offline": True},
    }
    run("fit", config(tiny_model, tmp_path, trainer__logger=[logger]), tmp_path)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    end = time.monotonic() + 60  # W&B may write its last block after finish() has returned
    while not any(record.HasField("exit") for record in read_records(file)):
        assert time.monotonic() < end, "W&B has not ended its file"
        time.sleep(0.1)
    for record in read_records(file):
        for item in record.history.item:
            history["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.run.config.update if record.HasField("run") else record.config.update:
            settings[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    for key in ("loss", "kl", "reward/brevity", "front/hv", "front/mip", "front/crd", "information/preference"):
        assert key in history, (key, sorted(history))
    assert history["front/picture/_type"] == "images/separated"
    assert {history[f"{key}/_type"] for key in ("front/table", "samples", "evaluation")} == {"table-file"}
    assert "beta_c" in json.dumps(settings)
    assert "letter_e" in json.dumps(settings) or '"letter": "e"' in json.dumps(settings)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/front/*.png"))) == 2


MISTAKES: dict[str, tuple[dict, str]] = {
    "validation prompts too long": (
        {"data__validation_prompts": ["garden " * 300]},
        "1 of 1 validation prompts do not fit the context of 256 tokens",
    ),
    "a folder that is a file": (
        {
            "trainer__logger": [
                {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": __file__}}
            ]
        },
        f"expected paths that can be read and written, got '{__file__}",
    ),
    "a folder whose name is too long": (
        {"trainer__logger": False, "trainer__default_root_dir": "/tmp/" + "x" * 300},
        "File name too long",
    ),
    "a file of another kind as a model": (
        {"model__policy__init_args__base": "page.gguf"},
        "expected a causal language model (hub id, folder or .gguf file), got 'page.gguf'",
    ),
    "a logger without an account": (
        {"trainer__logger": [{"class_path": "tests.helpers.tiny.Homeless", "init_args": {"account": False}}]},
        "trainer.logger Homeless takes no run: no account",
    ),
    "a layer that the model has not": (
        {"model__policy__init_args__lora_targets": ["q_proj", "out_proj"]},
        "it has no layer out_proj",
    ),
    "a pattern that is none": (
        {"model__policy__init_args__lora_targets": "*proj"},
        "policy.lora_targets must be all-linear, a list of names or a regular expression of whole names, got '*proj'",
    ),
    "digits below none": (
        {
            "model__policy__init_args__conditioning": [
                {"class_path": "miepo.policy.PromptConditioning", "init_args": {"decimals": -1}}
            ]
        },
        "PromptConditioning.decimals must be from 0 to 12, got -1",
    ),
    "an early stop by a figure that is not": (
        {"trainer__callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]},
        "trainer.callbacks EarlyStopping: Early stopping conditioned on metric `val_loss`",
    ),
    "two names of one figure": (
        {
            "objectives": [
                {"class_path": "miepo.objectives.Brevity", "init_args": {"name": n}} for n in ("brief", "brief_low")
            ]
        },
        "an objective may not be called brief_low beside brief",
    ),
    "an objective without its base": (
        {"objectives": [{"class_path": "tests.helpers.tiny.Nameless"}]},
        "Nameless has no name",
    ),
    "data without preferences": (
        {"data": {"class_path": "miepo.methods.SupervisedDataModule", "init_args": {"examples": "examples.jsonl"}}},
        "needs data whose evaluations answer along preferences, such as OnlinePreferenceDataModule, got Supervised",
    ),
    "no objective": ({"objectives": []}, "expected at least one objective, got none"),
    "two with one name": (
        {"objectives": [{"class_path": "miepo.objectives.Brevity"}] * 2},
        "expected objectives with different names, got two named brevity",
    ),
    "missing prompt file": ({"data__prompts": "nowhere.jsonl"}, "data.prompts: expected a file at 'nowhere.jsonl'"),
    "no prompts": ({"data__prompts": []}, "expected at least one prompt, got none"),
    "missing model": (
        {"model__policy__init_args__base": "/nowhere/model"},
        "policy.base: expected a model folder at '/nowhere/model'",
    ),
    "missing gguf": (
        {"model__policy__init_args__base": "/nowhere/m.gguf"},
        "expected a model file at '/nowhere/m.gguf'",
    ),
    "prompt too long": (
        {"data__prompts": ["fine", "garden " * 300]},
        "1 of 2 training prompts do not fit the context of 256 tokens with a response of 5; prompt 2 has",
    ),
    "objective raises": (
        {"objectives": [{"class_path": "tests.helpers.tiny.Broken"}]},
        "objective broken failed to score: ValueError: the reward server is on fire",
    ),
    "wrong shape": (
        {"objectives": [{"class_path": "tests.helpers.tiny.Broken", "init_args": {"how": "shape"}}]},
        "objective broken: expected scores of shape (2,), one per response, got (1, 1)",
    ),
    "negative alpha": (
        {"data__preferences": {"class_path": "miepo.preferences.DirichletPreferences", "init_args": {"alpha": -1.0}}},
        "DirichletPreferences.alpha must be positive, got -1",
    ),
    "bad grid": ({"data__grid": [[0.5, 0.5], [-1.0, 2.0]]}, "data.grid: the weight of 0 must not be negative"),
    "empty grid": ({"data__grid": []}, "data.grid takes 2 to 10000 preference vectors, got []"),
    "alpha of another length": (
        {
            "data__preferences": {
                "class_path": "miepo.preferences.DirichletPreferences",
                "init_args": {"alpha": [1.0] * 3},
            }
        },
        "DirichletPreferences.alpha has 3 entries, but there are 2 objectives",
    ),
    "scalarised feedback of one objective": (
        {"data__feedback": "scalarised", "model__router": {"class_path": "miepo.router.SampleRouter"}},
        "data.feedback scalarised needs the scores of all objectives",
    ),
    "no end": ({"trainer__max_epochs": -1}, "expected trainer.max_epochs or max_steps, got none"),
    "prompts of another kind": ({"data__prompts": "prompts.txt"}, "expected a .jsonl or .parquet file, got no file"),
    "bad validation limit": ({"data__validation_limit": 0}, "data.validation_limit must be at least 1, got 0"),
    "bad batch size": ({"data__batch_size": 0}, "data.batch_size must be at least 1, got 0"),
    "bad beta": (
        {"model__exploration": {"class_path": "InfoNCE", "init_args": {"beta_w": -1.0}}},
        "beta_w must not be negative, got -1",
    ),
    "bad precision": ({"trainer__precision": "bf16-mixed"}, "expected trainer.precision 32-true, got bf16-mixed"),
    "unknown function": (
        {"objectives": [{"class_path": "miepo.objectives.PythonObjective", "init_args": {"function": "nope.f"}}]},
        "objective f: expected a function at 'nope.f'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.gguf").write_text("<html>404</html>")
    rows = [{"prompt": f"{prompt} {i}", "response": "grows"} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path, **changes), tmp_path)
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("miepo: error:")]
    assert len(lines) == 1, stderr
    assert message in lines[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ('[{"kindness": 1.0}]', "unknown objective kindness; the objectives are letter_e, brevity"),
        ('[{"brevity": -1.0}]', "the weight of brevity must not be negative, got -1"),
        ('[{"brevity": 0.0}]', "at least one weight must be positive"),
    ],
)
def test_a_wrong_preference_is_one_sentence(
    preferences: str, message: str, fitted: tuple[Path, dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, values, _ = fitted
    args = ["--ckpt_path", str(checkpoint(root)), "--data.predict_prompts", '["x"]']
    with pytest.raises(SystemExit) as error:
        run("predict", values, tmp_path, *args, "--data.predict_preferences", preferences)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path, trainer__accelerator="cuda"), tmp_path)
    assert error.value.code == 2
    assert "accelerator" in capsys.readouterr().err


def test_predict_needs_prompts_and_a_checkpoint(
    fitted: tuple[Path, dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, values, _ = fitted
    with pytest.raises(SystemExit):
        run("predict", values, tmp_path, "--ckpt_path", str(checkpoint(root)))
    assert "expected data.predict_prompts, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("predict", values, tmp_path, "--data.predict_prompts", '["x"]')
    assert "expected --ckpt_path, got none" in capsys.readouterr().err


def test_a_malformed_file_is_named_with_its_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    with pytest.raises(SystemExit):
        run("fit", config(tiny_model, tmp_path, data__prompts=str(tmp_path / "p.jsonl")), tmp_path)
    assert "p.jsonl, line 2: expected a JSON object" in capsys.readouterr().err


def test_overlong_prompts_can_be_dropped(tiny_model: Path, tmp_path: Path) -> None:
    values = config(tiny_model, tmp_path, data__prompts=["fine", "garden " * 300, "food"], data__overlong="drop")
    with pytest.warns(UserWarning, match="1 of 3 training prompts do not fit"):
        run("fit", values, tmp_path)


def test_a_checkpoint_of_other_objectives_shows_both_lists(
    fitted: tuple[Path, dict, str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, _ = fitted
    values = config(tiny_model, tmp_path)
    values["objectives"].reverse()
    with pytest.raises(SystemExit):
        run("validate", values, tmp_path, "--ckpt_path", str(checkpoint(root)))
    stderr = capsys.readouterr().err
    assert "['letter_e', 'brevity']" in stderr
    assert "['brevity', 'letter_e']" in stderr


def test_a_checkpoint_of_another_model_is_refused(
    fitted: tuple[Path, dict, str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, _ = fitted
    values = config(tiny_model, tmp_path, model__policy__init_args__lora_rank=3)
    with pytest.raises(SystemExit):
        run("validate", values, tmp_path, "--ckpt_path", str(checkpoint(root)))
    assert "the checkpoint's policy has lora_rank 2 and not 3" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_refused(
    fitted: tuple[Path, dict, str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes, but another policy."""
    root, _, _ = fitted
    for key, value in (("lora_alpha", 7), ("temperature", 0.5)):
        values = config(tiny_model, tmp_path)
        values["model"]["policy"]["init_args"][key] = value
        with pytest.raises(SystemExit):
            run("validate", values, tmp_path, "--ckpt_path", str(checkpoint(root)))
        assert f"the checkpoint's policy has {key} " in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Harm()}, tmp_path / "harm.ckpt", pickle_module=pickle)
    (tmp_path / "noise.ckpt").write_bytes(b"noise")
    for name in ("harm.ckpt", "noise.ckpt"):
        with pytest.raises(SystemExit) as error:
            run("validate", config(tiny_model, tmp_path), tmp_path, "--ckpt_path", str(tmp_path / name))
        assert error.value.code == 2
        assert f"{name}', got a file that is none" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_one_evaluation_is_not_shown_as_two(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run("fit", config(tiny_model, tmp_path, trainer__num_sanity_val_steps=0), tmp_path)
    assert "before" not in caplog.text
    assert "value (step 2)" in caplog.text


def test_a_missing_checkpoint(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("validate", config(tiny_model, tmp_path), tmp_path, "--ckpt_path", str(tmp_path / "no.ckpt"))
    assert error.value.code == 2
    assert "no.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--model.betaw=0.1", "--data.grid=many", "--nonsense=1"])
def test_a_typo_exits_with_2(
    argument: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path), tmp_path, argument)
    assert error.value.code == 2
    assert argument.split("=")[0].removeprefix("--").split(".")[-1] in capsys.readouterr().err


def test_offline_normalisation_comes_from_the_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "offline.jsonl").write_text(
        "".join(json.dumps({"prompt": "x", "response": "e" * n}) + "\n" for n in (1, 2, 3))
    )
    run("fit", config(tiny_model, tmp_path, data__normalise_on=str(tmp_path / "offline.jsonl")), tmp_path)
    saved = torch.load(checkpoint(tmp_path), weights_only=True)
    kept = saved["callbacks"]["Objective[letter_e]"]
    assert (kept["mean"], kept["sd"]) == (2.0, 1.0)


def test_a_key_that_stands_twice_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser would drop the first without a word."""
    text = yaml.safe_dump(config(tiny_model, tmp_path))
    (tmp_path / "fit.yaml").write_text(f"data:\n  batch_size: 7\n{text}")
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(tmp_path / "fit.yaml")])
    assert error.value.code == 2
    assert "has the key 'data' in lines 1 and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  beta_c: 0.1\n   learning_rate: 2\n", "in line 3, column 17: mapping values are not allowed here"),
        ("model: {\n", "in line 2, column 1: expected"),
        ("a: *b\n", "in line 1, column 4: found undefined alias"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(tmp_path / "bad.yaml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"miepo: error: '{tmp_path}/bad.yaml': expected YAML, got what is none {said}")


def test_a_mistake_shows_before_objectives_load(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(Objective, "load_checked", lambda self, device: loaded.append(self.name))
    for changes in ({"trainer__precision": "bf16-mixed"}, {"model__policy__init_args__base": "/nowhere/model"}):
        with pytest.raises(SystemExit):
            run("fit", config(tiny_model, tmp_path, **changes), tmp_path)
    assert loaded == []


def test_a_logger_without_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    values = config(tiny_model, tmp_path, trainer__logger=[{"class_path": "tests.helpers.tiny.Homeless"}])
    run("fit", values, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["init_args"]["batch_size"] == 3
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


def test_a_run_without_a_logger_takes_no_other_ones_place(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tiny_model, tmp_path, trainer__logger=False)
    run("fit", values, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "config.yaml", tmp_path / "checkpoints/last.ckpt")}
    values["seed_everything"] = 7
    with pytest.raises(SystemExit) as error:
        run("fit", values, tmp_path)
    assert error.value.code == 2
    assert f"expected a folder without a run, got '{tmp_path}', which has checkpoints" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    run("fit", values, tmp_path, "--ckpt_path", "last")


def test_a_full_disk_is_one_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("miepo.callbacks.evaluation_record.gathered_rows", full)
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path), tmp_path)
    assert error.value.code == 2
    expected = "miepo: error: expected paths that can be read and written: No space left on device"
    assert expected in capsys.readouterr().err


def test_normalise_tries_its_file_before_it_scores(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    monkeypatch.setattr(Objective, "load_checked", lambda self, device: loaded.append(self.name))
    with pytest.raises(SystemExit):
        run("normalise", config(tiny_model, tmp_path), tmp_path, "--out", f"{__file__}/n.json")
    assert f"got '{__file__}'" in capsys.readouterr().err
    assert loaded == []


def test_objectives_of_the_trainer_count_too(tiny_model: Path, tmp_path: Path) -> None:
    values = config(tiny_model, tmp_path, objectives=[{"class_path": "miepo.objectives.Brevity"}])
    values["trainer"]["callbacks"].insert(0, {"class_path": "tests.helpers.tiny.Letters"})
    run("fit", values, tmp_path)
    assert torch.load(checkpoint(tmp_path), weights_only=True)["miepo"]["objectives"] == ["letter_a", "brevity"]


def test_rewards_in_context_through_the_command(tmp_path: Path, tiny_model: Path) -> None:
    """Another module and another data module, by an overlay, with every callback of the quickstart."""
    values = config(tiny_model, tmp_path, data__batch_size=2, trainer__max_epochs=2)
    overlay = Path(__file__).parents[2] / "configs/methods/ric.yaml"
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(values))
    main(["fit", "--config", str(tmp_path / "fit.yaml"), "--config", str(overlay), "--model.learning_rate", "0.02"])
    saved = yaml.safe_load((tmp_path / "run/version_0/config.yaml").read_text())
    assert saved["model"]["class_path"] == "miepo.methods.RewardsInContext"
    assert saved["model"]["init_args"]["learning_rate"] == 0.02  # and the policy's settings were kept
    assert saved["model"]["init_args"]["policy"]["init_args"]["base"] == str(tiny_model)
    header, *rows = (tmp_path / "run/version_0/metrics.csv").read_text().splitlines()
    assert {"front/hv", "information/preference", "time/step", "loss"} <= set(header.split(","))
    assert len(rows) >= 6
    main([
        "validate", "--config", str(tmp_path / "fit.yaml"), "--config", str(overlay), "--ckpt_path",
        str(checkpoint(tmp_path)),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("exploration", "message"),
    [
        ({"class_path": "Entropy"}, "Entropy"),
        ({"class_path": "miepo.router.SampleRouter"}, "SampleRouter"),
        ({"class_path": "Matching", "init_args": {"beta_w": 0.1}}, "beta_w"),
    ],
)
def test_an_unknown_exploration_term_is_named(
    exploration: dict, message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run("fit", config(tiny_model, tmp_path, model__exploration=exploration), tmp_path)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_three_objectives_and_prompt_conditioning(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "m", chat=False)
    values = config(model, tmp_path, data__grid=None)
    third = {"letter": "o", "normalisation": {"mean": 0.0, "sd": 1.0}}
    values["objectives"].append({"class_path": "tests.helpers.tiny.Letters", "init_args": third})
    values["model"]["policy"]["init_args"]["conditioning"] = [{"class_path": "miepo.policy.PromptConditioning"}]
    values["model"] |= {
        "exploration": {"class_path": "InfoNCE", "init_args": {"num_counterfactuals": 2}},
        "router": {"class_path": "miepo.router.SampleRouter"},
    }
    run("fit", values, tmp_path)
    assert list(tmp_path.glob("run/version_0/fronts/step_000002.png"))
