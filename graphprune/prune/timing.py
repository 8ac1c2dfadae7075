"""Times of matrix products, measured on this machine and kept in a file."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from graphprune.files import write_json
from graphprune.prune.contractions import Product

SCHEMA = "graphprune.latency/1"

_COLD_BYTES = 64 * 2**20
_MOST_COPIES = 64
_REPEATS = 7


class TimeTable:
    """Seconds that products of matrices take; each is measured when it is first asked for.

    Args:
        path: Where measurements are kept. Those of another machine, number of threads or type are not read.
        device: Where to measure.
        dtype: Of the matrices.
        measure: From a product to its seconds; by default `time_product` on the device.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        measure: Callable[[Product], float] | None = None,
    ) -> None:
        self._path = path
        self._machine = machine(device, dtype)
        self._measure = measure or (lambda product: time_product(product, device=device, dtype=dtype))
        self._seconds = _read(path, self._machine)

    def __call__(self, product: Product) -> float:
        """Return the seconds that a product takes; none where it has no elements."""
        if 0 in (product.batch, product.rows, product.inner, product.columns):
            return 0.0
        if product not in self._seconds:
            self._seconds[product] = self._measure(product)
            self._write()
        return self._seconds[product]

    def _write(self) -> None:
        if self._path is not None:
            rows = [
                {**asdict(product), "seconds": seconds} for product, seconds in sorted(self._seconds.items())
            ]
            write_json(self._path, {"schema": SCHEMA, "machine": self._machine, "products": rows})


def _read(path: Path | None, here: dict[str, Any]) -> dict[Product, float]:
    """Return what a file holds that was measured on a machine like this one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if content.get("schema") != SCHEMA or content["machine"] != here:
            return {}
        return {Product(**row): float(seconds) for row, seconds in map(_apart, content["products"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing is lost but the time to measure again


def _apart(row: dict[str, Any]) -> tuple[dict[str, int], float]:
    return {name: value for name, value in row.items() if name != "seconds"}, row["seconds"]


def machine(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a time depends on beside the sizes."""
    where = torch.device(device)
    return {
        "processor": processor(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def time_product(
    product: Product,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds that a product of matrices takes: the median of repeats.

    The right-hand matrices are read from memory and not from a cache, as a model's weights are when one layer follows
    the other: copies of them take turns.

    Args:
        product: Its sizes.
        device: Where to measure.
        dtype: Of the matrices.
        clock: Seconds since any moment.
    """
    left = torch.randn(product.batch, product.rows, product.inner, device=device, dtype=dtype)
    size = product.batch * product.columns * product.inner
    copies = min(_MOST_COPIES, math.ceil(_COLD_BYTES / (size * left.element_size())))
    right = torch.randn(
        copies, product.batch, product.columns, product.inner, device=device, dtype=dtype
    ).unbind()

    def once() -> float:
        started = clock()
        with torch.no_grad():
            for matrix in right:
                if product.batch == 1:
                    functional.linear(left[0], matrix[0])
                else:
                    torch.bmm(left, matrix.mT)
        if left.device.type != "cpu":
            torch.accelerator.synchronize(left.device)
        return clock() - started

    once()  # the first call allocates and picks a kernel
    return statistics.median(once() for _ in range(_REPEATS)) / copies
