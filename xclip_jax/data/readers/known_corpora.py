"""Published sets of pairs by name: `published:cc12m` reads a copy of CC12M on the Hub; see docs/data.md."""

import dataclasses
from typing import ClassVar, NamedTuple

from xclip_jax.core.errors import UserError, check_choice, describe
from xclip_jax.data import sources
from xclip_jax.data.base import Source, SourceKind, SourceOptions


class Corpus(NamedTuple):
    """A published set: number of pairs, spec of its copy ("" if the Hub has only links), and columns of the copy."""

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
    """`published:NAME`, a name in `CORPORA`."""

    extras: ClassVar = ("datasets",)

    @classmethod
    def open(cls, rest: str, options: SourceOptions) -> Source:
        """Open the copy, by its own columns unless the config names others."""
        check_choice("published set", rest, CORPORA)
        corpus, own = CORPORA[rest], f"with own tars (img2dataset) write pretrain:data={rest},root=FOLDER"
        if not corpus.spec:
            raise UserError(f"the Hub has only the links of {rest}, and no images; {own}.")
        if options.image_column == SourceOptions.image_column:
            options = dataclasses.replace(options, image_column=corpus.image)
        if tuple(options.text_columns) == tuple(SourceOptions.text_columns):
            options = dataclasses.replace(options, text_columns=corpus.text)
        print(f"published:{rest} is {corpus.spec}, {corpus.pairs:,} pairs", flush=True)
        try:
            return sources.open_pairs(corpus.spec, options)
        except (UserError, OSError) as error:
            raise UserError(f"published:{rest} cannot be read: {describe(error).rstrip('.')}; {own}.") from error
