"""Fine-tunes a CLIP of open_clip on pairs of another kind in two ways, and mixes each with the given weights.

    pip install '.[demo]' open_clip_torch transformers
    python -m examples.finetune_pairs

Takes a quarter of an hour on two cores. torch first trains a small CLIP on one half of the demo's emoji (animals, food,
things, symbols). It is then fine-tuned on pairs of the other half (people, faces, flags): all weights, or
adapters. The table has recall at 1, text for an image, on pairs that the second half holds out and on
drawings of the first half by other artists, and how far each differs from the given weights, with a 95 % bootstrap
interval. A mix of the first way is exported, and read by open_clip and transformers.
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import xclip_jax
from examples.mix import mix
from xclip_jax.commands.evaluate import evaluate
from xclip_jax.commands.export import export
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import exit_with_message
from xclip_jax.core.outputs import check_folder
from xclip_jax.demo import emoji
from xclip_jax.evaluators import tables
from xclip_jax.parallel import compiler
from xclip_jax.train import trainer

SECOND = ("People & Body", "Smileys & Emotion", "Flags")
# Drawings of things that other artists' drawings show in training.
HELD_OUT = ("test_rendering", "validation_rendering")
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "patch_size": 12, "width": 96, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
}
WAYS = {"all weights": {"optim.lr": 5e-4}, "adapters": {"optim.lr": 2e-3, "finetune.lora.rank": 8}}
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)


def write_pairs(folder: pathlib.Path) -> None:
    """Write the halves as folders of images with captions: first/ and kept/, its held-out drawings, and second/."""
    data = emoji.prepare()
    for split in ("train", *HELD_OUT):
        for i, record in enumerate(data.as_data_source(split)):
            category = record["category"].decode()
            half = "second" if category in SECOND else "first"
            if not category or (half == "second" and split in HELD_OUT):
                continue
            place = folder / ("kept" if split in HELD_OUT else half) / f"{split}-{i:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record["image"]).save(place)
            place.with_suffix(".txt").write_text(record["name"].decode() + "\n")


def train_given(pairs: pathlib.Path, out: pathlib.Path, steps: int, batch: int = 128) -> None:
    """Train open_clip's model by torch on a folder of pairs, and write it as open_clip does."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.model.CLIP(**MODEL)
    side = MODEL["vision_cfg"]["image_size"]
    rng = np.random.default_rng(0)
    files = sorted(pairs.glob("*.png"))
    images = np.stack([np.asarray(Image.open(file).convert("RGB").resize((side + 8, side + 8))) for file in files])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = torch.tensor((images / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    texts = open_clip.tokenize(
        [file.with_suffix(".txt").read_text().strip() for file in files], MODEL["text_cfg"]["context_length"]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    loss_of = open_clip.ClipLoss()
    for step in range(steps):
        rows = torch.tensor(rng.choice(len(files), batch, replace=False))
        top, left = rng.integers(0, 9, 2)
        loss = loss_of(*model(pixels[rows, :, top : top + side, left : left + side], texts[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"torch: step {step}, loss {loss.item():.3f}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, out / "open_clip_model.safetensors")
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": preprocess}))


def finetune(folder: pathlib.Path, way: str, steps: int) -> str:
    """Fine-tune the given weights on the second half in one of `WAYS`, and return the folder of the run."""
    config = load_config(f"small:pairs={folder / 'second'},weights={folder / 'given'},batch=128,steps={steps}")
    config.run = str(folder / way.replace(" ", "-"))
    config.data.holdout, config.eval.sets_at_end, config.eval.every = 0.15, (f"retrieval/{folder / 'kept'}",), 0
    config.eval.report, config.checkpoint.every = False, 0
    config.update_from_flattened_dict(WAYS[way])
    trainer.run(config)
    return config.run


def rows_of(folder: pathlib.Path, way: str, run: str) -> list[str]:
    """Evaluate the mixes of a run on both halves; return the rows of the table."""
    rows = []
    for share in MIXES:
        mix(run, share, f"{run}-mix-{share:g}")
        evaluate(f"{run}-mix-{share:g}", [f"retrieval/holdout@{run}", f"retrieval/{folder / 'kept'}"])
        new, old = tables.compare(f"{run}-mix-0", f"{run}-mix-{share:g}")
        changes = (f"{x['difference']:+.1f} [{x['low']:.1f}, {x['high']:.1f}]" for x in (new, old))
        rows.append(f"| {way} | {share:g} | {new['b']:.1f} | {old['b']:.1f} | {' | '.join(changes)} |")
    return rows


def largest_differences(run: str, folder: pathlib.Path, share: float) -> dict[str, float]:
    """Export a mix; return the largest difference of embeddings between us, open_clip and transformers."""
    import open_clip
    import torch
    import transformers

    images = [Image.open(path) for path in sorted((folder / "kept").glob("*.png"))[:8]]
    texts = ["a red apple", "a grinning face", "the flag of a country"]
    mixed = f"{run}-mix-{share:g}"
    for to in ("open_clip", "hf"):
        shutil.rmtree(folder / f"mix-{to}", ignore_errors=True)
        export(mixed, str(folder / f"mix-{to}"), to=to)
    ours = xclip_jax.load(mixed)
    expected = ours.encode_image(images), ours.encode_text(texts)
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'mix-open_clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder / 'mix-open_clip'}")(texts)
    theirs = transformers.CLIPModel.from_pretrained(str(folder / "mix-hf")).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(str(folder / "mix-hf"))
    words: Any = transformers.AutoTokenizer.from_pretrained(str(folder / "mix-hf"))
    with torch.no_grad():
        pixels = torch.stack([prepare(image.convert("RGB")) for image in images])
        first = model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        batch = words(texts, padding="max_length", truncation=True, return_tensors="pt")
        batch |= processor([image.convert("RGB") for image in images], return_tensors="pt")
        out = theirs(**batch)
    others = {"open_clip": first, "transformers": (out.image_embeds, out.text_embeds)}
    return {
        name: max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip(pair, expected, strict=True))
        for name, pair in others.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--given-steps", type=int, default=1000, help="steps of torch on the first half")
    parser.add_argument("--steps", type=int, default=300, help="steps of fine-tuning")
    parser.add_argument("--folder", default="runs/finetune-pairs", help="where all is written")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.folder)
    compiler.enable_cache()
    if not (folder / "given").exists():
        check_folder("--folder", folder)
        write_pairs(folder)
        train_given(folder / "first", folder / "given", options.given_steps)
    rows = ["| way | mix | new pairs, R@1 | first half, R@1 | change | change |", "|---|---|---|---|---|---|"]
    for i, way in enumerate(WAYS):
        run = finetune(folder, way, options.steps)
        rows += rows_of(folder, way, run)[i > 0 :]  # a mix of 0 is the same for all
    print("\n".join(rows))
    differences = largest_differences(str(folder / "all-weights"), folder, 0.5)
    print(", ".join(f"{name}: embeddings differ by at most {x:.1e}" for name, x in differences.items()))


if __name__ == "__main__":
    with exit_with_message():
        main()
