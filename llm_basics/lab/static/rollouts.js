// Rollouts of a run of rl: the responses to a prompt with their rewards and advantages, by step.

import { get } from "./api.js";
import { clear, field, guarded, h, later, number, term } from "./dom.js";

const RELOAD_MILLISECONDS = 2000;
const PROMPT_CHARACTERS = 60;

export class Rollouts {
  constructor(id) {
    // step null: the last one, also when there are more
    Object.assign(this, { id, step: null, group: 0, steps: [] });
    this.element = h("section", { class: "card rollouts", hidden: true });
    this.label = h("span", { class: "muted" });
    this.slider = h("input", { type: "range", min: "0", "aria-label": "rollouts by step", oninput: () => {
      const at = Number(this.slider.value);
      this.step = at === this.steps.length - 1 ? null : this.steps[at];
      this.draw();
      this.soon();
    } });
    this.select = h("select", { onchange: () => { this.group = Number(this.select.value); this.drawGroup(); } });
    this.body = h("div", { class: "view" });
    clear(this.element, h("div", { class: "bar" }, h("h2", {}, term("Rollouts", "rollouts")), h("span", { class: "space" }), this.label),
      this.slider, field("Prompts of this step", this.select), this.body);
    this.soon = later(() => this.load(), 120);
    // while the run trains
    this.again = later(() => { if (this.step === null) this.load(); }, RELOAD_MILLISECONDS);
  }

  load = guarded(async () => {
    const { step } = this;
    let found = await get(`/api/runs/${this.id}/rollouts${step === null ? "" : `?step=${step}`}`);
    while (!found.is_complete && step === null) found = await get(`/api/runs/${this.id}/rollouts`);
    // an answer that is older than the last choice is not drawn
    if (step !== this.step) return;
    Object.assign(this, { steps: found.steps, found });
    this.group = Math.min(this.group, Math.max(0, found.groups.length - 1));
    this.element.hidden = !found.steps.length;
    this.draw();
    clear(this.select, found.groups.map(({ prompt, responses }, i) => h("option", { value: String(i) },
      `${i + 1} · mean reward ${number(mean(responses), 2)} · ${prompt.slice(0, PROMPT_CHARACTERS)}`)));
    this.select.value = String(this.group);
    this.drawGroup();
  });

  draw() {
    const at = this.step === null ? this.steps.length - 1 : this.steps.indexOf(this.step);
    Object.assign(this.slider, { max: String(Math.max(0, this.steps.length - 1)), disabled: this.steps.length < 2 });
    this.slider.value = String(at);
    this.label.textContent = `step ${number(this.steps[at])} · ${at + 1} of ${this.steps.length}`;
    this.slider.setAttribute("aria-valuetext", this.label.textContent);
  }

  drawGroup() {
    const group = this.found.groups[this.group];
    if (!group) return clear(this.body, h("p", { class: "muted" }, "No responses in this step."));
    const sorted = [...group.responses].sort((a, b) => (b.advantage ?? 0) - (a.advantage ?? 0));
    return clear(this.body, h("dl", { class: "asked" }, pair("Prompt", group.prompt), group.expected ? pair("Expected", group.expected) : null),
      h("ol", { "aria-label": "responses" }, sorted.map(response)),
      this.found.is_whole ? null : h("p", { class: "hint" }, "The step has more responses than are shown here; all are in rollouts.jsonl."));
  }
}

const pair = (name, text) => h("div", {}, h("dt", {}, name), h("dd", { class: "prose" }, text));
const mean = (responses) => responses.reduce((sum, { reward }) => sum + (reward ?? 0), 0) / responses.length;

function response({ text, reward, advantage, n_tokens: n, is_exact: isExact, is_cut_off: isCutOff }) {
  const sign = advantage > 0 ? "up" : advantage < 0 ? "down" : "";
  const about = [n === null ? "" : `${n} tokens`, isExact && "exact", isCutOff && "cut off"].filter(Boolean).join(" · ");
  return h("li", { class: sign }, h("dl", {}, h("div", {}, h("dt", {}, "reward"), h("dd", {}, number(reward, 3))),
    h("div", {}, h("dt", {}, "advantage"), h("dd", {}, `${advantage > 0 ? "+" : ""}${number(advantage, 3)}`.replace("-", "−")))),
  h("div", {}, h("p", { class: "prose" }, text || h("span", { class: "muted" }, "(empty)")), h("small", {}, about)));
}
