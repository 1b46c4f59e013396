// Selection of a run and a checkpoint: a list of runs and a slider, which can play.

import { get } from "./api.js";
import { clear, empty, field, guarded, h, later, number, term } from "./dom.js";

// the shortest time that a checkpoint is shown while the slider plays
const PLAY_MILLISECONDS = 450;

// null where there is no run with a checkpoint; another run is another address, or `onrun`
export async function picker(place, id, view, onchange, { onrun = null, isPlayed = false } = {}) {
  const runs = await get("/api/runs");
  if (!runs.length) {
    clear(place, empty("No runs yet", "Start one on the page Runs."));
    return null;
  }
  const run = runs.find((each) => each.id === id) ?? runs[0];
  const checkpoints = (await get(`/api/runs/${run.id}/checkpoints`)).filter((each) => !each.error)
    .sort((a, b) => a.step - b.step);
  const select = h("select", { onchange: () => (onrun ? onrun(select.value) : (location.hash = `#/${view}/${select.value}`)) },
    runs.map((each) => h("option", { value: each.id }, each.name)));
  select.value = run.id;
  if (!checkpoints.length) {
    clear(place, field("Run", select), empty("No checkpoint yet", "This run has not saved weights so far."));
    return null;
  }
  const last = checkpoints.length - 1;
  const chosen = { run: run.id, checkpoint: String(checkpoints[last].step) };
  const shown = h("output", {});
  const slider = h("input", { type: "range", min: "0", max: String(last), "aria-label": "checkpoint" });
  slider.value = String(last);
  const changed = later(guarded(() => onchange(chosen)), 120);
  const show = () => {
    const each = checkpoints[Number(slider.value)];
    chosen.checkpoint = String(each.step);
    shown.textContent = `step ${number(each.step)}${each.is_best ? " · best" : ""}`;
    slider.setAttribute("aria-valuetext", shown.textContent);
  };
  let isPlaying = false;
  const play = h("button", { type: "button", title: "go through all checkpoints", onclick: guarded(async () => {
    isPlaying = !isPlaying;
    play.textContent = "Pause";
    if (isPlaying && Number(slider.value) === last) slider.value = "-1";
    try {
      for (let at = Number(slider.value) + (slider.value === "0" ? 0 : 1); isPlaying && at <= last && place.isConnected; at++) {
        slider.value = String(at);
        show();
        await Promise.all([onchange(chosen), new Promise((done) => setTimeout(done, PLAY_MILLISECONDS))]);
      }
    } finally {
      isPlaying = false;
      play.textContent = "Play";
    }
  }) }, "Play");
  slider.addEventListener("input", () => { isPlaying = false; show(); changed(); });
  show();
  clear(place, field("Run", select), h("label", { class: "field" },
    h("span", {}, term("Checkpoint", "checkpoint"), shown), slider), isPlayed && last ? play : null);
  place.classList.add("picker");
  return chosen;
}
