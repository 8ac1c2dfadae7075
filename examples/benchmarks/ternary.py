"""Rates, errors and times of ternary experts: the dictionary coding beside base 3, two bits and the entropy.

    python examples/benchmarks/ternary.py

The first table codes random symbols. *Fixed* is the paper's dictionary, for p(0) = 0.885 and words of up to 28
weights; *own* is what this package stores, a dictionary for the p(0) that it finds. Bits are those of the codes alone;
*all* adds the number of codes and the two levels of each row. *Base 3* would pack five weights into a byte, and
*2 bits* is the format `uint2` with all that it stores. The second table quantizes Gaussian experts whose inputs are
correlated; *new inputs* are drawn like those of the covariance, and were not seen. Times are CPU seconds, one thread.
"""

from __future__ import annotations

import argparse
import math
import platform
import time

import torch
from torch import Tensor

from quant import QuantizedTensor, quantize
from quant.ternary import TernaryConfig, TernaryTensor, encode_ternary, quantize_experts

SHARES = (0.95, 0.90, 0.885, 0.85, 0.80, 0.70, 0.50)
PUBLISHED = (0.591, 0.689, 0.736, 0.876, 1.120, 1.686, 2.941)
"""The paper's dictionary, measured with an implementation of its own."""


def rates(rows: int, columns: int) -> None:
    """Print bits a weight and times of random symbols."""
    print(f"Random symbols ({rows} × {columns}), bits a weight\n")
    print("| p(0) | entropy | fixed, published | fixed | own | own, all | base 3, all | 2 bits, all ", end="")
    print("| encode s | decode s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    base_3 = 1.6 + 32 / columns
    two_bits = bits(quantize(torch.zeros(rows, columns), "uint2", scale_storage="double"))
    for share, published in zip(SHARES, PUBLISHED, strict=True):
        shares = torch.tensor([share, (1 - share) / 2, (1 - share) / 2])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(shares, rows * columns, replacement=True, generator=generator)
        symbols = drawn.view(rows, columns).to(torch.uint8)
        levels = torch.ones(rows)
        fixed = encode_ternary(symbols, -levels, levels, zeros=885, longest=14)
        encode_ternary(symbols[:1], -levels[:1], levels[:1])  # builds the dictionary, once for all tensors
        start = time.process_time()
        own = encode_ternary(symbols, -levels, levels)
        encoded = time.process_time()
        decoded = own.dequantize()
        done = time.process_time()
        assert torch.equal(decoded, symbols.eq(2).float() - symbols.eq(1).float())
        entropy = -sum(p * math.log2(p) for p in shares.tolist())
        print(
            f"| {share} | {entropy:.3f} | {published:.3f} | {fixed.code_bits:.3f} | {own.code_bits:.3f} "
            f"| {own.bits_per_weight:.3f} | {base_3:.3f} | {two_bits:.3f} "
            f"| {encoded - start:.2f} | {done - encoded:.2f} |",
            flush=True,
        )


def correlated_inputs(experts: int, tokens: int, columns: int) -> Tensor:
    """Return inputs (experts, tokens, columns) whose k-th principal component has the variance 1 / k."""
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for _ in range(experts):
        basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
        scale = torch.arange(1, columns + 1).rsqrt()
        inputs.append(torch.randn(tokens, columns, generator=generator) * scale @ basis)
    return torch.stack(inputs)


def experts(shape: tuple[int, int, int], tokens: int) -> None:
    """Print rates and errors of Gaussian experts."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seen, new = correlated_inputs(shape[0], 2 * tokens, shape[2]).chunk(2, dim=1)
    covariance = seen.mT @ seen
    print(f"\nGaussian experts {shape}, {tokens} inputs each\n")
    print("| experts | p(0) | entropy | codes | all | weight error | output error | new inputs | s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, config, inputs in (
        ("extremes, nearest", TernaryConfig(levels="extremes"), None),
        ("extremes, compensated (the paper)", TernaryConfig(levels="extremes"), covariance),
        ("fitted, nearest", TernaryConfig(), None),
        ("fitted, compensated", TernaryConfig(), covariance),
        ("fitted, compensated, 0.93 zeros before", TernaryConfig(zeros=0.93), covariance),
        ("fitted, compensated, 0.7 zeros before", TernaryConfig(zeros=0.7), covariance),
    ):
        start = time.process_time()
        result = quantize_experts(weight, inputs, config=config)
        seconds = time.process_time() - start
        report = result.report
        assert isinstance(result.quantized, TernaryTensor), report.reason
        print(
            f"| {name} | {report.zeros:.3f} | {report.entropy:.3f} | {report.code_bits:.3f} "
            f"| {report.ternary_bits:.3f} | {errors(weight, result.quantized.dequantize(), seen, new)} "
            f"| {seconds:.1f} |",
            flush=True,
        )
    start = time.process_time()
    plain = quantize(weight, "uint2", scale_storage="double")
    seconds = time.process_time() - start
    print(
        f"| two bits, nearest | | | 2.000 | {bits(plain):.3f} "
        f"| {errors(weight, plain.dequantize(), seen, new)} | {seconds:.1f} |"
    )


def bits(quantized: QuantizedTensor) -> float:
    """Return the bits a weight of all that is stored."""
    return 8 * quantized.nbytes / math.prod(quantized.shape)


def errors(weight: Tensor, values: Tensor, seen: Tensor, new: Tensor) -> str:
    """Return the relative errors of the weights, and of their outputs on inputs seen and new, as cells."""
    error = weight - values
    found = [float(error.norm() / weight.norm())]
    for inputs in (seen, new):
        wrong = sum(float((one @ by.mT).square().sum()) for one, by in zip(inputs, error, strict=True))
        right = sum(float((one @ by.mT).square().sum()) for one, by in zip(inputs, weight, strict=True))
        found.append(math.sqrt(wrong / right))
    return " | ".join(f"{one:.3f}" for one in found)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="of random symbols")
    parser.add_argument("--columns", type=int, default=4096, help="of random symbols")
    parser.add_argument("--experts", type=int, nargs=3, default=(8, 1024, 768), help="shape of the stack")
    parser.add_argument("--tokens", type=int, default=2048, help="inputs that each expert saw")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}\n")
    rates(given.rows, given.columns)
    experts(tuple(given.experts), given.tokens)


if __name__ == "__main__":
    main()
