"""A run under way: its folder, and the models of each stage, in memory or read back from the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.coupling.groups import NodeGroups, node_groups
from graphprune.pipeline.folder import RunFolder
from graphprune.pipeline.inputs import Inputs
from graphprune.pipeline.progress import Reporter
from graphprune.shrink.load import load
from graphprune.source.adapters import attach_adapters
from graphprune.source.model import example_inputs, load_model
from graphprune.source.perplexity import perplexity, torch_logits
from graphprune.source.text import Windows
from graphprune.trace.model import trace
from quant.storage import load_quantized_


class Session:
    """Everything that the stages share.

    Models are loaded when a stage first asks for them, so that a resumed run loads only what it still needs.

    Args:
        inputs: What the run starts from.
        folder: Where it leaves its results.
        reporter: Whom to tell.
    """

    def __init__(self, inputs: Inputs, folder: RunFolder, reporter: Reporter) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.folder = folder
        self.reporter = reporter
        self.small_model: nn.Module | None = None
        self._quantized: nn.Module | None = None

    @cached_property
    def dense(self) -> Any:
        """The model as it came. While adapters are attached it is the same module with adapters inside."""
        return load_model(self.inputs.source)

    @cached_property
    def counted(self) -> frozenset[str]:
        """Names, in the model with adapters, of the parameters that the model itself came with."""
        return self._adapted[1]

    @property
    def adapted(self) -> Any:
        """The dense model with LoRA adapters attached."""
        return self._adapted[0]

    @cached_property
    def _adapted(self) -> tuple[Any, frozenset[str]]:
        own = {id(parameter) for parameter in self.dense.parameters()}
        torch.manual_seed(self.recipe.seed)
        model = attach_adapters(self.dense, self.recipe.prune.rank, self.recipe.prune.alpha)
        names = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)
        return model, names

    @cached_property
    def examples(self) -> dict[str, Any]:
        """Inputs to trace with."""
        return example_inputs(self.dense)

    @cached_property
    def groups(self) -> NodeGroups:
        """Node groups of the model with adapters."""
        return node_groups(trace(self.adapted, self.examples))

    @contextmanager
    def as_it_came(self) -> Iterator[Any]:
        """Yield the dense model, with its adapters out of action if it has got some."""
        attached = "_adapted" in self.__dict__
        with self.adapted.disable_adapter() if attached else nullcontext():
            yield self.dense

    def detach_adapters(self) -> None:
        """Take the adapters off the dense model and forget the traced graph."""
        if "_adapted" in self.__dict__:
            self.adapted.unload()
            for name in ("_adapted", "groups", "counted"):
                self.__dict__.pop(name, None)

    def forget_dense(self) -> None:
        """Forget the dense model, which a pruning method may have written to; it is loaded anew when asked for."""
        self.detach_adapters()
        for name in ("dense", "examples"):
            self.__dict__.pop(name, None)

    def pruned(self) -> Any:
        """Return the pruned float model, a fresh copy from the folder."""
        model = load(self.folder / "model", torch.float32)
        return model.requires_grad_(False)

    def unquantized(self) -> Any:
        """Return the float model that is quantized: the pruned one, or the recovered one if that comes first."""
        if self.recipe.recover.base == "quantized":
            return self.pruned()
        model = load(self.folder / "recovered", torch.float32)
        return model.requires_grad_(False)

    @property
    def quantized(self) -> Any:
        """The quantized model with adapters."""
        if self._quantized is None:
            self._quantized = self.unquantized()
            load_quantized_(self._quantized, self.folder / "quant")
            self._quantized.eval()
        return self._quantized

    @quantized.setter
    def quantized(self, model: nn.Module) -> None:
        self._quantized = model

    def judge(self, model: nn.Module, title: str) -> float:
        """Return a torch model's perplexity on the evaluation text."""
        return self.judge_logits(torch_logits(model), title)

    def judge_logits(self, logits: Callable[[torch.Tensor], torch.Tensor], title: str) -> float:
        """Return the perplexity on the evaluation text of whatever gives logits."""
        return judged(self.reporter, self.inputs.evaluate, logits, title)

    def write(self, model: Any, prompt: str) -> str:
        """Return the greedy continuation of a prompt by a torch model."""
        tokenizer = self.inputs.tokenizer
        ids = torch.tensor([self.prompt_ids(prompt)])
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.recipe.report.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return a prompt's token ids."""
        return list(self.inputs.tokenizer(prompt)["input_ids"])

    def path(self, name: str) -> Path:
        """Return a path in the run folder."""
        return self.folder / name


def judged(
    reporter: Reporter, windows: Windows, logits: Callable[[torch.Tensor], torch.Tensor], title: str
) -> float:
    """Return a perplexity, and tell how far its measurement is.

    Args:
        reporter: Whom to tell.
        windows: Of the text.
        logits: From token ids (batch, window) to logits (batch, window, vocabulary).
        title: Of what is measured, for people.
    """
    done = 0
    with reporter.task(f"perplexity, {title}", len(windows)) as tick:

        def moved(count: int) -> None:
            nonlocal done
            done += count
            tick(done, "windows")

        return perplexity(logits, windows, 2, moved)
