"""Your own pairs, from a laptop up: a run whose sizes follow from the pairs and from this machine.

    xclip-jax train --config small:pairs=/my/pairs
    xclip-jax train --config small:pairs=/my/pairs.csv,image=path,text=caption,weights=hf:ORG/NAME

pairs is a folder of images with .txt files beside them, a table, tars, or any spec of data.sources. Some hundred of
them are read to choose towers, image size, context, batch, cluster head, learning rate, steps and intervals. A share of
the pairs is held out by content, evaluated on the way (retrieval/holdout, and zeroshot/holdout where sub-folders or a
column "label" name one class an image) and shown in RUN/report.html. A line says what was chosen, and why images
are not classified.

The argument's keys, all but pairs optional: weights (what to start from, in place of random parameters), objective
(clip, siglip, nclip, xclip; clip, or that of the weights), image and text (columns or features; several of captions
are text=title,alt), tokenizer, dir (of TFDS data sets), preset, size (pixels), batch, epochs (0.5 too) or steps, from
which warm-up and intervals follow, count (pairs, which then are not read), device (cpu, gpu, tpu: sizes for an ordinary
one in place of this machine; needed where several processes train).
"""

import dataclasses
import hashlib
import math
import os
import re
import sys

import jax
import ml_collections
import numpy as np

from xclip_jax import flops
from xclip_jax.commands import command
from xclip_jax.config import schema
from xclip_jax.configs import common
from xclip_jax.data import holdout, inspect, labelled, sources, tokenizer
from xclip_jax.data.base import MissingColumnError, Source, SourceOptions, name_of
from xclip_jax.data.config import DataConfig
from xclip_jax.errors import UserError, check_choice
from xclip_jax.evaluators import zeroshot_datasets
from xclip_jax.models.heads import ClusterHead, Head
from xclip_jax.objectives import OBJECTIVES, RECIPES, make_objective
from xclip_jax.objectives.clip import Clip
from xclip_jax.train import memory

_NAME_LENGTH = 40  # letters of a run's name
SAMPLE = 512  # pairs that are read for their sizes
HELD_OUT = (20, 0.05, 5000)  # pairs at least, share, pairs at most: their scores are a square matrix
LARGEST_SHARE = 0.2
# FLOP/s of a core, measured with these towers, and the seconds that a run on a CPU takes at most by them.
CORE, LONGEST = 4e10, 1800
# Of small towers from random parameters: learning rate at batches of 256, warm-up as a share of the steps and of how
# many of them at most, and the warm-up that this rate goes with: where it is shorter the rate is lower, so that it
# rises as slowly as where it was tuned.
# Validation preferred these on the demo, and about these on the icons (docs/demo.md, docs/study.md).
SMALL_TOWERS = (2e-3, 0.5, 1000, 300)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the pairs are like.

    Attributes:
      pairs: number of them.
      width, height: median of the images, pixels.
      tokens: that 95 % of the captions do not exceed, start and end included.
      repeats: share of the captions that another pair has too.
    """

    pairs: int
    width: int = 512
    height: int = 512
    tokens: int = 32
    repeats: float = 0.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run may use: `memory` is bytes of a device, of a CPU those that its devices share."""

    platform: str = "cpu"
    devices: int = 1
    memory: float = 8 * 2**30
    cores: int = 4


ORDINARY = {"cpu": Machine(), "gpu": Machine("gpu", 1, 16 * 2**30, 8), "tpu": Machine("tpu", 1, 16 * 2**30, 8)}


def this_machine() -> Machine:
    """Return the devices of this process. Their memory is what they have, not what is free at the moment."""
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Machine(platform, jax.device_count(), memory.total(device), os.cpu_count() or 1)


