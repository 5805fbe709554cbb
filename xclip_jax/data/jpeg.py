"""What the markers at the head of a JPEG say."""

from typing import Any, TypeGuard


def is_jpeg(data: Any) -> TypeGuard[bytes]:
    """Whether `data` is the content of a file that begins as JPEGs do."""
    return isinstance(data, bytes) and data[:2] == b"\xff\xd8"


def header(data: bytes) -> tuple[int, int, int, bool, bool] | None:
    """(width, height, channels, whether EXIF may rotate it, whether its coefficients are in memory all at once).

    None for a JPEG whose markers make no sense.
    """
    offset, exif = 2, False
    while offset + 10 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # padding
            offset += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if data[offset + 4] != 8:  # bits
                return None
            h = int.from_bytes(data[offset + 5 : offset + 7], "big")
            w = int.from_bytes(data[offset + 7 : offset + 9], "big")
            return (w, h, data[offset + 9], exif, marker not in (0xC0, 0xC1)) if w and h else None
        exif = exif or (marker == 0xE1 and data[offset + 4 : offset + 8] == b"Exif")
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None
