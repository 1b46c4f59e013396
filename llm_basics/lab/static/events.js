// Events of a run as text.

import { number } from "./dom.js";

const value = (v) => (typeof v === "number" ? number(v) : v === null ? "none" : typeof v === "object" ? JSON.stringify(v) : String(v));
const NAMES = { "train.lr": "learning rate", "train.eval_every": "evaluate every" };
export const ACTIONS = { evaluate: "evaluate", sample: "sample", save: "save a checkpoint", stop: "stop" };

const changes = ({ changed }) => Object.entries(changed ?? {}).map(([name, pair]) =>
  `${NAMES[name] ?? name} ${Array.isArray(pair) ? pair.map(value).join(" → ") : value(pair)}`);

const WORDS = {
  checkpoint: ({ val_loss: loss }) => ["checkpoint", loss === null || loss === undefined ? "" : `validation loss ${value(loss)}`],
  spike: (e) => [`loss spike: ${value(e.loss)}, ${value(Math.round(e.z_score))} deviations above the recent median`, e.skipped ? "step skipped" : ""],
  skipped: (e) => ["step skipped", e.reason],
  resumed: (e) => ["resumed", ...changes(e)],
  steered: (e) => [...changes(e), ...(e.do ?? []).map((each) => ACTIONS[each] ?? each)],
  refused: (e) => ["refused", e.reason],
  stopped: (e) => [`stopped by ${e.signal}`],
  failed: (e) => ["failed", e.reason],
  recorded: (e) => ["to be repeated", ...changes(e)],
  replayed: (e) => [e.sha256 === e.expected ? "the weights equal those of the replayed run" : "the weights differ from the replayed run"],
};

export function eventText(event) {
  const rest = () => [event.event ?? "event", ...Object.entries(event).filter(([name]) => !["step", "attempt", "event"].includes(name))
    .map(([name, each]) => `${name} ${value(each)}`)];
  const parts = Object.hasOwn(WORDS, event.event ?? "") ? WORDS[event.event](event) : rest();
  return parts.filter(Boolean).join(" · ").slice(0, 300) || "no change: the values are in effect already";
}

export const eventKind = ({ event }) =>
  ["spike", "skipped", "refused", "failed"].includes(event) ? "bad" : event === "steered" ? "steered" : "";
