"""Time and memory of a stage."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

_INTERVAL = 0.05


class Stopwatch:
    """Wall time and the largest resident memory of this process while a block runs.

    Attributes:
        seconds: Wall time of the block.
        peak_bytes: Largest resident set seen, sampled twenty times a second.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            if self._stop.wait(_INTERVAL):
                return
