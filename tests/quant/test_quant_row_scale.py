"""Embeddings that multiply their rows by a constant: told from all that compute more, and packed like plain ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_quant_apply import LanguageModel, packed_names
from torch import Tensor, nn

from quant import (
    LoftQConfig,
    QuantEmbedding,
    QuantError,
    cache_dequantized,
    load_quantized_,
    loftq_model,
    save_quantized,
)
from quant.row_scale import row_scale
from quant.stream import StreamConfig, load_checkpoint_, loftq_checkpoint

VOCABULARY, WIDTH = 600, 32
IDS = torch.arange(0, VOCABULARY, 7).view(2, -1)
CONFIG = LoftQConfig(rank=2, iterations=1, block_size=16, embedding_format="int8", embedding_block_size=16)
SCALES = st.floats(-1e3, 1e3, width=32).filter(lambda scale: abs(scale) > 1e-3)


class ByNumber(nn.Embedding):
    """Multiplies by a Python number, as BART's does."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width)
        self.factor = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class ByBuffer(nn.Embedding):
    """Multiplies by a buffer in the dtype of its weight, as Gemma's does."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.register_buffer("factor", torch.tensor(scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


def with_embedding(embedding: nn.Embedding) -> LanguageModel:
    """Return a model with another embedding of the same table, to which its head is tied."""
    model = LanguageModel(width=WIDTH, vocabulary=VOCABULARY)
    embedding.weight = model.embedding.weight
    model.embedding = embedding
    return model.eval()


def scaled_model(
    kind: type[ByNumber | ByBuffer] = ByBuffer, scale: float = math.sqrt(WIDTH)
) -> LanguageModel:
    return with_embedding(kind(VOCABULARY, WIDTH, scale))


@pytest.mark.parametrize("kind", [ByNumber, ByBuffer])
@given(scale=SCALES)
def test_the_constant_is_found_to_the_bit(kind: type[ByNumber | ByBuffer], scale: float) -> None:
    assert row_scale(kind(40, 16, scale)) == scale


@pytest.mark.parametrize("kind", [ByNumber, ByBuffer])
@pytest.mark.parametrize("format", ["int8", "uint4", "nf4"])
@given(scale=SCALES)
def test_packing_a_scaled_embedding_is_scaling_a_packed_one(
    kind: type[ByNumber | ByBuffer], format: str, scale: float
) -> None:
    config = LoftQConfig(rank=2, include=("embedding",), embedding_format=format, embedding_block_size=16)
    scaled, plain = (LanguageModel(width=16, vocabulary=40) for _ in range(2))
    embedding = kind(40, 16, scale)
    embedding.weight = scaled.embedding.weight
    scaled.embedding = embedding
    for model in (scaled, plain):
        loftq_model(model, config)
    ids, hidden = torch.arange(40).view(5, 8), torch.randn(3, 16)
    assert isinstance(scaled.embedding, QuantEmbedding)
    assert torch.equal(scaled.embedding(ids), plain.embedding(ids) * scale)
    assert torch.equal(scaled.embedding.weight, plain.embedding.weight)
    assert torch.equal(scaled.head(hidden), plain.head(hidden))
    assert scaled.head.codes is scaled.embedding.codes


@pytest.mark.parametrize("kind", [ByNumber, ByBuffer])
@pytest.mark.parametrize("block_size", [16, 64])
def test_only_the_quantization_tells_the_packed_one_from_the_module_itself(
    kind: type[ByNumber | ByBuffer], block_size: int
) -> None:
    """Rows of whole blocks, and of half a one."""
    original, model = scaled_model(kind), scaled_model(kind)
    config = LoftQConfig(rank=2, embedding_format="uint4", embedding_block_size=block_size, include=("none",))
    loftq_model(model, config)
    with torch.no_grad():
        original.embedding.weight.copy_(model.embedding.weight)
    assert torch.equal(model.embedding(IDS), original.embedding(IDS))
    with cache_dequantized(model):
        assert torch.equal(model.embedding(IDS), original.embedding(IDS))


def test_in_bfloat16_it_multiplies_by_what_the_module_multiplied_by() -> None:
    original, model = scaled_model().bfloat16(), scaled_model().bfloat16()
    loftq_model(model, CONFIG)
    with torch.no_grad():
        original.embedding.weight.copy_(model.embedding.weight)
    assert model.embedding(IDS).dtype == torch.bfloat16
    assert torch.equal(model.embedding(IDS), original.embedding(IDS))


def test_the_constant_is_shown_where_it_is_not_one() -> None:
    scaled, plain = scaled_model(), LanguageModel(width=WIDTH, vocabulary=VOCABULARY)
    for model in (scaled, plain):
        loftq_model(model, CONFIG)
    assert repr(scaled.embedding) == "QuantEmbedding(600, 32, format=int8, block_size=16, scale=5.65685)"
    assert repr(plain.embedding) == "QuantEmbedding(600, 32, format=int8, block_size=16)"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_constant_comes_back_from_a_file(device: str, tmp_path: Path) -> None:
    model = scaled_model()
    loftq_model(model, CONFIG)
    save_quantized(model, tmp_path)
    other = scaled_model(scale=3.0).to(device)
    load_quantized_(other, tmp_path)
    assert other.embedding.scale == model.embedding.scale == torch.tensor(math.sqrt(WIDTH)).item()
    assert torch.equal(other.embedding(IDS), model.embedding(IDS))
    assert torch.equal(other(IDS), model(IDS))


def test_an_entry_without_a_constant_means_one(tmp_path: Path) -> None:
    model = LanguageModel(width=WIDTH, vocabulary=VOCABULARY)
    loftq_model(model, CONFIG)
    save_quantized(model, tmp_path)
    assert "scale" not in json.loads((tmp_path / "quant.json").read_text())["layers"]["embedding"]
    load_quantized_(model, tmp_path)
    assert model.embedding.scale == 1


def test_a_streamed_model_keeps_the_embedding_that_it_has(tmp_path: Path) -> None:
    config = StreamConfig(rank=2, iterations=1, block_size=16, exclude=("embedding", "head"))
    in_memory, streamed = scaled_model(), scaled_model(scale=math.sqrt(WIDTH))
    save_source(in_memory, tmp_path / "source")
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", config)
    load_checkpoint_(streamed, tmp_path / "out")
    loftq_model(in_memory, LoftQConfig(rank=2, iterations=1, block_size=16))
    assert type(streamed.embedding) is ByBuffer
    assert torch.equal(streamed(IDS), in_memory(IDS))


def test_an_embedding_streamed_as_a_linear_layer_is_refused_by_name(tmp_path: Path) -> None:
    save_source(scaled_model(), tmp_path / "source")
    config = StreamConfig(rank=2, iterations=1, block_size=16, include=("embedding",), exclude=())
    loftq_checkpoint(tmp_path / "source", tmp_path / "out", config)
    with pytest.raises(QuantError, match=r"embedding is a ByBuffer of shape \(600, 32\).* a stored linear"):
        load_checkpoint_(scaled_model(), tmp_path / "out")


def save_source(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


class Other(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)


class Biased(Other):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) + 1e-4


class Normalizing(Other):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


class Capped(Other):
    def forward(self, input: Tensor) -> Tensor:
        return 1000 * torch.tanh(super().forward(input) / 1000)


class Gained(Other):
    """One factor a column."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.linspace(1, 1.01, WIDTH)


