// Two lists, the newest first: moves, each of which leads to the story of its request, and what else happened.

import { $, html, write } from "./element.js";
import { ago, count, short, time } from "./words.js";

const SHOWN = 14;
const LOOK = 500; // ms

export class Logs {
  constructor(model, tell) {
    this.model = model;
    this.tell = tell;
    setInterval(() => this.draw(), LOOK);
  }

  show(change) {
    this.stale ||= change.whole || change.hops.length > 0 || change.notes.length > 0;
    for (const hop of change.hops) hop.seen = Date.now();
  }

  draw() {
    if (this.stale) {
      this.stale = false;
      const hops = this.model.hops.slice(-SHOWN).reverse();
      $("moves").replaceChildren(...(hops.length ? hops.map((hop) => this.hop(hop)) : [html("li", { class: "quiet" }, "none since you look")]));
      const notes = this.model.notes.slice(-SHOWN).reverse();
      $("notes").replaceChildren(...(notes.length ? notes.map((note) => this.note(note)) : [html("li", { class: "quiet" }, "nothing yet")]));
    }
    for (const node of document.querySelectorAll("time[data-at]")) write(node, ago(this.model.at - Number(node.dataset.at)));
  }

  hop(hop) {
    const name = (instance) =>
      instance === null ? html("span", { class: "bad" }, "lost") : html("span", { class: this.model.kind(instance) === "P-heavy" ? "p" : "d" }, instance);
    const gap = hop.gap === null ? "" : `, gap ${time(hop.gap)}`;
    const button = html("button", { type: "button", class: "plain" }, short(hop.id));
    button.addEventListener("click", () => this.tell(hop.id));
    const way = html("span", { class: "way" }, name(hop.source), " → ", name(hop.target));
    const what = html("span", { class: "what" }, hop.move);
    const how = html("span", { class: "quiet" }, `${count(hop.kv)} tokens of KV${gap}`);
    return html("li", {}, html("time", { "data-at": hop.at }), what, way, button, how);
  }

  note(note) {
    return html("li", {}, html("time", { "data-at": note.at }), html("span", { class: note.tone }, note.text));
  }
}
