// Attainment as figures: the shares of the last minute and the last ten, and how it went over these ten minutes.

import { $, html, svg, write } from "./element.js";
import { percent, time } from "./words.js";

const WINDOWS = ["minute", "ten_minutes"];
const STRETCH = 10; // seconds of one bar
const [WIDTH, HEIGHT] = [340, 52];

export class Shares {
  constructor(model) {
    this.model = model;
    this.cells = new Map();
    const rows = ["both", "ttft", "tpot", "requests"].map((name) => this.row(name));
    const names = ["", "last minute", "last ten"].map((text) => html("th", { scope: "col" }, text));
    $("shares").append(html("table", { class: "shares" }, html("thead", {}, html("tr", {}, ...names)), html("tbody", {}, ...rows)));
    this.bars = svg("g");
    this.marks = svg("g");
    const label = "Share of good requests, every ten seconds of the last ten minutes; marks where sliders or SLOs changed";
    this.node = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + 17}`, role: "img", "aria-label": label });
    const ends = [svg("text", { x: 0, y: HEIGHT + 12 }, "10 min ago"), svg("text", { x: WIDTH, y: HEIGHT + 12, "text-anchor": "end" }, "now")];
    this.node.append(svg("line", { class: "rule", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), this.bars, this.marks, ...ends);
    $("history").append(this.node);
  }

  row(name) {
    const head = html("th", { scope: "row" }, { both: "both SLOs", requests: "requests ended" }[name] ?? "");
    const cells = WINDOWS.map((window) => html("td", { class: name, "data-share": `${name} ${window}` }, "–"));
    this.cells.set(name, [head, ...cells]);
    return html("tr", { class: name }, head, ...cells);
  }

  show(change) {
    const standing = change.standing;
    if (standing === null) return;
    write(this.cells.get("ttft")[0], `TTFT ≤ ${time(standing.ttft)}`);
    write(this.cells.get("tpot")[0], `TPOT ≤ ${time(standing.tpot)}`);
    WINDOWS.forEach((window, number) => {
      const [requests, both, ttft, tpot] = standing.windows[window];
      for (const [name, share] of Object.entries({ both, ttft, tpot })) {
        const cell = this.cells.get(name)[number + 1];
        write(cell, percent(share));
        cell.classList.toggle("bad", share !== null && share < 0.9);
      }
      write(this.cells.get("requests")[number + 1], String(requests));
    });
    this.draw(standing.history);
  }

  draw(history) {
    const step = WIDTH / history.length;
    const bars = history.flatMap(([requests, good], number) => {
      if (!requests) return [];
      const [x, width, up] = [number * step + 0.5, step - 1, (HEIGHT - 4) * (good / requests)];
      const missed = svg("rect", { class: "missed", x, width, y: 4, height: HEIGHT - 4 - up });
      return [missed, svg("rect", { class: "kept", x, width, y: HEIGHT - up, height: up })];
    });
    this.bars.replaceChildren(...bars);
    const span = history.length * STRETCH;
    const marks = this.model.notes.filter((note) => note.mark && this.model.at - note.at < span);
    this.marks.replaceChildren(
      ...marks.map((note) => {
        const x = WIDTH * (1 - (this.model.at - note.at) / span);
        return svg("line", { class: "change", x1: x, x2: x, y1: 0, y2: HEIGHT }, svg("title", {}, note.text));
      }),
    );
  }
}
