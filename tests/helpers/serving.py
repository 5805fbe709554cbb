"""The search page's command in a process of its own, and its answers over real sockets."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest


@contextlib.contextmanager
def served(run, pictures, cache):
    """The address at which the command serves the pictures, and its process."""
    line = [
        sys.executable,
        "-m",
        "xclip_jax.commands.serve",
        str(run),
        "--images",
        str(pictures),
        "--cache",
        str(cache),
    ]
    process = subprocess.Popen([*line, "--port", "0"], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        for printed in process.stdout:
            if "http://" in printed:
                yield f"http://{printed.partition('http://')[2].split()[0]}/", process
                break
        else:
            pytest.fail("the command ended without an address")
    finally:
        process.terminate()
        process.wait(timeout=30)


def connect(address):
    """A connection to the server at `address`, a URL."""
    url = urllib.parse.urlsplit(address)
    return socket.create_connection((url.hostname, url.port), timeout=20)


def get(address, data=None, timeout=60):
    """(status, body, seconds) of a request; a POST where there are `data`."""
    began = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=timeout) as answer:
            return answer.status, answer.read(), time.monotonic() - began
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), time.monotonic() - began
