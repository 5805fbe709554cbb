"""Run the commands of the documentation: python -m tests.helpers.documented LOG [TEXT ...].

Each block of commands runs as one script of bash, in a folder of its own that looks like a checkout and has a stand-in
for each thing of the user's. Trainings are shortened. LOG has the output and the exit status of each command.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import pyarrow.parquet
from PIL import Image

from docs.commands import ROOT, Block, blocks
from tests.helpers import tiny
from tests.helpers.launching import executable

LINKS = ("README.md", "LICENSE", "benchmarks", "configs", "examples", "launch", "pyproject.toml", "setup.py", "studies",
         "tests", "xclip_jax")  # fmt: skip
RECIPE = """
from configs import pretrain


def get_config(arg=None):
    return pretrain.get_config(f"data=cc12m,{arg}" if arg else "data=cc12m")
"""
# What a page writes, and what stands for it in the folder.
STAND_INS = {
    r"(?<![\w./])/(my|data|shared)\b": r"\1",
    r"\bRUN(_[ABC])?\b|\bTEACHER\b|runs/(teacher|shapes|squares|stuck)\b": "runs/mine",
    r"runs/(clip|other|demo-clip)\b": "runs/other",
    r"runs/(xclip|demo-xclip)\b": "runs/mine",
    r"\bFILE\.py\b": "mine.py",
    r"\b(RECIPE|CONFIG)\b": "small:pairs=my/pairs",
    r"(?<=folder:|.csv:)PATH(?=,(weights|train))": "my/classes",
    r"\b(PATH|PAIRS|FOLDER)\b|(?<= )SOURCE\b(?!=)": "my/pairs",
    r"\bSETS\b": "folder:my/classes/test",
    r"hf:ORG/NAME\b(?!/|\?)|hf:laion/[\w-]+|hf:openai/[\w-]+@main|ViT-B-32\.pt": "exported",
    r"imagenet_v2|imagenet_a|coco_retrieval|\bpaper\b|(?<==)imagenet\b|(?<= )imagenet\b": "folder:my/classes/test",
    r"probe/cifar10": "probe/folder:my/classes",
    r"\{00000\.\.0\d+\}": "{00000..00001}",
}
SHORT = {  # flags that end a command within a minute or two
    r"xclip-jax train.*\b(pretrain|mine\.py|tfds:|hf:)|main --config studies": " --check",
    r"xclip-jax train|python -m xclip_jax\.main": " --config.steps=2 --config.optim.warmup=0 --config.eval.sets='()'",
    r"examples\.compare_objectives": " --steps 1 --batch 16 --suite emoji/test_aliases",
    r"benchmarks\.accelerator": " --small --steps 1",
    r"benchmarks\.loader": " --quick --repeats 1",
    r"benchmarks\.evaluation": " --turns 1",
    r"tests\.torture\.fuzz": " --inputs 50",
}
CANNOT = {
    r"launch/(test|docs|local)\.sh|\.ci/run|pytest|pre-commit|pictures|docs\.curves": "the suite, site or browser",
    r"torchrun|big_vision|tensorboard|wandb|xprof|kubectl|open_clip_train": "another program, which is not installed",
    r"^git |VERSION|--push|uv venv|old-checkout": "a release, another checkout or an account",
    r"examples\.(study|finetune_pairs|clusters)|benchmarks\.(step|embed|probe|plans|beside)|torture\.(soak|faults)":
        "ten minutes and more",
    r"hf:|wds_|tfds:imagenet|it_\*|clip_benchmark|clip-benchmark|r\.load|imagenet/it": "data of the Hub or of TFDS",
    r"plan |roofline": "minutes of the TPU compiler",
    r"sbatch|SPOT=1|TYPE=|tpu_vm\.sh --config": "a cloud or Slurm: run against their fakes by tests/launch",
    r"LD_PRELOAD|Flickr8k|captions\.txt Images|Images/pairs|photographs --run|^PHOTO": "files of the user's",
    r"studies( |\.|/)(?!photographs)|studies$|glyphs|benchmarks\.(guard|kernel|int8)": "another commit",
}  # fmt: skip


def furnish(room: pathlib.Path) -> None:
    """Write the stand-ins."""
    for name in LINKS:
        (room / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", room / "docs")
    pairs = tiny.folder(room / "my/pairs", 80)
    for name in ("data/pairs", "pairs", "photos", "Pictures", "data/photos", "shared/pairs"):
        shutil.copytree(pairs, room / name)
    shutil.copytree(pairs, room / "my/shop/photos")
    for split in ("train", "test", "val", "validation"):
        tiny.classes(room / "my/classes" / split)
    shutil.copytree(room / "my/classes", room / "my/images")
    _write_tables(room)
    for folder in ("data/cc12m", "my/tars"):
        (room / folder).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(room / folder / f"{shard:05d}.tar", "w") as tar:
                for path in sorted(pairs.iterdir())[80 * shard : 80 * shard + 80]:
                    tar.add(path, path.name)
    Image.open(pairs / "000.png").save(room / "photos" / "fox.jpg")
    shutil.copy(room / "photos/fox.jpg", room / "data/photos/fox.jpg")
    (room / "captions.txt").write_text("a red circle\na blue square\n")
    (room / "mine.py").write_text(RECIPE)
    (room / "my_lab").mkdir()
    shutil.copy(ROOT / "tests/extension/json_lines.py", room / "my_lab")
    (code,) = re.findall(r"```python\n(import jax\n.*?)```", (ROOT / "docs/tracking.md").read_text(), re.DOTALL)
    (room / "my_lab/trace.py").write_text(code)
    (room / "bin").mkdir()
    executable(room / "bin/pip", f'exec {shutil.which("uv")} pip "$@" --dry-run --python "$VENV"')


def _write_tables(room: pathlib.Path) -> None:
    """Write the stand-ins that are tables."""
    numbers = range(80)
    rows = [f"{i:03d}.png,picture {i},number {i},long {i}" for i in numbers]
    for name, folder, second in (("my/pairs", "pairs", "caption"), ("my/table", "pairs", "caption"),
                                 ("pairs", "photos", "caption"), ("my/shop/pairs", "photos", "title")):  # fmt: skip
        lines = [f"path,{second},alt,synthetic", *(f"{folder}/{row}" for row in rows)]
        (room / f"{name}.csv").write_text("\n".join(lines) + "\n")
    lines = [f"photos/{i:03d}.png,picture {i},no {i},never {i},none {i}" for i in numbers]
    (room / "colours.csv").write_text("\n".join(["image,right,wrong,wrong2,wrong3", *lines]) + "\n")
    contents = [(room / f"photos/{i:03d}.png").read_bytes() for i in numbers]
    columns = {"image": contents, "photo": contents, "text": [f"picture {i}" for i in numbers]}
    table = pyarrow.table(columns | {"title": columns["text"], "kind": ["fox" if i % 2 else "hen" for i in numbers]})
    (room / "data/shop").mkdir()
    for split in ("train", "test", "validation"):
        pyarrow.parquet.write_table(table, room / f"data/shop/{split}-00000.parquet")
        lines = [f"{split}/{name}/{i}.png,{name}" for i in range(10) for name in ("cat", "dog")]
        (room / f"my/classes/{split}.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    lines = [json.dumps({"image": f"photos/{i:03d}.png", "text": f"picture {i}"}) for i in numbers]
    (room / "data/pairs.jsonl").write_text("\n".join(lines).replace("photos/", "pairs/") + "\n")
    (room / "data/CoLA").mkdir()
    for name in ("train", "dev"):
        (room / f"data/CoLA/{name}.tsv").write_text("".join(f"x\t{i % 2}\t\tsentence {i}.\n" for i in numbers))


def _environment(room: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    venv = pathlib.Path(sys.executable).parent
    return os.environ | {
        "HOME": str(room), "PATH": f"{room / 'bin'}:{venv}:{os.environ['PATH']}", "VENV": str(venv.parent),
        "PYTHONPATH": f"{ROOT}:{room}", "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
    }  # fmt: skip


def _script(block: Block) -> tuple[str, dict[int, str]]:
    """Return a script that prints each command and its status, and the reasons why commands cannot run here."""
    lines, reasons = [], {}
    for number, command in enumerate(block.commands):
        reason = next((reason for pattern, reason in CANNOT.items() if re.search(pattern, command)), "")
        if reason or (block.mention and "--checkpoint" not in command and " export " in command):
            reasons[number] = reason or "a mention without its arguments"
            continue
        text = command
        for pattern, stand_in in STAND_INS.items():
            text = re.sub(pattern, stand_in, text)
        text += next((flags for pattern, flags in SHORT.items() if re.search(pattern, text)), "")
        text = text.replace("xclip-jax serve", "timeout --signal=INT 25 xclip-jax serve")
        lines += [f"echo '@@ {number}'", text, 'echo "@@ status $?"']
    return "\n".join(lines), reasons


def run(block: Block, template: pathlib.Path, cache: pathlib.Path) -> list[tuple[str, str, str]]:
    """Run a block; return (command, status or reason, output) of each command."""
    script, reasons = _script(block)
    output = ""
    if script:
        with tempfile.TemporaryDirectory() as folder:
            room = pathlib.Path(shutil.copytree(template, pathlib.Path(folder, "room"), symlinks=True))
            with subprocess.Popen(["bash", "-c", script], cwd=room, env=_environment(room, cache), text=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  start_new_session=True) as process:  # fmt: skip
                try:
                    output, _ = process.communicate(timeout=240)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    output = process.communicate()[0] + "\n@@ status timeout\n"
    found = {}
    for number, text, status in re.findall(r"^@@ (\d+)\n(.*?)@@ status (\w+)$", output, re.MULTILINE | re.DOTALL):
        found[int(number)] = (status, text)
    return [
        (command, *(found.get(i) or (f"cannot: {reasons.get(i, 'an earlier command did not end')}", "")))
        for i, command in enumerate(block.commands)
    ]


def main(log: str, words: list[str]) -> None:
    """Run the blocks whose place or commands have one of the words; print one line for each command."""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, open(log, "a") as file:
        template, cache = pathlib.Path(folder, "room"), pathlib.Path(folder, "cache")
        template.mkdir()
        furnish(template)
        first = ["small:pairs=my/pairs,objective=xclip,steps=3 --config.run=runs/mine",
                 "small:pairs=my/pairs,objective=clip,steps=3 --config.run=runs/other"]  # fmt: skip
        commands = [f"xclip-jax train --config {spec}" for spec in first]
        commands += ["xclip-jax train --config small:pairs=my/pairs,steps=3,weights=runs/other --config.run=runs/tuned",
                     "xclip-jax check folder:data/pairs --samples 0 --by runs/mine --suspects suspects.jsonl",
                     "xclip-jax export --checkpoint runs/other --to open_clip exported"]  # fmt: skip
        commands += [
            f"xclip-jax evaluate --checkpoint runs/{x} --suite folder:my/classes/test" for x in ("mine", "other")
        ]
        prepared = subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=template, env=_environment(template, cache),
                                  capture_output=True, text=True)  # fmt: skip
        if prepared.returncode:
            sys.exit(prepared.stderr + prepared.stdout)
        for block in blocks():
            if words and not any(word in f"{block.place} {' '.join(block.commands)}" for word in words):
                continue
            start = time.monotonic()
            for command, status, output in run(block, template, cache):
                counts["ran" if status in ("0", "124") else status if "cannot" in status else "failed"] += 1
                print(f"{status:<10} {block.place}  {command}", flush=True)
                file.write(f"### {status} {block.place}  {command}\n{output}\n")
                file.flush()
            print(f"           {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(f"{count} {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
