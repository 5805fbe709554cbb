"""Embed many images and texts into one file: xclip-jax embed.

    xclip-jax embed --checkpoint RUN --images '/data/photos/**/*.jpg' --out photos.parquet
    xclip-jax embed --checkpoint RUN --images '/data/cc12m/{00000..01242}.tar' --out cc12m.parquet
    xclip-jax embed --checkpoint RUN --texts captions.txt --out captions.npz

A row is an image or a text: "kind" (image or text), "id" (path, TAR#KEY or FILE#LINE), "text" (an image's first
caption, if it has one in its tar or in a .txt file of its name; or the text) and "embedding", float32, of unit length.
The file's metadata, "xclip_jax" (an array of that name in .npz), is JSON: checkpoint, preprocessing, commit, versions.
In .npz ids and texts are lists in JSON (see `xclip_jax.data.embeddings`, whose `read` reads both file formats).

Images that cannot be used are left out. Every line of --texts has its row, so that row i is line i: a line that cannot
be used, such as an empty one, has an embedding of zeros. Both are counted, and listed in OUT.bad.jsonl.

The work is done in parts, stored in OUT.parts until all are complete: after an interruption the same command resumes
and repeats no part. It stops with an error when the weights, the text file, or the names or sizes of images have
changed. An image of other content and equal size is not detected, nor is any change of image files in a bucket.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from xclip_jax import model as inference
from xclip_jax.commands.embed_sources import Lines, Source, open_images
from xclip_jax.core import environment, locks, storage
from xclip_jax.core.console import format_duration, log0
from xclip_jax.core.errors import BadSample, Parser, UserError, check_count, check_writable, exit_with_message, public
from xclip_jax.core.imports import add_trust
from xclip_jax.core.storage import write_json
from xclip_jax.data import embeddings
from xclip_jax.data.records import ThreadPrefetcher
from xclip_jax.train import compilation_cache

PART = 1024  # rows that an interruption may lose
_PROGRESS_SECONDS = 5


class Part(NamedTuple):
    """Embedded images: number of the first, embeddings (n, e), captions, and {row: error} of the bad ones."""

    start: int
    rows: np.ndarray
    texts: list[str]
    bad: dict[int, BadSample]


def embed_images(
    model: inference.Model, read: Callable[[int], tuple[Any, str]], n: int, size: int, *, threads: int = 0
) -> Iterator[Part]:
    """Yield `n` embedded images in parts; a bad one is embedded as black.

    Args:
      model: embeds them.
      read: returns content and caption of an image by its number, or raises `BadSample`; called in threads.
      n: number of images.
      size: images of a part.
      threads: number of threads that read and decode; 0 for one a core.
    """
    black = np.zeros((model.size, model.size, 3), np.uint8)

    def make(i: int) -> tuple[np.ndarray, str, BadSample | None]:
        try:
            data, text = read(i)
            return model.prepare(data), text, None
        except BadSample as error:
            return black, "", error

    # The threads read ahead while the device computes.
    with ThreadPrefetcher(make, n, threads=threads, window=2 * model.batch) as ahead:
        for start in range(0, n, size):
            stop, rows, made = min(start + size, n), [], []
            for first in range(start, stop, model.batch):
                batch = [ahead[i] for i in range(first, min(first + model.batch, stop))]
                rows.append(model.encode_prepared([image for image, _, _ in batch]))
                made += [(text, error) for _, text, error in batch]
            bad = {row: error for row, (_, error) in enumerate(made) if error is not None}
            yield Part(start, np.concatenate(rows), [text for text, _ in made], bad)


def check_out(out: str) -> None:
    """Raise `UserError` where the file `out` cannot be written: its place, or its format."""
    if storage.is_remote(out):
        raise UserError(f"--out {out!r} is in a bucket; name a local file, and copy it there when it is complete.")
    embeddings.format_of(pathlib.Path(out))
    check_writable(f"--out {out!r}", pathlib.Path(out).parent)


class EmbeddingJob:
    """A model, the items to embed, and the file to write."""

    def __init__(
        self,
        model: inference.Model,
        sources: Mapping[str, Source],
        out: str,
        *,
        part: int = PART,
        threads: int = 0,
    ) -> None:
        """Check the job against the files of an earlier one.

        Args:
          model: embeds the items.
          sources: by modality, "image" or "text".
          out: file to write, .parquet or .npz.
          part: rows of a part, rounded up to a multiple of the model's batch.
          threads: number of threads that read and decode; 0 for one a core.

        Raises:
          UserError: the file or its parts belong to another job; `part` below 1, `threads` below 0.
        """
        check_count("part", part, 1)
        check_count("threads", threads, 0)
        check_out(out)
        self.model, self.sources, self.out, self._threads = model, sources, pathlib.Path(out), threads
        self._format = embeddings.format_of(self.out)
        self.folder = pathlib.Path(f"{out}.parts")
        self._size = size = -(-part // model.batch) * model.batch
        self._parts = [
            (modality, start, min(start + size, len(source)))
            for modality, source in sources.items()
            for start in range(0, len(source), size)
        ]
        if not self._parts:
            raise UserError("--texts is an empty file; give a file with a text in each line.")
        self.plan = {"part": size, "weights": model.fingerprint()}
        self.plan |= {key: value for key, value in model.card.items() if key not in ("checkpoint", "step", "commit")}
        self.plan |= {name: {"n": len(source), "digest": source.digest()} for name, source in sources.items()}
        self._check_plan()

    def _check_plan(self) -> None:
        """Raise `UserError` where the file or its parts belong to another job."""
        file, saved = self.folder / "plan.json", self.plan
        fault = f"{self.folder} belongs to another job"
        if file.exists():
            try:
                saved = dict(json.loads(file.read_text()))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{file} is damaged; delete {self.folder} to embed again.") from error
        elif self.out.exists():
            saved, fault = embeddings.about(self.out).get("plan", {}), f"{self.out} contains other embeddings"
        # A complete file does not depend on the size of its parts, which follows from the batch.
        keys = (self.plan.keys() | saved.keys()) - ({"part"} if self.complete else set())
        if differing := sorted(key for key in keys if self.plan.get(key) != saved.get(key)):
            raise UserError(f"{fault}: {', '.join(differing)} differ; delete it, or set another --out.")

    @property
    def complete(self) -> bool:
        """Whether the file exists and has all parts."""
        return self.out.exists() and not self.folder.exists()

    def run(self) -> dict[str, Any]:
        """Embed the remaining parts, join them, and return the file's metadata.

        Raises:
          UserError: another process writes the file, or wrote another one meanwhile; nothing could be embedded.
        """
        if not self.complete:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            try:
                with locks.lock(self.out, blocking=False):
                    self._check_plan()
                    if not self.complete:
                        return self._make()
            except locks.HeldError as error:
                raise UserError(
                    f"{self.out} is being written by another process; wait for it, or name another file."
                ) from error
        log0(f"{self.out} is complete; delete it to embed again.")
        return embeddings.about(self.out)

    def _make(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            write_json(epath.Path(self.folder / "plan.json"), self.plan)
        done = next((i for i in range(len(self._parts)) if not self._file(i).exists()), len(self._parts))
        if done:
            log0(f"resuming after part {done:,} of {len(self._parts):,}")
        self._bad = sum(len(self._listed(i)) for i in range(done))
        for name, source in self.sources.items():
            todo = [i for i, (modality, *_) in enumerate(self._parts) if modality == name and i >= done]
            if todo:
                (self._images if name == "image" else self._texts)(source, todo)
        return self._join()

    def _file(self, i: int) -> pathlib.Path:
        return self.folder / f"{i:06d}{self.out.suffix}"

    def _listed(self, i: int) -> list[str]:
        file = self._file(i).with_suffix(".bad.jsonl")
        return file.read_text().splitlines() if file.exists() else []

    def _images(self, source: Source, todo: Sequence[int]) -> None:
        first = self._parts[todo[0]][1]
        progress = Progress("images", first, len(source))
        parts = embed_images(
            self.model, lambda i: source.read(first + i), len(source) - first, self._size, threads=self._threads
        )
        for i, part in zip(todo, parts, strict=True):
            kept = [row for row in range(len(part.rows)) if row not in part.bad]
            self._write(i, part.texts, part.rows, part.bad, kept)
            progress.after(self._parts[i][2], self._bad)

    def _texts(self, source: Source, todo: Sequence[int]) -> None:
        progress = Progress("texts", self._parts[todo[0]][1], len(source))
        for i in todo:
            _, start, stop = self._parts[i]
            texts, bad = [], {}
            for row, index in enumerate(range(start, stop)):
                try:
                    texts.append(source.read(index)[1])
                except BadSample as error:
                    texts.append("")
                    bad[row] = error
            good = [row for row in range(stop - start) if row not in bad]
            embeddings_of_good = self.model.encode_text([texts[row] for row in good])
            rows = np.zeros((stop - start, embeddings_of_good.shape[1]), np.float32)
            rows[good] = embeddings_of_good
            self._write(i, texts, rows, bad, range(stop - start))
            progress.after(stop, self._bad)

    def _write(
        self, i: int, texts: list[str], rows: np.ndarray, bad: Mapping[int, BadSample], kept: Sequence[int]
    ) -> None:
        """Write the rows `kept` of part i, and list the bad ones."""
        modality, start, stop = self._parts[i]
        names = [self.sources[modality].name(index) for index in range(start, stop)]
        if bad:
            lines = [
                {"kind": modality, "id": names[row], "reason": bad[row].reason, "detail": public(bad[row].detail)}
                for row in sorted(bad)
            ]
            self._file(i).with_suffix(".bad.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            self._bad += len(bad)
        ids, kept_texts = [names[row] for row in kept], [texts[row] for row in kept]
        columns = {"kind": [modality] * len(kept), "id": ids, "text": kept_texts}
        # A part of this name is complete.
        temporary = self.folder / f".{self._file(i).name}.tmp"
        self._format.write(temporary, columns | {"embedding": rows[kept]})
        put_in_place(temporary, self._file(i))

    def _join(self) -> dict[str, Any]:
        bad = [line for i in range(len(self._parts)) for line in self._listed(i)]
        total = sum(map(len, self.sources.values()))
        ledger = self.out.with_name(f"{self.out.name}.bad.jsonl")
        ledger.unlink(missing_ok=True)
        if bad:
            ledger.write_text("\n".join(bad) + "\n")
            log0(f"{len(bad):,} of {total:,} could not be used; they are listed in {ledger}")
        if len(bad) == total:
            raise UserError(f"nothing could be embedded; the reasons are in {ledger}.")
        left_out = sum(json.loads(line)["kind"] == "image" for line in bad)
        about = {**self.model.card, "rows": total - left_out, "bad": len(bad), "plan": self.plan}
        about["environment"] = environment.capture()
        temporary = self.out.with_name(f".{self.out.name}.tmp")
        self._format.join([self._file(i) for i in range(len(self._parts))], temporary, about)
        put_in_place(temporary, self.out)
        shutil.rmtree(self.folder)
        log0(f"{about['rows']:,} embeddings: {self.out}")
        return about


def put_in_place(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Rename a complete file to `path` once its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Progress:
    """Prints how many items are done, the speed and the remaining time, every few seconds."""

    def __init__(self, unit: str, first: int, n: int) -> None:
        self._unit, self._first, self._n = unit, first, n
        self._began = self._printed = time.perf_counter()

    def after(self, done: int, bad: int) -> None:
        now = time.perf_counter()
        if now - self._printed < _PROGRESS_SECONDS and done < self._n:
            return
        self._printed, speed = now, (done - self._first) / (now - self._began)
        line = f"{self._unit} {done:,}/{self._n:,}  {speed:,.0f} {self._unit}/s"
        line += f", {format_duration((self._n - done) / speed)} left"
        log0(line + (f", {bad:,} bad" if bad else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax embed", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory, or weights")
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--images", help="a folder, or files: globs, ranges {00..12}, lists; or tars")
    parser.add_argument("--texts", metavar="FILE", help="file with a text in each line")
    parser.add_argument("--out", required=True, help="file to write, .parquet or .npz")
    parser.add_argument("--batch", type=int, default=32, help="items that are encoded at once")
    parser.add_argument("--threads", type=int, default=0, help="threads that read and decode; 0 for one a core")
    add_trust(parser)
    parser.add_argument("--part", type=int, default=PART, help="rows that an interruption may lose")
    options = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        if not (options.images or options.texts):
            raise UserError("give --images, --texts or both.")
        for key, minimum in (("batch", 1), ("part", 1), ("threads", 0)):
            check_count(f"--{key}", getattr(options, key), minimum)
        check_out(options.out)
        sources: dict[str, Source] = {}
        if options.images:
            sources["image"] = open_images(options.images)
        if options.texts:
            sources["text"] = Lines(options.texts)
        compilation_cache.enable()
        model = inference.load(options.checkpoint, step=options.step, batch=options.batch, trust=options.trust)
        try:
            EmbeddingJob(model, sources, options.out, part=options.part, threads=options.threads).run()
        except KeyboardInterrupt as stop:
            stop.add_note("run the same command to resume")
            raise


if __name__ == "__main__":
    main()
