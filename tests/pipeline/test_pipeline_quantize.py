"""The stage that quantizes: mixes of formats under a budget, and errors a person can act on."""

from __future__ import annotations

import pytest
import torch

from graphprune.errors import QuantizationError, RecipeError
from graphprune.pipeline import quantize
from graphprune.pipeline.folder import open_run_folder
from graphprune.pipeline.inputs import open_inputs
from graphprune.pipeline.progress import Reporter
from graphprune.pipeline.quantize import quantize_stage
from graphprune.pipeline.session import Session
from graphprune.recipe_file import load_recipe
from quant import QuantLinear, loftq_model
from quant.mix import mix_for_bits

SETTINGS = "{format: nf4, block_size: 16, rank: 4, iterations: 2, embedding: int8, calibration_windows: 4,"


def session_of(recipe, folder, stack):
    inputs = open_inputs(load_recipe(recipe), recipe.parent)
    opened = stack.enter_context(open_run_folder(folder, inputs.fingerprint, fresh=False))
    session = Session(inputs, opened, Reporter(None))
    session.unquantized = lambda: session.dense.requires_grad_(False)
    return session


@pytest.fixture
def quantized(bench, tmp_path):
    """Returns a function from settings to the model that the stage makes of the dense one, and its note."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def run(settings):
            recipe = bench.with_recipe(quantize=(SETTINGS, settings))
            session = session_of(recipe, tmp_path / "RUN", stack)
            note = quantize_stage(session)
            return session, note

        yield run


@pytest.mark.parametrize(("bits", "calibrated"), [(3.6, 4), (4.4, 0)])
def test_layers_share_a_budget_of_bits(quantized, monkeypatch, bits, calibrated):
    mixes = []

    def kept(*arguments, **settings):
        mixes.append(mix_for_bits(*arguments, **settings))
        return mixes[0]

    monkeypatch.setattr(quantize, "mix_for_bits", kept)
    session, note = quantized(
        f"{{bits: {bits}, block_size: 16, rank: 4, iterations: 1, embedding: int8, "
        f"calibration_windows: {calibrated},"
    )
    packed = dict(session.quantized.named_modules())
    layers = [layer for layer in packed.values() if isinstance(layer, QuantLinear) and layer.rank]
    assert {packed[name] for name in mixes[0].chosen} == {*layers}  # the tied head has no part in it
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    spent = 8 * sum(layer.quantized.nbytes for layer in layers) / weights
    assert bits - 0.4 < spent <= bits
    formats = {layer.quantized.format for layer in layers}
    assert len(formats) > 1
    assert formats <= {"uint2", "uint3", "uint4"}
    assert all(name in note for name in formats)
    head = session.quantized.get_output_embeddings()
    assert head.quantized.format == "int8"
    assert (session.folder / "quant").is_dir()


def test_blocks_are_reconstructed(quantized, monkeypatch):
    reports = []

    def kept(*arguments, **settings):
        found = loftq_model(*arguments, **settings)
        reports.extend(found[1])
        return found

    monkeypatch.setattr(quantize, "loftq_model", kept)
    quantized(
        "{format: uint2, block_size: 16, rank: 4, iterations: 1, embedding: int8, calibration_windows: 4, "
        "reconstruction_epochs: 2,"
    )
    blocks = [report.block_errors for report in reports if report.block_errors is not None]
    assert blocks
    assert all(after <= before for before, after in blocks)
    assert any(after < before for before, after in blocks)


def test_blocks_that_are_no_chain_are_told_before_any_work(bench, tmp_path, monkeypatch):
    from contextlib import ExitStack

    recipe = bench.with_recipe(quantize=(SETTINGS, f"{SETTINGS} reconstruction_epochs: 1,"))
    with ExitStack() as stack:
        session = session_of(recipe, tmp_path / "RUN", stack)
        quantize.check_reconstruction(session)
        monkeypatch.setattr(quantize, "find_chain", lambda *_: None)
        with pytest.raises(QuantizationError, match="no block can be reconstructed"):
            quantize.check_reconstruction(session)


def test_a_budget_below_the_narrowest_format_is_refused_before_anything_is_run(bench):
    recipe = bench.with_recipe(quantize=(SETTINGS, "{bits: 2.5, block_size: 16, embedding: int8,"))
    with pytest.raises(RecipeError, match=r"quantize.bits: 2.5 bits a weight, and uint2 takes 3.016"):
        open_inputs(load_recipe(recipe), recipe.parent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{mix_formats: [uint2],", "without bits nothing reads quantize.mix_formats"),
        ("{propagation: 0.7,", "without calibration_windows nothing reads quantize.propagation"),
        (
            "{reconstruction_epochs: 1,",
            "without calibration_windows nothing reads quantize.reconstruction_epochs",
        ),
        ("{guided: false,", "without calibration_windows nothing reads quantize.guided"),
        ("{bits: 4, format: nf2,", "nothing reads quantize.format"),
        ("{bits: 4, mix_formats: [uint5],", "quantize.mix_formats: .*uint5"),
    ],
)
def test_settings_that_nothing_reads_are_refused(bench, settings, message):
    recipe = bench.with_recipe(quantize=(SETTINGS, settings))
    with pytest.raises(RecipeError, match=message):
        open_inputs(load_recipe(recipe), recipe.parent)


def test_what_the_quantizer_refuses_is_told_as_every_other_error(quantized, monkeypatch):
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.from_pretrained.__func__

    def damaged(cls, *arguments, **settings):
        model = original(cls, *arguments, **settings)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(damaged))
    with pytest.raises(QuantizationError, match="up_proj"):
        quantized("{format: nf4, block_size: 16, rank: 4, iterations: 1, embedding: int8,")
