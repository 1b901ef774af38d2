"""A run that was stopped and goes on equals one that was not, bit for bit."""

from __future__ import annotations

import signal
import socket
from math import cos, pi
from pathlib import Path

import pytest
import torch

from miepo import OnlinePreferenceDataModule
from miepo.types import PreferenceBatch, PromptBatch
from tests.helpers.data import write_rows
from tests.helpers.interruption import SIGINT, SIGTERM, SIGUSR1, StopAt, kept, logged, same
from tests.integration.test_cli import callbacks, config, run

PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food"]
PROMPTS += ["it is good", "rain in spring", "people grow food"]
WAYS = {
    "an evaluation after every epoch": {},
    "evaluations within an epoch": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation and evaluations within an epoch": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "a number of steps": {"max_epochs": -1, "max_steps": 12},
    "a number of steps that ends with an evaluation": {"max_epochs": -1, "max_steps": 10},
    "a part of every epoch": {"limit_train_batches": 3},
}

METHODS = ("SupervisedFineTuning", "RewardsInContext")


def values_of(model: Path, root: Path, way: str) -> dict:
    """Three epochs of five batches with dropout, sampling, clipping, a warm-up and evaluations."""
    values = config(model, root)
    values["trainer"] |= {"max_epochs": 3, "gradient_clip_val": 1.0} | WAYS[way]
    values["trainer"]["callbacks"] = callbacks({"class_path": "tests.helpers.interruption.StopAt"})
    front = next(entry for entry in values["trainer"]["callbacks"] if entry["class_path"].endswith("ParetoFront"))
    front["init_args"] = {"draw": False}  # a fifth of the time
    values["data"] |= {"prompts": PROMPTS, "validation_prompts": ["the rain", "a garden"], "batch_size": 2}
    values["model"]["policy"]["init_args"]["lora_dropout"] = 0.2
    values["checkpoint"] = {"every_n_steps": 2}
    return values


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One undisturbed run for each way, made when it is first asked for."""

    class Runs(dict):
        def __missing__(self, way: str) -> Path:
            root = tmp_path_factory.mktemp("straight")
            run("fit", values_of(tiny_model, root, way), root)
            self[way] = root / "run" / "version_0"
            return self[way]

    return Runs()


def stopped(hook: str, step: int, number: int, values: dict, root: Path) -> None:
    StopAt.moment = (hook, step, number)
    with pytest.raises(SystemExit) as error:
        run("fit", values, root)
    assert error.value.code == 128 + number
    assert StopAt.moment is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("hook", "step", "number"),
    [
        ("on_train_batch_start", 1, SIGTERM),
        ("on_train_batch_end", 3, SIGINT),
        ("on_train_batch_end", 5, SIGTERM),
        ("on_validation_batch_end", None, SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny_model: Path, tmp_path: Path, straight: dict[str, Path], way: str, hook: str, step: int | None, number: int
) -> None:
    """Whatever the moment: in the middle of an epoch, at its end, in an evaluation."""
    values = values_of(tiny_model, tmp_path, way)
    whole = logged(straight[way])
    if step is None:  # the second evaluation after training began
        step = [int(row["step"]) + 1 for row in whole[1:] if "front/hv" in row][1]
        if "accumulation and" in way:  # Lightning has no name for a step that waits for more
            step = 1
    stopped(hook, step, number, values, tmp_path)
    run("fit", values, tmp_path, "--ckpt_path", "last")
    (version,) = (tmp_path / "run").iterdir()  # the same folder
    assert logged(version) == whole
    assert same(kept(version), kept(straight[way]))
    if (hook, step) == ("on_train_batch_end", 5):  # it is over, and stays as it is
        run("fit", values, tmp_path, "--ckpt_path", "last")
        assert logged(version) == whole
        assert same(kept(version), kept(straight[way]))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Epoch and position of every prompt that is trained on, as they come."""
    seen: list[tuple[int, int]] = []
    rollout = OnlinePreferenceDataModule.rollout

    def watched(self: OnlinePreferenceDataModule, batch: PromptBatch) -> PreferenceBatch:
        seen.extend(zip(batch.epochs, batch.positions, strict=True))
        return rollout(self, batch)

    monkeypatch.setattr(OnlinePreferenceDataModule, "rollout", watched)
    return seen


