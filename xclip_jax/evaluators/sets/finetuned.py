"""Labelled items for a model with a classifier: `finetuned/SOURCE`.

SOURCE is a source of labelled items (`data.sources`): finetuned/tfds:imagenet2012/validation, finetuned/folder:PATH,
finetuned/glue:cola/validation.
"""

from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.labelled import check_one_class
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.base import Pictures, SetKind
from xclip_jax.evaluators.probe import ClassificationSet
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import VALIDATION, Provenance, contents, digest
from xclip_jax.evaluators.sets.published_sets import ENTRIES

PREFIX = "finetuned/"


def load(spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> ClassificationSet:
    """Return the set `finetuned/SPEC`; images as `prepare` and the profile say.

    Raises:
      UserError: a source that cannot be opened, several labels an image.
    """
    source_spec = spec.removeprefix(PREFIX)
    options = SourceOptions(data_dir or "")
    source = sources.open_labelled(source_spec, options)
    check_one_class(source_spec, source)
    labels, images, prepare = source.labels(), source.key == "image", profile.preprocessing(prepare)
    card = Provenance(
        data=source_spec,
        version=source.version,
        split=source_spec.rpartition("/")[2],
        split_hash=digest(
            [
                source.identity,
                *labels.tolist(),
                *source.names,
                *(contents(source.items) if images else source.items),
            ]
        ),
        protocol="the classifier that end-to-end fine-tuning fitted",
        metric=f"finetuned/{source.metrics[0]}",
        preprocessing=prepare.resizing if images else "",
        role=VALIDATION if _is_for_choices(source_spec, options) else "",
    )
    items = Pictures(source.items, prepare) if images else source.items
    return ClassificationSet(spec, items, labels, len(source.names) or 1, card, tuple(source.names))


def _is_for_choices(spec: str, options: SourceOptions) -> bool:
    """Whether a source is the split "validation" of a data set with another split of labelled test items.

    ImageNet and GLUE's tasks publish no test labels: results are reported on their validation splits.
    """
    place, _, split = spec.rpartition("/")
    if split != "validation" or place.endswith(":") or not sources.is_spec(place):
        return False
    source = sources.parse(place)
    reported = {(entry.tfds.partition(":")[0], entry.split) for entry in ENTRIES.values()}
    if (source.rest.partition(":")[0], split) in reported or not source.kind.split_specs:
        return False
    return source.kind.has_split(source.rest, "test", options)


class FinetunedSets(SetKind):
    """`finetuned/SOURCE`: labelled items for a model with a classifier."""

    prefixes = (PREFIX.rstrip("/"),)
    usage = "of a fine-tuned model: finetuned/SOURCE"
    load = staticmethod(load)

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether a source is named."""
        return spec.startswith(PREFIX)
