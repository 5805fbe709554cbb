"""The page's style sheet and script: written by hand, no library, nothing fetched."""

CSS = """
:root{--ink:#111827;--muted:#5b6472;--paper:#f3f4f6;--card:#fff;--edge:#e5e7eb;--accent:#4338ca;--soft:#eef2ff;
--right:#a7f3d0;--right-ink:#046c4e;--other:#e0e7ff;--bad:#b91c1c;--bad-soft:#fee2e2;--heat:67 56 202;
--l0:#4f46e5;--l1:#d97706;--l2:#059669;--l3:#db2777;--l4:#0891b2;--l5:#7c3aed;--l6:#65a30d;--l7:#b45309;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--muted:#9aa3b2;--paper:#0f1218;--card:#181c25;--edge:#2a303c;
--accent:#a5b4fc;--soft:#20263a;--right:#0f5c46;--right-ink:#6ee7b7;--other:#2b3150;--bad:#fca5a5;--bad-soft:#43201f;
--heat:129 140 248;--l0:#818cf8;--l1:#fbbf24;--l2:#34d399;--l3:#f472b6;--l4:#22d3ee;--l5:#c4b5fd;--l6:#a3e635;
--l7:#fdba74}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header>div,footer>div,nav ul{max-width:1100px;margin:0 auto;padding:0 24px}
header{padding:56px 0 28px}
.eyebrow{margin:0 0 6px;color:var(--accent);font-size:13px;font-weight:600;letter-spacing:.08em;
text-transform:uppercase}
h1{margin:0;font-size:clamp(30px,5.4vw,50px);line-height:1.08;letter-spacing:-.025em;text-wrap:balance}
.lead{margin:14px 0 0;color:var(--muted);font-size:18px;max-width:64ch;overflow-wrap:anywhere}
h2{margin:0;font-size:27px;letter-spacing:-.015em;line-height:1.2}
h3{margin:44px 0 4px;font-size:19px;letter-spacing:-.01em}
section{padding:40px 0 16px;scroll-margin-top:44px}
section>p,.intro{margin:8px 0 20px;color:var(--muted);max-width:76ch}
small,.muted{color:var(--muted);font-size:13px}
a{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
nav{position:sticky;top:0;z-index:5;background:var(--paper);border-bottom:1px solid var(--edge)}
nav ul{display:flex;gap:4px;list-style:none;overflow-x:auto;scrollbar-width:none}
nav a{display:block;padding:10px 10px;color:var(--muted);text-decoration:none;font-size:14px;white-space:nowrap}
nav li:first-child a{margin-left:-10px}
nav a:hover{color:var(--accent)}
.skip{position:absolute;left:-999px}.skip:focus{left:16px;top:8px;background:var(--card);padding:8px;z-index:9}
.card{background:var(--card);border:1px solid var(--edge);border-radius:14px;padding:18px;min-width:0}
.tiles{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(178px,1fr));margin-top:30px}
.tile b{display:block;font-size:36px;line-height:1.1;letter-spacing:-.03em;margin:6px 0 2px;font-weight:650}
.tile b small{font-size:18px;letter-spacing:0;font-weight:500}
.tile span{display:block;color:var(--muted);font-size:13px;line-height:1.4;overflow-wrap:anywhere}
.tile .name{color:var(--ink);font-size:14px;font-weight:600;min-height:2.8em}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 20px;margin:26px 0 0}
.facts div{min-width:0}.facts .long{grid-column:span 2}
.facts dt{color:var(--muted);font-size:12.5px}
.facts dd{margin:0;font-size:15px;font-weight:550;overflow-wrap:anywhere}
.grid2{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.grid3{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.grid4{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,236px),1fr))}
.chart{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:14px;padding:16px 18px 34px;
min-width:0}
.chart figcaption{display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline;font-size:14px;min-height:46px;
align-content:flex-start}
.chart p{margin:30px 0 -18px;font-size:13px;line-height:1.45;color:var(--muted)}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;margin:0;padding:0;list-style:none;font-size:13px;color:var(--muted);
width:100%}
.legend li::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:3px;background:var(--c)}
.plot{position:relative;height:200px;margin:6px 4px 0 44px;cursor:crosshair;touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot polyline{fill:none;stroke:var(--c);stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot line{vector-effect:non-scaling-stroke}
.plot .grid{stroke:var(--edge)}
.plot .level{stroke:var(--muted);stroke-dasharray:4 4;stroke-width:1.2}
.plot .zone{fill:var(--bad);opacity:.09}
.plot span{position:absolute;font-size:12px;line-height:1;color:var(--muted);font-variant-numeric:tabular-nums;
white-space:nowrap;pointer-events:none}
.plot .y{right:calc(100% + 8px);transform:translateY(50%)}
.plot .x{top:calc(100% + 9px);transform:translateX(-50%)}
.plot .mark{left:calc(100% + 7px);transform:translateY(50%)}
.marked{margin-right:40px}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--muted);opacity:.6;pointer-events:none}
.dot{position:absolute;width:8px;height:8px;border-radius:50%;background:var(--c);border:1.5px solid var(--card);
transform:translate(-50%,50%);pointer-events:none}
.tip{position:absolute;top:4px;background:var(--card);border:1px solid var(--edge);border-radius:9px;padding:7px 10px;
font-size:12.5px;line-height:1.5;box-shadow:0 6px 20px rgb(0 0 0/.13);pointer-events:none;z-index:3;white-space:nowrap;
font-variant-numeric:tabular-nums}
.tip i{display:inline-block;width:8px;height:8px;border-radius:50%;background:var(--c);margin-right:6px}
.c0{--c:var(--l0)}.c1{--c:var(--l1)}.c2{--c:var(--l2)}.c3{--c:var(--l3)}.c4{--c:var(--l4)}.c5{--c:var(--l5)}
.c6{--c:var(--l6)}.c7{--c:var(--l7)}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:14px;margin:0 0 18px}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
.wide th,.wide td{padding:8px 14px;text-align:right;white-space:nowrap}
.wide thead th{color:var(--muted);font-weight:500;font-size:13px;border-bottom:1px solid var(--edge)}
.wide th:first-child{text-align:left;font-weight:500}.wide thead th:first-child{font-weight:650;color:var(--ink)}
.wide tbody tr+tr>*{border-top:1px solid var(--edge)}
.wide tr.more>*{border-top:0!important;padding-top:0;color:var(--muted);font-size:13px}
.wide tr.more th{padding-left:30px;font-weight:400}
td small{margin-left:4px}
.wide .text{text-align:left}
.pill,.tile .pill{display:inline-block;font-size:12.5px;line-height:1.5;font-weight:600;padding:0 9px;
border-radius:99px;
background:var(--edge);color:var(--muted)}
.pill.above{background:var(--right);color:var(--right-ink)}.pill.below{background:var(--bad-soft);color:var(--bad)}
.tile .pill{margin:6px 0 2px;white-space:normal;border-radius:12px}
.run::before{content:"";display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--c);
margin-right:6px}
.run{font-weight:600;overflow-wrap:anywhere}.wide .run{overflow-wrap:normal}
.over .c1,.over .c5{stroke-dasharray:9 4;--on:9px;--off:12px}
.over .c2,.over .c6{stroke-dasharray:2 3;--on:3px;--off:6px}
.over .c3,.over .c7{stroke-dasharray:12 3 2 3;--on:13px;--off:16px}
.over .legend li::before{width:21px;background:repeating-linear-gradient(90deg,var(--c) 0 var(--on,21px),
transparent var(--on,21px) var(--off,21px))}
.tiles.runs{grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr))}h3+.wide{margin-top:14px}
.striped{border-top:5px solid var(--c)}
.tile.striped b{font-size:24px;overflow-wrap:anywhere}.tile.striped .name{min-height:0}
.by+.by,.quote+.by{margin-top:12px}.by .head{display:flex;gap:8px;align-items:baseline;font-size:13px;margin-bottom:4px}
.by .head small{margin-left:auto;white-space:nowrap}.by .row{margin-top:4px}
.several td{line-height:1.45}.keys-of td{white-space:normal!important;overflow-wrap:anywhere;max-width:300px}
.wide .bar{text-align:center;width:200px}
.forest{display:block;fill:var(--muted);overflow:visible}.forest.above{fill:var(--right-ink)}.forest.below{fill:var(--bad)}
.forest line{stroke:var(--muted);stroke-dasharray:3 3}.forest rect{opacity:.45}
.light{border-top:4px solid var(--l2)}.light.alarm{border-top-color:var(--bad);background:var(--bad-soft)}
.light.early{border-top-color:var(--muted)}
.light h3{margin:0 0 2px;font-size:16px;display:flex;gap:8px;align-items:center}
.light h3 span{margin-left:auto;font-size:12.5px;font-weight:600;padding:1px 9px;border-radius:99px;
background:var(--right);color:var(--right-ink)}
.light.alarm h3 span{background:var(--bad);color:var(--card)}
.light.early h3 span{background:var(--edge);color:var(--muted)}
.light p{margin:8px 0 0;font-size:14px;color:var(--muted)}.light.alarm p{color:var(--ink)}
.gauge{position:relative;height:10px;border-radius:5px;background:var(--other);margin:16px 0 8px}
.gauge b{position:absolute;inset:0 auto 0 0;border-radius:5px 0 0 5px;background:var(--bad);opacity:.45}
.gauge i{position:absolute;top:-4px;width:18px;height:18px;margin-left:-9px;border-radius:50%;background:var(--l2);
border:3px solid var(--card);box-shadow:0 0 0 1px var(--edge)}
.alarm .gauge i{background:var(--bad)}.early .gauge i{background:var(--muted)}
.im{display:block;width:100%;aspect-ratio:1;background:#fff center/contain no-repeat;border-radius:8px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.guess{display:grid;grid-template-columns:76px minmax(0,1fr);gap:4px 14px;align-content:start}
.guess .head{grid-column:1/-1;display:flex;gap:8px;align-items:baseline;font-size:14.5px;min-width:0;margin-bottom:6px}
.guess .head b{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.guess .head small{margin-left:auto;white-space:nowrap}
.ok{color:var(--right-ink)!important;font-weight:650}
.bars{list-style:none;margin:0;padding:0;font-size:13px;min-width:0}
.bars li{position:relative;display:flex;gap:8px;padding:1.5px 8px;margin-bottom:3px;border-radius:5px;overflow:hidden}
.bars li::before{content:"";position:absolute;inset:0 auto 0 0;width:calc(var(--v)*100%);min-width:3px;
background:var(--other);border-radius:5px}
.bars li.right::before{background:var(--right)}.bars li.right{color:var(--right-ink);font-weight:600}
.bars span{position:relative;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bars li.right small{color:inherit}
.bars small{position:relative;margin-left:auto;font-weight:400;white-space:nowrap}
.row{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:8px;margin:10px 0 0;padding:0;list-style:none}
.row li{min-width:0;font-size:11.5px;color:var(--muted);text-align:center;line-height:1.3}
.row span+span{display:block;margin-top:4px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.row .right .im{box-shadow:0 0 0 3px var(--l2)}.row .right span+span{color:var(--right-ink);font-weight:650}
.quote{display:flex;gap:8px;align-items:baseline;font-size:16px;font-weight:620;min-width:0}
.quote q{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.quote small{margin-left:auto;font-weight:400;white-space:nowrap}
.words{margin:2px 0 0;font-size:14px;color:var(--right-ink);font-weight:550;line-height:1.4;display:-webkit-box;
-webkit-line-clamp:2;line-clamp:2;-webkit-box-orient:vertical;overflow:hidden;min-height:2.8em}
.find{display:flex;flex-wrap:wrap;gap:10px 14px;align-items:center;margin:0 0 16px}
.find input{flex:1 1 240px;max-width:420px;font:inherit;color:inherit;background:var(--card);
border:1px solid var(--edge);border-radius:10px;padding:9px 14px;min-width:0}
.find output{color:var(--muted);font-size:14px}
button{font:inherit;font-weight:550;color:var(--accent);background:var(--card);border:1px solid var(--edge);
border-radius:10px;padding:8px 16px;cursor:pointer;margin:18px 0 0}
button:hover{background:var(--soft)}
[hidden]{display:none!important}
.heat{border-spacing:3px;border-collapse:separate;width:100%;padding:12px;font-size:13px;table-layout:fixed;
min-width:860px}
.heat thead td,.heat thead th:first-child{width:130px}
.wide .heat td,.wide .heat th{border:0!important}
.wide .heat tbody td{height:44px;padding:0;text-align:center;border-radius:6px;
background:rgb(var(--heat)/calc(.05 + .55*var(--v,0)))}
.wide .heat th{padding:0 6px;font-weight:500;font-size:12.5px;line-height:1.25;white-space:normal;
overflow-wrap:anywhere;vertical-align:middle}
.wide .heat thead th{vertical-align:bottom;text-align:center;color:var(--muted);padding-bottom:4px}
.wide .heat.dense{border-spacing:1px;min-width:1000px}.wide .heat.dense tbody td{height:9px;border-radius:1px}
.wide .heat.dense th{font-size:9px;line-height:1;padding:0 3px;white-space:nowrap;overflow:hidden}
.wide .heat.dense thead th span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:110px}
.pair{display:grid;grid-template-columns:1fr;gap:8px;font-size:14px}
.pair .row{grid-template-columns:repeat(3,64px);margin:0}
.pair b{overflow-wrap:anywhere}
.look{margin:0}.look figcaption{font-size:13px;color:var(--muted);margin-top:8px;text-align:center}
.look div{display:grid;grid-template-columns:repeat(3,1fr);gap:8px}
.look img{width:100%;height:auto;aspect-ratio:1;border-radius:8px;display:block;image-rendering:pixelated}
.look img:first-child{image-rendering:auto}
.keys{display:grid;grid-template-columns:repeat(3,1fr);text-align:center;font-size:11.5px;color:var(--muted);margin-top:4px}
.none{border:1px dashed var(--edge);border-radius:14px;padding:18px 20px;color:var(--muted);max-width:none!important;
overflow-wrap:anywhere}
details{background:var(--card);border:1px solid var(--edge);border-radius:14px;padding:14px 18px;margin-top:14px}
summary{cursor:pointer;font-weight:550}
pre{overflow-x:auto;font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:14px 0 0}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{padding:36px 0 64px;color:var(--muted);font-size:14px}
@media(max-width:560px){main,header>div,footer>div,nav ul{padding:0 16px}header{padding-top:34px}.card{padding:14px}
.chart{padding:14px 12px 34px}.plot{margin-left:40px}.tile b{font-size:30px}.row{gap:6px}section{padding-top:32px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.wide th,.wide td{padding:7px 6px}.wide th:first-child{padding-left:12px;white-space:normal;min-width:112px}
.wide table{font-size:13px}.several .pill{white-space:normal;max-width:118px;
font-size:12px;padding:0 7px;border-radius:12px}
.wide td:last-child,.wide th:last-child{padding-right:12px}.wide tr.more th{padding-left:18px}
.wide thead th{white-space:normal;font-size:12px}.wide .text{white-space:normal}td small{margin-left:2px;font-size:11px}
.facts{grid-template-columns:repeat(2,minmax(0,1fr))}
}
@media print{nav,.find,button{display:none}.card,.chart{break-inside:avoid}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

SCRIPT = """
"use strict";
const make = (tag, name, parent) => {
  const node = document.createElement(tag);
  node.className = name;
  parent.append(node);
  return node;
};
const written = v => {
  const size = Math.abs(v);
  if (size >= 1000) return Math.round(v).toLocaleString("en");
  if (size && size < 1e-3) return v.toExponential(2);
  return String(+v.toPrecision(4));
};
const charts = [...document.querySelectorAll("[data-chart]")].map(figure => {
  const data = JSON.parse(figure.dataset.chart), plot = figure.querySelector(".plot"), shown = [];
  const [x0, x1] = data.x, [y0, y1] = data.y;
  const across = x => 100 * (x - x0) / (x1 - x0);
  const nearest = (list, x) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) { const mid = low + high >> 1; list[mid] < x ? low = mid : high = mid; }
    return x - list[low] < list[high] - x ? low : high;
  };
  const hide = () => { while (shown.length) shown.pop().remove(); };
  const steps = [...new Set(data.lines.flatMap(line => line.x))].sort((a, b) => a - b);
  let current = steps.length - 1;
  const show = (x, tip) => {
    hide();
    if (!tip && (x < x0 || x > x1)) return;
    current = nearest(steps, x);
    const step = steps[current];
    const cross = make("div", "cross", plot);
    cross.style.left = across(step) + "%";
    shown.push(cross);
    const box = tip && make("div", "tip", plot);
    if (tip) { box.setAttribute("role", "status"); make("div", "", box).textContent = "step " + written(step); }
    for (const line of data.lines) {
      const i = nearest(line.x, step), dot = make("i", "dot c" + line.color, plot);
      dot.style.left = across(line.x[i]) + "%";
      dot.style.bottom = 100 * (line.y[i] - y0) / (y1 - y0) + "%";
      shown.push(dot);
      if (!tip) continue;
      const row = make("div", "", box);
      make("i", "c" + line.color, row);
      row.append(line.name + "  " + written(line.y[i]));
    }
    if (tip) {
      const left = across(step);
      if (left > 50) box.style.right = "calc(" + (100 - left) + "% + 10px)";
      else box.style.left = "calc(" + left + "% + 10px)";
      shown.push(box);
    }
  };
  const everywhere = x => { for (const chart of charts) chart.show(x, chart.figure === figure); };
  const nowhere = () => { for (const chart of charts) chart.hide(); };
  plot.addEventListener("pointermove", event => {
    const area = plot.getBoundingClientRect();
    everywhere(x0 + (x1 - x0) * Math.min(1, Math.max(0, (event.clientX - area.left) / area.width)));
  });
  plot.addEventListener("pointerleave", nowhere);
  figure.addEventListener("blur", nowhere);
  figure.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") nowhere();
    if (move === undefined) return;
    event.preventDefault();
    everywhere(steps[Math.min(steps.length - 1, Math.max(0, current + move))]);
  });
  return { figure, show, hide };
});
const box = document.getElementById("find");
if (box) {
  const cards = [...document.querySelectorAll("[data-words]")], more = document.getElementById("more");
  const output = document.getElementById("found"), first = Number(box.dataset.first);
  let all = false;
  const filter = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let matches = 0;
    for (const card of cards) {
      const fits = words.every(word => card.dataset.words.includes(word));
      matches += fits;
      card.hidden = !fits || !(all || words.length || matches <= first);
    }
    more.hidden = all || words.length > 0 || cards.length <= first;
    output.textContent = words.length ? matches + " of " + cards.length + " clusters" : cards.length + " clusters";
  };
  box.addEventListener("input", filter);
  more.addEventListener("click", () => { all = true; filter(); });
  filter();
}
"""
