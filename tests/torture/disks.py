"""Breaks the disk under each stage that writes; a command must end in one sentence, or go on without the file.

    python -m tests.torture.disks           as root, since each try mounts a small file system

A try is a stage and a fault that comes just before the stage writes: the disk is full, files are limited in size (as by
a quota), the folder is read-only, or it is removed. Six more tries have a full /tmp or /dev/shm from the start. The
last line is "N of 40"; the status is 1 if a command ends otherwise.
"""

import contextlib
import functools
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

STAGES = {  # the function that writes, its call before which the fault comes, and the statuses that may follow
    "checkpoint": ("xclip_jax.train.checkpoint:Checkpointer.save", 2, (1,)),
    "metrics": ("xclip_jax.train.log:MetricLogger._write", 3, (1,)),
    "results": ("xclip_jax.train.run_writer:RunWriter.write_results", 1, (1,)),
    "report": ("xclip_jax.report.page:render", 1, (0,)),
    "index": ("xclip_jax.data.readers.tar_index:_store", 1, (1,)),
    "compiled": ("xclip_jax.train.build:build", 1, (0,)),
    "embeddings": ("xclip_jax.data.embeddings:write", 1, (1,)),
    "export": ("xclip_jax.interop:write", 1, (1,)),
    "log": ("xclip_jax.train.log:MetricLogger._write", 2, (1,)),
}
PLACES = ("/tmp", "/dev/shm")  # full from the start
MOST = 5  # lines of an error


def fill(place: pathlib.Path) -> None:
    """Take all space that is left."""
    with contextlib.suppress(OSError), open(place / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def limit(_: pathlib.Path) -> None:
    """Let no file grow beyond 128 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 7, resource.RLIM_INFINITY))


def close(place: pathlib.Path) -> None:
    """Cover the file system with itself, read-only; open files stay writable."""
    subprocess.run(["mount", "--bind", "-o", "ro", place, place], check=True)


def remove(place: pathlib.Path) -> None:
    """Remove what is in the file system."""
    for path in place.iterdir():
        shutil.rmtree(path, ignore_errors=True)


FAULTS: dict[str, Callable[[pathlib.Path], None]] = {
    "full": fill, "limited": limit, "read-only": close, "removed": remove,
}  # fmt: skip


def tries() -> list[tuple[str, str]]:
    """Return all pairs of stage and fault; removing or closing a folder does not affect an open log."""
    all_faults = [(stage, fault) for stage in STAGES for fault in FAULTS]
    rest = [(stage, place) for stage in ("metrics", "index", "embeddings") for place in PLACES]
    return [pair for pair in all_faults if pair not in (("log", "read-only"), ("log", "removed"))] + rest


def child(stage: str, fault: str, place: pathlib.Path, run: str, data: pathlib.Path) -> None:
    """Run the stage's command in this process; `run` is a complete run for commands that read one."""
    from tests.helpers import tiny
    from xclip_jax.commands import check, embed, export
    from xclip_jax.core.errors import end_at_once, exit_with_message
    from xclip_jax.parallel import compiler
    from xclip_jax.processes import runtime
    from xclip_jax.report import page
    from xclip_jax.train import trainer

    end_at_once()
    name, call, _ = STAGES[stage]
    if fault in FAULTS:
        _before(name, call, lambda: FAULTS[fault](place))
    if stage == "index":
        os.environ["XCLIP_CACHE"] = str(place / "cache")
        for number in range(2, 8 if fault in FAULTS else 2):
            (place / "tars" / f"{number}.tar").unlink()  # so few are indexed in this process
        check.main([str(place / "tars")])
    elif stage == "embeddings":
        embed.main(["--checkpoint", run, "--images", str(data / "pairs"), "--out", str(place / "out" / "x.parquet")])
    elif stage == "export":
        export.main(["--checkpoint", run, "--to", "safetensors", str(place / "out")])
    else:
        os.environ["XCLIP_CACHE"] = str(place / "cache" if stage == "compiled" else data / "cache")
        folder = data / f"compiled-{fault}" if stage == "compiled" else place / "run"
        with runtime.exits(), exit_with_message():
            compiler.enable_cache()
            sets = {"eval__sets": (f"retrieval/{data / 'pairs'}",)}
            config = tiny.short(data / "pairs", folder, **sets, eval__report=True, steps=6)
            trainer.run(config, [page.ReportWriter()])


def _before(name: str, call: int, fault: Callable[[], None]) -> None:
    module, _, path = name.partition(":")
    *owner, last = path.split(".")
    __import__(module)
    place = functools.reduce(getattr, owner, sys.modules[module])
    function, calls = getattr(place, last), []

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == call:
            fault()
        return function(*args, **options)

    setattr(place, last, counted)


def fault_of(stage: str, fault: str, run: str, data: pathlib.Path) -> str:
    """Make one try; return what a user would object to, or ""."""
    from xclip_jax.core.run_folder import RunReader
    from xclip_jax.train import checkpoint_files

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        place = pathlib.Path(folder)
        command = [sys.executable, "-m", "tests.torture.disks", "--try", stage, fault, folder, run, str(data)]
        if fault in PLACES:
            inside = f"mount -t tmpfs -o size=4k tmpfs {fault}; head -c 8192 /dev/zero > {fault}/fill 2>/dev/null"
            command = ["unshare", "--mount", "sh", "-c", f'{inside}; exec "$@"', "sh", *command]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
        try:
            shutil.copytree(data / "tars", place / "tars")
            with open(place / "log", "w") if stage == "log" else contextlib.nullcontext(subprocess.PIPE) as output:
                process = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
            lines = process.stderr.splitlines()
            errors = [line for line in lines if line.startswith("error: ")]
            allowed = (0, 1) if fault in (*PLACES, "removed") else STAGES[stage][2]
            faults = []
            if process.returncode not in allowed:
                faults.append(f"status {process.returncode}")
            if len(lines) > MOST or len(errors) != process.returncode:
                faults.append(f"{len(lines)} lines, {len(errors)} of them errors: {lines[-1:]}")
            checkpoints = RunReader(place / "run").checkpoints
            steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
            if steps and (damage := checkpoint_files.find_fault(checkpoints / str(max(steps)), max(steps))):
                faults.append(f"checkpoint {max(steps)}: {damage}")
            said = (errors or (process.stdout or "").splitlines() or [""])[-1]
            print(f"{stage:<11} {fault:<9} status {process.returncode}  {'; '.join(faults) or said}", flush=True)
            return "; ".join(faults)
        finally:
            while not subprocess.run(["umount", folder], capture_output=True).returncode:
                pass


def main(chosen: list[str]) -> int:
    """Make the tries of the `chosen` stages, by default all."""
    from tests.helpers import bad_tars, tiny
    from xclip_jax.train import trainer

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        data = pathlib.Path(folder)
        tiny.folder(data / "pairs")
        (data / "tars").mkdir()
        for number in range(8):
            bad_tars.pairs(data / "tars" / f"{number}.tar", 10 * number, 2)
        trainer.run(tiny.short(data / "pairs", data / "run"))
        pairs = [pair for pair in tries() if not chosen or pair[0] in chosen]
        failed = sum(bool(fault_of(*pair, str(data / "run"), data)) for pair in pairs)
    print(f"{len(pairs) - failed} of {len(pairs)}")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--try"]:
        child(sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]), sys.argv[5], pathlib.Path(sys.argv[6]))
    else:
        sys.exit(main(sys.argv[1:]))
