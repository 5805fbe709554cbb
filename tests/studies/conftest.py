"""A small corpus of icons, for tests of its rules and of its sets."""

import pytest

from studies.icons import corpus, package, splits
from tests.studies import icon_package as made


@pytest.fixture(scope="session")
def icon_package(tmp_path_factory):
    """Path of a small package of icon sets, and what pins it."""
    path = tmp_path_factory.mktemp("package") / "icons.tgz"
    return path, made.write(path)


@pytest.fixture(scope="session")
def icon_source(icon_package):
    """What a build of the icons reads of that package."""
    return corpus.Source(*package.read(icon_package[0]), "1.0.0")


@pytest.fixture(scope="session")
def icon_builder(icon_source, tmp_path_factory):
    """The data set that is built from it, with splits of a few concepts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.SIZES.items():
            patch.setattr(splits, name, value)
        return corpus.prepare(tmp_path_factory.mktemp("tfds"), icon_source)
