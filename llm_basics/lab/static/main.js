// The views and the address: #/runs, #/run/ID, #/play/ID, #/tokens/ID, #/inside/ID, #/config, #/learn.

import { get } from "./api.js";
import { clear, explainTerms, h, learnTerms, message } from "./dom.js";
import { show as runs } from "./runs.js";
import { show as run } from "./run.js";
import { show as play } from "./play.js";
import { show as tokens } from "./tokens.js";
import { show as inside } from "./inside.js";
import { show as config } from "./config.js";
import { show as learn } from "./learn.js";

const VIEWS = {
  runs: ["Runs", runs],
  run: ["Live run", run],
  play: ["Playground", play],
  tokens: ["Tokenizer", tokens],
  inside: ["Inside the model", inside],
  config: ["Config", config],
  learn: ["Learn", learn],
};

// views that are not about a run
const ALONE = ["runs", "config", "learn"];

let leave = () => {};
let current = 0;

async function go() {
  const [name, id] = location.hash.replace(/^#\//, "").split("/");
  const view = name in VIEWS ? name : "runs";
  if (/^[0-9a-f]{12}$/.test(id ?? "")) sessionStorage.setItem("run", id);
  const chosen = id || sessionStorage.getItem("run");
  clear(document.getElementById("nav"), Object.entries(VIEWS).map(([key, [text]]) =>
    h("a", { href: chosen && !ALONE.includes(key) ? `#/${key}/${chosen}` : `#/${key}`,
      "aria-current": key === view ? "page" : null }, text)));
  // on a phone not all of them fit
  document.querySelector("#nav [aria-current]").scrollIntoView({ inline: "center", block: "nearest" });
  document.title = `${VIEWS[view][0]} · llm_basics lab`;
  leave();
  leave = () => {};
  const mine = ++current;
  const place = h("div", { class: "view" });
  clear(document.getElementById("view"), place);
  try {
    const end = await VIEWS[view][1](place, chosen);
    // the address may have changed while the view was loading
    if (mine === current) leave = end ?? leave;
    else end?.();
  } catch (error) {
    if (view !== "runs" && id === undefined) sessionStorage.removeItem("run");
    clear(place, h("div", { class: "empty" }, h("h2", {}, "This does not work"), h("p", {}, error.message)));
    message(error.message, true);
  }
}

function theme(next) {
  const root = document.documentElement;
  if (next) localStorage.setItem("theme", next);
  const kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;
}

document.getElementById("theme").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  theme(isDark ? "light" : "dark");
  window.dispatchEvent(new Event("themechange"));
});
theme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.dispatchEvent(new Event("themechange")));
explainTerms();
// the page also works without explanations; requests of the views report errors
await get("/api/terms").then(learnTerms, () => {});
window.addEventListener("hashchange", go);
go();
