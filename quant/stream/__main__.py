"""``python -m quant.stream SOURCE OUTPUT --format nf4``, also under torchrun."""

# ruff: noqa: T201 -- a command line prints
from __future__ import annotations

import argparse
import os
import sys
from typing import get_args

from quant.errors import QuantError
from quant.scales import Storage
from quant.stream.checkpoint import loftq_checkpoint
from quant.stream.config import StreamConfig


def main(arguments: list[str] | None = None) -> int:
    """Run LoftQ over a checkpoint and print each layer; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        reports = loftq_checkpoint(
            given.source,
            given.output,
            _config(given),
            on_layer=_print_layer,
            device=_device(given.device),
            patience=given.patience,
        )
    except (QuantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    if os.environ.get("RANK", "0") == "0":
        before = sum(report.bytes_before for report in reports)
        after = sum(report.bytes_after for report in reports)
        _say(f"{len(reports)} layers, {before} bytes, now {after} ({after / before:.1%}): {given.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    default = StreamConfig()
    parser = argparse.ArgumentParser(prog="python -m quant.stream", description=__doc__)
    parser.add_argument("source", help="folder of a checkpoint in safetensors files")
    parser.add_argument("output", help="folder of the result")
    parser.add_argument(
        "--format", default=default.format,
        help="of the linear layers: a name, or a number of bits (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format-for", nargs=2, action="append", default=[], metavar=("REGEX", "FORMAT"),
        help="another format for the layers whose name matches; may be repeated, the first match counts",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=default.block_size, help="(default: %(default)s)")
    parser.add_argument("--scale-storage", choices=get_args(Storage), default=default.scale_storage)
    parser.add_argument(
        "--rank", type=int, default=default.rank, help="of the adapters (default: %(default)s)"
    )
    parser.add_argument("--alpha", type=float, help="LoRA's alpha (default: the adapters count once)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank), not alpha / rank")
    parser.add_argument(
        "--iterations", type=int, default=default.iterations, help="0: QLoRA (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--include", action="append", metavar="REGEX", help="layers to take (default: all)")
    parser.add_argument(
        "--exclude", action="append", metavar="REGEX",
        help="matrices to copy as they are (default: embeddings, heads, norms, routers)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-bytes", type=int, default=default.shard_bytes, help="most bytes of a file written"
    )
    parser.add_argument(
        "--peft-adapters", action="store_true", help="write the adapters in PEFT's layout too"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the one of LOCAL_RANK")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds to wait for other processes")
    return parser


def _config(given: argparse.Namespace) -> StreamConfig:
    default = StreamConfig()
    return StreamConfig(
        format=_format(given.format),
        formats=tuple((expression, _format(format)) for expression, format in given.format_for),
        block_size=given.block_size,
        scale_storage=given.scale_storage,
        rank=given.rank,
        alpha=given.alpha,
        rslora=given.rslora,
        iterations=given.iterations,
        seed=given.seed,
        include=tuple(given.include or default.include),
        exclude=tuple(given.exclude or default.exclude),
        shard_bytes=given.shard_bytes,
        peft_adapters=given.peft_adapters,
    )


def _format(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _device(device: str) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _print_layer(name: str, done: int, total: int) -> None:
    process = f"[{os.environ['RANK']}] " if "RANK" in os.environ else ""
    _say(f"{process}{done}/{total} {name}")


def _say(line: str) -> None:
    # At once, since several processes write to one terminal.
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
