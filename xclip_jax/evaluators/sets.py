"""Named evaluation sets: the one place to add another. `SETS` maps each name to a function that makes the set.

The sets of the demo, `xclip_jax.data.demo` (`emoji/...`); three artists drew the pictures, results are means over them:

    validation_concepts, test_concepts      pictures of concepts that nobody saw, among 100 and 200 such concepts; a
                                            class's embedding is the mean over its prompts, "name, tag, tag, tag" and
                                            "tag, tag, tag, tag" with each of its tags in front once
    ..._concepts_one_prompt                 the same with the one prompt "name, tag, tag, tag"
    validation_rendering, test_rendering    a known concept as an artist drew it whose picture was kept out of
                                            training, among the names of all concepts
    test_rendering_flags, _animals_food, _rest    the same for one group, among the group's names alone
    test_rendering_flags_all_names          flags among all names
    test_line, test_line_concepts           line drawings, a style never trained on: all names; the 200 unseen concepts
    validation_retrieval, test_retrieval    the pictures of ..._rendering with name and aliases as captions
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xclip_jax.data import demo
from xclip_jax.data.transforms import decode, resize_center_crop
from xclip_jax.errors import one_of
from xclip_jax.evaluators import Encoder
from xclip_jax.evaluators.retrieval import Retrieval, RetrievalSet
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet

Record = dict[str, Any]
Maker = Callable[[str, int, str | None], ZeroShotSet | RetrievalSet]


def load(spec: str, image_size: int, data_dir: str | None = None) -> ZeroShotSet | RetrievalSet:
    """The set named `spec`, its images square and uint8 at `image_size` pixels.

    Args:
      spec: one of `SETS`.
      image_size: side of the images, as the model wants them.
      data_dir: root of TFDS data sets, None (or "") for the default; the demo's is prepared there on first use.

    Raises:
      UserError: an unknown `spec`; the message lists the valid ones.
    """
    one_of("the evaluation set (eval.sets, eval.final_sets)", spec, SETS)
    return SETS[spec](spec, image_size, data_dir or None)


@functools.lru_cache(maxsize=16)
def _emoji(split: str, size: int, data_dir: str | None) -> tuple[list[np.ndarray], list[Record]]:
    """Images and the rest of the records of a split; kept, because several sets look at the same pictures."""
    builder = demo.prepare(data_dir)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images, records = [], []
    for record in (source[i] for i in range(len(source))):
        images.append(resize_center_crop(decode(record.pop("image")), size))
        records.append({key: _text(value) for key, value in record.items()})
    return images, records


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [item.decode() for item in value]


def _classify(
    name: str, size: int, data_dir: str | None, *, split: str, prompts: Callable[[Record], list[str]] | None = None,
    role: str = "", group: str = "", all_names: bool = False,
) -> ZeroShotSet:
    """The images of `split` among the names of concepts.

    Args:
      name, size, data_dir: as in `load`.
      split: of the demo's data set.
      prompts: texts of a concept; by default its name alone.
      role: only concepts of this role, as images and as names.
      group: only concepts of this group, as images and, unless `all_names`, as names.
      all_names: see `group`.
    """
    concepts = {c["id"]: c for c in demo.concepts(demo.prepare(data_dir)) if role in ("", c["role"])}
    classes = {i: c for i, c in concepts.items() if all_names or group in ("", c["group"])}
    images, records = _emoji(split, size, data_dir)
    if role or group:
        keep = [i for i, r in enumerate(records) if r["concept"] in concepts and group in ("", r["group"])]
        images, records = [images[i] for i in keep], [records[i] for i in keep]
    index = {concept: i for i, concept in enumerate(classes)}
    vendors = np.array([r["vendor"] for r in records])
    return ZeroShotSet(
        name,
        images,
        np.array([index[r["concept"]] for r in records]),
        [prompts(c) if prompts else [c["name"]] for c in classes.values()],
        {str(v): vendors == v for v in np.unique(vendors)} if len(set(vendors)) > 1 else {},
        [c["name"] for c in classes.values()],
    )


def _retrieve(name: str, size: int, data_dir: str | None, *, split: str) -> RetrievalSet:
    images, records = _emoji(split, size, data_dir)
    return RetrievalSet(name, images, [[r["name"], *r["aliases"]] for r in records])


def _known(split: str, **options: Any) -> Maker:
    return functools.partial(_classify, split=split, **options)


def _one_prompt(concept: Record) -> list[str]:
    return [", ".join([concept["name"], *concept["tags"][:3]])]


def _prompts(concept: Record) -> list[str]:
    """Captions as training writes them: keywords behind the name, and alone."""
    name, tags = concept["name"], concept["tags"]
    turns = [tags[i:] + tags[:i] for i in range(len(tags))]
    return [", ".join([name, *turn[:3]]) for turn in turns or [[]]] + [", ".join(turn[:4]) for turn in turns]


def _unseen(role: str, split: str, prompts: Callable[[Record], list[str]] = _prompts) -> Maker:
    return functools.partial(_classify, split=split, role=role, prompts=prompts)


SETS: Mapping[str, Maker] = {
    "emoji/validation_concepts": _unseen("validation_concepts", "validation_concepts"),
    "emoji/test_concepts": _unseen("test_concepts", "test_concepts"),
    "emoji/validation_concepts_one_prompt": _unseen("validation_concepts", "validation_concepts", _one_prompt),
    "emoji/test_concepts_one_prompt": _unseen("test_concepts", "test_concepts", _one_prompt),
    "emoji/validation_rendering": _known("validation_rendering"),
    "emoji/test_rendering": _known("test_rendering"),
    "emoji/test_rendering_flags": _known("test_rendering", group="flags"),
    "emoji/test_rendering_animals_food": _known("test_rendering", group="animals_food"),
    "emoji/test_rendering_rest": _known("test_rendering", group="rest"),
    "emoji/test_rendering_flags_all_names": _known("test_rendering", group="flags", all_names=True),
    "emoji/test_line": _known("test_line"),
    "emoji/test_line_concepts": _unseen("test_concepts", "test_line"),
    "emoji/validation_retrieval": functools.partial(_retrieve, split="validation_rendering"),
    "emoji/test_retrieval": functools.partial(_retrieve, split="test_rendering"),
}


def make(spec: str, encoder: Encoder, data_dir: str | None = None) -> ZeroShot | Retrieval:
    """The evaluator of the set named `spec`; arguments and errors are those of `load`."""
    data = load(spec, encoder.image_size, data_dir)
    return ZeroShot(encoder, data) if isinstance(data, ZeroShotSet) else Retrieval(encoder, data)
