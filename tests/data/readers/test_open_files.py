"""The limit of open files, in processes of their own, since it stays raised."""

import subprocess
import sys

import pytest

from tests.helpers import bad_tars

BEGIN = """
import os, resource, sys
from xclip_jax.data.readers import open_files
from xclip_jax.data.readers.tar_source import TarSource
from xclip_jax.core.errors import UserError
free, hard = map(int, sys.argv[2:])
soft = len(os.listdir("/dev/fd")) + free
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft + hard))
"""
READ = """
source = TarSource(sys.argv[1])
assert [source[i]["text"] for i in range(len(source))] and len(source) == 60
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft
"""
REFUSED = """
try:
    TarSource(sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    for i in range(60):
        bad_tars.pairs(root / f"{i:02d}.tar", i, 1)
    return root


def run(script, tars, monkeypatch, free, hard):
    monkeypatch.setenv("XCLIP_CACHE", str(tars / "cache"))
    command = [sys.executable, "-c", BEGIN + script, str(tars), str(free), str(hard)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_more_tars_than_the_limit_of_open_files_are_read(tars, monkeypatch):
    run(READ, tars, monkeypatch, free=40, hard=4000)


def test_where_the_limit_cannot_be_raised_the_remedy_is_named(tars, monkeypatch):
    out = run(REFUSED, tars, monkeypatch, free=40, hard=100)
    assert "60 tars need about" in out and "raise that limit (ulimit -Hn" in out
