// The course: the steps with their state for the file of `--mine`, the lesson beside the last message of the
// check, and the learner's loss curve over that of the reference.

import { get } from "./api.js";
import { Chart } from "./charts.js";
import { clear, guarded, h, number } from "./dom.js";
import { pointsOf } from "./series.js";

const POLL_MILLISECONDS = 2000;
const MARKS = { passed: "✓", failed: "!", "timed out": "!", "not started": "" };

export async function show(place) {
  const view = new Learn();
  place.append(h("div", { class: "heading" }, h("h1", {}, "Learn"), h("span", { class: "space" }), view.count), view.bar, view.next,
    h("div", { class: "course" }, h("section", { class: "steps card", "aria-label": "steps" }, view.list), view.lesson), view.race);
  await view.poll();
  await view.drawRace();
  const timer = setInterval(() => { if (!document.hidden) view.poll(); }, POLL_MILLISECONDS);
  return () => clearInterval(timer);
}

// labels of a step's status in the list
function stateOf({ status, is_current: isCurrent }) {
  if (status === "not started") return isCurrent ? "" : "not checked";
  return isCurrent ? status : "changed";
}

// the steps by course, in order
function coursesOf(steps) {
  const courses = new Map();
  for (const each of steps) courses.set(each.course, [...courses.get(each.course) ?? [], each]);
  return courses;
}

// A message of the check, whose lines are wrapped for a terminal: an item begins with an indentation of two, and
// deeper lines belong to it. The explanation of a mistake is a paragraph of its own.
function checkOf(message) {
  const [title, ...rest] = message.split("\n");
  const items = [];
  for (const line of rest) {
    if (/^\s{3,}/.test(line) && items.length) items.at(-1).more.push(line.trim());
    else if (line.trim()) items.push({ text: line.trim(), more: [] });
  }
  const hint = items.find(({ text }) => text.startsWith("next hint: "));
  const element = ({ text, more }) => (/^(mistake|here it matches|and also): /.test(text)
    ? h("div", { class: "named" }, h("b", { class: "mistake" }, text), more.length ? h("p", {}, more.join(" ")) : null)
    : h("p", { class: "difference" }, [text, ...more].join(" ")));
  return { elements: [h("p", { class: "probe" }, title), ...items.filter((each) => each !== hint).map(element)],
    hint: hint && [hint.text, ...hint.more].join(" ").replace("next hint: ", "") };
}

class Learn {
  constructor() {
    this.count = h("span", { class: "muted" });
    this.bar = h("progress", { max: "1", "aria-label": "steps passed" });
    this.next = h("p", { class: "next" });
    this.list = h("ol", {});
    this.lesson = h("article", { class: "view" });
    this.race = h("section", { class: "card" });
    this.chosen = sessionStorage.getItem("step");
  }

  poll = guarded(async () => {
    const course = await get("/api/learn");
    const known = JSON.stringify(course);
    if (known === this.known) return;
    this.known = known;
    this.course = course;
    const { steps, mine } = course;
    const passed = steps.filter((each) => each.status === "passed").length;
    const counts = [...coursesOf(steps)].map(([name, own]) =>
      `${name} ${own.filter((each) => each.status === "passed").length} of ${own.length}`);
    this.count.textContent = `steps passed: ${counts.join(", ")} · ${mine}`;
    Object.assign(this.bar, { max: steps.length, value: passed });
    clear(this.next, "Next: ", h("code", {}, course.next));
    this.chosen ??= (steps.find((each) => each.status === "failed") ?? steps.find((each) => each.status !== "passed") ?? steps[0]).name;
    await this.choose(this.chosen);
  });

  drawList() {
    const item = (each, i) => h("li", {}, h("button", { type: "button", class: `step ${each.status.replace(" ", "-")}`,
      "aria-current": each.name === this.chosen ? "step" : null, onclick: () => this.choose(each.name) },
    h("i", { "aria-hidden": "true" }, MARKS[each.status] || String(i + 1)), h("span", {}, each.title),
    h("small", {}, stateOf(each))));
    clear(this.list, [...coursesOf(this.course.steps)].flatMap(([name, own]) =>
      [h("li", { class: "muted" }, h("h3", {}, name)), ...own.map(item)]));
  }

