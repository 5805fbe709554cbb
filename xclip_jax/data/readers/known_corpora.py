"""Published sets of pairs by name: `published:cc12m` reads a copy of CC12M on the Hub; see docs/data.md."""

import dataclasses
from typing import ClassVar, NamedTuple

from xclip_jax.core.errors import UserError, check_choice, describe
from xclip_jax.data import sources
from xclip_jax.data.base import Source, SourceKind, SourceOptions


class Corpus(NamedTuple):
    """A published set: number of pairs, spec of its copy ("" if the Hub only has links), and the copy's columns."""

    pairs: int
    spec: str
    image: str = SourceOptions.image_column
    text: tuple[str, ...] = tuple(SourceOptions.text_columns)


CORPORA = {
    "cc3m": Corpus(2_905_954, "tar:hf://datasets/pixparse/cc3m-wds/cc3m-train-*.tar"),
    "cc12m": Corpus(10_968_539, "tar:hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar"),
    # Texts are lists of ids of CLIP's tokenizer.
    "yfcc15m": Corpus(15_061_515, "hf:Kaichengalex/YFCC15M/train", "images", ("texts",)),
    "datacomp-small": Corpus(12_800_000, ""),
}


class KnownCorpora(SourceKind):
    """`published:NAME`, a key of `CORPORA`."""

    extras: ClassVar = ("datasets",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> Source:
        """Open the copy, with its columns unless the config names others."""
        check_choice("published set", rest, CORPORA)
        corpus = CORPORA[rest]
        if options.image_column == SourceOptions.image_column:
            options = dataclasses.replace(options, image_column=corpus.image)
        if tuple(options.text_columns) == tuple(SourceOptions.text_columns):
            options = dataclasses.replace(options, text_columns=corpus.text)
        fault = "has no copy on the Hub, only links"
        if corpus.spec:
            print(f"published:{rest} is {corpus.spec}, {corpus.pairs:,} pairs", flush=True)
            try:
                return sources.open_pairs(corpus.spec, options)
            except (UserError, OSError) as error:
                fault = f"cannot be read: {describe(error).rstrip('.')}"
        remedy = f"with your own tars (img2dataset) write pretrain:data={rest},root=FOLDER"
        raise UserError(f"published:{rest} {fault}; {remedy}.")
