"""A policy and its objectives from what was saved of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from miepo.errors import NoBase, UserError, first_line
from miepo.objectives import Objective
from miepo.objectives.python_objective import PythonObjective
from miepo.policy import Conditioning, Policy
from miepo.trained.saved import (
    Saved,
)
from miepo.training.checkpoint_io import check_adapter, check_base


def build_policy(
    saved: Saved, changes: Mapping[str, Any], trust: bool = False, device: torch.device | None = None
) -> Policy:
    """Return the network with the saved adapter, on the CPU, for ``device``."""
    if saved.policy is None:
        raise UserError(f"'{saved.source}' keeps no configuration: expected one written by miepo fit")
    spec = json.loads(json.dumps(saved.policy))
    if not isinstance(spec, dict) or not isinstance(spec.get("init_args"), dict):
        raise UserError(f"'{saved.source}' does not say how its policy is made")
    spec["init_args"] |= {key: value for key, value in changes.items() if value is not None}
    spec["init_args"] |= {"lora_dropout": 0.0, "gradient_checkpointing": False}
    policy: Policy = _build(spec, Policy, saved.source, trust)
    try:
        policy.build(saved.names, device)
    except NoBase as error:
        if changes.get("base") is not None:
            raise
        raise UserError(f"{error}; if the base model has moved, base= (--base) says where it is") from None
    parameters = policy.adapter_parameters()
    check_adapter(parameters, saved.adapter)
    check_base(policy, saved.base, saved.fingerprint)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved.adapter[name])
    return policy.requires_grad_(False)


def build_objectives(saved: Saved, trust: bool = False) -> list[Objective]:
    """Return the objectives as they were in training, without their models."""
    if not saved.objectives:
        raise UserError(f"'{saved.source}' does not say how its objectives are made: give load(.., objectives=[..])")
    found: list[Objective] = [_build(spec, Objective, saved.source, trust) for spec in saved.objectives]
    if (names := tuple(o.name for o in found)) != saved.names:
        raise UserError(f"'{saved.source}' has the objectives {list(saved.names)}, but builds {list(names)}")
    return found


def _build(spec: Any, kind: type, source: str, trust: bool) -> Any:
    """Return an object from ``class_path`` and ``init_args``; code of others than miepo only where it is trusted.

    Not by the parser of configurations: it takes any text for the name of a class or of a file where that would fit.
    """
    if (foreign := [path for path in _imports(spec) if not path.startswith("miepo.")]) and not trust:
        raise UserError(
            f"'{source}' names {', '.join(foreign)}, which is not miepo's own code: trust=True (--trust) imports it"
        )
    try:
        built = _instance(spec, trust)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot build what '{source}' names: {first_line(error)}") from None
    if not isinstance(built, kind):
        raise UserError(f"'{source}' names a {type(built).__name__}: expected a {kind.__name__}")
    return built


def _instance(spec: Any, trust: bool) -> Any:
    if isinstance(spec, list):
        return [_instance(value, trust) for value in spec]
    if not isinstance(spec, dict):
        return spec
    if "class_path" not in spec:
        return {key: _instance(value, trust) for key, value in spec.items()}
    module, _, name = spec["class_path"].rpartition(".")
    arguments = {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    kind = getattr(import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, (Policy, Objective, Conditioning))):
        raise TypeError(f"{spec['class_path']} is no policy, objective or conditioning")
    if issubclass(kind, PythonObjective) and not trust:  # by whatever name: it imports what it is given
        raise UserError("a PythonObjective imports code that is not miepo's own code: trust=True (--trust) allows it")
    return kind(**{key: _instance(value, trust) for key, value in arguments.items()})


def _imports(spec: Any) -> list[str]:
    """Import paths of code that a specification names."""
    if isinstance(spec, list):
        return [path for value in spec for path in _imports(value)]
    if not isinstance(spec, dict):
        return []
    own = [str(spec["class_path"])] if "class_path" in spec else []
    if own and own[0].endswith(".PythonObjective"):
        own.append(str((spec.get("init_args") or {}).get("function")))
    return own + [path for value in spec.values() for path in _imports(value)]
