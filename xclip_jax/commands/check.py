"""Check image-text pairs before a run: number and sizes, bad samples, duplicates, reading speed.

    xclip-jax check '/data/cc12m/{00000..01242}.tar'
    xclip-jax check folder:/data/pairs --samples 0
    xclip-jax check pairs.csv,image=path,text=caption
    xclip-jax check folder:/data/pairs --samples 0 --by RUN --suspects wrong.jsonl

Tars are indexed completely, but only a random part of the samples is read, by default 2,000. With --by, a trained model
lists captions that probably belong to other images. The exit code is 0 if training would run, else 1.
"""

import argparse
import collections
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from xclip_jax import model as inference
from xclip_jax.core.console import show
from xclip_jax.core.errors import BadSample, Parser, UserError, check_count, check_fraction, exit_with_message
from xclip_jax.core.imports import add_trust
from xclip_jax.core.outputs import check_file
from xclip_jax.core.storage import strict_json, write_whole
from xclip_jax.data import inspect, loader, records, sources, tokenizer
from xclip_jax.data.base import Record, Source, SourceOptions
from xclip_jax.data.images import decode
from xclip_jax.data.inspect import Sample
from xclip_jax.objectives.similarity import ClusterSimilarity, features

SUSPECTS = rb'^\{"index": .*"likeliest": '  # beginning of a file by --suspects
_EXAMPLES = 3  # bad samples to list per reason
_SUSPECTS = 10  # captions to list
_NEGATIVES = "; in one batch they would count as false negatives"
_BLOCK = 256  # pairs that a model compares with each other
_SIZE = 224  # pixels of the crop
_LENGTH = 77  # tokens of CLIP's context


def _percentiles(values: Sequence[float] | np.ndarray) -> str:
    low, middle, high = np.percentile(values, (5, 50, 95))
    return f"{low:,.0f} / {middle:,.0f} / {high:,.0f}"


def _duplicates(values: Sequence[Any]) -> int:
    return len(values) - len(set(values))


def report(source: Source, options: argparse.Namespace) -> bool:
    """Print lines about a source, the verdict last; return whether training would run."""
    n = len(source)
    show(f"samples: {n:,}, index {options.key[0]}")
    count = min(options.samples or n, n)
    chosen = np.random.default_rng(0).choice(n, count, replace=False)
    threads = records.cores()
    samples, seconds = inspect.read(source, chosen.tolist(), threads, _SIZE)
    good = [s for s in samples if not s.reason]
    bad = [s for s in samples if s.reason]
    more = "; more repeats show with --samples 0, which reads all" if count < n else ""
    show(f"read: {count:,} at random{more}")
    if good:
        _show_statistics(good, options)
        rate = count / seconds
        show(f"speed: {rate:,.0f} images/s to {_SIZE} px on {threads} cores, an epoch in {n / rate / 3600:,.1f} h")
    for reason, number in sorted(collections.Counter(s.reason for s in bad).items()):
        show(f"bad, {reason}: {number:,} of {count:,} that were read")
        for sample in [s for s in bad if s.reason == reason][:_EXAMPLES]:
            entry = source.describe(sample.index) | {"reason": reason, "detail": sample.detail}
            show(f"    {json.dumps(entry, ensure_ascii=False)}")
    if options.model and good:
        _show_suspects(source, good, options)
    share = len(bad) / count
    fault = ""
    if share > options.max_bad_fraction:
        fault = "training would stop; fix the data or raise data.max_bad_fraction"
    elif len(good) > 1 and len({caption for s in good for caption in s.captions}) == 1:
        fault = "training would learn nothing; give each image a caption of its own"
    show(f"bad: {share:.2%}, allowed {options.max_bad_fraction:.2%}: {fault or 'training would run'}")
    return not fault


def _show_statistics(good: Sequence[Sample], options: argparse.Namespace) -> None:
    captions = [caption for s in good for caption in s.captions]
    lengths = options.tokens.lengths(options.tokens(captions, _LENGTH))
    full = np.mean(lengths >= _LENGTH)
    show(f"width, 5/50/95 %: {_percentiles([s.size[0] for s in good])}")
    show(f"height, 5/50/95 %: {_percentiles([s.size[1] for s in good])}")
    show(f"tokens, 5/50/95 %: {_percentiles(lengths)}, {full:.1%} of the captions fill all {_LENGTH}")
    images = _duplicates([s.digest for s in good])
    remedy = f"{_NEGATIVES}, objective.clip.positives=image makes captions of one image positives"
    show(f"repeated images: {images:,}" + (remedy if images else ""))
    repeated = _duplicates([caption for s in good for caption in dict.fromkeys(s.captions)])
    remedy = f"{_NEGATIVES}, objective.clip.positives=caption makes them positives"
    if _duplicates([s.captions for s in good]):  # two pairs share all captions
        remedy = f"{_NEGATIVES}, data.spread_duplicate_captions=True keeps them apart"
    show(f"repeated captions: {repeated:,}" + (remedy if repeated else ""))


