"""A report of a 30-layer model as a run would leave it, and the rows that its pictures are drawn from."""

from __future__ import annotations

import random
from typing import Any

import pytest
from group_documents import document_of, make_groups

from graphprune.report.schema import Report

LAYERS = 30


def make_report() -> dict[str, Any]:
    draw = random.Random(7)
    widths = []
    for layer in range(LAYERS):
        widths.append(
            {
                "name": f"model.layers.{layer}.self_attn:attention_heads",
                "kind": "attention_heads",
                "before": 3,
                "after": 2,
            }
        )
        after = 64 * draw.randint(13, 20)
        widths.append(
            {"name": f"model.layers.{layer}.mlp:ffn", "kind": "ffn", "before": 1536, "after": after}
        )
    shapes = {
        "self_attn.q_proj": (384, 576),
        "self_attn.k_proj": (128, 576),
        "self_attn.v_proj": (128, 576),
        "self_attn.o_proj": (576, 384),
        "mlp.gate_proj": (1088, 576),
        "mlp.up_proj": (1088, 576),
        "mlp.down_proj": (576, 1088),
    }
    layers = []
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            error = draw.uniform(0.085, 0.112)
            after = error * draw.uniform(0.68, 0.9)
            full = f"model.layers.{layer}.{name}"
            layers.append(
                {"name": full, "format": "nf4", "shape": shape, "error_before": error, "error_after": after}
            )
    return {
        "schema": "graphprune.report/1",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "source": "models/SmolLM2-135M-Instruct",
            "architecture": "LlamaForCausalLM",
            "opened_by": "from_pretrained",
        },
        "parameters": {
            "before": 134515008,
            "after": 99125568,
            "asked_share": 0.25,
            "removed_share": 0.2630891,
        },
        "budget": {"unit": "parameters", "asked_share": 0.25, "removed_share": 0.2630891},
        "bytes": {"source": 269060552, "pruned": 198276400, "onnx": 86733912},
        "perplexity": {
            "dense": 17.3921,
            "pruned": 24.8137,
            "quantized": 26.1043,
            "recovered": 21.0772,
            "onnx": 21.1315,
            "protocol": {
                "text": "wikitext-2-raw-v1, test",
                "tokens": 65536,
                "window": 1024,
                "description": "windows do not overlap; the first token of each is not scored",
            },
        },
        "tokens_per_second": {
            "dense_onnx_fp32": 14.82,
            "compact_onnx": 31.47,
            "threads": 2,
            "new_tokens": 64,
        },
        "distance": None,
        "certificate": {
            "groups": 61,
            "permuted_max_error": 3.24e-6,
            "removed_max_error": 5.71e-6,
            "tolerance": 1e-4,
            "ok": True,
        },
        "verify": {
            "max_abs_error": 0.0412,
            "top1_agreement": 0.9971,
            "kl": 0.000213,
            "tokens": 4096,
            "checks": {
                "cached decoding, greatest difference": 2.1e-5,
                "batch of two, greatest difference": 1.4e-5,
            },
            "tolerances": {
                "max_abs_error": 0.1,
                "top1_agreement": 0.98,
                "kl": 0.01,
                "cached decoding, greatest difference": 1e-3,
            },
        },
        "stages": [
            {"name": "trace", "seconds": 8.41, "peak_bytes": 1_320_000_000, "state": "reused", "note": ""},
            {
                "name": "groups",
                "seconds": 0.21,
                "peak_bytes": 1_350_000_000,
                "state": "done",
                "note": "61 prunable",
            },
            {"name": "certify", "seconds": 21.9, "peak_bytes": 2_410_000_000, "state": "done", "note": ""},
            {
                "name": "prune",
                "seconds": 2914.2,
                "peak_bytes": 5_920_000_000,
                "state": "done",
                "note": "400 steps",
            },
            {"name": "shrink", "seconds": 3.9, "peak_bytes": 2_100_000_000, "state": "done", "note": ""},
            {
                "name": "quantize",
                "seconds": 118.6,
                "peak_bytes": 2_600_000_000,
                "state": "done",
                "note": "LoftQ, rank 16",
            },
            {
                "name": "recover",
                "seconds": 1630.5,
                "peak_bytes": 4_700_000_000,
                "state": "done",
                "note": "200 steps",
            },
            {"name": "export", "seconds": 64.3, "peak_bytes": 3_300_000_000, "state": "done", "note": ""},
            {"name": "verify", "seconds": 92.0, "peak_bytes": 2_900_000_000, "state": "done", "note": ""},
        ],
        "groups": [
            summary("ffn", 30, 1536, 3, 1728, None),
            summary("attention_heads", 30, 3, 4, 98304, None),
            summary("query_heads", 30, 3, 2, 73728, "kept by the recipe"),
            summary(
                "head_dim",
                1,
                64,
                121,
                61440,
                "rotary pairs are coupled in all 30 layers; kept by the recipe",
            ),
            summary("hidden", 1, 576, 272, 233472, "kept by the recipe"),
            summary("vocabulary", 1, 49152, 1, 576, "reaches the model's output 'logits' axis 2"),
        ],
        "widths": widths,
        "generations": [
            {
                "prompt": "The capital of France is",
                "dense": " Paris. It is the largest city in France and one of the most visited cities.",
                "compact": " Paris. It is the largest city in the country, and the seat of its government.",
            },
            {
                "prompt": "def fibonacci(n):",
                "dense": "\n    if n <= 1:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)",
                "compact": "\n    if n < 2:\n        return n\n    return fibonacci(n - 1)",
            },
        ],
        "layers_quantized": layers,
        "recovery": [
            {
                "phase": "text",
                "number": number,
                "step": 100 * number,
                "mix": {"wikipedia": 0.375, "books": 0.625} if number else {},
                "losses": {"wikipedia": 3.21 - 0.11 * number, "books": 3.87 - 0.25 * number},
                "degradation": {"wikipedia": 0.42 - 0.11 * number, "books": 0.61 - 0.25 * number},
                "kept": number == 2,
            }
            for number in range(3)
        ],
        "environment": {
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "processor": "Intel Xeon at 2.2 GHz",
            "cores": 2,
            "memory_bytes": 16_777_216_000,
        },
        "versions": {
            "graphprune": "0.1.0",
            "onnxruntime": "1.31.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        "seed": 17,
        "recipe": {
            "model": "models/SmolLM2-135M-Instruct",
            "prune": {
                "remove": 0.25,
                "saliency": "taylor",
                "steps": 400,
                "periods": 5,
                "groups": ["ffn", "attention_heads"],
            },
            "quant": {"format": "nf4", "block": 64, "adapter_rank": 16, "loftq_iterations": 5},
            "recover": {"steps": 200, "learning_rate": 3e-4, "text": None},
            "seed": 17,
        },
        "command": "graphprune run recipe.yaml --out RUN",
        "created": "2026-03-02T14:05:11Z",
        "limits": [
            "Perplexity was measured on 65,536 tokens of English encyclopedia text; other text may differ.",
            "Speed was measured with a batch of one and a short prompt on two cores.",
        ],
    }