  choose = guarded(async (name) => {
    // ignore a response that is older than the last selection
    this.chosen = name;
    sessionStorage.setItem("step", name);
    const focused = this.list.contains(document.activeElement);
    this.drawList();
    if (focused) this.list.querySelector("[aria-current]")?.focus();
    const lesson = await get(`/api/learn/lessons/${name}`);
    if (this.chosen === name) this.drawLesson(lesson, this.course.steps.find((each) => each.name === name));
  });

  drawLesson(lesson, step) {
    const file = this.course.mine;
    const learn = "uv run python -m llm_basics.learn";
    const found = step.message ? checkOf(step.message) : null;
    this.lesson.classList.toggle("beside", stateOf(step) !== "");
    clear(this.lesson,
      h("section", { class: "card lesson" }, h("p", { class: "muted" }, lesson.pieces.join(" · ")), h("h2", {}, lesson.title), h("p", {}, lesson.idea),
        h("h3", {}, "Formula"), h("pre", {}, lesson.formula), h("h3", {}, "Shapes"), h("pre", {}, lesson.shapes),
        Object.keys(lesson.later).length ? [h("h3", {}, "Second stage, once the step passes"), h("dl", {}, Object.entries(lesson.later).map(([name, text]) =>
          h("div", {}, h("dt", {}, name), h("dd", {}, text))))] : null,
        lesson.paper ? h("p", { class: "muted" }, lesson.paper) : null),
      h("section", { class: `card verdict ${step.status.replace(" ", "-")}` },
        h("div", { class: "bar" }, h("h2", {}, "Last check"), h("span", { class: `chip ${step.status === "passed" ? "accepted" : step.status === "not started" ? "" : "failed"}` }, step.status),
          stateOf(step) === "changed" ? h("span", { class: "muted" }, "the code has changed since") : null),
        found?.elements ?? h("p", { class: "muted" }, stateOf(step) === "" ? "Nothing of this step is in the file yet." : "Not checked since messages are kept."),
        lesson.hints.length ? [h("h3", {}, "Hints so far"), ...lesson.hints.map((hint) => h("p", { class: "hinted" }, hint))] : null,
        found?.hint ? [h("h3", {}, "Next hint"), h("pre", { class: "command" }, h("code", {}, found.hint))] : null,
        found ? h("h3", {}, "Check again") : null,
        h("pre", { class: "command" }, h("code", {}, stateOf(step) === "" ? `${learn} start ${lesson.name} --into ${file}`
          : `${learn} check ${lesson.name} --mine ${file}`))));
  }

  // the newest run with user pieces, over its reference
  async drawRace() {
    const [race] = await get("/api/learn/races");
    clear(this.race, h("div", { class: "bar" }, h("h2", {}, "Your model")));
    if (!race) {
      this.race.append(h("p", { class: "muted" }, "No run with pieces of yours yet. This trains the default model twice, with yours and with the reference:"),
        h("pre", { class: "command" }, h("code", {}, `uv run python -m llm_basics.learn race --mine ${this.course.mine} --out runs`)));
      return;
    }
    const chart = new Chart({ height: 280, label: "loss of your run and of the reference" });
    const runs = [["yours", race.yours, 0], ["reference", race.reference, 1]].filter(([, id]) => id);
    const details = await get(`/api/runs/${race.yours}`);
    const series = await Promise.all(runs.map(async ([name, id, color]) => {
      const { series: found } = await get(`/api/runs/${id}/metrics?name=val_loss&name=train_loss&buckets=400`);
      return { name, color, points: pointsOf(found.val_loss ?? found.train_loss) };
    }));
    const last = series.map(({ points }) => points.at(-1)?.y);
    this.race.firstChild.append(h("span", { class: "muted" }, Object.keys(details.origins).map((piece) => piece.split(".").at(-1)).join(", ")),
      h("span", { class: "space" }), h("span", { class: "muted" }, last.length > 1 && last.every((y) => y != null)
        ? `validation loss: yours ${number(last[0], 4)}, reference ${number(last[1], 4)}` : "no run of the reference with the same options yet"));
    this.race.append(chart.element);
    // yours is drawn over the reference
    chart.set(series.reverse());
  }
}