@pytest.mark.parametrize("parts", [[7, 12], [5, 12], [3, 7, 10, 12]])
def test_a_run_that_has_ended_goes_on_with_more_steps(
    tiny_model: Path, tmp_path: Path, parts: list[int], places: list[tuple[int, int]]
) -> None:
    """With the prompts that come next: those of one run with all of them."""
    for steps in parts:
        values = values_of(tiny_model, tmp_path, "a number of steps")
        values["trainer"] |= {"max_steps": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        run("fit", values, tmp_path, "--ckpt_path", "last")
    assert places == [(epoch, position) for epoch in range(3) for position in range(10)][:24]
    (version,) = (tmp_path / "run").iterdir()
    assert [int(row["step"]) for row in logged(version) if "loss" in row] == list(range(12))


@pytest.mark.parametrize(
    ("reached", "before", "after", "accumulated", "again"),
    [(6, 2, 4, 1, 2), (8, 4, 2, 1, 0), (6, 2, 3, 1, 0), (2, 2, 4, 1, 2), (4, 2, 1, 2, 0), (6, 1, 2, 2, 2)],
)
def test_an_epoch_goes_on_at_the_prompt_it_reached_with_batches_of_another_size(
    tiny_model: Path,
    tmp_path: Path,
    places: list[tuple[int, int]],
    reached: int,
    before: int,
    after: int,
    accumulated: int,
    again: int,
) -> None:
    """What does not fill a batch, or a step, is taken again; nothing is left out."""
    values = values_of(tiny_model, tmp_path, "an evaluation after every epoch")
    values["data"]["batch_size"] = before
    values["trainer"] |= {"accumulate_grad_batches": accumulated, "max_epochs": 2}
    stopped("on_train_batch_end", reached // (before * accumulated), SIGTERM, values, tmp_path)
    assert len(places) == reached
    values["data"]["batch_size"] = after
    run("fit", values, tmp_path, "--ckpt_path", "last")
    assert places == [(0, p) for p in [*range(reached), *range(reached - again, 10)]] + [(1, p) for p in range(10)]


@pytest.mark.parametrize(("before", "after", "step"), [(1, 5, 17), (5, 1, 5), (1, 2, 10)])
def test_the_learning_rate_goes_on_where_the_run_is(
    tiny_model: Path, tmp_path: Path, before: int, after: int, step: int
) -> None:
    """By the share of the run that is done, with batches of another size; it falls up to the end, and to nearly 0."""
    values = values_of(tiny_model, tmp_path, "an evaluation after every epoch")
    values["data"]["batch_size"] = before
    values["trainer"] |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    values["model"]["warmup"] = 0.0
    stopped("on_train_batch_end", step, SIGTERM, values, tmp_path)
    values["data"]["batch_size"] = after
    run("fit", values, tmp_path, "--ckpt_path", "last")
    (version,) = (tmp_path / "run").iterdir()
    rates = [float(row["learning_rate"]) for row in logged(version) if "loss" in row]
    whole = 30 // after  # steps of a run that had such batches from its beginning
    left = [0.005 * (1 + cos(pi * (whole - n) / whole)) for n in range(len(rates) - step, 0, -1)]
    assert rates[step:] == pytest.approx(left)
    assert rates[step] >= rates[-1]


def test_an_epoch_ends_with_its_evaluation_where_its_limit_is_behind(
    tiny_model: Path, tmp_path: Path, places: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its last batch is taken again then."""
    values = values_of(tiny_model, tmp_path, "a part of every epoch")
    values["data"]["batch_size"] = 3
    stopped("on_train_batch_end", 2, SIGTERM, values, tmp_path)
    values["data"]["batch_size"] = 1
    with caplog.at_level("INFO"):
        run("fit", values, tmp_path, "--ckpt_path", "last")
    assert "Batches or steps have another size: the epoch goes on after 2 rows, 4 of 6 are taken again" in caplog.text
    assert places == [(0, p) for p in (*range(6), 2)] + [(epoch, p) for epoch in (1, 2) for p in range(3)]
    (version,) = (tmp_path / "run").iterdir()
    assert [int(row["step"]) for row in logged(version) if "front/hv" in row][1:] == [2, 5, 8]


@pytest.mark.parametrize(("before", "after", "begins"), [(2, 4, 4), (4, 2, 4), (2, 2, 6)])
@pytest.mark.parametrize("old", [False, True])
def test_other_checkpoints_within_an_epoch_know_their_place(
    tiny_model: Path, tmp_path: Path, places: list[tuple[int, int]], before: int, after: int, begins: int, old: bool
) -> None:
    """Lightning's own, written before a batch is counted as completed; and ours of before they kept the batch's size."""
    values = values_of(tiny_model, tmp_path, "an evaluation after every epoch")
    kept_after = 1 if before == 4 else 3
    options = {"dirpath": str(tmp_path / "own"), "filename": "{step}", "every_n_train_steps": 1}
    options["save_top_k"] = -1
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    values["trainer"] |= {"max_epochs": 1, "callbacks": [*values["trainer"]["callbacks"], own]}
    values["data"]["batch_size"] = before
    run("fit", values, tmp_path)
    path = tmp_path / "own" / f"step={kept_after}.ckpt"
    if old:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]["RunCheckpoint"]["rows_per_batch"]
        torch.save(checkpoint, path)
    places.clear()
    values["data"]["batch_size"] = after
    run("fit", values, tmp_path, "--ckpt_path", str(path))
    assert places == [(0, p) for p in range(begins, 10)]


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1])
def test_a_signal_before_the_first_step(tiny_model: Path, tmp_path: Path, number: int) -> None:
    """There is nothing to keep; but the run has not ended, and its exit status says so."""
    before = signal.getsignal(number)
    values = values_of(tiny_model, tmp_path, "an evaluation after every epoch")
    stopped("on_validation_batch_end", 0, number, values, tmp_path)
    assert not list(tmp_path.glob("**/last.ckpt"))
    assert signal.getsignal(number) == before


def test_a_run_that_was_stopped_early_stays_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    values = values_of(tiny_model, tmp_path, "an evaluation after every epoch")
    patience = {"monitor": "front/hv", "mode": "max", "patience": 1, "min_delta": 100.0}
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": patience}
    values["trainer"]["callbacks"].append(stop)
    for _ in range(2):
        run("fit", values, tmp_path, "--ckpt_path", "last")
        (version,) = (tmp_path / "run").iterdir()
        assert kept(version)["global_step"] == 10
    assert [int(row["step"]) for row in logged(version) if "loss" in row] == list(range(10))


def values_of_method(method: str, model: Path, base: Path, root: Path) -> dict:
    """The same three epochs of another method."""
    values = values_of(model, root, "an evaluation after every epoch")
    policy = values["model"].pop("policy")["init_args"]
    if method == "RewardsInContext":
        policy["conditioning"] = [{"class_path": "miepo.methods.ric.TargetConditioning"}]
        data = {"class_path": "miepo.methods.RewardsInContextDataModule", "init_args": values["data"]}
    else:
        policy |= {"conditioning": [], "base": str(base), "template": "{prompt}{preference}"}
        rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, PROMPTS[::-1], strict=True)]
        write_rows(root / "examples.jsonl", rows)
        examples = {key: str(root / "examples.jsonl") for key in ("examples", "validation_examples")}
        data = {"class_path": "miepo.methods.SupervisedDataModule", "init_args": examples | {"batch_size": 2}}
        values["objectives"] = []
        stop = {"class_path": "tests.helpers.interruption.StopAt"}
        values["trainer"] |= {"callbacks": [stop], "num_sanity_val_steps": 1}
    arguments = {"policy": {"class_path": "miepo.Policy", "init_args": policy}, "learning_rate": 0.01}
    return values | {"model": {"class_path": f"miepo.methods.{method}", "init_args": arguments}, "data": data}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 12}])
@pytest.mark.parametrize(("after", "steps"), [(1, 8 + 14), (4, 8 + 2 + 3)])
def test_other_methods_go_on_with_batches_of_another_size(
    tiny_model: Path, tiny_base_model: Path, tmp_path: Path, method: str, limits: dict, after: int, steps: int
) -> None:
    """After six rows of ten in the second of three epochs, or eight steps of twelve."""
    values = values_of_method(method, tiny_model, tiny_base_model, tmp_path)
    values["trainer"] |= limits
    steps = limits.get("max_steps", steps)
    stopped("on_train_batch_end", 8, SIGTERM, values, tmp_path)
    values["data"]["init_args"]["batch_size"] = after
    run("fit", values, tmp_path, "--ckpt_path", "last")
    (version,) = (tmp_path / "run").iterdir()
    assert [int(row["step"]) for row in logged(version) if "loss" in row] == list(range(steps))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 3), ("on_train_batch_end", 8), ("on_validation_batch_end", None)]
)
def test_other_methods_go_on_bit_for_bit(
    tiny_model: Path, tiny_base_model: Path, tmp_path: Path, method: str, hook: str, step: int | None
) -> None:
    found = []
    for name in ("straight", "stopped"):
        root = tmp_path / name
        root.mkdir()
        values = values_of_method(method, tiny_model, tiny_base_model, root)
        if name == "stopped":
            stopped(hook, step or 10, SIGTERM, values, root)
            run("fit", values, root, "--ckpt_path", "last")
            run("fit", values, root, "--ckpt_path", "last")  # it is over, and stays as it is
        else:
            run("fit", values, root)
        (version,) = (root / "run").iterdir()
        found.append((logged(version), kept(version)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_the_same_seed_gives_the_same_run_without_a_network(
    tiny_model: Path, tmp_path: Path, straight: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another seed another run."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"something reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    way = "an evaluation after every epoch"
    for name, seed in (("same", "0"), ("other", "1")):
        (tmp_path / name).mkdir()
        values = values_of(tiny_model, tmp_path / name, way)
        run("fit", values, tmp_path / name, "--seed_everything", seed)
        version = tmp_path / name / "run" / "version_0"
        assert (logged(version) == logged(straight[way])) == (name == "same")
        assert same(kept(version), kept(straight[way])) == (name == "same")


def test_wandb_goes_on_with_the_same_run(
    tiny_model: Path, tmp_path: Path, straight: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, each process leaves a file of its own; all are of one run, and so is the folder of the checkpoint."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    way = "an evaluation after every epoch"
    values = values_of(tiny_model, tmp_path, way)
    options = {"project": "miepo", "save_dir": str(tmp_path), "offline": True}
    values["trainer"]["logger"] = [{"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": options}]
    stopped("on_train_batch_end", 3, SIGTERM, values, tmp_path)
    wandb.finish()
    run("fit", values, tmp_path, "--ckpt_path", "last")
    wandb.finish()
    (folder,) = (tmp_path / "miepo").iterdir()
    # by the files and not their folders, whose names get a number where both processes start within a second
    files = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert [file.stem.removeprefix("run-") for file in files] == [folder.name] * 2
    assert same(kept(folder), kept(straight[way]))