def summary(kind: str, count: int, size: int, members: int, each: int, reason: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "count": count,
        "size": size,
        "members": members,
        "parameters_per_unit": each,
        "prunable": reason is None,
        "reason": reason,
    }


def make_metrics(prune: int = 400, recover: int = 200) -> list[dict[str, Any]]:
    draw, rows, target = random.Random(3), [], 15_390
    for step in range(prune):
        period = step * 5 // max(1, prune)
        redundant = target * (period + 1) // 5
        inside = (step * 5 % prune) / prune
        zeroed = int(target * (period + min(1.0, 1.6 * inside)) / 5)
        loss = 2.86 + 0.09 * period * (1 - 0.4 * inside) + draw.gauss(0, 0.06)
        row = {"stage": "prune", "step": step, "loss": loss, "redundant": redundant, "zeroed": zeroed}
        rows.append(row | {"target": target, "learning_rate": 3e-4})
    for step in range(recover):
        loss = 3.05 + 0.25 * 0.98**step + draw.gauss(0, 0.05)
        row = {"stage": "recover", "step": step, "loss": loss, "redundant": target, "zeroed": target}
        rows.append(row | {"target": target, "learning_rate": 1e-4})
    return rows


@pytest.fixture
def data() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="session")
def report() -> Report:
    return Report.model_validate(make_report())


@pytest.fixture(scope="session")
def document() -> dict[str, Any]:
    return document_of(make_groups(), "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def metrics() -> list[dict[str, Any]]:
    return make_metrics()
