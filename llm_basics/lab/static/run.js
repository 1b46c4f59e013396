// A run, live: curves, progress, samples over the steps, events, and its start, pause, resume and stop.

import { follow, get, post } from "./api.js";
import { Chart } from "./charts.js";
import { Checkpoints } from "./checkpoints.js";
import { chip, clear, duration, empty, guarded, h, message, number, segmented, term } from "./dom.js";
import { eventKind, eventText } from "./events.js";
import { rename } from "./rename.js";
import { Rollouts } from "./rollouts.js";
import { startDialog } from "./runs.js";
import { Steer } from "./steer.js";
import { Series } from "./series.js";

const NAMES = ["train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"];
const MOST_POINTS = 4000;

export async function show(place, id) {
  id ??= (await get("/api/runs"))[0]?.id;
  if (!id) {
    clear(place, empty("No runs yet", "Start one on the page Runs."));
    return null;
  }
  if (await isStarting(id)) return waiting(place, id);
  const view = new Run(place, id);
  await view.load();
  return () => view.close();
}

// a run that was started a moment ago has a row in the list, but no run directory yet
async function isStarting(id) {
  const run = (await get("/api/runs")).find((each) => each.id === id);
  return Boolean(run && !run.updated);
}

function waiting(place, id) {
  const output = h("pre", { class: "log" });
  const title = h("h2", {}, "The run is starting");
  clear(place, h("div", { class: "empty" }, title, h("p", {}, "It prepares its data and compiles; this page follows.")), output);
  const look = guarded(async () => {
    const run = (await get("/api/runs")).find((each) => each.id === id);
    const { output: lines } = await get(`/api/runs/${id}/log?lines=40`);
    output.textContent = lines.join("\n");
    if (run?.state === "failed") {
      title.textContent = "The run has failed";
      clearInterval(timer);
    } else if (!run || run.updated) window.dispatchEvent(new Event("hashchange"));
  });
  const timer = setInterval(look, 1000);
  look();
  return () => clearInterval(timer);
}

const isRunning = ({ state }) => ["starting", "training", "stopping"].includes(state);

class Run {
  constructor(place, id) {
    Object.assign(this, { place, id, axis: "step", samples: [], events: [], isAtEnd: true });
    this.charts = {
      loss: new Chart({ height: 330, label: "training and validation loss" }),
      lr: new Chart({ height: 150, label: "learning rate" }),
      grad_norm: new Chart({ height: 150, label: "gradient norm" }),
      tokens_per_second: new Chart({ height: 150, label: "tokens per second" }),
    };
    this.head = h("div", { class: "heading" });
    this.tiles = h("div", { class: "tiles" });
    this.findings = h("div", { class: "findings" });
    this.normal = h("p", { class: "normal" });
    this.steer = new Steer(id);
    this.optionBox = h("details", { class: "card" });
    this.logBox = h("details", { class: "card", ontoggle: () => this.drawLog() });
    this.sampleBox = h("section", { class: "card samples" });
    this.eventBox = h("section", { class: "card events" });
    this.checkpoints = new Checkpoints(id);
    this.rollouts = new Rollouts(id);
    const small = (key, title) => h("section", { class: "card" }, h("h3", {}, term(title)), this.charts[key].element);
    clear(place, this.head, this.tiles, this.findings,
      h("section", { class: "card" },
        h("div", { class: "bar" }, h("h2", {}, term("Loss", "loss")), h("span", { class: "space" }),
          segmented("horizontal axis", [["step", "step"], ["tokens", "tokens"], ["time", "time"]], "step",
            (key) => { this.axis = key; Object.values(this.charts).forEach((c) => (c.zoom = null)); this.draw(); }),
          segmented("scale", [[false, "linear"], [true, "log"]], false,
            (key) => { this.charts.loss.isLog = key; this.draw(); })),
        this.charts.loss.element, this.normal,
        h("p", { class: "hint" }, "Drag to zoom in, double-click or Escape to zoom out; arrow keys move the readout.")),
      h("div", { class: "thirds" }, small("lr", "learning rate"), small("grad_norm", "gradient norm"),
        small("tokens_per_second", "tokens/s")),
      this.steer.element,
      this.rollouts.element,
      h("div", { class: "halves" }, this.sampleBox, this.eventBox),
      this.checkpoints.element, this.optionBox, this.logBox);
  }

