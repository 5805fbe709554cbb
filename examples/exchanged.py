"""Pairs of which some have another pair's captions, to try out what wrong captions cost and what finds them.

    export PYTHONPATH=. SOURCE=examples.exchanged:Exchanged:0.25/demo:train
    xclip-jax train --config demo:objective=clip --config.data.sources="('$SOURCE',)" --config.data.weights='()'
    xclip-jax check $SOURCE,text=name,aliases --samples 0 --by runs/demo-clip --suspects suspects.jsonl
    python -m examples.exchanged $SOURCE suspects.jsonl

The last command compares the file with the truth, and writes all exchanged captions into exchanged.jsonl, for
`data.drop`.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax.commands.check import SUSPECTS
from xclip_jax.core.errors import UserError, exit_with_message
from xclip_jax.core.outputs import check_file
from xclip_jax.core.storage import write_whole
from xclip_jax.data import sources
from xclip_jax.data.base import Record, Source, SourceKind, SourceOptions, WrappedSource

THRESHOLDS = (0.001, 0.0023, 0.005, 0.01, 0.02, 0.05)


class ExchangedSource(WrappedSource):
    """A source in which a random `share` of the records pass their captions on, each to the next of them."""

    def __init__(self, source: Source, share: float) -> None:
        super().__init__(source)
        n = len(source)
        self.exchanged = np.random.default_rng(0).permutation(n)[: round(share * n)]
        self._giver = dict(zip(self.exchanged.tolist(), np.roll(self.exchanged, 1).tolist(), strict=True))
        self._share = share

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        if index not in self._giver:
            return record
        giver = self.source[self._giver[index]]
        return record | {key: giver[key] for key in giver if key not in ("image", "id")}

    def fingerprint(self) -> dict[str, Any]:
        known = self.source.fingerprint()
        return known | {"hash": f"{known['hash']}, {self._share:g} exchanged"}


class Exchanged(SourceKind):
    """`examples.exchanged:Exchanged:SHARE/SOURCE`."""

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> ExchangedSource:
        share, _, spec = rest.partition("/")
        if not re.fullmatch(r"0?\.\d+", share):
            raise UserError(f"{rest!r} does not begin with a share; write SHARE/SOURCE, such as 0.25/demo:train.")
        return ExchangedSource(sources.open_pairs(spec, options), float(share))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="examples.exchanged:Exchanged:SHARE/SOURCE")
    parser.add_argument("suspects", help="file by xclip-jax check --suspects")
    parser.add_argument("--out", default="exchanged.jsonl", help="file for all exchanged captions")
    options = parser.parse_args(argv)
    out = check_file("--out", options.out, SUSPECTS)
    lines = [json.loads(line) for line in pathlib.Path(options.suspects).read_text().splitlines()]
    columns = tuple(lines[0]["source"].rpartition(":")[2].split(","))
    source: Any = sources.open_pairs(options.source, SourceOptions(text_columns=columns))
    if not hasattr(source, "exchanged"):
        raise UserError(f"{options.source!r} has nothing exchanged; write examples.exchanged:Exchanged:SHARE/SOURCE.")
    score = "probability" if "probability" in lines[0] else "cross_entropy"
    wrong = np.isin([line["index"] for line in lines], source.exchanged)
    values = np.array([line[score] for line in lines]) * (1 if score == "probability" else -1)
    order = np.argsort(values, kind="stable")  # least likely first
    found = np.cumsum(wrong[order])
    auc = found[~wrong[order]].sum() / wrong.sum() / (~wrong).sum()
    print(f"exchanged captions: {wrong.sum():,} of {len(lines):,}; found before the others with an AUC of {auc:.1%}")
    for threshold in THRESHOLDS if score == "probability" else ():
        below = values < threshold
        hits = (below & wrong).sum()
        print(
            f"probability below {threshold:g}: {below.sum():,} captions, {hits / max(below.sum(), 1):.1%} of them "
            f"exchanged; {hits / wrong.sum():.1%} of all exchanged"
        )
    chosen = [line for line, bad in zip(lines, wrong, strict=True) if bad]
    write_whole(out, "".join(f"{json.dumps(line)}\n" for line in chosen))


if __name__ == "__main__":
    with exit_with_message():
        main()
