// What the search did: growth of its front, its variables, speed, and tasks.
function drawGrowth() {
  if (page.growth.length < 2)
    throw new NotDrawn(page.growth.length ? "One task has ended; a curve needs two." : nothingYet());
  byId("over").value = String(state.over);
  byId("corner").textContent =
    "Hypervolume of the front as tasks ended. Its box reaches from the worst corner, the source's cost at " +
    (quality === "ppl" ? "an endless perplexity" : OWN.includes(quality) ? "no quality" : "0 %") +
    ", to no cost at " +
    atBest() +
    ".";
  plot(
    "growth",
    [
      {
        type: "scatter",
        mode: "lines",
        line: { shape: "hv", color: colour("source") },
        x: page.growth.map(p => p[state.over] / (state.over ? 60 : 1)),
        y: page.growth.map(p => p[2]),
        hovertemplate: "%{y:.4f}<extra></extra>",
      },
    ],
    {
      uirevision: state.over,
      xaxis: axis(state.over ? "minutes since the first task began" : "epochs trained"),
      yaxis: axis("hypervolume"),
    },
  );
}

function drawVariables() {
  if (trials.length < 2)
    throw new NotDrawn(trials.length ? "One candidate has a result; lines of two can be compared." : nothingYet());
  const names = [...new Set(trials.flatMap(t => Object.keys(t.point)))].filter(
    name => new Set(trials.map(t => t.point[name])).size > 1,
  );
  const columns = [...names, shareName(), "quality"];
  const scales = columns.map(name => {
    const values = trials.map(t => variable(t, name)),
      words = values.some(v => typeof v === "string");
    const kinds = words ? [...new Set(values.map(String))].sort() : [],
      numbers = values.filter(number);
    const low = words ? 0 : Math.min(...numbers),
      high = words ? Math.max(kinds.length - 1, 1) : Math.max(...numbers);
    const log = !words && low > 0 && high / low >= 20,
      on = v => (log ? Math.log(v) : v);
    return {
      name,
      low,
      high,
      words: kinds,
      at: v => {
        const x = words ? kinds.indexOf(String(v)) : v;
        return !number(x) ? null : high > low ? (on(x) - on(low)) / (on(high) - on(low)) : 0.5;
      },
    };
  });
  const lines = (list, name, line) => ({
    name,
    type: "scatter",
    mode: "lines",
    line,
    hoverinfo: "skip",
    connectgaps: false,
    x: list.flatMap(() => [...columns.keys(), null]),
    y: list.flatMap(t => [...columns.map((c, i) => scales[i].at(variable(t, c))), null]),
  });
  const seen = trials.filter(brushed),
    traces = [];
  if (seen.some(t => !t.front))
    traces.push(
      lines(
        seen.filter(t => !t.front),
        "candidates",
        { color: colour("other"), width: 0.7 },
      ),
    );
  if (seen.some(t => t.front))
    traces.push(
      lines(
        seen.filter(t => t.front),
        "front",
        { color: colour("front"), width: 2 },
      ),
    );
  const chosen = seen.find(t => t.unit === state.chosen);
  if (chosen) traces.push(lines([chosen], "chosen", { color: colour("source"), width: 3.5, dash: "dash" }));
  const ends = scales.flatMap((s, i) =>
    [
      [s.high, 1.05],
      [s.low, -0.05],
    ].map(([v, y]) => ({
      x: i,
      y,
      showarrow: false,
      font: { size: 11 },
      text: plain(s.words.length ? s.words[Math.min(v, s.words.length - 1)] : round(v)),
    })),
  );
  plot("parallel", traces, {
    uirevision: "parallel",
    annotations: ends,
    margin: { l: 30, r: 30, t: 76, b: 20 },
    legend: { orientation: "h", y: 1.28 },
    xaxis: {
      tickvals: [...columns.keys()],
      ticktext: columns.map(c => plain(c === "quality" ? QUALITIES[quality][0] : c)),
      side: "top",
      tickangle: -22,
      gridcolor: colour("grid"),
      zeroline: false,
      range: [-0.4, columns.length - 0.6],
    },
    yaxis: { visible: false, range: [-0.12, 1.12] },
  });
  filters(scales.filter(s => !s.words.length));
  const found = page.importance;
  table(
    "importance",
    [
      "variable",
      "explains" + (found.rung === null ? "" : " (rung " + found.rung + ", " + found.candidates + " candidates)"),
    ],
    found.shares.map(([name, part]) => {
      const cell = element("span", percent(part, 0));
      cell.prepend(element("span", "", { className: "bar", style: "width:" + Math.round(120 * part) + "px" }));
      return [name, cell];
    }),
    [0, 1],
  );
  if (!found.shares.length)
    table(
      "importance",
      ["variable", "explains"],
      [["too few candidates (" + found.candidates + ") to say", ""]],
      [0, 1],
    );
}

