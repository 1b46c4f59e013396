// Generate text and chat: each token colored by its probability; its alternatives on hover, a click goes on
// from one. Two checkpoints side by side get the same prompt and the same seed.

import { get, streamed } from "./api.js";
import { clear, field, guarded, h, segmented, term, visible } from "./dom.js";
import { picker } from "./picker.js";

const SETTINGS = [
  ["temperature", 0.8, { min: 0, max: 2, step: 0.05 }], ["top_p", 1, { min: 0.05, max: 1, step: 0.05 }, "top-p"],
  ["min_p", 0, { min: 0, max: 0.5, step: 0.01 }, "min-p"], ["repetition_penalty", 1, { min: 1, max: 2, step: 0.05 }, "repetition penalty"],
  ["top_k", "", { min: 1, placeholder: "all" }, "top-k"], ["max_new_tokens", 120, { min: 1, max: 4096 }, "tokens"], ["seed", 0, { min: 0 }],
];

export async function show(place, id) {
  const view = new Playground();
  place.append(h("div", { class: "heading" }, h("h1", {}, "Playground"), h("span", { class: "space" }), view.modes, view.compare));
  await view.open(place, id);
  return () => view.close();
}

class Playground {
  constructor() {
    Object.assign(this, { mode: "text", lanes: [], texts: { text: null, chat: null } });
    this.modes = h("div", {});
    this.compare = h("button", { type: "button", "aria-pressed": "false", disabled: true, onclick: guarded(() => this.toggle()) }, "Compare two");
    this.inputs = Object.fromEntries(SETTINGS.map(([name, value, limits]) => [name, input(value, limits)]));
    this.prompt = h("textarea", { rows: 3, spellcheck: "false", maxlength: "100000" });
    this.label = h("span", {}, "Prompt");
    this.go = h("button", { type: "button", class: "primary", disabled: true, onclick: () => this.start() }, "Generate");
    this.reset = h("button", { type: "button", onclick: () => { this.stop(); this.lanes.forEach((lane) => lane.reset()); } }, "New chat");
    this.place = h("div", { class: "lanes" });
    this.popover = h("div", { class: "popover", hidden: true, role: "group", "aria-label": "alternatives" });
    this.popover.addEventListener("pointerleave", () => (this.popover.hidden = true));
    this.onkey = (event) => {
      if (event.key === "Escape") this.popover.hidden = true;
      const isSent = event.ctrlKey || event.metaKey || (this.mode === "chat" && !event.shiftKey && event.target === this.prompt);
      if (event.key !== "Enter" || !isSent) return;
      event.preventDefault();
      this.start();
    };
    document.addEventListener("keydown", this.onkey);
  }

  async open(place, id) {
    place.append(h("div", { class: "split" },
      h("section", { class: "card controls", "aria-label": "sampling" }, h("h2", {}, "Sampling"),
        SETTINGS.map(([name, , , label = name]) => field(term(label, name), this.inputs[name]))),
      this.pages = h("div", { class: "view" }, this.place,
        h("section", { class: "card prompt" }, h("label", { class: "field" }, this.label, this.prompt),
          h("div", { class: "bar" }, this.go, this.reset, h("span", { class: "space" }),
            h("span", { class: "scale" }, "surprising", h("i"), "certain"))))), this.popover);
    await this.add(id);
    this.set(this.lanes[0].isChat ? "chat" : "text");
  }

  async add(id) {
    const lane = new Lane(this);
    this.lanes.push(lane);
    this.place.append(lane.element);
    await lane.load(id);
  }

  async toggle() {
    this.stop();
    const isTwo = this.lanes.length === 1;
    this.place.classList.toggle("two", isTwo);
    this.compare.setAttribute("aria-pressed", String(isTwo));
    this.lanes.forEach((lane) => lane.reset());
    if (isTwo) await this.add(this.lanes[0].chosen.run);
    else this.lanes.pop().element.remove();
    this.idle();
  }

  // another run may be a chat model, or none
  fit() {
    this.modes.hidden = !this.lanes.some((lane) => lane.isChat);
    if (this.modes.hidden && this.mode === "chat") this.set("text");
  }

