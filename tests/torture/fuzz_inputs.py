"""Inputs of `tests.torture.fuzz`: seeded mutations of sound files, and overrides of a config."""

import random
from collections.abc import Callable, Sequence

MOST_BYTES = 1 << 22
_NUMBERS = (
    0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_WORDS = (
    b"\0", b"\n", b"\r\n", b"\t", b",", b'"', b"'", b"|", b"{", b"}", b"[", b"]", b"[[[[[[[[", b":", b"-1",
    b"1e999", b"NaN", b"Infinity", b"null", b"true", b"9" * 5000, b"\\ud83d", b"\xed\xa0\xbd", b"\xff\xfe",
    b"\xef\xbb\xbf", b"../", b"/etc/passwd", b"foo://x", b"http://[", b"<script>", b"%n", b"$(x)", b"&amp;" * 9,
    b"a" * 1000, b"\xcc\x80" * 500, b"</s>", b"<|endoftext|>",
)  # fmt: skip
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


_VALUES = (
    "1", "-1", "0", "1e400", "nan", "True", "None", "", "()", "(1,)", "('a',)", "[1, 2", "(" * 300, "{'a': 1}",
    "__import__('os')", "1_0", "9" * 5000, "\udcff", "clip", "x" * 2000, "('folder:/nowhere',)", "-", "=", "0x10",
    "1j", "b'a'", "((1, 2), (3,))", "'\\", "lambda: 0", "1,2", "[" * 100000, "1+1", "((0.5,) * 3, (0.5,) * 3)",
    "-" * 50000 + "1", "not " * 3000 + "1",
)  # fmt: skip


def overrides(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Lines of overrides of a config, keys from `seeds`."""
    lines = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        key = rng.choice(seeds).decode()
        if rng.random() < 0.1:
            at = rng.randrange(len(key))
            key = key[:at] + rng.choice((".", "x", "", "__class__", "[0]", " ", "é")) + key[at + 1 :]
        text = rng.choice(_VALUES)
        if rng.random() < 0.2:
            text = mutated(rng, [text.encode("utf-8", "surrogatepass")]).decode("utf-8", "replace")
        lines.append(f"--config.{key}={text}".replace("\n", " "))
    return "\n".join(lines).encode("utf-8", "surrogatepass")
