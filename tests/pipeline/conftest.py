"""A tiny Llama on disk, with a tokenizer and two texts: what a whole run needs."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from onnx_runs import ONNX_RECIPE
from pruning_settings import SCHEDULE
from tiny_models import tiny_llama

from graphprune.export.genai import write_genai_config
from graphprune.export.write import export_onnx

RECIPE = """\
graphprune: 1
seed: 3
model: {{id: {model}}}
data: {{train: {train}, evaluate: {evaluate}, window: 24, evaluate_window: 32, evaluate_windows: 4}}
prune:
  remove: 0.2
  width_multiple: {{ffn: 16}}
  calibration_windows: 4
  rank: 4
  alpha: 8
{schedule}
  training: {{learning_rate: 1e-3, batch_size: 2, precision: float32}}
quantize:
  {{format: nf4, block_size: 16, rank: 4, iterations: 2, embedding: int8, calibration_windows: 4,
    scale_storage: double}}
recover: {{steps: 3, training: {{learning_rate: 1e-3, batch_size: 2, precision: float32}}}}
export: {{verify_windows: 2, verify_tokens: 12}}
report: {{prompts: [the cat sat on], new_tokens: 5, speed_tokens: 0}}
"""

WORDS = (
    "the a cat dog sat ran on under over mat tree house and but then while big small red blue old young"
).split()


@dataclass(frozen=True)
class Workbench:
    """Paths of everything that a run needs."""

    folder: Path
    model: Path
    recipe: Path

    def with_recipe(self, **replacements: str) -> Path:
        text = self.recipe.read_text()
        for old, new in replacements.values():
            assert old in text
            text = text.replace(old, new)
        path = self.folder / "changed.yaml"
        path.write_text(text)
        return path


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    model = folder / "tiny"
    tiny_llama(seed=4).save_pretrained(model)
    save_tokenizer(model)
    (folder / "train.txt").write_text(words(0, 600))
    (folder / "evaluate.txt").write_text(words(1, 200))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(model="tiny", train="train.txt", evaluate="evaluate.txt", schedule=SCHEDULE)
    )
    return Workbench(folder, model, recipe)


@pytest.fixture(scope="session")
def door(bench, tmp_path_factory) -> Path:
    """A folder with a decoder as an ONNX file, its tokenizer and configuration, a recipe and texts."""
    folder = tmp_path_factory.mktemp("door")
    export_onnx(tiny_llama(seed=4), folder / "decoder")
    for path in bench.model.glob("tokenizer*"):
        shutil.copy(path, folder / "decoder")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "context_length": 256}
    write_genai_config(folder / "decoder", eos_token_ids=[2], **sizes)
    for name in ("train.txt", "evaluate.txt"):
        shutil.copy(bench.folder / name, folder)
    (folder / "recipe.yaml").write_text(ONNX_RECIPE)
    return folder
