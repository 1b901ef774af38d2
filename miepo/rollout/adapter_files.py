"""The adapter as files, each state of it in a folder of its own: for engines beside the model that trains."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from miepo.errors import UserError, first_line
from miepo.policy import Policy


def new_prefix() -> str:
    """Return the beginning of names that no other run has."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk.

    Attributes:
        number: Counts all that were written, from 1.
        name: That no other adapter of any run has: a server keeps what it computed with an adapter under its name.
        folder: In PEFT's format.
    """

    number: int
    name: str
    folder: Path


class AdapterFiles:
    """Writes the adapter of a policy when it has changed, and a gated one as plain LoRA under one gate where asked.

    A folder is written under another name and renamed, so that who sees it sees all of it.

    Args:
        folder: Where adapters go, which must be writable; by default a temporary folder that goes with the process.
        prefix: Of their names; drawn by default.
    """

    def __init__(self, folder: Path | None = None, prefix: str | None = None) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="miepo_adapters_"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self.prefix = prefix or new_prefix()
        self.written = 0
        self.current: dict[bytes, AdapterFile] = {}  # of this version, by gate
        self._state: tuple[int, ...] = ()

    def outdated(self, policy: Policy) -> list[AdapterFile] | None:
        """Return the adapters that are no longer the policy's; None where it is as it was when this was last asked."""
        state = tuple(p._version for p in policy.adapter_parameters().values())
        if state == self._state:
            return None
        former, self.current, self._state = list(self.current.values()), {}, state
        return former

    def file(self, policy: Policy, gate: Tensor | None = None) -> AdapterFile:
        """Return the adapter as it is, under a gate ``(1, R)`` or, without one, with all its blocks.

        Raises:
            UserError: it cannot be written.
        """
        key = b"" if gate is None else gate.cpu().numpy().tobytes()
        if key not in self.current:
            self.written += 1
            name = f"{self.prefix}-{self.written}"
            folder, partial = self.folder / name, self.folder / f".{name}.partial"
            try:
                partial.mkdir(parents=True)
                policy.save_adapter(partial, gate)
                partial.replace(folder)
            except Exception as error:  # of the disk; safetensors has an error of its own for it
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"expected room for the adapter in a folder that can be written, '{self.folder}': "
                    f"{first_line(error)}"
                ) from error
            self.current[key] = AdapterFile(self.written, name, folder)
        return self.current[key]

    @staticmethod
    def remove(files: list[AdapterFile]) -> None:
        """Delete the folders of adapters that no one reads any more."""
        for file in files:
            shutil.rmtree(file.folder, ignore_errors=True)
