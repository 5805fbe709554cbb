"""Embeds many images and texts into one file: python -m xclip_jax.embed.

    python -m xclip_jax.embed --checkpoint RUN --images '/data/photos/**/*.jpg' --out photos.parquet
    python -m xclip_jax.embed --checkpoint RUN --images '/data/cc12m/{00000..01242}.tar' --out cc12m.parquet
    python -m xclip_jax.embed --checkpoint RUN --texts captions.txt --out captions.npz

A row is an image or a text: "kind" (image or text), "id" (path, TAR#KEY or FILE#LINE), "text" (an image's first
caption, if it has one in its tar or in a .txt file beside it; or the text) and "embedding", float32, of unit length.
The file's metadata, "xclip_jax" (an array of that name in .npz), is JSON: checkpoint, preprocessing, commit, versions.

The work is done in parts, kept in OUT.parts until all are there: the same command goes on after a kill and does no part
twice. Images that cannot be used are left out, counted, and listed in OUT.bad.jsonl.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath

from xclip_jax import inference, metrics
from xclip_jax.checkpoint import write_json
from xclip_jax.data import embeddings, files
from xclip_jax.data.ahead import Ahead
from xclip_jax.data.sources import IMAGE_SUFFIXES
from xclip_jax.data.tar_source import TarSource, decode_text
from xclip_jax.errors import BadSample, Parser, UserError, exit_with_message
from xclip_jax.metrics import say

PART = 1024  # rows that a kill may cost
_PROGRESS_SECONDS = 5


class Source(Protocol):
    """What there is to embed: `read` gives content and text of an item, or raises `BadSample`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[Any, str]: ...

    def digest(self) -> str: ...


