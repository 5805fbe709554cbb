"""Tars with every fault of pairs from the web, and the expected outcome of each."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(i, w=40, h=30, mode="RGB"):
    """A smooth picture, another for each i."""
    y, x = np.mgrid[:h, :w]
    waves = [np.sin((x * (1 + i % 3) + y * (1 + i % 5)) / 9 + i + c) for c in range(3)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8)).convert(mode)


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(i, **size):
    return encode(picture(i, **size), quality=90)


def bomb(side):
    """A little PNG that says it has side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks, chunks.values()))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def sixteen_bit():
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    return encode(Image.fromarray(values), "PNG")


def odd_images():
    """Images that are good, by name: file name's suffix and content."""
    palette = picture(3).quantize(16)
    alpha = picture(4).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    frames = [picture(i).quantize(32) for i in (5, 6)]
    return {
        "plain": ("jpg", jpeg(0)),
        "upper": ("JPG", jpeg(1)),
        "jpeg": ("jpeg", jpeg(2)),
        "palette": ("png", encode(palette, "PNG")),
        "palette_alpha": ("png", encode(palette, "PNG", transparency=3)),
        "alpha": ("png", encode(alpha, "PNG")),
        "gif": ("gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "webp": ("webp", encode(picture(7), "WEBP", quality=90)),
        "cmyk": ("jpg", encode(picture(8, mode="CMYK"), quality=90)),
        "gray": ("jpg", encode(picture(9, mode="L"), quality=90)),
        "gray_alpha": ("png", encode(picture(9, mode="LA"), "PNG")),
        "one_bit": ("png", encode(picture(10, mode="1"), "PNG")),
        "sixteen": ("png", sixteen_bit()),
        "progressive": ("jpg", encode(picture(12), quality=90, progressive=True)),
        "turned": ("jpg", encode(picture(13), quality=90, exif=exif(6))),
        "not_turned": ("jpg", encode(picture(13), quality=90, exif=exif(1))),
        "one_high": ("png", encode(picture(14, w=50, h=1), "PNG")),
        "one_wide": ("jpg", jpeg(15, w=1, h=50)),
        "one_pixel": ("png", encode(picture(16, w=1, h=1), "PNG")),
        "very_long": ("png", encode(picture(17, w=3000, h=2), "PNG")),
        "png_named_jpg": ("jpg", encode(picture(18), "PNG")),
        "rubbish_behind": ("jpg", jpeg(19) + b"rubbish"),
    }


def add(tar, name, data, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def shard(path, samples, fmt=tarfile.USTAR_FORMAT):
    """A tar of (key, {suffix: content}); a list of pairs in place of the dict allows a name twice."""
    with tarfile.open(path, "w", format=fmt) as tar:
        for key, parts in samples:
            for suffix, data in parts.items() if isinstance(parts, dict) else parts:
                add(tar, f"{key}.{suffix}", data)
    return path


def pairs(path, first, n, **size):
    """A tar as img2dataset writes it, keys `first` and up."""
    samples = []
    for i in range(first, first + n):
        fields = json.dumps({"caption": f"json {i}", "alts": [f"alt {i}", ""], "nested": {"tag": ["a", "b"]}})
        parts = {"jpg": jpeg(i, **size), "json": fields.encode(), "txt": f"picture {i}".encode()}
        samples.append((f"{i:09d}", parts))
    return shard(path, samples)


def make(folder):
    """Writes the set. Returns good samples, (tar, key) -> caption, and bad ones, (tar, key) -> reason."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    good, bad = {}, {}

    odd = odd_images()
    shard(folder / "00.tar", [(name, {suffix: data, "txt": name.encode()}) for name, (suffix, data) in odd.items()])
    good |= {("00.tar", name): name for name in odd}

    broken = {
        "cut_jpeg": ("jpg", jpeg(1, w=200, h=200)[:3000], "image cut off"),
        "cut_png": ("png", encode(picture(1, w=100, h=100), "PNG")[:500], "image cut off"),
        "html": ("jpg", b"<!DOCTYPE html><html>404</html>", "not an image"),
        "no_bytes": ("jpg", b"", "image file is empty"),
        "magic_alone": ("jpg", b"\xff\xd8\xff\xe0", "image cut off"),
        "svg": ("jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "bomb": ("png", bomb(60_000), "image too large"),
        "jpeg_bomb": ("jpg", jpeg(1).replace(struct.pack(">HH", 30, 40), b"\xff\x00\xff\x00", 1), "image too large"),
    }
    shard(folder / "01.tar", [(key, {suffix: data, "txt": b"x"}) for key, (suffix, data, _) in broken.items()])
    bad |= {("01.tar", key): reason for key, (_, _, reason) in broken.items()}

    image = jpeg(30)
    texts = {
        "mark": ("\ufeffmark".encode(), "mark"),
        "lines": (b"two\r\nlines\n", "two\r\nlines"),
        "emoji": ("🦊 fox".encode(), "🦊 fox"),
        "long": (b"word " * 5000, ("word " * 5000).strip()),
    }
    wrong = {"empty": b"", "blank": b" \n\t ", "binary": bytes(range(256)), "nul": b"a\0b"}
    wrong |= {"latin": "caf\xe9".encode("latin-1"), "utf16": "sixteen".encode("utf-16")}
    wrong["endless"] = b"x" * (1 << 20 | 1)
    contents = {key: data for key, (data, _) in texts.items()} | wrong
    parts = [("no_text", {"jpg": image}), ("json_only", {"jpg": image, "json": b"{}"}), ("no_image", {"txt": b"alone"})]
    shard(folder / "02.tar", [*((key, {"jpg": image, "txt": data}) for key, data in contents.items()), *parts])
    good |= {("02.tar", key): caption for key, (_, caption) in texts.items()}
    bad |= {("02.tar", key): "caption is empty" for key in ("empty", "blank")}
    bad |= {("02.tar", key): "caption is not UTF-8" for key in ("binary", "latin", "utf16")}
    bad |= {("02.tar", "nul"): "caption is not text"}
    bad |= {("02.tar", key): "no caption file" for key in ("no_text", "json_only")}
    bad |= {("02.tar", "no_image"): "no image file", ("02.tar", "endless"): "file too large"}

    with tarfile.open(folder / "03.tar", "w", format=tarfile.PAX_FORMAT) as tar:  # keys and members
        long = "a/" + "very/" * 40 + "long"
        for key in ("dots.in.the.key", "folder/key", "./dotted/key", "ünï", long, "x" * 150, "space in key"):
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.txt", key.encode())
            good["03.tar", key.removeprefix("./")] = key
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="dots.in.the.key.jpg")
        bad["03.tar", "link"] = "no caption file"
        add(tar, "pipe", b"", type=tarfile.FIFOTYPE)
        others = {
            "README": b"hello", "._hidden.jpg": b"Mac OS X", "._hidden.txt": b"Mac OS X", "apart.jpg": image,
            "apart2.jpg": image, "apart2.txt": b"apart2", "apart.txt": b"apart",
            "two.png": encode(picture(1), "PNG"), "two.jpg": image, "two.txt": b"two", "other.cls": b"5",
        }  # fmt: skip
        for name, data in others.items():
            add(tar, name, data)
        good |= {("03.tar", key): key for key in ("apart", "apart2", "two")}
    with tarfile.open(folder / "04.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in (long, "gnu"):
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.txt", key.encode())
            good["04.tar", key] = key

    # The same keys as in the tar before and after; and twice in one tar.
    shard(folder / "05.tar", [("gnu", {"jpg": image, "txt": b"gnu of 05"}), ("twice", {"jpg": image, "txt": b"first"})])
    shard(folder / "06.tar", [("twice", {"jpg": image, "txt": b"twice of 06"}), ("one", {"jpg": image, "txt": b"one"})])
    good |= {("05.tar", "gnu"): "gnu of 05", ("05.tar", "twice"): "first"}
    good |= {("06.tar", "twice"): "twice of 06", ("06.tar", "one"): "one"}
    same = [("jpg", image), ("txt", b"one"), ("jpg", image), ("txt", b"two")]
    shard(folder / "07.tar", [("same", same)])
    good |= {("07.tar", "same"): "one", ("07.tar", "same", 2): "two"}

    (folder / "08.tar").write_bytes(b"")
    bad["08.tar", ""] = "tar without samples"
    (folder / "09.tar").write_bytes(b"<html>" + b"not found " * 200)
    bad["09.tar", "byte 0"] = "tar damaged"
    with tarfile.open(folder / "10.tar", "w"):
        pass
    bad["10.tar", ""] = "tar without samples"

    big = jpeg(40, w=120, h=120)
    for number, at in ((11, "image"), (12, "header"), (13, "text")):
        path = pairs(folder / f"{number}.tar", 100 * number, 3, w=120, h=120)
        with tarfile.open(path) as tar:
            last = {member.name[-3:]: member for member in tar.getmembers()}
        image_at, header, text_at = last["jpg"].offset_data, last["son"].offset, last["txt"].offset_data
        cut = {"image": image_at + 700, "header": header + 100, "text": text_at + 3}
        path.write_bytes(path.read_bytes()[: cut[at]])
        good |= {(path.name, f"{i:09d}"): f"picture {i}" for i in range(100 * number, 100 * number + 2)}
        key = f"{100 * number + 2:09d}"
        bad[path.name, key] = "no caption file" if at == "header" else "tar cut off"
        if at == "header":
            bad[path.name, f"byte {header}"] = "tar damaged"

    path = shard(folder / "14.tar", [(key, {"jpg": big, "txt": key.encode()}) for key in ("before", "hurt", "after")])
    with tarfile.open(path) as tar:
        hurt = tar.getmember("hurt.txt")
    data = bytearray(path.read_bytes())
    data[hurt.offset : hurt.offset + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(data)
    good |= {("14.tar", key): key for key in ("before", "after")}
    bad |= {("14.tar", "hurt"): "no caption file", ("14.tar", f"byte {hurt.offset}"): "tar damaged"}

    path = shard(folder / "15.tar", [("one", {"jpg": image, "txt": b"one"})])  # tars one behind another
    more = shard(folder / "more", [("other", {"jpg": image, "txt": b"other"})])
    path.write_bytes(path.read_bytes() + more.read_bytes())
    more.unlink()
    good |= {("15.tar", "one"): "one", ("15.tar", "other"): "other"}

    path = shard(folder / "16.tar", [(key, {"jpg": image, "txt": key.encode()}) for key in ("long_size", "behind")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"07777777777\0"  # a size far behind the end
    path.write_bytes(data)
    good |= {("16.tar", "behind"): "behind"}
    bad |= {("16.tar", "byte 0"): "tar damaged", ("16.tar", "long_size"): "no image file"}
    return good, bad


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    """The pattern, what is good and what is bad."""
    folder = tmp_path_factory.mktemp("torture")
    good, bad = make(folder)
    return f"{folder}/{{00..16}}.tar", good, bad


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two tars of 13 and 8 good pairs."""
    folder = tmp_path_factory.mktemp("plain")
    pairs(folder / "0.tar", 0, 13)
    pairs(folder / "1.tar", 13, 8)
    return f"{folder}/{{0..1}}.tar"
