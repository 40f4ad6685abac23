// Which views there are, and what draws them.
const VIEWS = {
  "view-front": drawFront,
  "view-savings": drawSavings,
  "view-blocks": drawMosaic,
  "view-spectrum": drawSpectrum,
  "view-growth": drawGrowth,
  "view-variables": drawVariables,
  "view-speed": drawSpeed,
  "view-activity": drawActivity,
  "view-chosen": drawChosen,
  "view-table": drawTable,
};

// Draw views; one that cannot be drawn shows a sentence in the place of what it would show.
function drawAll(ids = Object.keys(VIEWS)) {
  for (const id of ids) {
    const card = byId(id);
    let why = null;
    try {
      VIEWS[id]();
    } catch (error) {
      why = error instanceof NotDrawn ? error.message : "This view cannot be drawn: " + error.message;
    }
    let said = card.querySelector(":scope > .why");
    if (!said) {
      said = element("p", "", { className: "why" });
      said.setAttribute("role", "status");
      card.append(said);
    }
    said.hidden = why === null;
    said.textContent = why ?? "";
    const partly = id === "view-activity" || id === "view-table";
    if (!partly)
      for (const part of card.querySelectorAll(
        ":scope > .plot, :scope > .scroll, :scope > .controls, :scope > details, :scope > button, #commands, #facts",
      ))
        part.hidden = why !== null;
  }
}

function choose(unit) {
  state.chosen = unit;
  drawAll(["view-front", "view-blocks", "view-spectrum", "view-variables", "view-chosen"]);
  mark(unit);
}

// Take the page's data in, keeping what was chosen.
function show() {
  source = page.source;
  quality = page.objectives.find(name => ["top1", "balanced", "ppl", "agreement", ...OWN].includes(name));
  if (OWN.includes(quality)) QUALITIES[quality] = [page.measure ?? quality, 4];
  if (!number(source[quality]) && quality === "agreement") {
    source.agreement = 100;
    if (source.searched) source.searched.agreement = 100;
  }
  trials = page.trials;
  costs = Object.keys(COSTS).filter(name => number(source[name]) && trials.every(t => number(t[name])));
  const cheapest = page.objectives.find(name => costs.includes(name)) ?? "macs";
  costs.sort((a, b) => (b === cheapest) - (a === cheapest));
  front = trials.filter(t => t.front).sort((a, b) => a[cheapest] - b[cheapest]);
  const told = page.headline.alike ?? page.headline.within;
  if (!trials.some(t => t.unit === state.chosen))
    // also one whose candidate went on to another rung
    state.chosen =
      (
        trials.find(t => state.chosen && t.trial === Number(state.chosen.split("-")[1])) ??
        (told && front.find(t => t.trial === told[0] && t.rung === told[1])) ??
        front[Math.floor(front.length / 2)] ??
        trials[0]
      )?.unit ?? null;
  drawSummary();
  drawTiles();
  drawAll();
  byId("footer").textContent = Object.entries(page.versions)
    .map(([k, v]) => k + " " + v)
    .join(", ");
}

for (const id of ["cost", "quality", "split"])
  byId(id).addEventListener("change", event => {
    state[id] = event.target.value;
    drawAll(["view-front"]);
  });
byId("place").addEventListener("change", event => {
  state.place = event.target.value;
  drawAll(["view-spectrum"]);
});
byId("over").addEventListener("change", event => {
  state.over = Number(event.target.value);
  drawAll(["view-growth"]);
});
byId("model").addEventListener("change", event => choose(event.target.value));
byId("unbrush").addEventListener("click", () => {
  state.brush = {};
  delete byId("filters").dataset.names;
  drawAll(["view-front", "view-variables"]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
show();

// The element that has the focus, as its place within the nearest element that has a name.
function focused() {
  const active = document.activeElement;
  const home = active?.parentElement?.closest("[id]");
  if (active?.id || !home) return () => {};
  const list = () => Array.from(byId(home.id)?.querySelectorAll("button, pre, tr[tabindex], input, summary") ?? []);
  const place = list().indexOf(active);
  return () => (document.contains(active) ? active : list()[place])?.focus({ preventScroll: true });
}

// Ask the server that the page came from for data every other second; what has not changed is not drawn again.
async function feed(tag) {
  const status = byId("feed");
  status.hidden = false;
  try {
    const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      page = await answer.json();
      tag = answer.headers.get("ETag");
      const restore = focused();
      show();
      restore();
      status.textContent = "Up to date since " + new Date().toLocaleTimeString() + "; looks every 2 seconds.";
    } else if (answer.status !== 304) status.textContent = "The run cannot be read: " + (await answer.text()).trim();
  } catch {
    status.textContent =
      "The server does not answer any more; this is what it said last. Start it again with: prunesweep watch " +
      shell(page.path);
  }
  setTimeout(feed, 2000, tag);
}
if (document.documentElement.dataset.feed === "live") feed();
