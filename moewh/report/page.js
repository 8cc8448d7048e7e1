/* The report's page: what is selected decides which drawing of each figure is shown.

Figures are Plotly's own JSON, made by moewh.plots; here arrays are decoded and the three measures of pairs of experts
are made from their counts. Texts reach the page through textContent, or escaped in the figures.
*/
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const selected = { run: data.runs[data.runs.length - 1].run_id, domain: undefined, layer: 0 };
const TYPES = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array, i4: Int32Array,
  f4: Float32Array, f8: Float64Array,
};
const NO_DOMAIN = "(none)";
const domainTexts = new Map(data.domain_texts);
const MOST_CELLS = 5000; // in a table of numbers
const WIDTHS = { print: 680 }; // width of a figure on paper, in pixels

/** The displayed name of a domain. */
const shownDomain = (name) => (name === null || name === undefined ? NO_DOMAIN : domainTexts.get(name));

/** An element with a class and a text. */
function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** One of our texts, with parts between backticks as code. */
function withCode(text) {
  return text.split("`").map((part, index) => (index % 2 ? make("code", "", part) : part));
}

/** The bytes of base64. A loop: Uint8Array.from with a function takes ten times as long. */
function bytesOf(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let index = 0; index < letters.length; index += 1) bytes[index] = letters.charCodeAt(index);
  return bytes;
}

/** The numbers of {dtype, bdata, shape}: an array, or an array of rows. */
function decode(spec) {
  const flat = new TYPES[spec.dtype](bytesOf(spec.bdata).buffer);
  if (!spec.shape) return flat;
  const [rows, columns] = spec.shape.split(",").map(Number);
  return Array.from({ length: rows }, (_, row) => flat.subarray(row * columns, (row + 1) * columns));
}

/** The numbers of several matrices per cell, as Plotly's customdata. */
function stacked(planes) {
  return planes[0].map((row, y) => Array.from(row, (_, x) => planes.map((plane) => plane[y][x])));
}

/** The three measures of pairs of experts, from their counts: see moewh.plots.pairs. */
function pairMeasures({ counts, divisors, diagonal }) {
  const tokens = decode(counts);
  const rows = tokens.map((row) => row.reduce((sum, count) => sum + count, 0) / divisors[0]);
  const columns = Array.from(tokens[0], (_, x) => tokens.reduce((sum, row) => sum + row[x], 0) / divisors[1]);
  const all = tokens.reduce((sum, row) => row.reduce((part, count) => part + count, sum), 0) / divisors[2];
  const none = (y, x) => !rows[y] || !columns[x] || (x === y && !diagonal);
  const made = (cell) => tokens.map((row, y) => Float64Array.from(row, (count, x) => (none(y, x) ? NaN : cell(count, y, x))));
  return {
    lift: made((count, y, x) => (count * all) / (rows[y] * columns[x])),
    conditional: made((count, y) => count / rows[y]),
    tokens: made((count) => count),
  };
}

/** A drawing's figure for a measure, with all its numbers. */
function figureOf(panel, drawing, measure) {
  if (drawing.counts) {
    const measures = pairMeasures(drawing);
    const others = panel.measures.filter((name) => name !== measure);
    const { data: [trace], layout } = panel.shapes[drawing.counts.shape][measure];
    const customdata = stacked(others.map((name) => measures[name]));
    return { data: [{ ...trace, z: measures[measure], customdata }], layout };
  }
  const { data: traces, layout } = drawing.figures[measure];
  const full = traces.map((trace) => {
    if (!trace.z) return trace;
    const planes = [trace.z, ...trace.customdata].map((name) => decode(drawing.planes[name]));
    return { ...trace, z: planes[0], customdata: stacked(planes.slice(1)) };
  });
  return { data: full, layout };
}

/** The figure's drawing for the current selection; undefined if there is none. */
function drawingOf(panel) {
  return panel.drawings.find(
    (drawing) =>
      drawing.runs.includes(selected.run) &&
      (!panel.by.includes("domain") || drawing.domain === selected.domain) &&
      (!panel.by.includes("layer") || drawing.layer === layerShown()),
  );
}

const runShown = () => data.runs.find((run) => run.run_id === selected.run);
const layerShown = () => (runShown().layers[selected.layer] || {}).layer;

