// Norms and gradients by layer, traced over the checkpoints, and the neighbors of an embedding.

import { post } from "./api.js";
import { Chart, COLORS } from "./charts.js";
import { clear, field, guarded, h, later, number, term, visible } from "./dom.js";

const nameOf = (layer) => (layer < 0 ? "embedding" : `layer ${layer}`);
const short = (name) => name.replace(/\.weight$/, "").replace(/_proj$/, "").replace("output", "out");

// common to both kinds of panel: bars of this text, a table of weights, a curve over the loaded checkpoints
class Layers {
  constructor(path, title, key, lead, about) {
    Object.assign(this, { path, traced: new Map(), of: "" });
    this.facts = h("span", { class: "muted" });
    this.bars = h("div", { class: "layerbars" });
    this.grid = h("div", { class: "scroll" });
    this.chart = new Chart({ height: 220, label: `${title} over the checkpoints` });
    this.element = h("div", { class: "view" },
      h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, term(title, key)), this.facts), h("p", { class: "muted lead" }, lead), this.bars),
      h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "By weight"), h("span", { class: "muted" }, about)), this.grid),
      h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Over the run"),
        h("span", { class: "muted" }, "the checkpoints seen so far; Play goes through all")), this.chart.element));
  }

  load(chosen, text) {
    return post(this.path, { ...chosen, text }).then((found) => ({ ...found, run: chosen.run }));
  }

  draw(found, step, text) {
    const of = `${found.run} ${text}`;
    if (of !== this.of) this.traced.clear();
    this.of = of;
    this.traced.set(step, found.layers);
    this.drawBars(found);
    this.drawGrid(found.layers);
    const steps = [...this.traced.keys()].sort((a, b) => a - b);
    const every = Math.ceil(found.layers.length / COLORS);
    const shown = found.layers.filter((_, i) => (found.layers.length - 1 - i) % every === 0);
    this.chart.set(shown.map(({ layer }, color) => ({ name: nameOf(layer), color,
      points: steps.map((x) => ({ x, y: this.traced.get(x).find((each) => each.layer === layer)?.[this.traceOf(layer)] ?? null })) })),
    [{ x: step, text: `step ${step}` }]);
  }

  // bars, on one scale unless the columns are of different kinds
  rows(columns, layers, isShared) {
    const largest = (keys) => Math.max(...layers.flatMap((each) => keys.map((key) => each[key] ?? 0)), 1e-12);
    const all = columns.map(([key]) => key);
    clear(this.bars, h("div", { class: "layerbar head" }, h("span", {}), columns.map(([, text]) => h("span", {}, text))),
      layers.map((each) => h("div", { class: "layerbar" }, h("span", {}, nameOf(each.layer)), columns.map(([key, text]) => {
        const bar = h("i", { "aria-hidden": "true" });
        // the rest of the width is for the number
        bar.style.width = `${(78 * (each[key] ?? 0)) / largest(isShared ? all : [key])}%`;
        return h("span", { class: "measure", "data-label": text }, each[key] === null ? "" : bar, h("b", {}, each[key] === null ? "" : number(each[key], 3)));
      }))));
  }

  drawGrid(layers) {
    const blocks = layers.filter((each) => each.layer >= 0);
    const names = Object.keys(blocks[0]?.weights ?? {});
    const all = layers.flatMap((each) => Object.values(each.weights)).filter((v) => v > 0);
    const [low, high] = [Math.log(Math.min(...all)), Math.log(Math.max(...all))];
    const cell = (name, value) => {
      const element = h("td", { title: name }, number(value, 2));
      const share = value > 0 ? (Math.log(value) - low) / (high - low || 1) : 0;
      element.style.backgroundColor = `rgb(var(--tint) / ${(0.04 + 0.6 * share).toFixed(3)})`;
      return element;
    };
    const outside = Object.entries(layers.find((each) => each.layer < 0)?.weights ?? {});
    clear(this.grid, h("table", { class: "lens grid" },
      h("thead", {}, h("tr", {}, h("th"), names.map((name) => h("th", { scope: "col" }, short(name).split(".").map((part, i) => [i ? h("br") : "", part]).flat())))),
      h("tbody", {}, blocks.map((each) => h("tr", {}, h("th", { scope: "row" }, nameOf(each.layer)), names.map((name) => cell(name, each.weights[name])))))),
    h("div", { class: "outside" }, outside.map(([name, value]) => h("table", { class: "lens grid" },
      h("tbody", {}, h("tr", {}, h("th", { scope: "row" }, short(name)), cell(name, value)))))));
  }
}

