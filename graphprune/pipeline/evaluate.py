"""Perplexity and zero-shot tasks of an exported model, computed by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from graphprune.errors import SourceError
from graphprune.export.runtime import OnnxDecoder, Provider
from graphprune.pipeline.exported import Exported
from graphprune.pipeline.progress import Reporter
from graphprune.source.evaluation import Evaluation, TextScore
from graphprune.source.perplexity import Logits, perplexity
from graphprune.source.questions import answer, read_questions
from graphprune.source.text import Windows, cut_windows, read_text

_WINDOW = 512
_FILES = ("*.jsonl", "*.jsonl.gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to evaluate by.

    Attributes:
        text: A file or hub data set; None for the evaluation text of the run's recipe, where there is one.
        window: Tokens of a window of it; None for the recipe's, or 512.
        limit: Windows at most; None for the recipe's number of its own text, and for all of another.
        tasks: Files of questions, and folders of such files.
        questions: Of each task at most, drawn at random by seed 0; None for all.
    """

    text: str | None = None
    window: int | None = None
    limit: int | None = None
    tasks: Sequence[Path] = ()
    questions: int | None = None


def evaluate(
    exported: Exported,
    asked: Asked,
    reporter: Reporter,
    *,
    provider: Provider = "cpu",
    threads: int | None = None,
) -> Evaluation:
    """Evaluate an exported model with onnxruntime; no torch model is opened.

    Args:
        exported: The model.
        asked: What to evaluate by.
        reporter: Whom to tell.
        provider: What computes.
        threads: Threads of one operator; None leaves it to ONNX Runtime.

    Raises:
        SourceError: If the model, a text or a task cannot be opened, or there is nothing to evaluate by.
    """
    files = _task_files(asked.tasks)
    windows = _windows(exported, asked)
    if windows is None and not files:
        raise SourceError(
            f"there is nothing to evaluate {exported.file} by",
            "give --text FILE, --tasks FOLDER, or a run folder",
        )
    questions = {name: read_questions(path, asked.questions) for name, path in files.items()}
    decoder = OnnxDecoder(exported.file, provider=provider, threads=threads)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(decoder.logits(ids.numpy()))

    score = None if windows is None else _score(logits, windows, reporter)
    tasks = {}
    for name, task in questions.items():
        with reporter.task(name, len(task)) as tick:
            tasks[name] = answer(logits, exported.tokenizer, task, lambda done: tick(done, "questions"))
    return Evaluation(model=str(exported.file), provider=provider, text=score, tasks=tasks)


def _score(logits: Logits, windows: Windows, reporter: Reporter) -> TextScore:
    done = 0
    with reporter.task(f"perplexity on {windows.name}", len(windows)) as tick:

        def moved(count: int) -> None:
            nonlocal done
            done += count
            tick(done, "windows")

        value = perplexity(logits, windows, 2, moved)
    return TextScore(
        text=windows.name, perplexity=value, tokens=windows.tokens, window=int(windows.ids.shape[1])
    )


def _windows(exported: Exported, asked: Asked) -> Windows | None:
    recipe = exported.recipe
    if asked.text is None and recipe is None:
        return None
    window, limit = asked.window, asked.limit
    if asked.text is None and recipe is not None:
        documents, name = recipe_text(exported), recipe.data.evaluate
        limit = limit or recipe.data.evaluate_windows
    else:
        name = str(asked.text)
        documents = read_text(name)
    usual = _WINDOW if recipe is None else recipe.data.evaluate_window
    return cut_windows(documents, exported.tokenizer, window=window or usual, limit=limit, name=name)


def recipe_text(exported: Exported) -> list[str]:
    """Return the documents of the evaluation text that a run's recipe names.

    Raises:
        SourceError: If they are not there, or there is no recipe.
    """
    if exported.recipe is None:
        raise SourceError(f"{exported.file} has no recipe that names a text", "give --text FILE")
    data = exported.recipe.data
    try:
        return read_text(data.evaluate, data.field, exported.base)
    except SourceError as error:
        raise SourceError(
            f"the run's evaluation text cannot be read: {error.problem}", "give --text FILE, or put it back"
        ) from error


def _task_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Return files of questions by the task's name."""
    files: dict[str, Path] = {}
    for path in paths:
        found = sorted(file for pattern in _FILES for file in path.glob(pattern)) if path.is_dir() else [path]
        if not found:
            raise SourceError(f"{path} holds no {' or '.join(_FILES)}", "give files of questions")
        for file in found:
            name = file.name.partition(".")[0]
            if name in files and files[name] != file:
                raise SourceError(f"{files[name]} and {file} are both called {name}", "rename one of them")
            files[name] = file
    return files
