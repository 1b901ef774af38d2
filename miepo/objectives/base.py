"""The base class of objectives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from miepo.errors import ObjectiveError, UserError, place_of
from miepo.recorded import Recorded, import_path
from miepo.renamed import current_class

NO_SCORE = ("name", "normalisation", "concurrent")  # arguments of an objective that change no score
# what an objective is asked when it is loaded
TRIAL = (["What is a garden?", "Hello"], ["A place where plants grow.", "Hi there!"])


@dataclass(frozen=True)
class Normalisation:
    """Rewards are reported as ``(score - mean) / sd``; both are in the units of the raw score."""

    mean: float
    sd: float

    def __post_init__(self) -> None:
        """Raise ValueError where these are no finite numbers, or the standard deviation is not positive."""
        for value in (self.mean, self.sd):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                raise ValueError(f"not a finite number: {value!r}")
        if self.sd <= 0:
            raise ValueError(f"not positive: {self.sd!r}")


class Objective(Recorded, Callback):
    """One objective. Subclasses implement :meth:`score`; everything else has a default.

    As a callback an objective lives with the run: :meth:`load` is called on every process before training, the state
    goes into the checkpoint. Scores flow only through :meth:`score`.

    Args:
        name: Name of the objective in logs, preferences and checkpoints; the lower-case class name by default.
        normalisation: ``{mean: .., sd: ..}`` measured on offline data. By default it is measured on the first rollouts.
    """

    higher_is_better: bool = True
    # asked in a thread of its own, beside other objectives and the reference: for those that wait, for a server say
    concurrent: bool = False
    failures = 0  # calls given up since they were last counted
    normalisation_given = False  # whether the configuration states it, which counts more than a checkpoint's then
    # attributes that make it what it is, so that with others it gives other scores; by default what it was built with
    identity: Sequence[str] | None = None

    def __init__(self, name: str | None = None, normalisation: dict[str, float] | None = None) -> None:
        self.name = name or type(self).__name__.lower()
        if not self.name.isprintable() or any(c in self.name for c in "<>/{},:= "):
            raise UserError(f"an objective's name must be one word without <>/{{}},:= , got {self.name!r}")
        self.normalisation: Normalisation | None = None
        self.has_scored = False  # a number, in this run
        self.normalisation_given = normalisation is not None
        if normalisation is not None:
            try:
                self.normalisation = Normalisation(**normalisation)
            except (TypeError, ValueError, OverflowError):
                raise UserError(
                    f"{self.name}: normalisation needs a finite mean and a positive sd, got {normalisation}"
                ) from None

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def load(self, device: torch.device) -> None:
        """Load what scoring needs, on ``device`` where it can. Called once before anything is scored."""

    def check(self) -> None:
        """Refuse, by an ObjectiveError, what :meth:`load` loaded where its scores cannot be right."""

    def unload(self) -> None:
        """Free what :meth:`load` loaded."""

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Sequence[float]:
        """Return one number per (prompt, response), ``(N,)``; NaN where there is no score."""
        raise NotImplementedError(f"{type(self).__name__} must implement score(prompts, responses)")

    # -- what the framework calls --------------------------------------------------------------------------------------

    def reward(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Return raw scores turned so that higher is better, ``(N,)`` float32 on the CPU; NaN where one is not finite.

        Raises:
            ObjectiveError: the objective raised, or returned something else than N numbers.
        """
        if not prompts:
            return torch.empty(0)
        try:
            with torch.no_grad():
                scores = torch.as_tensor(self.score(prompts, responses)).detach().float().cpu()
        except UserError:
            raise
        except Exception as error:
            place = place_of(error)
            where = f" ({place[0]}, line {place[1]})" if place and place[0] != __file__ else ""
            message = f"objective {self.name} failed to score: {type(error).__name__}: {error}{where}"
            raise ObjectiveError(message) from error
        if scores.shape != (len(prompts),):
            raise ObjectiveError(
                f"objective {self.name}: expected scores of shape ({len(prompts)},), one per response, "
                f"got {tuple(scores.shape)}"
            )
        scores = torch.where(scores.isfinite(), scores, torch.nan)  # an infinite score is none
        return scores if self.higher_is_better else -scores

    def normalise(self, rewards: Tensor) -> Tensor:
        """Return ``(reward - mean) / sd``, of any shape."""
        if self.normalisation is None:
            raise RuntimeError(f"objective {self.name} has no normalisation yet")
        return (rewards - self.normalisation.mean) / self.normalisation.sd

    def calibrate(self, rewards: Tensor) -> None:
        """Take mean and standard deviation of ``rewards`` ``(n,)`` as the normalisation."""
        finite = rewards[rewards.isfinite()].double()
        if len(finite) < 2:
            raise ObjectiveError(
                f"objective {self.name}: expected numbers to normalise by, got {len(finite)} finite scores "
                f"of {len(rewards)}"
            )
        sd = finite.std().item()
        if sd <= 1e-8 * max(1.0, abs(finite.mean().item())):
            rank_zero_warn(f"objective {self.name} gave every response the same score; it cannot order a pair")
            sd = 1.0
        self.normalisation = Normalisation(finite.mean().item(), sd)

    @property
    def state_key(self) -> str:
        return f"Objective[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        n = self.normalisation
        return {} if n is None else {"mean": n.mean, "sd": n.sd, "of": identity_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a subclass may keep more
        normalisation = {key: value for key, value in state_dict.items() if key in ("mean", "sd")}
        if not normalisation:
            return
        try:
            saved = Normalisation(**normalisation)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{self.name}: expected a normalisation by finite numbers in the checkpoint, got {normalisation}"
            ) from None
        of = state_dict.get("of")
        if not self.normalisation_given and of is not None and not alike(of, now := identity_of(self)):
            raise UserError(
                f"{self.name}: the checkpoint's normalisation was measured with {of}, the config has {now}: expected "
                "the same objective, or a normalisation of its own in the config"
            )
        if not self.normalisation_given:
            self.normalisation = saved
        elif saved != self.normalisation:
            rank_zero_info(
                f"{self.name}: normalised by {saved} in the checkpoint, by {self.normalisation} now, which counts"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            self.load_checked(trainer.strategy.root_device)

    def load_checked(self, device: torch.device) -> None:
        """Load the objective and lets it score two responses: a wrong shape or a crash shows before a rollout is.

        Raises:
            UserError: names the objective.
        """
        try:
            self.load(device)
        except UserError:
            raise
        except Exception as error:
            raise ObjectiveError(f"objective {self.name} failed to load: {type(error).__name__}: {error}") from error
        self.reward(*TRIAL)
        self.check()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.unload()


def identity_of(objective: Objective) -> dict[str, Any]:
    """Return what a normalisation belongs to: with another model, label or sign it would be another."""
    kind = type(objective)
    named = objective.identity
    built_with = {k: v for k, v in objective.built_with.items() if k not in NO_SCORE}
    own = {k: _told(v) for k, v in (built_with if named is None else {k: getattr(objective, k) for k in named}).items()}
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "higher_is_better": objective.higher_is_better,
        **own,
    }


