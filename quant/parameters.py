"""Packed weights for any module: the parameter is dequantized when it is read, its module's code stays as it is.

For weights that no linear layer or embedding holds, such as the stacked experts of a mixture, (experts, out, in).
`QuantLinear` is leaner where it fits: autograd keeps the dense weight of a parameter alive between forward and
backward, as it would keep an unpacked one.
"""

# ruff: noqa: N803 -- lora_A and lora_B are the names that the field uses
from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quant.apply import LayerReport
from quant.blockwise import check_weight
from quant.errors import QuantError
from quant.packed import PackedWeight
from quant.quantized import QuantizedTensor
from quant.scales import Storage
from quant.stack import loftq_stack


class PackedParameter(PackedWeight):
    """``Q + scaling B A`` in place of a parameter, with Q packed and frozen; gradients reach A and B.

    `pack_parameter_` makes it a parametrization (`torch.nn.utils.parametrize`) of the parameter.

    Args:
        quantized: Q of shape (..., out_features, in_features), at most three dimensions.
        lora_A: (..., rank, in_features) or None; trainable. An `nn.Parameter` is used as it is.
        lora_B: (..., out_features, rank) or None; trainable. An `nn.Parameter` is used as it is.
        scaling: Factor of the adapters' product.
        transposed: Whether the parameter is (..., in_features, out_features).
        dtype: The dtype of the parameter; `to(dtype)` changes it.

    Attributes:
        scaling: Factor of the adapters' product.
        transposed: Whether the parameter is the transpose of what is packed.

    Raises:
        QuantError: A part does not fit the others.
    """

    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        quantized: QuantizedTensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(quantized, dtype)
        _check_factors(quantized.shape, lora_A, lora_B)
        self.scaling = scaling
        self.transposed = transposed
        self.lora_A = _trainable(lora_A)
        self.lora_B = _trainable(lora_B)
        self._running = 0
        self._kept: dict[bool, Tensor] = {}

    @property
    def rank(self) -> int:
        """Rank of the adapters; 0 without any."""
        return 0 if self.lora_A is None else self.lora_A.shape[-2]

    def forward(self, original: Tensor) -> Tensor:
        """Return the parameter; computed once while its module's forward runs, which may read it often.

        Args:
            original: What stands in the parameter's place; not used.
        """
        if not self._running:
            return self._effective()
        # What was computed without a graph cannot serve where one is wanted.
        with_graph = torch.is_grad_enabled()
        if with_graph not in self._kept:
            self._kept[with_graph] = self._effective()
        return self._kept[with_graph]

    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep the parameter from its next use on: a forward pre-hook of the module that holds it."""
        self._running += 1

    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Drop the parameter again: a forward hook of the module that holds it."""
        self._running = max(self._running - 1, 0)
        if not self._running:
            self._kept.clear()

    def extra_repr(self) -> str:
        """Return shape, format and adapters for `print(model)`."""
        size = ", ".join(map(str, self.shape))
        return f"{size}, format={self.format}, block_size={self.block_size}, rank={self.rank}"

    def _effective(self) -> Tensor:
        dense = self.cached()
        weight = self.quantized.dequantize(self.dtype) if dense is None else dense.to(self.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            weight = weight + (self.scaling * (self.lora_B @ self.lora_A)).to(self.dtype)
        return weight.mT if self.transposed else weight


def pack_parameter_(
    model: nn.Module,
    name: str,
    quantized: QuantizedTensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
) -> PackedParameter:
    """Replace a parameter by a packed one that is dequantized whenever it is read, in place.

    Modules below `model` that share the parameter share the packed one. The parameter may be on the meta device.

    Args:
        model: Any module.
        name: Qualified name of the parameter, as in ``model.named_parameters()``.
        quantized: Of the parameter's shape, or of its transpose.
        lora_A: (..., rank, in_features), or None.
        lora_B: (..., out_features, rank), or None.
        scaling: Factor of ``lora_B @ lora_A``, which are stored as they are.
        transposed: Whether the parameter is (..., in_features, out_features), as GPT-2's is; what is packed and
            the factors are (..., out_features, in_features) always, so that blocks run along the inputs.

    Returns:
        The parametrization: its state-dict keys are ``<module>.parametrizations.<parameter>.0.<part>``.

    Raises:
        QuantError: There is no such parameter, or its shape is another.
    """
    parameter = _parameter(model, name)
    shape = (*quantized.shape[:-2], *reversed(quantized.shape[-2:])) if transposed else quantized.shape
    if shape != tuple(parameter.shape):
        raise QuantError(
            f"{name} has the shape {tuple(parameter.shape)}, what is packed stands for {shape}",
            "pass the packed parameter itself, or set `transposed` where it is (in_features, out_features)",
        )
    packed = PackedParameter(quantized, lora_A, lora_B, scaling, transposed, parameter.dtype)
    place_parameter_(model, name, packed)
    return packed


def place_parameter_(model: nn.Module, name: str, packed: PackedParameter) -> None:
    """Put a packed parameter in the place of a parameter of its shape, wherever modules share that one.

    Args:
        model: Any module.
        name: Qualified name of the parameter.
        packed: In its place.

    Raises:
        QuantError: There is no such parameter.
    """
    parameter = _parameter(model, name)
    for holder in list(model.modules()):
        for key, held in list(holder._parameters.items()):
            if held is parameter:
                _parametrize_(holder, key, packed)


def loftq_parameter_(
    model: nn.Module,
    name: str,
    format: str | int = "nf4",
    rank: int = 16,
    iterations: int = 5,
    block_size: int = 64,
    *,
    transposed: bool = False,
    covariance: Tensor | None = None,
    scale_storage: Storage = "float32",
    seed: int = 0,
) -> LayerReport:
    """Replace a matrix or a stack of matrices by its LoftQ, in place.

    Args:
        model: Any module.
        name: Qualified name of the parameter.
        format: As in `quant.loftq`.
        rank: Rank of the adapters, of each matrix where the parameter is a stack.
        iterations: As in `quant.loftq`.
        block_size: As in `quant.loftq`.
        transposed: Whether the parameter is (..., in_features, out_features).
        covariance: As in `quant.stack.loftq_stack`.
        scale_storage: As in `quant.loftq`.
        seed: As in `quant.loftq`.

    Raises:
        QuantError: There is no such parameter, or it cannot be quantized; the model is left as it was.
    """
    parameter = _parameter(model, name)
    check_weight(parameter, name)
    weight = parameter.detach().mT if transposed else parameter.detach()
    result = loftq_stack(
        weight,
        format,
        rank,
        iterations,
        block_size,
        covariance=covariance,
        scale_storage=scale_storage,
        seed=seed,
        name=name,
    )
    packed = pack_parameter_(
        model, name, result.quantized, result.lora_A, result.lora_B, transposed=transposed
    )
    return LayerReport(
        name=name,
        shape=tuple(parameter.shape),
        format=packed.format,
        errors=tuple(result.errors),
        bytes_before=parameter.nbytes,
        bytes_after=result.quantized.nbytes + result.lora_A.nbytes + result.lora_B.nbytes,
    )


def _parametrize_(holder: nn.Module, key: str, packed: PackedParameter) -> None:
    del holder._parameters[key]
    # Something must stand in the parameter's place; what, the parametrization does not care.
    mark = torch.empty(0, dtype=packed.dtype, device=packed.codes.device)
    holder.register_buffer(key, mark, persistent=False)
    parametrize.register_parametrization(holder, key, packed, unsafe=True)
    registered = holder.get_submodule(f"parametrizations.{key}")
    registered.register_buffer("original", mark, persistent=False)
    registered.train(holder.training)
    holder.register_forward_pre_hook(packed.begin)
    holder.register_forward_hook(packed.end, always_call=True)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise QuantError(
            f"{name} is no parameter of this {type(model).__name__}",
            "pass a name from model.named_parameters(); one that is packed already is none of them",
        ) from error


def _trainable(factor: Tensor | None) -> nn.Parameter | None:
    if factor is None or isinstance(factor, nn.Parameter):
        return factor
    return nn.Parameter(factor.contiguous())  # of one layout, whether made here or loaded


def _check_factors(shape: tuple[int, ...], lora_A: Tensor | None, lora_B: Tensor | None) -> None:
    if lora_A is None and lora_B is None:
        return
    if lora_A is None or lora_B is None:
        raise QuantError("only one of the factors lora_A and lora_B is given", "pass both or none")
    rank = lora_A.shape[-2] if lora_A.dim() > 1 else 0
    wanted = (*shape[:-2], rank, shape[-1]), (*shape[:-1], rank)
    if len(shape) < 2 or (tuple(lora_A.shape), tuple(lora_B.shape)) != wanted:
        raise QuantError(
            f"factors lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit {shape}",
            "pass (..., rank, in_features) and (..., out_features, rank)",
        )
