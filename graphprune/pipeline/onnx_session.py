"""A run on an ONNX file under way: its folder, its groups, and what its models are run with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.errors import SourceError
from graphprune.export.runtime import OnnxDecoder
from graphprune.files import remove, replacing
from graphprune.pipeline.folder import RunFolder
from graphprune.pipeline.onnx_arrays import Arrays, example_arrays, text_arrays
from graphprune.pipeline.onnx_inputs import OnnxInputs
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.session import judged
from graphprune.trace.model import trace

# Batches drawn at random where nothing else is given: they tell of scales, not of what the model is for.
_RANDOM = 8
_EXAMPLE = 16


class OnnxRun:
    """Everything that the stages of a run on an ONNX file share.

    Args:
        inputs: What the run starts from.
        folder: Where it leaves its results.
        reporter: Whom to tell.
    """

    def __init__(self, inputs: OnnxInputs, folder: RunFolder, reporter: Reporter) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.folder = folder
        self.reporter = reporter

    @cached_property
    def groups(self) -> NodeGroups:
        """Node groups of the file."""
        return node_groups(trace(self.inputs.file))

    @property
    def source(self) -> ir.Model:
        """The graph that was traced."""
        model: ir.Model = self.groups.graph.program
        return model

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of groups that may lose units: those that the recipe names, else channels of feed-forward layers.

        Without a gradient scores of heads do not compare with those of channels, and heads go only where no such layer
        is wider than the recipe's multiple. A file that has neither may lose units of all kinds.
        """
        asked = self.recipe.prune
        if "kinds" in asked.model_fields_set:
            return asked.kinds
        widest: dict[str, int] = {}
        for group in self.groups.prunable():
            widest[group.kind] = max(widest.get(group.kind, 0), group.size)
        if widest.get("ffn", 0) > asked.width_multiple.get("ffn", 1):
            return ("ffn",)
        return tuple(kind for kind in asked.kinds if kind in widest) or tuple(widest)

    @property
    def calibration(self) -> list[Arrays]:
        """Inputs of the source, by which units are scored and repaired."""
        count, seed = self.recipe.prune.calibration_windows, self.recipe.seed
        if self.inputs.train is not None:
            windows = self.inputs.train.drawn(count, seed)
            return [text_arrays(self.source, row[None].numpy()) for row in windows]
        if self.inputs.arrays:
            return list(self.inputs.arrays[:-1])[:count]
        return [
            example_arrays(self.groups.graph, self.source, seed + i)
            for i in range(max(2, min(_RANDOM, count)))
        ]

    def judging(self, model: ir.Model) -> list[Arrays]:
        """Return other inputs, by which a model is judged.

        Args:
            model: The source, or what pruning made of it.
        """
        if self.inputs.evaluate is not None:
            return [text_arrays(model, row[None].numpy()) for row in self.inputs.evaluate.ids]
        return [self.inputs.arrays[-1] if self.inputs.arrays else self.example(model)]

    def verifying(self, model: ir.Model) -> list[Arrays]:
        """Return those inputs that a file is verified on: some text, and such that a cache is before."""
        if self.inputs.evaluate is None:
            return self.judging(model)
        settings = self.recipe.export
        rows = self.inputs.evaluate.ids[: settings.verify_windows, : settings.verify_tokens]
        return [*(text_arrays(model, row[None].numpy()) for row in rows), self.example(model)]

    def example(self, model: ir.Model) -> Arrays:
        """Return inputs to try a model with: the text's first tokens, some of them in the cache, or drawn at random."""
        evaluate = self.inputs.evaluate
        ids = None if evaluate is None else evaluate.ids[:1, :_EXAMPLE].numpy()
        return example_arrays(self.groups.graph, model, self.recipe.seed + 2 * _RANDOM, ids)

    def judge(self, file: Path, title: str) -> float:
        """Return the perplexity of an ONNX decoder on the evaluation text.

        Args:
            file: The decoder.
            title: What it is, for people.
        """
        if self.inputs.evaluate is None:
            raise SourceError(
                f"there is no text to judge {file} by", "give data.evaluate (recipe: data.evaluate)"
            )
        decoder = OnnxDecoder(file)
        return judged(
            self.reporter,
            self.inputs.evaluate,
            lambda ids: torch.from_numpy(decoder.logits(ids.numpy())),
            title,
        )

    def write(self, decoder: OnnxDecoder, prompt: str) -> str:
        """Return the greedy continuation of a prompt."""
        tokenizer = self.inputs.tokenizer
        end = tokenizer.eos_token_id
        ids = decoder.greedy(
            list(tokenizer(prompt)["input_ids"]),
            self.recipe.report.new_tokens,
            eos_token_ids=[] if end is None else [end],
        )
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a folder in the run folder that is gone after the block."""
        with replacing(self.path(name)) as temporary:
            temporary.mkdir()
            yield temporary
        remove(self.path(name))

    def path(self, name: str) -> Path:
        """Return a path in the run folder."""
        return self.folder / name
