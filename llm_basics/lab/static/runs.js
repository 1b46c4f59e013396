// The runs: newest first, search, several overlaid, what differs between them, start, delete.

import { follow, get, post, send } from "./api.js";
import { Chart, COLORS, sparkline } from "./charts.js";
import { ago, chip, clear, duration, empty, field, guarded, h, message, number, segmented, term } from "./dom.js";
import { pointsOf } from "./series.js";

const REDRAW_MILLISECONDS = 3000;

export async function show(place) {
  const rows = new Map((await get("/api/runs")).map((run) => [run.id, run]));
  const selected = new Set();
  const list = h("div", { class: "rows" });
  const overlay = h("section", { class: "overlay card", hidden: true });
  const search = h("input", { type: "search", placeholder: "Search runs", "aria-label": "Search runs",
    oninput: () => draw() });
  const count = h("span", { class: "muted" });
  clear(place,
    h("div", { class: "heading" }, h("h1", {}, "Runs"), count, h("span", { class: "space" }), search,
      h("button", { class: "primary", type: "button", onclick: guarded(() => startDialog(place)) }, "New run")),
    overlay, list);

  // draws the curves of the selected runs again
  let redraw = () => {};
  const chosen = () => [...selected].map((each) => rows.get(each)).filter(Boolean);
  const toggle = guarded(async (id) => {
    if (!selected.delete(id)) selected.add(id);
    draw();
    redraw = (await compare(overlay, chosen())) ?? (() => {});
  });
  const remove = guarded(async (run) => {
    if (!confirm(`Delete the run ${run.name} with its checkpoints? This cannot be undone.`)) return;
    await send("DELETE", `/api/runs/${run.id}`);
    drop(run.id);
  });
  const drop = (id) => {
    rows.delete(id);
    if (selected.has(id)) toggle(id);
    else draw();
  };

  const matching = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return [...rows.values()].sort((a, b) => b.updated - a.updated).filter((run) => words.every((w) =>
      `${run.name} ${run.config ?? ""} ${run.state}`.toLowerCase().includes(w)));
  };
  let shown = new Map();

  // all rows, or only that of the run `id` if the order is unchanged
  function draw(id) {
    const found = matching();
    count.textContent = `${found.length} of ${rows.size}`;
    const focused = document.activeElement?.dataset?.key;
    const isInPlace = shown.has(id) && found.length === shown.size && [...shown.keys()].every((each, i) => each === found[i].id);
    if (isInPlace) {
      const next = row(rows.get(id), selected, toggle, remove);
      shown.get(id).replaceWith(next);
      shown.set(id, next);
    } else {
      shown = new Map(found.map((run) => [run.id, row(run, selected, toggle, remove)]));
      if (rows.size) clear(list, header(), [...shown.values()]);
      else clear(list, empty("No runs yet", "Start one with New run, or in a terminal: python -m llm_basics.train"));
    }
    if (focused) list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  // the curve of a training run is refreshed every few seconds
  let isDue = false;
  const redrawLater = () => {
    if (isDue) return;
    isDue = true;
    setTimeout(() => { isDue = false; redraw(); }, REDRAW_MILLISECONDS);
  };

  draw();
  const timer = setInterval(() => draw(), 30000);
  const end = follow("", {
    run: (run) => {
      rows.set(run.id, run);
      draw(run.id);
      if (selected.has(run.id)) redrawLater();
    },
    gone: ({ run }) => drop(run),
  });
  return () => { clearInterval(timer); end(); };
}

function header() {
  return h("div", { class: "row head", "aria-hidden": "true" }, h("span"), h("span", {}, "Run"), h("span", {}, "Step"),
    h("span", {}, term("Loss", "loss")), h("span", {}, term("Validation", "validation loss")),
    h("span", {}, term("tokens/s")), h("span", {}, term("ETA")), h("span", {}, "Curve"), h("span"));
}

