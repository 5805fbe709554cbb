"""Distillation by stored embeddings: the loss against NumPy, and the way from `embed` to the term."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from examples import distill
from tests.helpers import tiny
from tests.helpers.util import assert_close, central_differences, rows_over
from tests.losses.test_contrastive import embeddings as unit_vectors
from xclip_jax.commands import embed
from xclip_jax.config import load, schema
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import embeddings, sources
from xclip_jax.parallel.sharding import MeshLayout, layout_scope
from xclip_jax.train import build, trainer, weights

pytestmark = pytest.mark.long

TEACHER = "teacher.parquet"


def oracle(z_img, z_txt, scale, t_img, t_txt, teacher_scale):
    """Pair by pair in float64: the mean divergence of images and texts, and how many have the teacher's best match."""
    total, same = 0.0, 0
    for queries, items, t_queries, t_items in ((z_img, z_txt, t_img, t_txt), (z_txt, z_img, t_txt, t_img)):
        for z, t in zip(queries, t_queries, strict=True):
            student, teacher = scale * items @ z, teacher_scale * t_items @ t
            q, p = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (student, teacher))
            total += (p * np.log(p / q)).sum() / len(z_img) / 2
            same += (student.argmax() == teacher.argmax()) / len(z_img) / 2
    return total, same


@pytest.mark.parametrize(("devices", "chunk"), [(1, 0), (8, 0), (1, 4), (8, 8)])
def test_equals_oracle(devices, chunk):
    """The teacher has another size than the student."""
    z, t = unit_vectors(16, 5), unit_vectors(16, 3, seed=1)

    def loss(z_img, z_txt, scale, t_img, t_txt):
        return distill.divergence((z_img, z_txt, scale), (t_img, t_txt, 20.0), chunk)

    arrays = [jnp.asarray(x, jnp.float32) for x in (*z, 7.0, *t)]
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    rows = rows_over(devices)
    arrays = [jax.device_put(x, rows) if x.ndim else x for x in arrays]
    with layout_scope(MeshLayout(rows.mesh, "dp")):
        (value, metrics), grads = step(*arrays)
    expected, same = oracle(*z, 7.0, *t, 20.0)
    assert float(value) == pytest.approx(expected, rel=1e-5) and 0 < same < 1
    assert float(metrics["agree"]) == pytest.approx(same) and float(metrics["loss"]) == float(value)
    assert_close(grads, central_differences(lambda *student: oracle(*student, *t, 20.0)[0], [*z, 7.0]), 3e-5)


def config(run="runs/tiny", size=3, scale=20.0, **changes):
    c = tiny.config("clip", run=run, **changes)
    c.objective.name, c.objective.terms = "distilled", {"clip": 0.25, "distill": 0.75}
    c.objective.plugins = {"distill": {"type": "examples.distill:Distill", "size": size, "scale": scale}}
    return c


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher, pairs in a table with one or two captions each, their embeddings, and the same for other pairs."""
    root = tmp_path_factory.mktemp("distill")
    tiny.untrained(root / "teacher", "clip", noise=0.3)
    folder = tiny.folder(root / "pairs", 40)
    files = sorted(folder.glob("*.png"))
    columns = {"image": [file.read_bytes() for file in files]}
    columns["text"] = [file.with_suffix(".txt").read_text().splitlines() for file in files]
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "pairs.parquet")
    images = f"--images=parquet:{root}/pairs.parquet?image=image&text=text"
    embed.main([f"--checkpoint={root}/teacher", images, "--captions", f"--out={root / TEACHER}"])
    made = embeddings.read(root / TEACHER)
    made["embedding"] = np.roll(made["embedding"], 7, axis=0)
    embeddings.write(root / "rolled.parquet", made)
    return root


def first_loss(root, run, targets, **changes):
    """The divergence in the first step of a student with the teacher's weights."""
    params = weights.load(str(root / "teacher")).variables["params"]
    c = config(
        root / run, 16, float(np.exp(params["log_scale"])), init__weights=str(root / "teacher"), steps=2,
        data__sources=(f"examples.distill:Pairs:{root / targets}@parquet:{root}/pairs.parquet",),
        data__crop_scale=(1.0, 1.0), data__flip_prob=0.0, data__color_jitter=0.0, data__holdout=0.2, **changes,
    )  # fmt: skip
    trainer.run(c)
    return tiny.lines(c.run)[0]["distill/loss"]


def test_a_student_with_the_teachers_weights_has_no_divergence(root):
    """So each image and each drawn caption has its own embedding, also without held-out pairs and in a cache."""
    assert first_loss(root, "same", TEACHER, data__cache=True) < 1e-4
    assert not (root / "same" / "bad_samples.jsonl").exists()
    assert first_loss(root, "rolled", "rolled.parquet") > 0.1


def test_other_targets_are_other_data(root):
    first, other = (sources.open_pairs(f"examples.distill:Pairs:{root / name}@parquet:{root}/pairs.parquet")
                    for name in (TEACHER, "rolled.parquet"))  # fmt: skip
    assert first.fingerprint()["hash"] != other.fingerprint()["hash"]  # by which a run that resumes knows its data
    assert first[3]["image"] == other[3]["image"]


def test_the_recipe_adds_the_term(root):
    arg = f"pairs={root}/pairs.parquet,targets={root / TEACHER},scale=30,size=24,steps=4,batch=8,tokenizer=bytes"
    c = schema.resolve(load.load_config(f"{distill.__file__}:{arg}"))
    assert c.objective.terms == {"clip": 0.25, "distill": 0.75} and c.steps == 4 and c.data.batch == 8
    assert c.objective.term("distill") == distill.Distill(16, 30.0) and c.model.img.image_size == 24
    alone = schema.resolve(load.load_config(f"{distill.__file__}:{arg},objective=nclip"))
    assert alone.objective.terms == {"clip": 0.0, "nclip": 0.25, "distill": 0.75}
    found = build.build(alone).objective.similarities
    assert [similarity.name for similarity in found] == ["embedding", "clusters"]
    with pytest.raises(UserError, match="needs pairs=SOURCE and targets=FILES"):
        load.load_config(f"{distill.__file__}:pairs={root}/pairs.parquet")


def test_embeddings_that_do_not_fit_are_named(root, tmp_path):
    with pytest.raises(
        UserError, match=r"has no image '.*000\.png', nor .* xclip-jax embed --captions --images folder:"
    ):
        distill.Pairs.open(f"{root / TEACHER}@folder:{root}/pairs", sources.SourceOptions())
    with pytest.raises(UserError, match=r"image 'parquet:.*#\d+' has different embeddings"):
        distill.Pairs.open(f"{root}/{{teacher,rolled}}.parquet@parquet:{root}/pairs.parquet", sources.SourceOptions())
    made = embeddings.read(root / TEACHER)
    embeddings.write(tmp_path / "few.parquet", {key: values[:39] for key, values in made.items()})
    few = sources.open_pairs(f"examples.distill:Pairs:{tmp_path}/few.parquet@parquet:{root}/pairs.parquet")
    with pytest.raises(BadSample, match=r"image without target: .*#39"):
        few[39]
    with pytest.raises(BadSample, match=r"text without target: picture 0"):
        few[0]["target_txt"]("picture 0")
