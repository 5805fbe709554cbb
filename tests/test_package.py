"""What an installed package has: the command, recipes by name, files beside the code. tests/test_uv.py installs one."""

import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from absl import logging

import xclip_jax
from xclip_jax import main as cli
from xclip_jax.config import load
from xclip_jax.core.errors import EXIT_UNREAD, Parser, UserError, exit_with_message

ROOT = pathlib.Path(__file__).parents[1]


def python(*arguments, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def command(*arguments, cwd):
    return python("-m", "xclip_jax.main", *arguments, cwd=cwd)


def test_help_names_every_command_and_imports_none(tmp_path):
    code = "import sys; from xclip_jax import main as cli; cli.main(['--help']); print('jax' in sys.modules)"
    done = python("-c", code, cwd=tmp_path)
    *lines, imported = done.stdout.splitlines()
    assert imported == "False" and len(lines) < 16
    assert [line.split()[0] for line in lines[2 : 2 + len(cli.COMMANDS)]] == list(cli.COMMANDS)


def test_command_line_of_a_command(tmp_path):
    done = command("trian", cwd=tmp_path)
    assert done.stderr == "error: unknown command 'trian'; did you mean 'train'? See xclip-jax --help\n"
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert command("--version", cwd=tmp_path).stdout.startswith("xclip_jax 0.")


@pytest.mark.parametrize(("line", "unbuffered"), [("--help", ""), ("--help", "1"), ("train --help", "")])
def test_a_command_whose_output_nobody_reads_ends_quietly(line, unbuffered, tmp_path):
    """As in a pipe to `head`, whether writing fails at once or when the command ends."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "xclip_jax.main", *line.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, cwd=tmp_path, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")


def test_a_pipe_to_another_process_that_breaks_is_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), exit_with_message():
        os.write(writer, b"x")
    os.close(writer)


def test_a_folder_that_cannot_be_written_to_is_one_sentence():
    with pytest.raises(SystemExit) as end, exit_with_message():
        raise OSError(errno.EACCES, "Permission denied", "a/b")
    assert str(end.value) == "error: 'a/b': Permission denied"


def test_recipes_by_name_and_by_path(tmp_path):
    assert set(load.recipes()) == {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
    named = load.load_config("demo:objective=clip,steps=9")
    assert named.to_dict() == load.load_config(f"{ROOT}/configs/demo.py:objective=clip,steps=9").to_dict()
    own = tmp_path / "mine.py"
    own.write_text(
        "from xclip_jax.config.load import load_config\n\n\n"
        "def get_config(arg=None):\n    config = load_config(f'demo:{arg}')\n    config.steps = 7\n    return config\n"
    )
    assert load.load_config(f"{own}:objective=clip").steps == 7
    with pytest.raises(UserError, match="recipe 'pretrian' is unknown; did you mean 'pretrain'"):
        load.load_config("pretrian:data=cc3m")


def test_a_wheel_has_the_same_files_from_the_checkout_and_from_an_sdist(tmp_path):
    """An sdist has the recipes in their own folder alone: `uv build` and `python -m build` make the wheel from it."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # a copy, since setuptools writes into it
    for name in ("xclip_jax", "configs", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def setup(folder, *arguments):
        done = python("setup.py", "-q", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    setup(source, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist", filter="data")
    files = []
    for folder in (source, *(tmp_path / "sdist").iterdir()):
        setup(folder, "build", "--build-base", "built", "--build-lib", "built/lib")
        built = folder / "built" / "lib"
        files.append({path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()})
    recipes = {f"xclip_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert files[0] == files[1] and recipes <= files[0]
    assert {"xclip_jax/py.typed", "xclip_jax/report/search.css"} <= files[0]


def test_readme_is_short_and_its_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    before_the_first_command, *_ = pages[0].read_text().split("```")
    assert len(pages[0].read_text().split()) <= 500 and len(before_the_first_command.split()) <= 80
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page.name}: {target}"


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == xclip_jax.__version__ and citation["license"] == "Apache-2.0"


# Flags of absl can be defined only once in a process.
ABSL = ("train", "plan")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in ABSL])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_help_names_the_program_as_it_was_called(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xclip-jax"])
    logging.set_verbosity(logging.WARNING)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert logging.get_verbosity() == logging.ERROR  # warnings of libraries are not shown
    shown = capsys.readouterr().out
    assert not stopped.value.code and f"usage: xclip-jax {name} " in shown and "python -m" not in shown
    assert Parser.program is None


@pytest.mark.parametrize("name", ABSL)
def test_help_lists_the_flags_of_the_command_and_the_keys_of_a_config(name, tmp_path):
    done = command(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    flags, keys = done.stdout.split("\nkeys of a config")
    assert {"train": "--coordinator:", "plan": "--topology:"}[name] in flags and "--config.optim.lr=" in keys
    assert "--[no]trust:" in flags
