// The parameters, FLOPs and memory of a config, as its sliders move.

import { get, post } from "./api.js";
import { bytes, clear, field, guarded, h, message, number, term } from "./dom.js";

const powers = (from, to) => Array.from({ length: Math.log2(to / from) + 1 }, (_, i) => from * 2 ** i);
const WIDTHS = [32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1600, 2048, 3072, 4096];
const HEADS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 25, 32];

// an option, its label and the values of its slider, which may depend on other options
const SLIDERS = [
  ["model.d_model", "d_model", () => WIDTHS], ["model.n_layers", "n_layers", () => [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48]],
  // an even width of a head, as rotary positions need
  ["model.n_heads", "n_heads", (values) => HEADS.filter((n) => values["model.d_model"] % (2 * n) === 0)],
  ["model.d_ff", "d_ff", (values) => [null, ...[1, 1.5, 2, 8 / 3, 3, 4, 6, 8].map((m) => Math.ceil((m * values["model.d_model"]) / 32) * 32)]],
  ["model.vocab_size", "vocab_size", () => [257, 512, 1024, 2048, 4096, 8192, 10000, 16384, 32768, 50257, 65536, 100277]],
  ["model.context_length", "context_length", () => powers(32, 8192)], ["train.batch_size", "batch_size", () => powers(1, 512)],
];
const FIXED = { "train.device": "cpu", "train.compile": "off" };

export async function show(place) {
  const view = new Config(await get("/api/presets"));
  place.append(h("div", { class: "heading" }, h("h1", {}, "What a config costs")), view.tiles, view.element);
  await view.set(view.preset.value);
  return () => (view.isOver = true);
}

