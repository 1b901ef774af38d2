"""The stages of Rewards-in-Context over the prompts of a run: which scored responses a step imitates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import moocore
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from miepo.data.datasets import PreferenceDataset
from miepo.data.module import OnlinePreferenceDataModule
from miepo.data.samplers import OnlinePrompts
from miepo.errors import UserError
from miepo.objectives.normalisation import offline_responses
from miepo.objectives.scoring import normalise_rewards, start_scoring
from miepo.seeding import RandomStream, generator, torch_seeds
from miepo.training.distributed import gathered, gathered_rows, together
from miepo.types import PromptBatch, SupervisedBatch, Tokens

Selection = Literal["quantile", "non_dominated"]


def good_at_something(scores: Tensor, quantile: float) -> Tensor:
    """Return rows ``(n,)`` of ``scores`` ``(n, K)`` in which any score is at or above its quantile; NaN is not."""
    if not len(scores):
        return torch.zeros(0, dtype=torch.bool)
    thresholds = scores.nanquantile(quantile, 0)  # (K,)
    return (scores >= thresholds).any(-1)


def non_dominated(scores: Tensor) -> Tensor:
    """Return rows ``(n,)`` of ``scores`` ``(n, K)`` than which no row is better in one score and not worse in any.

    A row with NaN is none.

    >>> non_dominated(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5], [1.0, 0.0]]))
    tensor([ True,  True, False,  True])
    """
    finite, selected = scores.isfinite().all(-1), torch.zeros(len(scores), dtype=torch.bool)
    rows = scores[finite]
    if len(rows) and scores.shape[1] == 1:  # moocore starts at two objectives
        selected[finite] = (rows == rows.max()).squeeze(1)
    elif len(rows):
        selected[finite] = torch.from_numpy(
            moocore.is_nondominated(rows.double().numpy(), maximise=True, keep_weakly=True)
        )
    return selected


@dataclass
class Pool:
    """Scored responses."""

    prompts: list[str]
    responses: Tokens  # (n, T)
    scores: Tensor  # (n, K)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int]) -> Pool:
        """Return the responses at these places, in this order."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        tokens = Tokens(self.responses.ids[chosen], self.responses.mask[chosen])
        return Pool([self.prompts[i] for i in chosen.tolist()], tokens, self.scores[chosen])

    def good(self, selection: Selection, quantile: float) -> Pool:
        """Return the responses that the selection keeps: of a high quantile of some objective, or not dominated."""
        by_quantile = selection == "quantile"
        selected = good_at_something(self.scores, quantile) if by_quantile else non_dominated(self.scores)
        return self.rows(selected.nonzero().flatten().tolist())


def join(pools: Sequence[Pool], pad: int) -> Pool:
    """Join pools into one, responses padded with the token ``pad``."""
    width = max(pool.responses.ids.shape[1] for pool in pools)

    def padded(x: Tensor, value: Any) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

    return Pool(
        [prompt for pool in pools for prompt in pool.prompts],
        Tokens(
            torch.cat([padded(pool.responses.ids, pad) for pool in pools]),
            torch.cat([padded(pool.responses.mask, False) for pool in pools]),
        ),
        torch.cat([pool.scores for pool in pools]),
    )


