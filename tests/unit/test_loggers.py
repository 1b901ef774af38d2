"""The log: nothing of it is lost to a crash, and a run that goes on finds it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from miepo.training.loggers import CSVLogger, WandbLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run/version_0/metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logger(folder: Path, **options: bool) -> CSVLogger:
    return CSVLogger(str(folder), name="run", version=0, **options)


def test_a_crash_while_columns_come_leaves_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logger(tmp_path)
    log.log_metrics({"loss": 1.0}, step=0)
    log.save()
    log.log_metrics({"loss": 0.5, "front/hv": 2.0}, step=1)
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(csv.DictWriter, "writerows", killed)
        with pytest.raises(KeyboardInterrupt):
            log.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0"]
    again = logger(tmp_path, resume=True)
    again.log_metrics({"loss": 0.5, "front/hv": 2.0}, step=1)
    again.save()
    assert [(row["loss"], row["front/hv"]) for row in rows(tmp_path)] == [("1.0", ""), ("0.5", "2.0")]


def test_it_goes_on_where_it_is_told_to(tmp_path: Path) -> None:
    first = logger(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    again = logger(tmp_path, resume=True)
    again.forget_from(2)
    again.log_metrics({"loss": 7.0}, step=2)
    again.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "7.0"]
    with pytest.warns(UserWarning, match="exists and is not empty"):
        logger(tmp_path).log_metrics({"loss": 9.0}, step=0)  # another run of that version
    assert not (tmp_path / "run/version_0/metrics.csv").exists()


def test_wandb_has_nothing_to_warn_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    monkeypatch.setattr(wandb, "termwarn", lambda text, *_, **__: said.append(text))
    log = WandbLogger(project="miepo", save_dir=str(tmp_path / "runs"), offline=True)
    log.log_metrics({"loss": 1.0}, step=0)
    wandb.finish()
    assert said == []
    assert list((tmp_path / "runs/wandb").glob("offline-run-*"))


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_that_never_began_leaves_nothing(logged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    root = tmp_path / "runs"
    board, files = WandbLogger(project="miepo", save_dir=str(root), offline=True), logger(root)
    _ = board.experiment, files.experiment  # in Lightning's order
    for log in (files, board):
        log.log_hyperparams({"batch_size": 4})
        if logged:
            log.log_metrics({"loss": 1.0}, step=0)
        log.finalize("failed")
    assert (tmp_path / "runs/run/version_0").exists() == logged
    assert bool(list(tmp_path.glob("runs/wandb/offline-run-*"))) == (tmp_path / "runs").exists() == logged
    board.experiment.finish()


def test_links_to_the_newest_run_are_of_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("kept", "mistaken"):
        log = WandbLogger(project="miepo", save_dir=str(tmp_path), offline=True, version=name)
        log.log_hyperparams({"batch_size": 4})
        if name == "kept":
            log.log_metrics({"loss": 1.0}, step=0)
            wandb.finish()
    log.finalize("failed")
    (kept,) = tmp_path.glob("wandb/offline-run-*")
    links = [path.resolve() for path in (tmp_path / "wandb").iterdir() if path.is_symlink()]
    assert kept in links
    assert all(kept in (link, *link.parents) for link in links)


def test_what_was_there_before_a_mistake_stays(tmp_path: Path) -> None:
    (tmp_path / "run/version_0").mkdir(parents=True)  # named by the user
    log = logger(tmp_path)
    log.log_hyperparams({"batch_size": 4})
    log.finalize("failed")
    assert (tmp_path / "run/version_0/hparams.yaml").exists()
    log = CSVLogger(str(tmp_path), name="run", version=1)
    log.log_hyperparams({"batch_size": 4})
    (tmp_path / "run/version_1/checkpoints").mkdir()
    log.finalize("failed")
    assert (tmp_path / "run/version_1/checkpoints").exists()
    log = CSVLogger(str(tmp_path), name="run", version=2)
    log.log_hyperparams({"batch_size": 4})
    log.finalize("success")
    assert (tmp_path / "run/version_2").exists()
