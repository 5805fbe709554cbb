"""Sizes of a run that follow from its pairs, its initial weights and the machine: the recipe `small`."""

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
from xclip_jax.core.errors import UserError, public
from xclip_jax.data import holdout, inspect, labelled, records, sources, tokenizer
from xclip_jax.data.base import MissingColumnError, Source, SourceOptions, name_of
from xclip_jax.data.config import DataConfig
from xclip_jax.evaluators.sets import classification
from xclip_jax.objectives import RECIPES, make_objective
from xclip_jax.train import cost, weights

SAMPLE = 512  # pairs that are read to learn their sizes
HELD_OUT = (20, 0.05, 5000)  # minimum, share and maximum of held-out pairs; scores grow with their square
LARGEST_SHARE = 0.2
MANY_REPEATS = 0.02  # share of the pairs that have the captions of another one
FEWEST_CLUSTERS = 256
# FLOP/s of a core, measured with these towers, and the seconds that a run on a CPU may take at this speed.
CORE_FLOPS, CPU_SECONDS = 4e10, 1800
# Muon trains small towers from random parameters. (Learning rate at batch 256, warm-up as a share of the first
# WARMUP_BASE steps) for CLIP and for other objectives. A warm-up below FULL_RATE_WARMUP lowers the rate in proportion:
# it rises no faster than where it was tuned, on validation of the icons and of the demo (docs/duel.md, docs/demo.md).
CLIP_RATE, OTHER_RATE = (8e-3, 0.6), (4e-3, 0.5)
WARMUP_BASE, FULL_RATE_WARMUP = 4000, 300
MUON_FLOPS = 300  # per block and step, times width^3: five iterations of three products for each of six matrices


@dataclasses.dataclass(frozen=True)
class Counts:
    """Number of pairs, median sides in pixels, tokens of a caption at the 95th percentile."""

    pairs: int
    width: int = 512
    height: int = 512
    tokens: int = 32


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that a run may use. `memory` is in bytes for each device; the devices of a CPU share it."""

    platform: str = "cpu"
    devices: int = 1
    memory: float = 8 * 2**30
    cores: int = 4


ORDINARY = {"cpu": Machine(), "gpu": Machine("gpu", 1, 16 * 2**30, 8), "tpu": Machine("tpu", 1, 16 * 2**30, 8)}


def this_machine() -> Machine:
    """Return the devices of this process, with their whole memory, free or not."""
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Machine(platform, jax.device_count(), cost.device_memory(device), records.cores())


def measure(source: Source, tokens: tokenizer.Tokenizer) -> Counts:
    """Read a random part of a source's pairs and return their sizes.

    Raises:
      UserError: too many pairs cannot be used, or all have the same caption.
    """
    n = len(source)
    chosen = np.random.default_rng(0).choice(n, min(SAMPLE, n), replace=False)
    samples, _ = inspect.read(source, sorted(chosen.tolist()), records.cores(), 32)
    good = [sample for sample in samples if not sample.reason]
    bad = [sample for sample in samples if sample.reason]
    if not good or len(bad) > DataConfig.max_bad_fraction * len(samples):
        first = f"{name_of(source, bad[0].index)!r} ({bad[0].reason})"
        raise UserError(
            f"{len(bad)} of {len(samples)} pairs that were read cannot be used, the first is {first}; see "
            f"xclip-jax check, or pass count={n}, with which none is read here, and raise data.max_bad_fraction."
        )
    captions = [caption for sample in good for caption in sample.captions]
    if len(set(captions)) == 1 < len(good):
        raise UserError(f"all {len(captions)} captions that were read are {captions[0]!r}: there is nothing to learn.")
    return Counts(
        n,
        *(int(np.median([sample.size[axis] for sample in good])) for axis in (0, 1)),
        tokens=int(np.percentile(tokens.lengths(tokens(captions, 77)), 95)),
    )


def held_out_share(pairs: int) -> float:
    """Return the share of the pairs that is held out: a twentieth, more of few pairs and less of very many."""
    least, share, most = HELD_OUT
    return float(f"{min(max(share, least / pairs), most / pairs, LARGEST_SHARE):.2g}")


def tower_preset(pairs: int, machine: Machine) -> str:
    """Return the preset of the towers: small for a CPU, and for few pairs, which larger towers would memorise."""
    if machine.platform == "cpu" or pairs < 20_000:
        return "Ti/12"
    return "S/16" if pairs < 2_000_000 else "B/16"


def image_size(preset: str, counts: Counts, machine: Machine) -> int:
    """Return the side of the images in pixels: whole patches, two or more, and not above the pairs' own side."""
    patch = int(preset.partition("/")[2])
    most = 224 if not preset.startswith("Ti") else 96 if machine.platform == "cpu" else 144
    side = min(most, min(counts.width, counts.height))
    return max(math.ceil(side / patch), 2) * patch