  close() {
    this.end?.();
    this.isClosed = true;
  }

  async load() {
    const base = `/api/runs/${this.id}`;
    const query = NAMES.map((name) => `name=${name}`).join("&");
    const read = () => get(`${base}/metrics?${query}&buckets=700`);
    const [first, details, samples, events] = await Promise.all([read(), get(base), get(`${base}/samples`), get(`${base}/events`)]);
    let metrics = first;
    Object.assign(this, { details, samples: samples.records, events: events.records });
    this.series = new Series(metrics.series);
    this.steer.settle(this.events);
    this.draw();
    this.drawSamples();
    this.drawEvents();
    this.drawFindings();
    this.checkpoints.load();
    this.rollouts.load();
    this.drawOptions();
    this.drawLog();
    // a long file takes several responses, and its curves grow
    while (!metrics.is_complete && !this.isClosed) {
      metrics = await read();
      this.series = new Series(metrics.series);
      this.draw();
    }
    this.end?.();
    if (this.isClosed) return;
    this.end = follow(`run=${this.id}&position=${encodeURIComponent(metrics.position)}`, {
      metrics: ({ records }) => this.append(records),
      samples: ({ records }) => { this.samples.push(...records); this.drawSamples(); },
      events: guarded(async ({ records }) => {
        this.events.push(...records);
        this.steer.settle(this.events);
        this.drawEvents();
        this.checkpoints.load();
        this.drawFindings();
        if (records.some((event) => event.changed)) this.details = await get(base);
        this.drawOptions();
        this.draw();
      }),
      run: (run) => {
        const hasEnded = run.state !== this.details.state;
        Object.assign(this.details, run);
        this.draw();
        if (hasEnded) [this.drawFindings(), this.drawLog()];
      },
      reset: guarded(() => this.load()),
      gone: () => { if (!this.isRenamed) message("The run was deleted.", true); },
    });
  }

