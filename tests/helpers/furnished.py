"""A folder that looks like a checkout and has a stand-in for each thing that commands of the documentation name."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pyarrow.parquet
from PIL import Image

from docs.commands import ROOT
from tests.helpers import fake_cloud, tiny
from tests.helpers.launching import executable

RECIPE = """
from configs import pretrain


def get_config(arg=None):
    return pretrain.get_config(f"data=cc12m,{arg}" if arg else "data=cc12m")
"""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def furnish(room: pathlib.Path) -> None:
    """Write the checkout and the stand-ins."""
    now = _git("-C", str(ROOT), "-c", "user.name=x", "-c", "user.email=x@example.com", "stash", "create") or "HEAD"
    _git("clone", "--quiet", "--shared", str(ROOT), str(room))
    _git("-C", str(room), "checkout", "--quiet", now)
    _git("-C", str(room), "remote", "remove", "origin")
    pairs = tiny.folder(room / "my/pairs", 80)
    for name in ("data/pairs", "pairs", "photos", "Pictures", "data/photos", "shared/pairs", "Images",
                 "Flicker8k_Dataset", "my/shop/photos"):  # fmt: skip
        shutil.copytree(pairs, room / name)
    for split in ("train", "test", "val", "validation"):
        tiny.classes(room / "my/classes" / split)
    shutil.copytree(room / "my/classes", room / "my/images")
    tiny.classes(room / "data/imagenet/val", 1, [str(i) for i in range(1000)])
    _write_tables(room)
    for folder in ("data/cc12m", "my/tars"):
        (room / folder).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(room / folder / f"{shard:05d}.tar", "w") as tar:
                for path in sorted(pairs.iterdir())[80 * shard : 80 * shard + 80]:
                    tar.add(path, path.name)
    for split in ("train", "test"):
        (room / "data/wds" / split).mkdir(parents=True)
        (room / "data/wds" / split / "nshards.txt").write_text("1\n")
        with tarfile.open(room / "data/wds" / split / "0.tar", "w") as tar:
            for path in sorted((room / "my/classes").glob(f"{split}/*/*.png")):
                path.with_suffix(".cls").write_text(str(int(path.parent.name == "dog")))
                for suffix in (".png", ".cls"):
                    tar.add(path.with_suffix(suffix), f"{path.parent.name}{path.stem}{suffix}")
                path.with_suffix(".cls").unlink()
    (room / "data/wds/classnames.txt").write_text("cat\ndog")
    (room / "data/wds/zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    Image.open(pairs / "000.png").save(room / "photos" / "fox.jpg")
    shutil.copy(room / "photos/fox.jpg", room / "data/photos/fox.jpg")
    (room / "mine.py").write_text(RECIPE)
    (room / "my_lab").mkdir()
    shutil.copy(ROOT / "tests/extension/json_lines.py", room / "my_lab")
    (code,) = re.findall(r"```python\n(import jax\n.*?)```", (ROOT / "docs/tracking.md").read_text(), re.DOTALL)
    (room / "my_lab/trace.py").write_text(code)
    for name in ("a", "b"):
        (room / f"{name}.jsonl").write_text("")
    _write_programs(room)
    stand_ins = [line[3:] for line in _git("-C", str(room), "status", "--porcelain").splitlines()]
    (room / ".git/info/exclude").write_text("\n".join(stand_ins) + "\n")  # no files of the checkout to its tools


def _write_programs(room: pathlib.Path) -> None:
    """Write programs that install nothing, and a cloud and a Slurm of shell scripts."""
    (room / "bin").mkdir()
    uv, python = shutil.which("uv"), sys.executable
    executable(room / "bin/pip", f'exec {uv} pip "$@" --dry-run --python {python}')
    venv = room / f".venv-{sys.version_info.major}.{sys.version_info.minor}"
    (venv / "bin").mkdir(parents=True)
    for path in pathlib.Path(python).parent.iterdir():
        (venv / "bin" / path.name).symlink_to(path)
    for name in ("lib", "pyvenv.cfg"):
        (venv / name).symlink_to(pathlib.Path(python).parents[1] / name)
    (venv / "bin/python").unlink()
    executable(venv / "bin/python", f'[ "$1 $2" != "-m pip" ] || exit 0\nexec {python} "$@"')
    executable(room / "bin/sbatch", 'while [[ $1 == --* ]]; do shift; done\nSLURM_JOB_ID=42 exec bash "$@"')
    for name in ("srun", "scontrol"):
        executable(room / "bin" / name, f'echo "{name} $*"')
    (room / "cloud").mkdir()
    born = 'if [[ $* == *queued* ]]; then echo ACTIVE; else echo READY; fi >"$CLOUD/born"\n'
    executable(room / "bin/gcloud", born + fake_cloud.GCLOUD)
    executable(room / "cloud/uv", fake_cloud.UV)
    executable(room / "cloud/python", fake_cloud.PYTHON)
    (room / "cloud/scenario").write_text("echo 'clip: 1,234 parameters, 56 pairs'; sleep 2; finish\n")


def _write_tables(room: pathlib.Path) -> None:
    """Write the stand-ins that are tables."""
    numbers = range(80)
    rows = [f"{i:03d}.png,picture {i},number {i},long {i}" for i in numbers]
    for name, folder, second in (("my/pairs", "pairs", "caption"), ("my/table", "pairs", "caption"),
                                 ("pairs", "photos", "caption"), ("my/shop/pairs", "photos", "title")):  # fmt: skip
        lines = [f"path,{second},alt,synthetic", *(f"{folder}/{row}" for row in rows)]
        (room / f"{name}.csv").write_text("\n".join(lines) + "\n")
    lines = [f"{i:03d}.png,picture {i}" for i in numbers]
    (room / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    (room / "Flickr8k.token.txt").write_text("".join(f"{i:03d}.png#0\tpicture {i}\n" for i in numbers))
    lines = [f"photos/{i:03d}.png,picture {i},no {i},never {i},none {i}" for i in numbers]
    (room / "colours.csv").write_text("\n".join(["image,right,wrong,wrong2,wrong3", *lines]) + "\n")
    contents = [(room / f"photos/{i:03d}.png").read_bytes() for i in numbers]
    columns = {"image": contents, "photo": contents, "text": [f"picture {i}" for i in numbers]}
    table = pyarrow.table(columns | {"title": columns["text"], "kind": ["fox" if i % 2 else "hen" for i in numbers]})
    (room / "data/shop").mkdir()
    for split in ("train", "test", "validation"):
        pyarrow.parquet.write_table(table, room / f"data/shop/{split}-00000.parquet")
        lines = [f"{split}/{name}/{i}.png,{name}" for i in range(10) for name in ("cat", "dog")]
        (room / f"my/classes/{split}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    lines = [json.dumps({"image": f"photos/{i:03d}.png", "text": f"picture {i}"}) for i in numbers]
    (room / "data/pairs.jsonl").write_text("\n".join(lines).replace("photos/", "pairs/") + "\n")
    (room / "data/CoLA").mkdir()
    for name in ("train", "dev"):
        (room / f"data/CoLA/{name}.tsv").write_text("".join(f"x\t{i % 2}\t\tsentence {i}.\n" for i in numbers))