class RewardsInContextDataModule(OnlinePreferenceDataModule):
    """The stages of RiC over the same prompts, in the same order, as an online method: two responses for each.

    The steps of a run are dealt out to the offline stage and the online rounds. At its first step a stage samples two
    responses for every prompt that falls into it and scores them: the base policy offline, the policy of the moment
    under drawn preferences online. A step then imitates ``2 B`` rows. The whole run samples and scores as many
    responses, and takes as many steps on as many rows, as MO-ODPO with the same settings.

    Args:
        offline: Share of the steps in the offline stage.
        offline_rows: What to train on offline instead of the policy's own responses: a ``.jsonl`` file with ``prompt``
            and ``response``, or ``offline``, the responses in the preference data set given as ``prompts``.
        rounds: Number of online rounds.
        selection: Which rows, its own and offline ones, an online round keeps: ``quantile``, as the code of RiC's
            authors does, those in which any score reaches its quantile; ``non_dominated``, as their paper says, those
            than which no other is better in one score and not worse in any. The second keeps far fewer.
        quantile: Of the first.
        **kwargs: Of :class:`~miepo.OnlinePreferenceDataModule`.
    """

    def __init__(
        self,
        *,
        offline: float = 0.5,
        offline_rows: str | None = None,
        rounds: int = 2,
        selection: Selection = "quantile",
        quantile: float = 0.7,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < offline <= 1:
            raise UserError(f"data.offline is a share of the steps, above 0 and at most 1, got {offline}")
        if rounds < 0 or (rounds == 0) != (offline == 1):
            raise UserError(f"data.rounds must be positive, or 0 with data.offline 1, got {rounds} with {offline}")
        if selection not in ("quantile", "non_dominated"):
            raise UserError(f"data.selection must be quantile or non_dominated, got {selection!r}")
        if not 0 <= quantile < 1:
            raise UserError(f"data.quantile must be at least 0 and below 1, got {quantile}")
        self.offline, self.rounds, self.offline_file = offline, rounds, offline_rows
        self.selection, self.quantile = selection, quantile
        self.stage = -1
        self.offline_pool: Pool | None = None
        self.pool: Pool | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        from miepo.methods.ric.module import RewardsInContext  # which needs this file for its schedule

        if not isinstance(self._module, RewardsInContext):
            raise UserError(
                f"data {type(self).__name__} needs model RewardsInContext, got {type(self._module).__name__}"
            )
        if self.offline_file is not None and stage == "fit":
            source = self.prompts if self.offline_file == "offline" else self.offline_file
            if self.offline_file == "offline" and not isinstance(source, PreferenceDataset):
                raise UserError("data.offline_rows offline needs a preference data set as data.prompts")
            self.offline_pairs = offline_responses(source)  # type: ignore[arg-type]

    def plan(self, steps: int) -> list[int]:
        """Return steps (or batches) of so many at which the stages end: the offline stage, then each round."""
        first = steps if self.rounds == 0 else max(1, round(self.offline * steps))
        return [first, *(first + round((steps - first) * (r + 1) / self.rounds) for r in range(self.rounds))]

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        self._train_prompts: OnlinePrompts = loader.dataset  # type: ignore[assignment]
        self._positions: range = loader.sampler.mine  # type: ignore[attr-defined]
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the pools: a resume in the middle of a stage goes on with its rows."""
        pools = {"pool": self.pool, "offline_pool": self.offline_pool}
        return (
            super().state_dict()
            | {"stage": self.stage}
            | {k: vars(p) | {"responses": vars(p.responses)} for k, p in pools.items() if p}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.stage = state_dict["stage"]
        for key in state_dict.keys() & {"pool", "offline_pool"}:
            saved = state_dict[key]
            setattr(self, key, Pool(saved["prompts"], Tokens(**saved["responses"]), saved["scores"]))

    def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> Any:
        """Return the rows that a step imitates, or an evaluation."""
        if not self._trainer.training:
            return self.evaluation(batch)
        self.ensure_normalised()
        trainer, per_epoch = self._trainer, int(self._trainer.num_training_batches)
        batches = trainer.fit_loop.epoch_loop.batch_progress
        steps = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else inf
        epochs = per_epoch * trainer.max_epochs if trainer.max_epochs > 0 else inf
        ends = self.plan(int(min(steps, epochs)))
        # batches before this one, of a resumed run, too, which may have had others
        index = batches.total.ready if steps <= epochs else trainer.current_epoch * per_epoch + batches.current.ready
        index = min(index, ends[-1] - 1)
        stage = next(s for s, end in enumerate(ends) if index < end)
        if stage != self.stage:
            self._begin(stage, range(index, ends[stage]), per_epoch)
        assert self.pool is not None
        rng = generator(RandomStream.SHUFFLE, self.seed, stage, 1)
        processes = trainer.world_size
        rows_per_prompt = self.responses * processes  # rows of a step for each of our prompts
        begin, size = ends[stage - 1] if stage else 0, rows_per_prompt * self.batch_size
        passes = -(-(ends[stage] - begin) * size // len(self.pool))  # over the pool in this stage
        order = np.concatenate([rng.permutation(len(self.pool)) for _ in range(passes)])
        start = (index - begin) * size
        chosen = order[start : start + rows_per_prompt * len(batch)].tolist()  # by all processes
        tokens = float(self.pool.rows(chosen).responses.mask.sum()) / processes
        rows = self.pool.rows(chosen[trainer.global_rank :: processes])
        device = self._policy.device
        return SupervisedBatch(rows.prompts, rows.responses.to(device), rows.scores.to(device), tokens)

    def _begin(self, stage: int, batches: range, per_epoch: int) -> None:
        """Sample, score and filter what a stage trains on."""
        fresh = self._read() if stage == 0 and self.offline_file else self._sample(stage, batches, per_epoch)
        if stage == 0:
            self.pool = self.offline_pool = fresh
        else:
            assert self.offline_pool is not None  # stage 0 came first, here or in the checkpoint
            parts = [pool.good(self.selection, self.quantile) for pool in (fresh, self.offline_pool)]
            self.pool = join(parts, self._policy.tokenizer.pad_token_id)
        if not len(self.pool):
            raise UserError("RewardsInContext has no response to imitate: every one was empty or had no score")
        self.stage = stage
        rank_zero_info(f"RiC stage {stage}: {len(fresh)} responses scored, {len(self.pool)} to imitate")

    def _sample(self, stage: int, batches: range, per_epoch: int) -> Pool:
        """Return ``n`` responses for each prompt of the stage; under drawn preferences in an online round."""
        module, policy, prompts = self._module, self._policy, self._train_prompts
        pools, places = [], []
        for index in batches:
            epoch, first = index // per_epoch, (index % per_epoch) * self.batch_size
            positions = self._positions[first : first + self.batch_size]
            texts = [prompts.at(epoch, p) for p in positions]
            draws = [
                self.preferences.draw(generator(RandomStream.PREFERENCE, self.seed, epoch, p), 1, len(module.names))[0]
                for p in positions
            ]
            preference = torch.from_numpy(np.stack(draws)).float()  # (B, K)
            seeds = torch_seeds(RandomStream.SAMPLING, self.seed, [epoch] * len(texts), positions)
            with policy.silent() if stage == 0 else nullcontext():  # the base has not read scores yet
                responses = self.engine.sample(policy, texts, preference, self.responses, self.max_new_tokens, seeds)
            raw = together(self._trainer, start_scoring(module.objectives, texts, responses.texts))
            scores = normalise_rewards(module.objectives, raw)
            self.scored_responses += self.responses * len(texts) * self._trainer.world_size
            usable = (scores.isfinite().all(-1) & ~responses.empty.cpu()).flatten()
            pool = Pool(
                [t for t in texts for _ in range(self.responses)],
                responses.tokens.flat().to("cpu"),
                scores.flatten(0, 1),
            )
            usable_rows = usable.nonzero().flatten().tolist()
            pools.append(pool.rows(usable_rows))
            places += [(epoch, positions[row // self.responses], row) for row in usable_rows]
        return self._of_all(join(pools, policy.tokenizer.pad_token_id), places)

    def _of_all(self, pool: Pool, places: Sequence[Any]) -> Pool:
        """Return the rows of all processes, in the order of their places: as if one had made them."""
        pools = join(gathered(self._trainer, pool), self._policy.tokenizer.pad_token_id)
        order = gathered_rows(self._trainer, places)
        return pools.rows(sorted(range(len(order)), key=order.__getitem__))

    def _read(self) -> Pool:
        """Return the offline file, tokenised and scored."""
        module, policy = self._module, self._policy
        offline = self.offline_pairs
        fitting = set(self._fitting(list(dict.fromkeys(offline.prompts)), "offline"))
        pairs = [(p, r) for p, r in zip(offline.prompts, offline.responses, strict=True) if p in fitting]
        self.scored_responses += len(pairs)
        mine = range(self._trainer.global_rank, len(pairs), self._trainer.world_size)
        if len(pairs) < self._trainer.world_size:
            raise UserError(f"expected at least one response for each of {self._trainer.world_size} processes")
        prompts, texts = map(list, zip(*(pairs[i] for i in mine), strict=True))
        ids = [
            [*policy.template.encode_response(prompt, "", text), policy.end_id]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids = [row[: self.max_new_tokens] for row in ids]
        tokens = Tokens.of_rows(ids, policy.tokenizer.pad_token_id)
        raw = together(self._trainer, start_scoring(module.objectives, prompts, [[text] for text in texts]))
        scores = normalise_rewards(module.objectives, raw)[:, 0]  # (n, K)
        usable = scores.isfinite().all(-1) & torch.tensor([bool(text.strip()) for text in texts])
        usable_rows = usable.nonzero().flatten().tolist()
        return self._of_all(Pool(prompts, tokens, scores).rows(usable_rows), [mine[i] for i in usable_rows])
