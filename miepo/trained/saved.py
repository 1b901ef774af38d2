"""What a run, a checkpoint or an exported folder holds of a trained policy, read without executing anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from miepo.errors import UserError, first_line
from miepo.evaluation import Evaluation, evaluations_in, measured_front
from miepo.exploration import InfoNCE
from miepo.metrics.front_plot import Front
from miepo.policy.policy import ADAPTER
from miepo.recorded import without_prompts
from miepo.training.checkpoint_io import read_checkpoint
from miepo.vllm.request import CARD

PAPERS_TERM = {"class_path": "miepo.exploration.InfoNCE", "init_args": {"beta_w": InfoNCE().beta_w}}  # MIEPO's default
PREFIX = "policy."  # of the policy's weights in a checkpoint


@dataclass(frozen=True)
class Saved:
    """What is known of a trained policy without building it."""

    source: str
    names: tuple[str, ...]
    base: str
    fingerprint: str | None  # of the base weights
    policy: dict[str, Any] | None  # class_path and init_args; None where no configuration was kept
    objectives: list[dict[str, Any]]  # class_path and init_args of each
    normalisations: dict[str, dict[str, float]]  # mean and sd by objective
    adapter: dict[str, Tensor]  # by the names of the policy's parameters
    max_new_tokens: int = 128  # what it was trained with
    stop: tuple[str, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()  # the first and the last
    settings: dict[str, Any] = field(default_factory=dict)  # by which it was trained

    @property
    def front(self) -> Front | None:
        """What was reached under each preference vector, where it was measured."""
        return measured_front(self.evaluations)

    @classmethod
    def read(cls, path: str | Path) -> Saved:
        """Read a run's folder, a checkpoint or an exported folder; nothing in it is executed.

        Raises:
            UserError: there is none of them at ``path``.
        """
        path = Path(path)
        if (path / CARD).is_file():
            return _read_export(path)
        file = _newest(path) if path.is_dir() else path
        if not file.is_file():
            hint = ""
            if any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
                hint = ", which is a model for Transformers and PEFT: of those miepo reads exports of the whole simplex"
            elif (path / "config.yaml").is_file():
                hint = ", which is a run without a checkpoint"
            elif runs := sorted(path.glob("version_*/checkpoints/last.ckpt")):
                hint = f", which holds runs such as '{runs[-1].parents[1]}'"
            raise UserError(f"expected a run's folder, a checkpoint or a folder of miepo export, got '{path}'{hint}")
        return _read_checkpoint(file)


def _newest(run: Path) -> Path:
    """Return the checkpoint that a run goes on from; of a run without one, the newest that Lightning wrote."""
    last, folder = run / "checkpoints" / "last.ckpt", run / "checkpoints"
    if last.is_file() or not folder.is_dir():
        return last
    return max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, default=last)


def _read_checkpoint(path: Path) -> Saved:
    checkpoint = read_checkpoint(path)
    try:
        return _saved(path, checkpoint)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"expected a checkpoint of miepo at '{path}', got another: {first_line(error)}") from None


def _saved(path: Path, checkpoint: dict[str, Any]) -> Saved:
    saved = checkpoint["miepo"]
    config = saved.get("config") or {}
    data = (config.get("data") or {}).get("init_args") or {}
    states = checkpoint.get("callbacks", {})
    names = tuple(saved["objectives"])
    return Saved(
        source=str(path),
        names=names,
        base=saved["base"],
        fingerprint=saved.get("fingerprint"),
        policy=(((config.get("model") or {}).get("init_args")) or {}).get("policy") or saved.get("policy_built_by"),
        objectives=config.get("objectives") or [],
        normalisations={name: states[key] for name in names if states.get(key := f"Objective[{name}]")},
        adapter={k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items()},
        max_new_tokens=data.get("max_new_tokens", 128),
        stop=tuple(((data.get("engine") or {}).get("init_args") or {}).get("stop") or ()),
        evaluations=tuple(evaluations_in(saved, names, states)),
        settings=_settings(config, checkpoint.get("global_step")),
    )


def _settings(config: Mapping[str, Any], steps: Any) -> dict[str, Any]:
    """Return what of a configuration says how a policy was trained; the policy and what it was measured on apart."""
    model, data = (config.get(key) or {} for key in ("model", "data"))
    arguments = {key: value for key, value in (model.get("init_args") or {}).items() if key != "policy"}
    if "exploration" in arguments:
        arguments["exploration"] = arguments["exploration"] or PAPERS_TERM
    rollouts = without_prompts(data.get("init_args") or {})
    rollouts = {key: value for key, value in rollouts.items() if not key.startswith("predict")}
    found = {"method": model.get("class_path"), "steps": steps, "seed": config.get("seed_everything")}
    found |= {"model": _stated(arguments), "data": _stated(rollouts), "objectives": config.get("objectives")}
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _read_export(folder: Path) -> Saved:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
        older = {"ParetoFront": card.pop("front", None), "EvaluationTable": card["evaluations"]}
        blocks = card.pop("blocks")
        card.pop("writes", None)  # which the policy itself says, too
        for name, weight in weights.items():
            for block in blocks if ".lora_B." in name else []:
                if block["objective"] is not None:  # as it lies there, the adapter follows equal weights
                    weight[:, slice(*block["columns"])] *= len(card["names"])
        card |= {
            "names": tuple(card["names"]),
            "stop": tuple(card["stop"]),
            "source": str(folder),
            "adapter": {f"model.{k.removesuffix('.weight')}.{ADAPTER}.weight": v for k, v in weights.items()},
            "evaluations": tuple(evaluations_in(card, card["names"], older)),
        }
        return Saved(**card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"expected a folder of miepo export at '{folder}', got another: {first_line(error)}") from None
