// The chosen model, and the table of the front.
function drawChosen() {
  options(
    "model",
    trials.map(t => [
      t.unit,
      t.unit + ", " + ofSource(t) + ", " + shownQuality(best(t)) + (t.front ? ", front" : ""),
    ]),
    "chosen",
  );
  const t = trials.find(one => one.unit === state.chosen);
  byId("chosen").textContent = t ? t.unit + " (" + called(t) + "), to use it" : "The chosen model";
  if (!t) throw new NotDrawn(nothingYet());
  byId("facts").textContent =
    costs
      .map(name => fixed(t[name] / COSTS[name][2], COSTS[name][3]) + " " + COSTS[name][1] + " " + COSTS[name][0])
      .join(", ") +
    ", " +
    ofSource(t) +
    "; stream " +
    widths(t.arch.widths) +
    " of " +
    widths(source.arch.widths) +
    ", " +
    t.arch.depth +
    " of " +
    source.arch.depth +
    " blocks; saved by " +
    (page.causes
      .slice(0, -1)
      .map((cause, i) => [cause, t.saved[i]])
      .filter(([, x]) => Math.abs(x) >= 0.0005)
      .map(([cause, x]) => cause + " " + percent(x))
      .join(", ") || "nothing") +
    (t.given === null ? "." : "; begun as " + t.given[0] + (t.given[1] === null ? "" : " by " + t.given[1]) + ".");
  const row = (what, images, own, epochs) => [
    what,
    images,
    epochs,
    fixed(own[quality], QUALITIES[quality][1]),
    between(own),
    fixed(own.loss, 4),
    fixed(own.kl, 4),
  ];
  const compared = page.data.search_split > 0 ? "held out of training" : "validation";
  const count = own => (number(own.images) ? ", " + own.images.toLocaleString("en") : "");
  const first = { [quality]: t.zero_shot, images: t.images };
  table(
    "stations",
    ["measured", "images", "epochs", QUALITIES[quality][0], "95 % interval", "loss", "KL"],
    [
      ...(["top1", "agreement"].includes(quality)
        ? [row("untrained: " + page.start, compared + count(t), first, 0)]
        : []),
      ...t.rungs.map(r => row("after rung " + r.rung, compared + count(r), r, r.epochs)),
      ...(t.validation
        ? [row("after rung " + t.rung, "validation" + count(t.validation), t.validation, t.epochs)]
        : []),
      ...(t.test ? [row("after rung " + t.rung, "test: " + t.test.test, t.test, t.epochs)] : []),
      ...(t.promoted ? [row("promoted: in full with recipe " + t.promoted.recipe, "validation", t.promoted, "")] : []),
      row("source", "validation" + count(source), source, ""),
    ],
    [0, 1],
  );
  const folder = page.path + "/trials/" + t.unit + "/model",
    model = shell(folder),
    run = shell(page.path),
    data = shell(page.data.name ?? "DATA");
  const out = shell(t.unit);
  byId("commands").replaceChildren(
    ...(t.model
      ? [
          copied(folder),
          copied(
            "import prunesweep, timm\n\nmodel = timm.create_model(" +
              JSON.stringify("local-dir:" + folder) +
              ", pretrained=True)",
          ),
          copied(
            "prunesweep finetune " +
              model +
              " --data " +
              data +
              " --teacher " +
              run +
              "/source --recipe quick --out " +
              out +
              "-finetuned",
          ),
          copied("prunesweep bench " + model + " --source " + run + "/source"),
          copied("prunesweep export " + model + " --to onnx --out " + out + ".onnx"),
        ]
      : [
          element(
            "p",
            "Its model was not kept, because other candidates are better. This makes it again, " +
              (page.start === "as cut" ? "as cut" : "without the refit and the training that it had in the search") +
              ":",
          ),
          copied(again(t)),
        ]),
  );
  byId("provenance").textContent = JSON.stringify(
    { record: t.arch_hash, point: t.point, data: page.data, seed: page.seed, ...page.settings },
    null,
    1,
  );
}

const again = t =>
  t.given
    ? "cp -r " + shell(page.path + "/" + t.given[0]) + " " + shell(t.unit)
    : "import json\n\nfrom prunesweep.models import Cut, cut, load, save\n\nrun = " +
      JSON.stringify(page.path) +
      '\ndecision = json.load(open(f"{run}/trials/r0-' +
      String(t.trial).padStart(4, "0") +
      '/cut.json"))\nsave(cut(load(f"{run}/source"), Cut.from_dict(decision)), ' +
      JSON.stringify(t.unit) +
      ")";

function drawTable() {
  byId("notes").textContent = page.notes.map(line => line + ".").join(" ");
  byId("advice").textContent = page.advice.map(line => "Advice: " + line + ".").join("\n");
  if (!front.length) throw new NotDrawn(trials.length ? "The front has no member yet." : nothingYet());
  const known = read => front.some(t => read(t) !== null && read(t) !== undefined && read(t) !== "");
  const column = (name, text, value = text) => ({ name, text, value });
  const columns = [
    column("model", t => t.unit),
    column("rung", t => t.rung),
    column("epochs", t => t.epochs),
    column(
      QUALITIES[quality][0] + (known(t => t.validation) ? ", validation" : ""),
      t => fixed(best(t)[quality], QUALITIES[quality][1]),
      t => best(t)[quality],
    ),
    column("95 % interval", t => between(best(t))),
    column("images", t => best(t).images ?? ""),
    ...(known(t => t.validation)
      ? [
          column(
            QUALITIES[quality][0] + ", search",
            t => fixed(t[quality], QUALITIES[quality][1]),
            t => t[quality],
          ),
        ]
      : []),
    ...(quality === "ppl"
      ? []
      : [
          column(
            OWN.includes(quality)
              ? "untrained, search"
              : "untrained " + (quality === "agreement" ? "agreement" : "top-1") + " (%), search",
            t => fixed(t.zero_shot, QUALITIES[quality][1]),
            t => t.zero_shot,
          ),
        ]),
    ...["loss", "kl", "agreement"]
      .filter(name => name !== quality)
      .map(name =>
        column(
          { loss: "loss", kl: "KL", agreement: "agreement (%)" }[name],
          t => fixed(best(t)[name], name === "agreement" ? 2 : 4),
          t => best(t)[name],
        ),
      ),
    column("promoted", t => (t.promoted ? fixed(t.promoted[quality], QUALITIES[quality][1]) : "")),
    ...costs.map(name =>
      column(
        COSTS[name][0] + " (" + COSTS[name][1] + ")",
        t => fixed(t[name] / COSTS[name][2], COSTS[name][3]),
        t => t[name] / COSTS[name][2],
      ),
    ),
    ...costs
      .filter(name => number(source[name]))
      .map(name =>
        column(
          "share of " + COSTS[name][0],
          t => fixed(share(t, name), 3),
          t => share(t, name),
        ),
      ),
    column("blocks", t => t.arch.depth),
    column("stream", t => widths(t.arch.widths)),
    ...page.causes.map((cause, i) =>
      column(
        cause,
        t => percent(t.saved[i]),
        t => t.saved[i],
      ),
    ),
  ].filter(c => known(c.text));
  fillTable(
    columns.map(c => [c.name, c.text]),
    front,
    choose,
  );
  Array.from(byId("rows").rows).forEach((row, r) =>
    columns.forEach((c, i) => {
      const value = c.value(front[r]);
      if (number(value)) row.cells[i].dataset.value = value;
    }),
  );
  mark(state.chosen);
  savable("table");
}
