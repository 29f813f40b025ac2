// A request's story, in the words of `taichi explain`: its legs, and every decision with its reason. One that decodes can
// be moved by hand.

import { confirm } from "./confirm.js";
import { $, html, write } from "./element.js";
import { call } from "./key.js";
import { count, short, time } from "./words.js";

const AGAIN = 1000; // ms between two looks at a request that goes on

function table(names, rows) {
  const head = html("tr", {}, ...names.map((name) => html("th", { scope: "col" }, name)));
  return html("div", { class: "wide" }, html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows)));
}

const row = (kind, ...cells) => html("tr", { class: kind }, ...cells.map((text) => html("td", {}, text)));

export class Story {
  constructor(model) {
    this.model = model;
    this.id = null;
    this.dialog = $("story");
    $("story-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => (this.id = null));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  show(change) {
    if (this.id === null || this.due) return;
    const news = change.requests.some((one) => one.id === this.id) || change.gone.includes(this.id);
    if (news) this.due = setTimeout(() => this.load(), AGAIN);
  }

  async open(id) {
    this.id = id;
    write($("story-title"), short(id));
    $("story-title").title = id;
    $("story-text").replaceChildren(html("p", { class: "quiet" }, "…"));
    if (!this.dialog.open) this.dialog.showModal();
    await this.load();
  }

  async load() {
    clearTimeout(this.due);
    this.due = null;
    const id = this.id;
    if (id === null) return;
    const answer = await call("GET", `requests/${encodeURIComponent(id)}`);
    if (id !== this.id) return;
    const parts = answer.ok ? answer.said.requests.flatMap((record) => this.tell(record)) : [html("p", { class: "bad" }, answer.why)];
    $("story-text").replaceChildren(...parts, ...this.moves(id));
  }

  tell(record) {
    const legs = record.legs.map((leg) => {
      const moved = leg.gap === null ? ["", ""] : [`${count(leg.kv_tokens)} tokens`, time(leg.gap)];
      const kind = this.model.kind(leg.instance) === "P-heavy" ? "p" : "d";
      const begins = leg.kind === "prefill" ? "its prompt" : "a move";
      return row(kind, String(leg.leg), leg.instance, begins, time(leg.first_token_at - record.arrived_at), count(leg.output_tokens), ...moved);
    });
    const lines = record.story.map(([at, what, why]) => {
      const decided = what.includes("->") ? "decided" : at === null ? "weighed" : "";
      return row(decided, at === null ? "" : `${at.toFixed(3)} s`, what.replace("->", "→").trim(), why);
    });
    return [
      ...(record.id === short(record.id) ? [] : [html("p", { class: "quiet id" }, record.id)]),
      table(["leg", "instance", "begins with", "first token", "tokens out", "KV moved", "gap"], legs),
      table(["at", "what", "why"], lines),
    ];
  }

  // What an operator can do with it.
  moves(id) {
    const one = this.model.requests.get(id);
    if (one?.state !== "decoding") return [];
    const others = [...this.model.instances.values()].filter((other) => other.alive && other.name !== one.instance);
    const buttons = others.map((other) => {
      const button = html("button", { type: "button" }, `Move to ${other.name}`);
      button.addEventListener("click", () => this.move(id, one.instance, other.name));
      return button;
    });
    return [html("div", { class: "buttons" }, ...buttons)];
  }

  async move(id, from, to) {
    if (!(await confirm("Move this request?", [["runs on", from, to]], "Move"))) return;
    const answer = await call("POST", `requests/${encodeURIComponent(id)}/flow`, { to });
    if (!answer.ok) $("story-text").prepend(html("p", { class: "bad", role: "alert" }, answer.why));
  }
}
