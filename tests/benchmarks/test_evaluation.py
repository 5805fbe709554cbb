import os
import subprocess
import sys

from benchmarks import evaluation


def test_memory_is_read_on_linux_and_macos(monkeypatch):
    asked = []
    monkeypatch.setattr(subprocess, "check_output", lambda command: asked.append(command) or b"  20480\n")
    sizes = []
    for platform in {"darwin", sys.platform}:
        monkeypatch.setattr(sys, "platform", platform)
        sizes.append(evaluation.resident())
    assert 20 << 20 in sizes and min(sizes) > 10 << 20
    assert asked == [["ps", "-o", "rss=", "-p", str(os.getpid())]]
