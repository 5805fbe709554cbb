"""CyCLIP's consistency (arXiv 2205.14459): a loss on CLIP's embeddings, without heads of its own."""

import dataclasses
from typing import ClassVar

from xclip_jax.objectives import Term


@dataclasses.dataclass(frozen=True)
class Consistency(Term):
    """Similarities change little where images and texts change places: across modalities, and within each."""

    title: ClassVar[str] = "consistency"

    def __call__(self, out, teacher, state, batch, *, chunk=0):
        """See `Term.__call__`."""
        img, txt = out["z_img"], out["z_txt"]
        across, within = img @ txt.T, img @ img.T - txt @ txt.T  # (b, b)
        loss = (((across - across.T) ** 2).sum() + (within**2).sum()) / len(img)
        return loss, {"loss": loss}, {}
