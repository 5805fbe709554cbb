"""xCLIP (both losses) pre-training at full size, on your own pairs: ViT-B/16, batch 4096, SLIP's recipe.

    python -m xclip_jax.main --config configs/xclip.py:preset=B/16,batch=4096,pairs=15000000,epochs=25 \\
        --config.data.sources='("folder:PATH",)'

The argument's keys are optional; pairs is the number of yours, since the steps are epochs over it. Written for TPU
pods; no run of this size has been made and no score is claimed.
"""

import ml_collections

from xclip_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """See the module's docstring."""
    return common.pretrain("xclip", arg)
