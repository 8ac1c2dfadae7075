"""An exported decoder in its forms beside other engines: bytes, load time, memory, prefill and decoding.

    python examples/benchmarks/onnx_speed.py --work runs/onnx_speed
    python examples/benchmarks/onnx_speed.py --work runs/onnx_speed --only int4 genai --threads 2
    python examples/benchmarks/onnx_speed.py --work runs/onnx_speed --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Beside ours: torch, and where they are installed onnxruntime-genai with its model builder (int4) and llama-cpp-python
with the GGUF file given. Every measurement is a process of its own, the forms take turns for so many rounds, and the
smallest time counts. CPU time is that of the process, all threads; decoding goes on behind the prompt, at batch 1.
Weights are in blocks of 32, embedding and head too, as the model builder has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphprune as gp
import quant
from graphprune.export.adapters import Adapters
from graphprune.export.filenames import FILE
from graphprune.export.genai import write_genai_config
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.shared_cache import Cache
from graphprune.export.write import export_onnx
from graphprune.files import size_of
from graphprune.prune.budget import targets
from graphprune.prune.target import recipe_budget
from graphprune.recipe import Prune
from graphprune.source.demo import demo_folder
from graphprune.source.model import example_inputs

RANK, BLOCK, ROOM = 16, 32, 256
KINDS = ("attention_heads", "ffn")
BUILDER = "builder"
"""The format of what onnxruntime-genai's own model builder writes."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to run the model.

    Attributes:
        engine: What runs it: onnxruntime, genai, torch or llama.
        format: Of the weights; empty where the engine decides.
        rank: Of the adapters; 0 without.
        adapters: What becomes of them.
        remove: Share of the parameters that is pruned.
        cache: Whether it grows or is shared.
    """

    engine: str
    format: str = ""
    rank: int = 0
    adapters: Adapters = "overridable"
    remove: float = 0.0
    cache: Cache = "growing"


FORMS = {
    "float32": Form("onnxruntime", "float32"),
    "int4": Form("onnxruntime", "int4"),
    "int4, adapters overridable": Form("onnxruntime", "int4", RANK),
    "int4, adapters constant": Form("onnxruntime", "int4", RANK, "constant"),
    "int4, pruned by 20 %": Form("onnxruntime", "int4", remove=0.2),
    "nf4": Form("onnxruntime", "nf4"),
    "nf4, adapters overridable": Form("onnxruntime", "nf4", RANK),
    "nf2": Form("onnxruntime", "nf2"),
    "int4, in genai": Form("genai", "int4"),
    "int4, cache shared, in genai": Form("genai", "int4", cache="shared"),
    "genai builder int4": Form("genai", BUILDER),
    "torch float32": Form("torch", "float32"),
    "torch bfloat16": Form("torch", "bfloat16"),
    "llama.cpp": Form("llama"),
}


def write(form: Form, source: Path, folder: Path) -> None:
    """Write the files of a form, if it has any."""
    if form.format == BUILDER:
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(source),
            "-o",
            str(folder),
        ]
        subprocess.run([*command, "-p", "int4", "-e", "cpu"], check=True, capture_output=True)
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if form.remove:
        model = pruned(model, form.remove)
    if form.format != "float32":
        config = quant.LoftQConfig(
            format=form.format,
            block_size=BLOCK,
            embedding_format=form.format,
            rank=form.rank or 1,
            iterations=1 if form.rank else 0,
        )
        quant.loftq_model(model, config)
    if not form.rank:
        for module in model.modules():
            if isinstance(module, quant.QuantLinear):
                module.lora_A = module.lora_B = None
    export_onnx(model, folder, adapters=form.adapters, cache=form.cache)
    if form.engine == "genai":
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        write_genai_config(
            folder,
            hidden_size=model.config.hidden_size,
            num_attention_heads=model.config.num_attention_heads,
            context_length=model.config.max_position_embeddings,
            eos_token_ids=[model.config.eos_token_id],
        )


def pruned(model: Any, remove: float) -> Any:
    """Return the model without its first units, as many as make the share: which of them go is all one to time."""
    examples = example_inputs(model)
    groups = gp.node_groups(gp.trace(model, examples))
    counted = frozenset(name for name, _ in model.named_parameters())
    scores = {group.name: torch.ones(group.size) for group in targets(groups, KINDS)}
    budget = recipe_budget(groups, Prune(remove=remove, kinds=KINDS), scores, counted=counted)
    plan = gp.Plan({name: list(range(count)) for name, count in budget.removed_units.items()})
    return gp.shrink(model, groups, plan, examples, form="module")


def opened(form: Form, path: Path, threads: int) -> Callable[[list[int]], Iterator[None]]:
    """Return what runs a prompt at the first `next` and decodes a token at each after it."""
    return {"onnxruntime": _onnxruntime, "genai": _genai, "torch": _torch, "llama": _llama}[form.engine](
        form, path, threads
    )


def _onnxruntime(form: Form, path: Path, threads: int) -> Callable[[list[int]], Iterator[None]]:
    decoder = OnnxDecoder(path / FILE, threads=threads)

    def run(prompt: list[int]) -> Iterator[None]:
        ids, past = np.array([prompt]), None
        while True:
            logits, past = decoder.step(ids, past=past)
            ids = logits[:, -1:].argmax(-1)
            yield

    return run


def _genai(form: Form, path: Path, threads: int) -> Callable[[list[int]], Iterator[None]]:
    import onnxruntime_genai as og

    settings = json.loads((path / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (path / "genai_config.json").write_text(json.dumps(settings))
    model = og.Model(str(path))

    def run(prompt: list[int]) -> Iterator[None]:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + ROOM
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        while True:
            generator.generate_next_token()
            yield

    return run


def _torch(form: Form, path: Path, threads: int) -> Callable[[list[int]], Iterator[None]]:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, form.format)).eval()

    @torch.no_grad()
    def run(prompt: list[int]) -> Iterator[None]:
        ids, past = torch.tensor([prompt]), None
        while True:
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            yield

    return run


def _llama(form: Form, path: Path, threads: int) -> Callable[[list[int]], Iterator[None]]:
    from llama_cpp import Llama

    model = Llama(
        str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False,
        use_extra_bufts=False,
    )  # fmt: skip

    def run(prompt: list[int]) -> Iterator[None]:
        model.reset()
        ids = prompt
        while True:
            model.eval(ids)
            ids = [int(np.argmax(model._ctx.get_logits_ith(-1)[: model.n_vocab()]))]
            yield

    return run


def measure(form: Form, path: Path, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """Return megabytes and milliseconds of a form, in this process."""
    empty = _peak()
    start = time.process_time()
    run = opened(form, path, threads)
    load, loaded = time.process_time() - start, _peak()
    ids = np.random.default_rng(0).integers(5, 40_000, prompt).tolist()
    found: dict[str, list[float]] = {}
    for _ in range(3):
        steps = run(ids)
        for number in range(tokens):
            cpu, wall = time.process_time(), time.perf_counter()
            next(steps)
            part = "decode" if number else "prefill"
            found.setdefault(f"{part} CPU", []).append(1e3 * (time.process_time() - cpu))
            found.setdefault(f"{part} wall", []).append(1e3 * (time.perf_counter() - wall))
    smallest = {name: float(np.quantile(times, 0.1)) for name, times in found.items()}
    return {"load CPU": 1e3 * load, "MB to load": loaded - empty, "MB": _peak() - empty, **smallest}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def place(name: str, given: argparse.Namespace, source: Path) -> Path | None:
    """Return where a form's files lie, written now if they are not; None if its engine is not there."""
    form = FORMS[name]
    if form.engine == "torch":
        return source
    if form.engine == "llama":
        return given.gguf if given.gguf and importlib.util.find_spec("llama_cpp") else None
    if form.engine == "genai" and not importlib.util.find_spec("onnxruntime_genai"):
        return None
    folder: Path = given.work / ("genai" if form.format == BUILDER else name.replace(" ", "_"))
    if not folder.exists():
        write(form, source, folder)
    return folder


