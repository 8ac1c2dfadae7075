"""Time and memory of a step of LHSPG beside AdamW on the same adapters, of LoRAPrune's scores beside the dense formula.

    python examples/benchmarks/lhspg_speed.py
    python examples/benchmarks/lhspg_speed.py --device cuda --dtype bfloat16 --shapes LLaMA-7B

Models have random weights. Times: one process a shape; steps of AdamW and of LHSPG alternate on one model (AdamW's with
the gates opened, which is the model without any), and the ratio is that of the medians. Memory: the peak of a process
of its own for each optimizer, three steps within the schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    **{
        f"{layers} layers": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": layers,
                             "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192}
        for layers in (4, 8, 16)
    },
    "4 layers, 2 × as wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
                              "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192},
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
MODES = ("gated", "paper")
PERIOD = 1000  # steps of a period: more than are ever measured, so that fading goes on


def build(given: argparse.Namespace) -> tuple[Any, Any]:
    """Return a model with adapters on all its linear layers, and its node groups."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphprune as gp
    from graphprune.source.adapters import attach_adapters

    torch.manual_seed(0)
    with torch.device(given.device):
        config = LlamaConfig(**SHAPES[given.shape], max_position_embeddings=4096)
        config.dtype = given.dtype
        model = LlamaForCausalLM(config).to(getattr(torch, given.dtype))
    model = attach_adapters(model, 16, 32)
    model.train()
    example = {"input_ids": torch.arange(22, device=given.device).reshape(2, 11)}
    return model, gp.node_groups(gp.trace(model, example))


def pruner(given: argparse.Namespace, model: Any, groups: Any, mode: Any, warmup: int) -> Any:
    """Return LHSPG in a mode, with a fifth of the parameters to remove."""
    import graphprune as gp

    params = gp.param_groups(model, groups)
    return gp.LHSPG(params, remove=0.2, mode=mode, warmup_steps=warmup, periods=1, period_steps=PERIOD)


def step(given: argparse.Namespace, model: Any, optimizer: Any) -> float:
    """Train by one step; return its seconds."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (given.batch, given.window), device=given.device)
    start = now(given)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    return now(given) - start


def now(given: argparse.Namespace) -> float:
    """Return seconds: the processor's on a CPU, so that other work does not count, the wall's on a GPU."""
    if given.device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def times(given: argparse.Namespace) -> dict[str, float]:
    """Return medians of a step of AdamW, and of LHSPG in both modes before and while units fade."""
    import torch

    model, groups = build(given)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = torch.optim.AdamW(adapters, lr=1e-4)
    found: dict[str, float] = {}
    for mode in MODES:
        for phase, warmup in (("warm-up", PERIOD), ("fading", 0)):
            ours = pruner(given, model, groups, mode, warmup)
            pairs = [
                (adamw_step(given, model, plain, ours, mode), step(given, model, ours))
                for _ in range(given.steps + 2)
            ]
            before, after = zip(*pairs[2:], strict=True)  # the first two warm up
            found[f"{mode}, {phase}"] = statistics.median(after) / statistics.median(before)
            found["adamw"] = statistics.median(before)
            ours.close()
    return found


def adamw_step(given: argparse.Namespace, model: Any, plain: Any, ours: Any, mode: str) -> float:
    """Return the seconds of a step without any gates."""
    if mode == "paper":
        return step(given, model, plain)
    with ours.gates.opened():
        return step(given, model, plain)


def peak(given: argparse.Namespace) -> dict[str, float]:
    """Return the peak memory in bytes of three steps."""
    import torch

    model, groups = build(given)
    if given.case == "adamw":
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    else:
        optimizer = pruner(given, model, groups, given.case, 0)
    for _ in range(3):
        step(given, model, optimizer)
    if given.device == "cpu":
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    return {"bytes": float(torch.cuda.max_memory_allocated())}


def scores(given: argparse.Namespace) -> dict[str, float]:
    """Return seconds of LoRAPrune's scores from the factors, by its formula with whole matrices, and how far apart."""
    import torch

    from graphprune.prune.budget import targets
    from graphprune.prune.param_groups import KINDS
    from graphprune.saliency.loraprune import importance
    from graphprune.saliency.units import adapted_members

    model, groups = build(given)
    members = adapted_members(model, groups, [group.name for group in targets(groups, KINDS)])
    factors = {name: factor for member in members for name, factor in member.weight.factors().items()}
    gradients = {name: torch.randn_like(factor) for name, factor in factors.items()}
    found: dict[str, list[float]] = {"factors": [], "dense": []}
    for _ in range(given.steps):
        start = now(given)
        ours = importance(members, gradients)
        middle = now(given)
        theirs = dense_importance(members, gradients)
        found["factors"].append(middle - start)
        found["dense"].append(now(given) - middle)
    apart = max(
        float(((ours[name] - score).abs() / score.abs().clamp_min(1e-12)).max())
        for name, score in theirs.items()
    )
    return {**{name: statistics.median(seconds) for name, seconds in found.items()}, "apart": apart}


def dense_importance(members: Any, gradients: Any) -> Any:
    """Return the sums over units of (Ĝ (W + s B A))², each matrix whole, as LoRAPrune's program computes them."""
    scores: dict[str, Any] = {}
    for member in members:
        weight = member.weight
        (term,) = weight.terms
        a, b = (weight.model.get_parameter(name).detach() for name in (term.down, term.up))
        grad_a, grad_b = gradients[term.down], gradients[term.up]
        surrogate = grad_b @ a + b @ grad_a - grad_b @ grad_a
        effective = weight.model.get_parameter(weight.name).detach() + term.scaling * (b @ a)
        elements = (surrogate * effective).square()
        for place in member.places:
            score = place.by_unit(elements.sum(0 if place.by_input else 1))
            scores[place.group] = scores[place.group] + score if place.group in scores else score
    return scores


def call(given: argparse.Namespace, **changed: str) -> dict[str, float]:
    """Measure in a process of its own."""
    options = {**vars(given), **changed}
    options.pop("shapes")
    arguments = [item for key, value in options.items() if value for item in (f"--{key}", str(value))]
    # Pages go back to the system at once, so that the peak is that of tensors and not of the allocator's habits.
    sparing = {"MALLOC_MMAP_THRESHOLD_": "65536"} if options["case"] in ("adamw", *MODES) else {}
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **sparing}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[name for name in SHAPES if name != "LLaMA-7B"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps({"times": times, "scores": scores}.get(given.case, peak)(given)))
        return
    phases = [f"{mode}, {phase}" for mode in MODES for phase in ("warm-up", "fading")]
    print(
        f"{given.batch} × {given.window} tokens, {given.dtype} on {given.device}, medians of {given.steps} steps\n"
    )
    print(
        f"| shape | AdamW s | {' | '.join(phases)} | AdamW GB | gated | paper | LoRAPrune's scores s | of dense |"
    )
    print("|---|" + "---:|" * (len(phases) + 6))
    for shape in given.shapes:
        found = call(given, shape=shape, case="times")
        memory = {case: call(given, shape=shape, case=case)["bytes"] for case in ("adamw", *MODES)}
        ratios = " | ".join(f"{found[phase]:.2f}" for phase in phases)
        more = " | ".join(f"{memory[mode] / memory['adamw']:.2f}" for mode in MODES)
        scored = call(given, shape=shape, case="scores")
        more += f" | {scored['factors']:.3f} | {scored['factors'] / scored['dense']:.2f}"
        print(
            f"| {shape} | {found['adamw']:.2f} | {ratios} | {memory['adamw'] / 1e9:.2f} | {more} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
