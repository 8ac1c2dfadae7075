"""Recovery: adapters learn what pruning and quantization lost, in rounds on a mix of texts (LoRAShear, Alg. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.prune.precision import frozen_in_bfloat16, use_bfloat16
from graphprune.prune.training import Logits, Objective, Progress, Row, logits_of
from graphprune.recipe import Recover
from graphprune.recover.checkpoint import RecoveryState, load_state, save_state, stamp_of
from graphprune.recover.course import Course, check_course
from graphprune.recover.rounds import Round, best_round
from graphprune.recover.sources import Source
from quant.embedding import QuantEmbedding
from quant.packed import cache_dequantized


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery did; the model's adapters are those of the best round.

    Attributes:
        rows: Metrics, one row a step.
        rounds: What each round reached; empty if nothing was held out to measure on.
    """

    rows: list[Row]
    rounds: list[Round]

    @property
    def best(self) -> Round | None:
        """The round whose adapters remain."""
        return self.rounds[best_round(self.rounds)] if self.rounds else None


def recover(
    model: nn.Module,
    dense: nn.Module | None,
    settings: Recover,
    sources: Sequence[Source],
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Train a smaller model's adapters on text and on the dense model's predictions.

    Sources of text come first, then those of instructions. Before each round the mix is decided by how much worse the
    model is than the dense one on every source's held-out windows; a phase ends after its rounds, or when no source
    improves. Sources that hold nothing out are not measured: one round, and its end remains.

    On a machine with a GPU both models are moved there meanwhile; under ``accelerate launch``, processes share
    each batch.

    Args:
        model: With packed linear layers or with PEFT adapters; its trainable parameters change in place.
        dense: The model before pruning, its teacher and its measure; None to learn from the text alone, unmeasured.
        settings: The recipe's section.
        sources: What to learn from; windows all of one length.
        seed: Of the order of batches.
        checkpoint: Folder to keep every finished round in, and to go on from; None to keep nothing.
        progress: Told after each step.

    Raises:
        TrainingError: If nothing is trainable or measurable, or the loss is not finite; finished rounds are kept.
        RecipeError: If there are fewer steps than rounds, or rounds without anything to measure.
    """
    from accelerate import Accelerator

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            "the model has no adapters to train", "attach some first (recipe: quantize.rank or recover.rank)"
        )
    check_course(settings, sources)
    measured = any(source.held_out is not None for source in sources)
    if measured and dense is None:
        raise TrainingError(
            "there is no dense model to measure sources against", "pass the model before pruning"
        )
    accelerator = Accelerator()
    state, keep = _opened(checkpoint, model, settings, sources, seed, accelerator.is_main_process)
    predicted = _without_gradients(dense) if dense is not None else None
    teacher = predicted if settings.training.distill > 0 else None
    device = accelerator.device if accelerator.device.type == "cuda" else next(model.parameters()).device
    with _moved(device, model, *([] if dense is None else [dense])):
        autocast = use_bfloat16(settings.training, model)
        with _dequantized(model, dense, autocast):
            course = Course(
                model,
                Objective(logits_of(model), teacher, settings.training.distill, autocast),
                Objective(predicted, None, 0.0, autocast) if measured and predicted is not None else None,
                settings,
                sources,
                seed,
                state,
            )
            course.run(keep, progress)
    return Recovered(state.rows, state.rounds)


def _opened(
    folder: Path | None,
    model: nn.Module,
    settings: Recover,
    sources: Sequence[Source],
    seed: int,
    writes: bool,
) -> tuple[RecoveryState, Callable[[RecoveryState], None]]:
    """Return the state to start from, and what keeps it after every round."""
    if folder is None:
        return RecoveryState(), lambda state: None
    texts = [
        f"{source.name} {source.kind} {len(source.train)} {source.held_out and len(source.held_out)}"
        for source in sources
    ]
    stamp = stamp_of(model, settings.model_dump_json(), str(seed), *texts)

    def keep(state: RecoveryState) -> None:
        if writes:
            save_state(folder, stamp, state)

    return load_state(folder, stamp) or RecoveryState(), keep


@contextmanager
def _moved(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Have models on a device while the block runs."""
    homes = [next(model.parameters()).device for model in models]
    away = [(model, home) for model, home in zip(models, homes, strict=True) if home != device]
    try:
        for model, _ in away:
            model.to(device)
        yield
    finally:
        for model, home in away:
            model.to(home)


@contextmanager
def _dequantized(model: nn.Module, teacher: nn.Module | None, autocast: bool) -> Iterator[None]:
    """Dequantize the base once for the whole training, in the type that is computed in."""
    from peft.helpers import disable_input_dtype_casting

    if not autocast:
        with cache_dequantized(model, torch.float32):
            yield
        return
    embeddings = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    with (
        cache_dequantized(model, torch.bfloat16),
        frozen_in_bfloat16(model, *([teacher] if teacher else [])),
        disable_input_dtype_casting(model),
    ):
        try:
            for embedding in embeddings:
                embedding.to(torch.bfloat16)
            yield
        finally:
            for embedding in embeddings:
                embedding.to(torch.float32)


def _without_gradients(model: nn.Module) -> Logits:
    logits = logits_of(model)

    def predict(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(ids)

    return predict
