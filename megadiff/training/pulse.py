"""A rank's pulse: what it is doing, in a small file, and a watch over it that ends a rank that stands still."""

from __future__ import annotations

import faulthandler
import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megadiff.config.run_folder import Heartbeat, Phase, StageFolder
from megadiff.config.schema import Safeguards
from megadiff.distributed import recorder
from megadiff.files import write_text

WRITE_EVERY_S = 1.0

log = logging.getLogger(__name__)


class Pulse:
    """Beats at every change of step or phase, which costs an assignment; a thread does the rest.

    When no beat comes for `stalled_after_s`, the stacks of all threads and the last collective go to the rank's log, once.
    After `ended_after_s` the stacks go there again and the process ends with exit code 1. faulthandler's own timer does that: a
    thread of ours would stand still as well where a call keeps Python's lock.
    """

    def __init__(self, paths: StageFolder, rank: int, rule: Safeguards) -> None:
        """Raises OSError if the rank's log or the file cannot be made."""
        self._file, self._rule = paths.heartbeat(rank), rule
        self._collectives = Path(f"{paths.collectives}{rank}")
        recorder.prepare(paths.collectives)
        for path in (self._file, paths.log(rank)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = paths.log(rank).open("a", encoding="utf-8")
        self._last = (0, Phase.START, time.time(), time.monotonic())
        self._recorded: object = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """The optimizer step in work, or the last one."""
        return self._last[0]

    def beat(self, step: int, phase: Phase) -> None:
        self._last = (step, phase, time.time(), time.monotonic())

    def write_collectives(self) -> None:
        """Keep the record of this rank's collectives, and say in its log where the last one stands; once per beat."""
        beat = self._last
        if self._recorded is beat:  # of a collective that has failed since, the record would say that it has ended
            return
        self._recorded = beat
        with suppress(OSError):
            if told := recorder.write(self._collectives):
                log.error("%s; %s has those before it", told, self._collectives)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _watch(self) -> None:
        told, dumped = None, False
        closed = False
        while not closed:
            closed = self._closed.wait(WRITE_EVERY_S if told else 0)  # the last beat is written too
            last = self._last
            step, phase, at, beaten = last
            quiet = time.monotonic() - beaten
            if last is not told:
                told, dumped = last, False
                faulthandler.dump_traceback_later(max(self._rule.ended_after_s - quiet, 1e-3), exit=True, file=self._stacks)
                with suppress(OSError):  # a full disk stops no training
                    write_text(self._file, json.dumps(asdict(Heartbeat(step, phase, at))) + "\n")
            elif quiet > self._rule.stalled_after_s and not dumped:
                dumped = True
                log.error("step %d, %s: nothing has moved for %.0f s; the stacks of all threads:", step, phase.value, quiet)
                faulthandler.dump_traceback(self._stacks)
                self.write_collectives()