def alike(saved: Any, now: Any) -> bool:
    """Return whether an identity that was saved is that of now, in all it tells: older files tell less."""
    if isinstance(saved, dict) and isinstance(now, dict):
        if isinstance(saved.get("class"), str):
            saved = {**saved, "class": current_class(saved["class"])}
        return all(key in now and alike(value, now[key]) for key, value in saved.items())
    return bool(saved == now)


def _told(value: Any) -> Any:
    """Return an argument as a file can hold it: plain values as they are, others by their name or class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _told(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(entry) for entry in value]
    return import_path(value if hasattr(value, "__qualname__") else type(value))


def take_failures(objectives: Sequence[Objective]) -> dict[str, int]:
    """Return ``failed/NAME``: calls that objectives gave up since this was last asked, of those that may."""
    found = {}
    for objective in objectives:
        if hasattr(objective, "on_failure"):
            found[f"failed/{objective.name}"], objective.failures = objective.failures, 0
    return found


def objectives_of(trainer: Trainer) -> list[Objective]:
    """Return the objectives among the trainer's callbacks, in order: column k of every ``(.., K)`` tensor is the k-th.

    Raises:
        UserError: there is none, or two have one name.
    """
    objectives = [c for c in trainer.callbacks if isinstance(c, Objective)]  # type: ignore[attr-defined]
    if not objectives:
        raise UserError("expected at least one objective, got none: list them under 'objectives:' in the config")
    if nameless := [type(o).__name__ for o in objectives if not hasattr(o, "name")]:
        raise UserError(f"objective {nameless[0]} has no name: its __init__ must call super().__init__(name)")
    names = [o.name for o in objectives]
    for name, suffix in product(names, ("_low", "_high")):
        if name + suffix in names:
            raise UserError(f"an objective may not be called {name}{suffix} beside {name}, whose interval is logged so")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"expected objectives with different names, got two named {', '.join(twice)}: set 'name'")
    return objectives
