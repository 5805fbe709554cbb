"""The commit and the command that a run names as its own."""

import subprocess

import pytest
from etils import epath

import xclip_jax
from xclip_jax.core import environment


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package at its top, and an environment that it ignores."""
    git(tmp_path, "init", "-q")
    for package in (tmp_path / "package", tmp_path / ".venv" / "lib" / "package"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_the_commit_is_that_of_the_packages_own_checkout_at_the_start(checkout):
    package, first = epath.Path(checkout / "package"), git(checkout, "rev-parse", "HEAD")
    assert environment.git_commit(package) == first
    git(checkout, "commit", "-qm", "two", "--allow-empty")
    assert environment.git_commit(package) == first  # what runs is of then
    (checkout / "package" / "__init__.py").write_text("x = 1\n")
    environment.git_commit.cache_clear()
    assert environment.git_commit(package) == git(checkout, "rev-parse", "HEAD") + "-dirty"
    # A package in another project's folder is not of its commit.
    assert environment.git_commit(epath.Path(checkout / ".venv" / "lib" / "package")) == "unknown"


def test_versions_are_known_without_an_installation(monkeypatch):
    def missing(name):
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", missing)
    versions = environment.capture()["versions"]
    assert versions["xclip_jax"] == xclip_jax.__version__
    assert versions["jax"] == "unknown"


def test_command_is_as_it_was_typed(monkeypatch):
    monkeypatch.setattr(environment.Parser, "program", "xclip-jax train")
    monkeypatch.setattr(environment.sys, "argv", ["/where/it/is/train.py", "--config", "demo"])
    assert environment.capture()["command"] == "xclip-jax train --config demo"