def _show_suspects(source: Source, good: Sequence[Sample], options: argparse.Namespace) -> None:
    """Print the least likely captions by a model, and write all captions to --suspects."""
    # Clusters find wrong captions better than embeddings (docs/verdicts.md), by their cross-entropy without rivals.
    clusters = any(isinstance(similarity, ClusterSimilarity) for similarity in options.model.similarities)
    score = ClusterSimilarity.logits if clusters else ""
    key = score or "probability"
    judged: list[tuple[float, dict[str, Any]]] = []  # likelihood and entry of a caption
    right: list[bool] = []  # by image
    blocks = -(-len(good) // _BLOCK)
    for start in range(blocks):
        block = good[start::blocks]
        places = [(source, sample.index) for sample in block]
        results = records.read_each(places, _image, threads=records.cores())
        # A storage may have failed since the first read.
        read = [(x, sample) for x, sample in zip(results, block, strict=True) if not isinstance(x, BadSample)]
        if not read:
            continue
        names = list(dict.fromkeys(caption for _, sample in read for caption in sample.captions))
        column = {name: i for i, name in enumerate(names)}
        answer = options.model.zero_shot([image for image, _ in read], names, ["{}"], by=score)
        likelihoods = answer.scores if clusters else answer.probabilities
        for (_, sample), label, row in zip(read, answer.labels, likelihoods.tolist(), strict=True):
            right.append(label in sample.captions)
            own = {caption: row[column[caption]] for caption in sample.captions}
            if not clusters:  # captions compete with captions for other images, but not with each other
                foreign = max(1 - sum(own.values()), 0)
                own = {caption: p / max(p + foreign, 1e-30) for caption, p in own.items()}
            place = {"index": sample.index, **source.describe(sample.index), "source": ":".join(options.key)}
            for caption, likelihood in own.items():
                entry = {"caption": caption, "captions": len(own), key: float(f"{abs(likelihood):.6g}")}
                judged.append((likelihood, place | entry | {"likeliest": label}))
    if not judged:
        show(f"by {options.by}: no image could be read again")
        return
    judged.sort(key=lambda row: row[0])
    among = f"the likeliest of about {len(judged) // blocks}"
    way = "cross-entropy of clusters" if clusters else "probability"
    show(f"by {options.by}, by {way}: {np.mean(right):.1%} of images have their own caption as {among}")
    limits = np.abs(np.percentile([likelihood for likelihood, _ in judged], (1, 5, 10, 20, 30, 50)))
    values = " / ".join(f"{limit:.3g}" for limit in limits)
    show(f"{way} at 1/5/10/20/30/50 % of the captions, least likely first: {values}")
    entries = [entry for _, entry in judged]
    for entry in entries[:_SUSPECTS]:
        show(f"    {json.dumps(entry, ensure_ascii=False)}")
    if options.suspects:
        write_whole(options.suspects, "".join(f"{strict_json(entry)}\n" for entry in entries))
        show(f"all {len(entries):,}, the least likely first: {options.suspects}")


def _image(record: Record) -> bytes | np.ndarray:
    image = record["image"]
    return image if isinstance(image, bytes) else decode(image)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="xclip-jax check",
        description=__doc__.split("\n\n")[0],
        epilog="\n".join(["sources:", *(f"  {spec:23} {meaning}" for spec, meaning in sources.PAIRS.items())]),
    )
    parser.add_argument(
        "source",
        metavar="SOURCE[,image=COLUMN][,text=COLUMN,...][,tags=COLUMN][,negatives=COLUMN,...][,dir=FOLDER]",
        help="from the list below, or the path of a folder, tars or a table; COLUMN is a table's column, a record's "
        "feature or a .json file's field, FOLDER the root of TFDS data sets; tags are for data.caption_transform, "
        "negatives for data.negative_columns",
    )
    parser.add_argument("--samples", type=int, default=2000, help="number of samples to read, 0 for all")
    parser.add_argument("--tokenizer", default="clip")
    fraction = loader.DataConfig.max_bad_fraction
    parser.add_argument("--max_bad_fraction", type=float, default=fraction, help="data.max_bad_fraction of the run")
    parser.add_argument("--by", default="", metavar="RUN", help="run or weights that judge how well captions fit")
    suspects = parser.add_argument("--suspects", default="", type=os.path.expanduser, metavar="FILE")
    suspects.help = "JSON lines file for the captions by --by, the least likely first, for data.drop of a run"
    add_trust(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = _options(arguments)
    with exit_with_message():
        check_count("--samples", options.samples, 0)
        check_fraction("--max_bad_fraction", options.max_bad_fraction)
        options.tokens = tokenizer.load(options.tokenizer)
        if options.suspects:  # written at the end
            if not options.by:
                raise UserError("--suspects needs a model that judges the pairs; name one with --by RUN.")
            options.suspects = check_file("--suspects", options.suspects, SUSPECTS)
        given = {"image": "image", "text": "text", "dir": "", "tags": "", "negatives": ""}
        path, *pairs = re.split(rf",(?=(?:{'|'.join(given)})=)", options.source)
        named = [pair.partition("=")[0] for pair in pairs]
        for key in named:
            if named.count(key) > 1:
                raise UserError(f"{options.source!r} has {key}= twice; leave one out, or write {key}=A,B for a list.")
        given |= dict(pair.split("=", 1) for pair in pairs)
        texts = tuple(loader.DataConfig(text_columns=tuple(given["text"].split(","))).text_weights)  # without weights
        negatives = tuple(filter(None, given["negatives"].split(",")))
        keys = SourceOptions(given["dir"], given["image"], texts, given["tags"], negative_columns=negatives)
        source = sources.open_pairs(sources.spec_from_path(path), keys)
        if not len(source):
            raise UserError(f"source {path!r} has nothing in it; name another split or file.")
        options.key = (source.fingerprint()["hash"], ",".join(texts))  # see `holdout.read_dropped`
        options.model = inference.load(options.by, trust=options.trust) if options.by else None
        if options.model:
            features(options.model.similarities)  # raises for a model without similarities
        return 0 if report(source, options) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
