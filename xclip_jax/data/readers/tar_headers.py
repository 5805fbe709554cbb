"""Headers of tar files: where each file in a tar begins, also in tars that are damaged or cut off."""

from collections.abc import Iterator

from xclip_jax.core import storage

_BLOCK = 512
_CHUNK = 1 << 20
_REGULAR = b"0\0007"  # types with data of their own: "0", NUL and "7"


def _number(field: bytes) -> int | None:
    """Return a number of a tar header: octal digits, or base 256 above 8 GiB; None if it is neither, or negative."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0")
    # int() would take signs and underscores too, and a walk by a negative size never ends.
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _header_size(block: bytes) -> int | None:
    """Return the number of bytes of data after a header, or None if `block` is not a header."""
    if len(block) < _BLOCK:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    # The sum over 512 bytes costs as much as all the rest; the magic word and a number where one belongs say as much.
    return size if block[257:262] == b"ustar" or (any(block) and _sum_is_right(block)) else None


def _sum_is_right(block: bytes) -> bool:
    return sum(block) - sum(block[148:156]) + 8 * 32 == _number(block[148:156])


class _Reader:
    """Blocks of a file at growing offsets: single ones from a disk, large pieces from a bucket."""

    def __init__(self, path: str) -> None:
        self._file, self._remote = storage.File(path), storage.is_remote(path)
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if not self._remote:
            return self._file.read(offset, size)
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._start, self._data = offset, self._file.read(offset, max(size, 8 * _CHUNK))
        return self._data[offset - self._start : offset - self._start + size]


def _next_header(reader: _Reader, offset: int, end: int) -> tuple[int, bool]:
    """Return the offset of the next header from `offset` on, or `end`; and whether anything but zeros is before it."""
    damaged = False
    while offset < end:
        chunk = reader.read(offset, _CHUNK)
        if not chunk:
            break
        if chunk.count(0) != len(chunk):
            for i in range(0, len(chunk), _BLOCK):
                block = chunk[i : i + _BLOCK]
                if _header_size(block) is not None:
                    return offset + i, damaged
                damaged = damaged or any(block)
        offset += len(chunk)
    return end, damaged


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Return the records "<length> <key>=<value>\\n" of an extended header, up to one that is malformed."""
    records, offset = {}, 0
    while offset < len(data):
        length, space, _ = data[offset : offset + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = data[offset + len(length) + 1 : offset + int(length) - 1].partition(b"=")
        records[key] = value
        offset += int(length)
    return records


def members(path: str, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset of the data and size of each file in the tar `path` of `size` bytes, in order.

    For bytes that are not a part of a tar it yields (b"", their offset, their number), and goes on after them. Long
    names (GNU and pax), sizes above 8 GiB and concatenated tars are understood; links and folders are skipped.
    """
    reader = _Reader(path)
    offset, name, real_size = 0, b"", None
    while offset < size:
        block = reader.read(offset, _BLOCK)
        length = _header_size(block)
        if length is None or (offset + _BLOCK + length > size and not _sum_is_right(block)):
            after, damaged = _next_header(reader, offset + _BLOCK * (length is not None), size)
            if damaged or length is not None:
                yield b"", offset, after - offset
            offset, name, real_size = after, b"", None
            continue
        member_type, data = block[156:157], offset + _BLOCK
        if member_type in (b"L", b"x", b"X", b"g", b"K"):
            content = reader.read(data, min(length, _CHUNK))
            if member_type == b"L":
                name = content.rstrip(b"\0")
            elif member_type in (b"x", b"X"):
                records = _pax(content)
                name = records.get(b"path", name)
                digits = records.get(b"size", b"")
                real_size = int(digits) if digits.isdigit() and len(digits) < 20 else None
        else:
            length = length if real_size is None else real_size
            if member_type in b"123456":
                length = 0
            elif member_type in _REGULAR:
                short = block[:100].split(b"\0", 1)[0]
                prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
                yield name or (prefix + b"/" + short if prefix else short), data, length
            name, real_size = b"", None
        offset = data + -(-length // _BLOCK) * _BLOCK
