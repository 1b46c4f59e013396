// The tokenizer of a run: a text in colors with its ids, and its merges replayed step by step.

import { post } from "./api.js";
import { clear, field, guarded, h, later, message, number, visible } from "./dom.js";
import { picker } from "./picker.js";

export async function show(place, id) {
  clear(place, h("div", { class: "heading" }, h("h1", {}, "Tokenizer")));
  const input = h("textarea", { rows: 3, spellcheck: "false", "aria-label": "text" });
  input.value = "To be, or not to be, that is the question.";
  const update = guarded(() => tokenize());
  const bar = place.appendChild(h("section", { class: "card" }));
  const chosen = await picker(bar, id, "tokens", update);
  if (!chosen) return null;
  const counts = h("span", { class: "muted" });
  const pieces = h("div", { class: "pieces" });
  const words = h("div", { class: "replay" });
  const slider = h("input", { type: "range", min: "0", max: "0", "aria-label": "merge" });
  const at = h("span", { class: "muted" });
  const learned = h("div", { class: "scroll" });
  let pretokens = [];
  let timer = 0;

  async function tokenize() {
    const text = input.value;
    const found = await post("/api/tokenize", { ...chosen, text });
    if (text !== input.value) return;
    counts.textContent = `${found.tokens.length} tokens · ${found.n_bytes} bytes · ${
      (found.n_bytes / Math.max(1, found.tokens.length)).toFixed(2)} bytes per token · vocabulary ${number(found.vocab_size)}`;
    clear(pieces, found.tokens.map((each) => h("span", { class: `piece h${each.id % 6}`, title: `bytes ${each.start} to ${each.end}` },
      h("b", {}, visible(each.token)), h("small", {}, String(each.id)))));
    pretokens = text ? (await post("/api/merges", { ...chosen, text: text.slice(0, 500) })).pretokens : [];
    slider.max = String(Math.max(0, ...pretokens.map((each) => each.ranks.length)));
    slider.value = slider.max;
    replay();
  }

  // after the n-th merge of each word
  function replay() {
    const n = Number(slider.value);
    at.textContent = n ? `after merge ${n} of each word` : "bytes, before any merge";
    clear(words, pretokens.map(({ steps, ranks }) => {
      const i = Math.min(n, steps.length - 1);
      const before = new Set(i ? steps[i - 1] : steps[0]);
      return h("span", { class: "word", title: i ? `merge ${ranks[i - 1]} of the tokenizer` : "" }, steps[i].map((part) =>
        h("span", { class: i && i === n && !before.has(part) ? "new" : "" }, visible(part))));
    }));
  }

  function play() {
    clearInterval(timer);
    slider.value = "0";
    replay();
    timer = setInterval(() => {
      slider.value = String(Number(slider.value) + 1);
      replay();
      if (slider.value === slider.max) clearInterval(timer);
    }, 700);
  }

  let first = 1;
  async function learnedFrom(rank) {
    const { merges, n_total: total } = await post("/api/merges/learned", { ...chosen, first: rank, count: 20 });
    if (!merges.length) {
      message("There are no more merges.");
      return;
    }
    first = rank;
    clear(learned, h("table", {}, h("thead", {}, h("tr", {}, ["merge", "left", "right", "token", "id"].map((t) => h("th", {}, t)))),
      h("tbody", {}, merges.map((m) => h("tr", {}, [`${m.rank} / ${total}`, visible(m.left), visible(m.right), visible(m.token), String(m.id)]
        .map((t) => h("td", {}, t)))))));
  }

  input.addEventListener("input", later(update));
  slider.addEventListener("input", () => { clearInterval(timer); replay(); });
  place.append(h("section", { class: "card" }, field("Text", input)),
    h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Tokens"), counts), pieces),
    h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Merges of this text"), at, h("span", { class: "space" }),
      h("button", { type: "button", onclick: play }, "Replay")), slider, words),
    h("section", { class: "card" }, h("div", { class: "bar" }, h("h2", {}, "Merges in the order of learning"), h("span", { class: "space" }),
      h("button", { type: "button", onclick: guarded(() => learnedFrom(Math.max(1, first - 20))) }, "Earlier"),
      h("button", { type: "button", onclick: guarded(() => learnedFrom(first + 20)) }, "Later")), learned));
  await tokenize();
  await learnedFrom(1);
  return () => clearInterval(timer);
}