/** The part of the selection that a figure depends on, in words. */
function described(panel) {
  const words = { run: `run ${selected.run}`, domain: `domain ${shownDomain(selected.domain)}`, layer: `layer ${layerShown()}` };
  return panel.by.filter((name) => name in words).map((name) => words[name]).join(", ");
}

/** Each x of a curve → the indices of its points: several checkpoints may have one training step. */
function placesOf({ mode, x }) {
  const places = new Map();
  for (const [index, value] of Array.from(x).entries()) {
    if (!places.has(value)) places.set(value, [index]);
    else if (mode !== "lines") places.get(value).push(index);
  }
  return places;
}

/** The rows of a table of curves as [x, turn], with as many rows for an x as the curve with most points there. */
function rowsOf(drawn) {
  const most = new Map();
  for (const places of drawn)
    for (const [x, found] of places) most.set(x, Math.max(most.get(x) || 0, found.length));
  return [...most].flatMap(([x, number]) => Array.from({ length: number }, (_, turn) => [x, turn]));
}

/** A table of the numbers that a figure shows. */
function numbersTable(figure) {
  const [first] = figure.data;
  const heat = first.type === "heatmap";
  const columns = heat ? first.x : figure.data.map((trace) => trace.name);
  const drawn = heat ? [] : figure.data.map(placesOf);
  const places = heat ? [] : rowsOf(drawn);
  const labels = heat ? first.y : places.map(([x]) => x);
  const at = (row, column) => {
    if (heat) return first.z[row][column];
    const [x, turn] = places[row];
    const found = drawn[column].get(x) || [];
    const { mode, y } = figure.data[column];
    const index = found[mode === "lines" ? 0 : turn]; // a line for chance has one value for all rows of an x
    return index === undefined ? null : y[index];
  };
  const most = Math.max(1, Math.floor(MOST_CELLS / columns.length));
  const corner = `${unescaped(figure.layout.yaxis.title.text)} \\ ${unescaped(figure.layout.xaxis.title.text)}`;
  const head = heat ? [corner, ...columns] : [unescaped(figure.layout.xaxis.title.text), ...columns.map(unescaped)];
  const rows = Array.from({ length: Math.min(most, labels.length) }, (_, row) => [
    String(labels[row]),
    ...columns.map((_, column) => at(row, column)),
  ]);
  return table(head, rows, labels.length > most ? `${most} of ${labels.length} rows; the query gives all.` : "");
}

const unescaped = (text) => String(text).replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");

/** A table with a heading for each column and each row; the first column holds texts. */
function table(head, rows, note = "") {
  const made = make("table");
  const line = made.createTHead().insertRow();
  for (const [index, name] of head.entries()) {
    const cell = make("th", index && rows.every((row) => typeof row[index] === "number") ? "" : "text", name);
    cell.scope = "col";
    line.append(cell);
  }
  const body = made.createTBody();
  for (const [name, ...cells] of rows) {
    const row = body.insertRow();
    const title = make("th");
    title.scope = "row";
    title.append(make("bdi", "", name));
    row.append(title);
    for (const value of cells) row.append(cellOf(value));
  }
  if (note) made.createCaption().textContent = note;
  return made;
}

function cellOf(value) {
  if (typeof value !== "number") {
    const cell = make("td", "text");
    cell.append(make("bdi", "", value === null || value === undefined ? "" : value));
    return cell;
  }
  if (Number.isNaN(value)) return make("td");
  return make("td", "", Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4))));
}

/** A select with options; `change` is called with the index of the one chosen. */
function choice(title, options, change) {
  const field = make("label", "", `${title} `);
  const select = make("select");
  select.append(...options.map((option, index) => new Option(option, index)));
  select.addEventListener("change", () => change(Number(select.value)));
  field.append(select);
  return field;
}

/** A figure's section; `update` shows what is selected. */
class Section {
  constructor(panel) {
    this.panel = panel;
    this.measure = panel.measures[0];
    this.stale = true;
    this.near = false;
    this.element = make("section");
    this.element.id = `figure-${panel.name}`;
    this.title = make("h2", "", panel.title);
    this.title.id = `${this.element.id}-title`;
    this.element.setAttribute("aria-labelledby", this.title.id);
    this.local = make("div", "local");
    this.body = make("figure");
    this.plot = make("div", "plot");
    this.missing = make("p", "missing");
    this.command = make("code");
    const caption = make("figcaption", "", "Numbers: ");
    caption.append(this.command);
    this.body.append(this.plot, this.missing, caption);
    this.element.append(this.title, make("p", "about", panel.about), this.local, this.body);
    this.setUp();
  }

