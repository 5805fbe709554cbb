import jax
import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import UserError
from xclip_jax.train import build


def test_text_rows_are_counted_by_device_and_microbatch():
    assert build.build(tiny.config("clip")).text_rows == (tiny.BATCH // 8, 8)
    made = build.build(tiny.config("clip", data__batch=32, optim__microbatches=2), jax.devices()[:4])
    assert made.text_rows == (4, 8) and made.mesh.size == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch": 12}, r"data\.batch=12 cannot be divided over 8 devices"),
        ({"optim__microbatches": 3}, "optim.microbatches"),
        ({"loss__chunk_size": 3}, "loss.chunk_size"),
        ({"mesh__data": 3}, "does not fit 8 devices"),
    ],
)
def test_what_does_not_fit_the_devices_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        build.build(tiny.config("clip", **changes))
