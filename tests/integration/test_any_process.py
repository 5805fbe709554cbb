"""The package in a process of the user's: how it was started, what its streams are, which thread calls."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time

import nbclient
import nbformat
import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.core import errors
from xclip_jax.core.run_folder import RunReader

# Opens so many tars that processes index them, and prints their number of pairs and the first caption.
CODE = """
import sys
from xclip_jax.data.readers.tar import TarSource
def main():
    source = TarSource(sys.argv[1])
    print(len(source), source[0]["text"])
"""
WAYS = {
    "no guard": CODE + "main()",
    "thread": CODE + "import threading\nthread = threading.Thread(target=main)\nthread.start()\nthread.join()",
    "fork": CODE + "import os\npid = os.fork()\nif not pid: main()\nelse: assert os.waitpid(pid, 0)[1] == 0",
    "daemon of multiprocessing": CODE
    + "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=main, daemon=True)\n"
    + "p.start(); p.join()",
    "path changed by the script": "import sys\nsys.path.append('/nowhere')\n" + CODE + "main()",
}


@pytest.fixture
def tars(tmp_path):
    (tmp_path / "tars").mkdir()
    for number in range(8):
        bad_tars.pairs(tmp_path / "tars" / f"{number}.tar", 10 * number, 2)
    return tmp_path / "tars"


def lines(process):
    """The output after the two lines of progress; nothing is written to standard error."""
    first, last, *rest = process.stdout.splitlines()
    assert (first, last[:14], process.stderr) == ("indexing 8 tars, once ...", "indexed 8 tars", "")
    return process.returncode, rest


@pytest.mark.parametrize("way", WAYS)
def test_a_script(way, tars, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WAYS[way])
    process = subprocess.run([sys.executable, script, tars], capture_output=True, text=True)
    assert lines(process) == (0, ["16 ['picture 0']"])


def test_a_notebook(tars):
    cell = nbformat.v4.new_code_cell(f"{CODE}sys.argv[1:] = [{str(tars)!r}]\nmain()")
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell])).execute()
    printed = "".join(output["text"] for output in cell["outputs"])
    assert re.fullmatch(r"indexing 8 tars, once ...\nindexed 8 tars.*\n16 \['picture 0'\]\n", printed)


def test_code_without_a_file(tars):
    code = CODE + "main()"
    command = subprocess.run([sys.executable, "-c", code, tars], capture_output=True, text=True)
    assert lines(command) == (0, ["16 ['picture 0']"])


def test_code_from_standard_input(tars):
    command = subprocess.run([sys.executable, "-", tars], input=CODE + "main()", capture_output=True, text=True)
    assert lines(command) == (0, ["16 ['picture 0']"])


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_streams(closed, tars, tmp_path):
    (tmp_path / "script.py").write_text(CODE + "main()")
    command = f"{sys.executable} {tmp_path}/script.py {tars} {closed}"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert lines(process) == (0, ["16 ['picture 0']"])


def test_a_reader_that_ends_early(tars):
    command = f"{sys.executable} -m xclip_jax.main check '{tars}' | head -1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("indexing 8 tars, once ...\n", "")
    assert process.returncode == errors.EXIT_UNREAD


@pytest.mark.filterwarnings("ignore:.*fork")  # the child becomes another program at once
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(ignored, pairs, tmp_path):
    """The run saves and stops, or goes on if it ignores the signal, as after `disown`."""
    run = RunReader(tmp_path / "run")

    def steps():
        with contextlib.suppress(OSError, ValueError):
            return tiny.lines(run.path)[-1]["step"]
        return 0

    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        command = [sys.executable, "-m", "tests.helpers.faulty_run", str(run.path), pairs, "none", "0", "0", "--"]
        os.execv(sys.executable, command)
    while not steps():
        os.read(terminal, 1 << 16)
    os.close(terminal)
    seen = steps()
    if ignored:
        while steps() < seen + 20:
            time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errors.EXIT_RESUMABLE
    assert run.latest_step() >= seen + 20 * ignored
