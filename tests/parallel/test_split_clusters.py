import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.helpers import tiny
from tests.parallel.test_sharding import assert_same, gradients, make
from xclip_jax.parallel.mesh import AXES
from xclip_jax.train import build
from xclip_jax.train.build import make_encoder

pytestmark = pytest.mark.long

HIDDEN, CLUSTERS = 40, 64
HEAD = {"clusters": CLUSTERS, "hidden": HIDDEN, "layers": 1}
TEACHER = {"objective__nclip__target": "ema", "objective__nclip__shuffle_targets": True}
LAYERS = {"objective__nclip__target": "joint", "head": HEAD | {"layers": 2}}


def experiment(mesh=None, *, head=HEAD, **changes):
    return make("xclip", mesh, model__cluster_head=head, **changes)


@pytest.mark.parametrize(
    ("mesh", "loss", "way"),
    [
        ("zero1", {}, {}),
        ("fsdp_tp", {}, {"loss__chunk_size": 16, "optim__microbatches": 2}),
        pytest.param("dp", TEACHER, {"loss__chunk_size": 8, "optim__microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("fsdp", LAYERS, {}, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_of_one_device(mesh, loss, way):
    p = experiment(mesh, **loss, **way)
    arrays = [x for x in jax.tree.leaves(p.abstract) if x.shape in ((HIDDEN, CLUSTERS), (CLUSTERS,))]
    # Kernel and bias of both heads with two moments, and their average where that is the teacher.
    assert len(arrays) >= 4 * (4 if loss is TEACHER else 3)
    assert all(x.sharding.spec[-1] == AXES for x in arrays if x.ndim == 2)
    assert_same(gradients(p), gradients(experiment(**loss)))


@pytest.mark.parametrize(
    ("sizes", "batch", "clusters", "split"),
    [
        ((8, 1, 1), 32, 32, True),
        ((8, 1, 1), 40, 32, False),  # more rows than clusters would travel
        ((4, 1, 2), 32, 32, False),  # a device's part of the kernel is half of it
        ((4, 1, 2), 32, 64, True),
        ((2, 4, 1), 32, 60, False),  # 8 do not divide 60
    ],
)
def test_clusters_are_split_where_no_more_is_sent(sizes, batch, clusters, split):
    mesh = dict(zip(AXES, sizes, strict=True))
    config = tiny.config("nclip", data__batch=batch, model__cluster_head=HEAD | {"clusters": clusters})
    config.mesh = mesh | {"strategy": "dp"}
    kernel = build.build(config).abstract.params["clusters_txt"]["clusters"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, AXES if split else "model")


def test_evaluation_reads_split_heads():
    split, one = experiment("dp", eval__batch=16), experiment(None, eval__batch=16)
    texts = ["a dog", "two cats on a mat", "rain"]
    found, expected = (
        make_encoder(p).texts(tiny.drawn(p).variables(), texts, ["cluster_logits"])["cluster_logits"]
        for p in (split, one)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
