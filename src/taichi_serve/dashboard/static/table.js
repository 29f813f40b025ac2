// The instances as a table: the same as on the board, in words, with what can be done to each.

import { confirm } from "./confirm.js";
import { $, html, set, write } from "./element.js";
import { call } from "./key.js";
import { condition } from "./place.js";
import { count } from "./words.js";

const COLUMNS = ["instance", "kind", "chunk", "KV", "running", "queue", "tokens/s in", "tokens/s out", "restarts", "", ""];
const TOLD = 8000; // ms that an answer which was no is shown
const LOOK = 1000; // ms; rates are over this time, or longer

export class Table {
  constructor(model) {
    this.model = model;
    this.rows = new Map();
    this.body = html("tbody");
    const names = COLUMNS.map((name) => html("th", { scope: "col" }, name));
    $("table").append(html("thead", {}, html("tr", {}, ...names)), this.body);
    setInterval(() => this.draw(), LOOK);
  }

  show(change) {
    if (change.whole) for (const row of this.rows.values()) row.before = null;
    if (change.whole || change.notes.length) this.draw();
  }

  draw() {
    for (const one of this.model.instances.values()) {
      if (!this.rows.has(one.name)) this.add(one.name);
      this.fill(this.rows.get(one.name), one);
    }
    for (const [name, row] of this.rows) {
      if (this.model.instances.has(name)) continue;
      row.node.remove();
      this.rows.delete(name);
    }
  }

  add(name) {
    const head = html("th", { scope: "row" }, name);
    const cells = COLUMNS.slice(1, -1).map((label) => html("td", { "data-label": label }));
    const button = html("button", { type: "button" });
    button.addEventListener("click", () => this.act(name));
    const node = html("tr", { "data-row": name }, head, ...cells, html("td", { class: "act" }, button));
    this.body.append(node);
    this.rows.set(name, { node, cells, button, before: null, wrong: "", until: 0 });
  }

  fill(row, one) {
    const [state, well] = condition(one);
    const words = Date.now() < row.until ? row.wrong : well;
    const share = one.kv_capacity ? one.kv_tokens / one.kv_capacity : 0;
    const queue = one.queued_prefill_tokens ? `${one.waiting} · ${count(one.queued_prefill_tokens)} tokens` : String(one.waiting);
    const [taken, made] = this.rates(row, one);
    const kv = `${Math.round(share * 100)} % of ${count(one.kv_capacity)}`;
    const figures = [one.kind, count(one.chunk), kv, String(one.running), queue, taken, made, String(one.restarts), words];
    row.cells.forEach((cell, number) => write(cell, figures[number]));
    if (one.lost) set(row.cells.at(-1), "title", `lost last: ${one.lost}`);
    set(row.node, "class", `${one.kind === "P-heavy" ? "p" : "d"} ${state}`);
    write(row.button, one.draining ? "Resume" : "Drain");
    set(row.button, "aria-label", `${one.draining ? "Resume" : "Drain"} ${one.name}`);
    row.button.disabled = !one.alive;
  }

  rates(row, one) {
    const [at, before] = [this.model.at, row.before];
    row.before = { at, taken: one.prefill_tokens, made: one.output_tokens, said: before?.said ?? ["–", "–"] };
    if (before === null) return row.before.said;
    if (at - before.at < 0.5) {
      row.before = before;
      return before.said;
    }
    const rate = (now, then) => count(Math.max(0, now - then) / (at - before.at));
    row.before.said = [rate(one.prefill_tokens, before.taken), rate(one.output_tokens, before.made)];
    return row.before.said;
  }

  async act(name) {
    const one = this.model.instances.get(name);
    const deed = one.draining ? "resume" : "drain";
    const what = one.draining ? ["takes requests", "no", "yes"] : ["takes requests", "yes", "no: what runs there moves away"];
    if (!(await confirm(`${one.draining ? "Resume" : "Drain"} ${name}?`, [what], one.draining ? "Resume" : "Drain"))) return;
    const answer = await call("POST", `instances/${encodeURIComponent(name)}/${deed}`);
    if (!answer.ok) Object.assign(this.rows.get(name), { wrong: answer.why, until: Date.now() + TOLD });
    this.draw();
  }
}
