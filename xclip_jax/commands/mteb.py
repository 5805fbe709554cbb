"""Evaluate a model on tasks of MTEB and MIEB (with images), by the package `mteb` (2.x, the extra `mteb`).

    import mteb, xclip_jax.commands.mteb

    model = xclip_jax.commands.mteb.Model("runs/mine")
    mteb.evaluate(model, mteb.get_tasks(tasks=["STS12", "CIFAR10ZeroShot", "Flickr30kT2IRetrieval"]))

`mteb` fetches data, computes scores and caches results.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from xclip_jax import model as inference
from xclip_jax.core.imports import import_extra
from xclip_jax.interop import hub

__all__ = ["Model"]


class Model:
    """An `mteb.EncoderProtocol`: dense embeddings of texts and images, compared by cosine.

    Prompts and instructions of tasks are ignored. An item with text and image gets the sum of both unit embeddings.

    Attributes:
      model: the `xclip_jax.model.Model`.
      mteb_model_meta: `mteb.ModelMeta`. Its revision is a checksum of weights, tokenizer and preprocessing, and
        the number of kept dimensions: `mteb` caches results by name and revision.
    """

    def __init__(self, model: inference.Model | str | os.PathLike, *, step: int | None = None, batch: int = 32) -> None:
        """Use `model`, a path or repository that `xclip_jax.load` loads with `step` and `batch`, or its result.

        `UserError` if `mteb` is not installed, or the model cannot be loaded.
        """
        meta = import_extra("mteb.models.model_meta", "mteb", "xclip_jax.commands.mteb")
        self.model = model if isinstance(model, inference.Model) else inference.load(model, step=step, batch=batch)
        dims = f"-dims{self.model.dims}" if self.model.dims else ""
        self.mteb_model_meta = meta.ModelMeta.create_empty(
            {
                "name": _name(str(self.model.card.get("checkpoint", "model"))),
                "revision": self.model.fingerprint() + dims,
                "n_parameters": self.model.num_parameters,
                "max_tokens": self.model.length,
                "framework": ["JAX"],
                "similarity_fn_name": meta.ScoringFunction.COSINE,
                "use_instructions": False,
                "modalities": ["text", "image"],
            }
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> np.ndarray:
        """Return embeddings, fp32 (items, e).

        Args:
          inputs: batches {"text": strings, "image": Pillow images} with either or both, such as from a `DataLoader`.
          options: other arguments of the protocol, such as `task_metadata` and `prompt_type`; not used.
        """
        encoders = {"text": self.model.encode_text, "image": self.model.encode_image}
        return np.concatenate([sum(encoders[key](batch[key]) for key in encoders if key in batch) for batch in inputs])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return cosines (n, m) of embeddings (n, e) and (m, e), as a torch tensor."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return pairwise cosines (n,) of embeddings (n, e) and (n, e), as a torch tensor."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _name(checkpoint: str) -> str:
    """Return "ORG/NAME" for a repository of the Hub, else "xclip_jax/FOLDER"."""
    if hub.is_hub(checkpoint):
        return hub.repository_of(checkpoint).partition("@")[0]
    return f"xclip_jax/{os.path.basename(os.path.abspath(checkpoint))}"
