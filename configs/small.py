"""Your own pairs, from a laptop up: a run sized for the pairs and for this machine.

    xclip-jax train --config small:pairs=/my/pairs
    xclip-jax train --config small:pairs=/my/pairs.csv,image=path,text=caption,weights=hf:ORG/NAME

pairs is a folder of images with .txt files next to them, a table, tars, or any spec of data.sources. A sample of them
decides on towers, image size, context, batch, cluster head, optimizer, learning rate, steps and intervals (`fill_in`).
Then all are read to hold out a share by content and to count equal captions. The held-out pairs are evaluated during
training (retrieval/holdout, and zeroshot/holdout if sub-folders, or a column "label" of some sources, name one class
per image) and shown in RUN/report.html. The run prints its choices, and why it does not classify held-out images.

Keys of the argument, all but pairs optional: weights (initial weights), objective (clip, siglip, nclip, xclip; by
default clip, or the objective of the weights), image and text (columns or features; several captions are
text=title,alt), tokenizer, dir (of TFDS data sets), preset, size (pixels), batch, epochs (0.5 too) or steps, which
decide on warm-up and intervals, count (number of pairs; then none is read), device (cpu, gpu, tpu: sizes for an
ordinary one instead of this machine; required if several processes train).
"""

import dataclasses
import functools
import hashlib
import math
import re

import jax
import ml_collections
import numpy as np

from xclip_jax.config import recipes, schema
from xclip_jax.config.recipes import Describe
from xclip_jax.core import fields
from xclip_jax.core.errors import UserError, check_choice, redact
from xclip_jax.data import holdout, inspect, records, sources, tokenizer
from xclip_jax.data.base import Source, choose, display_name
from xclip_jax.data.config import DataConfig
from xclip_jax.evaluators.sets import classification
from xclip_jax.objectives import RECIPES, make_objective
from xclip_jax.train import cost, weights

ARGUMENTS = {
    "pairs": "", "weights": "", "objective": "", "image": "image", "text": "text", "tokenizer": "", "dir": "",
    "preset": "", "size": 0, "batch": 0, "epochs": 0.0, "steps": 0, "count": 0, "device": "",
}  # fmt: skip
SAMPLE = 512  # pairs to read for their sizes
LEAST_HELD_OUT, MOST_HELD_OUT = 20, 5000  # pairs; the time of scoring grows with their square
HELD_OUT_SHARE, LARGEST_SHARE = 0.05, 0.2
MANY_REPEATS = 0.02  # fraction of pairs that share their captions with another pair
# (Pairs, towers for fewer than these): larger towers would memorise them. A CPU takes the first.
TOWERS = ((20_000, "Ti/12"), (2_000_000, "S/16"), (math.inf, "B/16"))
# {Size of the towers: (largest batch, largest side of the images in pixels)} on an accelerator, and on a CPU.
LIMITS = {"Ti": (1024, 144), "S": (2048, 224)}
LARGEST = (4096, 224)
CPU_LIMITS = {"Ti": (256, 96)}
CPU_LARGEST = (256, 224)
# Captions of at most 8 tokens are names, like those of the icons; longer ones of which a tenth repeat are titles.
NAME_TOKENS, TITLE_REPEATS = 8, 0.1
SMALL_WIDTH = 192  # of the image tower, up to which the studies of small towers decide
FEWEST_CLUSTERS, MOST_OF_SMALL, MOST_CLUSTERS = 256, 1024, 32_768
# FLOP/s of a core, measured with these towers, and the most seconds of a run on a CPU at this speed.
CORE_FLOPS, CPU_SECONDS = 4e10, 1800
# Muon trains small towers from random parameters. (Learning rate at batch 256, warm-up as a fraction of the first
# WARMUP_BASE steps) for CLIP and for other objectives. A warm-up below FULL_RATE_WARMUP lowers the rate in proportion,
# so that it rises no faster than in the search on icons and demo (docs/duel.md, docs/demo.md).
CLIP_RATE, OTHER_RATE = (8e-3, 0.6), (4e-3, 0.5)
WARMUP_BASE, FULL_RATE_WARMUP = 4000, 300
MUON_FLOPS = 300  # per block and step, times width^3: five iterations of three products for each of six matrices


