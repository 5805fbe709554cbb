"""The search page: one HTML file, whose script asks the application and shows its answers."""

import json
from collections.abc import Sequence

from xclip_jax.commands.serve.index import MAX_TEXT
from xclip_jax.report import style
from xclip_jax.report.markup import esc

_CSS = style.read("xclip_jax.commands.serve", "search.css")

_SCRIPT = style.read("xclip_jax.commands.serve", "search.js")


def render(title: str, count: int, names: Sequence[str], max_upload: int) -> str:
    """Return the page.

    Args:
      title: name of the images' folder.
      count: number of images.
      names: that are typed in at first.
      max_upload: bytes of an image that is sent.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Search {esc(title)}</title><link rel="icon" href="data:,"><style>{style.CSS}{_CSS}</style></head><body>
<header><div><p class="eyebrow">xclip_jax search</p><h1>{count:,} images</h1>
<p class="lead">in <code>{esc(title)}</code>. Search them by text, find similar ones, or label an image.</p></div>
</header><main>
<section aria-labelledby="by-text"><h2 id="by-text">Search images by text</h2><br>
<form id="search" role="search"><div><label for="text">What the images should show</label>
<input id="text" type="search" maxlength="{MAX_TEXT}" required autocomplete="off"></div>
<button class="main">Search</button></form>
<p class="status" id="searched" role="status"></p><ul class="images" id="matches"></ul></section>
<section aria-labelledby="by-image"><h2 id="by-image">Label an image</h2><br>
<form id="name"><div><label for="image">Image</label><input id="image" type="file" accept="image/*"></div>
<div><label for="names">Labels to choose from, one per line</label>
<textarea id="names" spellcheck="false">{esc(chr(10).join(names))}</textarea></div>
<button>Update labels</button></form>
<p class="status" id="named" role="status"></p>
<div id="answer" hidden><div class="answer"><img id="given" alt=""><ol class="bars" id="best"></ol></div>
<h3>Similar images</h3><br><ul class="images" id="like"></ul></div></section></main>
<script>const LIMIT = {json.dumps(max_upload)};{_SCRIPT}</script></body></html>
"""
