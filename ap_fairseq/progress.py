"""Live progress of other processes, by the logs that they write: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

FIRST_LINE_SECONDS, LONGEST_PAUSE_SECONDS = 15, 120

# What names a line of fairseq's progress; a translation may hold any text.
_TRAINING, _BATCHES = "train_inner", "fairseq.logging.progress_bar"
# In fairseq's log formats json ("num_updates": "50") and simple (num_updates=50).
_UPDATES = re.compile(r'(?<![a-z_])num_updates"?[=:] ?"?(\d+)')
_LOSS = re.compile(r'(?<![a-z_])loss"?[=:] ?"?([\d.]+)')
# Recording and translation, in the format simple: batches done / all.
_COUNT = re.compile(r"\s(\d+) / (\d+)\b")
# What programs other than fairseq's print.
_OWN = re.compile(r"progress: (\d+) / (\d+) (\w+)(?:, (.*))?")


class State(NamedTuple):
    """How far a stage is; ``total`` is 0 where the end is not known."""

    done: int
    total: int
    unit: str
    note: str = ""


def read_state(line: str, max_update: int = 0) -> State | None:
    """Return the progress that a line of a log reports, if it reports any.

    Read are fairseq's lines of training, recording and translation, and ``progress: DONE / ALL UNIT[, NOTE]``.

    Args:
        max_update: the updates of the whole training.
    """
    if _TRAINING in line and (updates := _UPDATES.search(line)):
        loss = _LOSS.search(line)
        return State(int(updates[1]), max_update, "updates", f"loss {loss[1]}" if loss else "")
    if _BATCHES in line and (count := _COUNT.search(line)):
        return State(int(count[1]), int(count[2]), "batches")
    if own := _OWN.match(line):
        return State(int(own[1]), int(own[2]), own[3], own[4] or "")
    return None


def last_value(flag: str, words: Sequence[str]) -> str | None:
    """Return the value that argparse would take for a flag: the last one."""
    values = [after for word, after in zip(words, words[1:], strict=False) if word == flag]
    values += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return values[-1] if values else None


def _sum(states: Sequence[State]) -> State:
    """Return the progress of several processes at one task."""
    return states[0]._replace(done=sum(state.done for state in states), total=sum(state.total for state in states))


class Progress:
    """Shows the progress of a running stage; use it as a context and call :meth:`update` now and then.

    Args:
        words: the stage's command line, whose ``--max-update`` is the end of a training.
        logs: one for each process of the stage; their progress is added up.
        slot: the line of the terminal, from 0, when several stages run at the same time.
    """

    def __init__(self, name: str, words: Sequence[str], logs: Sequence[Path], slot: int = 0, stream=None):
        self.name, self.slot = name, slot
        self.stream = sys.stderr if stream is None else stream
        self.max_update = int(last_value("--max-update", words) or 0)
        self.logs = [open(log, "rb") if log.exists() else open(log, "w+b") for log in logs]
        self.states: dict[int, State] = {}  # the last of each log
        self.state: State | None = None
        self.started = time.monotonic()
        self.first: tuple[float, int] | None = None  # (when, done) of the first report, from which speed is measured
        self.pause = FIRST_LINE_SECONDS
        self.next_line = self.started + self.pause
        self.bar = self._bar() if self.stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        for log in self.logs:
            log.close()
        if self.bar is not None:
            self.bar.close()

    def _bar(self, state: State | None = None) -> tqdm:
        form = {} if state else {"bar_format": "{desc}: {elapsed}"}
        return tqdm(
            desc=self.name,
            total=(state.total or None) if state else None,
            initial=state.done if state else 0,
            unit=f" {state.unit}" if state else "",
            file=self.stream,
            position=self.slot,
            leave=False,
            dynamic_ncols=True,
            **form,
        )

    def update(self) -> None:
        """Read what the logs have gained and show it."""
        now = time.monotonic()
        for number, log in enumerate(self.logs):
            while line := log.readline():
                if not line.endswith(b"\n"):  # being written
                    log.seek(-len(line), 1)
                    break
                state = read_state(line.decode("utf-8", "replace").rstrip("\n"), self.max_update)
                if state is not None:
                    self.states[number] = state
                    self._report(now, _sum(list(self.states.values())))
        if self.bar is not None:
            if self.state:
                self.bar.n = self.state.done
                self.bar.set_postfix_str(self.state.note, refresh=False)
            self.bar.refresh()
        elif now >= self.next_line:
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
            self.next_line = now + self.pause
            print(self.line(now), file=self.stream, flush=True)

    def _report(self, now: float, state: State) -> None:
        if self.state is None or self.state[1:3] != state[1:3]:  # it begins, or goes on to another task
            self.first = now, state.done
            if self.bar is not None:
                self.bar.close()
                self.bar = self._bar(state)
        self.state = state

    def line(self, now: float) -> str:
        """Return the progress as a line of a log."""
        parts = [f"{now - self.started:.0f} s so far"]
        if self.state:
            of_all = f" of {self.state.total:,}" if self.state.total else ""
            parts = [f"{self.state.done:,}{of_all} {self.state.unit}"]
            parts += [self.state.note] if self.state.note else []
            when, done = self.first or (now, self.state.done)
            if self.state.total and self.state.done > done:
                left = (self.state.total - self.state.done) * (now - when) / (self.state.done - done)
                parts.append(f"{left:.0f} s left")
        return f"{self.name}: {', '.join(parts)}"
