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
      if (step < line.x[0] || step > line.x.at(-1)) continue;
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
