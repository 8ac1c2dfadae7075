"""An ONNX file pruned in one shot, nothing trained and no torch module built: perplexity by saliency and layout.

    python examples/benchmarks/onnx_pruning.py --work runs/onnx_pruning                       # the demo model's export
    python examples/benchmarks/onnx_pruning.py --onnx model.onnx --tokenizer ./folder --remove 0.1 0.2

Calibrated on Wikipedia articles, judged on the start of WikiText-2's test split, both computed by onnxruntime.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune as gp
from graphprune.export.filenames import FILE
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.write import export_onnx
from graphprune.pipeline.onnx_arrays import text_arrays
from graphprune.prune.budget import Layout
from graphprune.saliency.onnx import ONNX_SALIENCIES
from graphprune.source.demo import demo_folder
from graphprune.source.perplexity import perplexity
from graphprune.source.text import Windows, cut_windows, read_text

DATA = Path(__file__).parents[1] / "data"


def dense_export(folder: Path, work: Path) -> Path:
    """Return the float32 export of a transformers folder, written now if it is not there."""
    if not (work / "dense" / FILE).exists():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        export_onnx(model, work / "dense")
    return work / "dense" / FILE


def measured(path: Path, windows: Windows, threads: int) -> float:
    """Return a file's perplexity."""
    decoder = OnnxDecoder(path, threads=threads)
    return perplexity(lambda ids: torch.from_numpy(decoder.logits(ids.numpy())), windows)


def main() -> None:
    """Prune in every way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx", type=Path, help="a decoder; the demo model's float32 export without it")
    parser.add_argument("--tokenizer", type=Path, help="transformers folder; the demo model's without it")
    parser.add_argument("--work", type=Path, default=Path("runs/onnx_pruning"))
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2])
    parser.add_argument("--saliencies", nargs="+", choices=ONNX_SALIENCIES, default=ONNX_SALIENCIES)
    parser.add_argument("--layouts", nargs="+", choices=get_args(Layout), default=["uniform"])
    parser.add_argument("--unrepaired", action="store_true", help="without least squares too")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    folder = given.tokenizer or demo_folder()
    path = given.onnx or dense_export(folder, given.work)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def cut(file: str, window: int, limit: int) -> Windows:
        return cut_windows(read_text(str(DATA / file)), tokenizer, window=window, limit=limit, name=file)

    evaluate = cut("wikitext2.jsonl", 512, 8)
    source = ir.load(path)
    batches = [text_arrays(source, ids.numpy()) for ids in cut("wikipedia.jsonl", 256, 24).ids.split(2)]
    groups = gp.node_groups(gp.trace(str(path)))
    title = f"{path}, {evaluate.tokens} tokens; dense {measured(path, evaluate, given.threads):.1f}"
    table = Table(
        "saliency", "layout", "repair", "asked", "removed", "perplexity", "CPU seconds", title=title
    )
    for remove in given.remove:
        for layout in given.layouts:
            for saliency in given.saliencies:
                for repair in (True, False) if given.unrepaired else (True,):
                    start = time.process_time()
                    pruned = gp.prune_onnx(
                        None, groups, batches, remove=remove, saliency=saliency, repair=repair, layout=layout
                    )
                    seconds = time.process_time() - start
                    small = given.work / "pruned" / FILE
                    small.parent.mkdir(parents=True, exist_ok=True)
                    ir.save(pruned.model, small, external_data=f"{FILE}.data")
                    found = measured(small, evaluate, given.threads)
                    table.add_row(
                        saliency, layout, str(repair), f"{remove:.0%}", f"{pruned.budget.removed_share:.1%}",
                        f"{found:.1f}", f"{seconds:.0f}",
                    )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
