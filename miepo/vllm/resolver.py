"""A plain adapter for each preference that is asked for, by vLLM's own resolvers: nothing of vLLM is changed.

A server that is started with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``, without which vLLM asks no resolver, and
``MIEPO_POLICIES=NAME=FOLDER`` (several separated by commas) answers the model ``NAME@relevance=0.2,brevity=0.8``.
Every preference takes one of the server's ``--max-loras``.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from miepo.errors import UserError
from miepo.vllm.request import Card, split_name

ENVIRONMENT = "MIEPO_POLICIES"
MOST = 1024  # adapters on disk; vLLM has read the oldest long since
WEIGHTS = "adapter_model.safetensors"

log = logging.getLogger("vllm.miepo")


def named_folders(text: str) -> dict[str, Path]:
    """Return the folders of policies by name.

    >>> named_folders("a=/policies/a, b=/policies/b")
    {'a': PosixPath('/policies/a'), 'b': PosixPath('/policies/b')}

    Raises:
        UserError: an entry has no name.
    """
    found = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, folder = entry.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"{ENVIRONMENT}: expected NAME=FOLDER, got {entry!r}")
        found[name] = Path(folder)
    return found


class PreferenceAdapters:
    """Writes plain adapters of gated policies, one for each preference.

    Args:
        policies: Folders of ``miepo export`` for the whole simplex, by name.
    """

    def __init__(self, policies: Mapping[str, Path]) -> None:
        self.cards = {name: Card(folder) for name, folder in policies.items()}
        self.policies = dict(policies)
        self.weights = {name: load_file(folder / WEIGHTS) for name, folder in policies.items()}
        self.folder = Path(tempfile.mkdtemp(prefix="miepo_preferences_"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.written: dict[str, Path] = {}

    def folder_of(self, name: str) -> Path | None:
        """Return the folder of the adapter for ``POLICY@weights``, None where there is no such policy.

        Raises:
            UserError: the weights are none.
        """
        policy, stated = split_name(name)
        if policy not in self.cards or stated is None:
            return None
        card = self.cards[policy]
        gate = card.gate(card.weights(stated))
        key = sha256(repr((policy, gate)).encode()).hexdigest()[:24]
        if key not in self.written:
            while len(self.written) >= MOST:
                shutil.rmtree(self.written.pop(next(iter(self.written))), ignore_errors=True)
            self.written[key] = self._write(policy, gate, self.folder / key)
        return self.written[key]

    def _write(self, policy: str, gate: list[float], folder: Path) -> Path:
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir()
        state = {}
        for name, weight in self.weights[policy].items():
            if ".lora_B." in name:
                factor = torch.ones(weight.shape[1])
                for (start, end), value in zip(self.cards[policy].columns, gate, strict=True):
                    factor[start:end] = value
                weight = (weight * factor.to(weight)).contiguous()
            state[name] = weight
        save_file(state, partial / WEIGHTS)
        shutil.copy(self.policies[policy] / "adapter_config.json", partial)
        return partial.replace(folder)


def register(text: str) -> None:
    """Register the resolver with vLLM, for the policies that the environment names."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    adapters = PreferenceAdapters(named_folders(text))

    class PreferenceResolver(LoRAResolver):
        """Resolves names that state a preference."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                folder = adapters.folder_of(lora_name)
            except UserError as error:
                log.warning("%s: %s", lora_name, error)
                return None
            # the number is another that vLLM gives it
            return None if folder is None else LoRARequest(lora_name, 1, str(folder))

    LoRAResolverRegistry.register_resolver("miepo", PreferenceResolver())
