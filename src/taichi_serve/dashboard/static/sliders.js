// The three sliders. They are moved here, confirmed, and shown as asked until every instance is what they say.

import { confirm } from "./confirm.js";
import { $, html, write } from "./element.js";
import { call } from "./key.js";
import { count } from "./words.js";

const CHUNKS = ["p_chunk", "d_chunk"];
const STEP = 16; // prompt tokens

const ratio = (sliders) => `${sliders.p_heavy} : ${sliders.d_heavy}`;

export class Sliders {
  constructor(model) {
    this.model = model;
    this.asked = null; // the sliders that were asked for and are not in force yet
    this.ratio = html("input", { id: "ratio", type: "range", min: 0, max: 1, step: 1 });
    this.said = html("output", { for: "ratio" });
    this.chunks = new Map(CHUNKS.map((name) => [name, this.pair(name)]));
    this.button = html("button", { class: "main", disabled: "" }, "Move sliders…");
    this.back = html("button", { type: "button", disabled: "" }, "Reset");
    this.status = html("p", { id: "sliders-status", role: "status" });
    const first = this.line("P-heavy : D-heavy instances", "ratio", this.ratio, this.said);
    const lines = CHUNKS.map((name) => {
      const { range, number } = this.chunks.get(name);
      const text = name === "p_chunk" ? "P-heavy chunk, prompt tokens a step" : "D-heavy chunk, prompt tokens a step";
      return this.line(text, range.id, range, number);
    });
    $("sliders").append(first, ...lines, html("div", { class: "buttons" }, this.back, this.button), this.status);
    this.ratio.addEventListener("input", () => this.touched());
    this.back.addEventListener("click", () => this.reset());
    $("sliders").addEventListener("submit", (event) => this.submit(event));
  }

  pair(name) {
    const range = html("input", { id: name, type: "range", min: 0, max: 1024, step: STEP });
    const number = html("input", { type: "number", min: 0, max: 1024, "aria-label": `${name.replace("_", "-")}, tokens` });
    range.addEventListener("input", () => {
      number.value = range.value;
      this.touched();
    });
    number.addEventListener("input", () => {
      range.value = number.value;
      this.touched();
    });
    return { range, number };
  }

  line(text, id, ...controls) {
    return html("div", { class: "slider" }, html("label", { for: id }, text), ...controls);
  }

  get now() {
    const { p_heavy, d_heavy, p_chunk, d_chunk } = this.model.standing;
    return { p_heavy, d_heavy, p_chunk, d_chunk };
  }

  get wanted() {
    const p_heavy = Number(this.ratio.value);
    const chunk = (name) => Number(this.chunks.get(name).number.value);
    return { p_heavy, d_heavy: this.model.instances.size - p_heavy, p_chunk: chunk("p_chunk"), d_chunk: chunk("d_chunk") };
  }

  get changed() {
    const [now, wanted] = [this.now, this.wanted];
    return Object.keys(now).filter((name) => now[name] !== wanted[name]);
  }

  show(change) {
    if (change.standing === null && !change.instances.length) return;
    const standing = this.model.standing;
    this.ratio.max = this.model.instances.size;
    for (const { range, number } of this.chunks.values()) range.max = number.max = standing.max_chunk;
    const said = { on: "they also set themselves (--autotune on)", suggest: "the server suggests (--autotune suggest)", off: "" };
    write($("autotune"), said[standing.autotune]);
    if (!this.mine) this.reset();
    if (this.asked) this.follow();
  }

  // Until somebody moves one they follow what is in force.
  reset() {
    this.mine = false;
    const now = this.now;
    this.ratio.value = now.p_heavy;
    for (const [name, { range, number }] of this.chunks) range.value = number.value = now[name];
    write(this.said, ratio(now));
    this.button.disabled = this.back.disabled = true;
  }

  touched() {
    this.mine = true;
    write(this.said, ratio(this.wanted));
    this.button.disabled = this.changed.length === 0;
    this.back.disabled = false;
  }

  async submit(event) {
    event.preventDefault();
    const [now, wanted, changed] = [this.now, this.wanted, this.changed];
    const rows = CHUNKS.filter((name) => changed.includes(name)).map((name) => [
      name === "p_chunk" ? "P-heavy chunk" : "D-heavy chunk",
      count(now[name]),
      count(wanted[name]),
    ]);
    if (changed.includes("p_heavy")) rows.unshift(["P-heavy : D-heavy", ratio(now), ratio(wanted)]);
    if (!rows.length || !(await confirm("Move the sliders while it serves?", rows, "Move sliders"))) return;
    this.say("asked …");
    const answer = await call("PATCH", "sliders", Object.fromEntries(changed.map((name) => [name, wanted[name]])));
    if (!answer.ok) return this.say(answer.why, "bad");
    this.asked = answer.said;
    this.mine = false;
    this.follow();
  }

  follow() {
    const all = [...this.model.instances.values()].filter((one) => one.alive);
    const chunk = { "P-heavy": this.asked.p_chunk, "D-heavy": this.asked.d_chunk };
    const heavy = all.filter((one) => one.kind === "P-heavy").length;
    const there = Object.keys(this.asked).every((name) => this.now[name] === this.asked[name]);
    const late = all.filter((one) => one.chunk !== chunk[one.kind]);
    if (there && !late.length && (heavy === this.asked.p_heavy || all.length < this.model.instances.size)) {
      this.say(`in force since ${new Date().toLocaleTimeString()}`, "good");
      this.asked = null;
      this.reset();
    } else this.say(late.length ? `asked; ${late.map((one) => one.name).join(", ")} still to follow` : "asked …");
  }

  say(text, tone = "") {
    write(this.status, text);
    this.status.className = tone;
  }
}
