"""What is typed after a run: eval, chat, verify. The reference is the torch model that the file was written from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoTokenizer

from graphprune.errors import SourceError, VerificationError
from graphprune.export.genai import write_genai_config
from graphprune.export.generation import Choose, most_likely, sampled
from graphprune.export.runtime import OnnxDecoder
from graphprune.export.write import export_onnx
from graphprune.pipeline import stages
from graphprune.pipeline.chat import converse, open_chat
from graphprune.pipeline.evaluate import Asked, evaluate
from graphprune.pipeline.exported import Exported, find_exported
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.run import run
from graphprune.pipeline.verify_run import open_quantized, verify
from graphprune.report import formatting
from graphprune.source.perplexity import perplexity, torch_logits
from graphprune.source.questions import answer, read_questions
from graphprune.source.text import cut_windows, read_text

SILENT = Reporter(None)
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
)
END = 2


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory) -> Path:
    """One whole run; do not change it."""
    folder = tmp_path_factory.mktemp("use") / "RUN"
    run(bench.recipe, folder, SILENT)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The run, to be damaged."""
    shutil.copytree(finished, tmp_path / "RUN")
    return tmp_path / "RUN"


@pytest.fixture(scope="module")
def plain(bench, tmp_path_factory):
    """A model that is neither pruned nor quantized, and the folder that was exported from it."""
    model, folder = tiny_llama(seed=4), tmp_path_factory.mktemp("plain") / "onnx"
    export_onnx(model, folder)
    AutoTokenizer.from_pretrained(bench.model).save_pretrained(folder)
    write_genai_config(
        folder, hidden_size=32, num_attention_heads=4, context_length=60, eos_token_ids=[END], bos_token_id=1
    )
    return model, folder


