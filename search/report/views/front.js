// Kinds of change, by the causes of what is saved: narrower streams, fewer ranks and units are all widths.
const CHANGES = { "blocks dropped": "blocks", "attention replaced": "mixers", "tokens merged": "tokens" };

// The only kind of change that made a candidate smaller, if it is one: what a search over that axis alone would find.
function alone(t) {
  const kinds = new Set(
    page.causes.slice(0, -1).flatMap((cause, i) => (t.saved[i] > 0 ? [CHANGES[cause] ?? "widths"] : [])),
  );
  return kinds.size === 1 ? [...kinds][0] : null;
}

// Quality against cost.
function drawFront() {
  if (!trials.length) throw new NotDrawn(nothingYet());
  options(
    "cost",
    costs.map(name => [name, "share of the source's " + COSTS[name][0]]),
    "cost",
  );
  const validated = front.length > 0 && front.every(t => t.validation);
  const own =
    page.data.search_split > 0 ? "the images that candidates are compared by" : "validation images, all candidates";
  options("split", [...(validated ? [[VALIDATED, "validation images, the front"]] : []), [COMPARED, own]], "split");
  const known = Object.keys(QUALITIES).filter(
    name => name === quality || (front.length && front.every(t => number(figures(t)?.[name]))),
  );
  options(
    "quality",
    known.map(name => [name, QUALITIES[name][0]]),
    "quality",
  );
  const x = state.cost,
    y = state.quality,
    log = LOGARITHMIC.includes(y);
  const list = trials.filter(t => figures(t) && number(figures(t)[y]) && brushed(t)),
    reference = sourceFigures();
  const members = list.filter(t => t.front),
    others = list.filter(t => !t.front);
  const points = (name, own, extra) =>
    Object.assign(
      {
        name,
        type: "scatter",
        mode: "markers",
        x: own.map(t => share(t, x)),
        y: own.map(t => figures(t)[y]),
        text: own.map(t => hover(t, figures(t))),
        customdata: own.map(t => t.unit),
        hovertemplate: "%{text}<extra></extra>",
      },
      extra,
    );
  const traces = [];
  const paths =
    state.split === COMPARED ? list.filter(t => t.rungs.length > 1 && t.rungs.every(r => number(r[y]))) : [];
  if (paths.length)
    traces.push({
      name: "from rung to rung",
      type: "scatter",
      mode: "lines",
      hoverinfo: "skip",
      x: paths.flatMap(t => [...t.rungs.map(() => share(t, x)), null]),
      y: paths.flatMap(t => [...t.rungs.map(r => r[y]), null]),
      line: { color: colour("other"), width: 1, dash: "dot" },
    });
  const last = Math.max(...trials.map(t => t.rung));
  for (let rung = 0; rung <= last; rung++) {
    const here = others.filter(t => t.rung === rung);
    if (here.length)
      traces.push(
        points("rung " + rung, here, {
          marker: {
            size: 7,
            color: colour("other"),
            symbol: rung === last && last > 0 ? "circle" : ["circle-open", "square-open", "diamond-open"][rung % 3],
          },
        }),
      );
  }
  const interval = y === quality && members.length && members.every(t => intervalOf(figures(t)));
  // the stairs go through what no cheaper member beats: others are of the front by another measure, or by chance
  const better = (a, b) => (LOGARITHMIC.includes(y) || y === "loss" ? a < b : a > b),
    rising = [];
  for (const t of [...members].sort((a, b) => share(a, x) - share(b, x)))
    if (!rising.length || better(figures(t)[y], figures(rising.at(-1))[y])) rising.push(t);
  if (rising.length > 1)
    traces.push({
      name: "best so far",
      type: "scatter",
      mode: "lines",
      hoverinfo: "skip",
      showlegend: false,
      x: rising.map(t => share(t, x)),
      y: rising.map(t => figures(t)[y]),
      line: { shape: "hv", color: colour("front"), width: 1.5 },
    });
  if (members.length)
    traces.push(
      points("front", members, {
        text: members.map(t => hover(t, figures(t)) + (alone(t) ? "<br>only " + alone(t) : "")),
        marker: {
          color: colour("front"),
          size: 9,
          symbol: members.map(t => (t.unit === state.chosen ? "diamond" : "circle")),
        },
        ...(interval
          ? {
              error_y: {
                type: "data",
                symmetric: false,
                color: colour("front"),
                thickness: 1,
                array: members.map(t => figures(t).interval[1] - figures(t)[y]),
                arrayminus: members.map(t => figures(t)[y] - figures(t).interval[0]),
              },
            }
          : {}),
      }),
    );
  const further = y === quality ? front.filter(t => t.promoted && number(t.promoted[y])) : [];
  if (further.length)
    traces.push(
      points("promoted", further, {
        y: further.map(t => t.promoted[y]),
        marker: { symbol: "triangle-up", size: 11, color: colour("ink") },
      }),
    );
  const single = list.filter(t => alone(t) && !members.includes(t));
  if (single.length && single.length < list.length)
    traces.push(
      points("one kind of change alone", single, {
        text: single.map(t => hover(t, figures(t)) + "<br>only " + alone(t)),
        marker: { symbol: "x-thin-open", size: 8, color: colour("ink") },
      }),
    );
  const printed = y === "top1" ? page.published.filter(row => number(row[x])) : [];
  if (printed.length)
    traces.push({
      name: "published (ImageNet-1K)",
      type: "scatter",
      mode: "markers",
      x: printed.map(row => row[x] / source[x]),
      y: printed.map(row => row.top1),
      text: printed.map(row => plain(row.name + ", top-1 " + row.top1 + " % as printed in " + row.paper)),
      marker: { symbol: "square-open", size: 9, color: colour("source") },
      hovertemplate: "%{text}<extra></extra>",
    });
  if (number(reference[y]))
    traces.push({
      name: "source",
      type: "scatter",
      mode: "markers",
      x: [1],
      y: [reference[y]],
      marker: { symbol: "star", size: 15, color: colour("source") },
      hovertemplate: "source<br>" + fixed(reference[y], QUALITIES[y][1]) + "<extra></extra>",
    });
  const told =
    y === quality &&
    number(page.headline.least) &&
    (page.headline.split === "search") === (state.split === COMPARED && page.data.search_split > 0);
  const band = told
    ? [
        {
          type: "rect",
          xref: "paper",
          x0: 0,
          x1: 1,
          y0: page.headline.least,
          y1: Math.max(reference[y], 100),
          fillcolor: colour("other"),
          opacity: 0.16,
          line: { width: 0 },
          layer: "below",
        },
      ]
    : [];
  // the range follows the front: one candidate far off must not press it flat
  const about = members.length ? members : list;
  const values = [
    ...about.flatMap(t => (interval ? figures(t).interval : [figures(t)[y]])),
    ...(number(reference[y]) ? [reference[y]] : []),
    ...(told ? [page.headline.least] : []),
  ]
    .filter(v => number(v) && (!log || v > 0))
    .map(v => (log ? Math.log10(v) : v));
  const low = Math.min(...values),
    high = Math.max(...values),
    pad = 0.06 * (high - low) || Math.abs(high) * 0.02 || 1;
  const shares = about.map(t => share(t, x)),
    wide = Math.max(...shares, 1) > 8 * Math.min(...shares);
  const left = Math.min(...shares),
    right = Math.max(...shares, 1);
  plot("scatter", traces, {
    shapes: band,
    uirevision: [x, y, state.split].join(),
    hovermode: "closest",
    xaxis: axis(
      "share of the source's " + COSTS[x][0],
      wide
        ? { type: "log", tickformat: ".0%", dtick: "D2", range: [Math.log10(left) - 0.06, Math.log10(right) + 0.06] }
        : { tickformat: ".0%", range: [Math.max(left - 0.06, 0), right + 0.04] },
    ),
    yaxis: axis(QUALITIES[y][0], { ...(log ? { type: "log" } : {}), range: [low - pad, high + pad] }),
  });
  byId("view-front").dataset.points = list.length;
}

const nothingYet = () =>
  tasks("failed") && !tasks("finished")
    ? "No candidate has a result: all " +
      tasks("failed") +
      ' that ended have failed. The reasons are under "What is it doing now?".'
    : page.diverged
      ? "No candidate has a result that is a number: training diverged."
      : "No candidate has finished yet.";
