"""Looks at pairs before a run does: what is there, what is wrong with it, how fast it is read.

    python -m xclip_jax.data.check '/data/cc12m/{00000..01242}.tar' --sheet pairs.png
    python -m xclip_jax.data.check folder:/data/pairs --samples 0

Tars are indexed whole; of the samples a random part is read, by default 2,000. Leaves with exit code 0 if training
would run, 1 if it would stop for too many bad samples, or for anything else.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from xclip_jax.data import loader, sources, tar_index, tokenizer, transforms
from xclip_jax.data.tar_source import TarSource
from xclip_jax.errors import BadSample, Parser, UserError, exit_with_message

_KINDS = ("tar", "csv", "parquet", "array_record", "folder", "tfds", "demo", "icons")
_TILE, _COLUMNS, _ROWS, _LINES = 200, 6, 4, 4
_EXAMPLES = 3
_KEYS = 20_000_000  # so many are compared at most; more would take gigabytes


@dataclasses.dataclass
class Sample:
    """What was seen of one sample; `reason` says why it is bad, or is ""."""

    index: int
    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    file_bytes: int = 0
    digest: bytes = b""
    caption: str = ""
    captions: int = 0


def look(source: sources.Source, index: int, size: int) -> Sample:
    """Reads one sample as training does."""
    try:
        record = source[index]
        image = record["image"]
        pixels = transforms.decode(image)
        # Whole, for its size: training decodes large JPEGs at a half or less and is a little faster.
        transforms.random_resized_crop(pixels, size, np.random.default_rng(index), resample="area")
    except BadSample as error:
        return Sample(index, error.reason, error.detail)
    data = image if isinstance(image, bytes) else image.tobytes()
    return Sample(
        index,
        size=pixels.shape[1::-1],
        file_bytes=len(data),
        digest=hashlib.blake2b(data, digest_size=16).digest(),
        caption=record["text"][0],
        captions=len(record["text"]),
    )


def read(source: sources.Source, indices: Sequence[int], threads: int, size: int) -> tuple[list[Sample], float]:
    """The samples, and seconds that it took."""
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda index: look(source, int(index), size), indices))
    return found, time.perf_counter() - began


def sheet(samples: Sequence[Sample], source: sources.Source, path: str) -> int:
    """Writes a PNG of random pairs. Returns how many."""
    chosen = [sample for sample in samples if not sample.reason][: _COLUMNS * _ROWS]
    line = 13
    height = _TILE + _LINES * line + 8
    page = Image.new("RGB", (_COLUMNS * _TILE, -(-len(chosen) // _COLUMNS) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, sample in enumerate(chosen):
        x, y = i % _COLUMNS * _TILE, i // _COLUMNS * height
        picture = transforms.resize_center_crop(transforms.decode(source[sample.index]["image"]), _TILE - 4)
        page.paste(Image.fromarray(picture), (x + 2, y + 2))
        lines = textwrap.wrap(sample.caption, 30)[:_LINES]
        for j, text in enumerate(lines):
            # The built-in font has Latin letters alone.
            pen.text((x + 4, y + _TILE + j * line), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
    page.save(path, format="PNG")
    return len(chosen)


def _spread(values: Sequence[float]) -> str:
    low, middle, high = np.percentile(values, (5, 50, 95)) if len(values) else (0, 0, 0)
    return f"{low:,.0f} / {middle:,.0f} / {high:,.0f}"


def _doubles(values: Sequence[Any]) -> int:
    return len(values) - len(set(values))


def _whole(source: TarSource) -> tuple[collections.Counter, list[str]]:
    """Faults of all rows of an index, and lines about keys."""
    faults: collections.Counter = collections.Counter()
    for rows in source.rows:
        kinds, counts = np.unique(rows["fault"], return_counts=True)
        for kind, count in zip(kinds, counts, strict=True):
            if kind != tar_index.OK:
                faults[tar_index.FAULTS[kind]] += int(count)
    if len(source) > _KEYS:
        return faults, []
    keys = collections.Counter(key for rows in source.rows for key in rows["key"].tolist())
    twice = [key.decode("utf-8", "replace") for key, count in keys.items() if count > 1 and key]
    shown = f", as {', '.join(repr(key[-40:]) for key in twice[:_EXAMPLES])}; all of them are used" if twice else ""
    return faults, [f"keys that come more than once: {len(twice):,}{shown}"]


def report(source: sources.Source, options: argparse.Namespace) -> Iterator[str]:
    """Lines about a source, the last of them the verdict; `options.passed` becomes it."""
    n = len(source)
    card = sources.card(source)
    tars = card.get("tars", [])
    where = f" in {len(tars):,} tars, {sum(tar['bytes'] for tar in tars) / 1e9:.2f} GB" if tars else ""
    yield f"samples: {n:,}{where}" + (f", index {card['hash']}" if card.get("hash") else "")
    count = min(options.samples or n, n)
    chosen = np.random.default_rng(options.seed).choice(n, count, replace=False)
    samples, seconds = read(source, chosen.tolist(), options.threads, options.size)
    good, bad = [s for s in samples if not s.reason], [s for s in samples if s.reason]
    yield f"read: {count:,} at random"
    if good:
        yield f"width, 5/50/95 %: {_spread([s.size[0] for s in good])}"
        yield f"height, 5/50/95 %: {_spread([s.size[1] for s in good])}"
        yield f"image files, 5/50/95 %: {_spread([s.file_bytes for s in good])} bytes"
        yield f"captions, 5/50/95 %: {_spread([len(s.caption) for s in good])} characters"
        tokens = [_tokens(options, s.caption) for s in good]
        full = np.mean(np.array(tokens) >= options.length)
        yield f"tokens, 5/50/95 %: {_spread(tokens)}, {full:.1%} of the captions fill all {options.length}"
        yield f"captions of one image: {np.mean([s.captions for s in good]):.2f}"
        yield f"same image among those read: {_doubles([s.digest for s in good]):,}"
        same = _doubles([s.caption for s in good])
        remedy = (
            "; as pairs of one batch they are wrong negatives, data.spread_duplicate_captions=True keeps them apart"
            if same
            else ""
        )
        yield f"same caption among those read: {same:,}{remedy}"
    rate = count / seconds
    yield (
        f"speed: {rate:,.0f} images/s to {options.size} px with {options.threads} threads on {os.cpu_count()} cores, "
        f"an epoch in {n / rate / 3600:,.1f} h"
    )
    faults, lines = _whole(source) if isinstance(source, TarSource) else (collections.Counter(), [])
    yield from lines
    yield from _about_bad(source, bad, faults, count)
    share = sum(faults.values()) / n + len(_unindexed(source, bad)) / count
    options.passed = bool(good) and share <= options.max_bad_fraction
    if options.sheet and good:
        yield f"{sheet(samples, source, options.sheet)} pairs in {options.sheet}"
    verdict = (
        "training would run" if options.passed else "training would stop; fix the data or raise data.max_bad_fraction"
    )
    yield f"bad: {share:.2%}, allowed {options.max_bad_fraction:.2%}: {verdict}"


def _tokens(options: argparse.Namespace, caption: str) -> int:
    tokens = tokenizer.load(options.tokenizer)
    return int((tokens([caption], options.length)[0] == tokens.eot_id).argmax()) + 1


def _unindexed(source: sources.Source, bad: Sequence[Sample]) -> list[Sample]:
    """Those that the index, which counts over all samples, knows nothing of."""
    return [s for s in bad if not (isinstance(source, TarSource) and source.fault(s.index))]


def _about_bad(source: sources.Source, bad: Sequence[Sample], faults: collections.Counter, count: int) -> Iterator[str]:
    for reason, found in sorted(faults.items()):
        yield f"bad, {reason}: {found:,} in the index of all"
    for reason, found in sorted(collections.Counter(s.reason for s in _unindexed(source, bad)).items()):
        yield f"bad, {reason}: {found:,} of {count:,} that were read"
    for reason in sorted({s.reason for s in bad}):
        for sample in [s for s in bad if s.reason == reason][:_EXAMPLES]:
            about = {"reason": reason, "detail": sample.detail}
            yield f"    {json.dumps(sources.where(source, sample.index) | about, ensure_ascii=False)}"


def _number(convert: Callable[[str], float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Type of an argument: a number from `low` to `high`."""

    def read_number(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            upper = "" if high == float("inf") else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {low:g}{upper}")
        return value

    return read_number


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m xclip_jax.data.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="as in data.sources; a pattern alone is of tars")
    parser.add_argument("--samples", type=_number(int, 0), default=2000, help="how many to read, 0 for all")
    parser.add_argument("--size", type=_number(int, 1), default=224, help="side of the crop, pixels")
    parser.add_argument("--length", type=_number(int, 2), default=77, help="tokens of a text")
    parser.add_argument("--tokenizer", default="clip")
    parser.add_argument("--threads", type=_number(int, 1), default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=_number(int, 0), default=0)
    parser.add_argument(
        "--max_bad_fraction",
        type=_number(float, 0, 1),
        default=loader.DataConfig.max_bad_fraction,
        help="data.max_bad_fraction of the run",
    )
    parser.add_argument("--sheet", default="", help="PNG file of random pairs to write; its folder is made")
    parser.add_argument("--image_key", default="image")
    parser.add_argument("--text_keys", default="text", help="with commas between them")
    parser.add_argument("--tags_key", default="")
    parser.add_argument("--data_dir", default="")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The command; see the module's docstring. Returns the exit code."""
    options = _options(arguments)
    spec = options.source if options.source.partition(":")[0] in _KINDS else f"tar:{options.source}"
    with exit_with_message():
        if options.sheet:
            if os.path.isdir(options.sheet):
                raise UserError(f"--sheet {options.sheet!r} is a folder; name a PNG file in it.")
            pathlib.Path(options.sheet).parent.mkdir(parents=True, exist_ok=True)
        tokenizer.load(options.tokenizer)
        source = sources.open_source(
            spec,
            data_dir=options.data_dir,
            image_key=options.image_key,
            text_keys=tuple(options.text_keys.split(",")),
            tags_key=options.tags_key,
        )
        for line in report(source, options):
            print(line.encode("utf-8", "replace").decode(), flush=True)  # names of files need not be UTF-8
    return 0 if options.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
