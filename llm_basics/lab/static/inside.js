// Attention, logit lens, norms, gradients and neighbors, at any checkpoint of a run.

import { post } from "./api.js";
import { clear, field, guarded, h, later, number, segmented, term, visible } from "./dom.js";
import { Gradients, Neighbors, Norms } from "./layers.js";
import { picker } from "./picker.js";

const MOST_CHARACTERS = 400;
const TABS = [["attention", "Attention"], ["lens", "Logit lens"], ["norms", "Norms"], ["gradients", "Gradients"], ["neighbors", "Neighbors"]];

export async function show(place, id) {
  const view = new Inside();
  const bar = h("section", { class: "card" });
  place.append(h("div", { class: "heading" }, h("h1", {}, "Inside the model")), bar);
  view.chosen = await picker(bar, id, "inside", () => view.load(), { isPlayed: true });
  if (!view.chosen) return null;
  bar.classList.add("sticky");
  place.append(h("section", { class: "card" }, field("Text", view.input)),
    h("div", { class: "tabs" }, segmented("what to look at", TABS, view.tab, guarded((tab) => view.set(tab)))), view.place);
  await view.set(view.tab);
  const redraw = () => view.panel.redraw?.();
  window.addEventListener("themechange", redraw);
  return () => window.removeEventListener("themechange", redraw);
}

class Inside {
  constructor() {
    this.tab = sessionStorage.getItem("inside") ?? "attention";
    this.panels = { attention: new Attention(this), lens: new Lens(), norms: new Norms(), gradients: new Gradients(), neighbors: new Neighbors(this) };
    this.input = h("textarea", { rows: 2, maxlength: String(MOST_CHARACTERS), spellcheck: "false" });
    this.input.value = sessionStorage.getItem("inside text") ?? "What is the matter? What is the matter?";
    this.input.addEventListener("input", later(guarded(() => this.load()), 300));
    this.place = h("div", { class: "view" });
  }

  get panel() {
    return this.panels[this.tab];
  }

  set(tab) {
    this.tab = tab in this.panels ? tab : "attention";
    sessionStorage.setItem("inside", this.tab);
    clear(this.place, this.panel.element);
    return this.load();
  }

  async load() {
    const text = this.input.value;
    if (!text) return;
    sessionStorage.setItem("inside text", text);
    const mine = (this.current = (this.current ?? 0) + 1);
    const { panel } = this;
    const step = Number(this.chosen.checkpoint);
    panel.element.setAttribute("aria-busy", "true");
    try {
      const found = await panel.load({ ...this.chosen }, text);
      // an older response must not replace a newer one
      if (mine === this.current) panel.draw(found, step, text);
    } finally {
      if (mine === this.current) panel.element.removeAttribute("aria-busy");
    }
  }
}

class Attention {
  constructor(view) {
    Object.assign(this, { view, layer: 0, head: 0, query: null });
    this.layers = h("div", {});
    this.text = h("div", { class: "tokens attended" });
    this.heads = h("div", { class: "heads" });
    this.element = h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, term("Attention", "attention")), this.layers),
      h("p", { class: "muted" }, "Choose a token: the color of each earlier one is the weight that the head gives it."),
      this.text, this.heads);
  }

  async load(chosen, text) {
    try {
      return await post("/api/attention", { ...chosen, text, layer: this.layer });
    } catch (error) {
      // another run may have fewer layers
      if (this.layer === 0) throw error;
      this.layer = 0;
      return post("/api/attention", { ...chosen, text, layer: 0 });
    }
  }

  draw(found) {
    const isSame = this.found && this.found.tokens.join("\0") === found.tokens.join("\0");
    this.found = found;
    if (!isSame) this.query = found.tokens.length - 1;
    this.head = Math.min(this.head, found.heads.length - 1);
    if (this.nLayers !== found.n_layers) {
      this.nLayers = found.n_layers;
      clear(this.layers, segmented("layer", Array.from({ length: found.n_layers }, (_, i) => [i, `layer ${i}`]), this.layer,
        guarded((key) => { this.layer = key; return this.view.load(); })));
    }
    this.redraw();
  }

  redraw() {
    if (!this.found) return;
    const { tokens, heads, weights } = this.found;
    clear(this.heads, heads.map((head, i) => {
      const canvas = h("canvas", { width: tokens.length, height: tokens.length, role: "img", "aria-label": `weights of head ${head}` });
      paint(canvas, weights[i]);
      return h("button", { type: "button", "aria-pressed": String(i === this.head), onclick: (event) => {
        this.head = i;
        for (const each of this.heads.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
        this.tint();
      } }, canvas, h("span", {}, `head ${head}`));
    }));
    this.spans = tokens.map((token, i) => {
      const element = h("span", { class: "token", role: "button", tabindex: "0" }, visible(token), token.includes("\n") ? "\n" : "");
      const choose = () => { this.query = i; this.tint(); };
      element.addEventListener("pointerenter", choose);
      element.addEventListener("focus", choose);
      return element;
    });
    clear(this.text, this.spans);
    this.tint();
  }

  tint() {
    const weights = this.found.weights[this.head][this.query];
    this.spans.forEach((element, i) => {
      element.style.backgroundColor = `rgb(var(--tint) / ${(0.75 * (weights[i] ?? 0)).toFixed(3)})`;
      element.classList.toggle("query", i === this.query);
      element.title = i < weights.length ? `weight ${number(weights[i], 3)}` : "later: not seen";
    });
  }
}

class Lens {
  constructor() {
    this.table = h("div", { class: "scroll" });
    this.element = h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, term("Logit lens", "logit lens")),
      h("span", { class: "muted" }, "likeliest next token after each layer; framed: right")), this.table);
  }

  load(chosen, text) {
    return post("/api/lens", { ...chosen, text, top: 4 });
  }

  draw({ tokens, layers }) {
    clear(this.table, h("table", { class: "lens" },
      h("thead", {}, h("tr", {}, h("th"), tokens.map((t) => h("th", { scope: "col" }, visible(t))))),
      h("tbody", {}, layers.map((cells, i) => ({ cells, i })).reverse().map(({ cells, i }) =>
        h("tr", {}, h("th", { scope: "row" }, i === 0 ? "embedding" : `layer ${i - 1}`), cells.map((cell, at) => {
          const best = cell.top[0];
          const element = h("td", { class: best.token === tokens[at + 1] ? "right" : "", title: `${cell.top.map((t) =>
            `${visible(t.token)} ${(100 * t.probability).toFixed(1)} %`).join("\n")}\nentropy ${number(cell.entropy, 3)}` }, visible(best.token));
          element.style.backgroundColor = `rgb(var(--tint) / ${(0.7 * best.probability).toFixed(3)})`;
          return element;
        }))))));
  }
}

function paint(canvas, rows) {
  const c = canvas.getContext("2d");
  const tint = getComputedStyle(document.documentElement).getPropertyValue("--tint").trim().split(/\s+/).join(",");
  c.clearRect(0, 0, canvas.width, canvas.height);
  rows.forEach((row, y) => row.forEach((weight, x) => {
    c.fillStyle = `rgba(${tint},${(0.05 + 0.95 * Math.sqrt(weight)).toFixed(3)})`;
    c.fillRect(x, y, 1, 1);
  }));
}
