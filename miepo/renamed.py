"""Old names and settings, which configurations and checkpoints of 0.1 may hold; they go with the next release."""

from __future__ import annotations

import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from miepo.errors import UserError

RENAMED = {
    "miepo.callbacks.reporting": "miepo.training.reporting",
    "miepo.callbacks.run_checkpoint": "miepo.training.run_checkpoint",
    "miepo.checkpoints": "miepo.training.checkpoint_io",
    "miepo.datamodule": "miepo.data.module",
    "miepo.datasets": "miepo.data.datasets",
    "miepo.dialogue": "miepo.text",
    "miepo.export": "miepo.trained.export",
    "miepo.front": "miepo.metrics.front_plot",
    "miepo.loggers": "miepo.training.loggers",
    "miepo.module": "miepo.methods.mi_epo",
    "miepo.normalisation": "miepo.objectives.normalisation",
    "miepo.objectives.patient": "miepo.objectives.retrying",
    "miepo.parts": "miepo.methods.micro_batches",
    "miepo.policy.attention": "miepo.policy.tree_attention",
    "miepo.policy.packing": "miepo.policy.prefix_tree",
    "miepo.policy_module": "miepo.methods.base",
    "miepo.prompts": "miepo.data.prompts",
    "miepo.rollout.plain_decoder": "miepo.trained.plain_decoder",
    "miepo.rollout.streaming": "miepo.trained.streaming",
    "miepo.rows": "miepo.data.reading",
    "miepo.steer": "miepo.serving.steer",
    "miepo.strategies": "miepo.training.sharded_strategy",
}

# classes by the name of their module then
CLASSES = {"miepo.objectives.patient.Patient": "miepo.objectives.retrying.RetryingObjective"}

# settings of the exploration terms, by what they were without being set: tools/study/exploration.py has variants
REMOVED = {"per_token": False, "clip": None, "candidates": 1, "warmup": 0.0}
TERMS = ("InfoNCE", "PairwiseInformation", "Matching", "CounterfactualAlignment")


def current_settings(config: Any) -> Any:
    """Return a configuration without the settings that are gone.

    Raises:
        UserError: one of them is not as it was without being set.
    """
    if isinstance(config, list):
        return [current_settings(value) for value in config]
    if not isinstance(config, dict):
        return config
    name = str(config.get("class_path")).rpartition(".")[2]
    if name in TERMS and isinstance(arguments := config.get("init_args"), dict):
        for key in REMOVED.keys() & arguments.keys():
            if arguments[key] != REMOVED[key]:
                raise UserError(f"{name} has no setting {key} any more: tools/study/exploration.py has variants of it")
        return config | {"init_args": {key: value for key, value in arguments.items() if key not in REMOVED}}
    return {key: current_settings(value) for key, value in config.items()}


def current_class(path: str) -> str:
    """Return the import path that a class has now."""
    return CLASSES.get(path, path)


def new_name(name: str) -> str | None:
    """Return what a module, or the package around it, is called now; None where it was not renamed."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None


class _RenamedModules(MetaPathFinder, Loader):
    """Imports a module by its old name, with a warning that tells the new one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if new_name(fullname) is None else ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        new = new_name(module.__name__)
        assert new is not None
        warnings.warn(f"{module.__name__} is called {new} now: use that name", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)  # one module under two names, and no second class


def old_names(module: str, **classes: type) -> Callable[[str], type]:
    """Return a module's ``__getattr__`` that knows classes by their old names, too."""

    def find(name: str) -> type:
        if name not in classes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = classes[name].__name__
        warnings.warn(f"{module}.{name} is called {new} now: use that name", FutureWarning, stacklevel=2)
        return classes[name]

    return find


class _OldOption(Action):
    """Sets the option of the new name."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None) -> None:
        warnings.warn(f"{option} is called --{self.dest} now: use that name", FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)


def add_old_option(parser: ArgumentParser, old: str, new: str) -> None:
    """Let a parser read a number under the old name of an option; its help does not tell of it."""
    parser.add_argument(f"--{old}", dest=new, type=int, action=_OldOption, default=SUPPRESS, help=SUPPRESS)


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _RenamedModules) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedModules())
