"""Icons as image-text pairs: 87,000 drawings by 107 families of artists, from one npm package, built on first use.

Rules, counts and licences are in docs/icons.md. The parts: `families` (which sets), `names` (captions and concepts),
`package` (download and reading), `drawing` (pictures), `splits` (duplicates and splits).
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from studies.icons import drawing, package, splits
from studies.icons.drawing import MAX_INK, MIN_INK, Picture
from studies.icons.families import family
from studies.icons.package import Icon
from xclip_jax.core.errors import UserError
from xclip_jax.data.readers.tfds import prepare_dataset

AnyIcon = TypeVar("AnyIcon", bound=Icon)
LICENCES_FILE, REPORT_FILE = "LICENCES.md", "report.json"

_DESCRIPTION = """\
Drawings of {icon_sets} icon sets with captions made of their names, from the npm package @iconify/json {version}
(MIT). 64 x 64 RGB, black or in the set's own colours, on white. Each set is under its own licence ({licences});
LICENCES.md beside the data names author, licence and address of every set. CC-BY asks for that attribution wherever
drawings are shown. Drawn with resvg-py (MIT).
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a build reads.

    Attributes:
      icons: usable ones, sorted by id.
      sets: of every set that is kept, what attribution asks for; see `families.describe`.
      counts: of icons by what became of them.
      version: of the package.
    """

    icons: Sequence[Icon]
    sets: Sequence[Mapping[str, str]]
    counts: Mapping[str, int]
    version: str


@dataclasses.dataclass(frozen=True)
class Built:
    """The finished corpus: icons and pictures by index, splits of indices, and what a build reports."""

    icons: Sequence[Icon]
    pictures: Sequence[Picture]
    corpus: splits.Corpus
    report: Mapping[str, Any]
    sets: Sequence[Mapping[str, str]]


def step(text: str, what: str = "icons") -> None:
    """Print a line of a build's progress."""
    print(f"{what}: {text} ...", flush=True)


def read() -> Source:
    """Read the pinned package, which is downloaded on first use (104 MB).

    Raises:
      UserError: it cannot be downloaded, or is damaged.
    """
    path = package.fetch()
    step(f"reading {package.ICONIFY.name} {package.ICONIFY.version}")
    icons, sets, counts = package.read(path)
    return Source(icons, sets, counts, package.ICONIFY.version)


def build(source: Source) -> Built:
    """Draw the icons of `source`, take out duplicates and assign splits.

    Raises:
      UserError: resvg-py is missing.
    """
    limited = splits.limit_per_set(source.icons)
    candidates = splits.concepts_of_two_families(limited)
    counts = dict(source.counts) | {
        "at most two of a set and concept": len(limited),
        "of concepts of two families": len(candidates),
        "concepts of two families": len({icon.concept for icon in candidates}),
    }
    icons, pictures, signatures = draw(candidates)
    counts["blank, full or broken"] = len(candidates) - len(icons)
    step("looking for duplicates")
    corpus = splits.assign(icons, signatures)
    report = make_report(icons, corpus, counts, source.sets, f"{package.ICONIFY.name} {source.version}")
    return Built(icons, pictures, corpus, report, source.sets)


