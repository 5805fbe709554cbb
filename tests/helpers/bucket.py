"""A bucket in memory: objects and no folders, under s3://; of gs:// Orbax asks Google."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """The file system that `epath` and fsspec open for s3://.

    Attributes:
      requests: listings and looks at single objects.
      writes: how many objects were written.
      away: whether writes fail.
    """

    protocol = "s3"
    requests: ClassVar[list[str]] = []
    writes, away = 0, False

    def ls(self, path, **options):
        self.requests.append(f"ls {path}")
        return super().ls(path, **options)

    def info(self, path, **options):
        self.requests.append(f"info {path}")
        return super().info(path, **options)

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode="rb", **options):
        if "w" in mode and Bucket.away:
            raise OSError(5, "away")
        Bucket.writes += "w" in mode
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))


def register() -> None:
    """Make it the file system of s3:// in this process; `epath` keeps the first that it opens."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
