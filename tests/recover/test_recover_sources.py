"""What is held out is never trained on, wherever else it stands."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from instructions import tiny_tokenizer

from graphprune.errors import RecipeError, SourceError
from graphprune.recipe import RecoverySource
from graphprune.recover.sources import hold_out, open_text, split_sources, without
from graphprune.source.text import IGNORED, Windows


def entry(name="s", **changes):
    return RecoverySource(name=name, path="none.txt", **changes)


def rows(windows):
    return {tuple(row) for row in windows.ids.tolist()}


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=12, max_size=30),
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=12, max_size=30),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_no_source_trains_on_what_any_source_holds_out(first, second, count, seed):
    """Duplicates within a text and between texts included; nothing else is lost."""
    texts = [Windows(torch.tensor(ids), "text") for ids in (first, second)]
    assume(all(len(rows(text)) > 6 for text in texts))
    made = split_sources([entry("a", hold_out=count), entry("b", hold_out=count)], texts, seed)
    held = set().union(*(rows(source.held_out) for source in made))
    for source, text in zip(made, texts, strict=True):
        assert len(source.held_out) == count
        assert not rows(source.train) & held
        assert rows(source.train) == rows(text) - held


def test_what_is_held_out_is_drawn_from_the_whole_text():
    windows = Windows(torch.arange(40)[:, None], "numbers")
    seen = set().union(*(rows(hold_out(windows, 4, seed)) for seed in range(40)))
    assert len(seen) > 35
    assert rows(hold_out(windows, 4, 1)) == rows(hold_out(windows, 4, 1))


def test_labels_go_with_their_windows():
    ids = torch.arange(30).reshape(10, 3)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    (source,) = split_sources([entry(hold_out=2)], [Windows(ids, "asked", labels)], 0)
    for part in (source.train, source.held_out):
        assert torch.equal(part.labels[:, 1:], part.ids[:, 1:])
        assert bool((part.labels[:, 0] == IGNORED).all())
    assert len(source.train) == 8


def test_a_text_that_is_all_held_out_is_refused():
    windows = Windows(torch.arange(4)[:, None], "short.txt")
    with pytest.raises(SourceError, match=r"'short\.txt' has 4 windows, and 4 are to be held out"):
        hold_out(windows, 4, 0)
    with pytest.raises(SourceError, match=r"every window of 'short\.txt' is also held out"):
        without(windows, [windows])


def test_two_sources_of_one_name_are_refused():
    windows = Windows(torch.arange(40)[:, None], "text")
    with pytest.raises(RecipeError, match="two are named 's'"):
        split_sources([entry(), entry()], [windows, windows], 0)


def test_a_source_is_read_as_its_entry_says(tmp_path):
    """Rows with a prompt and a response are exchanges; of anything else not even a part passes for them."""
    asked = [{"prompt": "the cat", "response": "sat on"}, {"prompt": "a dog", "response": "ran"}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({"body": "the cat sat"}) for _ in range(9)))
    tokenizer = tiny_tokenizer()
    made = entry(kind="instruct").model_copy(update={"path": "asked.jsonl"})
    text = open_text(made, tokenizer, window=24, base=tmp_path)
    assert len(text.windows) == len(text.documents) == 2
    assert text.windows.labels is not None
    made = entry(kind="text", field="body").model_copy(update={"path": "plain.jsonl"})
    text = open_text(made, tokenizer, window=8, base=tmp_path)
    assert text.windows.labels is None
    assert len(text.documents) == 9
    with pytest.raises(SourceError, match="no rows with a prompt and a response"):
        open_text(made.model_copy(update={"kind": "instruct"}), tokenizer, window=8, base=tmp_path)
