// What candidates gave, as text, and the lines and tiles at the top of the page.
const COMPARED = "compared",
  VALIDATED = "validated";
// what a candidate gave on the images in question, and the source
const figures = t => (state.split === VALIDATED ? t.validation : t);
const sourceFigures = () => (state.split === VALIDATED || !source.searched ? source : source.searched);
const best = t => t.validation ?? t; // where it is said which
const share = (t, name = costs[0]) => (number(source[name]) ? t[name] / source[name] : null);
// The first objective that is a cost, as a share of the source's.
const shareName = () => "share of " + COSTS[costs[0]][0];
const ofSource = t => percent(share(t)) + " of the source's " + COSTS[costs[0]][0];
// intervals are of the top-1 or, where there are no labels, of the agreement
const intervalOf = own =>
  quality === "top1" || (quality === "agreement" && !number(own.top1)) ? (own.interval ?? null) : null;
const between = own => intervalOf(own)?.map(x => x.toFixed(1)).join("-") ?? "";
const shownQuality = own =>
  QUALITIES[quality][0].replace(" (%)", "") +
  " " +
  fixed(own[quality], QUALITIES[quality][1]) +
  (QUALITIES[quality][0].endsWith(" (%)") ? " %" : "");
const ownScale = () => quality === "ppl" || OWN.includes(quality); // no share of 100 %
const atBest = () =>
  quality === "ppl"
    ? "the source's perplexity"
    : OWN.includes(quality)
      ? "the source's " + QUALITIES[quality][0]
      : "100 %";
const hover = (t, own) =>
  "<b>" +
  plain(t.unit) +
  "</b>, " +
  t.epochs +
  " epochs<br>" +
  plain(shownQuality(own)) +
  (intervalOf(own) ? " (" + between(own) + ")" : "") +
  (number(own.loss) ? "<br>loss " + fixed(own.loss, 4) : "") +
  (number(own.kl) ? "<br>KL " + fixed(own.kl, 4) : "") +
  "<br>" +
  costs
    .map(name => fixed(t[name] / COSTS[name][2], COSTS[name][3]) + " " + COSTS[name][1] + " " + COSTS[name][0])
    .join("<br>") +
  "<br>" +
  ofSource(t);
const imagesOf = () =>
  (state.split === VALIDATED ? "validation" : page.data.search_split > 0 ? "search" : "validation") + " images";
const brushed = t =>
  Object.entries(state.brush).every(([name, [low, high]]) => {
    const value = variable(t, name);
    return !number(value) || ((low === null || value >= low) && (high === null || value <= high));
  });
const variable = (t, name) => (name === shareName() ? share(t) : name === "quality" ? t[quality] : t.point[name]);

// Tasks of all rungs that are running, waiting, interrupted, pending, finished or failed; a cluster's version may be older.
const tasks = name => page.activity.tasks.reduce((sum, level) => sum + (level[name] ?? 0), 0);

function drawSummary() {
  const [first, ...further] = page.activity.tasks;
  byId("name").textContent =
    page.name + ": " + (front.length === 1 ? "a front of 1 model" : "a front of " + front.length + " models");
  byId("summary").textContent =
    source.name +
    ", " +
    page.source.arch.depth +
    " blocks, " +
    shownQuality(source) +
    " at " +
    fixed(source.macs / M, 2) +
    " M MACs and " +
    fixed(source.params / M, 3) +
    " M parameters" +
    (source.images
      ? "; " +
        source.images.toLocaleString("en") +
        " validation images, one of them is " +
        (100 / source.images).toPrecision(2) +
        " points"
      : "") +
    ". " +
    first.finished +
    " of " +
    first.planned +
    " candidates finished" +
    further.map(level => ", " + level.finished + " of " + level.planned + " on rung " + level.rung).join("") +
    ", " +
    ["running", "waiting", "interrupted", "pending", "failed"]
      .filter(name => tasks(name) || ["pending", "failed"].includes(name))
      .map(name => tasks(name) + " " + name + (name === "waiting" ? " for a worker" : ""))
      .join(", ") +
    (page.diverged ? ", " + page.diverged + " without a number (training diverged)" : "") +
    (page.damaged.length ? ", " + page.damaged.length + " damaged" : "") +
    ".";
}

function drawTiles() {
  const head = page.headline,
    find = place => place && front.find(t => t.trial === place[0] && t.rung === place[1]);
  const alike = find(head.alike),
    within = find(head.within);
  const note = t => called(t) + ", " + shownQuality(best(t)) + (intervalOf(best(t)) ? " (" + between(best(t)) + ")" : "");
  const on =
    head.split === "search"
      ? "on images held out of training"
      : head.images
        ? "on " + head.images.toLocaleString("en") + " validation images"
        : "";
  const saved = t =>
    page.causes
      .slice(0, -1)
      .map((cause, i) => [cause, t.saved[i]])
      .filter(([, x]) => Math.abs(x) >= 0.005)
      .sort((a, b) => b[1] - a[1])
      .map(([cause, x]) => cause + " " + (100 * x).toFixed(0))
      .join(" + ");
  const tiles = [];
  if (ownScale()) {
    const low = quality !== "quality";
    const values = front.map(t => best(t)[quality]).filter(number);
    tiles.push([
      (low ? "lowest " : "highest ") + QUALITIES[quality][0] + " of the front",
      values.length ? fixed((low ? Math.min : Math.max)(...values), QUALITIES[quality][1]) : "none",
      "",
    ]);
  }
  else {
    tiles.push([
      "smallest model not told apart from the source",
      alike ? ofSource(alike) : "none",
      alike
        ? note(alike) + " " + on
        : front.length
          ? head.images
            ? "every member of the front is worse, at 95 % confidence"
            : "the number of images is not known"
          : "the front is empty",
    ]);
    tiles.push([
      "smallest model within 1 point of the source",
      within ? ofSource(within) : "none",
      within ? note(within) : "",
    ]);
  }
  const told = alike ?? within ?? front[0];
  if (told) tiles.push(["what saved them, points of MACs", saved(told) || "nothing", called(told)]);
  tiles.push([
    "hypervolume",
    fixed(page.hypervolume, 4),
    "of the box from (source's cost, quality 0) to (no cost, " +
      atBest() +
      ")",
  ]);
  tiles.push([
    "what the run cost",
    duration(page.spent.seconds),
    page.spent.tasks + " tasks, " + page.spent.epochs + " epochs, summed over workers",
  ]);
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value, text]) => {
      const tile = element("div"),
        detail = element("dd", value);
      detail.append(element("small", text));
      tile.append(element("dt", name), detail);
      return tile;
    }),
  );
}

const duration = seconds =>
  seconds < 90
    ? seconds.toFixed(0) + " s"
    : seconds < 5400
      ? (seconds / 60).toFixed(1) + " min"
      : (seconds / 3600).toFixed(1) + " h";
