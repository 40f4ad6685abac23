// The page of a run. Each view is drawn by a function of its own; one that cannot be drawn says why on its card.
const COSTS = {
  macs: ["MACs", "M", M, 2],
  params: ["parameters", "M", M, 3],
  latency_ms: ["predicted latency", "ms", 1, 3],
};
const QUALITIES = {
  top1: ["top-1 (%)", 2],
  balanced: ["balanced accuracy (%)", 2],
  ppl: ["perplexity", 2],
  agreement: ["agreement with the source (%)", 2],
  kl: ["KL to the source (nats)", 4],
  loss: ["loss (nats)", 4],
};
const OWN = ["quality", "error"]; // what a measure of one's own gave, the second where lower is better
const LOGARITHMIC = ["ppl", "kl"];
const state = { cost: null, quality: null, split: null, chosen: null, place: null, over: 0, brush: {} };
const byId = id => document.getElementById(id);
const number = x => typeof x === "number";
const round = x => (number(x) ? Number(x.toPrecision(4)) : x);
const percent = (x, digits = 1) => (number(x) ? (100 * x).toFixed(digits) + " %" : "");
const called = t => "trial " + t.trial + " on rung " + t.rung;
const shell = text => (/^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\"'\"'") + "'");
class NotDrawn extends Error {}

let trials, front, quality, cost, costs;

function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A table from headings and rows of cells; a cell is a text, a number, or an element. ``words`` are columns of text.
function table(id, headings, rows, words = []) {
  const [head, body] = byId(id).querySelectorAll("thead, tbody");
  head.replaceChildren(element("tr"));
  headings.forEach((text, i) =>
    head.firstChild.append(element("th", text, { className: words.includes(i) ? "text" : "", scope: "col" })),
  );
  body.replaceChildren(
    ...rows.map(cells => {
      const row = element("tr");
      cells.forEach((cell, i) => {
        const place = element("td", undefined, { className: words.includes(i) ? "text" : "" });
        place.append(cell === null || cell === undefined ? "" : cell);
        row.append(place);
      });
      return row;
    }),
  );
  savable(id);
}

// A button below a table that saves it as CSV; spreadsheets compute text that begins with one of =+-@, so it is quoted.
function savable(id) {
  const made = byId(id),
    place = made.closest(".scroll");
  if (place.nextElementSibling?.dataset.saves === id) return;
  const button = element("button", "save as CSV", { type: "button" });
  button.dataset.saves = id;
  button.addEventListener("click", () => {
    const link = element("a", "", {
      href: URL.createObjectURL(new Blob([csv(made)], { type: "text/csv" })),
      download: page.name.replace(/[^\w.-]+/g, "-") + "-" + id + ".csv",
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  place.after(button);
}

function csv(made) {
  const cell = text => {
    const safe = /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? "'" + text : text;
    return /[",\n\r]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
  };
  return (
    Array.from(made.rows, row => Array.from(row.cells, c => cell(c.dataset.value ?? c.textContent)).join(",")).join(
      "\r\n",
    ) + "\r\n"
  );
}

function options(id, choices, key) {
  const select = byId(id),
    wanted = JSON.stringify(choices);
  if (!choices.some(([value]) => value === state[key])) state[key] = choices.length ? choices[0][0] : null;
  if (select.dataset.choices !== wanted) {
    select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
    select.dataset.choices = wanted;
  }
  select.value = state[key];
}

function copied(text) {
  const holder = element("div"),
    pre = element("pre", text, { tabIndex: 0 });
  const button = element("button", "copy", { type: "button" });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(pre);
      button.textContent = "selected: press Ctrl-C";
    }
  });
  holder.append(pre, button);
  return holder;
}

function plot(id, traces, extra) {
  const place = byId(id);
  Plotly.react(id, traces, layout(extra), config);
  if (!place.dataset.listens) {
    place.dataset.listens = "yes";
    place.on("plotly_click", event => {
      const unit = event.points[0].customdata;
      if (trials.some(t => t.unit === unit)) choose(unit);
    });
  }
}
