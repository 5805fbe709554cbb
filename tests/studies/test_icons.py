import collections
import http.server
import io
import json
import threading

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from studies.icons import corpus, drawing, families, names, package, splits
from studies.icons.sources import KIND
from tests.studies import icon_package as fake
from xclip_jax.core.errors import UserError
from xclip_jax.data import sources
from xclip_jax.data.base import SourceOptions

# sha256 of the ids in each split of the small package: other rules, or another renderer, give others.
HASHES = {
    "train": "1f076e45a051f1113f4b653c3fd337f1903630b65dc211dde8cb25d9b3094db3",
    "test_concepts": "de571992b35972c84a507b7316d726a434f99966c994c1398459e2431b0fe643",
    "validation_concepts": "a425244acf6a809b6d5dbf7602021aa1793d3931117b01adce28d8c0c548ec1d",
    "test_rendering": "1f05d51143ce74288a984262f6e2be26eed2dd8355bfa5418cc1e19186c51237",
    "validation_rendering": "e9c6ebda9c0f3616eb0eff56b59ad406697628c758aa07c93eac8e3274d49c6b",
}


@pytest.fixture(scope="session")
def records(icon_builder):
    keep = {"image": tfds.decode.SkipDecoding()}

    def text(value):
        return [item.decode() for item in value] if isinstance(value, (list, np.ndarray)) else value.decode()

    return {
        split: [
            {key: value if key == "image" else text(value) for key, value in record.items()}
            for record in icon_builder.as_data_source(split, decoders=keep)
        ]
        for split in icon_builder.info.splits
    }


@pytest.mark.parametrize(
    ("icon_set", "name", "data", "expected"),
    [
        ("ph", "paw-print-bold", {"suffixes": {"": "", "bold": "Bold"}}, "paw print"),
        (
            "material-symbols",
            "airplane-ticket-outline-rounded",
            {"suffixes": {"outline-rounded": ""}},
            "airplane ticket",
        ),
        ("reicon", "bookmark-square2-duotone", {"suffixes": {"duotone": ""}}, "bookmark square"),
        ("fluent", "bowl-salad-20-regular", {"suffixes": {"20-regular": ""}}, "bowl salad"),
        ("hugeicons", "paint-brush-01", {}, "paint brush"),
        ("ic", "baseline-wifi-off", {"prefixes": {"baseline": ""}}, "wifi off"),
        ("ri", "chart-line", {}, "chart line"),
        ("keyline", "star-two-tone", {}, "star"),
        ("ci", "outline", {}, "outline"),
        ("icon-park", "tree-two", {}, "tree"),
        ("tabler", "tree-two", {}, "tree two"),
        ("streamline-pixel", "interface-essential-note-music", {}, "note music"),
        ("tabler", "device-24px", {}, "device"),
    ],
)
def test_captions(icon_set, name, data, expected):
    assert names.caption(name, icon_set, data) == expected


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("paw print", True),
        ("t shirt", True),
        ("x ray", True),
        ("file x", True),
        ("circle", True),
        ("brand figma", False),
        ("github circle", False),
        ("square letter k", False),
        ("number one", False),
        ("a b", False),
        ("2k", False),
        ("ratio 169 by 10", False),
        ("big red round house on hill", False),
        ("pneumonoultramicroscopic", False),
        ("", False),
    ],
)
def test_what_is_a_caption(text, valid):
    assert names.is_caption(text) == valid


def test_concepts_ignore_order_and_number():
    assert names.concept("arrow circle left") == names.concept("circle arrow left") == "arrow-circle-left"
    assert names.concept("stars") == "star" and names.concept("batteries") == "battery"
    assert names.concept("boxes") == "box" and names.concept("bus") == "bus"
    assert names.concept("glass") == names.concept("glasses")


def test_brands_are_not_things():
    assert names.brands(["acmegram", "target", "red target"], ["target", "horse"]) == {"acmegram"}


def test_families():
    assert {families.family(s) for s in ("mdi", "ic", "material-symbols-light")} == {"material"}
    assert families.family("streamline-flex-color") == families.family("covid") == "streamline"
    assert families.family("tabler") == "tabler"


