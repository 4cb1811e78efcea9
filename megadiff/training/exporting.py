"""What takes a stage's records to where people look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Full, Queue

from PIL import Image

from megadiff.config.run_folder import Incident

MOST_WAITING = 1000
"""Records that wait for a slow exporter; later ones are left out."""
RETRY_S = 300.0
"""Until an exporter that could not be opened is tried again."""
CLOSE_S = 30.0
"""How long the end of a stage waits for an exporter."""


class Exporter:
    """Takes records, on rank 0. A subclass defines what it has a use for."""

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Finite numbers by their tags (`tags.py`)."""

    def picture(self, tag: str, picture: Image.Image, step: int) -> None: ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""

    def incident(self, incident: Incident) -> None: ...

    def close(self) -> None: ...


class Background(Exporter):
    """An exporter in a thread of its own: training neither waits for it nor stops where it fails, whatever it raises."""

    def __init__(self, name: str, opens: Callable[[Callable[[str], None]], Exporter]) -> None:
        """Args: opens: makes the exporter, which may tell the given function of failures in threads of its own."""
        self.name, self._opens = name, opens
        self._exporter: Exporter | None = None
        self._opens_at = 0.0
        self._records: Queue[Callable[[Exporter], None] | None] = Queue(MOST_WAITING)
        self._failure: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name=f"exporter {name}", daemon=True)
        self._thread.start()

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self._put(lambda exporter: exporter.scalars(numbers, step))

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        self._put(lambda exporter: exporter.picture(tag, picture, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self._put(lambda exporter: exporter.text(tag, text, step))

    def incident(self, incident: Incident) -> None:
        self._put(lambda exporter: exporter.incident(incident))

    def close(self) -> None:
        """Send what waits, for `CLOSE_S` at most."""
        end = time.monotonic() + CLOSE_S
        with suppress(Full):  # an exporter that is behind is told of the end when there is room
            self._records.put(None, timeout=CLOSE_S)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"what it had not sent {CLOSE_S:g} s after the end is left out")

    def failure(self) -> str | None:
        """What failed, once: the first failure stands for all of this start."""
        if self._failure is None or self._told:
            return None
        self._told = True
        return self._failure

    def _put(self, send: Callable[[Exporter], None]) -> None:
        try:
            self._records.put_nowait(send)
        except Full:
            self._fail(f"it is {MOST_WAITING} records behind; others are left out")

    def _run(self) -> None:
        for send in iter(self._records.get, None):
            try:
                if self._exporter is None and time.monotonic() >= self._opens_at:
                    self._opens_at = time.monotonic() + RETRY_S
                    self._exporter = self._opens(self._fail)
                if self._exporter is not None:
                    send(self._exporter)
            except Exception as error:  # a library's own, of any kind
                self._fail(f"{type(error).__name__}: {error}")
        try:
            if self._exporter is not None:
                self._exporter.close()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self._failure = self._failure or f"{self.name}: {why}"
