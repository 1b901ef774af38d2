"""The LightningDataModule: prompts in, rollouts of the current policy with pairwise feedback out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from miepo.data.ahead import RolloutsAhead
from miepo.data.datasets import PreferenceDataset
from miepo.data.datasets.base import Split
from miepo.data.prompts import load_prompts, say_repeated, split_rows
from miepo.data.rollout import (
    PAIR,
    BegunRollout,
    Learner,
    RolloutSettings,
    begin_rollout,
    evaluate,
    finish_rollout,
)
from miepo.data.samplers import EvaluationShare, GridPrompts, OnlinePrompts, RunLoader, RunPositions
from miepo.errors import UserError
from miepo.feedback import Feedback
from miepo.objectives import Objective
from miepo.objectives.base import objectives_of
from miepo.objectives.normalisation import (
    OfflineResponses,
    calibrate,
    offline_responses,
    read_normalisation,
    write_normalisation,
)
from miepo.objectives.scoring import start_scoring
from miepo.policy import Policy
from miepo.preferences import (
    DirichletPreferences,
    PreferenceSampler,
    evaluation_grid,
    parse_preference,
    simplex_rows,
)
from miepo.recorded import Recorded
from miepo.rollout import RolloutEngine, TransformersEngine
from miepo.router import SampleRouter
from miepo.seeding import RandomStream, generator, torch_seeds
from miepo.training.distributed import gathered, gathered_rows, together
from miepo.training.progress import place_in_run
from miepo.training.reporting import run_folder
from miepo.types import EvaluationBatch, PreferenceBatch, PromptBatch, Responses

MOST_VECTORS = 10_000


class TrainedModule(Protocol):
    """What the data needs of the module that it is fitted with."""

    @property
    def policy(self) -> Policy: ...

    @property
    def objectives(self) -> list[Objective]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def learner(self) -> Learner: ...


class OnlinePreferenceDataModule(Recorded, LightningDataModule):
    """Online rollouts and pairwise feedback (Algorithm 1, steps 1 to 3).

    The DataLoader yields prompts; once a batch has reached the device, w+ and w- are drawn, the current policy samples
    responses under w+, the objectives score them, and the scores become labels of pairs.

    Args:
        prompts: Training prompts: a preference data set of :mod:`miepo.data.datasets`, a ``.jsonl`` or ``.parquet``
            file, a list, a data set folder or hub id.
        validation_prompts: The same for evaluation; by default the test part of a preference data set, or a seeded part
            of ``prompts``.
        validation_fraction: Size of that part.
        validation_limit: Evaluate on this many of the validation prompts at most.
        prompt_field: Field or column that holds the prompt.
        batch_size: Prompts per step and process (paper: 64).
        evaluation_batch_size: Responses per evaluation batch; by default twice ``batch_size``.
        max_new_tokens: A response is cut after this many tokens (paper: 128).
        responses: Sampled for each prompt (paper: 2, which are one pair). Of more, each objective compares the best
            with the worst by its own score; with ``feedback: scalarised`` there is one pair, of the best and the worst
            by the scalarised reward. Log-probabilities are taken of responses that occur in a pair alone.
        missing_eos_penalty: Taken off the normalised rewards by which pairs are made where a response was cut at
            ``max_new_tokens``; the rewards that are reported are without it.
        overlong: What to do with a prompt that does not fit the model's context: ``error`` or ``drop``.
        preferences: Distribution of w+ and w-.
        grid: Preference vectors of the evaluation: their number, a list of them, or the paper's grids by default.
        engine: What samples.
        staleness: Batches whose sampling begins before they are trained on, beside the training of those before them:
            their responses are of the policy as it was so many steps earlier. More than 0 takes an engine that samples
            elsewhere, such as :class:`~miepo.rollout.ServerEngine`.
        feedback: ``per_objective``, the paper's, or ``scalarised``, one order by ``sum_k w_k R_k`` (arXiv 2503.00295).
        normalise_on: Where objectives without a given normalisation measure theirs: on the rollouts of this many
            prompts before training; on ``offline``, the responses in the preference data set given as ``prompts``; or
            on the rows of a ``.jsonl`` file with ``prompt`` and ``response``.
        normalisation: A file of ``miepo normalise``, which measured it beforehand.
        predict_prompts: Prompts that ``predict`` answers.
        predict_preferences: Preferences by objective name under which it answers each; the evaluation grid by default.
        seed: Fixes every draw, as a function of the place in the run.
    """

    def __init__(
        self,
        prompts: PreferenceDataset | str | list[str],
        validation_prompts: PreferenceDataset | str | list[str] | None = None,
        validation_fraction: float = 0.1,
        validation_limit: int | None = None,
        prompt_field: str = "prompt",
        batch_size: int = 64,
        evaluation_batch_size: int | None = None,
        max_new_tokens: int = 128,
        responses: int = PAIR,
        missing_eos_penalty: float = 0.0,
        overlong: Literal["error", "drop"] = "error",
        preferences: PreferenceSampler | None = None,
        grid: int | list[list[float]] | None = None,
        engine: RolloutEngine | None = None,
        staleness: int = 0,
        feedback: Feedback = "per_objective",
        normalise_on: int | str = 64,
        normalisation: str | None = None,
        predict_prompts: PreferenceDataset | str | list[str] | None = None,
        predict_preferences: list[dict[str, float]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size), ("validation_limit", validation_limit),
            ("evaluation_batch_size", evaluation_batch_size),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}")
        if not 0 < validation_fraction < 1:
            raise UserError(f"data.validation_fraction must lie between 0 and 1, got {validation_fraction}")
        if isinstance(normalise_on, int) and normalise_on < 2:
            raise UserError(f"data.normalise_on must be at least 2 prompts, got {normalise_on}")
        if not isinstance(normalise_on, (int, str)):
            raise UserError(f"data.normalise_on is a number of prompts, offline or a file, got {normalise_on}")
        if grid is not None and not 2 <= (grid if isinstance(grid, int) else len(grid)) <= MOST_VECTORS:
            raise UserError(f"data.grid takes 2 to {MOST_VECTORS} preference vectors, got {str(grid)[:80]}")
        self.prompts, self.validation_prompts, self.prompt_field = prompts, validation_prompts, prompt_field
        self.validation_fraction, self.validation_limit = validation_fraction, validation_limit
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size or 2 * batch_size
        self.max_new_tokens, self.overlong = max_new_tokens, overlong
        self.responses, self.missing_eos_penalty = responses, missing_eos_penalty
        self.preferences = preferences or DirichletPreferences(1.0)
        self.engine = engine or TransformersEngine()
        self.grid_spec, self.feedback = grid, feedback
        self.normalise_on, self.normalisation = normalise_on, normalisation
        if normalise_on == "offline" and not isinstance(prompts, PreferenceDataset):
            raise UserError("data.normalise_on offline needs a preference data set as data.prompts")
        self.predict_prompts, self.predict_preferences = predict_prompts, predict_preferences
        self.seed = seed
        if staleness < 0:
            raise UserError(f"data.staleness must not be negative, got {staleness}")
        if staleness and not self.engine.samples_elsewhere:
            raise UserError(
                f"data.staleness {staleness} needs an engine that samples beside the training, such as ServerEngine, "
                f"got {type(self.engine).__name__}"
            )
        self.staleness = staleness
        self.ahead = RolloutsAhead(staleness)
        _ = self.rollout_settings  # whose mistakes show now
        self.scored_responses = 0  # in training: the budget by which methods are compared
        self.train_set: list[str] = []
        self.validation_set: list[str] = []

    @property
    def rollout_settings(self) -> RolloutSettings:
        """How responses are sampled and judged."""
        return RolloutSettings(
            self.preferences,
            self.engine,
            self.max_new_tokens,
            self.responses,
            self.missing_eos_penalty,
            self.feedback,
            self.seed,
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"scored_responses": self.scored_responses}
        if self.staleness:
            state["ahead"] = gathered_rows(self._trainer, self.ahead.state())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scored_responses = state_dict["scored_responses"]
        if self.staleness:
            self.ahead.load_state(state_dict.get("ahead", []))

    # -- prompts -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read everything the user gave, so that a mistake shows before a model is loaded."""
        names = [o.name for o in objectives_of(self._trainer)]
        if isinstance(self.grid_spec, list):
            self.grid = simplex_rows(self.grid_spec, len(names), "data.grid")
        else:
            self.grid = evaluation_grid(len(names), self.grid_spec)
        self.preferences.draw(generator(RandomStream.PREFERENCE, self.seed), 1, len(names))  # its alpha may not fit K
        if self.feedback == "scalarised" and isinstance(getattr(self._module, "router", None), SampleRouter):
            raise UserError("data.feedback scalarised needs the scores of all objectives: SampleRouter asks one only")
        if stage == "predict":
            if self.predict_prompts is None:
                raise UserError("predict needs prompts to answer: expected data.predict_prompts, got none")
            self.answer_set = self._load("data.predict_prompts", self.predict_prompts, "test")
            preferences = self.predict_preferences
            given = [parse_preference(w, names, "data.predict_preferences") for w in preferences or []]
            rows = given or self.grid
            self.answer_grid = torch.stack(list(rows))
            return
        self.train_set = self._load("data.prompts", self.prompts, "train")
        if self.validation_prompts is not None:
            validation = self._load("data.validation_prompts", self.validation_prompts, "test")
        elif isinstance(self.prompts, PreferenceDataset):
            validation = self._load("data.prompts", self.prompts, "test")
        else:
            self.train_set, validation = split_rows(self.train_set, self.validation_fraction, self.seed)
        say_repeated(self.train_set, validation)
        self.validation_set = validation[: self.validation_limit]
        self.offline_set = self.offline_responses()
        if self.normalisation is not None:
            read_normalisation(Path(self.normalisation), objectives_of(self._trainer), self.offline_set)

    def offline_responses(self) -> OfflineResponses | None:
        """Return what the rewards are normalised by, where that is not the first rollouts."""
        if isinstance(self.normalise_on, int):
            return None
        return offline_responses(self.prompts if self.normalise_on == "offline" else self.normalise_on)  # type: ignore[arg-type]

    def _load(self, setting: str, source: Any, split: Split) -> list[str]:
        if isinstance(source, PreferenceDataset):
            check_dialogue(source, self._policy)
            return source.prompts(split)
        splits = ("train",) if split == "train" else ("validation", "test", "train")
        try:
            return load_prompts(source, self.prompt_field, splits, self._policy.dialogue)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None

    def train_dataloader(self) -> DataLoader:
        trainer, prompts = self._trainer, OnlinePrompts(self._fitting(self.train_set, "training"), self.seed)
        positions = RunPositions(
            len(prompts), self.batch_size, lambda: place_in_run(trainer), trainer.global_rank, trainer.world_size
        )
        self._training = (prompts, positions)
        return RunLoader(prompts, batch_size=self.batch_size, sampler=positions, collate_fn=prompts.collate)

    def val_dataloader(self) -> DataLoader:
        return self._grid_loader(self._fitting(self.validation_set, "validation"), self.grid)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self._grid_loader(self._fitting(self.answer_set, "prediction"), self.answer_grid)

    def _grid_loader(self, prompts: Sequence[str], grid: Tensor) -> DataLoader:
        trainer, pairs = self._trainer, GridPrompts(prompts, grid)
        share = EvaluationShare(len(pairs), self.evaluation_batch_size, trainer.global_rank, trainer.world_size)
        return DataLoader(pairs, batch_size=None, sampler=share)

    def _fitting(self, prompts: Sequence[str], use: str) -> list[str]:
        """Return the prompts that fit the context together with a response; others are dropped or an error."""
        policy, limit = self._policy, self._policy.context_length
        if limit is None:
            return list(prompts)
        k = len(policy.names)
        vectors = [[1 / k] * k, *([float(i == j) for j in range(k)] for i in range(k))]
        text = max((policy.preference_text(w) for w in vectors), key=len)
        lengths = [len(policy.template.encode(prompt, text)) for prompt in prompts]
        fits = [n + self.max_new_tokens <= limit for n in lengths]
        if not all(fits):
            i = fits.index(False)
            message = (
                f"{fits.count(False)} of {len(fits)} {use} prompts do not fit the context of {limit} tokens with a "
                f"response of {self.max_new_tokens}; prompt {i + 1} has {lengths[i]}: {prompts[i][:60]!r}"
            )
            if self.overlong == "error" or not any(fits):
                raise UserError(f"{message} (data.overlong: drop leaves such prompts out)")
            rank_zero_warn(f"{message}; they are left out")
        return [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]

    # -- from prompts to feedback --------------------------------------------------------------------------------------

    @property
    def _module(self) -> TrainedModule:
        return self._trainer.lightning_module

    @property
    def _trainer(self) -> Any:
        return self.trainer

    @property
    def _policy(self) -> Policy:
        return self._module.policy

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        return batch  # text; the tensors are made on the device

    def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PreferenceBatch | EvaluationBatch:
        return self.rollout(batch) if self._trainer.training else self.evaluation(batch)

    def rollout(self, batch: PromptBatch) -> PreferenceBatch:
        """Turn prompts into responses of the current policy with pairwise feedback."""
        self.ensure_normalised()
        learner, settings, step = self._module.learner, self.rollout_settings, self._trainer.global_step

        def begin(prompts: PromptBatch, begun_at: int | None, known: Responses | None) -> BegunRollout:
            return begin_rollout(prompts, learner, settings, step if begun_at is None else begun_at, known)

        with self._trainer.profiler.profile("rollout"):
            begun = self.ahead.take(batch, begin)
            found = finish_rollout(
                begun, learner, settings, self._together, step,
                sampled=lambda: self.ahead.begin_following(self._following(batch), begin),
            )  # fmt: skip
        self.scored_responses += self.responses * len(batch) * self._trainer.world_size
        return found

    def _following(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """Yield the batches after ``batch`` that this epoch still has, as far as the trainer's limits go."""
        trainer, (prompts, positions) = self._trainer, self._training
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # without this one
        steps = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else trainer.num_training_batches
        left = min(trainer.num_training_batches - done, steps * trainer.accumulate_grad_batches) - 1
        start = positions.mine.index(batch.positions[0]) + len(batch)
        for _ in range(int(max(left, 0))):
            rows = [(batch.epochs[0], position) for position in positions.mine[start : start + self.batch_size]]
            if not rows:
                return
            yield prompts.collate([prompts[row] for row in rows])
            start += len(rows)

    def evaluation(self, batch: PromptBatch) -> EvaluationBatch:
        """Answer prompts under the preference vectors of the evaluation, and score the answers unless predicting."""
        predicting = self._trainer.predicting
        if not predicting:
            self.ensure_normalised()
        objectives = [] if predicting else self._module.objectives
        with self._trainer.profiler.profile("evaluation"):
            return evaluate(batch, self._policy, objectives, self.rollout_settings, self._together)

    def _together(self, function: Callable[[], Tensor]) -> Tensor:
        return together(self._trainer, function)

    # -- normalisation -------------------------------------------------------------------------------------------------

    def ensure_normalised(self) -> None:
        """Measure the normalisation of objectives that got none from the configuration or a checkpoint."""
        module = self._module
        missing = [o for o in module.objectives if o.normalisation is None]
        if missing:
            self._measure(missing, len(module.names))
        if self._trainer.is_global_zero and self._trainer.state.fn == "fit":
            file = run_folder(self._trainer) / "normalisation.json"
            if missing or not file.exists():
                write_normalisation(file, module.objectives, self.offline_set if missing else None)

    def _measure(self, missing: Sequence[Objective], k: int) -> None:
        if (offline := self.offline_set) is not None:
            together(self._trainer, lambda: calibrate(missing, offline))
        else:
            rewards = self._first_rollouts(
                missing, self._fitting(self.train_set, "training")[: int(self.normalise_on)], k
            )

            def measured() -> None:
                for i, objective in enumerate(missing):
                    objective.calibrate(rewards[..., i].flatten())

            together(self._trainer, measured)
        first = gathered(self._trainer, [o.normalisation for o in missing])[0]  # a server may say each something else
        for objective, normalisation in zip(missing, first, strict=True):
            objective.normalisation = normalisation
            rank_zero_info(f"Normalising {objective.name} by mean {normalisation.mean:.4g}, sd {normalisation.sd:.4g}")

    def _first_rollouts(self, objectives: Sequence[Any], prompts: Sequence[str], k: int) -> Tensor:
        """Return rewards of responses of the policy as it is, under drawn preferences, ``(n, 2, K')``."""
        rewards = []
        size = max(self.evaluation_batch_size // PAIR, 1)
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            index = range(start, start + len(part))
            draws = [self.preferences.draw(generator(RandomStream.CALIBRATION, self.seed, i), 1, k)[0] for i in index]
            seeds = torch_seeds(RandomStream.CALIBRATION, self.seed, index)
            preference = torch.from_numpy(np.stack(draws)).float()
            responses = self.engine.sample(self._policy, part, preference, PAIR, self.max_new_tokens, seeds)
            rewards.append(together(self._trainer, start_scoring(objectives, part, responses.texts)))
        return torch.cat(rewards)


def check_dialogue(source: PreferenceDataset, policy: Policy) -> None:
    """Refuse dialogues for a policy that would read them as one message."""
    if source.dialogue and not policy.dialogue:
        raise UserError(
            f"the prompts of {type(source).__name__} are dialogues: expected policy.dialogue true (or template hh), "
            "got false"
        )