  set(mode) {
    this.stop();
    clear(this.modes, segmented("kind", [["text", "Text"], ["chat", "Chat"]], mode, (other) => this.set(other)));
    if (this.prompt.value) this.texts[this.mode] = this.prompt.value;
    this.mode = mode;
    const kept = this.texts[mode] ?? this.lanes[0].example(mode);
    this.prompt.value = kept;
    // a message is written below the conversation, a prompt above the text
    this.pages.dataset.mode = mode;
    this.label.textContent = mode === "chat" ? "Message" : "Prompt";
    this.reset.hidden = mode !== "chat";
    this.lanes.forEach((lane) => lane.reset());
    this.idle();
  }

  settings() {
    const found = {};
    for (const [name] of SETTINGS) if (this.inputs[name].value !== "") found[name] = Number(this.inputs[name].value);
    if (found.top_p === 1) delete found.top_p;
    return found;
  }

  start() {
    if (this.lanes.some((lane) => lane.abort)) this.stop();
    else {
      const text = this.prompt.value;
      if (this.go.disabled) return;
      if (this.mode === "chat" && !text.trim()) return;
      this.lanes.forEach((lane) => lane.begin(text));
      if (this.mode === "chat") this.prompt.value = "";
    }
  }

  stop() {
    this.lanes.forEach((lane) => lane.abort?.abort());
    this.popover.hidden = true;
  }

  // a lane that is loading a model would lose its text
  idle() {
    this.go.disabled = !this.lanes.every((lane) => lane.chosen);
    this.compare.disabled = !this.lanes[0].chosen;
    const isBusy = this.lanes.some((lane) => lane.abort);
    this.go.textContent = isBusy ? "Stop" : this.mode === "chat" ? "Send" : "Generate";
    this.go.title = this.mode === "chat" ? "Enter" : "Ctrl+Enter";
  }

