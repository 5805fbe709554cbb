"""Run the commands of the documentation: python -m tests.helpers.documented LOG [TEXT ...].

Each block of commands runs as one script of bash, in a folder of its own: a clone of this checkout with a stand-in for
each thing of the user's, for clouds and for the Hub. Trainings are shortened. LOG has the output and the exit status of
each command. The last lines count how the commands ended, and why others cannot run.
"""

import collections
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from docs.commands import Block, blocks
from tests.helpers import hub_server
from tests.helpers.furnished import furnish

# What a page writes, and what stands for it in the folder.
STAND_INS = {
    r"wds:(hf:[\w-]+/[\w-]+|/data/wds_own)": "wds:data/wds",
    r"hf:ORG/NAME(?=/|\?)": "parquet:data/shop",
    r"--push ORG/NAME": "--push lab/mine",
    r"ORG/NAME": "lab/NAME",
    r"(?<=label=)(articleType|baseColour|COLUMN)\b": "kind",
    r"tfds:imagenet2012": "folder:my/classes",
    r"gs://my-bucket\b": "gs://bucket",
    r"(?<=check ')tar:gs://bucket/pairs": "data/cc12m",
    r"(?<=utf-8 )FILE": "captions.txt",
    r"/data/(?=\{0|\*\.tar)": "data/cc12m/",
    r"(?<![\w./])/(my|data|shared)\b": r"\1",
    r"\bRUN_B\b": "runs/other",
    r"\bRUN_C\b": "runs/tuned",
    r"\bRUN(_A)?\b|\bTEACHER\b|runs/(teacher|shapes|squares|stuck)\b": "runs/mine",
    r"runs/(clip|other|demo-clip)\b": "runs/other",
    r"runs/(xclip|demo-xclip)\b": "runs/mine",
    r"\bFILE\.py\b": "mine.py",
    r"(swapped_shapes|--out) FOLDER\b": r"\1 made",
    r"\b(RECIPE|CONFIG)\b": "small:pairs=my/pairs",
    r"(folder:|csv:)PATH(?=,(weights|train))": r"\1my/classes",
    r"\b(PATH|PAIRS|(?<!PHOTOGRAPHS=)FOLDER)\b|(?<= )SOURCE\b(?!=)": "my/pairs",
    r"\bSETS\b": "folder:my/classes/test",
    r"hf:laion/[\w-]+|hf:openai/[\w-]+@main": "hf:lab/NAME",
    r"ViT-B-32\.pt": "exported",
    r"imagenet_v2|imagenet_a|coco_retrieval|\bpaper\b|(?<=[= ])imagenet\b(?!/)": "folder:my/classes/test",
    r"probe/cifar10": "probe/folder:my/classes",
    r"\{00000\.\.0\d+\}": "{00000..00001}",
    r"/path/to/chromium": "$(command -v chromium google-chrome)",
    r"PYTHON=python3.13": "PYTHON=python3",
    r"\.\./old-checkout": ".",
    r"--dims 256": "--dims 64",
    r"--nproc_per_node 8": "--nproc_per_node 1",
}
SHORT = {  # flags that end a command within a minute or two
    r"\$FLAGS|runs/negatives": "",
    r"xclip-jax train.*\b(pretrain|mine\.py)|recipe\.py": " --check",
    r"trace:Trace": " --config.steps=121 --config.optim.warmup=0 --config.data.batch=16 --config.eval.sets='()'"
                    " --config.eval.sets_at_end='()'",
    r"xclip-jax train|python -m xclip_jax\.main": " --config.steps=2 --config.optim.warmup=0 --config.eval.sets='()'",
    r"launch/local\.sh.*--config|sbatch": " --config.steps=2 --config.optim.warmup=0",
    r"launch/local\.sh$": " --config demo:steps=2",
    r"launch/test\.sh tests/report": " -k escaped",
    r"xclip-jax plan": " --config.data.batch=64 --config.data.length_groups=full --config.model.img.image_size=32"
                       + "".join(f" --config.model.{x}.{y}" for x in ("img", "txt")
                                 for y in ("depth=1", "width=128", "heads=2")),
    r"examples\.compare_objectives": " --steps 1 --batch 16 --suite emoji/test_aliases",
    r"examples\.study": " --a small:pairs=my/pairs,objective=clip,steps=2 --b small:pairs=my/pairs,steps=2"
                        " --sets folder:my/classes/test --seeds 0,1",
    r"examples\.finetune_pairs": " --given-steps 40 --steps 2",
    r"open_clip_train": " --model ViT-S-32-alt --train-num-samples 8 --batch-size 4 --epochs 1 --workers 1 --warmup 1",
    r"benchmarks\.accelerator": " --small --steps 1",
    r"benchmarks\.beside_open_clip(?!.*--table)": " --pairs my/pairs --seconds 2 --seeds 0 --rates 1e-3 --evaluate",
    r"benchmarks\.guard": " --rounds 2",
    r"benchmarks\.embed": " --images 64 --repeats 1 --layers 1",
    r"benchmarks\.evaluation": " --turns 1",
    r"benchmarks\.loader": " --quick --repeats 1",
    r"benchmarks\.plans": " none",
    r"benchmarks\.probe": " --size small --turns 1",
    r"benchmarks\.serve": " --images 1000 --searches 10",
    r"benchmarks\.step": " --steps 1 --turns 1",
    r"torture\.fuzz": " --inputs 50",
    r"torture\.soak": " --kills 1 --terms 1",
}  # fmt: skip
ENDLESS = re.compile(r"^(?=xclip-jax serve|tensorboard|xprof|bash launch/docs\.sh serve)")
EARLIER = {  # commits that the pages name, which have what is no longer here
    r"studies( |\.|/)(?!photographs|__main__)|studies$|glyphs|benchmarks\.(guard|kernel)": "56d309c8",
}
# Other statuses that pages announce, here of runs that have learned nothing and of too few pairs.
EXPECTED = {r"doctor (runs|RUN|--config pretrain)": "1"}
CANNOT = {
    r"^kubectl|big_vision": "a program that no registry of Python packages has",
    r"^(gcloud|hf auth|wandb sync)": "an account",
    r"^(git (tag|push)|uvx twine)|VERSION|new/bin": "a release",
    r"benchmarks\.int8": "minutes of the TPU compiler",
    r"^tfds build": "a download of data, and TensorFlow",
    r"photographs --run --workers|studies\.glyphs": "a corpus of photographs, or of glyphs",
    r"docs\.pictures CLIP": "two runs of the demo, which the head of docs/pictures.py makes",
    r"helpers\.documented": "this program itself",
    r"\.ci/run|torture\.(faults|disks)|docs\.curves": "ten minutes and more",
}


