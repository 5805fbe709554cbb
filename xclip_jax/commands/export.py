"""Export weights of a run or another project in the format of another library.

    xclip-jax export --checkpoint RUN --to hf OUT [--push ORG/NAME]

writes the folder OUT: `hf` for transformers (CLIPModel, with its processor), `open_clip` for open_clip, `onnx` for
onnxruntime (one file per tower), `safetensors` for xclip_jax itself, without losses. Preprocessing and tokenizer are
exported too; if the format cannot store them, the export fails (data.decoding is only reported). README.md is a
model card with the run's data, recipe and results. RUN may also be weights for `xclip_jax.interop`, such as
hf:ORG/NAME. If the run evaluates the moving average of its parameters (eval.ema), the average is exported. --push
finally uploads the files to a repository of the Hugging Face Hub.
"""

from collections.abc import Sequence

import jax

from xclip_jax import interop
from xclip_jax.commands import onnx_files
from xclip_jax.config import schema
from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, check_choice, exit_with_message
from xclip_jax.core.imports import add_trust, trusting
from xclip_jax.core.outputs import check_folder
from xclip_jax.core.storage import write_whole
from xclip_jax.interop import hub
from xclip_jax.report import card
from xclip_jax.train import weights

CARD = "README.md"
FORMATS = (*interop.FORMATS, "onnx")


def export(path: str, out: str, *, to: str = "hf", step: int | None = None, push: str = "") -> None:
    """Write the weights at `path` to the folder `out`, with a model card.

    Args:
      path, step: see `weights.load`.
      out: an empty or new folder.
      to: one of `FORMATS`.
      push: repository "ORG/NAME" of the Hub to upload to, where an earlier export is replaced; "" for none.

    Raises:
      UserError: bad input, or a model that the format does not support.
    """
    check_choice("--to", to, FORMATS)
    folder = check_folder("OUT", out)
    out = str(folder)  # without ~
    if push:
        hub.check_push(push)
    place = hub.locate(path)
    loaded = weights.load(place, step)
    if jax.process_index() == 0:
        if to == "onnx":
            notes = onnx_files.write(loaded, folder)
        else:
            variables = jax.device_get(loaded.variables)
            notes = interop.write(variables, schema.to_dict(loaded.config), out, to, classes=loaded.classes)
        text = card.render(str(place), out, to, loaded, notes, run=place.run, repository=push)
        write_whole(folder / CARD, text)
        for note in notes:
            log0(note)
    log0(f"{path}, step {loaded.step}, as {to}: {out}")
    if push and jax.process_index() == 0:
        names = [file.name for file in folder.iterdir()]
        log0(f"uploaded: {hub.push(out, names, push, obsolete=(*interop.WRITTEN, *onnx_files.WRITTEN))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(prog="xclip-jax export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory, or weights")
    parser.add_argument("--to", default="hf", help=", ".join(FORMATS))
    parser.add_argument("--step", type=int, help="step of a run's checkpoint; the newest by default")
    parser.add_argument("--push", default="", metavar="ORG/NAME", help="repository of the Hub to upload the files to")
    add_trust(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    flags = parser.parse_args(argv)
    with exit_with_message(), trusting(flags.trust):
        export(flags.checkpoint, flags.out, to=flags.to, step=flags.step, push=flags.push)


if __name__ == "__main__":
    main()
