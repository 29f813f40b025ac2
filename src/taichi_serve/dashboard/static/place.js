// One instance on the board: its name and kind, how full it is, what waits and what runs, and whether it is well.

import { set, svg, write } from "./element.js";
import { count } from "./words.js";

export function condition(one) {
  if (!one.alive) {
    if (one.standing === "out") return ["out", "lost, stays out"];
    return ["lost", one.back_in === null ? "lost" : `lost, back in ${Math.ceil(one.back_in)} s`];
  }
  if (one.silent) return ["silent", "does not answer"];
  return one.draining ? ["drained", "drained"] : ["up", ""];
}

export class Place {
  constructor(name) {
    this.frame = svg("rect", { class: "frame", rx: 10 });
    this.title = svg("text", { class: "name" }, name);
    this.state = svg("text", { class: "state", "text-anchor": "end" });
    this.chunk = svg("text", { class: "quiet" });
    this.figures = svg("text", { class: "quiet", "text-anchor": "end" });
    this.rule = svg("line", { class: "rule" });
    this.track = svg("rect", { class: "track", height: 4, rx: 2 });
    this.bar = svg("rect", { class: "bar", height: 4, rx: 2 });
    this.mark = svg("line", { class: "mark" });
    this.kv = svg("text", { class: "quiet" });
    const parts = [this.frame, this.rule, this.track, this.bar, this.mark];
    this.node = svg("g", { "data-instance": name }, ...parts, this.title, this.state, this.chunk, this.figures, this.kv);
  }

  arrange(box, watermark) {
    this.box = box;
    const { x, y, w, h } = box;
    const [left, right, bottom] = [x + 10, x + w - 10, y + h - 9];
    for (const [name, value] of Object.entries({ x, y, width: w, height: h })) set(this.frame, name, value);
    for (const [node, at, down] of [
      [this.title, left, 19],
      [this.state, right, 19],
      [this.chunk, left, 36],
      [this.figures, right, 36],
    ]) {
      set(node, "x", at);
      set(node, "y", y + down);
    }
    for (const [name, value] of Object.entries({ x1: left, x2: right, y1: y + 70, y2: y + 70 })) set(this.rule, name, value);
    set(this.kv, "x", left);
    set(this.kv, "y", y + h - 13);
    for (const node of [this.track, this.bar]) {
      set(node, "x", left);
      set(node, "y", bottom);
    }
    set(this.track, "width", w - 20);
    const at = left + (w - 20) * Math.min(1, watermark);
    for (const [name, value] of Object.entries({ x1: at, x2: at, y1: bottom - 3, y2: bottom + 7 })) set(this.mark, name, value);
  }

  show(one) {
    const [state, words] = condition(one);
    const share = one.kv_capacity ? one.kv_tokens / one.kv_capacity : 0;
    set(this.node, "class", `place ${one.kind === "P-heavy" ? "p" : "d"} ${state}`);
    write(this.state, words || `${one.kind}`);
    write(this.chunk, `chunk ${count(one.chunk)}`);
    const queue = one.queued_prefill_tokens ? `${count(one.queued_prefill_tokens)} tokens queued` : "no prompt waits";
    write(this.figures, this.box.w < 200 ? `${one.waiting} wait` : queue);
    write(this.kv, `KV ${Math.round(share * 100)} %${this.box.w < 150 ? "" : ` · ${one.running} running`}`);
    set(this.bar, "width", Math.max(0, Math.min(1, share) * (this.box.w - 20)).toFixed(1));
  }
}