class Turned(Other):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(-1)


class Masked(Other):
    """Tells one id from all others."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (input != VOCABULARY - 2)[..., None]


class Placed(Other):
    """Tells the first place from all others."""

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return torch.cat([rows[:, :1], 2 * rows[:, 1:]], 1)


class Shaped(Other):
    """Tells one text from several."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if len(input) > 1 else 1)


class Dropping(Other):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Summed(Other):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum(1, keepdim=True)


class Widened(Other):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).double()


class Learned(Other):
    """Its factor is a constant until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class Endless(Other):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.inf


class Positions(Other):
    """Is not called with ids."""

    def forward(self, input: Tensor, past: int) -> Tensor:
        return super().forward(input + past)


class Bounded(Other):
    """A forward that adds nothing, to a table that changes when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.max_norm = 1.0


STRANGERS = [
    Biased, Normalizing, Capped, Gained, Turned, Masked, Placed, Shaped, Dropping, Summed, Widened, Learned, Endless,
    Positions, Bounded,
]  # fmt: skip


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_computes_something_else_is_refused_by_name_and_nothing_changed(kind: type[Other]) -> None:
    model = with_embedding(kind())
    model.register_module(
        "embedding", model._modules.pop("embedding")
    )  # behind what could be replaced before it
    model.train()
    with pytest.raises(
        QuantError, match=rf"^embedding \({kind.__name__}\) computes more than an Embedding does"
    ):
        loftq_model(model, CONFIG)
    assert packed_names(model) == []
    assert all(module.training for module in model.modules())


def test_what_a_stranger_says_when_it_is_called_is_kept() -> None:
    with pytest.raises(QuantError) as caught:
        row_scale(Positions())
    assert "past" in str(caught.value.__cause__)


class Counting(ByBuffer):
    """Keeps a buffer of its own that each call changes."""

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(input)


def test_finding_the_constant_touches_neither_module_nor_random_numbers() -> None:
    embedding = Counting(40, 16, 3.0)
    embedding.register_buffer("calls", torch.tensor(0))
    held = {id(tensor): tensor._version for tensor in (*embedding.parameters(), *embedding.buffers())}
    state = torch.get_rng_state()
    assert row_scale(embedding) == 3
    assert {id(t): t._version for t in (*embedding.parameters(), *embedding.buffers())} == held
    assert embedding.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_embedding_is_not_even_called() -> None:
    embedding = nn.Embedding(40, 16, padding_idx=0, scale_grad_by_freq=True)
    embedding.register_forward_hook(lambda *_: pytest.fail("called"))
    assert row_scale(embedding) == 1


def test_another_default_device_is_of_no_matter() -> None:
    embedding = ByBuffer(40, 16, 3.0)
    with torch.device("meta"):
        assert row_scale(embedding) == 3
