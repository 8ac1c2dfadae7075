"""The course of a recovery: phases of rounds, each measured, kept, and gone on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graphprune.errors import RecipeError, TrainingError
from graphprune.prune.training import Objective, Progress, Row, train
from graphprune.recipe import Recover
from graphprune.recover.checkpoint import RecoveryState, moments_of, restore_moments
from graphprune.recover.mix import Mixer, mixture
from graphprune.recover.rounds import Round, best_round, is_exhausted
from graphprune.recover.sources import Source
from graphprune.source.text import Windows

Keep = Callable[[RecoveryState], None]


class Course:
    """Takes a recovery from the state that it is in to its end.

    Args:
        model: Its trainable parameters learn.
        objective: What they minimise.
        dense: The loss of the model before pruning; None if no source is measured.
        settings: The recipe's section.
        sources: What to learn from.
        seed: Of the order of batches.
        state: Fresh, or that of an interrupted recovery; changed as it goes.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dense: Objective | None,
        settings: Recover,
        sources: Sequence[Source],
        seed: int,
        state: RecoveryState,
    ) -> None:
        self._adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._objective = objective
        self._loss = Objective(objective.student, None, 0.0, objective.autocast)
        self._dense = dense
        self._settings = settings
        self._sources = sources
        self._seed = seed
        self._state = state
        self._phases = phases_of(sources)
        self._bounds = _bounds(settings.steps, len(self._phases), settings.rounds)

    def run(self, keep: Keep, progress: Progress | None) -> None:
        """Train to the end, and leave the best adapters.

        Args:
            keep: Told the state after every round.
            progress: Told after each step.
        """
        state = self._state
        while state.phase < len(self._phases):
            self._run_phase(keep, progress)
            state.phase, state.number, state.drawn, state.moments = state.phase + 1, None, None, {}
            state.adapters = state.best
            keep(state)
        self._give(state.best)

    def _run_phase(self, keep: Keep, progress: Progress | None) -> None:
        """Train one phase; it begins with the best adapters so far, a new optimizer and a new schedule."""
        state, training = self._state, self._settings.training
        self._give(state.adapters)
        optimizer = torch.optim.AdamW(self._adapters.values(), lr=training.learning_rate, weight_decay=0.0)
        restore_moments(optimizer, list(self._adapters), state.moments)
        if state.number is None:
            self._measure(0, {})
        mixer = Mixer(
            [source.train for source in self._of_phase], training.batch_size, self._seed, state.drawn
        )
        while not self._is_over():
            mix = self._mix()
            state.rows += self._train(optimizer, mixer, mix, progress)
            state.number = (state.number or 0) + 1
            state.drawn = list(mixer.drawn)
            state.moments = moments_of(optimizer, list(self._adapters))
            self._measure(state.number, mix)
            keep(state)

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        mixer: Mixer,
        mix: Mapping[str, float],
        progress: Progress | None,
    ) -> list[Row]:
        """Train the next round on a mix, in its part of the phase's schedule."""
        bounds, accumulate = self._bounds[self._state.phase], self._settings.accumulate
        number, steps = self._state.number or 0, bounds[-1] - bounds[0]
        span = range(bounds[number], bounds[number + 1])
        batches = mixer.batches(list(mix.values()), span.start * accumulate)
        return train(
            (batch.to(self._device) for batch in batches),
            self._objective,
            optimizer,
            steps=steps,
            warmup=max(1, steps // 20),
            trainable=list(self._adapters.values()),
            progress=progress,
            first=bounds[0],
            span=span,
            accumulate=accumulate,
        )

    def _measure(self, number: int, mix: Mapping[str, float]) -> None:
        """Take note of where the model stands, and of its adapters if it has never stood better."""
        state = self._state
        state.number = number
        state.adapters = {name: adapter.detach().clone() for name, adapter in self._adapters.items()}
        if self._dense is None:
            state.best = state.adapters
            return
        if not state.dense:
            state.dense = self._losses(self._dense)
        losses = self._losses(self._loss)
        degradation = {name: losses[name] - state.dense[name] for name in losses}
        phase, step = self._phases[state.phase], len(state.rows)
        state.rounds.append(Round(phase, number, step, dict(mix), losses, degradation))
        if best_round(state.rounds) == len(state.rounds) - 1:
            state.best = state.adapters

    def _losses(self, objective: Objective) -> dict[str, float]:
        """Return the loss on each source's held-out windows, in nats per token."""
        losses = {}
        for source in self._sources:
            if source.held_out is not None:
                losses[source.name] = self._loss_on(source.held_out, objective)
                if not math.isfinite(losses[source.name]):
                    raise TrainingError(
                        f"after step {len(self._state.rows)}, the loss on '{source.name}' is "
                        f"{losses[source.name]}",
                        "lower the learning rate, train in float32, or check the dense model's weights",
                    )
        return losses

    def _loss_on(self, windows: Windows, objective: Objective) -> float:
        total, tokens, size = 0.0, 0, self._settings.training.batch_size
        for rows in torch.arange(len(windows)).split(size):
            batch = windows.chosen(rows).batch.trimmed
            with torch.no_grad():
                total += float(objective(batch.to(self._device))) * batch.counted
            tokens += batch.counted
        return total / tokens

    def _mix(self) -> dict[str, float]:
        names = [source.name for source in self._of_phase]
        if not self._state.rounds:
            return {name: 1 / len(names) for name in names}
        degradation = self._state.rounds[-1].degradation
        settings = self._settings
        return mixture(
            {name: degradation[name] for name in names},
            floor=settings.floor,
            temperature=settings.temperature,
        )

    def _is_over(self) -> bool:
        settings, number = self._settings, self._state.number or 0
        if number >= settings.rounds:
            return True
        return is_exhausted(
            self._state.rounds[-1 - number :] if self._state.rounds else [],
            [source.name for source in self._of_phase],
            least_improvement=settings.least_improvement,
            patience=settings.patience,
        )

    @property
    def _of_phase(self) -> list[Source]:
        kind = self._phases[self._state.phase]
        return [source for source in self._sources if source.kind == kind]

    @property
    def _device(self) -> torch.device:
        return next(iter(self._adapters.values())).device

    def _give(self, values: Mapping[str, Tensor]) -> None:
        """Give the adapters the values that are kept of them, if any are."""
        with torch.no_grad():
            for name, value in values.items():
                self._adapters[name].copy_(value)


def phases_of(sources: Sequence[Source]) -> list[str]:
    """Return the kinds of sources that there are, in the order in which they are trained on."""
    kinds = {source.kind for source in sources}
    return [kind for kind in ("text", "instruct") if kind in kinds]


def check_course(settings: Recover, sources: Sequence[Source]) -> None:
    """Check that the rounds have steps, and something to be judged by.

    Raises:
        RecipeError: If they have not.
    """
    rounds = settings.rounds * len(phases_of(sources))
    if 0 < settings.steps < rounds:
        raise RecipeError(
            f"recover.steps is {settings.steps}, and there are {rounds} rounds",
            "raise recover.steps, or lower recover.rounds",
        )
    unmeasured = [source.name for source in sources if source.held_out is None]
    if unmeasured and (settings.rounds > 1 or len(sources) > 1):
        raise RecipeError(
            f"source '{unmeasured[0]}' holds nothing out, so rounds and mixes cannot be judged",
            "hold windows of it out",
        )


def _bounds(steps: int, phases: int, rounds: int) -> list[list[int]]:
    """Return for each phase where its rounds begin and where the last one ends, in equal parts of the steps."""
    marks = [steps * place // (phases * rounds) for place in range(phases * rounds + 1)]
    return [marks[phase * rounds : (phase + 1) * rounds + 1] for phase in range(phases)]
