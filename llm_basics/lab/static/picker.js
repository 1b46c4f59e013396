// Which run and which of its checkpoints: a list of runs and a slider.

import { get } from "./api.js";
import { clear, empty, field, guarded, h, later, number, term } from "./dom.js";

// null where there is no run with a checkpoint
export async function picker(place, id, view, onchange) {
  const runs = await get("/api/runs");
  if (!runs.length) {
    clear(place, empty("No runs yet", "Start one on the page Runs."));
    return null;
  }
  const run = runs.find((each) => each.id === id) ?? runs[0];
  const checkpoints = (await get(`/api/runs/${run.id}/checkpoints`)).filter((each) => !each.error)
    .sort((a, b) => a.step - b.step);
  const select = h("select", { onchange: () => (location.hash = `#/${view}/${select.value}`) },
    runs.map((each) => h("option", { value: each.id }, each.name)));
  select.value = run.id;
  if (!checkpoints.length) {
    clear(place, field("Run", select), empty("No checkpoint yet", "This run has not saved weights so far."));
    return null;
  }
  const chosen = { run: run.id, checkpoint: String(checkpoints.at(-1).step) };
  const shown = h("b", {});
  const slider = h("input", { type: "range", min: "0", max: String(checkpoints.length - 1), "aria-label": "checkpoint" });
  slider.value = String(checkpoints.length - 1);
  const changed = later(guarded(() => onchange(chosen)), 120);
  const show = () => {
    const each = checkpoints[Number(slider.value)];
    chosen.checkpoint = String(each.step);
    shown.textContent = ` step ${number(each.step)}${each.is_best ? " · best" : ""}`;
    slider.setAttribute("aria-valuetext", shown.textContent);
  };
  slider.addEventListener("input", () => { show(); changed(); });
  show();
  place.append(h("section", { class: "card picker" }, field("Run", select),
    h("label", { class: "field" }, h("span", {}, term("Checkpoint", "checkpoint"), shown), slider)));
  return chosen;
}
