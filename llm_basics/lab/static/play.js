// Generate text: each token colored by its probability; its alternatives on hover, a click goes on from one.

import { streamed, post } from "./api.js";
import { clear, field, guarded, h, message, term, visible } from "./dom.js";
import { picker } from "./picker.js";

export async function show(place) {
  const id = sessionStorage.getItem("run");
  clear(place, h("div", { class: "heading" }, h("h1", {}, "Playground")));
  const chosen = await picker(place, id, "play", () => {});
  if (!chosen) return null;
  const view = new Playground(place, chosen);
  return () => view.close();
}

class Playground {
  constructor(place, chosen) {
    Object.assign(this, { chosen, tokens: [], promptIds: [] });
    this.prompt = h("textarea", { rows: 3, spellcheck: "false", "aria-label": "prompt" });
    this.prompt.value = sessionStorage.getItem("prompt") ?? "The king ";
    const input = (value, rest) => h("input", { type: "number", value: String(value), ...rest });
    this.inputs = {
      temperature: slider(0.8, 0, 2, 0.05), top_p: slider(1, 0.05, 1, 0.05),
      top_k: input("", { min: "1", placeholder: "all" }), repetition_penalty: slider(1, 1, 2, 0.05),
      max_new_tokens: input(120, { min: "1", max: "4096" }), seed: input(0, { min: "0" }),
    };
    const labels = { top_p: "top-p", top_k: "top-k", repetition_penalty: "repetition penalty", max_new_tokens: "tokens" };
    this.go = h("button", { type: "button", class: "primary", onclick: () => this.start() }, "Generate");
    this.output = h("div", { class: "tokens", "aria-live": "off" }, h("span", { class: "muted" }, "Ctrl+Enter generates."));
    this.status = h("span", { class: "muted" });
    this.popover = h("div", { class: "popover", hidden: true, role: "group", "aria-label": "alternatives" });
    this.popover.addEventListener("pointerleave", () => (this.popover.hidden = true));
    this.onkey = (event) => {
      if (event.key === "Escape") this.popover.hidden = true;
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.start();
    };
    document.addEventListener("keydown", this.onkey);
    place.append(h("div", { class: "split" },
      h("section", { class: "card controls" }, Object.entries(this.inputs).map(([name, each]) =>
        field(term(labels[name] ?? name), each)), this.go),
      h("div", { class: "view" }, h("section", { class: "card" }, field("Prompt", this.prompt)),
        h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Text"), this.status, h("span", { class: "space" }),
          h("span", { class: "scale" }, "surprising", h("i"), "certain")), this.output))), this.popover);
  }

  close() {
    this.abort?.abort();
    document.removeEventListener("keydown", this.onkey);
  }

  start = guarded(async (kept = []) => {
    if (this.abort && !kept.length) {
      this.abort.abort();
      return;
    }
    this.abort?.abort();
    sessionStorage.setItem("prompt", this.prompt.value);
    const abort = (this.abort = new AbortController());
    this.go.textContent = "Stop";
    this.popover.hidden = true;
    const number = (name) => (this.inputs[name].value === "" ? null : Number(this.inputs[name].value));
    const body = { ...this.chosen, alternatives: 5 };
    for (const name of Object.keys(this.inputs)) if (number(name) !== null) body[name] = number(name);
    if (body.top_p === 1) delete body.top_p;
    try {
      if (kept.length) body.prompt_ids = [...this.promptIds, ...kept.map((each) => each.id)];
      else {
        this.text = this.prompt.value;
        const text = this.text;
        this.promptIds = text ? (await post("/api/tokenize", { ...this.chosen, text }, abort.signal)).tokens.map((t) => t.id) : [];
        body.prompt = text;
      }
      this.tokens = [...kept];
      clear(this.output, h("span", { class: "given" }, this.text), kept.map((each, i) => this.token(each, i)));
      const begin = performance.now();
      let n = 0;
      for await (const [name, data] of streamed("/api/generate", body, abort.signal)) {
        if (name === "error") throw new Error(data.detail);
        if (name === "finished") this.output.append(data.text);
        if (name !== "token") continue;
        this.output.append(this.token(data, this.tokens.length));
        this.tokens.push(data);
        n += 1;
        const rate = n / ((performance.now() - begin) / 1000);
        this.status.textContent = `${this.tokens.length} tokens · ${rate.toFixed(0)} per second`;
      }
      if (n === 0) message("The model ended the text at once.");
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.go.textContent = "Generate";
      }
    }
  });

  token(data, index) {
    const text = data.text || (data.token.startsWith("<") ? data.token : "");
    const element = h("span", { class: "token", role: "button", tabindex: "0", "aria-label": `${visible(data.token)}, ${percent(data.probability)}` }, text);
    element.style.backgroundColor = `rgb(var(--tint) / ${(0.45 * (1 - Math.sqrt(data.probability))).toFixed(3)})`;
    const open = () => this.open(element, data, index);
    element.addEventListener("pointerenter", open);
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      // the focus goes to the popover: its button must not get this key
      event.preventDefault();
      element.click();
    });
    element.addEventListener("click", () => { open(); this.popover.querySelector("button")?.focus(); });
    return element;
  }

  open(element, data, index) {
    const all = [data, ...data.alternatives].sort((a, b) => b.probability - a.probability);
    clear(this.popover, all.map((each) =>
      h("button", { type: "button", class: each.id === data.id ? "chosen" : "", title: "go on from this token",
        onclick: () => this.start([...this.tokens.slice(0, index), { ...each, text: each.text ?? each.token, alternatives:
          all.filter((other) => other.id !== each.id) }]) },
      h("span", {}, visible(each.token)), h("span", { class: "p" }, percent(each.probability)))));
    const box = element.getBoundingClientRect();
    this.popover.hidden = false;
    this.popover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - 250))}px`;
    const height = this.popover.offsetHeight;
    this.popover.style.top = `${box.bottom + height > innerHeight ? box.top - height : box.bottom}px`;
  }
}

const percent = (p) => `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;

function slider(value, min, max, step) {
  const element = h("input", { type: "range", min: String(min), max: String(max), step: String(step) });
  element.value = String(value);
  const update = () => (element.title = element.value);
  element.addEventListener("input", update);
  update();
  return element;
}