class Images:
    """Image files, each with the first line of a .txt file of the same name, if there is one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        # A name need not be UTF-8 to a file system.
        return os.fsencode(self.paths[index]).decode("utf-8", "replace")

    def read(self, index: int) -> tuple[bytes, str]:
        path = self.paths[index]
        return inference.read(path), "" if files.is_remote(path) else _caption(pathlib.Path(path).with_suffix(".txt"))

    def digest(self) -> str:
        return hashlib.blake2b("\n".join(map(self.name, range(len(self)))).encode(), digest_size=16).hexdigest()


def _caption(path: pathlib.Path) -> str:
    """The first line of a file; "" where there is none, or no text: the image counts, not what is said of it."""
    try:
        return decode_text(path.read_bytes()).strip().partition("\n")[0].strip()
    except (OSError, BadSample):
        return ""


class Tars:
    """Images in tars as img2dataset writes them, with their captions; those without one are embedded too."""

    def __init__(self, pattern: str) -> None:
        self.source = TarSource(pattern)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return "{tar}#{key}".format(**self.source.where(index))

    def read(self, index: int) -> tuple[bytes, str]:
        try:
            record = self.source[index]
        except BadSample:
            return self.source.image(index), ""
        return record["image"], record["text"][0]

    def digest(self) -> str:
        return self.source.card()["hash"]


class Lines:
    """The lines of a text file; where they begin is kept in memory, not they."""

    def __init__(self, path: str) -> None:
        self.path, ends, at, digest = path, [np.array([-1])], 0, hashlib.blake2b(digest_size=16)
        try:
            self._file = files.File(path)
            while chunk := self._file.read(at, 1 << 24):
                ends.append(at + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
                at += len(chunk)
                digest.update(chunk)
        except OSError as error:
            raise UserError(f"--texts {path!r} cannot be read ({error}).") from error
        self._ends, self._digest = np.concatenate(ends), digest.hexdigest()
        if self._ends[-1] < at - 1:  # the last line has no end
            self._ends = np.append(self._ends, at)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        return f"{self.path}#{index + 1}"

    def read(self, index: int) -> tuple[str, str]:
        start, end = int(self._ends[index]) + 1, int(self._ends[index + 1])
        text = decode_text(self._file.read(start, end - start)).strip()
        return text, text

    def digest(self) -> str:
        return self._digest


def open_images(pattern: str) -> Images | Tars:
    """The images of a folder, or of files as `files.expand` names them: all of them tars, or none.

    Raises:
      UserError: nothing there.
    """
    if not files.is_remote(pattern) and os.path.isdir(pattern):
        inside = sorted(str(path) for path in pathlib.Path(pattern).rglob("*") if path.name[0] != ".")
        found = [path for path in inside if path.lower().endswith(IMAGE_SUFFIXES)]
        if not found and any(path.endswith(".tar") for path in inside):
            return open_images(f"{pattern}/*.tar")
        if not found:
            raise UserError(f"--images {pattern!r} holds no image ({', '.join(IMAGE_SUFFIXES)}); name a glob of files.")
        return Images(found)
    paths = files.expand(pattern)
    tars = sum(path.endswith(".tar") for path in paths)
    if tars and tars < len(paths):
        raise UserError(f"--images {pattern!r} names {tars} tars among {len(paths)} files; embed them one by one.")
    return Tars(pattern) if tars else Images(paths)


class _Part(Sequence):
    """Images `start` to `stop` as an encoder reads them; a bad one is black, and noted."""

    def __init__(self, ahead: Ahead, start: int, stop: int) -> None:
        self._ahead, self._start, self._n = ahead, start, stop - start
        self.texts, self.bad = [""] * self._n, {}

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> np.ndarray:
        image, self.texts[i], error = self._ahead[self._start + i]
        if error is not None:
            self.bad[i] = error
        return image


class Job:
    """What is to be embedded, by which model, into which file."""

    def __init__(
        self, model: inference.Model, sources: Mapping[str, Source], out: str, *, part: int = PART, threads: int = 0
    ) -> None:
        """Checks all that can be checked.

        Args:
          model: embeds.
          sources: by kind, "image" or "text".
          out: file to write, .parquet or .npz.
          part: rows of a part, rounded up to a multiple of the model's batch.
          threads: that read and decode; 0 for one a core.

        Raises:
          UserError: another file is in the way, or parts of another job are.
        """
        self.model, self.sources, self.out, self._threads = model, sources, pathlib.Path(out), threads
        self._format = embeddings.format_of(self.out)
        self.folder = pathlib.Path(f"{out}.parts")
        size = -(-part // model.batch) * model.batch
        self._parts = [
            (kind, start, min(start + size, len(source)))
            for kind, source in sources.items() for start in range(0, len(source), size)
        ]
        if not self._parts:
            raise UserError("there is nothing to embed; --texts is an empty file.")
        self.plan = {"part": size, "weights": model.fingerprint()}
        self.plan |= {key: value for key, value in model.card.items() if key not in ("checkpoint", "step")}
        self.plan |= {kind: {"n": len(source), "digest": source.digest()} for kind, source in sources.items()}
        self._claim()

    def _claim(self) -> None:
        note, there = self.folder / "plan.json", self.plan
        what = f"{self.folder} is of another job"
        if note.exists():
            there = json.loads(note.read_text())
        elif self.out.exists():
            there, what = self._format.about(self.out).get("plan", {}), f"{self.out} exists and holds other embeddings"
        if differing := sorted(key for key in self.plan.keys() | there.keys() if self.plan.get(key) != there.get(key)):
            raise UserError(f"{what}: {', '.join(differing)} differ; delete it, or set another --out.")

    @property
    def complete(self) -> bool:
        """Whether the file is there already."""
        return self.out.exists() and not self.folder.exists()

    def run(self) -> dict[str, Any]:
        """Embeds what is left, and joins the parts. Returns what the file says about itself."""
        if self.complete:
            say(f"{self.out} is complete; delete it to embed anew.")
            return self._format.about(self.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            write_json(epath.Path(self.folder / "plan.json"), self.plan)
        done = next((i for i in range(len(self._parts)) if not self._file(i).exists()), len(self._parts))
        if done:
            say(f"going on behind part {done:,} of {len(self._parts):,}")
        self._bad = sum(len(self._listed(i)) for i in range(done))
        for kind, source in self.sources.items():
            todo = [i for i, (k, *_) in enumerate(self._parts) if k == kind and i >= done]
            if todo:
                (self._images if kind == "image" else self._texts)(source, todo)
        return self._join()

    def _file(self, i: int) -> pathlib.Path:
        return self.folder / f"{i:06d}{self.out.suffix}"

    def _listed(self, i: int) -> list[str]:
        file = self._file(i).with_suffix(".bad.jsonl")
        return file.read_text().splitlines() if file.exists() else []

    def _images(self, source: Source, todo: Sequence[int]) -> None:
        black = np.zeros((self.model.size, self.model.size, 3), np.uint8)
        _, first, _ = self._parts[todo[0]]
        progress = _Progress("images", first, len(source))

        def make(i: int) -> tuple[np.ndarray, str, BadSample | None]:
            try:
                data, text = source.read(first + i)
                return self.model.prepare(data), text, None
            except BadSample as error:
                return black, "", error

        # The threads go on to the next part while the device ends the last one.
        n = len(source) - first
        with Ahead(make, n, threads=self._threads, window=2 * self.model.batch) as ahead:
            for i in todo:
                _, start, stop = self._parts[i]
                part = _Part(ahead, start - first, stop - first)
                found = self.model.encode_prepared(part)
                self._write(i, part.texts, found, part.bad)
                progress.after(stop, self._bad)

    def _texts(self, source: Source, todo: Sequence[int]) -> None:
        progress = _Progress("texts", self._parts[todo[0]][1], len(source))
        for i in todo:
            _, start, stop = self._parts[i]
            texts, bad = [], {}
            for row, index in enumerate(range(start, stop)):
                try:
                    texts.append(source.read(index)[1])
                except BadSample as error:
                    texts.append("")
                    bad[row] = error
            self._write(i, texts, self.model.encode_text(texts), bad)
            progress.after(stop, self._bad)

    def _write(self, i: int, texts: list[str], found: np.ndarray, bad: Mapping[int, BadSample]) -> None:
        kind, start, stop = self._parts[i]
        names = [self.sources[kind].name(index) for index in range(start, stop)]
        if bad:
            lines = [{"kind": kind, "id": names[row], "reason": bad[row].reason, "detail": bad[row].detail}
                     for row in sorted(bad)]  # fmt: skip
            self._file(i).with_suffix(".bad.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            self._bad += len(bad)
        good = [row for row in range(stop - start) if row not in bad]
        columns = {"kind": [kind] * len(good), "id": [names[row] for row in good], "text": [texts[row] for row in good]}
        # The name tells that the part is whole.
        temporary = self.folder / f".{self._file(i).name}.tmp"
        self._format.write(temporary, columns | {"embedding": found[good]})
        temporary.replace(self._file(i))

    def _join(self) -> dict[str, Any]:
        bad = [line for i in range(len(self._parts)) for line in self._listed(i)]
        total = sum(map(len, self.sources.values()))
        ledger = self.out.with_name(f"{self.out.name}.bad.jsonl")
        ledger.unlink(missing_ok=True)
        if bad:
            ledger.write_text("\n".join(bad) + "\n")
            say(f"{len(bad):,} of {total:,} could not be used; {ledger} names them")
        if len(bad) == total:
            raise UserError(f"nothing could be embedded; {ledger} says why.")
        about = {**self.model.card, "rows": total - len(bad), "bad": len(bad), "plan": self.plan}
        about["environment"] = metrics.environment()
        temporary = self.out.with_name(f".{self.out.name}.tmp")
        self._format.join([self._file(i) for i in range(len(self._parts))], temporary, about)
        temporary.replace(self.out)
        shutil.rmtree(self.folder)
        say(f"{about['rows']:,} embeddings: {self.out}")
        return about


class _Progress:
    """A line every few seconds: how many, how fast, how long still."""

    def __init__(self, what: str, first: int, n: int) -> None:
        self._what, self._first, self._n = what, first, n
        self._began = self._said = time.perf_counter()

    def after(self, done: int, bad: int) -> None:
        now = time.perf_counter()
        if now - self._said < _PROGRESS_SECONDS and done < self._n:
            return
        self._said, speed = now, (done - self._first) / (now - self._began)
        line = f"{self._what} {done:,}/{self._n:,}  {speed:,.0f} {self._what}/s"
        line += f", {metrics.clock((self._n - done) / speed)} left"
        say(line + (f", {bad:,} bad" if bad else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = Parser(prog="python -m xclip_jax.embed", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or weights")
    parser.add_argument("--step", type=int, help="which checkpoint of a run; the newest by default")
    parser.add_argument("--images", help="a folder, or files: globs, ranges {00..12}, lists; or tars")
    parser.add_argument("--texts", metavar="FILE", help="a text a line")
    parser.add_argument("--out", required=True, help="file to write, .parquet or .npz")
    parser.add_argument("--batch", type=int, default=32, help="items that are encoded at once")
    parser.add_argument("--threads", type=int, default=0, help="that read and decode images; 0 for one a core")
    parser.add_argument("--part", type=int, default=PART, help="rows that a kill may cost")
    options = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    try:
        with exit_with_message():
            if not (options.images or options.texts):
                raise UserError("give --images, --texts or both.")
            sources = {"image": open_images(options.images)} if options.images else {}
            sources |= {"text": Lines(options.texts)} if options.texts else {}
            model = inference.load(options.checkpoint, step=options.step, batch=options.batch)
            Job(model, sources, options.out, part=options.part, threads=options.threads).run()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from there")


if __name__ == "__main__":
    main()