def batch_size(trained: int, preset: str, machine: Machine) -> int:
    """Return the batch size: a power of two, at least two batches an epoch, equal parts for the devices."""
    most = 256 if machine.platform == "cpu" else {"Ti": 1024, "S": 2048}.get(preset.partition("/")[0], 4096)
    batch = min(2 ** int(math.log2(max(trained // 2, 1))), most)
    return max(batch - batch % machine.devices, machine.devices)


def microbatches(config: ml_collections.ConfigDict, machine: Machine) -> int:
    """Return the number of microbatches with which activations take a quarter of a device's memory at most."""
    room = machine.memory / (machine.devices if machine.platform == "cpu" else 1) / 4
    each = config.data.batch // machine.devices
    parts = 1
    while each % (2 * parts) == 0 and each / parts * cost.activation_bytes(config) > room:
        parts *= 2
    return parts


def _is_small(config: ml_collections.ConfigDict) -> bool:
    return config.model.img.width <= 192


def _model(config: ml_collections.ConfigDict, saved: schema.Config | None, machine: Machine, trained: int) -> None:
    """Set how the towers are computed, and the size of the cluster head, which the weights may have."""
    model, cpu = config.model, machine.platform == "cpu"
    plain = cpu or _is_small(config)
    model.dtype = "float32" if cpu else "bfloat16"
    for tower in (model.img, model.txt):
        tower.scan, tower.remat = not plain, "none" if plain else "dots"
    if saved is not None and cost.cluster_heads(saved):
        model.cluster_head.update(dataclasses.asdict(saved.model.cluster_head))
    else:
        _set_clusters(config, trained)


def _set_clusters(config: ml_collections.ConfigDict, trained: int) -> None:
    """Set a linear cluster head, the choice of a study of small towers (docs/duel.md, "Cheap clusters").

    It chose 1,024 clusters on 71,000 pairs; larger towers get more clusters if there are more pairs for each.
    """
    most = 1024 if _is_small(config) else 32_768
    clusters = 2 ** round(math.log2(min(max(min(trained, 1024), trained / 64, FEWEST_CLUSTERS), most)))
    head = config.model.cluster_head
    head.update(clusters=clusters, layers=0, hidden=config.model.img.width)
    # A tower of another package may not count its FLOPs.
    while (cost.heads_share(schema.resolve(config.to_dict() | {"steps": 1})) or 0.0) > cost.HEADS_SHARE:
        if head.clusters <= FEWEST_CLUSTERS:
            break
        head.clusters //= 2


def _schedule(config: ml_collections.ConfigDict, machine: Machine, trained: int, epochs: float, steps: int) -> None:
    """Set the number of steps, from `steps` or `epochs` if one is not 0, and the keys that follow from it."""
    batch, asked = config.data.batch, bool(epochs or steps)
    pretrained = bool(config.init.weights)
    muon = not pretrained and _is_small(config)
    usual = min(max(30_000 / trained, 25), 100) / (5 if pretrained else 1)
    steps = steps or max(round(trained * (epochs or usual) / batch), 2)
    config.steps = steps
    # A tower of another package may not count its FLOPs.
    if machine.platform == "cpu" and not asked and (step := cost.step_flops(schema.resolve(config))):
        towers = (config.model.img, config.model.txt)
        updates = sum(MUON_FLOPS * tower.depth * tower.width**3 for tower in towers) if muon else 0.0
        affordable = int(CPU_SECONDS * CORE_FLOPS * machine.cores / (step + updates))
        steps = min(steps, max(affordable, trained // batch, 2))
    config.steps = steps
    config.optim.lr = 2e-5 if pretrained else 1e-3 if config.model.img.width < 768 else 5e-4
    config.optim.warmup = min(max(trained // batch, 1) * 2, steps // 10)
    if muon:
        _set_muon(config)
    config.eval.every = max(steps // 8, min(20, steps))  # at `steps` only the last evaluation is left
    # A run of few steps is soon trained again, and a checkpoint is three times the model.
    config.checkpoint.every = max(steps // 10, min(200, steps))
    config.log.every = max(min(20, steps // 20), 1)


def _set_muon(config: ml_collections.ConfigDict) -> None:
    """Set the optimizer of small towers from random parameters, and for CLIP what won the same search."""
    optim, contrastive = config.optim, config.objective.name in ("clip", "superclip")
    rate, share = CLIP_RATE if contrastive else OTHER_RATE
    optim.name = "muon"
    optim.warmup = max(optim.warmup, int(share * min(config.steps, WARMUP_BASE)))
    optim.lr = float(
        f"{rate * min(math.sqrt(config.data.batch / 256), max(optim.warmup, 1) / FULL_RATE_WARMUP, 1):.3g}"
    )
    if contrastive:
        optim.weight_decay, config.objective.clip.label_smoothing = 0.05, 0.2


def _data(config: ml_collections.ConfigDict, counts: Counts, machine: Machine, source: Source | None) -> None:
    data = config.data
    data.threads = max(min(machine.cores, 16), 2)
    data.cache = 3.0 * counts.pairs * counts.width * counts.height < min(machine.memory / 8, 2**31)
    data.holdout = held_out_share(counts.pairs)
    if source is not None:  # training needs the same reading of all pairs, and does not repeat it
        pairs = holdout.find(data.sources[0], source, data.holdout, DataConfig(**data))
        data.spread_duplicate_captions = pairs.repeats > MANY_REPEATS
    config.eval.batch = min(256, 8 * max(data.batch // 8, machine.devices))


def classifies(spec: str, data_dir: str, image_key: str, share: float) -> bool:
    """Whether held-out images of a source can be classified: labels are words that repeat, and two are held out."""
    try:
        content = classification.read_source(spec, data_dir or None, image_key)
    except UserError:
        return False
    captions = 2 * len(np.unique(content.labels)) > len(content.labels)  # rather than classes
    if captions or np.ndim(content.labels) != 1 or all(re.fullmatch(r"\d+", name) for name in content.classes):
        return False
    held_out = 0
    for label in range(len(content.classes)):  # one class after the other, which reads few of many images
        places = np.flatnonzero(np.asarray(content.labels) == label)
        held_out += any(holdout.selected(labelled.Chosen(content.images, [i]), share) for i in places)
        if held_out == 2:
            return True
    return False


def _open(spec: str, options: SourceOptions) -> Source:
    """As `sources.open_pairs`; the remedy for a missing column is an argument of the recipe, as flags come later."""
    try:
        return sources.open_pairs(spec, options)
    except MissingColumnError as error:
        raise UserError(f"{error.fault}; name its columns, small:pairs=PATH,image=COLUMN,text=COLUMN.") from error


def summary(config: ml_collections.ConfigDict, pairs: int, note: str = "") -> str:
    """Return a sentence about a run of `config` on this number of pairs, and a note."""
    share, batch, model, initial = config.data.holdout, config.data.batch, config.model, config.init.weights
    parts = f" in {config.optim.microbatches} parts" if config.optim.microbatches > 1 else ""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.objective.terms.items())
    objective = config.objective.name
    if len(config.objective.terms) > 1:
        objective += f" ({terms})"
    if "nclip" in config.objective.terms:
        objective += f", {model.cluster_head.clusters:,} clusters"
    trained = max(pairs * (1 - share), 1)
    tuned = ", tuned on drawings of icons" if config.optim.name == "muon" else ""
    return (
        f"small: {pairs:,} pairs, {100 * share:.2g} % of them held out; {objective}, "
        f"{f'towers of {initial}' if initial else recipes.size_of(model)}, {model.img.image_size} px, "
        f"{model.txt.context_length} tokens, batch {batch}{parts}, {config.steps:,} steps "
        f"({config.steps * batch / trained:.3g} epochs), {config.optim.name} at {config.optim.lr:g}{tuned}{note}"
    )


def fill_in(config: ml_collections.ConfigDict, args: ml_collections.ConfigDict) -> Describe:
    """Choose the sizes of a run on a user's pairs; return a function that describes a config of such a run.

    Args:
      config: from `get_config` of configs/small.py; is changed.
      args: the recipe's arguments.

    Raises:
      UserError: pairs or weights that cannot be used.
    """
    _check_arguments(args)
    machine = ORDINARY[args.device] if args.device else this_machine()
    spec = sources.spec_from_path(args.pairs)
    source = None if args.count else _open(spec, SourceOptions(args.dir, args.image, config.data.text_keys))
    pairs = args.count or len(source or ())
    if pairs < inspect.FEWEST:
        raise UserError(
            f"{args.pairs!r} has {pairs} pairs, too few to learn from: the loss compares the pairs of a batch; give "
            f"{inspect.FEWEST} or more."
        )
    config.run, config.data.sources = f"runs/small-{run_name(spec)}", (spec,)
    preset = args.preset or tower_preset(pairs, machine)
    recipes.set_towers(config, preset)
    saved = weights.adopt(config, args.weights) if args.weights else None
    if saved is not None:
        _adopt_objective(config, saved, args.objective)
    counts = Counts(pairs) if source is None else measure(source, tokenizer.load(config.data.tokenizer))
    trained = max(round(pairs * (1 - held_out_share(pairs))), 1)
    if saved is None or args.size:
        config.model.img.image_size = args.size or image_size(preset, counts, machine)
    if saved is None:
        config.model.txt.context_length = min(max(8 * math.ceil(counts.tokens / 8), 16), 77)
    config.data.batch = args.batch or batch_size(trained, preset, machine)
    _model(config, saved, machine, trained)
    _data(config, counts, machine, source)
    note = ""
    if source is not None and sources.has_labels(spec, "image"):
        if classifies(spec, args.dir, args.image, config.data.holdout):
            config.eval.sets = (*config.eval.sets, "zeroshot/holdout")
        else:
            note = " (no zero-shot classification: it needs images of two classes that are held out, with names)"
    _schedule(config, machine, trained, args.epochs, args.steps)
    # How many chips others will have is not known; `checks.check_memory` names the key where a batch does not fit.
    config.optim.microbatches = 1 if args.device in ("gpu", "tpu") else microbatches(config, machine)
    return functools.partial(summary, pairs=pairs, note=note)


def _check_arguments(args: ml_collections.ConfigDict) -> None:
    """Raise `UserError` for arguments that weights decide on."""
    given = [name for name in ("tokenizer", "preset") if args[name]]
    if args.weights and given:
        listed = ",".join(f"{name}={args[name]}" for name in ("weights", *given))
        raise UserError(f"small:{listed}: weights have a tokenizer and towers; leave {' and '.join(given)} out.")


def run_name(spec: str) -> str:
    """Return a folder's name for the pairs of `spec`: the path or, if it is long, its end and a hash; no secrets."""
    spec = public(spec)
    name = re.sub(r"[^\w.-]+", "-", spec.partition(":")[2].rstrip("/*")).strip("-.")
    if 0 < len(name) <= 40:
        return name
    digest = hashlib.blake2b(spec.encode(errors="surrogateescape"), digest_size=3).hexdigest()
    return f"{name[-40:]}-{digest}".strip("-.")


def _adopt_objective(config: ml_collections.ConfigDict, saved: schema.Config, objective: str) -> None:
    """Take over the heads of the weights, and their objective unless another one is given."""
    config.model.embed = saved.model.embed
    trained = make_objective(saved.objective)
    if not objective and not trained.labelled:
        config.objective.name, config.objective.terms = saved.objective.name, dict(saved.objective.terms)
        config.objective.plugins = {name: dict(plugin) for name, plugin in saved.objective.plugins.items()}
        for term in ("clip", "siglip", "nclip"):
            config.objective[term].update(dataclasses.asdict(getattr(saved.objective, term)))
    else:
        config.objective.name = objective or "clip"
        config.objective.terms = dict(RECIPES[config.objective.name])
