"""Seconds and memory of evaluating given features: our evaluators and clip_benchmark's functions.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.evaluation

Zero-shot classification of 50,000 images by 1,000 classes with 80 templates, and retrieval of 5,000 images and 25,010
captions (COCO's sizes), with random features of 512 numbers: nothing is encoded, so only the work after the encoders is
compared. Each program runs in its own process, the two in turn, --turns times. Prints medians, the peak of resident
memory minus the memory of the features, and finally "zeroshot ratio R" and "retrieval ratio R", our seconds over
clip_benchmark's. Fails if the results differ.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.shared import result_of

WIDTH, IMAGES, CLASSES, TEMPLATES = 512, 50_000, 1000, 80
PROMPTS = {str(c): [str(c * TEMPLATES + t) for t in range(TEMPLATES)] for c in range(CLASSES)}
PAIRED, CAPTIONS = 5000, 25_010
BATCH = 256
PROGRAMS = ("ours", "clip_benchmark")


def normalised(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def features(n: int, seed: int) -> np.ndarray:
    """fp32 (n, WIDTH), rows of unit length."""
    return normalised(np.random.default_rng(seed).standard_normal((n, WIDTH), np.float32))


def data_of(task: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """Features of images and of texts, and labels (n,) or the captions of each image."""
    if task == "zeroshot":
        labels = np.random.default_rng(2).integers(0, CLASSES, IMAGES)
        txt = features(CLASSES * TEMPLATES, 1)
        return normalised(features(IMAGES, 0) + 0.3 * txt[labels * TEMPLATES]), txt, labels
    captions = [list(map(str, part)) for part in np.array_split(np.arange(CAPTIONS), PAIRED)]
    txt = features(CAPTIONS, 1)
    return normalised(features(PAIRED, 0) + 0.2 * txt[[int(c[0]) for c in captions]]), txt, captions


def ours(task: str) -> Callable[[], dict[str, float]]:
    """Return an evaluation by our evaluators, with features instead of towers."""
    from xclip_jax.evaluators.results import flat
    from xclip_jax.evaluators.retrieval import Retrieval, RetrievalSet
    from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
    from xclip_jax.objectives.similarity import CosineSimilarity

    img, txt, labels = data_of(task)

    class Encoder:
        similarities = (CosineSimilarity(),)

        def images(self, variables: Any, images: Any, keys: Any = None) -> dict[str, np.ndarray]:
            return {"embedding": img}

        def texts(self, variables: Any, texts: list[str], keys: Any = None) -> dict[str, np.ndarray]:
            return {"embedding": txt[np.array(texts, int)]}

    encoder: Any = Encoder()
    images = [np.zeros((1, 1, 3), np.uint8)] * len(img)
    if task == "zeroshot":
        evaluator = ZeroShot(encoder, ZeroShotSet("set", images, labels, list(PROMPTS.values())))
        names = {"zeroshot/set/top1": "top1", "zeroshot/set/top5": "top5"}
    else:
        evaluator = Retrieval(encoder, RetrievalSet("set", images, labels))
        names = {f"retrieval/set/{d}/r{k}": f"{d}/r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}

    def run() -> dict[str, float]:
        values = flat(evaluator.measure(None))
        return {name: values[key] for key, name in names.items()}

    return run


def clip_benchmark(task: str) -> Callable[[], dict[str, float]]:
    """Return the same evaluation by clip_benchmark's functions, with a model that returns the features."""
    import torch
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    # Its accuracy converts an array of one number, which NumPy 2.4 refuses.
    zeroshot_classification.float = lambda x: float(np.asarray(x).item())  # ty: ignore[missing-attribute]
    img, txt, labels = data_of(task)
    images = torch.from_numpy(img)
    texts = torch.from_numpy(txt)

    class Model:
        def encode_image(self, x: Any) -> Any:
            return x

        def encode_text(self, x: Any) -> Any:
            return texts[x]

    def tokenizer(words: list[str]) -> Any:
        return torch.tensor([int(word) for word in words])

    def batches(targets: Any) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(images), BATCH):
            yield images[start : start + BATCH], targets[start : start + BATCH]

    def zeroshot() -> dict[str, float]:
        arguments = ("cpu", False)
        classifier = zeroshot_classification.zero_shot_classifier(
            Model(), tokenizer, list(PROMPTS), PROMPTS, *arguments
        )
        loader = list(batches(torch.from_numpy(labels)))
        logits, target = zeroshot_classification.run_classification(Model(), classifier, loader, *arguments)
        top1, top5 = zeroshot_classification.accuracy(logits, target, topk=(1, 5))
        # Its `evaluate` reports the mean over classes too.
        zeroshot_classification.balanced_accuracy_score(target, logits.argmax(axis=1))
        return {"top1": 100 * top1, "top5": 100 * top5}

    def retrieval() -> dict[str, float]:
        loader = list(batches(labels))
        values = zeroshot_retrieval.evaluate(Model(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        names = {"text_retrieval": "image_to_text", "image_retrieval": "text_to_image"}
        return {
            f"{names[key.partition('_recall@')[0]]}/r{key.partition('@')[2]}": 100 * value
            for key, value in values.items()
        }

    return zeroshot if task == "zeroshot" else retrieval


def resident() -> int:
    """Bytes of memory that this process has now."""
    if sys.platform == "darwin":
        return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(program: str, task: str) -> None:
    """Print seconds, bytes and values of one evaluation."""
    run = {"ours": ours, "clip_benchmark": clip_benchmark}[program](task)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resident()  # the peak so far includes making the features
    began = time.perf_counter()
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # progress bars
        values = run()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"seconds": seconds, "bytes": peak - before, "values": values}))


def main() -> None:
    """Print medians, and fail if the two disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(*flags.child)
        return
    ratios = []
    for task in ("zeroshot", "retrieval"):
        measured: dict[str, list[dict[str, Any]]] = {program: [] for program in PROGRAMS}
        for program in PROGRAMS * flags.turns:
            measured[program].append(result_of("evaluation", "--child", program, task) or sys.exit(1))
        medians = {p: statistics.median(x["seconds"] for x in runs) for p, runs in measured.items()}
        for program, runs in measured.items():
            gigabytes = max(x["bytes"] for x in runs) / 2**30
            values = ", ".join(f"{key} {value:.2f}" for key, value in runs[0]["values"].items())
            print(f"{task}, {program}: median {medians[program]:.2f} s, {gigabytes:.2f} GiB; {values}", flush=True)
        a, b = (measured[program][0]["values"] for program in PROGRAMS)
        if any(abs(a[key] - b[key]) > 0.01 for key in a):
            sys.exit(f"{task}: the two disagree")
        ratios.append(f"{task} ratio {medians['ours'] / medians['clip_benchmark']:.3f}")
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
