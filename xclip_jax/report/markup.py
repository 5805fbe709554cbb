"""Elements that the sections of the page share. Text from outside goes through `esc`."""

import base64
import dataclasses
import html
import io

import numpy as np
from PIL import Image

from xclip_jax.core.errors import public

THUMB = 72  # side of an image in the page, pixels


def esc(value: object) -> str:
    """Escape text for elements and attributes; addresses in it have no passwords and signatures."""
    return html.escape(public(str(value)), quote=True)


def breakable(name: str) -> str:
    """Escaped, and with places where a long name of a set may be broken into lines."""
    return esc(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def wide(label: str, table: str) -> str:
    """Return a table in a box that scrolls where the screen is narrow; `label` names it for screen readers."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{esc(label)}">{table}</div>'


_GOOD, _BAD = ("above chance", "better"), ("below chance", "worse")


def verdict_pill(verdict: str) -> str:
    """Return a verdict on a ground of its colour; "" without one."""
    state = " above" if verdict in _GOOD else " below" if verdict in _BAD else ""
    return f'<span class="pill{state}">{esc(verdict)}</span>' if verdict else ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with its heading; `empty` ones give a reason and go to the end."""

    id: str
    title: str
    body: str
    empty: bool = False

    def render(self) -> str:
        """HTML."""
        return (
            f'<section id="{self.id}" aria-labelledby="{self.id}-h"><h2 id="{self.id}-h">{self.title}</h2>'
            f"{self.body}</section>"
        )


def missing(id: str, title: str, reason: str) -> Section:
    """Return a section without content; `reason` is a sentence with the remedy."""
    return Section(id, title, f'<p class="none">{esc(reason)}</p>', empty=True)


def data_uri(image: np.ndarray, side: int = 0, *, lossless: bool = False) -> str:
    """uint8 (h, w, 3) -> WebP as a URI; `side` pixels high and wide, 0 for its own size."""
    square = Image.fromarray(image)
    if side:
        square = square.resize((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    square.save(data, "WEBP", quality=82, lossless=lossless, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


class Images:
    """Images of the page: each is stored once, as a class of the style sheet, however often it is shown."""

    def __init__(self) -> None:
        self._classes: dict[bytes, str] = {}
        self._rules: list[str] = []

    def show(self, image: np.ndarray, alt: str) -> str:
        """Return an element with the image, described by `alt`."""
        key = image.tobytes()
        if key not in self._classes:
            self._classes[key] = f"i{len(self._classes)}"
            self._rules.append(f".{self._classes[key]}{{background-image:url({data_uri(image, THUMB)})}}")
        return f'<span class="im {self._classes[key]}" role="img" aria-label="{esc(alt)}"></span>'

    def css(self) -> str:
        """Rules of all images that were shown."""
        return "\n".join(self._rules)
