"""Published sets of pairs by name: `published:cc12m` reads a copy of CC12M on the Hugging Face Hub.

Tars of the Hub are read in place, other sets by the package `datasets`. Facts about the copies were read in November
2026 in stored copies of the pages that `Published.page` names.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from xclip_jax.core.errors import UserError, check_choice, first_line
from xclip_jax.data import sources
from xclip_jax.data.base import Form, Source, SourceKind, SourceOptions


@dataclasses.dataclass(frozen=True)
class Published:
    """A published set of pairs, and its copy on the Hub."""

    spec: str  # source of the copy; "" if the Hub has only the links
    pairs: int  # of the copy, or of the list of links
    licence: str  # as the page has it
    page: str  # where pairs, licence and columns were read
    folder: str  # of own tars, below the folder of all sets
    image: str = SourceOptions.image_key  # columns
    text: tuple[str, ...] = tuple(SourceOptions.text_keys)
    get: str = "img2dataset --output_format webdataset"  # command that makes own tars


PUBLISHED: Mapping[str, Published] = {
    "cc3m": Published(
        spec="tar:hf://datasets/pixparse/cc3m-wds/cc3m-train-*.tar",
        pairs=2_905_954,
        licence="conceptual-captions",
        page="https://huggingface.co/datasets/pixparse/cc3m-wds",
        folder="cc3m",
    ),
    "cc12m": Published(
        spec="tar:hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar",
        pairs=10_968_539,
        licence="conceptual-12m",
        page="https://huggingface.co/datasets/pixparse/cc12m-wds",
        folder="cc12m",
    ),
    "yfcc15m": Published(
        spec="hf:Kaichengalex/YFCC15M/train",
        pairs=15_061_515,
        licence="not stated; the photographs are under Creative Commons licences of their authors",
        page="https://github.com/deepglint/RWKV-CLIP",
        folder="yfcc15m",
        image="images",
        text=("texts",),  # lists of ids of CLIP's tokenizer
    ),
    "datacomp-small": Published(
        spec="",
        pairs=12_800_000,
        licence="cc-by-4.0 (the links)",
        page="https://huggingface.co/datasets/mlfoundations/datacomp_small",
        folder="datacomp-small/shards",
        get="DataComp's download_upstream.py --scale small --data_dir FOLDER/datacomp-small",
    ),
}


def _remedy(name: str) -> str:
    row = PUBLISHED[name]
    return (
        f"make tars with {row.get} and read them with pretrain:data={name},root=FOLDER (FOLDER/{row.folder}/*.tar), or "
        "name another copy in data.sources, as tar:hf://datasets/ORG/NAME/*.tar or hf:ORG/NAME/train"
    )


class PublishedPairs(SourceKind):
    """`published:NAME`, a name in `PUBLISHED`."""

    forms: ClassVar = {"published:NAME": Form(pairs=f"a copy on the Hugging Face Hub of {', '.join(PUBLISHED)}")}

    @classmethod
    def extras(cls, rest: str) -> tuple[str, ...]:
        row = PUBLISHED.get(rest)
        return ("datasets" if row.spec.startswith("hf:") else "hub",) if row else ()

    @classmethod
    def open(cls, rest: str, options: SourceOptions, labels: bool = False) -> Source:
        """Open the copy, by its own columns unless the config names others.

        Raises:
          UserError: an unknown name; a set of links; a copy that cannot be opened, with what to do instead.
        """
        check_choice("published set", rest, PUBLISHED)
        row = PUBLISHED[rest]
        if not row.spec:
            raise UserError(f"the Hub has only the links of {rest} ({row.page}), and no images; {_remedy(rest)}.")
        columns = {"image_key": row.image, "text_keys": row.text}
        columns = {key: value for key, value in columns.items() if getattr(options, key) == getattr(SourceOptions, key)}
        print(f"published:{rest} is {row.spec}, {row.pairs:,} pairs", flush=True)
        try:
            return sources.open_pairs(row.spec, dataclasses.replace(options, **columns))
        except (UserError, OSError) as error:
            reason = (str(error) if isinstance(error, UserError) else first_line(error)).rstrip(".")
            raise UserError(
                f"published:{rest} cannot be read: {reason}. If the copy is gone, {_remedy(rest)}."
            ) from error
