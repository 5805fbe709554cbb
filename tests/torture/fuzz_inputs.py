"""Inputs of `tests.torture.fuzz`: seeded mutations of sound files, and hostile ones made field by field."""

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

MOST_BYTES = 1 << 22
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    65535,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_WORDS = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\t",
    b",",
    b'"',
    b"'",
    b"|",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[[[[[[[[",
    b":",
    b"-1",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"9" * 5000,
    b"\\ud83d",
    b"\xed\xa0\xbd",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"../",
    b"/etc/passwd",
    b"foo://x",
    b"http://[",
    b"<script>",
    b"%n",
    b"$(x)",
    b"&amp;" * 9,
    b"a" * 1000,
    b"\xcc\x80" * 500,
    b"</s>",
    b"<|endoftext|>",
)
Make = Callable[[random.Random, Sequence[bytes]], bytes]


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with one to eight changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 16, 100, 1000)))
        match rng.randrange(10):
            case 0:
                data[at:end] = b""
            case 1:
                data[at:at] = rng.randbytes(end - at)
            case 2:
                data[at:end] = rng.randbytes(end - at)
            case 3:
                data[at:at] = bytes(data[at:end]) * rng.choice((1, 2, 10, 1000, 30_000))
            case 4:
                del data[at:]
            case 5:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:end] = other[start : start + rng.choice((1, 16, 256, 4096))]
            case 6 | 7:
                size = rng.choice((1, 2, 4, 8))
                number = (rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(("little", "big")))
                data[at : at + size] = number
            case 8:
                data[at : rng.choice((at, end))] = rng.choice(_WORDS)
            case _:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
        del data[MOST_BYTES:]
    return bytes(data)


def images(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Mutated images; PNGs have right checksums, without which nothing else of them is read."""
    data = mutated(rng, seeds)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or rng.random() < 0.2:
        return data
    out, offset = bytearray(data[:8]), 8
    while offset + 12 <= len(data) and (size := int.from_bytes(data[offset : offset + 4], "big")) < len(data):
        chunk = data[offset + 4 : offset + 8 + size]
        out += struct.pack(">I", max(0, len(chunk) - 4)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        offset += 12 + size
    return bytes(out + data[offset:])


_SIZES = (
    b"-0000001000",
    b"+0000000010",
    b"0_000000010",
    b"77777777777",
    b"00000000010\0",
    b"99999999999",
    b"",
    b" " * 12,
    b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7,
    b"\xff" * 12,
    b"\x80" + bytes(10) + b"\x05",
    b"00000000000",
)
_NAMES = (
    b"a.jpg",
    b"a.txt",
    b"a.json",
    b"/etc/passwd.txt",
    b"../../x.jpg",
    b"..",
    b"./",
    b"",
    b"a\nb.jpg",
    b"b.png",
    b".hidden.jpg",
    b"x" * 100,
    b"\xff\xfe.jpg",
    b"a.jpg\0b",
    b"dir/",
    b"c.JPG",
    b"c.txt",
)
_PAX = (
    b"20 path=pax/long.jpg\n",
    b"15 size=999999\n",
    b"12 path=\n\n\n\n",
    b"9" * 5000 + b" size=1\n",
    b"30 size=" + b"9" * 21 + b"\n",
    b"0 a=b\n",
    b"-5 a=b\n",
    b"11 size=-9\n",
    b"17 path=../a.jpg\n",
)


def tars(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Tars made header by header, some checksums right; every fourth a mutated one."""
    if rng.random() < 0.25:
        return mutated(rng, seeds)
    out = bytearray()
    for _ in range(rng.randrange(1, 12)):
        content = rng.choice((b"", b"a caption", b'{"caption": "x"}', rng.choice(_PAX), rng.randbytes(600)))
        header = bytearray(512)
        name = rng.choice(_NAMES)
        header[: len(name)] = name
        size = b"%011o" % len(content) if rng.random() < 0.6 else rng.choice(_SIZES)
        header[124 : 124 + len(size)] = size
        header[156:157] = rng.choice(
            (b"0", b"0", b"0", b"\0", b"7", b"x", b"X", b"g", b"L", b"K", b"S", *(b"%d" % i for i in range(1, 7)))
        )
        header[157:170] = b"../../../etc/"
        header[257:265] = rng.choice((b"ustar\x0000", b"ustar  \0", bytes(8)))
        if rng.random() < 0.8:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        out += header + content + bytes(-len(content) % 512)
    return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.2 else out + bytes(1024))


def texts(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Texts in UTF-8, halves of surrogate pairs included: random letters of all planes, or mutated ones."""
    if rng.random() < 0.4:
        return mutated(rng, seeds)
    planes = ((0, 0x80), (0, 0x20), (0x80, 0x800), (0x300, 0x370), (0xD800, 0xE000), (0xFFF0, 0x10000), (0, 0x110000))
    letters = [chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.choice((1, 5, 30, 200)))]
    text = "".join(letters) * rng.choice((1, 1, 1, 2, 5000))
    return text.encode("utf-8", "surrogatepass")[:MOST_BYTES]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A random value of JSON, or one that only Python's JSON has."""
    kind = rng.randrange(12 if depth < 4 else 9)
    if kind < 3:
        return rng.choice((0, -1, 1, 1.5, 1 << 70, float("nan"), float("inf"), -1e308, 10**4000))
    if kind < 6:
        return rng.choice(("", "x", "\ud83d", "\0", "a" * 300, "<script>alert(1)</script>", "../x", "step", "1e5"))
    if kind < 9:
        return rng.choice((None, True, False))
    if kind < 10:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ("text", "caption", "tags", "step", "loss", "results", "config", "samples", "entries", "a", "model", "data")
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def json_texts(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """JSON with a value replaced by a random one, nested without end, or with changed bytes."""
    way = rng.random()
    if way < 0.4:
        return mutated(rng, seeds)
    if way < 0.45:
        depth = rng.choice((100, 5_000, 200_000))
        return rng.choice((b"[", b'{"a":', b'{"text":[')) * depth
    if way < 0.55:
        return json.dumps(value(rng)).encode()
    try:
        content = json.loads(rng.choice(seeds))
    except ValueError:
        return mutated(rng, seeds)
    return json.dumps(_replaced(rng, content)).encode()


def _replaced(rng: random.Random, content: Any) -> Any:
    """`content` with one value at random depth replaced, left out, or added."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.85:
        items = dict(content) if isinstance(content, dict) else dict(enumerate(content))
        key = rng.choice(list(items))
        if rng.random() < 0.1:
            del items[key]
        else:
            items[key] = _replaced(rng, items[key])
        return items if isinstance(content, dict) else list(items.values())
    return value(rng)


_OPS = (
    b"(",
    b".",
    b"0",
    b"1",
    b"2",
    b"N",
    b"}",
    b"]",
    b")",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"b",
    b"s",
    b"u",
    b"a",
    b"e",
    b"d",
    b"l",
    b"Q",
    b"o",
    b"\x81",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x88",
    b"\x89",
    b"\x92",
    b"\x93",
    b"\x94",
    b"\x97",
    b"\x98",
)
_GLOBALS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"c__torch__\nM\n",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch.jit._pickle\nbuild_intlist\n",
)
_STORAGE = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((" + _STORAGE + b"K\0K\x04\x85K\x01\x85\x89}tR"


def _instruction(rng: random.Random) -> bytes:
    number = rng.choice(_NUMBERS)
    match rng.randrange(9):
        case 0:
            return rng.choice(_GLOBALS)
        case 1:
            return rng.choice((b"(" + _STORAGE, _TENSOR))
        case 2:
            return rng.choice((b"h", b"q", b"K")) + bytes([rng.choice((0, 1, 2, 3, 255))])
        case 3:
            return rng.choice((b"r", b"j", b"J", b"X", b"B", b"\x8b")) + struct.pack("<I", number & 0xFFFFFFFF)
        case 4:
            return rng.choice((b"\x8d", b"\x8e", b"\x95", b"\x96")) + struct.pack("<Q", number)
        case 5:
            return rng.choice((b"I%s\n", b"L%sL\n", b"g%s\n", b"p%s\n")) % rng.choice(
                (b"%d" % number, b"-%d" % number, b"9" * 4400)
            )
        case 6:
            return rng.choice(
                (b"X\x01\0\0\0a", b"\x8c\x01b", b"U\x01c", b"V\\ud800\n", b"S'x'\n", b"C\x02xy", b"\x80\x02")
            )
        case 7:
            return rng.choice(_OPS) * rng.choice((1, 1, 1, 60, 1000))
        case _:
            return rng.choice(_OPS)


def pickles(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A zip, as torch writes it, around a pickle of random instructions, or around a mutated one."""
    if rng.random() < 0.3:
        pickled = mutated(rng, seeds)
    else:
        # Begins with tensors in a dict, which most instructions have something to do with.
        body = b"".join(_instruction(rng) for _ in range(rng.choice((3, 10, 40))))
        pickled = b"\x80\x02}q\0(X\x01\0\0\0x" + _TENSOR + b"q\1u" + body + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        if rng.random() < 0.3:
            archive.writestr("archive/constants.pkl", pickle.dumps(()))
    return buffer.getvalue()


def overrides(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Lines of overrides of a config, keys from `seeds`."""
    values = (
        "1",
        "-1",
        "0",
        "1e400",
        "nan",
        "True",
        "None",
        "",
        "()",
        "(1,)",
        "('a',)",
        "[1, 2",
        "(" * 300,
        "{'a': 1}",
        "__import__('os')",
        "1_0",
        "9" * 5000,
        "\udcff",
        "clip",
        "x" * 2000,
        "('folder:/nowhere',)",
        "-",
        "=",
        "0x10",
        "1j",
        "b'a'",
        "((1, 2), (3,))",
        "'\\",
        "lambda: 0",
        "1,2",
        "[" * 100000,
        "1+1",
        "((0.5,) * 3, (0.5,) * 3)",
        "-" * 50000 + "1",
        "not " * 3000 + "1",
    )
    lines = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        key = rng.choice(seeds).decode()
        if rng.random() < 0.1:
            at = rng.randrange(len(key))
            key = key[:at] + rng.choice((".", "x", "", "__class__", "[0]", " ", "é")) + key[at + 1 :]
        text = rng.choice(values)
        if rng.random() < 0.2:
            text = mutated(rng, [text.encode("utf-8", "surrogatepass")]).decode("utf-8", "replace")
        lines.append(f"--config.{key}={text}".replace("\n", " "))
    return "\n".join(lines).encode("utf-8", "surrogatepass")
