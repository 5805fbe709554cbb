"""The search page: one HTML file, whose script asks the application and shows its answers."""

import json
from collections.abc import Sequence

from xclip_jax.report import style
from xclip_jax.report.markup import esc
from xclip_jax.serve.index import MAX_TEXT

_CSS = style.read("xclip_jax.serve", "search.css")

_SCRIPT = style.read("xclip_jax.serve", "search.js")


def render(title: str, count: int, names: Sequence[str], max_upload: int) -> str:
    """Return the page.

    Args:
      title: name of the pictures' folder.
      count: number of pictures.
      names: that are typed in at first.
      max_upload: bytes of a picture that is sent.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Search {esc(title)}</title><link rel="icon" href="data:,"><style>{style.CSS}{_CSS}</style></head><body>
<header><div><p class="eyebrow">xclip_jax search</p><h1>{count:,} pictures</h1>
<p class="lead">in <code>{esc(title)}</code>, compared with words and with each other by their embeddings.</p></div>
</header><main>
<section aria-labelledby="by-text"><h2 id="by-text">Pictures for words</h2><br>
<form id="search" role="search"><div><label for="text">What the pictures should show</label>
<input id="text" type="search" maxlength="{MAX_TEXT}" required autocomplete="off"></div>
<button class="main">Search</button></form>
<p class="status" id="searched" role="status"></p><ul class="pictures" id="matches"></ul></section>
<section aria-labelledby="by-image"><h2 id="by-image">Names for a picture</h2><br>
<form id="name"><div><label for="picture">Picture</label><input id="picture" type="file" accept="image/*"></div>
<div><label for="names">Names to choose from, one a line</label>
<textarea id="names" spellcheck="false">{esc(chr(10).join(names))}</textarea></div>
<button>Name again</button></form>
<p class="status" id="named" role="status"></p>
<div id="answer" hidden><div class="answer"><img id="given" alt=""><ol class="bars" id="best"></ol></div>
<h3>Pictures most like it</h3><br><ul class="pictures" id="like"></ul></div></section></main>
<script>const LIMIT = {json.dumps(max_upload)};{_SCRIPT}</script></body></html>
"""