def test_reading(icon_source):
    by_id = {icon.id: icon for icon in icon_source.icons}
    assert icon_source.counts["hidden"] == icon_source.counts["in a category of brands"] == 1
    assert icon_source.counts["animated or with text"] == icon_source.counts["called as a brand is"] == 1
    assert icon_source.counts["without a caption"] == 3  # circle x, brand acme, and six words
    assert "game-icons/target" in by_id and not any(i.startswith(("simple-icons/", "protected/")) for i in by_id)
    assert by_id["pitfalls/sun-outline-rounded"].caption == by_id["pitfalls/sun-02"].caption == "sun"
    assert by_id["pitfalls/stars"].concept == by_id["twin/round-stars"].concept == "star"
    # An alias of an alias is one; a mirrored picture is another picture; plurals and sizes are the same concept.
    assert not by_id["pitfalls/t-shirt"].aliases
    assert by_id["pitfalls/console"].aliases == ["terminal", "shell"]
    assert by_id["pitfalls/sun-filled"].categories == ["sky weather"] and not by_id["pitfalls/console"].categories
    assert by_id["pitfalls/wide"].box == (0, 0, 48, 12)
    entry = next(entry for entry in icon_source.sets if entry["set"] == "twin")
    assert entry["licence"] == "CC-BY-4.0" and entry["author"] == "Twin's author" and entry["address"]


def decode(picture):
    return np.asarray(PIL.Image.open(io.BytesIO(picture.png)))


def test_drawing():
    wide = decode(drawing.draw('<rect width="48" height="12" fill="currentColor"/>', (0, 0, 48, 12)))
    assert wide.shape == (64, 64, 3) and (wide[:20] == 255).all() and (wide[26:38, 2:-2] == 0).all()
    red = decode(drawing.draw('<rect width="24" height="24" fill="#f00"/>', (0, 0, 24, 24)))
    assert (red == [255, 0, 0]).all()
    assert drawing.draw("<g/>", (0, 0, 24, 24)).ink == 0
    assert drawing.draw("<path d='", (0, 0, 24, 24)).ink == 0
    pair = [(fake.picture("a"), (0, 0, 24, 24)), (fake.picture("b"), (0, 0, 24, 24))]
    assert drawing.draw_all(pair) == [drawing.draw(*each) for each in pair]


def signature(body, size=24):
    return np.frombuffer(drawing.draw(body, (0, 0, size, size)).signature, np.uint8)[None]


def test_signatures_see_through_size_place_and_colour():
    shape = '<path d="M2 2h12v6h-6v10h-6z"/>'
    twin = f'<g transform="translate(6 4) scale(1.5)">{shape}</g>'
    assert splits.near_duplicates(signature(shape), signature(twin, 48)).all()
    assert not splits.near_duplicates(signature(shape), signature('<path d="M2 2h12v16h-12z"/>')).any()


def test_near_is_the_root_mean_square():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (40, 256), dtype=np.uint8)
    noise = rng.normal(0, rng.uniform(8, 18, (40, 1)), a.shape)
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    rms = np.sqrt(np.mean((a[:, None] / 255.0 - b[None] / 255.0) ** 2, axis=-1))
    np.testing.assert_array_equal(splits.near_duplicates(a, b), rms < 0.05)
    assert 0 < (rms < 0.05).sum() < 40
    labels = [str(i) for i in range(40)]
    assert not splits.near_any(a, a, (labels, labels)).any() and splits.near_any(a, a).all()


def test_splits_are_disjoint_by_concept_family_and_picture(icon_builder, records):
    concept, family = (
        {split: {record[key] for record in part} for split, part in records.items()} for key in ("concept", "family")
    )
    roles, families = collections.defaultdict(set), icon_builder.info.metadata["families"]
    for entry in corpus.concepts(icon_builder):
        roles[entry["role"]].add(entry["id"])
    assert [len(roles[role]) for role in ("test_concepts", "validation_concepts")] == [8, 8]
    for split in splits.UNSEEN:
        assert concept[split] == roles[split] and not roles[split] & concept["train"]
        drawn = collections.Counter(record["concept"] for record in records[split])
        assert min(drawn.values()) >= splits.MIN_TESTED
    for split in splits.RENDERING:
        assert family[split] == {name for name, role in families.items() if role == split}
        assert not family[split] & family["train"] and concept[split] <= concept["train"]
    signatures = {split: np.concatenate([of_png(r["image"]) for r in part]) for split, part in records.items()}
    for split in records.keys() - {"train"}:
        assert not splits.near_any(signatures["train"], signatures[split]).any()
    within = collections.Counter((r["set"], r["concept"]) for part in records.values() for r in part)
    assert max(within.values()) == splits.PER_SET


def of_png(png):
    with PIL.Image.open(io.BytesIO(png)) as image:
        return np.frombuffer(drawing.signature(image.convert("RGB")), np.uint8)[None]