// Two numbers per variable, the ends of what is shown; they stay as they are while the page is fed.
function filters(scales) {
  const place = byId("filters"),
    names = JSON.stringify(scales.map(s => s.name));
  if (place.dataset.names === names) return;
  place.dataset.names = names;
  place.replaceChildren(
    ...scales.map(s => {
      const label = element("label", s.name === "quality" ? QUALITIES[quality][0] : s.name),
        ends = element("span");
      [0, 1].forEach(end => {
        const input = element("input", undefined, {
          type: "number",
          step: "any",
          placeholder: String(round(end ? s.high : s.low)),
        });
        input.setAttribute("aria-label", s.name + (end ? " at most" : " at least"));
        const before = state.brush[s.name]?.[end];
        if (number(before)) input.value = before;
        input.addEventListener("input", () => {
          const own = state.brush[s.name] ?? [null, null];
          own[end] = input.value === "" || !Number.isFinite(input.valueAsNumber) ? null : input.valueAsNumber;
          state.brush[s.name] = own;
          drawAll(["view-front", "view-variables"]);
        });
        ends.append(input);
      });
      label.append(ends);
      return label;
    }),
  );
}

function drawSpeed() {
  if (!page.speed.length)
    throw new NotDrawn(
      "Nothing was measured." +
        (front.length
          ? " Measure the front with: prunesweep resume " + shell(page.path) + " --set search.measure_front=true"
          : ""),
    );
  const [{ device_name, dtype, threads }] = page.speed;
  byId("device").textContent =
    "Measured on " + device_name + ", " + dtype + (threads === null ? "" : ", threads: " + threads) + ".";
  table(
    "speed",
    ["model", "batch", "measured (ms)", "source (ms)", "measured speed-up", "promised by MACs"],
    page.speed.map(p => [
      p.unit,
      p.batch,
      fixed(p.median_ms, 3),
      fixed(p.source_ms, 3),
      (p.source_ms / p.median_ms).toFixed(2) + " x",
      p.promised.toFixed(2) + " x",
    ]),
    [0],
  );
}

function drawActivity() {
  const now = page.activity;
  byId("driver").textContent = now.driver
    ? "A driver is alive: process " +
      now.driver.pid +
      " on " +
      now.driver.host +
      "." +
      (number(now.seconds_left) ? " About " + duration(now.seconds_left) + " are left." : "")
    : "No driver is alive." +
      (tasks("pending") + tasks("interrupted") ? " Go on with: prunesweep resume " + shell(page.path) : "");
  table(
    "rungs",
    ["rung", "epochs", "tasks", "finished", "running", "waiting", "interrupted", "pending", "failed"],
    now.tasks.map(level => [
      level.rung,
      level.epochs ?? "",
      level.planned,
      level.finished,
      level.running,
      level.waiting ?? 0,
      level.interrupted,
      level.pending,
      level.failed,
    ]),
    [],
  );
  const since = t => (number(t) ? new Date(1000 * t).toLocaleTimeString() : "");
  table(
    "running",
    ["task", "state", "epoch", "loss", "since"],
    now.handed_out.map(t => [
      t.unit,
      now.driver ? (t.waiting ? "waiting for a worker" : "running") : "interrupted",
      number(t.epoch) ? t.epoch + " of " + t.epochs : "not yet one",
      fixed(t.loss, 4),
      since(t.since),
    ]),
    [0, 1],
  );
  table(
    "failures",
    ["failed", "why"],
    now.failures.map(([unit, why]) => [unit, element("span", why, { className: "bad" })]),
    [0, 1],
  );
  byId("running").closest(".scroll").hidden = !now.handed_out.length;
  byId("failures").closest(".scroll").hidden = !now.failures.length;
  for (const id of ["running", "failures"])
    byId(id).closest(".scroll").nextElementSibling.hidden = byId(id).closest(".scroll").hidden;
  if (!now.handed_out.length && !now.failures.length) throw new NotDrawn("Nothing is running, and nothing has failed.");
}