class Config {
  constructor({ presets, options }) {
    Object.assign(this, { presets, defaults: Object.fromEntries(options.map((each) => [each.name, each.default])), values: {} });
    this.preset = h("select", { onchange: guarded(() => this.set(this.preset.value)) }, presets.map((each) => h("option", { value: each.name }, each.name)));
    this.dtype = h("select", { onchange: () => this.update() }, ["float32", "bfloat16"].map((each) => h("option", { value: each }, each)));
    this.rows = SLIDERS.map(([name, label, list]) => {
      const input = h("input", { type: "range", min: "0", "aria-label": label });
      const shown = h("output", {});
      input.addEventListener("input", () => { this.values[name] = this.steps(name, list)[Number(input.value)]; this.update(); });
      return { name, list, input, shown, element: h("label", { class: "field" }, h("span", {}, term(label, name), shown), input) };
    });
    this.tiles = h("div", { class: "tiles sticky" });
    this.parts = h("div", {});
    this.memory = h("div", {});
    this.state = h("span", { class: "muted", role: "status" });
    this.command = h("code", {});
    const copy = guarded(async () => { await navigator.clipboard.writeText(this.command.textContent); message("Copied."); });
    this.element = h("div", { class: "split costs" },
      h("section", { class: "card controls" }, field("Begin with", this.preset), this.rows.map((each) => each.element), field(term("dtype", "train.dtype"), this.dtype)),
      h("div", { class: "view" },
        h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Parameters"), h("span", { class: "muted" }, "what the weights are for")), this.parts),
        h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Memory of a training step"), this.state), this.memory),
        h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Train it"), h("span", { class: "space" }), h("button", { type: "button", onclick: copy }, "Copy")),
          h("pre", { class: "command" }, this.command))));
  }

  set(preset) {
    const options = this.presets.find((each) => each.name === preset).options;
    this.base = { ...this.defaults, ...options };
    for (const { name } of this.rows) this.values[name] = this.base[name];
    return this.update();
  }

  // the steps of a slider, including its current value
  steps(name, list) {
    const found = list(this.values);
    const value = this.values[name];
    return found.includes(value) ? found : [...found, value].sort((a, b) => (a ?? 0) - (b ?? 0));
  }

  fit() {
    const heads = SLIDERS[2][2](this.values);
    const own = this.values["model.n_heads"];
    // the nearest number of heads that divides the width
    if (!heads.includes(own)) this.values["model.n_heads"] = heads.reduce((a, b) => (Math.abs(b - own) < Math.abs(a - own) ? b : a));
    for (const { name, list, input, shown } of this.rows) {
      const steps = this.steps(name, list);
      input.max = String(steps.length - 1);
      input.value = String(steps.indexOf(this.values[name]));
      shown.textContent = this.values[name] === null ? "auto" : this.values[name].toLocaleString("en");
      input.setAttribute("aria-valuetext", shown.textContent);
    }
  }

  changes() {
    const found = Object.fromEntries(this.rows.map(({ name }) => [name, this.values[name]]).filter(([name, value]) => value !== this.base[name]));
    const groups = this.base["model.n_kv_heads"];
    if (groups && this.values["model.n_heads"] % groups) found["model.n_kv_heads"] = null;
    return found;
  }

  update = guarded(async () => {
    this.fit();
    const changes = this.changes();
    this.command.textContent = ["uv run python -m llm_basics.train", `--config ${this.preset.value}`,
      ...Object.entries(changes).map(([name, value]) => `--${name} ${value ?? "None"}`),
      ...(this.dtype.value === "float32" ? [] : [`--train.dtype ${this.dtype.value}`])].join(" \\\n  ");
    this.asked = { preset: this.preset.value, options: { ...FIXED, ...changes, "train.dtype": this.dtype.value } };
    await this.latest("estimate", (found) => this.drawEstimate(found));
    this.state.textContent = "computing on tensors without content";
    this.memory.setAttribute("aria-busy", "true");
    await this.latest("memory", (found) => this.drawMemory(found));
  });

  // one request at a time, then one for the latest values
  async latest(name, draw) {
    this.running ??= {};
    if (this.running[name]) return;
    this.running[name] = true;
    try {
      let asked;
      do {
        asked = this.asked;
        const found = await post(`/api/${name}`, asked);
        if (this.isOver) return;
        if (asked === this.asked || name === "estimate") draw(found);
      } while (asked !== this.asked);
    } finally {
      this.running[name] = false;
    }
  }

  drawEstimate(found) {
    const perStep = this.values["train.batch_size"] * this.values["model.context_length"] * this.base["train.grad_accumulation_steps"];
    clear(this.tiles, tile("Parameters", number(found.parameters), "parameters"), tile("FLOPs per token", si(found.flops_per_token), "flops_per_token"),
      tile("Tokens per step", number(perStep), "tokens_per_step"), tile("FLOPs per step", si(perStep * found.flops_per_token)),
      tile("KV cache per text", bytes(found.kv_cache_bytes)));
    stack(this.parts, Object.entries(found.parts), number);
  }

  drawMemory(found) {
    this.memory.removeAttribute("aria-busy");
    const isTooMuch = found.free !== null && found.resident > found.free;
    this.state.className = isTooMuch ? "bad" : "muted";
    this.state.textContent = `${bytes(found.resident)} at the peak${found.free === null ? "" : isTooMuch
      ? `: more than the ${bytes(found.free)} that are free here` : ` · ${bytes(found.free)} are free here`}`;
    stack(this.memory, ["parameters", "gradients", "optimizer", "activations", "checkpoint"].map((kind) => [kind, found[kind]]), bytes);
  }
}

const tile = (name, value, key = name) => h("div", { class: "tile" }, h("span", {}, term(name, key)), h("b", {}, value));
const si = (n) => { const at = Math.max(0, Math.min(5, Math.floor(Math.log10(n) / 3))); return `${(n / 1000 ** at).toPrecision(3)} ${["", "k", "M", "G", "T", "P"][at]}`; };

// shares of a whole as one bar, with a legend
function stack(place, parts, format) {
  const shown = parts.filter(([, value]) => value > 0);
  const total = shown.reduce((sum, [, value]) => sum + value, 0);
  clear(place, h("div", { class: "stack", "aria-hidden": "true" }, shown.map(([name, value]) => {
    const part = h("i", { class: `c${parts.findIndex(([each]) => each === name)}`, title: name });
    part.style.flexGrow = String(value / total);
    return part;
  })), h("dl", { class: "shares" }, shown.map(([name, value]) => h("div", {},
    h("dt", {}, h("i", { class: `swatch c${parts.findIndex(([each]) => each === name)}` }), name),
    h("dd", {}, format(value), h("small", {}, ` ${((100 * value) / total).toFixed(value / total < 0.01 ? 2 : 0)} %`))))));
}
