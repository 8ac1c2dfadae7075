"""Choosing the next token, and a cache that is kept between prompts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from exported_models import Exported, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from graphprune.errors import GraphPruneError, SourceError
from graphprune.export.generation import Generator, most_likely, nucleus, sampled
from graphprune.export.runtime import OnnxDecoder

# No two as good as equal: which of such tokens is the last to be drawn from is nobody's business.
LOGITS = st.lists(st.integers(-800, 800), min_size=12, max_size=12, unique=True).map(
    lambda hundredths: np.array(hundredths, dtype=np.float32) / 100
)


@settings(max_examples=100)
@given(LOGITS, st.floats(0.2, 3), st.floats(0.05, 0.999))
def test_the_nucleus_is_that_of_transformers(logits: np.ndarray, temperature: float, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None].double())
    expected = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0].numpy()
    cumulative = np.sort(scores.softmax(-1).numpy()[0])[::-1].cumsum()
    if np.abs(cumulative - top_p).min() > 1e-9:  # else rounding decides on which side a token is
        np.testing.assert_allclose(nucleus(logits, temperature, top_p), expected, atol=1e-9)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    choose = sampled(1.0, 0.9, seed=0)
    drawn = Counter(choose(logits) for _ in range(4000))
    assert set(drawn) == {0, 1, 2}
    for token, share in ((0, 0.5 / 0.95), (1, 0.3 / 0.95), (2, 0.15 / 0.95)):
        assert abs(drawn[token] / 4000 - share) < 0.03
    again = sampled(1.0, 0.9, seed=0)
    assert Counter(again(logits) for _ in range(4000)) == drawn


def test_temperature_0_takes_the_likeliest() -> None:
    assert sampled(0, 1, seed=0) is most_likely
    assert most_likely(np.array([0.1, 2.0, -1.0], dtype=np.float32)) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.1), (0.0, 0.5)])
def test_settings_out_of_range_or_in_vain_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(GraphPruneError, match=r"top.p"):
        sampled(temperature, top_p, seed=0)


class Counting(OnnxDecoder):
    """Counts the tokens that it is given."""

    given = 0

    def step(self, input_ids, attention_mask=None, past=None):  # type: ignore[no-untyped-def]
        self.given += input_ids.shape[1]
        return super().step(input_ids, attention_mask, past)


@pytest.mark.parametrize("kept", [0, 3, 9, 13])
def test_what_two_prompts_share_is_computed_once_and_changes_nothing(dense: Exported, kept: int) -> None:
    """The second prompt has some of the first's tokens and of what followed, then others."""
    decoder = Counting(dense.path)
    first, other = windows(9, 6)
    generator = Generator(decoder)
    written = list(generator.generate(first, 5))
    assert written == decoder.greedy(first, 5)
    prompt = [*first, *written][:kept] + other
    expected = decoder.greedy(prompt, 6)
    decoder.given = 0
    assert list(generator.generate(prompt, 6)) == expected
    assert decoder.given <= len(prompt) - kept + 5


def test_a_prompt_that_the_cache_holds_whole_is_answered_alike(dense: Exported) -> None:
    generator = Generator(OnnxDecoder(dense.path))
    (prompt,) = windows(8)
    first = list(generator.generate(prompt, 4))
    assert list(generator.generate(prompt, 4)) == first
    assert list(generator.generate(prompt[:1], 4)) == OnnxDecoder(dense.path).greedy(prompt[:1], 4)


def test_an_answer_that_is_not_waited_for_leaves_the_cache_right(dense: Exported) -> None:
    generator = Generator(OnnxDecoder(dense.path))
    first, other = windows(8, 5)
    next(generator.generate(first, 4))
    assert list(generator.generate(first + other, 4)) == OnnxDecoder(dense.path).greedy(first + other, 4)


def test_an_end_token_and_the_context_end_a_text(dense: Exported) -> None:
    decoder = OnnxDecoder(dense.path)
    (prompt,) = windows(6)
    free = decoder.greedy(prompt, 8)
    ended = list(Generator(decoder, end_tokens=[free[3]]).generate(prompt, 8))
    assert ended == free[: free.index(free[3]) + 1]
    assert list(Generator(decoder, context_length=9).generate(prompt, 8)) == free[:3]
    with pytest.raises(SourceError, match="6 tokens leave no room in a context of 6"):
        next(Generator(decoder, context_length=6).generate(prompt, 8))


def test_a_provider_that_cannot_be_used_is_an_error(dense: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no silent falling back to the CPU."""
    with pytest.raises(GraphPruneError, match="no provider 'tpu'"):
        OnnxDecoder(dense.path, provider="tpu")  # type: ignore[arg-type]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SourceError, match=r"no provider 'cuda' here: .* built without it"):
        OnnxDecoder(dense.path, provider="cuda")


def test_a_file_that_is_no_decoder_is_named_with_what_it_reads(dense: Exported) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["pixels"], ["classes"])
    graph = onnx.helper.make_graph(
        [node],
        "picture",
        [value("pixels", onnx.TensorProto.FLOAT, [2])],
        [value("classes", onnx.TensorProto.FLOAT, [2])],
    )
    path = dense.path.parent.parent / "picture.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path
    )
    with pytest.raises(SourceError, match="is not a decoder: it reads pixels and gives classes"):
        OnnxDecoder(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(SourceError, match="does not run"):
        OnnxDecoder(path)
