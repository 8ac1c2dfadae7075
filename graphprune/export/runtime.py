"""Running an exported decoder with nothing but onnxruntime and numpy."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnxruntime

from graphprune.errors import RecipeError, SourceError

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Past = list[npt.NDArray[Any]]
Provider = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder:
    """A session over `model.onnx`.

    Args:
        model: The file, or the bytes of its graph; then `folder` says where its data lies. Or a session that is open.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        folder: Where the external data of a graph given as bytes lies.
        provider: What computes: ``cpu`` or ``cuda``.
        settings: Further entries of the session's configuration.
        fixed: Further inputs that are the same at every step, such as what an encoder has made of its own.

    Raises:
        RecipeError: If `provider` is no name of one.
        SourceError: If it cannot be used here, or the file does not open, or is not a decoder.
    """

    def __init__(
        self,
        model: Path | bytes | onnxruntime.InferenceSession,
        *,
        threads: int | None = None,
        folder: Path | None = None,
        provider: Provider = "cpu",
        settings: Mapping[str, str] | None = None,
        fixed: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.name = str(model if isinstance(model, Path) else folder)
        self._session = (
            model
            if isinstance(model, onnxruntime.InferenceSession)
            else open_session(model, threads=threads, folder=folder, provider=provider, settings=settings)
        )
        self._fixed = dict(fixed or {})
        inputs = {value.name: value for value in self._session.get_inputs() if value.name not in self._fixed}
        self._past = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        self._token_inputs = {"input_ids", "attention_mask", "position_ids"} & inputs.keys()
        self._outputs = [
            "logits",
            *(value.name.replace("past_key_values", "present", 1) for value in self._past),
        ]
        self._check(inputs)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of earlier tokens are an input."""
        return bool(self._past)

    def empty_past(self, batch: int, room: int = 0) -> Past:
        """Return a cache of no tokens: key, value, key, value, ..., each (batch, heads, room, head size)."""
        return [np.zeros((batch, v.shape[1], room, v.shape[3]), _CACHE_TYPES[v.type]) for v in self._past]

    def step(
        self, input_ids: Integers, attention_mask: Integers | None = None, past: Past | None = None
    ) -> tuple[Array, Past]:
        """Run the model on new tokens.

        Args:
            input_ids: int64 (batch, sequence), shorter rows padded on the left.
            attention_mask: int64 (batch, past + sequence), 0 for padding; None if there is none.
            past: The cache of the tokens before; None if there are none.

        Returns:
            The logits (batch, sequence, vocabulary) and the new cache.

        Raises:
            SourceError: If ONNX Runtime refuses to compute it.
        """
        batch, sequence = input_ids.shape
        past = self.empty_past(batch) if past is None else past
        if attention_mask is None:
            length = past[0].shape[2] if past else 0
            attention_mask = np.ones((batch, length + sequence), dtype=np.int64)
        feeds = self._feeds(input_ids, attention_mask)
        feeds |= {value.name: array for value, array in zip(self._past, past, strict=True)}
        with clear_errors(self.name):
            logits, *present = self._session.run(self._outputs, feeds)
        return np.asarray(logits, dtype=np.float32), present

    def shared_past(self, batch: int, length: int) -> list[onnxruntime.OrtValue]:
        """Return buffers for `step_in_place`, each (batch, heads, length, head size)."""
        return [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.empty_past(batch, length)]

    def step_in_place(
        self, input_ids: Integers, attention_mask: Integers, past: Sequence[onnxruntime.OrtValue]
    ) -> Array:
        """Run a model with a shared cache on new tokens, and write their keys and values into its buffers.

        Args:
            input_ids: int64 (batch, sequence).
            attention_mask: int64 (batch, tokens before + sequence), 0 for padding.
            past: From `shared_past`, of no fewer tokens than the mask has.

        Returns:
            The logits (batch, sequence, vocabulary).

        Raises:
            SourceError: If ONNX Runtime refuses to compute it.
        """
        binding = self._session.io_binding()
        for name, array in self._feeds(input_ids, attention_mask).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits, *presents = self._outputs
        binding.bind_output(logits)
        for value, present, buffer in zip(self._past, presents, past, strict=True):
            binding.bind_ortvalue_input(value.name, buffer)
            binding.bind_ortvalue_output(present, buffer)
        with clear_errors(self.name):
            self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[0].numpy(), dtype=np.float32)

    def logits(
        self, input_ids: Integers, attention_mask: Integers | None = None, past: Past | None = None
    ) -> Array:
        """Return the logits of `step` alone, float32 (batch, sequence, vocabulary)."""
        return self.step(input_ids, attention_mask, past)[0]

    def greedy(
        self, input_ids: Sequence[int], max_new_tokens: int, eos_token_ids: Collection[int] = ()
    ) -> list[int]:
        """Return the most likely continuation token by token, up to and with the first end token."""
        tokens: list[int] = []
        ids, past = np.array([input_ids], dtype=np.int64), None
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_token_ids):
            logits, past = self.step(ids, past=past)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([tokens[-1:]], dtype=np.int64)
        return tokens

    def decode_speed(self, prompt_ids: Sequence[int], tokens: int, *, warm_up: int = 3) -> float:
        """Return tokens a second at batch 1: one over the median wall time of a decoding step.

        Args:
            prompt_ids: Tokens of the prompt, which is not timed.
            tokens: Steps that are timed.
            warm_up: Steps before them.
        """
        logits, past = self.step(np.array([prompt_ids], dtype=np.int64))
        seconds = []
        for _ in range(warm_up + tokens):
            ids = logits[:, -1:].argmax(axis=-1).astype(np.int64)
            start = time.perf_counter()
            logits, past = self.step(ids, past=past)
            seconds.append(time.perf_counter() - start)
        return 1.0 / float(np.median(seconds[warm_up:]))

    def _feeds(self, input_ids: Integers, attention_mask: Integers) -> dict[str, npt.NDArray[Any]]:
        """Return everything that a step reads but for its cache."""
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -input_ids.shape[1] :]
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        return self._fixed | {name: tokens[name] for name in self._token_inputs}

    def _check(self, inputs: dict[str, Any]) -> None:
        unknown = inputs.keys() - self._token_inputs - {value.name for value in self._past}
        outputs = {value.name for value in self._session.get_outputs()}
        if "input_ids" not in inputs or unknown or not outputs.issuperset(self._outputs):
            raise SourceError(
                f"{self.name} is not a decoder: it reads {', '.join(inputs)} and gives {', '.join(outputs)}",
                "give a causal language model with input_ids, logits and past_key_values.N.key, present.N.key, …",
            )
        for value in self._past:
            if value.type not in _CACHE_TYPES or not all(
                isinstance(value.shape[axis], int) for axis in (1, 3)
            ):
                raise SourceError(
                    f"{self.name}: the cache {value.name} is {value.type} {value.shape}",
                    "export it with fixed heads and head sizes, in float32 or float16",
                )


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    folder: Path | None = None,
    provider: Provider = "cpu",
    settings: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a file, or the bytes of its graph, as `OnnxDecoder` does; any model will do.

    Raises:
        RecipeError: If `provider` is no name of one.
        SourceError: If it cannot be used here, or the file does not open.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder.resolve()))
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    with clear_errors(str(folder if isinstance(model, bytes) else model)):
        session = onnxruntime.InferenceSession(source, options, providers=_providers(provider))
    if _PROVIDERS[provider] not in session.get_providers():
        raise _no_provider(provider, "it could not be started on this machine")
    return session


def _providers(provider: Provider) -> list[str]:
    if provider not in get_args(Provider):
        raise RecipeError.unknown("provider", provider, get_args(Provider))
    if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise _no_provider(provider, "the installed package was built without it")
    return list(dict.fromkeys([_PROVIDERS[provider], _PROVIDERS["cpu"]]))


def _no_provider(provider: Provider, reason: str) -> SourceError:
    return SourceError(
        f"onnxruntime has no provider '{provider}' here: {reason}",
        "install onnxruntime-gpu with the CUDA and cuDNN that it names, or choose the provider cpu",
    )


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors, which have no common base, into one of ours."""
    try:
        yield
    except Exception as err:
        if not type(err).__module__.startswith("onnxruntime"):
            raise
        reason = str(err).strip().split("\n")[0]
        raise SourceError(f"{name} does not run: {reason}", "check it with graphprune verify") from err
