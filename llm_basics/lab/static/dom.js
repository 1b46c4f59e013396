// Elements, numbers and texts of the page. Text is inserted by textContent only.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// names on the page -> names of options and metrics, whose documentation explains them
const KEYS = {
  loss: "train_loss", "training loss": "train_loss", "validation loss": "val_loss", "learning rate": "lr",
  "gradient norm": "grad_norm", "tokens/s": "tokens_per_second", ETA: "eta_seconds", "top-k": "top_k", "top-p": "top_p",
  "repetition penalty": "repetition_penalty", layer: "model.n_layers", head: "model.n_heads",
  epoch: "training_tokens", "normal range": "normal",
};
const lines = {};

export const learnTerms = (found) => Object.assign(lines, found);
export const lineOf = (key) => lines[KEYS[key] ?? key] ?? "";

// a word that is explained on hover and focus
export function term(word, key = word) {
  const line = lineOf(key);
  return line ? h("span", { class: "term", tabindex: "0", "data-line": line }, word) : h("span", {}, word);
}

// one box for all explanations, beside the word and inside the window
export function explainTerms() {
  const box = document.body.appendChild(h("div", { id: "line", role: "tooltip", hidden: true }));
  const show = (event) => {
    const word = event.target.closest?.("[data-line]");
    box.hidden = !word;
    if (!word) return;
    box.textContent = word.dataset.line;
    word.setAttribute("aria-describedby", "line");
    const { left, top, bottom } = word.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
    const below = bottom + 8 + box.offsetHeight < innerHeight;
    box.style.top = `${below ? bottom + 8 : top - 8 - box.offsetHeight}px`;
  };
  for (const name of ["pointerover", "focusin"]) document.addEventListener(name, show);
  for (const name of ["focusout", "scroll"]) document.addEventListener(name, () => (box.hidden = true), true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") box.hidden = true; });
}

export const clear = (element, ...children) => {
  element.replaceChildren(...children.flat().filter(Boolean));
  return element;
};

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)} B`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(digits)));
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function ago(time) {
  return time ? `${duration(Math.max(0, Date.now() / 1000 - time))} ago` : "";
}

export function bytes(n) {
  return n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${Math.ceil(n / 1e3)} kB`;
}

// white space of a token made visible
export const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");

let timer = 0;
export function message(text, isError = false) {
  const place = document.getElementById("message");
  place.textContent = text;
  place.className = isError ? "shown bad" : "shown";
  clearTimeout(timer);
  timer = setTimeout(() => (place.className = ""), isError ? 9000 : 3500);
}

// run an action; errors are shown
export const guarded = (action) => async (...given) => {
  try {
    return await action(...given);
  } catch (error) {
    if (error.name !== "AbortError") message(error.message, true);
  }
};

export function later(action, milliseconds = 150) {
  let pending = 0;
  return (...given) => {
    clearTimeout(pending);
    pending = setTimeout(() => action(...given), milliseconds);
  };
}

// a row of buttons, one of them selected
export function segmented(label, options, value, onchange) {
  const buttons = options.map(([key, text]) =>
    h("button", { type: "button", "aria-pressed": String(key === value), onclick: () => choose(key) }, text));
  const choose = (key) => {
    options.forEach(([each], i) => buttons[i].setAttribute("aria-pressed", String(each === key)));
    onchange(key);
  };
  return h("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

export function field(label, input, hint) {
  const value = input.type === "range" ? h("output", {}, input.value) : "";
  if (value) input.addEventListener("input", () => (value.textContent = input.value));
  return h("label", { class: "field" }, h("span", {}, label, value), input, hint ? h("small", {}, hint) : null);
}

export function empty(title, text) {
  return h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text));
}

export function chip(state) {
  return h("span", { class: `chip ${state}` }, state);
}