  setUp() {
    if (this.panel.measures.length > 1)
      this.local.append(
        choice("Measure", this.panel.measures, (index) => {
          this.measure = this.panel.measures[index];
          this.update();
        }),
      );
    this.numbers = make("details");
    this.numbers.append(make("summary", "", "Numbers as a table"));
    this.holder = make("div", "scroll");
    this.holder.tabIndex = 0;
    this.holder.setAttribute("role", "region");
    this.holder.setAttribute("aria-label", `${this.panel.title}: numbers`);
    this.numbers.append(this.holder);
    this.numbers.addEventListener("toggle", () => this.fillNumbers());
    this.element.append(this.numbers);
    this.plot.setAttribute("role", "img");
  }

  /** Show the selection now if the section is in view, else when it scrolls into view. */
  update() {
    this.stale = true;
    if (this.near) this.draw();
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const drawing = drawingOf(this.panel);
    this.say(drawing ? "" : this.panel.empty, drawing ? drawing.command : "");
    this.figure = drawing && figureOf(this.panel, drawing, this.measure);
    this.fillNumbers();
    if (!drawing) return;
    this.plot.setAttribute("aria-label", `${this.panel.title}, ${described(this.panel)}; numbers below`);
    const { height, ...layout } = this.figure.layout;
    this.plot.style.height = `${height}px`; // of the element: Plotly forgets a layout's height when the window is resized
    const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    Plotly.react(this.plot, this.figure.data, { ...layout, autosize: true, dragmode }, { responsive: true, displayModeBar: false });
  }

  say(missing, command) {
    this.missing.replaceChildren(`${described(this.panel)}: `, ...withCode(missing));
    this.missing.hidden = !missing;
    this.plot.hidden = Boolean(missing);
    this.command.textContent = command;
    this.command.parentElement.hidden = !command;
    if (this.numbers) this.numbers.hidden = Boolean(missing);
  }

  fillNumbers() {
    if (this.numbers.open && this.figure) this.holder.replaceChildren(numbersTable(this.figure));
  }
}

/** The top tokens of any expert, as a table. */
class TokenSection extends Section {
  setUp() {
    this.columns = Object.fromEntries(
      Object.entries(this.panel.table.columns).map(([name, spec]) => [name, decode(spec)]),
    );
    this.plot.classList.add("scroll");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "region");
    this.plot.setAttribute("aria-label", this.panel.title);
    this.expert = 0;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const layer = runShown().layers[selected.layer];
    const experts = layer ? layer.experts : 0;
    if (this.experts !== experts) {
      this.experts = experts;
      this.expert = 0;
      const names = Array.from({ length: experts }, (_, expert) => expert);
      this.local.replaceChildren(
        choice("Expert", names, (index) => {
          this.expert = index;
          this.update();
        }),
      );
    }
    const { run, expert, layer: layers, text, tokens, share_of_token: share, lift } = this.columns;
    const index = this.panel.table.runs.indexOf(selected.run);
    const rows = [];
    for (let row = 0; row < run.length; row += 1)
      if (run[row] === index && layers[row] === layerShown() && expert[row] === this.expert)
        rows.push([this.panel.table.texts[text[row]], lift[row], share[row], tokens[row]]);
    const asked = { run: selected.run, layer: layerShown(), expert: this.expert, ...this.panel.values };
    const given = Object.entries(asked).map(([name, value]) => `-p ${name}=${value}`);
    const command = `moewh query expert_top_tokens ${given.join(" ")}`;
    this.say(rows.length ? "" : this.panel.empty, command);
    this.plot.replaceChildren(table(["token", "lift", "share_of_token", "tokens"], rows));
  }
}

/** Prompts with each token coloured by its expert. */
class PromptSection extends Section {
  setUp() {
    this.prompt = 0;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const shown = data.prompts[selected.run];
    if (this.shown !== shown) {
      this.shown = shown;
      this.prompt = 0;
      const names = shown ? shown.prompts.map(({ prompt, domain }) => `${prompt}, ${domain === null ? NO_DOMAIN : domain}`) : [];
      const change = (index) => {
        this.prompt = index;
        this.update();
      };
      this.local.replaceChildren(...(names.length > 1 ? [choice("Prompt", names, change)] : []));
    }
    const one = shown && { ...shown, prompts: [shown.prompts[this.prompt]] };
    const command = one && `moewh show --run ${selected.run} --prompt ${one.prompts[0].prompt} --layer ${layerShown()}`;
    this.say(one ? "" : this.panel.empty, command || "");
    if (one) renderTokens(this.plot, one, layerShown());
  }
}

