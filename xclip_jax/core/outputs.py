"""Where a command may write: in a file or folder that is new, empty or its own, so that no other program's is lost."""

import os
import pathlib
import re
from collections.abc import Callable

from etils import epath

from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import as_path, is_remote

_HEAD = 1 << 16  # bytes of a file in which its mark is searched
_LOGS = (".err", ".log", ".out")  # of the shell or the scheduler that starts a run


def check_file(option: str, path: str | os.PathLike, mark: bytes = rb"(?!)") -> epath.Path:
    """Return the path of an option's output file, whose folder is made, a symbolic link replaced by its target.

    Args:
      option: names the file in errors.
      path: a local path or an address in a bucket.
      mark: regular expression found in the first 64 KiB of an earlier output, which may be replaced; by default none.

    Raises:
      UserError: the file cannot be written, or is not an earlier output.
    """
    file = as_path(path)
    if not is_remote(str(file)):
        file = epath.Path(os.path.realpath(file)) if os.path.islink(file) else file  # messages name it as given
        check_writable(option, file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file) and not os.path.isfile(file):
            kind = "a folder" if os.path.isdir(file) else "no regular file"
            raise UserError(f"{option}: {str(path)!r} is {kind}; name a file.")
    if file.exists():
        with file.open("rb") as content:
            if not re.search(mark, content.read(_HEAD)):
                raise UserError(f"{option}: {str(path)!r} was not written by this command; name another file.")
    return file


def check_folder(option: str, path: str | os.PathLike, is_ours: Callable[[], bool] = lambda: False) -> epath.Path:
    """Return the path of an option's output folder, which is not made.

    Args:
      option: names the folder in errors.
      path: a local path or an address in a bucket.
      is_ours: whether an existing folder is an earlier output, to which files may be added.

    Raises:
      UserError: the folder cannot be written, or is neither new, nor ours, nor empty but for hidden files, logs and
        empty folders.
    """
    folder = as_path(path)
    if not is_remote(str(folder)):
        check_writable(option, folder)
    if folder.exists() and not is_ours():
        for file in sorted(folder.iterdir()):
            if not (file.name.startswith(".") or file.name.endswith(_LOGS) or _is_empty(file)):
                raise UserError(f"{option}: {str(path)!r} has other files, such as {file.name!r}; name a new folder.")
    return folder


def _is_empty(folder: epath.Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def check_writable(option: str, folder: str | os.PathLike) -> None:
    """Raise `UserError` unless files can be written to an option's `folder`, which need not exist yet."""
    parent = pathlib.Path(folder).absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fault = "cannot be written to" if parent.is_dir() else "is not a folder"
        raise UserError(f"{option}: {str(parent)!r} {fault}; name another folder.")
