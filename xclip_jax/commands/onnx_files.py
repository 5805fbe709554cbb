"""Both towers as ONNX files, for inference without JAX, with preprocessing and tokenizer; docs/formats.md uses them."""

import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.imports import import_extra
from xclip_jax.data.transforms import normalize
from xclip_jax.interop import vocabulary
from xclip_jax.model import unrolled
from xclip_jax.train.weights import Loaded

IMAGE, TEXT, CONFIG = WRITTEN = ("image.onnx", "text.onnx", "onnx_config.json")


def write(loaded: Loaded, folder: epath.Path) -> list[str]:
    """Write towers with projections, computed in fp32; return notes on heads left out, or raise `UserError`."""
    experiment = loaded.experiment
    prepare = experiment.preprocessing
    output = next((s.output for s in experiment.objective.similarities[:1] if not s.is_distribution), "")
    if not output:
        raise UserError(f"objective {experiment.objective.name!r} trains no shared embedding space; use 'safetensors'.")
    model, variables = unrolled(experiment, jax.device_get(loaded.variables))
    constants = jax.tree.map(jnp.asarray, variables)
    scalars: Any = model.apply(constants, None, None, method="project")
    about = {key: value for key, value in dataclasses.asdict(prepare).items() if key not in ("mean", "std")}
    about |= {"length": experiment.context_length} | {key: float(value) for key, value in scalars.items()}

    def embed(tower: str, *inputs: jax.Array | None) -> Any:
        outputs: Any = model.clone(towers=(tower,)).apply(constants, *inputs)
        return outputs[f"{output}_{tower}"]

    def embed_image(images: jax.Array) -> Any:
        return embed("img", normalize(images, prepare.mean, prepare.std), None)

    files = {
        IMAGE: _convert(embed_image, "images", (prepare.size, prepare.size, 3), jnp.uint8),
        TEXT: _convert(lambda tokens: embed("txt", None, tokens), "tokens", (experiment.context_length,), jnp.int32),
        CONFIG: (json.dumps(about, indent=2) + "\n").encode(),
        vocabulary.FILE: vocabulary.complete(experiment.tokenizer, experiment.context_length).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    outputs = {f"{output}_img", f"{output}_txt", *scalars}
    return [f"not exported: {name}" for name, head in model.heads.items() if head.output not in outputs]


def _convert(embed: Callable[[Any], Any], name: str, shape: tuple[int, ...], dtype: Any) -> bytes:
    for package in ("jax2onnx", "onnx_ir"):  # they warn of unused plug-ins and types
        logging.getLogger(package).setLevel(logging.ERROR)
    to_onnx = import_extra("jax2onnx", "onnx", "export --to onnx").to_onnx
    rows = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), *shape), dtype)
    try:
        with jax.disable_jit():  # jax2onnx converts nested functions by internals that JAX 0.12 lacks
            graph = to_onnx(embed, [rows], opset=18, input_names=[name], output_names=["embedding"])
        return graph.SerializeToString()
    except Exception as error:  # of any class, such as for a graph above 2 GiB
        raise UserError(f"jax2onnx cannot convert the tower of {name}: {first_line(error)}.") from error