function sectionOf(panel) {
  if (panel.table) return new TokenSection(panel);
  return panel.name === "tokens" ? new PromptSection(panel) : new Section(panel);
}

function showRuns() {
  const names = ["model", "revision", "series", "train_step", "status", "origin", "dtype", "created"];
  const runRow = (run) => [
    run.run_id, ...names.map((name) => run[name]), run.prompts, run.tokens, run.layers.length,
    [...new Set(run.layers.map(({ experts }) => experts))].join(", "),
    [...new Set(run.layers.map(({ top_k }) => top_k))].join(", "),
  ];
  const head = ["run", ...names, "prompts", "tokens", "MoE layers", "experts", "top-k"];
  byId("runs-table").replaceWith(table(head, data.runs.map(runRow)));
  byId("version").textContent = data.version;
  byId("summary").textContent = `${data.runs.length} ${data.runs.length === 1 ? "run" : "runs"} of Mixture-of-Experts routing.`;
}

/** Fill the selection's fields for the selected run, keeping values that it also has. */
function offerSelection() {
  const { domains, layers } = runShown();
  if (!domains.includes(selected.domain)) [selected.domain] = domains;
  byId("domain").replaceChildren(
    ...domains.map((name, index) => new Option(shownDomain(name), index, false, name === selected.domain)),
  );
  byId("domain").disabled = domains.length < 2;
  selected.layer = Math.min(selected.layer, Math.max(0, layers.length - 1));
  byId("layer").max = Math.max(0, layers.length - 1);
  byId("layer").disabled = layers.length < 2;
  showLayer();
}

function showLayer() {
  byId("layer").value = selected.layer;
  byId("layer-shown").textContent = layerShown() === undefined ? "none" : layerShown();
  byId("layer").setAttribute("aria-valuetext", `layer ${layerShown()}`);
}

function listenTo(sections) {
  const changed = (name) => {
    for (const section of sections) if (section.panel.by.includes(name)) section.update();
  };
  byId("run").addEventListener("change", () => {
    selected.run = data.runs[Number(byId("run").value)].run_id;
    offerSelection();
    for (const section of sections) section.update();
  });
  byId("domain").addEventListener("change", () => {
    selected.domain = runShown().domains[Number(byId("domain").value)];
    changed("domain");
  });
  byId("layer").addEventListener("input", () => {
    selected.layer = Number(byId("layer").value);
    showLayer();
    changed("layer");
  });
  byId("selection").addEventListener("submit", (event) => event.preventDefault());
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const section = sections.find(({ element }) => element === entry.target);
        section.near = entry.isIntersecting;
        if (section.near) section.draw();
      }
      document.documentElement.dataset.ready = "true";
    },
    { rootMargin: "200px" },
  );
  for (const section of sections) watcher.observe(section.element);
  const resized = (width) => {
    for (const { plot, figure, panel } of sections)
      if (figure && panel.drawings.length) Plotly.relayout(plot, { width, autosize: !width });
  };
  addEventListener("beforeprint", () => {
    for (const section of sections) section.draw();
    resized(WIDTHS.print);
  });
  addEventListener("afterprint", () => resized(undefined));
}

/** Run plotly.js, which the page contains in compressed form. */
async function loadPlotly() {
  const plain = new Blob([bytesOf(byId("plotly").textContent.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

async function start() {
  showRuns();
  byId("run").append(...data.runs.map(({ run_id }, index) => new Option(run_id, index)));
  byId("run").value = data.runs.length - 1;
  offerSelection();
  await loadPlotly();
  const sections = data.panels.map(sectionOf);
  for (const { panel, element } of sections) {
    byId("main").append(element);
    const link = make("a", "", panel.title);
    link.href = `#${element.id}`;
    const item = make("li");
    item.append(link);
    byId("contents").append(item);
  }
  listenTo(sections);
}

start().catch((error) => {
  byId("failure").textContent = `The figures cannot be drawn: ${error.message}. The page needs a browser of 2023 or newer.`;
  byId("failure").hidden = false;
  throw error;
});