@pytest.fixture
def talking(plain, tmp_path) -> Exported:
    """The same with a chat template."""
    shutil.copytree(plain[1], tmp_path / "onnx")
    tokenizer = AutoTokenizer.from_pretrained(plain[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "onnx")
    return find_exported(tmp_path / "onnx")


def graphprune(*arguments, **options):
    command = [sys.executable, "-m", "graphprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def content(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_perplexity_and_accuracy_are_those_of_torch(plain, bench, tmp_path):
    """Of a file in which nothing is rounded, to the rounding of float32."""
    model, folder = plain
    generator = torch.Generator().manual_seed(0)
    words = read_text(str(bench.folder / "evaluate.txt"))[0].split()
    picks = torch.randint(len(words), (40, 4), generator=generator).tolist()
    (tmp_path / "tasks").mkdir()
    records = [
        {
            "context": " ".join(words[:i]),
            "choices": [words[a], words[b], f"{words[c]} {words[d]}"],
            "gold": a % 3,
        }
        for i, (a, b, c, d) in enumerate(picks, 1)
    ]
    task = tmp_path / "tasks" / "guessing.jsonl"
    task.write_text("\n".join(map(json.dumps, records)))
    text = str(bench.folder / "evaluate.txt")
    asked = Asked(text=text, window=20, limit=5, tasks=[tmp_path / "tasks"])
    found = evaluate(find_exported(folder), asked, SILENT, threads=1)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    windows = cut_windows(read_text(text), tokenizer, window=20, limit=5, name=text)
    assert found.text.tokens == 5 * 19
    assert found.text.perplexity == pytest.approx(perplexity(torch_logits(model), windows), rel=1e-5)
    assert found.tasks == {"guessing": answer(torch_logits(model), tokenizer, read_questions(task))}
    assert 0 < found.tasks["guessing"].right < 1


def test_a_run_is_judged_by_its_recipes_text_from_wherever_it_is_called(finished, tmp_path, monkeypatch):
    """The number is the one that the run itself found."""
    monkeypatch.chdir(tmp_path)
    done = graphprune("eval", finished, "--json", "numbers.json", "--quiet")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "numbers.json").read_text())
    expected = json.loads((finished / "run.json").read_text())["measured"]["perplexity_onnx"]
    assert row["text"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert row["text"]["window"] == 32
    assert formatting.number(expected) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_another_text_window_and_limit_replace_the_recipes(finished, bench):
    asked = Asked(text=str(bench.folder / "train.txt"), window=16, limit=2)
    found = evaluate(find_exported(finished), asked, SILENT)
    assert (found.text.tokens, found.text.window) == (2 * 15, 16)


def test_what_is_missing_is_named(finished, plain, copy, tmp_path):
    with pytest.raises(SourceError, match="nothing to evaluate"):
        evaluate(find_exported(plain[1]), Asked(), SILENT)
    with pytest.raises(SourceError, match=r"holds no \*.jsonl"):
        evaluate(find_exported(plain[1]), Asked(tasks=[copy]), SILENT)
    manifest = json.loads((copy / "run.json").read_text())
    manifest["measured"]["recipe_folder"] = str(tmp_path / "gone")
    (copy / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match=r"evaluation text cannot be read: there is no text 'evaluate.txt'"):
        evaluate(find_exported(copy), Asked(), SILENT)
    with pytest.raises(SourceError, match="no ONNX model at"):
        find_exported(tmp_path / "gone")
    shutil.rmtree(copy / "onnx")
    with pytest.raises(SourceError, match="has no ONNX model yet"):
        find_exported(copy)


def test_a_finished_run_verifies_again(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = graphprune("verify", finished)
    assert done.returncode == 0, done.stderr
    for name in ("weights", "decode", "greedy", "adapter", "top1_agreement", "external data"):
        assert name in done.stdout
    assert "fails" not in done.stdout
    assert content(tmp_path) == {}


def test_a_folder_or_a_file_verifies_without_its_model(finished, tmp_path):
    shutil.copytree(finished / "onnx", tmp_path / "onnx")
    for place in (tmp_path / "onnx", tmp_path / "onnx" / "model.onnx"):
        checks = verify(find_exported(place))
        assert {"decode", "padded_batch", "3x12 after 7"} < {check.name for check in checks}
        assert all(check.holds for check in checks)


def test_a_changed_byte_and_another_base_fail_and_the_table_says_so(copy):
    data = copy / "onnx" / "model.onnx.data"
    proto = onnx.load(str(copy / "onnx" / "model.onnx"), load_external_data=False)
    codes = next(t for t in proto.graph.initializer if t.name.endswith("embed_tokens.weight.codes"))
    offset = next(int(entry.value) for entry in codes.external_data if entry.key == "offset")
    stored = bytearray(data.read_bytes())
    stored[offset] ^= 64
    data.write_bytes(stored)
    record = json.loads((copy / "adapter" / "graphprune.json").read_text())
    record["base"]["sha256"] = "0" * 64
    (copy / "adapter" / "graphprune.json").write_text(json.dumps(record))
    done = graphprune("verify", copy)
    assert done.returncode == 4
    assert "fails" in done.stdout
    assert "adapter_of_another_base 1 > 0" in done.stderr
    assert "weights " in done.stderr
    assert "Traceback" not in done.stderr


def test_packed_weights_that_were_changed_are_not_verified_against(copy):
    path = copy / "quant" / "quant.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"0")
    with pytest.raises(SourceError, match=r"is not the file that quant\.json describes"):
        verify(find_exported(copy))


def test_another_adapter_than_the_packed_models_is_found(copy):
    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] += 0.01
    save_file(tensors, path)
    failed = {check.name for check in verify(find_exported(copy)) if check.holds is False}
    assert failed == {"adapter"}
    path.unlink()
    with pytest.raises(VerificationError, match="no adapter of this run"):
        verify(find_exported(copy))


def test_the_model_that_is_verified_against_is_that_of_the_export_stage(finished):
    """Its perplexity is the one that the run measured after recovery."""
    exported = find_exported(finished)
    model = open_quantized(finished, exported.recipe)
    data = exported.recipe.data
    documents = read_text(data.evaluate, base=exported.base)
    windows = cut_windows(documents, exported.tokenizer, window=32, limit=4, name="")
    measured = json.loads((finished / "run.json").read_text())["measured"]
    assert perplexity(torch_logits(model), windows) == pytest.approx(
        measured["perplexity_recovered"], rel=1e-5
    )


def test_an_export_that_fails_leaves_its_files_apart_and_the_earlier_ones_alone(copy, bench, monkeypatch):
    earlier = content(copy / "onnx")
    manifest = json.loads((copy / "run.json").read_text())
    for stage in ("export", "speed"):
        del manifest["stages"][stage]
    (copy / "run.json").write_text(json.dumps(manifest))

    def written_before(model, folder, **options):
        shutil.copytree(copy / "onnx", folder)
        return folder / "model.onnx"

    def differs(*arguments):
        raise VerificationError("it is not what it should be", "do not use it")

    monkeypatch.setattr(stages, "export_onnx", written_before)
    monkeypatch.setattr(stages, "verify_onnx", differs)
    with pytest.raises(VerificationError, match="not what it should be"):
        run(bench.recipe, copy, SILENT)
    assert content(copy / "onnx") == earlier
    assert content(copy / "onnx.unverified") == earlier
    assert find_exported(copy).file == copy / "onnx" / "model.onnx"
    shutil.rmtree(copy / "onnx")
    with pytest.raises(SourceError, match="did not pass its verification"):
        find_exported(copy)
    assert find_exported(copy / "onnx.unverified").run is None


def turns(exported: Exported, lines: list[str], max_new_tokens: int = 6, choose: Choose = most_likely) -> str:
    pieces: list[str] = []
    chat = open_chat(exported, choose=choose, max_new_tokens=max_new_tokens)
    converse(chat, lines, pieces.append)
    return "".join(pieces)


def by_hand(exported: Exported, prompt: str, max_new_tokens: int = 6) -> str:
    ids = exported.tokenizer(prompt)["input_ids"]
    written = OnnxDecoder(exported.file).greedy(ids, max_new_tokens, [END])
    decode = exported.tokenizer.decode
    return decode([*ids, *written], skip_special_tokens=True)[len(decode(ids, skip_special_tokens=True)) :]


def test_each_turn_follows_from_all_before_it_by_the_template(talking):
    first = by_hand(talking, "<s> the cat </s> <s> ")
    second = by_hand(talking, f"<s> the cat </s> <s> {first} </s> <s> a dog </s> <s> ")
    assert turns(talking, ["the cat\n", "\n", "a dog\n", "/exit\n", "tree\n"]) == f"{first}\n{second}\n"


def test_a_second_turn_computes_what_is_new_alone(talking, monkeypatch):
    given = []
    step = OnnxDecoder.step

    def counted(self, input_ids, attention_mask=None, past=None):
        given.append(input_ids.shape[1])
        return step(self, input_ids, attention_mask, past)

    monkeypatch.setattr(OnnxDecoder, "step", counted)
    turns(talking, ["the cat", "a dog"], max_new_tokens=3)
    assert given == [5, 1, 1, 7, 1, 1]  # "</s> <s> a dog </s> <s>" after the token that was not fed yet


def test_the_oldest_turns_are_forgotten_where_the_context_is_full(talking):
    """All that fit into 60 tokens with an answer of 6 are remembered, and no others."""
    lines = ["the cat " * 9, *(f"the cat {word}" for word in ("sat", "on", "a", "mat", "the", "dog") * 2)]
    answers = turns(talking, lines).split("\n")
    fitting = []
    for index, line in enumerate(lines):
        for first in range(index + 1):
            earlier = zip(lines[first:index], answers[first:index], strict=True)
            history = "".join(f"<s> {asked} </s> <s> {said} </s> " for asked, said in earlier)
            prompt = f"{history}<s> {line} </s> <s> "
            if len(talking.tokenizer(prompt)["input_ids"]) + 6 <= 60:
                break
        fitting.append(index - first)
        assert by_hand(talking, prompt) == answers[index]
    assert max(fitting) < len(lines) - 2


def test_without_a_template_a_line_is_gone_on_with(plain):
    exported = find_exported(plain[1])
    for line in ("the cat sat", "tree"):
        assert turns(exported, [line, line]) == f"{by_hand(exported, line)}\n" * 2


def test_an_answer_ends_with_an_end_token(plain, tmp_path):
    """The one that genai_config.json names."""
    exported = find_exported(plain[1])
    ids = exported.tokenizer("the cat")["input_ids"]
    third = OnnxDecoder(exported.file).greedy(ids, 6)[2]
    shutil.copytree(plain[1], tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = third
    (tmp_path / "onnx" / "genai_config.json").write_text(json.dumps(config))
    ended = find_exported(tmp_path / "onnx")
    assert ended.end_tokens == (third,)
    written = turns(ended, ["the cat"]).split()
    assert written == turns(exported, ["the cat"]).split()[: len(written)]
    assert len(written) <= 3


def test_a_pipe_is_a_conversation(finished):
    done = graphprune("chat", finished, "--max-tokens", 4, input="the cat\n\na dog\n/exit\ntree\n")
    assert done.returncode == 0, done.stderr
    exported = find_exported(finished)
    assert done.stdout == turns(exported, ["the cat", "a dog"], max_new_tokens=4)


def test_what_is_drawn_follows_from_the_seed(plain):
    exported = find_exported(plain[1])
    texts = [turns(exported, ["the cat"], 12, sampled(2.0, 0.9, seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
