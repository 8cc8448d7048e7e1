/* The token view: each token of some prompts, coloured by its expert at a layer.

renderTokens(element, data, layer) fills an element with what `moewh.plots.tokens.prompts_data` gave; calling it again
replaces that. All text is set as text. A token is a button: pointing at it, moving to it with Tab or the arrow keys, or
touching it shows its experts in the line below the prompt.

The experts most used in a prompt get a colour and a line each, all others are grey; the number below each token is its
expert, so nothing depends on colour alone. Where first choices are unknown, no token has a colour, and the numbers are
all its experts.
*/
"use strict";

const MOEWH_COLOURS = 8;

/** The experts that count for a token: its first choice, or all of them where that is unknown. */
function countedExperts(route, number) {
  const experts = route.experts[number] || [];
  return route.ranked ? experts.slice(0, 1) : experts;
}

/** The experts of a route, most used first, as [expert, tokens]. */
function countExperts(route) {
  const counts = new Map();
  for (const number of route.experts.keys())
    for (const expert of countedExperts(route, number)) counts.set(expert, (counts.get(expert) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

/** Expert → its colour class, "moewh-c0" to "moewh-c7", only for the most used first choices. */
function colourExperts(route, counts) {
  const coloured = route.ranked ? counts.slice(0, MOEWH_COLOURS) : [];
  return new Map(coloured.map(([expert], number) => [expert, `moewh-c${number}`]));
}

/** A token's experts and weights, in words. */
function describeToken(prompt, route, number) {
  const experts = route.experts[number];
  const where = `position ${prompt.positions[number]}, ${prompt.kinds[number]}`;
  if (!experts) return `${where}: no expert at this layer`;
  const weights = route.weights && route.weights[number];
  const named = experts.map((expert, index) => `expert ${expert}` + (weights ? ` (${weights[index]})` : ""));
  if (!route.ranked) return `${where}: ${named.join(", ")}, in no known order`;
  const others = named.length > 1 ? `; then ${named.slice(1).join(", ")}` : "";
  return `${where}: ${named[0]}${others}`;
}

function renderTokens(element, data, layer) {
  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const root = make("div", "moewh-tokens");
  for (const note of data.notes) root.append(make("p", "moewh-note", note));
  for (const prompt of data.prompts) root.append(renderPrompt(prompt));
  element.replaceChildren(root);

  function renderPrompt(prompt) {
    const route = prompt.routes[layer];
    const section = make("section", "moewh-prompt");
    const title = make("h3", "", `Prompt ${prompt.prompt}`);
    if (prompt.domain !== null) title.append(", ", make("bdi", "", prompt.domain));
    title.append(` – layer ${layer}`);
    section.append(title);
    if (!route) {
      section.append(make("p", "moewh-note", `Layer ${layer} is no MoE layer of this run.`));
      return section;
    }
    const counts = countExperts(route);
    const colours = colourExperts(route, counts);
    const detail = make("p", "moewh-detail", "Point at a token, or move to it with the arrow keys, to see its experts.");
    detail.setAttribute("role", "status");
    section.append(renderText(prompt, route, colours, detail), detail, renderLegend(prompt, route, counts, colours));
    return section;
  }

  function renderText(prompt, route, colours, detail) {
    const text = make("div", "moewh-text");
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `Tokens of prompt ${prompt.prompt}`);
    const buttons = prompt.texts.map((shown, number) => {
      const experts = route.experts[number];
      const button = make("button", `moewh-token ${experts ? colours.get(experts[0]) || "moewh-other" : "moewh-none"}`);
      button.type = "button";
      button.tabIndex = number ? -1 : 0;
      button.append(make("bdi", "moewh-word", shown), make("sub", "", countedExperts(route, number).join(" ") || "-"));
      const show = () => detail.replaceChildren(make("bdi", "moewh-word", shown), ` ${describeToken(prompt, route, number)}`);
      button.addEventListener("mouseenter", show);
      button.addEventListener("click", show);
      button.addEventListener("focus", show);
      return button;
    });
    for (const [number, button] of buttons.entries()) {
      text.append(button);
      if (prompt.texts[number].endsWith("⏎")) text.append(make("br"));
    }
    text.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
      const from = buttons.indexOf(document.activeElement);
      if (!(event.key in steps) || from < 0) return;
      event.preventDefault();
      const to = Math.min(buttons.length - 1, Math.max(0, from + steps[event.key]));
      buttons[from].tabIndex = -1;
      buttons[to].tabIndex = 0;
      buttons[to].focus();
    });
    text.addEventListener("focusin", (event) => {
      for (const button of buttons) button.tabIndex = button === event.target ? 0 : -1;
    });
    return text;
  }

  function renderLegend(prompt, route, counts, colours) {
    const total = route.experts.filter(Boolean).length;
    const legend = make("ul", "moewh-legend");
    legend.setAttribute("aria-label", route.ranked ? "First choices" : "Chosen experts");
    const add = (colour, name, tokens) => {
      const item = make("li");
      item.append(make("span", `moewh-token ${colour}`, name));
      item.append(` ${tokens} ${tokens === 1 ? "token" : "tokens"}, ${Math.round((100 * tokens) / total)}%`);
      legend.append(item);
    };
    for (const [expert, tokens] of counts.slice(0, MOEWH_COLOURS))
      add(colours.get(expert) || "moewh-other", `expert ${expert}`, tokens);
    const others = counts.slice(MOEWH_COLOURS);
    if (others.length && route.ranked) {
      const tokens = others.reduce((sum, [, number]) => sum + number, 0);
      add("moewh-other", others.length === 1 ? `expert ${others[0][0]}` : `${others.length} other experts`, tokens);
    }
    return legend;
  }
}