@dataclasses.dataclass(frozen=True)
class Counts:
    """Number of pairs, median sides in pixels, and the 95th percentile of tokens per caption."""

    pairs: int
    width: int = 512
    height: int = 512
    tokens: int = 32


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of a run, with bytes of memory per device, which the devices of a CPU share."""

    platform: str = "cpu"
    devices: int = 1
    memory: float = 8 * 2**30
    cores: int = 4

    @property
    def is_cpu(self) -> bool:
        """Whether the devices are parts of a CPU."""
        return self.platform == "cpu"


ORDINARY = {"cpu": Machine(), "gpu": Machine("gpu", 1, 16 * 2**30, 8), "tpu": Machine("tpu", 1, 16 * 2**30, 8)}


def this_machine() -> Machine:
    """Return this process's devices, with their memory, free or not."""
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Machine(platform, jax.device_count(), cost.device_memory(device), records.cores())


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    args = recipes.parse_arg(arg, **ARGUMENTS)
    if not args.pairs:
        raise UserError(
            "the recipe small needs your pairs: --config small:pairs=PATH, a folder of images with .txt files next "
            "to them, a table, tars, or a source such as tfds:NAME/SPLIT."
        )
    if args.device:
        check_choice("config argument device", args.device, ORDINARY)
    if args.steps and args.epochs:
        raise UserError(f"small:steps={args.steps},epochs={args.epochs:g}: give steps or epochs, not both.")
    config = recipes.base(args.objective or "clip", args.preset or "Ti/12")
    config.init.weights = args.weights
    config.data.sources = (args.pairs,)
    config.data.dir = args.dir
    config.data.image_column = args.image
    config.data.text_columns = tuple(args.text.split(","))
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
    config.optim.lr_end = 0.0
    config.optim.weight_decay = 0.1
    config.eval.sets = ("retrieval/holdout",)
    config.eval.report = True
    config.checkpoint.keep = 2
    return config


