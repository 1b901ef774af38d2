"""The normalisation of rewards, measured on offline data before the online stage, kept in a file, and checked there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miepo.data.datasets import PreferenceDataset
from miepo.data.datasets.base import fingerprint_of
from miepo.data.reading import read_rows
from miepo.errors import UserError
from miepo.objectives import Objective
from miepo.objectives.base import Normalisation, alike, identity_of
from miepo.objectives.scoring import score_responses
from miepo.resources import is_file

SCHEMA = 1


@dataclass(frozen=True)
class OfflineResponses:
    """Responses that the rewards are normalised by, and where they come from."""

    prompts: Sequence[str]
    responses: Sequence[str]
    source: str
    fingerprint: str


def offline_responses(source: PreferenceDataset | str) -> OfflineResponses:
    """Return both responses of every training comparison of a data set, or the rows of a file."""
    if isinstance(source, PreferenceDataset):
        pairs = [(c.prompt, response) for c in source.comparisons("train") for response in c.responses]
        name = f"{type(source).__name__} of '{source.source}'"
    else:
        rows = read_rows(source, {"prompt": str, "response": str}, blank=["response"])
        pairs, name = [(row["prompt"], row["response"]) for row in rows], f"'{Path(source).name}'"
    prompts, responses = zip(*pairs, strict=True)
    return OfflineResponses(prompts, responses, name, fingerprint_of(pairs))


def calibrate(objectives: Sequence[Objective], offline: OfflineResponses) -> None:
    """Measure the normalisation of ``objectives`` on offline responses."""
    rewards = score_responses(objectives, offline.prompts, [[r] for r in offline.responses])  # (n, 1, K)
    for k, objective in enumerate(objectives):
        objective.calibrate(rewards[..., k].flatten())


def write_normalisation(path: Path, objectives: Sequence[Objective], offline: OfflineResponses | None) -> None:
    """Write the normalisation of ``objectives`` and what it was measured on; whole or not at all."""
    values = {
        o.name: {**asdict(o.normalisation), "of": identity_of(o)} for o in objectives if o.normalisation is not None
    }
    measured = (
        None
        if offline is None
        else {"source": offline.source, "responses": len(offline.responses), "fingerprint": offline.fingerprint}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"schema": SCHEMA, "objectives": values, "data": measured}, indent=2) + "\n")
    part.replace(path)


def normalisations_in(path: Path) -> tuple[dict[str, Normalisation], dict[str, Any], dict[str, Any] | None]:
    """Return what :func:`write_normalisation` wrote.

    Normalisations, what objectives they are of, and the data, by name.

    Raises:
        UserError: there is no such file, or another wrote it.
    """
    if not is_file(path):
        raise UserError(f"expected a normalisation at '{path}', there is none: miepo normalise writes it")
    try:
        content = json.loads(path.read_text())
        values = {name: Normalisation(n["mean"], n["sd"]) for name, n in content["objectives"].items()}
        of, measured = {name: n["of"] for name, n in content["objectives"].items()}, content["data"]
        if measured is not None:
            measured = {key: measured[key] for key in ("responses", "source", "fingerprint")}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(
            f"expected a normalisation at '{path}', got a file that miepo normalise did not write"
        ) from None
    return values, of, measured


def read_normalisation(path: Path, objectives: Sequence[Objective], offline: OfflineResponses | None) -> None:
    """Give ``objectives`` without a normalisation what :func:`write_normalisation` wrote.

    Raises:
        UserError: there is no such file, it is of other objectives, or it was measured on other data than ``offline``.
    """
    values, of, measured = normalisations_in(path)
    for objective in objectives:
        if objective.normalisation is not None:
            continue
        if objective.name not in values:
            raise UserError(f"the normalisation at '{path}' is of {', '.join(values)}, and not of {objective.name}")
        if not alike(of[objective.name], identity_of(objective)):
            raise UserError(
                f"the normalisation of {objective.name} at '{path}' was measured with {of[objective.name]}, the config "
                f"has {identity_of(objective)}: measure it again"
            )
        objective.normalisation, objective.normalisation_given = values[objective.name], True
    if offline is not None and (measured is None or measured["fingerprint"] != offline.fingerprint):
        on = f"{measured['responses']} responses of {measured['source']}" if measured else "rollouts"
        raise UserError(
            f"the normalisation at '{path}' was measured on {on}; the config has {len(offline.responses)} responses of "
            f"{offline.source}, and they differ: measure it again"
        )
