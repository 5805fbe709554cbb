"""The search page: one HTML file, whose script asks the application and shows its answers."""

import json
from collections.abc import Sequence

from xclip_jax.report import style
from xclip_jax.report.markup import esc

_CSS = """
main{padding-top:8px;padding-bottom:64px}header{padding:40px 0 12px}
form{display:flex;flex-wrap:wrap;gap:10px;margin:0}
form>div{flex:1 1 260px;min-width:0}
label{display:block;font-weight:600;font-size:15px;margin-bottom:6px}
input[type=search],textarea,input[type=file]{width:100%;font:inherit;color:inherit;background:var(--card);
border:1px solid var(--muted);border-radius:10px;padding:10px 14px}
textarea{min-height:112px;resize:vertical;line-height:1.45}
form button{margin:0;align-self:flex-end}
button.main{background:var(--accent);color:var(--card);border-color:var(--accent);padding:10px 20px}
.status{min-height:1.6em;margin:12px 0;color:var(--muted)}.status.error{color:var(--bad);font-weight:600}
.pictures{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(46%,150px),1fr));list-style:none;
margin:0;padding:0}
.pictures button{display:block;width:100%;margin:0;padding:8px;border-radius:14px;font-weight:400;color:inherit;
text-align:left}
.pictures img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#fff;border-radius:8px}
.pictures span{display:block;font-size:13px;line-height:1.35;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
margin-top:6px}
.pictures small{font-size:12px}
.answer{display:grid;gap:20px;grid-template-columns:minmax(0,200px) minmax(0,1fr);align-items:start}
.answer>img{width:100%;border-radius:12px;border:1px solid var(--edge);background:#fff}
.answer .bars{font-size:15px}
@media(max-width:560px){.answer{grid-template-columns:minmax(0,1fr)}.answer>img{max-width:200px}}
"""

_SCRIPT = """
"use strict";
const $ = id => document.getElementById(id);
const make = (tag, parent, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = name;
  parent.append(node);
  return node;
};
const say = (id, text, error = false) => { $(id).textContent = text; $(id).classList.toggle("error", error); };
let asked = 0;
const ask = async (status, address, options) => {
  const number = ++asked;
  say(status, "Searching ...");
  try {
    const response = await fetch(address, options), answer = await response.json();
    if (number !== asked) return null;
    if (answer.error) throw new Error(answer.error);
    return answer;
  } catch (error) {
    if (number === asked) say(status, error instanceof TypeError ? "The server does not answer." : error.message, true);
    return null;
  }
};
const show = (list, matches) => {
  list.replaceChildren();
  for (const match of matches) {
    const button = make("button", make("li", list)), title = match.text || match.name.split("/").pop();
    button.type = "button";
    const image = make("img", button);
    image.src = "thumbnail/" + match.image;
    image.alt = "";
    image.loading = "lazy";
    make("span", button, title).title = match.name;
    make("small", button, "cosine " + match.score.toFixed(2));
    button.addEventListener("click", () => name(match.image, "thumbnail/" + match.image, title));
  }
};
const name = async (image, source, title) => {
  $("given").src = source;
  $("given").alt = title;
  $("answer").hidden = false;
  $("answer").scrollIntoView({ block: "nearest" });
  const names = $("names").value.split("\\n").map(line => line.trim()).filter(Boolean);
  const body = JSON.stringify({ image, names }), headers = { "Content-Type": "application/json" };
  const answer = await ask("named", "names", { method: "POST", headers, body });
  $("best").replaceChildren();
  $("like").replaceChildren();
  if (!answer) return;
  for (const [rank, best] of answer.names.entries()) {
    const item = make("li", $("best"), "", rank ? "" : "right");
    item.style.setProperty("--v", Math.min(1, Math.max(0, best.score)));
    make("span", item, best.name);
    make("small", item, best.score.toFixed(2));
  }
  say("named", answer.names.length ? title + ": " + answer.names[0].name : "Type names to choose from.");
  show($("like"), answer.matches);
};
$("search").addEventListener("submit", async event => {
  event.preventDefault();
  const answer = await ask("searched", "search?text=" + encodeURIComponent($("text").value));
  if (!answer) return;
  say("searched", answer.matches.length + " pictures, best first. Choose one to name it.");
  show($("matches"), answer.matches);
});
let given = null;
$("picture").addEventListener("change", () => {
  const file = $("picture").files[0], reader = new FileReader();
  if (!file) return;
  const large = "The picture is too large; choose one of at most " + (LIMIT >> 20) + " MiB.";
  if (file.size > LIMIT) return say("named", large, true);
  reader.onload = () => { given = [reader.result, reader.result, file.name]; name(...given); };
  reader.readAsDataURL(file);
});
$("name").addEventListener("submit", event => {
  event.preventDefault();
  if (given) name(...given); else say("named", "Choose a picture first.", true);
});
"""


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
<input id="text" type="search" maxlength="1000" required autocomplete="off"></div>
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
