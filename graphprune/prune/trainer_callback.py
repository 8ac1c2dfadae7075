"""LHSPG and LoRAPrune within transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from graphprune.errors import TrainingError
from graphprune.prune.lhspg import LHSPG
from graphprune.prune.loraprune import LoRAPrune


class LHSPGCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Checks that the training is long enough, logs how far pruning is, and writes ``plan.json`` at the end.

    The optimizer does everything else by itself, within its steps:

        trainer = Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[LHSPGCallback(optimizer)])

    Its state is part of the Trainer's checkpoints; ``trainer.train(resume_from_checkpoint=True)`` goes on from them.

    Args:
        optimizer: The optimizer that the Trainer was given.
    """

    def __init__(self, optimizer: LHSPG | LoRAPrune) -> None:
        self._optimizer = optimizer
        self._name = type(optimizer).__name__

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise an error if the Trainer has another optimizer, ends too early, or goes back to other adapters.

        Raises:
            TrainingError: If so.
        """
        used = kwargs.get("optimizer")
        if used is not None and getattr(used, "optimizer", used) is not self._optimizer:
            raise TrainingError(
                f"the Trainer does not train with this {self._name}",
                "give it that: Trainer(..., optimizers=(optimizer, None))",
            )
        if args.load_best_model_at_end:
            raise TrainingError(
                "load_best_model_at_end would put adapters of another step beside what is pruned by the end",
                "leave it off",
            )
        ahead = range(state.global_step, state.max_steps)
        rates = getattr(kwargs.get("lr_scheduler"), "lr_lambdas", [])[
            :1
        ]  # transformers' are all of this form
        idle = sum(rate(step) == 0 for rate in rates for step in ahead)
        needed = self._optimizer.steps_left
        if len(ahead) - idle < needed:
            without = f", {idle} of them at a learning rate of zero, which do not count" if idle else ""
            raise TrainingError(
                f"the training has {len(ahead)} steps{without}, and {self._name} needs {needed}",
                "raise max_steps or num_train_epochs, or shorten the schedule",
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add how many units are redundant, gone, and to go."""
        counts = {f"{self._name.lower()}_{name}": count for name, count in self._optimizer.counts.items()}
        if logs is not None:
            logs.update(counts)
        if state.log_history:
            state.log_history[-1].update(counts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the plan, if there is one."""
        if state.is_world_process_zero and not self._optimizer.steps_left:
            self._optimizer.plan.save(Path(args.output_dir) / "plan.json")
