"use strict";
// What reports share: their data, figures as text, the look of plots, the chart of a model's blocks, and the table.
let page = JSON.parse(document.getElementById("data").textContent);
let source = page.source;
const M = 1e6;
const fixed = (x, n) => (x === null || x === undefined ? "" : x.toFixed(n));
const widths = v => (Array.isArray(v) ? v.join("/") : v);
// plots read text as markup, so what is not ours must not look like any
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const mixer = b =>
  b.mixer === "attn"
    ? b.heads + " heads, qk " + b.qk + ", v " + widths(b.v)
    : b.mixer === "none"
      ? "no mixer"
      : b.mixer + " " + widths(b.v);
const block = (b, i) =>
  b === null
    ? "block " + i + ": dropped"
    : "block " + i + ": " + mixer(b) + (b.tokens === undefined ? "" : ", " + b.tokens + " tokens") + ", mlp " + b.mlp;
// of a picture: "2" or, of several stages, "1.0"
const blockNames = arch =>
  arch.stages.length === 1
    ? arch.blocks.map((_, i) => String(i))
    : arch.stages.flatMap((count, s) => Array.from({ length: count }, (_, i) => s + "." + i));
const channels = {
  qk: b => b.heads * b.qk,
  v: b => (Array.isArray(b.v) ? b.v.reduce((a, x) => a + x, 0) : b.heads ? b.heads * b.v : b.v),
  mlp: b => b.mlp,
};

const colour = name =>
  getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();
const layout = extra =>
  Object.assign(
    {
      font: { family: "system-ui, sans-serif", color: colour("ink"), size: 12 },
      margin: { l: 60, r: 16, t: 40, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { align: "left" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a swipe scrolls
      legend: { orientation: "h", y: 1, yanchor: "bottom" },
    },
    extra,
  );
const axis = (title, extra) =>
  Object.assign({ title: { text: title }, gridcolor: colour("grid"), zeroline: false }, extra);
// these buttons and no others: none that sends anything anywhere
const config = {
  responsive: true,
  displaylogo: false,
  showSendToCloud: false,
  showEditInChartStudio: false,
  plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

// Bars of the channels that a model keeps in every block of the source.
function drawBlocks(arch) {
  const labels = blockNames(source.arch).map(name => "block " + name);
  const bars = [
    ["qk", "query/key channels", "#1d4ed8", "/"],
    ["v", "value channels", "#0f9d8a", "."],
    ["mlp", "MLP units", "#c2410c", ""],
  ].map(([kind, name, color, shape]) => ({
    name,
    type: "bar",
    x: labels,
    marker: { color, pattern: { shape, solidity: 0.2 } },
    y: arch.blocks.map((b, i) => (b === null ? 0 : channels[kind](b) / channels[kind](source.arch.blocks[i]) || 0)),
    customdata: arch.blocks.map(block),
    hovertemplate: "%{customdata}<br>" + name + ": %{y:.0%}<extra></extra>",
  }));
  const dropped = arch.blocks
    .map((b, i) => [b, i])
    .filter(([b]) => b === null)
    .map(([, i]) => ({
      x: labels[i],
      y: 0.5,
      text: "dropped",
      showarrow: false,
      textangle: -90,
      font: { color: colour("soft") },
    }));
  Plotly.react(
    "blocks",
    bars,
    layout({
      barmode: "group",
      annotations: dropped,
      xaxis: axis(""),
      yaxis: axis("kept of the source", { range: [0, 1.02], tickformat: ".0%" }),
    }),
    config,
  );
}

// Rows of ``list`` under the headings of ``columns``, pairs of a heading and a function; a click or Enter chooses one.
function fillTable(columns, list, choose) {
  document.getElementById("heads").replaceChildren();
  document.getElementById("rows").replaceChildren();
  for (const [name] of columns) {
    const head = document.createElement("th");
    head.textContent = name;
    document.getElementById("heads").append(head);
  }
  for (const t of list) {
    const row = document.getElementById("rows").insertRow();
    row.dataset.unit = t.unit;
    row.tabIndex = 0;
    for (const [, text] of columns) row.insertCell().textContent = text(t);
    row.addEventListener("click", () => choose(t.unit));
    row.addEventListener("keydown", e => {
      if (e.key === "Enter" || e.key === " ") {
        e.preventDefault();
        choose(t.unit);
      }
    });
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
