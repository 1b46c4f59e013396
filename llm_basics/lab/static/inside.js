// Attention by layer and head, and the logit lens, at any checkpoint of a run.

import { post } from "./api.js";
import { clear, field, guarded, h, later, number, segmented, term, visible } from "./dom.js";
import { picker } from "./picker.js";

const MOST_CHARACTERS = 400;

export async function show(place, id) {
  clear(place, h("div", { class: "heading" }, h("h1", {}, "Inside the model")));
  const view = new Inside();
  view.chosen = await picker(place, id, "inside", () => view.load());
  if (!view.chosen) return null;
  place.append(h("section", { class: "card" }, field("Text", view.input)),
    h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Attention"), view.layers),
      h("p", { class: "muted" }, "Choose a token: the color of each earlier one is the weight that the head gives it."),
      view.text, view.heads),
    h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, term("Logit lens", "logit lens")),
      h("span", { class: "muted" }, "likeliest next token after each layer; framed: right")), view.lens));
  await view.load();
  const redraw = () => view.draw();
  window.addEventListener("themechange", redraw);
  return () => window.removeEventListener("themechange", redraw);
}

class Inside {
  constructor() {
    Object.assign(this, { layer: 0, head: 0, query: null });
    this.input = h("textarea", { rows: 2, maxlength: String(MOST_CHARACTERS), spellcheck: "false" });
    this.input.value = "KING RICHARD:\nWhat is the matter with the king?";
    this.input.addEventListener("input", later(guarded(() => { this.query = null; return this.load(); }), 300));
    this.layers = h("div", {});
    this.text = h("div", { class: "tokens attended" });
    this.heads = h("div", { class: "heads" });
    this.lens = h("div", { class: "scroll" });
  }

  async load() {
    const text = this.input.value;
    if (!text) return;
    const mine = (this.current = (this.current ?? 0) + 1);
    const attention = await post("/api/attention", { ...this.chosen, text, layer: this.layer });
    const lens = await post("/api/lens", { ...this.chosen, text, top: 4 });
    // an older answer must not replace a newer one
    if (mine !== this.current) return;
    this.attention = attention;
    this.query = Math.min(this.query ?? Infinity, attention.tokens.length - 1);
    const names = Array.from({ length: attention.n_layers }, (_, i) => [i, `layer ${i}`]);
    if (this.nLayers !== attention.n_layers) {
      this.nLayers = attention.n_layers;
      clear(this.layers, segmented("layer", names, this.layer, guarded((key) => { this.layer = key; return this.load(); })));
    }
    this.draw();
    this.drawLens(lens);
  }

  draw() {
    if (!this.attention) return;
    const { tokens, heads, weights } = this.attention;
    clear(this.heads, heads.map((head, i) => {
      const canvas = h("canvas", { width: tokens.length, height: tokens.length, role: "img", "aria-label": `weights of head ${head}` });
      paint(canvas, weights[i]);
      return h("button", { type: "button", "aria-pressed": String(i === this.head), onclick: () => { this.head = i; this.draw(); } },
        canvas, h("span", {}, `head ${head}`));
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
    const weights = this.attention.weights[Math.min(this.head, this.attention.weights.length - 1)][this.query];
    this.spans.forEach((element, i) => {
      element.style.backgroundColor = `rgb(var(--tint) / ${(0.75 * (weights[i] ?? 0)).toFixed(3)})`;
      element.style.boxShadow = i === this.query ? "inset 0 -3px var(--accent)" : "none";
      element.title = i < weights.length ? `weight ${number(weights[i], 3)}` : "later: not seen";
    });
  }

  drawLens({ tokens, layers }) {
    clear(this.lens, h("table", { class: "lens" },
      h("thead", {}, h("tr", {}, h("th"), tokens.map((t) => h("th", {}, visible(t))))),
      h("tbody", {}, layers.map((cells, i) => ({ cells, i })).reverse().map(({ cells, i }) =>
        h("tr", {}, h("th", {}, i === 0 ? "embedding" : `layer ${i - 1}`), cells.map((cell, at) => {
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
