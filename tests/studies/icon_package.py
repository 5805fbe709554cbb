"""A small package in the form of @iconify/json, with all that its names, aliases, styles and pictures may do."""

import base64
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np

from studies.icons.package import Package

THINGS = [
    "anchor",
    "ball",
    "bell",
    "bicycle",
    "book",
    "bottle",
    "bridge",
    "brush",
    "bucket",
    "cactus",
    "camera",
    "candle",
    "carrot",
    "castle",
    "chair",
    "cherry",
    "clock",
    "cloud",
    "compass",
    "crown",
    "dice",
    "door",
    "drum",
    "eagle",
    "engine",
    "feather",
    "flask",
    "flute",
    "forest",
    "fork",
    "fountain",
    "ghost",
    "globe",
    "guitar",
    "hammer",
    "harbor",
    "helmet",
    "island",
    "kettle",
    "ladder",
    "lantern",
    "leaf",
    "lemon",
    "lizard",
    "mirror",
    "moon",
    "mountain",
    "needle",
    "onion",
    "paddle",
    "parrot",
    "pencil",
]
FAMILIES = tuple(f"artist-{letter}" for letter in "abcdefghij")


def picture(*seed: object) -> str:
    """An SVG body that no other seed gives: five thick strokes."""
    number = int(hashlib.sha256(repr(seed).encode()).hexdigest(), 16) % 2**32
    points = np.random.default_rng(number).integers(2, 22, (6, 2))
    path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points.tolist()))
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="2"/>'


def icon_set(name: str, icons: dict, **fields: object) -> dict:
    entries = {key: {"body": value} if isinstance(value, str) else value for key, value in icons.items()}
    return {"prefix": name, "icons": entries, "width": 24, "height": 24, **fields}


def collection(title: str, spdx: str = "MIT", **fields: object) -> dict:
    licence = {"title": spdx, "spdx": spdx, "url": "https://example.org/licence"}
    return {
        "name": title,
        "author": {"name": f"{title}'s author", "url": "https://example.org"},
        "license": licence,
    } | fields


def pitfalls() -> tuple[dict, dict]:
    """Sets that have what real ones have; the second one repeats pictures of the first."""
    icons = {
        "sun-outline-rounded": picture("sun", 1),
        "sun-filled": picture("sun", 2),
        "sun-02": picture("sun", 3),
        "paw-print-24-regular": picture("paw"),
        "bookmark-square2": picture("bookmark"),
        "chart-line": picture("chart"),
        "circle-x": picture("x"),
        "t-shirt": picture("shirt"),
        "brand-acme": picture("brand"),
        "acmegram": picture("acmegram"),
        "thumb-like": picture("like"),
        "secret": {"body": picture("secret"), "hidden": True},
        "spinner": '<path d="M2 2h20v20z"><animate attributeName="d"/></path>',
        "stars": picture("stars"),
        "wide": {"body": '<rect width="48" height="12"/>', "width": 48, "height": 12},
        "console": picture("console"),
        "blank": '<path d="M0 0"/>',
        "big-red-round-house-on-hill": picture("house"),
    }
    aliases = {
        "terminal": {"parent": "console"},
        "shell": {"parent": "terminal"},
        "mirrored-console": {"parent": "console", "hFlip": True},
        "consoles": {"parent": "console"},
        "pitfalls-console": {"parent": "console"},
        "console2x": {"parent": "console"},
        "tshirt": {"parent": "t-shirt"},
    }
    categories = {"Social Media": ["thumb-like"], "SkyWeather": ["sun-filled", "stars"], "Other": ["console"]}
    one = icon_set(
        "pitfalls", icons, aliases=aliases, categories=categories, suffixes={"": "Plain", "outline-rounded": "Rounded"}
    )
    twin = {"baseline-sun": picture("sun", 2), "round-stars": picture("star again"), "baseline-blank": "<g/>"}
    twin |= {f"baseline-{name}": picture(name, "other") for name in ("wide", "console", "t-shirt")}
    return one, icon_set("twin", twin, prefixes={"baseline": "Baseline", "round": "Round"})


def content() -> dict[str, dict]:
    """File -> JSON of the package."""
    pitfall, twin = pitfalls()
    files = {"json/pitfalls.json": pitfall, "json/twin.json": twin}
    collections = {"pitfalls": collection("Pitfalls"), "twin": collection("Twin", "CC-BY-4.0")}
    for name in FAMILIES:
        icons = {
            f"{thing}-{style}": picture(name, thing, style) for thing in THINGS for style in ("fill", "thin", "alt")
        }
        icons["cloud-fill"] = picture("everybody's cloud")  # the same drawing in every set
        icons["moon-fill"] = picture("everybody's cloud") if name == "artist-a" else icons["moon-fill"]
        aliases = {f"{thing}-by-another-name": {"parent": f"{thing}-fill"} for thing in THINGS}
        files[f"json/{name}.json"] = icon_set(name, icons, aliases=aliases, categories={"Objects": list(icons)})
        collections[name] = collection(name, "Apache-2.0")
    files["json/simple-icons.json"] = icon_set("simple-icons", {"acmegram": picture("a"), "target": picture("t")})
    files["json/game-icons.json"] = icon_set("game-icons", {"target": picture("game target")})
    files["json/protected.json"] = icon_set("protected", {"sun": picture("p")})
    collections |= {
        "simple-icons": collection("Brands", "CC0-1.0"),
        "game-icons": collection("Game icons", "CC-BY-3.0"),
        "protected": collection("Protected", "GPL-3.0"),
    }
    return files | {"collections.json": collections}


# Sizes of splits for so few drawings; attributes of `studies.icons.splits`.
SIZES = {
    "TEST_CONCEPTS": 8,
    "VALIDATION_CONCEPTS": 8,
    "TEST_FAMILIES": 2,
    "VALIDATION_FAMILIES": 1,
    "FAMILY_DRAWINGS": (20, 200),
}


def write(path: pathlib.Path) -> Package:
    """Write the package to `path`, as a .tgz with fixed times; returns what pins it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in content().items():
            raw = json.dumps(data).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    path.write_bytes(buffer.getvalue())
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    return Package("@tests/icons", "1.0.0", f"sha512-{digest}")
