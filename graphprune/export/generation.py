"""Token by token: how the next one is chosen, and a cache that outlives a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from graphprune.errors import RecipeError, SourceError
from graphprune.export.runtime import Array, OnnxDecoder, Past

Choose = Callable[[Array], int]
"""From the logits of one position (vocabulary) to a token."""


def most_likely(logits: Array) -> int:
    """Return the token with the greatest logit."""
    return int(logits.argmax())


def sampled(temperature: float, top_p: float, seed: int) -> Choose:
    """Return how to draw tokens at random; with temperature 0, the most likely one.

    Args:
        temperature: What logits are divided by.
        top_p: Only the likeliest tokens that together have this probability can be drawn (nucleus sampling,
            arXiv 1904.09751).
        seed: Of the generator: the same seed, logits and settings draw the same tokens.

    Raises:
        RecipeError: If a setting is out of its range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise RecipeError(
            f"temperature {temperature} with top_p {top_p}",
            "temperature is 0 or more, top_p above 0 and up to 1",
        )
    if temperature == 0 and top_p < 1:
        raise RecipeError(
            f"with temperature 0 nothing is drawn that top_p {top_p} could bound",
            "raise temperature, or leave top_p at 1",
        )
    if temperature == 0:
        return most_likely
    generator = np.random.default_rng(seed)

    def choose(logits: Array) -> int:
        probabilities = nucleus(logits, temperature, top_p)
        return int(generator.choice(len(probabilities), p=probabilities))

    return choose


def nucleus(logits: Array, temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    """Return the probabilities (vocabulary) that `sampled` draws by."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = probabilities[order].cumsum() - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


class Generator:
    """Continues prompts. What a prompt begins with that the cache already holds is not computed again.

    Args:
        decoder: The model.
        end_tokens: Tokens that end a text.
        context_length: Most tokens of prompt and continuation together; None if nobody knows.
        choose: How the next token is chosen.

    Raises:
        SourceError: If the model has no cache.
    """

    def __init__(
        self,
        decoder: OnnxDecoder,
        *,
        end_tokens: Collection[int] = (),
        context_length: int | None = None,
        choose: Choose = most_likely,
    ) -> None:
        if not decoder.has_cache:
            raise SourceError(f"{decoder.name} has no key-value cache", "export the model with its cache")
        self._decoder = decoder
        self._end_tokens = frozenset(end_tokens)
        self._context_length = context_length
        self._choose = choose
        self._tokens: list[int] = []
        self._past: Past | None = None

    def fits(self, tokens: int) -> bool:
        """Return whether the context, as far as known, holds so many tokens."""
        return self._context_length is None or tokens <= self._context_length

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the continuation of a prompt token by token, up to and with the first end token.

        Args:
            prompt_ids: All tokens so far, one or more.
            max_new_tokens: Tokens at most; the context's end comes before.

        Raises:
            SourceError: If the prompt leaves no room in the context.
        """
        room = max_new_tokens
        if self._context_length is not None:
            room = min(room, self._context_length - len(prompt_ids))
            if room < 1:
                raise SourceError(
                    f"{len(prompt_ids)} tokens leave no room in a context of {self._context_length}",
                    "begin anew",
                )
        new = self._unseen(prompt_ids)
        for _ in range(room):
            logits, self._past = self._decoder.step(np.array([new], dtype=np.int64), past=self._past)
            self._tokens += new
            new = [self._choose(logits[0, -1])]
            yield new[0]
            if new[0] in self._end_tokens:
                return

    def _unseen(self, prompt_ids: Sequence[int]) -> list[int]:
        """Cut the cache back to what it shares with a prompt; return the rest of that, one token or more."""
        pairs = zip(self._tokens, prompt_ids[:-1], strict=False)
        common = next((i for i, (held, asked) in enumerate(pairs) if held != asked), None)
        if common is None:
            common = min(len(self._tokens), len(prompt_ids) - 1)
        if common < len(self._tokens):
            self._past = None if self._past is None else [part[:, :, :common] for part in self._past]
            self._tokens = self._tokens[:common]
        return list(prompt_ids[common:])
