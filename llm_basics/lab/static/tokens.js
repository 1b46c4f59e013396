import { clear, empty } from "./dom.js";

export async function show(place) {
  clear(place, empty("Not there yet", "The API has it already."));
}