def test_the_same_package_gives_the_same_splits(icon_builder, records):
    report = icon_builder.info.metadata["report"]
    assert {split: row["hash"] for split, row in report["splits"].items()} == HASHES
    for split, part in records.items():
        assert splits.digest(sorted(record["id"] for record in part)) == HASHES[split]


def test_report_and_licences(icon_builder, records):
    report = json.loads((icon_builder.data_path / corpus.REPORT_FILE).read_text())
    counts = report["counts"]
    assert counts["corpus"] == sum(map(len, records.values())) == sum(r["drawings"] for r in report["splits"].values())
    assert counts["blank, full or broken"] == 2  # both sets' "blank"
    assert counts["duplicates within a concept"] >= 5  # everybody's cloud, where it is among the two
    page = (icon_builder.data_path / corpus.LICENCES_FILE).read_text()
    assert "| twin | Twin | Twin's author | [CC-BY-4.0](https://example.org/licence) | https://example.org |" in page
    assert "protected" not in page and f"{counts['corpus']:,}" in corpus.render(report)


def test_texts(records):
    everything = {record["id"]: record for part in records.values() for record in part}
    assert everything["pitfalls/console"]["name"] == "console"
    assert everything["pitfalls/console"]["aliases"] == ["terminal", "shell"]
    drawn = [record for record in everything.values() if record["set"] == "artist-a"]
    assert drawn and all(record["category"] == ["objects"] for record in drawn)
    assert all(record["aliases"] in ([], [f"{record['name']} by another name"]) for record in drawn)


def test_source_of_pairs(icon_builder):
    options = SourceOptions(str(icon_builder.data_path.parents[1]), "image", ("name", "aliases"), "category")
    source = sources.open_pairs(f"{KIND}:train", options)
    assert len(source) == icon_builder.info.splits["train"].num_examples
    assert source[0]["text"][0] and source[0]["tags"] in ([], ["objects"])
    with pytest.raises(
        UserError, match=r"^source 'studies.icons.sources:IconSplits:tests': unknown split; expected one of .*train"
    ):
        sources.open_pairs(f"{KIND}:tests", options)


def test_an_interrupted_build_leaves_nothing(icon_source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "licences_page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        corpus.prepare(tmp_path, icon_source)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_drawing_that_fails_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"^icons could not be drawn \(exit code 1\).*xclip_jax\[demo\]"):
        drawing.draw_all([("", (0, 0, 1, 1))])


class Registry(http.server.BaseHTTPRequestHandler):
    """A registry whose first answer ends half-way."""

    content, cut, ranges = b"", True, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.ranges.append((self.path, start))
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if type(self).cut else body)
        type(self).cut = False

    def log_message(self, *_):
        pass


@pytest.fixture
def registry(icon_package, monkeypatch, tmp_path):
    handler = type("Handler", (Registry,), {"content": icon_package[0].read_bytes(), "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_where_it_ended(icon_package, registry, tmp_path):
    path = package.fetch(icon_package[1])
    assert path.read_bytes() == icon_package[0].read_bytes() and path.parent == tmp_path / "npm"
    assert [p for p, _ in registry.ranges] == ["/@tests/icons/-/icons-1.0.0.tgz"] * 2
    assert registry.ranges[1][1] > 0
    assert package.fetch(icon_package[1]) == path and len(registry.ranges) == 2


def test_another_file_is_refused(icon_package, registry, tmp_path):
    registry.cut, registry.content = False, b"something else"
    with pytest.raises(UserError, match=r"^the npm package @tests/icons 1\.0\.0 .*integrity.*npm pack @tests/icons@1"):
        package.fetch(icon_package[1])
    assert not list((tmp_path / "npm").iterdir())


def test_without_a_network(icon_package, monkeypatch, tmp_path):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded.*copy the \.tgz to .*npm/tests-icons-1\.0\.0\.tgz"):
        package.fetch(icon_package[1])


def test_registry_is_that_of_npm(monkeypatch, tmp_path):
    for variable in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("npm_config_userconfig", str(tmp_path / "npmrc"))
    assert package.registry() == package.NPM
    (tmp_path / "npmrc").write_text("fund=false\nregistry = https://npm.example.org/\n")
    assert package.registry() == "https://npm.example.org"


def test_a_damaged_package_is_one_sentence(icon_package, tmp_path):
    path = tmp_path / "cut.tgz"
    path.write_bytes(icon_package[0].read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^package '.*cut\.tgz' is damaged .*; delete it to download it again\.$"):
        package.read(path)
