"""Whole blocks: what is left computes what the original does with their contributions left out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import randomized, tiny_llama
from torch import nn

from graphprune.errors import ShrinkError, TraceError
from graphprune.shrink.blocks import drop_blocks
from graphprune.trace.blocks import find_blocks

IDS = torch.arange(18).reshape(2, 9) + 3


def gpt2(layers=4, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=67, n_positions=64, eos_token_id=2, **changes
    )
    return randomized(GPT2LMHeadModel(config))


def bert(layers=4):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, vocab_size=67
    )
    return randomized(BertModel(config))


def gemma3(layers=4):
    """Sliding windows of three tokens and full attention, by layer: a wrong list shows in the logits."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=67,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        eos_token_id=[2, 5, 7, 9],
        pad_token_id=0,
    )
    return randomized(Gemma3ForCausalLM(config))


class Residual(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Net(nn.Module):
    """Two chains; the second one is the larger."""

    def __init__(self):
        super().__init__()
        self.small = nn.ModuleList(Residual(6, 3) for _ in range(3))
        self.stages = nn.ModuleList(Residual(6, 12) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(6, 6) for _ in range(9))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.small:
            x = block(x)
        for block in self.stages:
            x = block(x)
        return self.head(sum(head(x) for head in self.heads))


def chain_of(model):
    """The list of blocks by its known name: an independent view of what `find_blocks` finds."""
    for name in ("model.layers", "transformer.h", "encoder.layer", "stages"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise LookupError


def skipped(model, blocks, inputs):
    """The original with some blocks replaced by the identity."""

    class Identity(nn.Module):
        def __init__(self, like):
            super().__init__()
            self.attention_type = getattr(like, "attention_type", None)

        def forward(self, hidden, *_, **__):
            return hidden

    chain = chain_of(model)
    originals = {number: chain[number] for number in blocks}
    for number in blocks:
        chain[number] = Identity(originals[number])
    try:
        return outputs(model, inputs)
    finally:
        for number, block in originals.items():
            chain[number] = block


def outputs(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("blocks", [(0,), (2,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("build", [tiny_llama, gpt2, bert, gemma3], ids=lambda build: build.__name__)
def test_a_model_without_blocks_computes_what_it_did_with_them_skipped(build, blocks):
    model = build(num_hidden_layers=4) if build is tiny_llama else build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = drop_blocks(model, blocks)
    inputs = {"input_ids": IDS}
    torch.testing.assert_close(outputs(small, inputs), skipped(model, blocks, inputs), atol=1e-6, rtol=1e-6)
    assert type(small) is type(model)
    assert len(chain_of(small)) == small.config.num_hidden_layers == 4 - len(blocks)
    assert model.config.num_hidden_layers == len(chain_of(model)) == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ours, theirs = ({weight.data_ptr() for weight in each.parameters()} for each in (small, model))
    assert not ours & theirs


def test_lists_of_one_entry_a_layer_are_cut_and_others_are_not():
    model = gemma3()
    small = drop_blocks(model, [1])
    assert small.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert small.config.eos_token_id == [2, 5, 7, 9]
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("build", [tiny_llama, gpt2, gemma3], ids=lambda build: build.__name__)
def test_generation_with_a_cache_writes_what_it_writes_without(build):
    model = build(num_hidden_layers=4) if build is tiny_llama else build()
    small = drop_blocks(model, [0, 2])
    runs = [
        small.generate(
            IDS[:1],
            attention_mask=torch.ones_like(IDS[:1]),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*runs)


def test_the_smaller_model_saves_and_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    small = drop_blocks(gemma3(), [1, 3])
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, {"input_ids": IDS}), outputs(small, {"input_ids": IDS}))


def test_ties_types_flags_and_the_mode_stay():
    model = tiny_llama(num_hidden_layers=3).to(torch.bfloat16)
    model.requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    model.train()
    small = drop_blocks(model, [0])
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert {weight.dtype for weight in small.parameters()} == {torch.bfloat16}
    assert [name for name, weight in small.named_parameters() if weight.requires_grad] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    assert small.training
    assert small.model.layers[0].training
    assert model.training


@pytest.mark.parametrize("blocks", [(1,), (0, 3)])
def test_of_a_plain_module_the_largest_chain_is_shortened(blocks):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 6)
    small = drop_blocks(model, blocks, x)
    assert (len(small.stages), len(small.small), len(model.stages)) == (4 - len(blocks), 3, 4)
    assert list(small.state_dict()) == [
        name
        for name in model.state_dict()
        if not name.startswith(tuple(f"stages.{b}." for b in (3, 2)[: len(blocks)]))
    ]
    torch.testing.assert_close(outputs(small, {"x": x}), skipped(model, blocks, {"x": x}))


def test_lists_that_are_no_chain_are_not_taken_for_one():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    class Twice(Net):
        def forward(self, x):
            return super().forward(super().forward(x) @ torch.ones(2, 6))

    class Narrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 4)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    for model, width in ((Parallel(), 4), (Twice(), 6), (Narrowing(), 8)):
        with pytest.raises(TraceError, match=r"no nn\.ModuleList whose entries run one after the other"):
            find_blocks(model, {"x": torch.randn(2, width)})


def test_a_block_that_computes_by_its_number_is_not_renumbered_in_silence():
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    assert drop_blocks(model, [3]).config.n_layer == 3
    with pytest.raises(ShrinkError, match="computes something else"):
        drop_blocks(model, [0])


def test_a_module_whose_code_counts_its_blocks_is_refused():
    class Counting(Net):
        def forward(self, x):
            for number in range(4):
                x = self.stages[number](x)
            return x

    with pytest.raises(ShrinkError, match="does not run with fewer blocks"):
        drop_blocks(Counting(), [1], torch.randn(2, 6))


@pytest.mark.parametrize(
    ("blocks", "problem"), [((0, 1), "no block would be left"), ((2,), "no block 2"), ((-1,), "no block -1")]
)
def test_numbers_that_are_of_no_block_are_refused(blocks, problem):
    with pytest.raises(ShrinkError, match=problem):
        drop_blocks(tiny_llama(), blocks)


def test_what_the_class_cannot_build_is_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(num_hidden_layers=3)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32))
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(torch.zeros(40, 32))
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 40))
    with pytest.raises(ShrinkError, match=r"no 'model.layers.0.mlp.*' of the same shape"):
        drop_blocks(model, [1])
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ShrinkError, match="wraps a transformers model"):
        drop_blocks(adapted, [1])
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ShrinkError, match="no weights"):
        drop_blocks(empty, [1])
