// Change options of a run while it trains; each request is pending, then accepted after a step or refused.

import { post } from "./api.js";
import { clear, guarded, h, message, term } from "./dom.js";
import { ACTIONS, eventText } from "./events.js";

const FIELDS = { "train.lr": "learning rate", "train.eval_every": "evaluate every" };

const numeric = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

export class Steer {
  constructor(id) {
    Object.assign(this, { id, requests: [], key: "" });
    this.element = h("section", { class: "card steer", hidden: true });
  }

  // options: the current ones of the run
  draw(options, isTraining) {
    this.element.hidden = !isTraining && !this.requests.length;
    if (!isTraining) this.requests.filter((each) => each.state === "pending").forEach((each) =>
      Object.assign(each, { state: "refused", text: `${each.text}: the run ended before it read this` }));
    const key = JSON.stringify([isTraining, Object.keys(FIELDS).map((name) => options[name])]);
    if (key !== this.key) this.drawForm(options, isTraining);
    this.key = key;
    this.drawRequests();
  }

  drawForm(options, isTraining) {
    const inputs = Object.entries(FIELDS).map(([name, label]) => {
      const input = h("input", { name, inputmode: "decimal", autocomplete: "off", placeholder: String(options[name] ?? "") });
      return h("label", { class: "field" }, h("span", {}, term(label, name)), input);
    });
    this.list = h("ol", { "aria-live": "polite" });
    const form = h("form", { class: "steering", onsubmit: (event) => {
      event.preventDefault();
      const filled = [...form.elements].filter((each) => each.name && each.value.trim());
      const wanted = Object.fromEntries(filled.map((each) => [each.name, numeric(each.value.trim())]));
      if (!filled.length) message("Enter a new value first.");
      else this.request(wanted, [], () => filled.forEach((each) => (each.value = "")));
    } }, inputs, h("button", { class: "primary" }, "Apply"), h("span", { class: "space" }),
    ["evaluate", "sample", "save"].map((action) =>
      h("button", { type: "button", onclick: () => this.request({}, [action], () => {}) }, `${action[0].toUpperCase()}${action.slice(1)} now`)));
    clear(this.element, h("h2", {}, "Steer"), isTraining ? form : null, this.list);
  }

  request = guarded(async (options, actions, done) => {
    const text = [...Object.entries(options).map(([name, value]) => `${FIELDS[name]} → ${value}`), ...actions.map((each) => ACTIONS[each])];
    const { id } = await post(`/api/runs/${this.id}/steer`, { options, actions });
    done();
    this.requests.unshift({ id, state: "pending", text: text.join(" · ") });
    this.settle(this.events ?? []);
    this.drawRequests();
  });

  // the responses are events of the run
  settle(events) {
    this.events = events;
    const answers = new Map(events.filter((event) => event.id).map((event) => [event.id, event]));
    for (const each of this.requests) {
      const answer = answers.get(each.id);
      if (!answer || each.state !== "pending") continue;
      each.state = answer.event === "steered" ? "accepted" : "refused";
      each.text = answer.event === "steered" ? `after step ${answer.step} · ${eventText(answer)}` : `${each.text}: ${answer.reason}`;
    }
  }

  drawRequests() {
    if (this.list) clear(this.list, this.requests.slice(0, 6).map(({ state, text }) =>
      h("li", {}, h("span", { class: `answer ${state}` }, state), h("span", {}, text))));
  }
}