function row(run, selected, toggle, remove) {
  const cell = (label, ...content) => h("span", { class: "cell", "data-label": label }, content);
  const index = [...selected].indexOf(run.id);
  return h("div", { class: `row${index >= 0 ? " selected" : ""}` },
    h("input", { type: "checkbox", checked: index >= 0, "data-key": `s${run.id}`,
      class: index >= 0 ? `k${index % COLORS}` : "", "aria-label": `Overlay ${run.name}`, onchange: () => toggle(run.id) }),
    h("span", { class: "name" }, h("a", { href: `#/run/${run.id}`, "data-key": `n${run.id}` }, run.name),
      h("small", {}, chip(run.state), ` ${run.config ?? ""} · ${ago(run.updated)}`),
      run.reason ? h("small", { class: "reason" }, run.reason) : null),
    cell("Step", `${number(run.step)}${run.steps ? ` / ${number(run.steps)}` : ""}`,
      h("progress", { max: run.steps || 1, value: run.step, "aria-label": "progress" })),
    cell("Loss", number(run.train_loss)),
    cell("Validation", number(run.val_loss)),
    cell("tokens/s", run.tokens_per_second ? number(Math.round(run.tokens_per_second)) : "–"),
    cell("ETA", duration(run.eta_seconds)),
    h("span", { class: "cell spark" }, run.sparkline.length > 1 ? sparkline(run.sparkline) : ""),
    h("button", { class: "quiet", type: "button", "data-key": `d${run.id}`, title: `Delete ${run.name}`, "aria-label":
      `Delete ${run.name}`, onclick: () => remove(run) }, "×"));
}

async function compare(place, runs) {
  place.hidden = !runs.length;
  if (!runs.length) return null;
  const chart = new Chart({ height: 280, label: "loss of the selected runs" });
  let metric = "train_loss";
  let isLog = false;
  const load = guarded(async () => {
    const all = await Promise.all(runs.map((run) => get(`/api/runs/${run.id}/metrics?name=${metric}&buckets=400`)));
    chart.isLog = isLog;
    chart.set(all.map(({ series }, i) => ({ name: runs[i].name, color: i % COLORS, points: pointsOf(series[metric]) })));
  });
  const differences = h("div", { class: "differences" });
  clear(place, h("div", { class: "bar" }, h("h2", {}, "Overlay"), h("span", { class: "space" }),
    segmented("metric", [["train_loss", "training"], ["val_loss", "validation"], ["grad_norm", "gradient norm"], ["lr", "rate"]],
      metric, (key) => { metric = key; load(); }),
    segmented("scale", [[false, "linear"], [true, "log"]], isLog, (key) => { isLog = key; load(); })),
  chart.element, differences);
  await load();
  if (runs.length < 2) return load;
  const all = await get(`/api/diff?${runs.map((run) => `run=${run.id}`).join("&")}`);
  const found = all.filter(({ option }) => option !== "run_dir" && option !== "resume");
  clear(differences, h("h3", {}, found.length ? "What differs" : "The same options"), h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, "option"), runs.map((run) => h("th", {}, run.name)))),
    h("tbody", {}, found.map(({ option, values }) =>
      h("tr", {}, h("th", {}, term(option)), values.map((value) => h("td", {}, String(value ?? "–"))))))));
  return load;
}

// --- start a run

export async function startDialog(place) {
  const { presets, data } = await get("/api/presets");
  const select = (values) => h("select", {}, values.map((value) => h("option", { value }, value)));
  const preset = select(presets.map((each) => each.name));
  if (presets.some((each) => each.name === "tiny")) preset.value = "tiny";
  const text = select(data);
  const name = h("input", { placeholder: "date, time and preset" });
  const overrides = h("textarea", { rows: 4, spellcheck: "false", placeholder: "train.steps=500\ntrain.lr=0.003" });
  const estimate = h("p", { class: "muted" });
  const body = () => ({ preset: preset.value, data: text.value, name: name.value || null, options: parsed(overrides.value) });
  const update = guarded(async () => {
    const found = await post("/api/estimate", body());
    estimate.textContent = `${number(found.parameters)} parameters · ${number(found.tokens)} tokens · ${found.flops.toExponential(1)} FLOPs`;
  });
  const dialog = h("dialog", { onclose: () => dialog.remove() }, h("h2", {}, "New run"),
    field("Preset", preset), field("Text", text), field("Name", name),
    field("Options", overrides, "One NAME=VALUE a line; the names are those of the command line."), estimate,
    h("div", { class: "bar" }, h("span", { class: "space" }),
      h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: guarded(async () => {
        const { id } = await post("/api/runs", body());
        dialog.close();
        message("The run is starting.");
        location.hash = `#/run/${id}`;
      }) }, "Start")));
  preset.addEventListener("change", update);
  overrides.addEventListener("change", update);
  place.append(dialog);
  dialog.showModal();
  update();
}

function parsed(text) {
  const found = {};
  for (const line of text.split("\n").map((each) => each.trim()).filter(Boolean)) {
    const [name, ...rest] = line.split("=");
    const value = rest.join("=").trim();
    if (!rest.length) throw new Error(`an option must be NAME=VALUE, got ${line}`);
    try {
      found[name.trim()] = JSON.parse(value);
    } catch {
      found[name.trim()] = value;
    }
  }
  return found;
}
