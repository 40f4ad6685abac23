// What members of the front saved, and what is left of their blocks and spaces.
const CAUSE_COLOURS = ["#4467c4", "#8e5bb5", "#0f8a78", "#c98a12", "#b5533c", "#5d7f2c"],
  SHAPES = ["/", "x", ".", "\\", "|", "+"];

function drawSavings() {
  if (!front.length) throw new NotDrawn(trials.length ? "The front has no member yet." : nothingYet());
  const traces = page.causes
    .map((name, i) => ({
      name,
      type: "bar",
      orientation: "h",
      y: front.map(t => t.unit),
      x: front.map(t => t.saved[i]),
      customdata: front.map(t => t.unit),
      hovertemplate: "%{y}: " + name + " %{x:.1%}<extra></extra>",
      marker:
        name === "kept"
          ? { color: colour("line"), line: { color: colour("other"), width: 1 } }
          : {
              color: CAUSE_COLOURS[i],
              pattern: { shape: SHAPES[i], solidity: 0.15, fillmode: "overlay", fgcolor: "#fff" },
            },
    }))
    .filter(trace => trace.x.some(x => Math.abs(x) > 0.0005));
  byId("savings").style.height = Math.max(260, 90 + 22 * front.length) + "px";
  plot("savings", traces, {
    barmode: "relative",
    xaxis: axis("", { tickformat: ".0%" }),
    margin: { l: 76, r: 12, t: 58, b: 30 },
    yaxis: axis("", { autorange: "reversed", type: "category", dtick: 1 }),
    uirevision: "savings",
  });
}

// Background and text of a cell: light where little is kept, dark where much is; the better of black and white on it.
function shade(x) {
  const part = (from, to) => Math.round(from + (to - from) * Math.min(Math.max(x, 0), 1));
  const rgb = [part(238, 18), part(243, 62), part(250, 138)];
  const light = rgb.map(c => c / 255).map(c => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  return ["rgb(" + rgb.join() + ")", luminance > 0.179 ? "#000" : "#fff"];
}

function drawMosaic() {
  if (!front.length) throw new NotDrawn(trials.length ? "The front has no member yet." : nothingYet());
  const names = blockNames(source.arch),
    chosen = trials.find(t => t.unit === state.chosen);
  const list = chosen && !chosen.front ? [...front, chosen] : front;
  table(
    "mosaic",
    ["model", ...names.map(n => "block " + n), "stream"],
    list.map(t => [
      t.unit,
      ...t.arch.blocks.map((b, i) => (b === null ? "dropped" : percent(b.macs, 0))),
      widths(t.arch.widths),
    ]),
  );
  const rows = byId("mosaic").tBodies[0].rows;
  list.forEach((t, r) => {
    rows[r].dataset.unit = t.unit;
    rows[r].classList.toggle("chosen", t.unit === state.chosen);
    const head = element("th", t.unit, { className: "member", scope: "row" });
    rows[r].cells[0].replaceWith(head);
    t.arch.blocks.forEach((b, i) => {
      const cell = rows[r].cells[i + 1],
        whole = source.arch.blocks[i];
      if (b === null) {
        cell.style.color = "var(--soft)";
        return;
      }
      [cell.style.background, cell.style.color] = shade(b.macs);
      const words = [
        b.tokens === undefined ? "" : b.tokens + " tokens",
        b.mixer === whole.mixer ? "" : b.mixer === "none" ? "no attention" : b.mixer,
        b.mlp || !whole.mlp ? "" : "no MLP",
      ].filter(Boolean);
      for (const text of words) cell.append(element("br"), text);
      cell.dataset.value = [percent(b.macs, 0), ...words].join("; ");
      cell.title = block(b, names[i]);
    });
  });
}

// the width of a space in a model; null where it has none
function widthIn(t, name) {
  const [kind, place, what] = name.split(".");
  if (kind === "stages") return t.arch.widths[Number(place)] ?? null;
  const b = kind === "blocks" ? t.arch.blocks[Number(place)] : undefined;
  if (b === null || b === undefined || (what !== "mlp" && b.mixer !== "attn")) return b === null ? 0 : null;
  return what === "qk"
    ? b.qk
    : what === "v"
      ? Array.isArray(b.v)
        ? Math.max(...b.v)
        : b.v
      : what === "mlp"
        ? b.mlp
        : null;
}
const lostAt = (space, width) => {
  let i = space.widths.findIndex(w => w >= width);
  if (i < 0) return 0;
  if (space.widths[i] === width || i === 0) return space.lost[i];
  const part = (width - space.widths[i - 1]) / (space.widths[i] - space.widths[i - 1]);
  return space.lost[i - 1] + part * (space.lost[i] - space.lost[i - 1]);
};
const KINDS = {
  embed: "residual stream",
  qk: "queries and keys",
  v: "values",
  mlp: "MLP units",
  sr: "reduced map",
  tail: "word vectors",
};

function drawSpectrum() {
  if (!page.spectra.length)
    throw new NotDrawn(
      "Candidates of this run are cut by a method's scores, not computed from subspaces " +
        "(scores.method = 'subspaces'), so there is no spectrum.",
    );
  const t = trials.find(one => one.unit === state.chosen);
  if (!t) throw new NotDrawn(nothingYet());
  const placeOf = s => s.name.split(".").slice(0, 2).join("."),
    label = p => p.replace("stages.", "stage ").replace("blocks.", "block ").replace("bands.", "band ");
  options(
    "place",
    [...new Set(page.spectra.map(placeOf))].map(p => [p, label(p)]),
    "place",
  );
  const own = page.spectra.filter(s => placeOf(s) === state.place);
  const looks = [
    ["#4467c4", "circle", "solid"],
    ["#0f8a78", "square", "dash"],
    ["#c25a1a", "diamond", "dot"],
  ];
  const traces = own.flatMap((s, i) => {
    const name = KINDS[s.name.split(".")[2]] ?? s.name,
      [color, symbol, dash] = looks[i % 3],
      width = widthIn(t, s.name);
    return [
      {
        name,
        type: "scatter",
        mode: "lines",
        line: { color, dash },
        x: s.widths.map(w => w / s.size),
        y: s.lost,
        hovertemplate: name + ": %{y:.2%} beyond %{x:.0%}<extra></extra>",
      },
      ...(width === null
        ? []
        : [
            {
              name,
              showlegend: false,
              type: "scatter",
              mode: "markers",
              x: [width / s.size],
              y: [lostAt(s, width)],
              marker: { color, symbol, size: 11, line: { color: colour("ink"), width: 1 } },
              hovertemplate: name + ": " + width + " of " + s.size + " kept, %{y:.2%} thrown away<extra></extra>",
            },
          ]),
    ];
  });
  plot("spectrum", traces, {
    uirevision: state.place,
    xaxis: axis("width kept", { tickformat: ".0%", range: [-0.02, 1.03] }),
    yaxis: axis("loss beyond it", { tickformat: ".0%", rangemode: "tozero" }),
  });
  table(
    "spaces",
    ["space", "kept", "of", "thrown away"],
    page.spectra.map(s => {
      const width = widthIn(t, s.name);
      return [
        label(placeOf(s)) + ", " + (KINDS[s.name.split(".")[2]] ?? s.name),
        width,
        s.size,
        width === null ? "" : percent(lostAt(s, width), 2),
      ];
    }),
    [0],
  );
}
