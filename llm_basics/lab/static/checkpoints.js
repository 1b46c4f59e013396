// The checkpoints of a run: their SHA-256 is verified, and they are deleted after a confirmation below the row.

import { get, post, send } from "./api.js";
import { ago, bytes, clear, guarded, h, message, number, term } from "./dom.js";

const COLUMNS = ["Step", "Validation loss", "Size", "Saved", "SHA-256"];

export class Checkpoints {
  constructor(id) {
    Object.assign(this, { id, found: [], results: new Map(), asked: null, isTraining: null });
    this.element = h("section", { class: "card checkpoints", tabindex: "-1", "aria-label": "checkpoints",
      onkeydown: (event) => { if (event.key === "Escape" && this.asked !== null) this.ask(null); } });
  }

  load = guarded(async () => {
    this.found = await get(`/api/runs/${this.id}/checkpoints`);
    if (!this.found.some((each) => each.step === this.asked)) this.asked = null;
    this.draw();
  });

  // a run that trains keeps its checkpoints
  update(isTraining) {
    if (isTraining === this.isTraining) return;
    this.isTraining = isTraining;
    if (isTraining) this.asked = null;
    this.draw();
  }

  draw() {
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    clear(this.element, h("h2", {}, term("Checkpoints", "checkpoint")),
      this.found.length ? h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, COLUMNS.map((each) => h("th", {}, each)), h("th", {}, h("span", { class: "unseen" }, "Actions")))),
        h("tbody", {}, this.found.flatMap((each) => [this.row(each), each.step === this.asked ? this.confirmation(each) : null]))))
        : h("p", { class: "muted" }, "None yet."),
      this.found.length && this.isTraining ? h("p", { class: "hint" }, "The run is training: stop it to delete checkpoints.") : null);
    if (focused) (this.element.querySelector(`[data-key="${CSS.escape(focused)}"]:not(:disabled)`) ?? this.element).focus();
  }

  row(each) {
    const cell = (i, ...content) => h("td", { "data-label": COLUMNS[i] }, h("span", {}, content));
    const key = keyOf(each);
    const tags = [each.is_latest && "latest", each.is_best && "best"].filter(Boolean);
    const { state = "", text = "not verified" } = this.results.get(key) ?? (each.error ? { state: "refused", text: each.error } : {});
    const button = (action, props) => h("button", { type: "button", "data-key": `${action} ${each.step}`,
      "aria-label": `${action} the checkpoint of step ${each.step}`, ...props }, action);
    return h("tr", { class: each.step === this.asked ? "asked" : "" }, cell(0, number(each.step), ...tags.map((tag) => h("small", {}, tag))),
      cell(1, number(each.val_loss)), cell(2, bytes(each.n_bytes)),
      cell(3, h("time", { title: new Date(each.time * 1000).toLocaleString() }, ago(each.time))),
      cell(4, h("span", { class: state ? `answer ${state}` : "muted" }, text)),
      h("td", { class: "actions" }, button("Verify", { disabled: state === "pending", onclick: () => this.verify(each) }),
        button("Delete", { disabled: this.isTraining, "aria-expanded": String(each.step === this.asked),
          onclick: () => this.ask(each.step === this.asked ? null : each.step) })));
  }

  confirmation(each) {
    return h("tr", { class: "confirmation" }, h("td", { colspan: String(COLUMNS.length + 1) },
      h("div", { class: "bar", role: "group", "aria-label": "confirm the deletion" },
        h("span", {}, `Delete the checkpoint of step ${number(each.step)} (${bytes(each.n_bytes)})? This cannot be undone.`), h("span", { class: "space" }),
        h("button", { type: "button", "data-key": "keep", onclick: () => this.ask(null) }, "Keep"),
        h("button", { type: "button", class: "danger", "data-key": "confirm", onclick: () => this.remove(each) }, "Delete checkpoint"))));
  }

  // ask before the deletion of a step; null: no longer
  ask(step) {
    const before = this.asked;
    this.asked = step;
    this.draw();
    this.element.querySelector(step === null ? `[data-key="Delete ${before}"]` : '[data-key="keep"]')?.focus();
  }

  verify = async (each) => {
    const key = keyOf(each);
    const show = (state, text) => { this.results.set(key, { state, text }); this.draw(); };
    show("pending", "computing");
    try {
      const { is_valid: isValid, error } = await post(`/api/runs/${this.id}/checkpoints/${each.step}/verify`);
      show(isValid ? "accepted" : "refused", isValid ? "valid" : error);
      message(`Checkpoint of step ${each.step}: ${isValid ? "the SHA-256 matches" : error}.`, !isValid);
    } catch (error) {
      show("refused", error.message);
    }
    // a button that is disabled loses the focus
    if (document.activeElement === this.element) this.element.querySelector(`[data-key="Verify ${each.step}"]`)?.focus();
  };

  remove = guarded(async (each) => {
    try {
      await send("DELETE", `/api/runs/${this.id}/checkpoints/${each.step}`);
      message(`The checkpoint of step ${each.step} is deleted.`);
      await this.load();
      this.element.focus();
    } finally {
      if (this.asked === each.step) this.ask(null);
    }
  });
}

// another file of the same step has another time
const keyOf = ({ step, time }) => `${step} ${time}`;