  // the alternatives of a token, at the token
  openAt(element, data, choose) {
    const all = [data, ...data.alternatives].sort((a, b) => b.probability - a.probability);
    clear(this.popover, all.map((each) => {
      const bar = h("i", { "aria-hidden": "true" });
      bar.style.width = `${(100 * each.probability).toFixed(1)}%`;
      return h("button", { type: "button", class: each.id === data.id ? "chosen" : "", title: "go on from this token",
        onclick: () => choose({ ...each, text: each.text ?? each.token, alternatives: all.filter((other) => other.id !== each.id) }) },
      bar, h("span", {}, visible(each.token)), h("span", { class: "p" }, percent(each.probability)));
    }));
    const box = element.getClientRects()[0];
    this.popover.hidden = false;
    this.popover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - this.popover.offsetWidth - 8))}px`;
    const height = this.popover.offsetHeight;
    this.popover.style.top = `${box.bottom + height > innerHeight ? box.top - height : box.bottom}px`;
  }

  close() {
    this.stop();
    document.removeEventListener("keydown", this.onkey);
  }
}

// a model and its generated text; a turn: {role, text, tokens, element}
class Lane {
  constructor(play) {
    Object.assign(this, { play, turns: [], chosen: null, isChat: false, sample: "", abort: null });
    this.picker = h("div", {});
    this.output = h("div", { class: "tokens", "aria-live": "off" });
    this.status = h("div", { class: "muted status", role: "status" });
    this.element = h("section", { class: "card lane" }, this.picker, this.output, this.status);
  }

  async load(id) {
    this.abort?.abort();
    this.chosen = null;
    this.play.idle();
    const chosen = await picker(this.picker, id, "play", () => {}, { onrun: guarded((run) => this.load(run)) });
    if (!chosen) return;
    const [details, samples] = await Promise.all([get(`/api/runs/${chosen.run}`), get(`/api/runs/${chosen.run}/samples?limit=1`)]);
    const { prompt, mode } = this.play;
    const isUntouched = prompt.value === this.example(mode);
    this.isChat = details.is_chat;
    this.sample = String(samples.records[0]?.prompt ?? "");
    if (isUntouched) prompt.value = this.example(mode);
    sessionStorage.setItem("run", chosen.run);
    this.chosen = chosen;
    this.play.fit();
    this.play.idle();
    this.reset();
  }

  // the question or text of the last sample in training
  example(mode) {
    const question = /<\|user\|>(.*?)<\|end\|>/s.exec(this.sample)?.[1] ?? "";
    return mode === "chat" ? question : question ? "" : this.sample;
  }

  reset() {
    this.turns = [];
    this.status.textContent = "";
    clear(this.output, h("span", { class: "muted" }, this.play.mode !== "chat" ? "Ctrl+Enter generates."
      : this.isChat ? "Enter sends; the model answers here." : "This run is not a chat model: it has not been fine-tuned by sft."));
  }

  begin(text) {
    if (!this.chosen || (this.play.mode === "chat" && !this.isChat)) return;
    if (this.play.mode === "text" || !this.turns.length) {
      this.turns = [];
      clear(this.output);
    }
    this.say("user", text);
    this.answer(this.say("assistant", ""));
  }

  say(role, text) {
    const turn = { role, text, tokens: [], element: h("div", { class: this.play.mode === "chat" ? `turn ${role}` : `given ${role}` }, text) };
    this.turns.push(turn);
    this.output.append(turn.element);
    return turn;
  }

  answer = guarded(async (turn, kept = []) => {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.play.popover.hidden = true;
    this.play.idle();
    // the following turns are no longer valid
    for (const later of this.turns.splice(this.turns.indexOf(turn) + 1)) later.element.remove();
    Object.assign(turn, { tokens: [], text: "" });
    clear(turn.element);
    kept.forEach((each) => this.append(turn, each));
    const body = { ...this.chosen, ...this.play.settings(), alternatives: 5, kept_ids: kept.map((each) => each.id) };
    const before = this.turns.slice(0, -1);
    if (this.play.mode === "chat") body.messages = before.map(({ role, text }) => ({ role, content: text }));
    else body.prompt = before[0].text;
    const start = performance.now();
    let n = 0;
    this.status.textContent = "waiting for the model";
    try {
      for await (const [name, data] of streamed("/api/generate", body, abort.signal)) {
        if (name === "error") throw new Error(data.detail);
        if (name === "token") {
          this.append(turn, data);
          n += 1;
          const rate = n / ((performance.now() - start) / 1000);
          this.status.textContent = `${turn.tokens.length} tokens · ${rate.toFixed(0)} per second · surprise ${surprise(turn.tokens)} nats per token`;
        }
        if (name === "finished") {
          turn.element.append(data.text);
          turn.text += data.text;
          this.status.textContent += data.reason === "stop" ? " · ended by the model" : "";
          if (!data.n_new) this.status.textContent = "The model ended the text at once.";
        }
      }
    } catch (error) {
      this.status.textContent = error.name === "AbortError" ? `${turn.tokens.length} tokens · stopped` : error.message;
    } finally {
      if (this.abort === abort) this.abort = null;
      this.play.idle();
    }
  });

  append(turn, data) {
    const index = turn.tokens.push(data) - 1;
    const text = data.text || (data.token.startsWith("<") ? data.token : "");
    turn.text += text;
    const element = h("span", { class: text.includes("\n") ? "token newline" : "token", role: "button", tabindex: "0", "aria-label": `${visible(data.token)}, ${percent(data.probability)}` }, text);
    element.style.backgroundColor = `rgb(var(--tint) / ${(0.45 * (1 - Math.sqrt(data.probability))).toFixed(3)})`;
    const open = () => this.play.openAt(element, data, (other) => this.answer(turn, [...turn.tokens.slice(0, index), other]));
    element.addEventListener("pointerenter", open);
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      // the focus goes to the popover: its button must not get this key
      event.preventDefault();
      element.click();
    });
    element.addEventListener("click", () => { open(); this.play.popover.querySelector("button")?.focus(); });
    turn.element.append(element);
  }
}

const percent = (p) => `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
const surprise = (tokens) => (tokens.reduce((sum, each) => sum - Math.log(Math.max(each.probability, 1e-9)), 0) / tokens.length).toFixed(2);

function input(value, limits) {
  const element = h("input", { type: limits.step ? "range" : "number", ...Object.fromEntries(Object.entries(limits).map(([k, v]) => [k, String(v)])) });
  element.value = String(value);
  return element;
}
