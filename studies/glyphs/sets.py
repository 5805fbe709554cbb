"""Evaluation sets of the glyphs, each for tests and, by other names, for tuning.

Their names in a config are studies.glyphs.sets:GlyphSets/NAME, with these names:

    test_concepts       zero-shot: characters that are not in training, among the names of these; a class's only
                        prompt is its name
    test_combinations   zero-shot: letters with marks that training has on other letters, among the names of these
    test_composition    the same drawings among these names and all of training, "latin small letter r" among them
    test_rendering      out of domain: known characters in typefaces by foundries that are not in training, among the
                        names of all characters of training
    test_retrieval      the first drawing of each character of test_rendering, with its name and aliases as captions
    test_probe          visual: new characters learned from some foundries' typefaces and recognised in those of others
    test_scripts        visual: the script, or block, of drawings of test_concepts by a linear probe that learns from
                        drawings of training; C is chosen on validation_concepts
    test_aliases        textual: names of the unseen characters, retrieved by their aliases
    validation_...      the same on the validation splits; a probe's choices are made on one half of their characters

Intervals resample characters, not drawings.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from studies.glyphs import corpus
from studies.icons import drawn
from studies.icons.drawn import Drawn, DrawnSets, Record
from studies.icons.splits import hash_rank
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import Pictures
from xclip_jax.evaluators.feature_classifiers import Sweep
from xclip_jax.evaluators.probe import ProbeSet
from xclip_jax.evaluators.results import VALIDATION

KIND = "studies.glyphs.sets:GlyphSets"
GLYPHS = Drawn("glyph_pairs", str(corpus.GlyphPairs.VERSION), corpus.prepare)
SCRIPTS, LEARNED = 20, 4000  # the commonest ones of training, and drawings of training that a probe learns from


def script_classes(records: list[Record]) -> list[str]:
    """The commonest scripts and blocks of characters, sorted; of equally common ones the first by name."""
    numbers = collections.Counter({record["concept"]: record["category"][0] for record in records}.values())
    return sorted(sorted(numbers, key=lambda text: (-numbers[text], text))[:SCRIPTS])


def _scripts(name: str, prepare: Preprocessing, data_dir: str | None, part: str) -> ProbeSet:
    sides = [
        drawn.records_of(GLYPHS, split, data_dir) for split in ("train", "validation_concepts", f"{part}_concepts")
    ]
    classes = script_classes(sides[0][1])

    def has_class(i: int, records: list[Record]) -> bool:
        return records[i]["category"][0] in classes

    chosen = [[i for i in range(len(records)) if has_class(i, records)] for _, records in sides]
    chosen[0] = sorted(chosen[0], key=lambda i: hash_rank("glyph script", sides[0][1][i]["id"]))[:LEARNED]
    if part == "validation":
        half = {r["concept"]: int(hash_rank("glyph half", r["concept"]), 16) % 2 for r in sides[1][1]}
        chosen[1:] = [[i for i in chosen[1] if half[sides[1][1][i]["concept"]] == side] for side in (0, 1)]
    parts = [[records[i] for i in some] for (_, records), some in zip(sides, chosen, strict=True)]
    labels = tuple(np.array([classes.index(r["category"][0]) for r in records], int) for records in parts)
    images = [Pictures([pngs[i] for i in some], prepare) for (pngs, _), some in zip(sides, chosen, strict=True)]
    card = GLYPHS.card(
        f"train+{part}_concepts",
        [(r["id"], r["category"][0]) for records in parts for r in records],
        protocol="linear probe (L-BFGS, C of 7 on validation) and nearest neighbours on features before projection; "
        "intervals by resampling concepts",
        preprocessing=prepare.resizing,
        metric="linear/top1",
        role=VALIDATION if part == "validation" else "",
    )
    together = np.unique([record["concept"] for record in parts[2]], return_inverse=True)[1]
    sweep = Sweep(halvings=0, tolerance=1e-4)
    return ProbeSet(name, *images, {"": labels}, sweep=sweep, card=card, together=together)


def _named(split: str, *roles: str) -> functools.partial:
    """Makes a zero-shot set of a split, among the names of the characters that have one of `roles`."""
    return functools.partial(drawn.zeroshot, home=GLYPHS, split=split, roles=roles)


_MAKERS: Mapping[str, Callable[[str, Preprocessing, str | None], Any]] = {
    f"{KIND}/{part}_{what}": maker
    for part in ("validation", "test")
    for what, maker in (
        ("concepts", _named(f"{part}_concepts", f"{part}_concepts")),
        ("combinations", _named(f"{part}_combinations", f"{part}_combinations")),
        ("composition", _named(f"{part}_combinations", f"{part}_combinations", "train")),
        ("rendering", _named(f"{part}_rendering", "train")),
        ("retrieval", functools.partial(drawn.retrieval, home=GLYPHS, part=part)),
        ("probe", functools.partial(drawn.probe, home=GLYPHS, part=part)),
        ("scripts", functools.partial(_scripts, part=part)),
        ("aliases", functools.partial(drawn.aliases, home=GLYPHS, part=part)),
    )
}
TESTS = tuple(name for name in _MAKERS if name.startswith(f"{KIND}/test_"))


class GlyphSets(DrawnSets):
    """The sets of this module by their names."""

    names, makers = tuple(_MAKERS), _MAKERS
    panels: ClassVar[Mapping[str, tuple[str, str]]] = {
        f"{KIND}/test_concepts": (
            "Characters it has never seen",
            "Training had no picture of these, in any typeface. The model chooses among {num_classes} new names.",
        ),
        f"{KIND}/test_composition": (
            "Letters with marks it knows from others",
            "Training had the letters and the marks, not together. The model chooses among {num_classes} names.",
        ),
        f"{KIND}/test_rendering": (
            "Known characters in new typefaces",
            "Training showed nothing by these foundries. The model chooses among {num_classes} names.",
        ),
    }
    queries = ("arrow to the left", "letter with acute", "box drawing", "greek", "currency sign", "black circle")
    credit = (
        "Glyphs: typefaces of the npm scope @fontsource, each under its own licence (OFL-1.1 and others); copyright, "
        "licences and addresses are in LICENCES.md beside the prepared data."
    )
