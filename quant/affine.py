"""Layers that multiply by their weight and add their bias, told from all others by calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from quant.calibration import evaluation
from quant.tree import replace_module_

Layout = Literal["out, in", "in, out"]
"""How a layer stores its weight: as `nn.Linear` does, or transposed, as GPT-2's Conv1D."""

_TOLERANCE = 1e-5


def affine_layout(module: nn.Module) -> Layout | None:
    """Return how a layer that computes ``x W^T + b``, and nothing else, stores W; None for every other module.

    A forward of its own is not read but called, with noise in the place of the parameters. So a subclass of
    `nn.Linear` may do it in its own words, and Conv1D is none.

    Args:
        module: On any device, meta too; nothing of it changes.
    """
    parameters = {name: held for name, held in module._parameters.items() if held is not None}
    weight = parameters.get("weight")
    if (
        weight is None
        or weight.dim() != 2
        or not weight.numel()
        or not parameters.keys() <= {"weight", "bias"}
    ):
        return None
    if module._modules or module._buffers or isinstance(module, nn.Embedding):
        return None
    if type(module).forward is nn.Linear.forward:
        return "out, in"
    generator = torch.Generator("cpu").manual_seed(0)
    noise = {name: _noise(generator, *held.shape) for name, held in parameters.items()}
    layouts: dict[Layout, Tensor] = {"out, in": noise["weight"], "in, out": noise["weight"].T}
    for layout, matrix in layouts.items():
        fits = "bias" not in noise or noise["bias"].shape == matrix.shape[:1]
        if fits and all(
            _computes(module, noise, matrix, _noise(generator, *rows)) for rows in _rows(matrix.shape[1])
        ):
            return layout
    return None


class StandIn(nn.Linear):
    """An `nn.Linear` of the same numbers in the place of a layer that is none.

    Attributes:
        original: The layer.
        transposed: Whether that stores its weight (in, out).
    """

    def __init__(self, original: nn.Module, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
        self.weight = weight
        self.register_parameter("bias", original._parameters.get("bias"))
        # Not a child of this module: what it holds is here already.
        self.__dict__["original"] = original
        self.transposed = transposed
        self.train(original.training)


@contextmanager
def linearized(model: nn.Module, includes: Callable[[str], bool]) -> Iterator[None]:
    """Have an `nn.Linear` of the same numbers in the place of every such layer that is none, while the block runs.

    What takes its place within the block stays.

    Args:
        model: Any module tree.
        includes: Which names count.
    """
    turned: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        layout = affine_layout(module) if name and includes(name) else None
        if layout is not None and type(module).forward is not nn.Linear.forward:
            weight = module.get_parameter("weight")
            if layout == "in, out":
                # A view, and one for all layers that share the weight.
                view = nn.Parameter(weight.detach().T, weight.requires_grad)
                weight = turned.setdefault(id(weight), view)
            replace_module_(model, module, StandIn(module, weight, layout == "in, out"))
    try:
        yield
    finally:
        for module in list(model.modules()):
            if isinstance(module, StandIn):
                replace_module_(model, module, module.__dict__["original"])


def _rows(width: int) -> list[tuple[int, ...]]:
    return [(2, 3, width), (5, width)]


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def _computes(module: nn.Module, noise: dict[str, Tensor], matrix: Tensor, rows: Tensor) -> bool:
    """Whether a module with noise for parameters gives the product, in training mode too."""
    wanted = functional.linear(rows, matrix, noise.get("bias"))
    with torch.no_grad(), evaluation(module):
        for training in (False, True):
            module.train(training)
            try:
                found: Any = functional_call(module, noise, (rows,))
            except (
                Exception
            ):  # whatever a stranger's forward raises: it takes no such rows, and is another layer
                return False
            if not isinstance(found, Tensor) or not _near(found, wanted):
                return False
    return True


def _near(found: Tensor, wanted: Tensor) -> bool:
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