def draw(
    candidates: Sequence[AnyIcon], what: str = "icons", least_ink: float = MIN_INK
) -> tuple[list[AnyIcon], list[Picture], np.ndarray]:
    """Draw icons on all cores, with lines of progress; those without ink, or with too much, are left out.

    Returns:
      the icons that are left, their pictures, and the pictures' signatures, uint8 (n, 256).
    """
    step(f"drawing {len(candidates):,} {what}", what)
    shown = fifth = max(len(candidates) // 5, 1)

    def progress(done: int) -> None:
        nonlocal shown
        if done >= shown:
            step(f"{done:,} of {len(candidates):,} drawn", what)
            shown += fifth

    pictures = drawing.draw_all([(icon.body, icon.box) for icon in candidates], progress)
    drawn = [i for i, picture in enumerate(pictures) if least_ink <= picture.ink <= MAX_INK]
    pictures = [pictures[i] for i in drawn]
    signatures = np.frombuffer(b"".join(p.signature for p in pictures), np.uint8).reshape(len(drawn), -1)
    return [candidates[i] for i in drawn], pictures, signatures


def make_report(
    icons: Sequence[Icon],
    corpus: splits.Corpus,
    counts: Mapping[str, int],
    sets: Sequence[Mapping[str, str]],
    title: str,
    family_of: Callable[[str], str] = family,
) -> dict[str, Any]:
    """Counts of icons by rule, of the splits and of licences, and hashes of the splits' lists.

    Args:
      icons: all that are drawn.
      corpus: their splits.
      counts: of icons before they were drawn.
      sets: of every set, what attribution asks for; see `families.describe`.
      title: packages and their versions.
      family_of: returns the family of a set.
    """
    licence_of = {entry["set"]: entry["licence"] for entry in sets}
    everything = [icons[i] for split in corpus.splits.values() for i in split]
    drawings = collections.Counter(licence_of.get(icon.icon_set, "") for icon in everything)
    licensed = collections.defaultdict(set)
    for icon in everything:
        licensed[licence_of.get(icon.icon_set, "")].add(icon.icon_set)
    return {
        "package": title,
        "renderer": f"resvg-py {resvg_version()}",
        "salt": splits.SALT,
        "counts": dict(counts) | dict(corpus.counts),
        "splits": {
            split: {
                "drawings": len(members),
                "concepts": len({icons[i].concept for i in members}),
                "families": len({family_of(icons[i].icon_set) for i in members}),
                "hash": splits.digest(icons[i].id for i in members),
            }
            for split, members in corpus.splits.items()
        },
        "held-out families": {name: role for name, role in corpus.families.items() if role != "train"},
        "licences": {name: {"drawings": n, "sets": len(licensed[name])} for name, n in drawings.most_common()},
        "with a category": sum(bool(icon.categories) for icon in everything),
        "with an alias": sum(map(bool, corpus.aliases.values())),
        "words of a caption": dict(sorted(collections.Counter(len(x.caption.split()) for x in everything).items())),
    }


def resvg_version() -> str:
    """Version of the renderer; `UserError` where it is missing."""
    try:
        return importlib.metadata.version("resvg-py")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("the icons need the package 'resvg-py': pip install 'xclip_jax[demo]'") from error


def _concepts(built: Built) -> list[dict[str, Any]]:
    """The class list, see `concepts`."""
    captions: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    aliases: dict[str, dict[str, None]] = collections.defaultdict(dict)
    categories: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for i in sorted(j for split in built.corpus.splits.values() for j in split):
        icon = built.icons[i]
        captions[icon.concept][icon.caption] += 1
        aliases[icon.concept] |= dict.fromkeys(built.corpus.aliases[i])
        categories[icon.concept].update(icon.categories)
    ordered = {concept: sorted(count, key=lambda text: (-count[text], text)) for concept, count in captions.items()}
    return [
        {
            "id": concept,
            "name": ordered[concept][0],
            "captions": ordered[concept],
            "aliases": sorted(aliases[concept]),
            "category": min(categories[concept], key=lambda text: (-categories[concept][text], text), default=""),
            "role": role,
        }
        for concept, role in built.corpus.roles.items()
    ]


def licences_page(sets: Sequence[Mapping[str, str]], title: str = "Icon sets and their licences") -> str:
    """A table in Markdown of every set with author, licence and address: the attribution that CC-BY asks for."""
    lines = [
        f"# {title}",
        "",
        "| set | title | author | licence | address |",
        "|---|---|---|---|---|",
    ]
    for entry in sets:
        licence = f"[{entry['licence']}]({entry['licence_address']})" if entry["licence_address"] else entry["licence"]
        cells = (entry["set"], entry["title"], entry["author"], licence, entry["address"])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


class IconPairs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `icon_pairs`, read without TensorFlow: `prepare().as_data_source("train")`.

    A record has image (PNG), id ("ph/paw-print-bold"), set, family, concept (id), name (the caption), aliases and
    category (lists of texts, mostly empty or of one).

    Splits: train; test_concepts and validation_concepts, all drawings of concepts that are not in training at all;
    test_rendering and validation_rendering, known concepts as drawn by families that are not in training.
    """

    VERSION = tfds.core.Version("1.0.0")
    # There are no URLs; TFDS would look for their checksums with importlib_resources, which it does not install.
    url_infos = None
    source: Any = None  # what to build from, by default the package
    what = "icons"  # in lines of progress
    licences_title = "Icon sets and their licences"
    family_of: Callable[..., str] = staticmethod(family)

    @classmethod
    def check(cls) -> None:
        """Raise `UserError` where a package that a build needs is missing."""
        resvg_version()

    def describe(self) -> str:
        """What the data set is."""
        return _DESCRIPTION.format(
            icon_sets="162", version=package.ICONIFY.version, licences="MIT, Apache-2.0, CC-BY and others"
        )

    def build(self) -> Built:
        """The corpus of `source`."""
        return build(self.source or read())

    def _info(self) -> tfds.core.DatasetInfo:
        text, size = tfds.features.Text(), drawing.SIZE
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.describe(),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), dtype=np.uint8, encoding_format="png"),
                    **dict.fromkeys(("id", "set", "family", "concept", "name"), text),
                    **dict.fromkeys(("aliases", "category"), tfds.features.Sequence(text)),
                }
            ),
            supervised_keys=("image", "name"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        self.check()  # before minutes of work
        built = self.build()
        self.info.metadata["concepts"] = _concepts(built)
        self.info.metadata["families"] = dict(built.corpus.families)
        self.info.metadata["sets"] = [dict(entry) for entry in built.sets]
        self.info.metadata["report"] = dict(built.report)
        folder = pathlib.Path(self.data_path)
        (folder / LICENCES_FILE).write_text(licences_page(built.sets, self.licences_title), encoding="utf-8")
        (folder / REPORT_FILE).write_text(json.dumps(built.report, indent=1) + "\n", encoding="utf-8")
        print(render(built.report), flush=True)
        step(f"writing {built.report['counts']['corpus']:,} records", self.what)
        return {
            split: self._generate_examples(built, members) for split, members in built.corpus.splits.items() if members
        }

    def _generate_examples(self, built: Built, members: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        for i in members:
            icon = built.icons[i]
            yield (
                icon.id,
                {
                    "image": built.pictures[i].png,
                    "id": icon.id,
                    "set": icon.icon_set,
                    "family": self.family_of(icon.icon_set),
                    "concept": icon.concept,
                    "name": icon.caption,
                    "aliases": list(built.corpus.aliases[i]),
                    "category": list(icon.categories),
                },
            )


def render(report: Mapping[str, Any]) -> str:
    """A build's report as text, one count a line."""
    lines = [f"{report['package']}, {report['renderer']}"]
    lines += [f"{number:>9,}  {what}" for what, number in report["counts"].items()]
    for split, row in report["splits"].items():
        lines.append(
            f"{row['drawings']:>9,}  {split}: {row['concepts']:,} concepts, {row['families']} families, "
            f"sha256 {row['hash'][:16]}"
        )
    lines += [f"{row['drawings']:>9,}  {name}: {row['sets']} sets" for name, row in report["licences"].items()]
    return "\n".join(lines)


def prepare(
    data_dir: str | os.PathLike | None = None, source: Any = None, kind: type[IconPairs] = IconPairs
) -> IconPairs:
    """The builder, ready to be read; builds the data set on first use (some minutes, and 104 MB of download).

    An interrupted build leaves no partial data set: it gets its name when it is complete.

    Args:
      data_dir: root of TFDS data sets; by default $TFDS_DATA_DIR, else `tfds` in the cache of `storage.cache_dir`.
      source: what to build from, by default the pinned package.
      kind: the builder's class.

    Raises:
      UserError: resvg-py is missing, or the package cannot be downloaded.
    """

    def make(root: str) -> IconPairs:
        builder = kind(data_dir=root, file_format="array_record")
        builder.source = source
        return builder

    return prepare_dataset(make, data_dir, kind.check)


def concepts(builder: tfds.core.DatasetBuilder) -> list[dict[str, Any]]:
    """Every concept of the corpus, in order of id: the class list.

    Each is {id, name, captions, aliases, category, role}: name is the commonest of its captions, aliases are its other
    names in the sets, category is the commonest or "", and role is "train", "test_concepts" or "validation_concepts".
    """
    return builder.info.metadata["concepts"]