def _unusable(source: Source, bad: list[inspect.Sample], count: int) -> str:
    """The sentence about `bad` ones of `count` pairs that were read."""
    first, see = bad[0], f"see {command('check')}"
    reason = ": ".join(filter(None, (first.reason, first.detail)))
    if len(bad) < count:
        most = f"more than {DataConfig.max_bad_fraction:.0%}; the first is {name_of(source, first.index)!r} ({reason})"
        other = f"or pass count={len(source)}, with which none is read here, and raise data.max_bad_fraction"
        return f"{len(bad)} of {count} pairs that were read cannot be used, {most}; {see}, {other}."
    if first.reason in ("caption is empty", "no image in the record"):
        see += ", and for records with features of other names the recipe's arguments image=NAME,text=NAME"
    return f"none of the {count} pairs that were read can be used ({reason}); {see}."


def measure(source: Source, tokens: tokenizer.Tokenizer) -> Counts:
    """Return the counts of a source, of a random part of its pairs.

    Raises:
      UserError: too many of them cannot be used, or all have one caption.
    """
    n = len(source)
    chosen = np.random.default_rng(0).choice(n, min(SAMPLE, n), replace=False)
    samples, _ = inspect.read(source, sorted(chosen.tolist()), os.cpu_count() or 1, 32)
    good = [sample for sample in samples if not sample.reason]
    if len(bad := [sample for sample in samples if sample.reason]) > DataConfig.max_bad_fraction * len(samples):
        raise UserError(_unusable(source, bad, len(samples)))
    captions = [sample.caption for sample in good]
    if len(set(captions)) == 1 < len(good):
        raise UserError(
            f"all {len(good)} captions that were read are {captions[0]!r}: there is nothing to learn; give each "
            "image a caption of its own."
        )
    return Counts(
        n,
        *(int(np.median([sample.size[axis] for sample in good])) for axis in (0, 1)),
        tokens=int(np.percentile(tokens.lengths(tokens(captions, 77)), 95)),
        repeats=inspect.repeated_share(np.array(captions)),
    )


def held_out_share(pairs: int) -> float:
    """Share of the pairs that is held out: a twentieth, more of few and less of very many."""
    least, share, most = HELD_OUT
    return float(f"{min(max(share, least / pairs), most / pairs, LARGEST_SHARE):.2g}")


def tower_preset(pairs: int, machine: Machine) -> str:
    """Preset of the towers: small ones for a CPU, and for few pairs, which larger ones would learn by heart."""
    if machine.platform == "cpu" or pairs < 20_000:
        return "Ti/12"
    return "S/16" if pairs < 2_000_000 else "B/16"


def image_size(preset: str, counts: Counts, machine: Machine) -> int:
    """Side of the images in pixels: at most that of the pairs' own, in whole patches, two at least."""
    patch = int(preset.partition("/")[2])
    most = 224 if not preset.startswith("Ti") else 96 if machine.platform == "cpu" else 144
    side = min(most, min(counts.width, counts.height))
    return max(math.ceil(side / patch), 2) * patch


