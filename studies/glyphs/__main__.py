"""Build the glyphs, unless they are built, and print where they are: python -m studies.glyphs [ROOT]."""

import sys

from studies.glyphs import corpus
from xclip_jax.core.errors import exit_with_message

if __name__ == "__main__":
    with exit_with_message():
        builder = corpus.prepare(sys.argv[1] if sys.argv[1:] else None)
        print(f"{builder.data_path}: " + ", ".join(f"{k} {v.num_examples:,}" for k, v in builder.info.splits.items()))
