"""Icons: CLIP on 87,000 drawings, for recorded runs; the code of these data is at the commit in docs/icons.md."""

import ml_collections

from xclip_jax.config import recipes


def get_config(_: str | None = None) -> ml_collections.ConfigDict:
    """Return the config without evaluation sets."""
    config = recipes.base("clip", "Ti/12")
    config.model.dtype = "float32"  # on a CPU
    config.model.img.image_size = 36
    config.model.txt.context_length = 16
    config.model.scan = False
    config.model.cluster_head = {"clusters": 1024, "hidden": 1024, "layers": 1}

    config.optim.lr_end = 0.0
    config.data.sources = ("studies.icons.sources:IconSplits:train",)
    config.data.batch = 256
    config.data.text_columns = ("name", "aliases")
    config.data.spread_duplicate_captions = True  # "calendar" has over a hundred drawings
    config.data.caption_transform = "studies.icons.sources:add_category:category"
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "bicubic"  # smoother than "area" where pictures change little in size
    config.data.color_jitter = 0.2
    config.data.flip_prob = 0.0  # left and right are words here
    config.data.threads = 1  # more of them wait for each other: decoded images leave Python little to do
    config.data.cache = True  # some 0.9 GB; to read and decode a batch takes a fifth of its step on two cores
    return config