def _environment(room: pathlib.Path, cache: pathlib.Path, hub: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in ("VENV", "VIRTUAL_ENV", "PYTHON")}
    return found | {
        "HOME": str(room), "PATH": f"{room / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{room}:{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache), "XCLIP_CACHE": str(cache / "xclip_jax"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "CLOUD": str(room / "cloud"), "POLL": "1", "HF_ENDPOINT": hub, "HF_TOKEN": hub_server.TOKEN,
        "HF_HUB_DISABLE_XET": "1", "WANDB_MODE": "offline", "NOTEBOOKS": "false",
        "PYTEST_ADDOPTS": "-k 'needs_a_recipe or test_jobset_has or dry_run or too_many_bad or test_golden'",
    }  # fmt: skip


def _script(block: Block) -> tuple[str, dict[int, str]]:
    """Return a script that prints each command and its status, and the reasons why commands cannot run here."""
    lines, reasons = [], {}
    for number, command in enumerate(block.commands):
        reason = next((reason for pattern, reason in CANNOT.items() if re.search(pattern, command)), "")
        if reason:
            reasons[number] = reason
            continue
        text = command
        for pattern, stand_in in STAND_INS.items():
            text = re.sub(pattern, stand_in, text)
        text += next((flags for pattern, flags in SHORT.items() if re.search(pattern, text)), "")
        text = ENDLESS.sub("timeout --signal=INT 25 ", text)
        commit = next((commit for pattern, commit in EARLIER.items() if re.search(pattern, command)), "")
        if commit:
            lines += [f"git checkout --quiet --force {commit}"]
        lines += ["rm -rf OUT runs/small-* runs/finetune-*"]  # commands of a page may be alternatives
        lines += [f"rm -rf {run}" for run in re.findall(r"train .*--config\.run=(runs/\S+)", text)]
        lines += [f"[ -d {file} ] || rm -f {file}" for file in re.findall(r"--out (\S+\.parquet)", text)]
        lines += [f"echo '@@ {number}'", text, 'echo "@@ status $?"']
    return "\n".join(lines), reasons


