"""A conversation with an exported model, on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from graphprune.errors import SourceError
from graphprune.export.generation import Choose, Generator
from graphprune.export.runtime import OnnxDecoder, Provider
from graphprune.pipeline.exported import Exported

EXIT = "/exit"


class Chat:
    """Answers turn by turn; a model whose tokenizer has no chat template completes each text by itself.

    Where question and answer would not fit into the model's context, the oldest turns are forgotten.

    Args:
        generator: The model.
        tokenizer: A transformers tokenizer of its, of the fast kind.
        max_new_tokens: Tokens of an answer at most.

    Raises:
        SourceError: If the tokenizer cannot decode token by token.
    """

    def __init__(self, generator: Generator, tokenizer: Any, max_new_tokens: int) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict[str, str]] = []
        if not getattr(tokenizer, "is_fast", False):
            raise SourceError("the tokenizer has no tokenizer.json", "save it as a fast tokenizer")

    @property
    def has_template(self) -> bool:
        """Whether the model takes turns, and does not merely complete texts."""
        return bool(self._tokenizer.chat_template)

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to a turn, or the completion of a text, in pieces as they come."""
        if not self.has_template:
            yield from self._write(self._tokenizer(text)["input_ids"])
            return
        self._messages.append({"role": "user", "content": text})
        prompt_ids = self._prompt_ids()
        while len(self._messages) > 1 and not self._generator.fits(len(prompt_ids) + self._max_new_tokens):
            del self._messages[:2]
            prompt_ids = self._prompt_ids()
        pieces = []
        for piece in self._write(prompt_ids):
            pieces.append(piece)
            yield piece
        self._messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt_ids(self) -> list[int]:
        prompt = self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, tokenize=False
        )
        found: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return found

    def _write(self, prompt_ids: list[int]) -> Iterator[str]:
        stream = DecodeStream(ids=prompt_ids, skip_special_tokens=True)
        for token in self._generator.generate(prompt_ids, self._max_new_tokens):
            piece = stream.step(self._tokenizer.backend_tokenizer, token)
            if piece is not None:
                yield piece


def open_chat(
    exported: Exported,
    *,
    choose: Choose,
    max_new_tokens: int,
    provider: Provider = "cpu",
    threads: int | None = None,
) -> Chat:
    """Open an exported model to talk with.

    Args:
        exported: The model.
        choose: How the next token is chosen.
        max_new_tokens: Tokens of an answer at most.
        provider: What computes.
        threads: Threads of one operator; None leaves it to ONNX Runtime.

    Raises:
        SourceError: If the model or its tokenizer cannot be opened.
    """
    generator = Generator(
        OnnxDecoder(exported.file, provider=provider, threads=threads),
        end_tokens=exported.end_tokens,
        context_length=exported.context_length,
        choose=choose,
    )
    return Chat(generator, exported.tokenizer, max_new_tokens)


def converse(chat: Chat, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answer line after line, until there are no more or one is ``/exit``; empty lines are no turns.

    Args:
        chat: Who answers.
        lines: The turns.
        write: Takes each piece of an answer as it comes, and a line's end after the last.
    """
    for line in lines:
        text = line.strip()
        if text == EXIT:
            return
        if text:
            for piece in chat.reply(text):
                write(piece)
            write("\n")
