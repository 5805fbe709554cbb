"""What is shown and stored of an address."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from xclip_jax.core.errors import EXIT_INTERRUPTED, EXIT_RESUMABLE, exit_with_message, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host.org/a.tar?X-Sig=s&b=c", "https://host.org/a.tar"),
        ("https://token@host/a#part", "https://host/a"),
        ("tar:https://u:p@h/{000..999}.tar?sig=s,https://u:p@g/b.tar?sig=t", "tar:https://h/{000..999}.tar,https://g/b.tar"),
        ("('tar:https://h/a?s=1', \"folder:/b\")", "('tar:https://h/a', \"folder:/b\")"),
        ('{"a": "https://h/a?s=1", "b": 2}', '{"a": "https://h/a", "b": 2}'),
        (r'{"a": "[\"https://u:p@h/a?s=1\"]"}', r'{"a": "[\"https://h/a\"]"}'),
        ("Read https://h/a?s=1. Then (https://h/b?s=it's-a, b).", "Read https://h/a. Then (https://h/b, b)."),
        ("[x](https://h/a?b=c)", "[x](https://h/a)"),
        ("tar:https://h/a?t=a:b,c:d&sig=s,tar:https://h/b", "tar:https://h/a,tar:https://h/b"),
        ("tar:https://h/a?s=1: one is bad", "tar:https://h/a: one is bad"),
        ("simplecache::HTTPS://u:p@h/a?s=1", "simplecache::HTTPS://h/a"),
        ("https://u:p@p:x@h:80/a", "https://h:80/a"),
        ("s3://key:secret@bucket/a?X-Sig=s", "s3://bucket/a"),
        ("gs://bucket/a-??.tar", "gs://bucket/a-??.tar"),
        ("abfs://box@account.host/a/*.tar", "abfs://box@account.host/a/*.tar"),
        ("https://h/team/model@v1/a.tar", "https://h/team/model@v1/a.tar"),
        ("retrieval/csv:https://u:p@h/a.csv?sig=s?image=a&text=b", "retrieval/csv:https://h/a.csv?image=a&text=b"),
        ("retrieval/csv:https://h/a.csv?text=b&sig=s", "retrieval/csv:https://h/a.csv"),
        ("hf:org/name/train?image=a", "hf:org/name/train?image=a"),
        ("me@host.org asks: why?", "me@host.org asks: why?"),
        ("Have you seen http://example.com? It is good.", "Have you seen http://example.com? It is good."),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_its_secrets(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_a_long_text_takes_no_long_time():
    """Captions of others are shown so too; a quadratic form took 20 to 70 s for four times the length."""
    began = time.process_time()
    for text in ("http://" + "a" * 12_000, "http://" * 2_000, "http://x?" + "." * 12_000, "a" * 12_000 + "://"):
        redact(text)
    assert time.process_time() - began < 2


def test_all_texts_of_json_are_shown_so():
    secret = "https://u:p@h/a?s=1"
    content = {secret: [secret, (secret, 1, None)], "n": {"b": secret}}
    assert redact(content) == {"https://h/a": ["https://h/a", ("https://h/a", 1, None)], "n": {"b": "https://h/a"}}


def test_a_full_disk_is_one_sentence():
    """An error of writing to an open file does not have its name."""
    message = r"^error: a file, perhaps in /tmp or /dev/shm, cannot be written: No space left on device$"
    with pytest.raises(SystemExit, match=message), exit_with_message():
        pathlib.Path("/dev/full").write_text("x")


ROOT = pathlib.Path(__file__).parents[2]
# All commands import it.
IMPORTS = """
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["xclip-jax", *sys.argv[1:]]
from xclip_jax import main as cli
cli.main()
"""
# In a callback of the garbage collector, as JAX has one, Python drops any exception.
COLLECTS = """
import gc, signal, sys
from xclip_jax.core.errors import end_at_once, exit_with_message
end_at_once()
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
if sys.argv[1] == "before":
    gc.collect()
with exit_with_message():
    gc.collect()
"""
WORKS = """
import signal, sys
from xclip_jax.core.errors import end_at_once, exit_with_message
end_at_once()
with exit_with_message():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as stop:
        print("closed")
        stop.add_note("run the same command to resume")
        raise
"""
# XLA's own threads go on when an exception leaves a compilation.
COMPILES = """
import os, signal, sys, threading
import jax, jax.numpy as jnp
from xclip_jax.processes import runtime as processes
from xclip_jax.processes import interrupt
def long(x):
    for i in range(200):
        x = jnp.sort(jnp.tanh(x @ x + i), axis=0)
    return x
lowered = jax.jit(long).lower(jnp.ones((64, 64)))
with processes.exits(), interrupt.PreemptionHandler() as stop:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if sys.argv[1] == "step":
        lowered.compile()
    stop.can_save = True
    try:
        with stop.interruptible():
            lowered.compile()
    except interrupt.Interrupted:
        sys.exit(75)
print("compiled")
"""


def python(*arguments, **environment):
    line = [sys.executable, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_while_a_command_imports_is_one_sentence(tmp_path):
    """Programs of others, which import the package too, are left alone."""
    for command in ("train", "evaluate"):
        assert python("-c", IMPORTS, command, "nowhere") == (EXIT_INTERRUPTED, "", "error: interrupted\n")
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    (tmp_path / "other.py").write_text("import xclip_jax, numpy")
    status, _, errors = python("-m", "other", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert status and "KeyboardInterrupt" in errors


def test_ctrl_c_in_a_callback_that_drops_exceptions_ends_a_command():
    for place in ("before", "in"):
        assert python("-c", COLLECTS, place) == (EXIT_INTERRUPTED, "", "error: interrupted\n")


def test_ctrl_c_in_the_work_of_a_command_closes_what_is_open():
    expected = "error: interrupted; run the same command to resume\n"
    assert python("-c", WORKS) == (EXIT_INTERRUPTED, "closed\n", expected)


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_a_signal_while_xla_compiles_ends_a_run_with_its_status(place):
    settings = {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    status, output, errors = python("-c", COMPILES, place, **settings)
    assert (status, errors) == (EXIT_RESUMABLE, "")
    assert output.startswith("SIGTERM: ") and "compiled" not in output