def main() -> None:
    """Write what is not there yet, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/onnx_speed"))
    parser.add_argument("--model", type=Path, help="transformers folder; the demo model without it")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of forms' names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="0 to write the files alone")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "PATH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, path = given.measure
        print(json.dumps(measure(FORMS[name], Path(path), given.threads, given.prompt, given.tokens)))
        return
    source = given.model or demo_folder()
    wanted = [name for name in FORMS if any(part in name for part in given.only)]
    places = {name: path for name in wanted if (path := place(name, given, source))}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for _ in range(given.rounds):
        for name, path in places.items():
            command = [
                sys.executable,
                __file__,
                "--measure",
                name,
                str(path),
                "--threads",
                str(given.threads),
            ]
            command += ["--prompt", str(given.prompt), "--tokens", str(given.tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    if given.rounds:
        show(rows, {name: size_of(path) / 1e6 for name, path in places.items()}, given.threads)


def show(rows: dict[str, list[dict[str, float]]], megabytes: dict[str, float], threads: int) -> None:
    """Print the smallest of every number."""
    columns = list(next(iter(rows.values()))[0])
    table = Table("form", "MB on disk", *columns, title=f"{threads} thread(s); times in ms")
    for name, measured in rows.items():
        smallest = [min(row[column] for row in measured) for column in columns]
        table.add_row(name, f"{megabytes[name]:.0f}", *(f"{value:.1f}" for value in smallest))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
