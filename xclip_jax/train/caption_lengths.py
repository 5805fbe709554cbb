"""Chooses the groups of lengths in which a run encodes its texts, from its first captions."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from xclip_jax.core.console import log0
from xclip_jax.core.errors import BadSample
from xclip_jax.data import length_groups, loader, records
from xclip_jax.data.base import Source
from xclip_jax.data.length_groups import WHOLE, LengthGroups
from xclip_jax.train import flops
from xclip_jax.train.build import Experiment

_SAMPLES = 1024
_THREADS = 8


def choose(experiment: Experiment, sources: Sequence[Source]) -> LengthGroups:
    """Groups for the captions of `sources`, the same on all processes; without cuts where they would save little."""
    config, tower, context = experiment.config, experiment.model.txt, experiment.context_length
    if "txt" not in experiment.model.towers or not tower.cuttable:
        return WHOLE
    rows, draws = experiment.text_rows

    def saved(groups: LengthGroups) -> float:
        cut, whole = flops.train_step(config, groups, rows), flops.train_step(config, WHOLE)
        return 1 - cut / whole if cut and whole else 0.0  # unknown of some towers of other packages

    flops_of, most = flops.cut_flops(tower), saved(LengthGroups(((1, 1.0),)))
    if flops_of is None or not length_groups.worthwhile(most, config.steps):
        return WHOLE
    counts = np.zeros(context + 1, np.int32)
    if jax.process_index() == 0:
        counts = count_lengths(experiment, sources)
    if jax.process_count() > 1:  # a sample may be bad on one of them alone
        counts = np.asarray(multihost_utils.broadcast_one_to_all(counts))
    groups = length_groups.choose(counts, rows=rows, draws=draws, flops_of=flops_of)
    if not length_groups.worthwhile(saved(groups), config.steps):
        return WHOLE
    mean = counts @ np.arange(context + 1) / counts.sum()
    log0(
        f"captions have {mean:.0f} tokens on average: texts are encoded in groups (data.length_groups={groups}), which "
        f"saves {saved(groups):.0%} of a step's FLOPs"
    )
    return groups


def count_lengths(experiment: Experiment, sources: Sequence[Source]) -> np.ndarray:
    """(context + 1,) how many of the run's first captions have a length, in tokens. Bad samples are left out."""
    data, length, seed = experiment.config.data, experiment.context_length, experiment.config.seed
    tokens = experiment.tokenizer
    # An order that is as good, without a look at all captions.
    order = loader.sample_order(sources, dataclasses.replace(data, spread_duplicate_captions=False, cache=False), seed)
    transform = loader.Transform(data, experiment.image_size, tokens, length, ("text",))
    stop = min(_SAMPLES, sum(map(len, sources)))

    # Tokenized here, as the caption that is drawn depends on the position.
    read = records.read_each(
        ((order.sources[number], index) for number, index in map(order.place, range(stop))),
        lambda record: {"text": record["text"], "tags": record["tags"]},
        timeout=data.read_timeout,
        threads=_THREADS,
    )
    counts, row = np.zeros(length + 1, np.int32), np.zeros((1, length), np.int32)
    for position, record in enumerate(read):
        if isinstance(record, BadSample):
            continue
        try:
            transform(record, np.random.default_rng((seed, position)), {"text": row})
        except Exception as error:
            records.as_bad_sample(error)
            continue
        counts[tokens.lengths(row)] += 1
    return counts