def run(block: Block, template: pathlib.Path, cache: pathlib.Path, hub: str) -> list[tuple[str, str, str]]:
    """Run a block; return (command, status or reason, output) of each command."""
    script, reasons = _script(block)
    output = ""
    if script:
        with tempfile.TemporaryDirectory() as folder:
            room = pathlib.Path(shutil.copytree(template, pathlib.Path(folder, "room"), symlinks=True))
            with subprocess.Popen(["bash", "-c", script], cwd=room, env=_environment(room, cache, hub), text=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  start_new_session=True) as process:  # fmt: skip
                try:
                    output, _ = process.communicate(timeout=200 * len(block.commands))
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


def _kind(block: Block, command: str, status: str, output: str) -> str:
    if status == "124":
        return "ran until stopped"
    if any(status == end and re.search(pattern, command) for pattern, end in EXPECTED.items()):
        return f"ended with {status}, as the page says"
    if status != "0" and block.mention and re.search("arguments .*required|is missing|step.hlo", output):
        return "asked for the arguments that a mention leaves out"
    return status if "cannot" in status else f"ended with {status}"


@contextlib.contextmanager
def prepared() -> Iterator[tuple[pathlib.Path, pathlib.Path, str]]:
    """Context of a folder with runs and stand-ins, a cache, and the address of a Hub with one model."""
    first = ["small:pairs=my/pairs,objective=xclip,steps=3 --config.run=runs/mine",
             "small:pairs=my/pairs,objective=clip,steps=3 --config.run=runs/other",
             "small:pairs=my/pairs,steps=3,weights=runs/other --config.run=runs/tuned"]  # fmt: skip
    commands = [f"xclip-jax train --config {spec}" for spec in first]
    commands += ["xclip-jax check folder:data/pairs --samples 0 --by runs/other --suspects suspects.jsonl",
                 "xclip-jax export --checkpoint runs/other --to open_clip exported"]  # fmt: skip
    commands += [f"xclip-jax evaluate --checkpoint runs/{x} --suite folder:my/classes/test" for x in ("mine", "other")]
    with tempfile.TemporaryDirectory() as folder, hub_server.serve() as hub:
        template, cache = pathlib.Path(folder, "room"), pathlib.Path(folder, "cache")
        furnish(template)
        done = subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=template, capture_output=True, text=True,
                              env=_environment(template, cache, hub.url))  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr + done.stdout)
        hub.add("lab/NAME", template / "exported")
        hub.add("pixparse/cc3m-wds", {"cc3m-train-0000.tar": (template / "data/cc12m/00000.tar").read_bytes()})
        yield template, cache, hub.url


def main(log: str, words: list[str]) -> None:
    """Run the blocks whose place or commands have one of the words; print one line for each command."""
    counts: collections.Counter[str] = collections.Counter()
    with prepared() as room, open(log, "a") as file:
        for block in blocks():
            if words and not any(word in f"{block.place} {' '.join(block.commands)}" for word in words):
                continue
            start = time.monotonic()
            for command, status, output in run(block, *room):
                counts["found"] += 1
                counts[_kind(block, command, status, output)] += 1
                print(f"{status:<10} {block.place}  {command}", flush=True)
                file.write(f"### {status} {block.place}  {command}\n{output}\n")
                file.flush()
            print(f"           {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(f"{count} {name}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
