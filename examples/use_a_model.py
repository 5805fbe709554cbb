"""Uses a trained model: embeddings of images and texts, zero-shot labels, and clusters.

    python -m examples.use_a_model runs/demo-xclip photos/*.jpg --classes fox,hen,owl

Takes seconds, mostly for compilation. The model is a run's folder or weights that `xclip_jax.load` reads. If you have
none, bash launch/local.sh makes one in five to ten minutes on two cores.
"""

import argparse
from collections.abc import Sequence

import xclip_jax
from xclip_jax.core.errors import exit_with_message

TEXTS = ("a photo of an animal", "a drawing of a face", "something to eat", "the flag of a country")


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of a run, or weights")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--classes", default="fox,hen,owl", help="names, with commas between them")
    options = parser.parse_args(argv)
    model = xclip_jax.load(options.model)

    # Rows of unit length: their product is the cosine.
    z_img = model.encode_image(options.images)
    z_txt = model.encode_text(TEXTS)
    print(f"embeddings of {z_img.shape[1]} numbers")
    for path, row in zip(options.images, z_img @ z_txt.T, strict=True):
        print(f"{path}: " + ", ".join(f"{text} {cosine:.2f}" for text, cosine in zip(TEXTS, row, strict=True)))

    result = model.zero_shot(options.images, options.classes.split(","))
    for path, label, row in zip(options.images, result.labels, result.probabilities, strict=True):
        print(f"{path}: {label} ({row.max():.0%})")

    if model.has_clusters:
        likeliest = model.clusters(options.images, top=3)
        for path, ids, probabilities in zip(options.images, likeliest.ids, likeliest.probabilities, strict=True):
            print(f"{path}: " + ", ".join(f"cluster {i} ({p:.0%})" for i, p in zip(ids, probabilities, strict=True)))


if __name__ == "__main__":
    with exit_with_message():
        main()
