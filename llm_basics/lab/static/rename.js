// A new name for a run, written in place of its title.

import { send } from "./api.js";
import { clear, h } from "./dom.js";

// place: the element of the title; onbefore: the request is sent; oncancel: the title is to be drawn again
export function rename(place, run, onbefore, oncancel) {
  const input = h("input", { "aria-label": "Name of the run", "aria-describedby": "name-fault", maxlength: "100", spellcheck: "false",
    autocomplete: "off", required: true });
  const fault = h("p", { id: "name-fault", class: "reason", role: "alert" });
  const save = async (event) => {
    event.preventDefault();
    const name = input.value.trim();
    if (name === run.name) return oncancel();
    try {
      onbefore(true);
      const { id } = await send("PATCH", `/api/runs/${run.id}`, { name });
      location.hash = `#/run/${id}`;
    } catch (error) {
      onbefore(false);
      fault.textContent = error.message;
      input.focus();
    }
    return null;
  };
  clear(place, h("form", { class: "bar rename", onsubmit: save,
    onkeydown: (event) => { if (event.key === "Escape") oncancel(); } },
  input, h("button", { class: "primary" }, "Save name"), h("button", { type: "button", onclick: oncancel }, "Cancel")), fault);
  input.value = run.name;
  input.focus();
  input.select();
}
