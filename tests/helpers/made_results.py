"""Results as evaluators make them, and the lines of results.jsonl that have them."""

from xclip_jax.core.storage import strict_json
from xclip_jax.evaluators.results import Provenance, Result, to_json


def zero_shot(name, top1=57.5, top5=100.0, *, n=8, ways=4, role="", family="zeroshot"):
    """Results of a set with `ways` classes; `top5` None for results without it."""
    shared = {"set": name, "family": family, "protocol": Provenance(role=role)}
    values = {"top1": top1} | ({} if top5 is None else {"top5": top5})
    results = [
        Result(metric=key, value=x, n=n, chance=100 * min(int(key[3:]) / ways, 1), headline=key == "top1", **shared)
        for key, x in values.items()
    ]
    return results + [Result(metric=key, value=x, unit="", **shared) for key, x in (("n", n), ("ways", ways))]


RECALLS = tuple(f"{way}/r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))


def retrieval(name, values=(61.0, 65.0, 61.0, 65.0), chance=(5.0, 23.04, 5.0, 25.0), *, images=20, captions=100):
    """Results of a retrieval set: R@1 and R@5 of texts for an image, then of images for a text."""
    counts = {"images": images, "captions": captions}
    results = [Result(name, "retrieval", key, count, unit="") for key, count in counts.items()]
    for key, value, level in zip(RECALLS, values, chance, strict=True):
        n = counts["captions" if key.startswith("text") else "images"]
        results.append(Result(name, "retrieval", key, value, n=n, chance=level, headline=key == RECALLS[0]))
    return results


def entry(name="zeroshot/x", **changes):
    """An entry of evaluation.json, with changes."""
    fields = {"set": "x", "name": name, "metric": "top1", "value": 50.0, "checkpoint": "run", "step": 1}
    fields |= {"profile": "openai", "changes": {}, "fingerprint": "1"} | changes
    record = {"set": fields["set"], "family": "zeroshot", "metric": fields["metric"], "value": fields["value"]}
    return {"records": [record | {"headline": True}]} | fields


def lines(evaluations):
    """Text of results.jsonl for [(step, results)]."""
    return "".join(strict_json({"step": step, "records": to_json(results)}) + "\n" for step, results in evaluations)