def fill_in(config: ml_collections.ConfigDict, arg: str | None = None) -> Describe:
    """Set the keys that depend on the pairs, the weights and this machine; return a function that describes a config.

    Raises:
      UserError: unusable pairs or weights.
    """
    args = recipes.parse_arg(arg, **ARGUMENTS)
    decided = [name for name in ("tokenizer", "preset") if args[name]]
    if args.weights and decided:
        listed = ",".join(f"{name}={args[name]}" for name in ("weights", *decided))
        raise UserError(f"small:{listed}: weights have a tokenizer and towers; leave {' and '.join(decided)} out.")
    machine = ORDINARY[args.device] if args.device else this_machine()
    spec = sources.spec_from_path(args.pairs)
    source = None if args.count else sources.open_pairs(spec, sources.source_options(DataConfig(**config.data)))
    pairs = args.count or len(source or ())
    if pairs < inspect.FEWEST:
        raise UserError(
            f"{args.pairs!r} has {pairs} pairs, too few to learn from: the loss compares the pairs of a batch; give "
            f"{inspect.FEWEST} or more."
        )
    config.run = f"runs/small-{run_name(spec)}"
    config.data.sources = (spec,)
    preset = args.preset or next(name for most, name in TOWERS if machine.is_cpu or pairs < most)
    recipes.set_towers(config, preset)
    saved = weights.adopt(config, args.weights) if args.weights else None
    if saved is not None:
        _adopt_objective(config, saved, args.objective)
    counts = Counts(pairs) if source is None else measure(source, tokenizer.load(config.data.tokenizer))
    share = min(max(HELD_OUT_SHARE, LEAST_HELD_OUT / pairs), MOST_HELD_OUT / pairs, LARGEST_SHARE)
    share = float(f"{share:.2g}")
    trained = max(round(pairs * (1 - share)), 1)
    if saved is None or args.size:
        config.model.img.image_size = args.size or image_size(preset, counts, machine)
    if saved is None:
        config.model.txt.context_length = min(max(8 * math.ceil(counts.tokens / 8), 16), 77)
    config.data.batch = args.batch or batch_size(trained, preset, machine)
    _set_model(config, saved, machine, trained)

    data = config.data
    data.threads = max(min(machine.cores, 16), 2)
    size = 3.0 * pairs * counts.width * counts.height
    data.cache = source is not None and size < min(machine.memory / 8, 2**31)  # else of unknown size
    data.holdout = share
    config.eval.batch = min(256, 8 * max(data.batch // 8, machine.devices))
    note = reason = ""
    if source is not None:  # training needs the same reading of all pairs, and does not repeat it
        known = holdout.find(spec, source, share, DataConfig(**data))
        while not len(known.indices) and share < 0.9:  # the hashes of a few pairs may hold out none
            share = data.holdout = round(share + 0.1, 1)
            known = holdout.find(spec, source, share, DataConfig(**data))
        data.spread_duplicate_captions = known.repeats > MANY_REPEATS
        if saved is None and not args.objective:
            reason = why_clip(counts.tokens, known.repeats)
        if sources.has_labels(spec, "image") and classifies(spec, args.dir, args.image, share):
            config.eval.sets = (*config.eval.sets, "zeroshot/holdout")
        else:
            note = (
                " (evaluated by retrieval, which does not show how well images are named: that needs images of two "
                "classes that are held out, with names)"
            )
    set_schedule(config, machine, trained, args.epochs, args.steps)
    # The number of chips is unknown for `device`; `checks.check_memory` names the key if a batch does not fit.
    config.optim.microbatches = 1 if args.device in ("gpu", "tpu") else microbatches(config, machine)
    return functools.partial(summary, pairs=pairs, note=note, reason=reason)


def run_name(spec: str) -> str:
    """Return a folder's name for the pairs of `spec`, without secrets: the path or, if long, its end and a hash."""
    spec = redact(spec)
    name = re.sub(r"[^\w.-]+", "-", spec.partition(":")[2].rstrip("/*")).strip("-.")
    if 0 < len(name) <= 40:
        return name
    digest = hashlib.blake2b(spec.encode(errors="surrogateescape"), digest_size=3).hexdigest()
    return f"{name[-40:]}-{digest}".strip("-.")


def measure(source: Source, tokens: tokenizer.Tokenizer) -> Counts:
    """Read a random sample of pairs and return their sizes; `UserError` for many bad pairs or a single caption."""
    n = len(source)
    chosen = np.random.default_rng(0).choice(n, min(SAMPLE, n), replace=False)
    samples, _ = inspect.read(source, sorted(chosen.tolist()), records.cores(), 32)
    good = [sample for sample in samples if not sample.reason]
    bad = [sample for sample in samples if sample.reason]
    if not good or len(bad) > DataConfig.max_bad_fraction * len(samples):
        first = f"{display_name(source, bad[0].index)!r} ({bad[0].reason})"
        raise UserError(
            f"{len(bad)} of {len(samples)} pairs that were read cannot be used, the first is {first}; see "
            f"xclip-jax check, or pass count={n}, with which none is read here, and raise data.max_bad_fraction."
        )
    captions = [caption for sample in good for caption in sample.captions]
    if len(set(captions)) == 1 < len(good):
        raise UserError(f"all {len(captions)} captions that were read are {captions[0]!r}: there is nothing to learn.")
    width, height = (int(np.median([sample.size[axis] for sample in good])) for axis in (0, 1))
    return Counts(n, width, height, tokens=int(np.percentile(tokens.lengths(tokens(captions, 77)), 95)))


def why_clip(tokens: int, repeats: float) -> str:
    """Return a remark on the objective clip for captions of a 95th percentile of `tokens`, by docs/verdicts.md.

    `repeats` is the share of pairs whose captions equal those of another pair.
    """
    if tokens <= NAME_TOKENS:
        return "with label smoothing it beats xclip on names like these captions"
    if repeats > TITLE_REPEATS:
        return "on titles like these xclip is not shown to pay, unlike SuperCLIP's tokens in examples/superclip.py"
    return "no study here compared it with xclip on captions like these"


def _limits(preset: str, machine: Machine) -> tuple[int, int]:
    """Return the largest batch and the largest side of the images for the towers of a preset."""
    size = preset.partition("/")[0]
    return CPU_LIMITS.get(size, CPU_LARGEST) if machine.is_cpu else LIMITS.get(size, LARGEST)


def image_size(preset: str, counts: Counts, machine: Machine) -> int:
    """Return the side of the images in pixels: two or more whole patches, at most the pairs' side."""
    patch = int(preset.partition("/")[2])
    side = min(_limits(preset, machine)[1], counts.width, counts.height)
    return max(math.ceil(side / patch), 2) * patch


def batch_size(trained: int, preset: str, machine: Machine) -> int:
    """Return the batch size: a power of two for each device, in all at most half an epoch."""
    batch = min(2 ** int(math.log2(max(trained // 2, 1))), _limits(preset, machine)[0])
    return machine.devices * 2 ** int(math.log2(max(batch // machine.devices, 1)))


def microbatches(config: ml_collections.ConfigDict, machine: Machine) -> int:
    """Return the number of microbatches at which activations take at most a quarter of a device's memory."""
    room = machine.memory / (machine.devices if machine.is_cpu else 1) / 4
    rows = config.data.batch // machine.devices
    parts = 1
    while rows % (2 * parts) == 0 and rows / parts * cost.activation_bytes(config) > room:
        parts *= 2
    return parts


def _is_small(config: ml_collections.ConfigDict) -> bool:
    return config.model.img.width <= SMALL_WIDTH


def _set_model(config: ml_collections.ConfigDict, saved: schema.Config | None, machine: Machine, trained: int) -> None:
    """Set how the towers are computed, and the cluster head: the weights' head, or a linear one.

    A study of small towers chose a linear head (docs/duel.md, "Cheap clusters"), with 1,024 clusters for 71,000 pairs;
    larger towers get more clusters for more pairs.
    """
    model = config.model
    head = model.cluster_head
    plain = machine.is_cpu or _is_small(config)
    model.dtype = "float32" if machine.is_cpu else "bfloat16"
    model.scan = not plain
    for tower in (model.img, model.txt):
        tower.remat = "none" if plain else "dots"
    if saved is not None and cost.cluster_heads(saved):
        head.update(dataclasses.asdict(saved.model.cluster_head))
        return
    most = MOST_OF_SMALL if _is_small(config) else MOST_CLUSTERS
    clusters = 2 ** round(math.log2(min(max(min(trained, 1024), trained / 64, FEWEST_CLUSTERS), most)))
    head.update(clusters=clusters, layers=0, hidden=model.img.width)
    # A custom tower may not report its FLOPs.
    while (cost.heads_share(schema.resolve(config.to_dict() | {"steps": 1})) or 0.0) > cost.HEADS_SHARE:
        if head.clusters <= FEWEST_CLUSTERS:
            break
        head.clusters //= 2


def set_schedule(config: ml_collections.ConfigDict, machine: Machine, trained: int, epochs: float, steps: int) -> None:
    """Set the number of steps, from `steps` or `epochs` if not 0, and the keys that depend on it."""
    batch = config.data.batch
    optim = config.optim
    pretrained = bool(config.init.weights)
    muon = not pretrained and _is_small(config)
    usual = min(max(30_000 / trained, 25), 100) / (5 if pretrained else 1)
    config.steps = steps or max(round(trained * (epochs or usual) / batch), 2)
    if machine.is_cpu and not (epochs or steps):
        flops = cost.step_flops(schema.resolve(config))
        if flops:  # a custom tower may not report them
            towers = (config.model.img, config.model.txt)
            flops += sum(MUON_FLOPS * tower.depth * tower.width**3 for tower in towers) if muon else 0.0
            affordable = int(CPU_SECONDS * CORE_FLOPS * machine.cores / flops)
            config.steps = min(config.steps, max(affordable, trained // batch, 2))
    steps = config.steps
    optim.warmup = min(max(trained // batch, 1) * 2, steps // 10)
    if pretrained:
        optim.lr = 2e-5
    elif muon:
        contrastive = config.objective.name == "clip"
        rate, share = CLIP_RATE if contrastive else OTHER_RATE
        optim.name = "muon"
        optim.warmup = max(optim.warmup, int(share * min(steps, WARMUP_BASE)))
        optim.lr = float(f"{rate * min(math.sqrt(batch / 256), max(optim.warmup, 1) / FULL_RATE_WARMUP, 1):.3g}")
        if contrastive:  # won the same search, but without its label smoothing (docs/photographs.md)
            optim.weight_decay = 0.05
    else:
        optim.lr = 1e-3 if config.model.img.width < 768 else 5e-4
    config.eval.every = max(steps // 8, min(20, steps))  # at `steps` only the last evaluation is left
    # A few steps are soon trained again, and a checkpoint is three times the model.
    config.checkpoint.every = min(max(steps // 10, min(200, steps)), 1000)
    config.log.every = max(min(20, steps // 20), 1)


def classifies(spec: str, data_dir: str, image_column: str, share: float) -> bool:
    """Whether held-out images of a source can be classified: its labels are repeated words, and two are held out."""
    try:
        content = classification.read_source(spec, data_dir, image_column)
    except UserError:
        return False
    captions = 2 * len(np.unique(content.labels)) > len(content.labels)  # rather than classes
    if captions or np.ndim(content.labels) != 1 or all(re.fullmatch(r"\d+", name) for name in content.classes):
        return False
    held_out = 0
    for label in range(len(content.classes)):  # by class, so that few of many images are read
        places = np.flatnonzero(np.asarray(content.labels) == label)
        held_out += any(holdout.selected(choose(content.images, [i]), share) for i in places)
        if held_out == 2:
            return True
    return False


def _adopt_objective(config: ml_collections.ConfigDict, saved: schema.Config, objective: str) -> None:
    """Take over the heads of the weights, and their objective unless `objective` names one."""
    config.model.embed = saved.model.embed
    trained = make_objective(saved.objective)
    if not objective and not trained.labelled:
        config.objective = fields.as_dict(saved.objective)
    else:
        config.objective.name = objective or "clip"
        config.objective.terms = dict(RECIPES[config.objective.name])


def summary(config: ml_collections.ConfigDict, pairs: int, note: str = "", reason: str = "") -> str:
    """Return a sentence about a run of `config` on this number of pairs, with a note, and a reason for clip."""
    share = config.data.holdout
    batch = config.data.batch
    model = config.model
    initial = config.init.weights
    parts = f" in {config.optim.microbatches} parts" if config.optim.microbatches > 1 else ""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.objective.terms.items())
    objective = config.objective.name
    if len(config.objective.terms) > 1:
        objective += f" ({terms})"
    if "nclip" in config.objective.terms:
        objective += f", {model.cluster_head.clusters:,} clusters"
    trained = max(pairs * (1 - share), 1)
    epochs = "epochs without data.drop" if config.data.drop else "epochs"  # steps are chosen before flags are read
    corpora = "drawings of icons"
    if objective == "clip":
        corpora = "icons and photographs"
        objective += f" ({reason}: docs/verdicts.md)" if reason else ""
    tuned = f", tuned on {corpora}" if config.optim.name == "muon" else ""
    return (
        f"small: {pairs:,} pairs, {100 * share:.2g} % of them held out; {objective}, "
        f"{f'towers of {initial}' if initial else recipes.size_of(model)}, {model.img.image_size} px, "
        f"{model.txt.context_length} tokens, batch {batch}{parts}, {config.steps:,} steps "
        f"({config.steps * batch / trained:.3g} {epochs}), {config.optim.name} at {config.optim.lr:g}{tuned}{note}"
    )