export class Norms extends Layers {
  constructor() {
    super("/api/norms", "Activations", "norms", "Root mean square on this text: of the residual stream after each layer, and of what "
      + "attention and the feed-forward network add to it.", "root mean squares; darker: larger, on a log scale");
  }

  traceOf() {
    return "activation";
  }

  drawBars({ layers }) {
    this.rows([["activation", "residual stream"], ["attention", "attention adds"], ["ffn", "feed-forward adds"]], layers, true);
  }
}

export class Gradients extends Layers {
  constructor() {
    super("/api/gradients", "Gradient flow", "gradient flow", "Length of the gradient of this text's loss: of all weights of a layer, and of "
      + "the residual stream after it. Bars that shrink toward the embedding vanish on their way back.", "lengths; darker: larger, on a log scale");
    this.chart.isLog = true;
  }

  traceOf() {
    return "total";
  }

  drawBars({ layers, loss, total }) {
    this.facts.textContent = `loss ${number(loss, 4)} · gradient norm ${number(total, 3)}`;
    this.rows([["total", "weights"], ["activation", "residual stream"]], layers, false);
  }
}

export class Neighbors {
  constructor(view) {
    this.view = view;
    this.id = null;
    this.text = h("div", { class: "pieces" });
    this.typed = h("input", { type: "search", maxlength: "100", placeholder: "a word or a part of one", spellcheck: "false" });
    this.typed.addEventListener("input", later(guarded(async () => {
      if (!this.typed.value) return;
      // a word is often one token only after a space
      const [plain, spaced] = await Promise.all(["", " "].map((space) =>
        post("/api/tokenize", { ...this.view.chosen, text: space + this.typed.value })));
      this.choose((spaced.tokens.length < plain.tokens.length ? spaced : plain).tokens[0].id);
    }), 250));
    this.title = h("h2", {});
    this.list = h("div", { class: "neighbors" });
    this.element = h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, term("Neighbors of an embedding", "embedding neighbors"))),
      h("p", { class: "muted lead" }, "Choose a token of the text, a neighbor, or type one: its nearest tokens, by the cosine of their embeddings."),
      h("div", { class: "halves even" }, h("div", {}, this.text, field("Another token", this.typed)), h("div", {}, this.title, this.list)));
  }

  choose = guarded((id) => {
    this.id = id;
    return this.view.load();
  });

  async load(chosen, text) {
    const { tokens } = await post("/api/tokenize", { ...chosen, text });
    const id = this.id ?? tokens.find((each) => each.token.trim().length > 2)?.id ?? tokens[0].id;
    return { id, tokens, ...await post("/api/neighbors", { ...chosen, id, count: 12 }) };
  }

  draw({ id, tokens, token, neighbors }) {
    clear(this.text, tokens.map((each) => h("button", { type: "button", class: `piece h${each.id % 6}`, "aria-pressed": String(each.id === id),
      onclick: () => this.choose(each.id) }, h("b", {}, visible(each.token)))));
    clear(this.title, "near ", h("span", { class: "chosen" }, visible(token)));
    clear(this.list, neighbors.map((each) => {
      const bar = h("i", { "aria-hidden": "true" });
      bar.style.width = `${(100 * Math.max(0, each.similarity)).toFixed(1)}%`;
      return h("button", { type: "button", onclick: () => this.choose(each.id) }, bar, h("span", {}, visible(each.token)), h("b", {}, each.similarity.toFixed(3)));
    }));
  }
}