def batch_size(trained: int, preset: str, machine: Machine) -> int:
    """Pairs of a batch: a power of two with two batches an epoch or more, in equal parts for the devices."""
    most = 256 if machine.platform == "cpu" else {"Ti": 1024, "S": 2048}.get(preset.partition("/")[0], 4096)
    batch = min(2 ** int(math.log2(max(trained // 2, 1))), most)
    return max(batch - batch % machine.devices, machine.devices)


def activation_bytes(config: ml_collections.ConfigDict) -> float:
    """Estimate of the bytes that the towers keep of a pair for the backward pass."""
    img, txt = config.model.img, config.model.txt
    total, width = 0.0, 4 if config.model.dtype == "float32" else 2
    for tower, n in ((img, (img.image_size // img.patch) ** 2 + 1), (txt, txt.context_length)):
        kept = {"none": 20 * tower.width + 3 * tower.heads * n, "dots": 9 * tower.width, "full": tower.width}
        total += tower.depth * n * kept[tower.remat] * width
    return total + 12 * img.image_size**2 * width


def fixed_bytes(config: ml_collections.ConfigDict, machine: Machine) -> float:
    """Estimate of the bytes of a device that microbatches leave as they are: state, gradients, logits of clusters."""
    resolved = schema.resolve(config)
    vocab = tokenizer.load(config.data.tokenizer).vocab_size
    heads = make_objective(resolved.objective).flops(resolved.model, vocab, 0)["heads"]
    parameters = vocab * config.model.txt.width + heads / 2
    parameters += sum(12 * tower.width**2 * tower.depth for tower in (config.model.img, config.model.txt))
    clusters = config.model.cluster_head.clusters if _has_clusters(resolved) else 0
    # Parameters, gradients and two moments; logits of two modalities, their distributions and their gradients.
    return 4 * (4 * parameters + 6 * config.data.batch // machine.devices * clusters)


def microbatches(config: ml_collections.ConfigDict, machine: Machine) -> int:
    """Parts of the batch that are encoded one after another, so that half of the memory that is left will do."""
    devices = machine.devices if machine.platform == "cpu" else 1
    memory = machine.memory / devices
    room = max(memory - fixed_bytes(config, machine), memory / 8) / 2
    each = config.data.batch // machine.devices
    parts = 1
    while each % (2 * parts) == 0 and each / parts * activation_bytes(config) > room:
        parts *= 2
    return parts


def _towers(config: ml_collections.ConfigDict, machine: Machine) -> None:
    model = config.model
    cpu = machine.platform == "cpu"
    model.dtype = "float32" if cpu else "bfloat16"
    small = _is_small(config)
    for tower in (model.img, model.txt):
        tower.scan = not (cpu or small)
        tower.remat = "none" if small or cpu else "dots"


def _is_small(config: ml_collections.ConfigDict) -> bool:
    return config.model.img.width <= 192


def _cluster_head(config: ml_collections.ConfigDict, saved: schema.Config | None, trained: int) -> None:
    """That of the weights where they have one, else of a size by the pairs."""
    if saved is not None and _has_clusters(saved):
        config.model.cluster_head.update(dataclasses.asdict(saved.model.cluster_head))
        return
    clusters = 2 ** round(math.log2(min(max(trained, 256), 32_768)))
    config.model.cluster_head.update({"clusters": clusters, "hidden": min(max(clusters // 2, 256), 4096)})


def _has_clusters(config: schema.Config) -> bool:
    heads = make_objective(config.objective).heads(config.model, vocab=1)  # the vocabulary changes no kind of head
    return any(isinstance(head, Head) and isinstance(head.module, ClusterHead) for head in heads.values())


def _schedule(config: ml_collections.ConfigDict, machine: Machine, trained: int, epochs: float, steps: int) -> None:
    """Set steps and all that follows from them, from `steps` or `epochs` where one is not 0."""
    batch, asked = config.data.batch, bool(epochs or steps)
    pretrained = bool(config.init.weights)
    usual = min(max(30_000 / trained, 25), 100) / (5 if pretrained else 1)
    steps = steps or max(round(trained * (epochs or usual) / batch), 2)
    config.steps = steps
    # Weights of another package may not count their FLOPs.
    if machine.platform == "cpu" and not asked and (step := flops.train_step(schema.resolve(config))):
        affordable = int(LONGEST * CORE * machine.cores / step)
        steps = min(steps, max(affordable, trained // batch, 2))
    config.steps = steps
    config.optim.lr = 2e-5 if pretrained else 1e-3 if config.model.img.width < 768 else 5e-4
    config.optim.lr_start = config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1
    config.optim.warmup = min(max(trained // batch, 1) * 2, steps // 10)
    if not pretrained and _is_small(config):
        lr, share, most, least = SMALL_TOWERS
        config.optim.warmup = max(config.optim.warmup, round(share * min(steps, most)))
        config.optim.lr = float(f"{lr * min(math.sqrt(batch / 256), max(config.optim.warmup, 1) / least, 1):.3g}")
    config.log.collapse_warmup_steps = min(config.log.collapse_warmup_steps, max(steps // 2, 1))
    config.eval.every = max(steps // 8, 1)
    # A run of few steps is soon trained again; what is saved is several times the model.
    config.checkpoint.every = max(steps // 10, min(200, steps))
    config.checkpoint.keep = 2
    config.log.every = max(min(20, steps // 20), 1)


def _data(config: ml_collections.ConfigDict, counts: Counts, machine: Machine) -> None:
    data = config.data
    data.spread_duplicate_captions = counts.repeats > 0.02
    data.threads = max(min(machine.cores, 16), 2)
    data.cache = 3.0 * counts.pairs * counts.width * counts.height < min(machine.memory / 8, 2**31)
    data.holdout = held_out_share(counts.pairs)
    config.eval.sets = ("retrieval/holdout",)
    config.eval.batch = min(256, 8 * max(data.batch // 8, machine.devices))
    config.eval.report = True


def without_classes(spec: str, data_dir: str, image_key: str, share: float) -> str:
    """Return why held-out images of a source are not classified by their labels, and the remedy; "" where they are.

    It takes one label an image, and held-out images of two classes; those are looked for class by class, so that few
    of many images are read.
    """
    try:
        content = zeroshot_datasets.read_source(spec, data_dir or None, image_key)
    except UserError as error:
        if spec.startswith("folder:"):
            return "no classes: one sub-folder a class would add zero-shot classification"
        return f"no zero-shot classification: {error}"
    if np.ndim(content.labels) != 1:
        return "no zero-shot classification: images have several labels; give each one class"
    if all(re.fullmatch(r"\d+", name) for name in content.classes):
        return "no zero-shot classification: the classes are numbers, which no text describes; name them by words"
    held_out = 0
    for label in range(len(content.classes)):
        places = np.flatnonzero(np.asarray(content.labels) == label)
        held_out += any(holdout.selected(labelled.Chosen(content.images, [i]), share) for i in places)
        if held_out == 2:
            return ""
    what = "the held-out images are all of one class" if held_out else "no labelled image is held out"
    return f"no zero-shot classification: {what}; label more images"


def _open(spec: str, options: SourceOptions) -> Source:
    """As `sources.open_pairs`; a column that is missing is an argument of the recipe, since flags come later."""
    try:
        return sources.open_pairs(spec, options)
    except MissingColumnError as error:
        raise UserError(f"{error.fault}; name its columns, small:pairs=PATH,image=COLUMN,text=COLUMN.") from error


def summary(config: ml_collections.ConfigDict, counts: Counts, preset: str, *, read: bool) -> str:
    """Return the sentence about what was chosen; flags may change it. `read`: whether initial weights were."""
    share, batch, model, weights = config.data.holdout, config.data.batch, config.model, config.init.weights
    epochs = config.steps * batch / max(counts.pairs * (1 - share), 1)
    towers = preset if not weights else f"towers of {weights}{'' if read else ' (not on this machine)'}"
    parts = f" in {config.optim.microbatches} parts" if config.optim.microbatches > 1 else ""
    apart = ": equal captions are kept apart" if counts.repeats < 1 else ""
    repeats = f"; {100 * counts.repeats:.0f} % of captions repeat{apart}"
    return (
        f"small: {counts.pairs:,} pairs, {100 * share:.2g} % of them held out; {config.objective.name}, {towers}, "
        f"{model.img.image_size} px, {model.txt.context_length} tokens, batch {batch}{parts}, {config.steps:,} steps "
        f"({epochs:.3g} epochs){repeats if config.data.spread_duplicate_captions else ''}"
    )


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = common.parse_arg(
        arg, pairs="", weights="", objective="", image="image", text="text", tokenizer="clip", dir="", preset="",
        size=0, batch=0, epochs=0.0, steps=0, count=0, device="",
    )  # fmt: skip
    if not args.pairs:
        raise UserError(
            "the recipe small needs your pairs: --config small:pairs=PATH, a folder of images with .txt files beside "
            "them, a table, tars, or a source such as tfds:NAME/SPLIT."
        )
    if args.device:
        check_choice("config argument device", args.device, ORDINARY)
    if args.steps and args.epochs:
        raise UserError(f"small:steps={args.steps},epochs={args.epochs:g}: give steps or epochs, not both.")
    machine = ORDINARY[args.device] if args.device else this_machine()
    spec = sources.spec_from_path(args.pairs)
    options = SourceOptions(args.dir, args.image, tuple(args.text.split(",")))
    source = None if args.count else _open(spec, options)
    pairs = args.count or len(source or ())
    if pairs < inspect.FEWEST:
        raise UserError(
            f"{args.pairs!r} has {pairs} pairs, too few to learn from: the loss compares the pairs of a batch; give "
            f"{inspect.FEWEST} or more."
        )
    preset = args.preset or tower_preset(pairs, machine)
    config = common.base(args.objective or "clip", preset)
    config.data.tokenizer = args.tokenizer
    saved = common.adopt(config, args.weights) if args.weights else None
    if saved is not None:
        _objective(config, saved, args.objective)
    counts = Counts(pairs) if source is None else measure(source, tokenizer.load(config.data.tokenizer))
    trained = max(round(pairs * (1 - held_out_share(pairs))), 1)
    if saved is None:
        config.model.img.image_size = args.size or image_size(preset, counts, machine)
        config.model.txt.context_length = min(max(8 * math.ceil(counts.tokens / 8), 16), 77)
    elif args.size:
        config.model.img.image_size = args.size
    config.init.weights = args.weights
    config.data.sources, config.data.dir = (spec,), args.dir
    config.data.image_key, config.data.text_keys = options.image_key, tuple(options.text_keys)
    config.data.batch = args.batch or batch_size(trained, preset, machine)
    config.run = f"runs/small-{run_name(spec)}"
    _towers(config, machine)
    _cluster_head(config, saved, trained)
    _data(config, counts, machine)
    note = ""
    if source is not None and sources.has_labels(spec, "image"):
        if reason := without_classes(spec, args.dir, args.image, config.data.holdout):
            note = f" ({reason})"
        else:
            config.eval.sets = (*config.eval.sets, "zeroshot/holdout")
    _schedule(config, machine, trained, args.epochs, args.steps)
    config.optim.microbatches = microbatches(config, machine)
    _print(summary(config, counts, preset, read=saved is not None) + note)
    return config


def run_name(spec: str) -> str:
    """Return a folder's name for the pairs of `spec`: its end and, where that does not tell it from others, a hash."""
    name = re.sub(r"[^\w.-]+", "-", spec.partition(":")[2].rstrip("/*")).strip("-.")
    if 0 < len(name) <= _NAME_LENGTH:
        return name
    digest = hashlib.blake2b(spec.encode(errors="surrogateescape"), digest_size=3).hexdigest()
    return "-".join(filter(None, [name[-_NAME_LENGTH:].strip("-."), digest]))


def _print(line: str) -> None:
    """Not log0: the processes of a run may not have joined yet. Not to stdout: commands print JSON there."""
    print(line, file=sys.stderr)


def _objective(config: ml_collections.ConfigDict, saved: schema.Config, objective: str) -> None:
    """Take over the heads of the weights, and unless it is given the objective."""
    model = dataclasses.asdict(saved.model)
    config.model.update({name: model[name] for name in ("embed", "project_img", "project_bias")})
    config.model.update({name: model[name] for name in ("scale_init", "bias_init")})
    if not objective and saved.objective.name in OBJECTIVES:
        config.objective.name, config.objective.terms = saved.objective.name, dict(saved.objective.terms)
        for term in ("clip", "nclip"):
            config.objective[term].update(dataclasses.asdict(getattr(saved.objective, term)))
    else:
        config.objective.name = objective or "clip"
        config.objective.terms = dict(RECIPES[config.objective.name])
        if "clip" in config.objective.terms:  # SigLIP's weights may be above
            config.model.scale_init = min(config.model.scale_init, Clip.max_scale)