  append(records) {
    this.series.append(records);
    if (records.some((each) => "reward" in each)) this.rollouts.again();
    // long runs: buckets again instead of ever more points
    if (this.series.size > MOST_POINTS) guarded(() => this.load())();
    else this.draw();
  }

  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.series) this.drawNow();
    });
  }

  drawNow() {
    const { series, details, axis } = this;
    this.drawHead();
    const formatX = { step: number, tokens: number, time: duration }[axis];
    for (const chart of Object.values(this.charts)) chart.formatX = formatX;
    const over = (name) => series.over(name, axis, details.tokens_per_step);
    const at = { step: (s) => s, tokens: (s) => s * (details.tokens_per_step || 1), time: (s) => series.secondsAt(s) }[axis];
    const marks = this.events.filter((e) => typeof e.step === "number").map((e) =>
      ({ x: at(e.step), text: eventText(e), kind: eventKind(e) }));
    const band = details.normal;
    this.charts.loss.set([{ name: "training", color: 0, points: over("train_loss") },
      { name: "validation", color: 1, points: over("val_loss"), isDashed: true }], marks, {
      levels: Object.entries(details.baselines ?? {}).map(([name, y]) => ({ name, y })),
      band: band && { name: `normal range, ${band.seeds.length} seeds`,
        points: band.steps.map((step, i) => ({ x: at(step), lo: band.low[i], hi: band.high[i] }))
          .filter((p) => axis !== "time" || p.x <= series.seconds) },
    });
    this.drawNormal();
    this.steer.draw(details.options, details.state === "training");
    this.checkpoints.update(isRunning(details));
    for (const name of ["lr", "grad_norm", "tokens_per_second"]) {
      const points = over(name);
      this.charts[name].set([{ color: 0, points }]);
      this.charts[name].element.parentElement.hidden = !points.length && details.state !== "training";
    }
  }

  drawHead() {
    const run = this.details;
    const act = (action, text, style = "") => h("button", { type: "button", class: style, onclick: guarded(async () => {
      await post(`/api/runs/${run.id}/${action}`);
      message({ pause: "Saving, then pausing.", resume: "Resuming.", stop: "Saving, then stopping." }[action]);
    }) }, text);
    const key = `${run.name} ${run.state} ${run.can_resume} ${run.has_checkpoint}`;
    if (this.shown !== key) {
      this.shown = key;
      const title = h("div", {}, h("h1", {}, run.name), h("p", { class: "muted" }, chip(run.state), ` ${run.config ?? ""}`));
      const renameIt = h("button", { type: "button", onclick: () => {
        renameIt.hidden = true;
        rename(title, run, (isSent) => (this.isRenamed = isSent), () => {
          this.shown = null;
          this.drawHead();
          this.head.querySelector(".renaming").focus();
        });
      }, class: "renaming" }, "Rename");
      clear(this.head, title, h("span", { class: "space" }),
        isRunning(run) ? null : renameIt,
        run.state === "training" || run.state === "starting" ? [act("pause", "Pause", "primary"), act("stop", "Stop")] : null,
        run.can_resume ? act("resume", "Resume", "primary") : null,
        h("button", { type: "button", onclick: guarded(() => startDialog(this.place)) }, "New run"),
        run.has_checkpoint ? [h("a", { class: "button", href: `#/play/${run.id}` }, "Try it"),
          h("a", { class: "button", href: `#/inside/${run.id}` }, "Look inside")] : null);
    }
    const context = run.options["model.context_length"] ?? 1;
    const perEpoch = run.training_tokens * (context / (run.options["train.stride"] ?? context));
    const epochs = (run.step * run.tokens_per_step) / perEpoch;
    this.progress ??= h("progress", { "aria-label": "progress" });
    Object.assign(this.progress, { max: run.steps || 1, value: run.step });
    this.tile("step", "step", `${number(run.step)}${run.steps ? ` / ${number(run.steps)}` : ""}`, this.progress);
    if (epochs) this.tile("epoch", "epoch", number(epochs, 2), `of ${number(run.training_tokens)} tokens`);
    this.tile("training loss", "loss", number(this.series.last("train_loss") ?? run.train_loss));
    this.tile("validation loss", "validation loss", number(this.series.last("val_loss") ?? run.val_loss));
    this.tile("tokens/s", "tokens/s", run.tokens_per_second ? number(Math.round(run.tokens_per_second)) : "–");
    this.tile("ETA", "ETA", duration(run.eta_seconds), this.series.seconds ? `${duration(this.series.seconds)} so far` : "");
    this.tile("parameters", "parameters", number(run.parameters));
  }

  // a number with its name; made once, so that a name under the pointer or in focus stays
  tile(name, key, value, extra) {
    this.values ??= new Map();
    if (!this.values.has(name)) {
      const parts = { value: h("b"), extra: h("small") };
      this.values.set(name, parts);
      this.tiles.append(h("div", { class: "tile" }, h("span", {}, term(name, key)), parts.value, parts.extra));
    }
    const parts = this.values.get(name);
    if (parts.value.textContent !== value) parts.value.textContent = value;
    if (extra instanceof Node) extra.parentElement ?? parts.extra.append(extra);
    else if (parts.extra.textContent !== (extra ?? "")) parts.extra.textContent = extra ?? "";
  }

  drawSamples() {
    const { samples } = this;
    if (!samples.length) {
      clear(this.sampleBox, h("h2", {}, "Samples"), h("p", { class: "muted" }, "None yet; the run writes one every train.sample_every steps."));
      return;
    }
    const text = h("pre", { class: "prose" });
    const label = h("span", { class: "muted" });
    const choose = (i) => {
      const { step, prompt, text: said } = samples[i];
      const loss = this.series.lossAt(step);
      label.textContent = `step ${number(step)}${loss === null ? "" : ` · loss ${number(loss, 3)}`} · ${i + 1} of ${samples.length}`;
      clear(text, h("b", {}, String(prompt ?? "")), String(said ?? ""));
    };
    const slider = h("input", { type: "range", min: "0", max: String(samples.length - 1), "aria-label": "sample by step",
      oninput: () => { this.isAtEnd = Number(slider.value) === samples.length - 1; this.sample = Number(slider.value); choose(this.sample); } });
    slider.value = this.isAtEnd ? samples.length - 1 : this.sample;
    clear(this.sampleBox, h("div", { class: "bar" }, h("h2", {}, "Samples"), h("span", { class: "space" }), label), slider, text);
    choose(Number(slider.value));
  }

  drawEvents() {
    clear(this.eventBox, h("h2", {}, "Events"), this.events.length
      ? h("ol", {}, this.events.slice(-60).reverse().map((event) =>
        h("li", {}, h("span", { class: "num" }, number(event.step)), h("span", { class: eventKind(event) }, eventText(event)))))
      : h("p", { class: "muted" }, "None yet."));
  }

  drawFindings = guarded(async () => {
    const found = await get(`/api/runs/${this.id}/findings`);
    const isLong = this.details.step >= 50;
    clear(this.findings, found.map(({ sign, cause }) => h("p", { class: "finding" }, h("b", {}, sign), ` ${cause}`)),
      found.length || !isLong ? null : h("p", { class: "muted" }, "The metrics have no signs of mistakes."));
  });

  drawNormal() {
    const band = this.details.normal;
    const found = band && this.series.isNormal(band);
    if (!found) return clear(this.normal);
    const { loss, step, low, high, place } = found;
    const verdict = { in: "The loss is normal", below: "The loss is lower than normal", above: "The loss is higher than normal" }[place];
    return clear(this.normal, h("b", { class: place === "above" ? "bad" : "" }, `${verdict}: `),
      `${number(loss, 3)} at step ${number(step)}; 95% of the losses of ${band.seeds.length} runs with the same options lie from `,
      `${number(low, 3)} to ${number(high, 3)} there (measured to step ${number(band.steps.at(-1))}, Python ${band.python}).`);
  }

  drawOptions() {
    const { options, origins } = this.details;
    const groups = Map.groupBy(Object.entries(options).filter(([, v]) => v !== null), ([name]) =>
      (name.includes(".") ? name.split(".")[0] : "data and run"));
    const shown = (v) => (typeof v === "number" ? String(v) : typeof v === "string" ? v : JSON.stringify(v));
    clear(this.optionBox, h("summary", {}, "Options"), h("div", { class: "thirds options" }, [...groups].map(([name, pairs]) =>
      h("div", {}, h("h3", {}, name), h("table", {}, h("tbody", {}, pairs.map(([option, v]) =>
        h("tr", {}, h("th", {}, term(option.split(".").pop(), option)), h("td", {}, shown(v))))))))),
    Object.entries(origins).map(([piece, file]) => h("p", { class: "muted" }, `${piece} from ${file}`)));
  }

  drawLog = guarded(async () => {
    const summary = h("summary", {}, "Log");
    if (!this.logBox.open) return clear(this.logBox, summary);
    const { log, output } = await get(`/api/runs/${this.id}/log?lines=60`);
    const text = h("pre", { class: "log" }, (this.details.state === "failed" && output.length ? output : log).join("\n"));
    clear(this.logBox, this.logBox.querySelector("summary") ?? summary, text);
    text.scrollTop = text.scrollHeight;
  });
}
