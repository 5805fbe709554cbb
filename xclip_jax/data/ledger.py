"""The log of bad samples: each is recorded with its reason, and too many stop the run."""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from xclip_jax.core.errors import UserError
from xclip_jax.core.json_lines import JsonLines
from xclip_jax.core.run_folder import RunReader

# The share of bad samples is computed over at least this many samples, so that the first batch cannot stop a run.
_MIN_SAMPLES = 1000
# It is also computed over the last window, of at least this many samples: after weeks of good data a failure would
# hardly change the run's share.
_WINDOW = 100_000
_MOST_LISTED = 100_000  # lines of bad_samples.jsonl
_MIN_GATHERED = 1024  # bytes

Entry = dict[str, Any]


class TooManyBadSamples(UserError):
    """More samples are bad than `data.max_bad_fraction` allows; raised at the same step by all processes of a run."""


def _gather(content: Any) -> list[Any]:
    """Return the JSON content of every process; all processes must call this at the same step."""
    if jax.process_count() == 1:
        return [content]
    data = np.frombuffer(json.dumps(content).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    # Rounded up, since each length is compiled.
    length = max(_MIN_GATHERED, 1 << (int(sizes.max()) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(data, (0, length - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _distinct(gathered: Sequence[tuple[int, int, list[Entry]]]) -> list[tuple[int, list[Entry]]]:
    """Return (tokens, bad samples) of each part of the batch from (part, tokens, bad samples) of each process."""
    records: dict[int, tuple[int, list[Entry]]] = {}
    for part, tokens, bad in gathered:
        first, others = records.setdefault(part, (tokens, bad))
        if first != tokens or [entry["index"] for entry in others] != [entry["index"] for entry in bad]:
            raise UserError("processes that load the same rows of the batch read different samples; check their files.")
    return list(records.values())


class BadSampleLog:
    """Counts a run's samples, and writes each bad one once to bad_samples.jsonl, the first `_MOST_LISTED` of them.

    A line is {"position": in the run's order, "reason", "detail", "source": its number, "index"} and the source's
    description of the sample, such as "tar" and "key".

    Attributes:
      counters: {"samples": delivered, "tokens": in their texts, "bad": {reason: replaced samples}} of all processes at
        the last `sync`; checkpoints store them.
      file: bad_samples.jsonl.
    """

    def __init__(
        self, folder: epath.Path, *, max_bad_fraction: float, start: int = 0, counters: Mapping[str, Any] | None = None
    ) -> None:
        """Open the ledger of the run in `folder`, which has read `start` samples and had these counters then.

        Lines for later samples are removed. A larger share of bad samples than `max_bad_fraction` fails a `check`.
        """
        self.path = RunReader(folder).bad_samples_file
        self.max_bad_fraction = max_bad_fraction
        self.counters: dict[str, Any] = {"samples": 0, "tokens": 0, "bad": {}} | dict(counters or {})
        self._pending: collections.deque[tuple[int, int, list[Entry]]] = collections.deque()
        self._part = jax.process_index()
        self.file = JsonLines(
            self.path,
            lambda entry: entry["position"] < start and all(isinstance(entry[key], int) for key in ("source", "index")),
            writes=jax.process_index() == 0,
        )
        self._known = {(entry["source"], entry["index"]) for entry in self.file.kept}
        del self.file.kept
        self._window = (self.counters["samples"], self.bad)  # counters at its beginning
        self._last_window = (0, 0)  # bad samples and all samples of the last whole window

    def add(self, end: int, tokens: int, bad: Sequence[Entry], part: int | None = None) -> None:
        """Record the number of tokens and the replaced samples of this process's rows of a batch.

        `end` is the number of the run's samples up to the end of the global batch. Processes that load the same `part`
        of it, see `mesh.batch_part`, count once; by default each process has another one.
        """
        self._part = self._part if part is None else part
        self._pending.append((end, tokens, list(bad)))

    def sync(self, samples: int) -> None:
        """Count and write the records of the run's first `samples`; all processes call this at the same steps.

        `UserError` if processes that load the same rows read different samples.
        """
        tokens = 0
        bad = []
        while self._pending and self._pending[0][0] <= samples:
            _, batch_tokens, batch_bad = self._pending.popleft()
            tokens += batch_tokens
            bad += batch_bad
        records = _distinct(_gather([self._part, tokens, bad]))
        entries = sorted((entry for _, each in records for entry in each), key=lambda entry: entry["position"])
        counts = collections.Counter(self.counters["bad"])
        counts.update(entry["reason"] for entry in entries)
        tokens = self.counters["tokens"] + sum(tokens for tokens, _ in records)
        self.counters = self.counters | {"samples": samples, "tokens": tokens, "bad": dict(sorted(counts.items()))}
        new: list[Entry] = []
        for entry in entries:
            sample = (entry["source"], entry["index"])
            if sample not in self._known and len(self._known) < _MOST_LISTED:
                self._known.add(sample)
                new.append(entry)
        self.file.append(*new)
        first, bad_before = self._window
        if samples - first >= _WINDOW:
            self._last_window = (self.bad - bad_before, samples - first + self.bad - bad_before)
            self._window = (samples, self.bad)

    @property
    def bad(self) -> int:
        """Number of replaced samples."""
        return sum(self.counters["bad"].values())

    @property
    def share(self) -> float:
        """Share of bad samples among all samples."""
        return self.bad / max(self.counters["samples"] + self.bad, 1)

    def check(self) -> None:
        """Raise `TooManyBadSamples` if over `max_bad_fraction` of all samples, or of the last window, are bad."""
        for bad, read in ((self.bad, self.counters["samples"] + self.bad), self._last_window):
            if bad > self.max_bad_fraction * max(read, _MIN_SAMPLES):
                counts = sorted(self.counters["bad"].items(), key=lambda item: -item[1])
                reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts)
                needed = math.ceil(100 * bad / max(read, _MIN_SAMPLES)) / 100
                raise TooManyBadSamples(
                    f"{bad:,} of the last {read:,} samples are bad, more than data.max_bad_fraction="
                    f"{self.max_bad_fraction:g} allows (in all {reasons}); see {self.path}. Repair the data, and start "
                    f"a new run, or resume with data.max_bad_fraction={needed:g}."
                )
