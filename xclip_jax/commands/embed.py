"""Embed many images and texts into one file: xclip-jax embed.

    xclip-jax embed --checkpoint RUN --images '/data/photos/**/*.jpg' --out photos.parquet
    xclip-jax embed --checkpoint RUN --images '/data/cc12m/{00000..01242}.tar' --out cc12m.parquet
    xclip-jax embed --checkpoint RUN --images 'parquet:/data/shop/test?image=photo&text=title' --out shop.parquet
    xclip-jax embed --checkpoint RUN --texts captions.txt --out captions.parquet
    xclip-jax embed --checkpoint RUN --images '/data/cc12m/*.tar' --out cc12m.parquet --share 3/16
    xclip-jax embed --checkpoint RUN --images folder:/my/pairs --captions --out targets.parquet

Rows are images and texts: "kind" (image or text), "id" (path, TAR#KEY, TABLE#ROW or FILE#LINE), "text" (the text, or
an image's first caption: from its tar, from a .txt file of the same name, or from the table's column ?text=) and
"embedding", float32, of unit length.
Metadata "xclip_jax" is JSON: checkpoint, preprocessing, commit, versions. `xclip_jax.data.embeddings.read` reads it.

Unusable images are left out. With --texts, row i is line i, so unusable lines, such as empty ones, get an embedding of
zeros. Both are counted, and listed in OUT.bad.jsonl.

The work is done in parts, stored in OUT.parts until all are complete: after an interruption, the same command resumes
without repeating a part. It stops with an error if the weights, the text file, or names or sizes of images changed.
It also stops if more than ten items and over 5 % of a part cannot be read, such as addresses that a server refuses;
--max_unreadable=0.3 leaves out up to 30 %. A missing file in a table is unusable, unless its folder is missing.
It does not notice images with new content but the same size, nor any change of image files in a bucket or named by a
table.

With --share I/N, OUT is a folder with one file per share; the N commands may run at once, on different machines.
pyarrow and pandas read it as one table, and `xclip_jax.data.embeddings.read` refuses a folder that lacks a share.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from xclip_jax import model as inference
from xclip_jax.commands.inputs import IMAGES, Captions, Images, Inputs, Lines, open_images
from xclip_jax.core import environment, storage
from xclip_jax.core.console import format_duration, log0
from xclip_jax.core.errors import (
    BadSample,
    Parser,
    UserError,
    check_choice,
    check_fraction,
    exit_with_message,
)
from xclip_jax.core.imports import add_trust
from xclip_jax.core.outputs import check_file, check_folder, check_writable
from xclip_jax.core.run_folder import lock
from xclip_jax.core.storage import strict_json, unreadable_as, write_json, write_whole
from xclip_jax.data import embeddings
from xclip_jax.data.records import ThreadPrefetcher
from xclip_jax.evaluators.encoder import MAX_UNREADABLE
from xclip_jax.parallel import compiler

PART = 4096  # rows that an interruption may cost
_REFUSED = ("file cannot be read", "tar cannot be read")  # faults of a disk or store, not of the content
MAY_FAIL = "fraction of a part's items that may be unreadable, by default 0.05; they are left out"
_LEDGER = rb'^\{"kind": "'  # beginning of a file of bad items
_FEW = 10  # number of items per part that a disk may always refuse


class Part(NamedTuple):
    """Embedded items: embeddings (n, e), texts, and {row: error} for bad items, ascending."""

    rows: np.ndarray
    texts: list[str]
    bad: dict[int, BadSample]


def embed_images(model: inference.Model, source: Images, first: int, threads: int) -> Iterator[Part]:
    """Yield the embedded images of a source from image `first` on, in parts; bad ones are embedded as black images."""
    black = np.zeros((model.size, model.size, 3), np.uint8)

    def make(i: int) -> tuple[np.ndarray, str, BadSample | None]:
        try:
            data, text = source.read(first + i)
            return model.prepare(data), text, None
        except BadSample as error:
            return black, "", error

    n = len(source) - first
    with ThreadPrefetcher(make, n, threads=threads, window=2 * model.batch) as ahead:
        for start in range(0, n, PART):
            stop = min(start + PART, n)
            rows = []
            made = []
            for begin in range(start, stop, model.batch):
                batch = [ahead[i] for i in range(begin, min(begin + model.batch, stop))]
                rows.append(model.encode_prepared([image for image, _, _ in batch]))
                made += [(text, error) for _, text, error in batch]
            bad = {row: error for row, (_, error) in enumerate(made) if error is not None}
            yield Part(np.concatenate(rows), [text for text, _ in made], bad)


def embed_texts(model: inference.Model, source: Lines, first: int) -> Iterator[Part]:
    """Yield the embedded texts of a source from text `first` on, in parts; bad ones get zeros."""
    for start in range(first, len(source), PART):
        texts = [""] * min(PART, len(source) - start)
        bad: dict[int, BadSample] = {}
        for row in range(len(texts)):
            try:
                texts[row] = source.read(start + row)[1]
            except BadSample as error:
                bad[row] = error
        rows = model.encode_text(texts)
        rows[list(bad)] = 0
        yield Part(rows, texts, bad)


def ledger_of(out: pathlib.Path) -> pathlib.Path:
    """Return the file that lists the bad items of a file of embeddings; it exists only if there are any."""
    return out.with_name(f"{out.name}.bad.jsonl")


def embed(
    model: inference.Model,
    sources: Mapping[str, Inputs],
    out: str,
    *,
    threads: int = 0,
    share: Sequence[int] = (1, 1),
    max_unreadable: float = MAX_UNREADABLE,
) -> dict[str, Any]:
    """Embed all items into one file, resuming after an interruption; return the file's metadata.

    Args:
      model: embeds the items.
      sources: inputs by modality, "image" or "text".
      out: Parquet file to write, or the folder of several shares.
      threads: number of threads that read and decode; 0 for one per core.
      share: number of the share that the sources' `numbers` are, from 1, and number of shares.
      max_unreadable: fraction of a part's items that may be refused by a disk or store; they are left out.

    Raises:
      UserError: existing parts belong to other items or weights, or too many items are refused or bad.
    """
    check_fraction("--max_unreadable", max_unreadable)
    # The name of a tokenizer's file depends on the model's folder; its content is among the weights.
    plan = {key: value for key, value in model.card.items() if key not in ("checkpoint", "step", "commit", "tokenizer")}
    plan |= {"part": PART, "weights": model.fingerprint()}
    plan |= {name: source.digest for name, source in sources.items()}
    path = pathlib.Path(out)
    folder = pathlib.Path(f"{out}.parts")
    if share[1] > 1:  # parts and ledger are outside the folder, since its readers would read them too
        plan |= {"share": share[0], "shares": share[1]}
        path = path / "{:05d}-of-{:05d}.parquet".format(*share)
        folder = pathlib.Path(f"{out}.{path.stem}.parts")
    elif path.is_dir():
        raise UserError(f"--out {out!r} is a folder, perhaps of shares; give --share for one of these, or name a file.")
    path = pathlib.Path(check_file("--out", path, b""))  # its metadata are compared
    plan_file = epath.Path(folder / "plan.json")
    with lock(path, blocking=False):
        place, saved = path, plan
        if path.exists():
            saved = embeddings.about(path).get("plan", {})
        elif plan_file.exists():
            place = folder
            with unreadable_as(f"{plan_file} is another program's; set --out"):
                saved = dict(json.loads(plan_file.read_text()))
        else:
            check_folder("--out", folder)
        differing = sorted(key for key in plan.keys() | saved.keys() if plan.get(key) != saved.get(key))
        if differing:
            raise UserError(f"{place} has other embeddings: {', '.join(differing)} differ; delete it, or set --out.")
        if path.exists():
            _clear(folder)
            log0(f"{path} is complete; delete it to embed again.")
            return embeddings.about(path)
        check_file("--out", ledger_of(folder.with_suffix("")), _LEDGER)
        folder.mkdir(exist_ok=True)
        write_json(plan_file, plan)
        rest = folder, threads, max_unreadable
        files = [file for name, source in sources.items() for file in _embed(model, name, source, *rest)]
        return _join(files, sum(map(len, sources.values())), path, model.card | {"plan": plan})


def _embed(
    model: inference.Model, modality: str, source: Inputs, folder: pathlib.Path, threads: int, max_unreadable: float
) -> list[pathlib.Path]:
    """Write the missing parts of a source; return the files of all parts."""
    starts = range(0, len(source), PART)
    files = [folder / f"{modality}-{start:09d}.parquet" for start in starts]
    complete = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    if complete:
        log0(f"resuming after part {complete:,} of {len(files):,} of {modality}s")
    first = complete * PART
    is_images = isinstance(source, Images)
    parts = embed_images(model, source, first, threads) if is_images else embed_texts(model, source, first)
    began = time.perf_counter()
    for file, start, part in zip(files[complete:], starts[complete:], parts, strict=True):
        names = [source.name(start + row) for row in range(len(part.texts))]
        _check_refused(names, part.bad, start, max_unreadable)
        with file.with_suffix(".bad.jsonl").open("w") as ledger:
            for row, error in part.bad.items():
                place = {"kind": modality, "id": names[row], "index": source.numbers[start + row]}
                ledger.write(f"{strict_json(place | {'reason': error.reason, 'detail': error.detail})}\n")
        kept = [row for row in range(len(names)) if modality == "text" or row not in part.bad]
        columns = {"kind": [modality] * len(kept), "embedding": part.rows[kept]}
        columns |= {"id": [names[row] for row in kept], "text": [part.texts[row] for row in kept]}
        with storage.whole_file(file) as temporary:  # an existing part is complete
            embeddings.write(temporary, columns)
        done = start + len(names)
        speed = (done - first) / (time.perf_counter() - began)
        left = format_duration((len(source) - done) / speed)
        log0(f"{modality}s {done:,}/{len(source):,}  {speed:,.0f}/s, {left} left, {len(part.bad):,} bad")
    return files


def _is_refused(name: str, error: BadSample) -> bool:
    """Whether a disk or store refuses an item, which may therefore be good."""
    # A working disk loses no listed local file, nor the folder of a file in a table.
    lost = error.reason == "no image file" and error.detail  # a tar's sample without image has no detail
    lost = lost or (error.reason == "file does not exist" and not pathlib.Path(name).parent.is_dir())
    return error.reason in _REFUSED or bool(lost and not storage.is_remote(name))


def _check_refused(names: Sequence[str], bad: Mapping[int, BadSample], start: int, limit: float) -> None:
    refused = [row for row, error in bad.items() if _is_refused(names[row], error)]
    if len(refused) > max(limit * len(names), _FEW):
        raise UserError(
            f"{len(refused)} of {len(names)} items cannot be read, more than {100 * limit:g} %; the first is "
            f"{names[refused[0]]!r} ({bad[refused[0]]}). Restore them, or leave them out by --max_unreadable="
            f"{-(-100 * len(refused) // len(names)) / 100:g}: the same command resumes after {start:,} items."
        )


def _join(files: Sequence[pathlib.Path], total: int, out: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    bad = [line for file in files for line in file.with_suffix(".bad.jsonl").read_text().splitlines()]
    ledger = ledger_of(files[0].parent.with_suffix(""))
    ledger.unlink(missing_ok=True)
    if bad:
        write_whole(epath.Path(ledger), "\n".join(bad) + "\n")
        log0(f"{len(bad):,} of {total:,} could not be used; they are listed in {ledger}")
    rows = total - sum(json.loads(line)["kind"] == "image" for line in bad)
    about |= {"rows": rows, "bad": len(bad), "environment": environment.capture()}
    if len(bad) < total or "share" in about["plan"]:  # else the folder would lack a share for ever
        with storage.whole_file(out) as temporary:
            embeddings.join(files, temporary, about)
    _clear(files[0].parent)
    if not out.exists():
        raise UserError(f"nothing could be embedded, first: {json.loads(bad[0])['reason']}; see {ledger}.")
    log0(f"{rows:,} embeddings: {out}")
    return about


def _clear(folder: pathlib.Path) -> None:
    """Delete the parts, and plan.json last, since it tells that they are ours."""
    plan_file = folder / "plan.json"
    if plan_file.exists():
        for file in (*folder.glob("image-*"), *folder.glob("text-*"), plan_file):
            file.unlink()
        with contextlib.suppress(OSError):  # another program's file is in the folder
            folder.rmdir()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax embed", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or weights")
    parser.add_argument("--step", type=int, help="checkpoint's step; by default the newest")
    parser.add_argument("--images", help=IMAGES)
    home = os.path.expanduser  # a shell leaves the ~ in --out=~/x.parquet
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--texts", type=home, metavar="FILE", help="file with one text per line")
    texts.add_argument("--captions", action="store_true", help="embed the different captions of --images, too")
    parser.add_argument("--out", type=home, required=True, help="local .parquet file to write")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="embed share I, from 1, of N; OUT is a folder")
    parser.add_argument("--dims", type=int, default=0, help="dimensions to keep, the first ones; 0 for all")
    parser.add_argument("--batch", type=int, default=32, help="number of items to encode at once")
    parser.add_argument("--max_unreadable", type=float, default=MAX_UNREADABLE, help=MAY_FAIL)
    add_trust(parser)
    flags = parser.parse_args(argv)
    with exit_with_message():
        share = [int(x) if x.isdecimal() else 0 for x in flags.share.split("/")]
        if len(share) != 2 or not 1 <= share[0] <= share[1]:
            raise UserError(f"--share is {flags.share!r}; expected I/N, such as 3/16, with I from 1 to N.")
        if storage.is_remote(flags.out):
            raise UserError(f"--out {flags.out!r} is in a bucket; name a local file, and copy it there afterwards.")
        check_choice("the ending of --out", pathlib.Path(flags.out).suffix, (".parquet",))
        check_writable("--out", flags.out if share[1] > 1 else os.path.dirname(flags.out))
        sources: dict[str, Inputs] = {}
        if flags.images:
            images = open_images(flags.images)
            sources = {"image": images} | ({"text": Captions(images)} if flags.captions else {})
        if flags.texts:
            sources["text"] = Lines(flags.texts)
        for source in sources.values():
            source.numbers = range(*[len(source) * i // share[1] for i in (share[0] - 1, share[0])])
        if not sum(map(len, sources.values())):
            raise UserError("there is nothing to embed; give --images, --texts or both, and fewer shares than items.")
        compiler.enable_cache()
        model = inference.load(flags.checkpoint, step=flags.step, batch=flags.batch, dims=flags.dims, trust=flags.trust)
        embed(model, sources, flags.out, share=share, max_unreadable=flags.max_unreadable)


if __name__ == "__main__":
    main()
