"use strict";
// What reports share: their data, figures as text, the look of plots, the chart of a model's blocks, and the table.
const page = JSON.parse(document.getElementById("data").textContent);
const M = 1e6, source = page.source;
const fixed = (x, n) => x === null || x === undefined ? "" : x.toFixed(n);
const widths = v => Array.isArray(v) ? v.join("/") : v;
const block = (b, i) => b === null ? "block " + i + ": dropped"
  : "block " + i + ": "
      + (b.mixer === "attn" ? b.heads + " heads, qk " + b.qk + ", v " + widths(b.v)
        : b.mixer === "none" ? "no mixer" : b.mixer + " " + widths(b.v))
      + (b.tokens === null ? "" : ", " + b.tokens + " tokens") + ", mlp " + b.mlp;
const font = { family: "system-ui, sans-serif", color: "#1c2430" };
const layout = extra => Object.assign({ font, margin: { l: 64, r: 20, t: 48, b: 64 }, paper_bgcolor: "#fff",
  plot_bgcolor: "#fff", hoverlabel: { align: "left" }, legend: { orientation: "h", y: 1, yanchor: "bottom" } }, extra);
const axis = (title, extra) => Object.assign({ title: { text: title }, gridcolor: "#e9edf2", zeroline: false }, extra);
const config = { responsive: true, displaylogo: false };

// Bars of the channels that a model keeps in every block of the source.
function drawBlocks(arch) {
  const labels = source.arch.blocks.map((_, i) => "block " + i);
  const bars = [["qk", "query/key channels", "#1d4ed8"], ["v", "value channels", "#0f9d8a"], ["mlp", "MLP units", "#c2410c"]]
    .map(([kind, name, color]) => ({ name, type: "bar", x: labels, marker: { color },
      y: arch.blocks.map(b => b === null ? 0 : b.share[kind]),
      customdata: arch.blocks.map(block), hovertemplate: "%{customdata}<br>" + name + ": %{y:.0%}<extra></extra>" }));
  const dropped = arch.blocks.map((b, i) => [b, i]).filter(([b]) => b === null).map(([, i]) =>
    ({ x: labels[i], y: 0.5, text: "dropped", showarrow: false, textangle: -90, font: { color: "#66707f" } }));
  Plotly.react("blocks", bars, layout({ barmode: "group", annotations: dropped, xaxis: axis(""),
    yaxis: axis("kept of the source", { range: [0, 1.02], tickformat: ".0%" }) }), config);
}

// Rows of ``list`` under the headings of ``columns``, pairs of a heading and a function; a click or Enter chooses one.
function fillTable(columns, list, choose) {
  for (const [name] of columns) {
    const head = document.createElement("th");
    head.textContent = name;
    document.getElementById("heads").append(head);
  }
  for (const t of list) {
    const row = document.getElementById("rows").insertRow();
    row.dataset.unit = t.unit; row.tabIndex = 0;
    for (const [, text] of columns) row.insertCell().textContent = text(t);
    row.addEventListener("click", () => choose(t.unit));
    row.addEventListener("keydown", e => { if (e.key === "Enter") choose(t.unit); });
  }
}

function mark(unit) {
  for (const row of document.querySelectorAll("#rows tr")) row.classList.toggle("chosen", row.dataset.unit === unit);
}

function fillSelect(id, names, titles, draw) {
  const select = document.getElementById(id);
  for (const name of names) select.add(new Option(titles[name][0], name));
  select.addEventListener("change", () => draw(select.value));
}

function onPoint(choose) {
  document.getElementById("scatter").on("plotly_click", e => {
    const unit = e.points[0].customdata;
    if (unit !== undefined) choose(unit);
  });
}
