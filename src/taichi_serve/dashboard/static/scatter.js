// TTFT against TPOT of the requests that ended in the last five minutes, and the box in which both SLOs are kept.
// Both axes are logarithmic: a fast machine and a slow one both fill the picture.

import { $, svg, write } from "./element.js";
import { count, time } from "./words.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [340, 230, 44, 30, 8];
const [BELOW, ABOVE] = [200, 4]; // an axis goes from the SLO over BELOW to the SLO times ABOVE
const REDRAWN = 500; // ms

const axis = (slo, from, to) => (value) => {
  const share = Math.log(Math.max(value, 1e-9) / (slo / BELOW)) / Math.log(BELOW * ABOVE);
  return from + (to - from) * Math.min(1, Math.max(0, share));
};

function decades(slo) {
  const found = [];
  for (let power = Math.ceil(Math.log10(slo / BELOW)); 10 ** power <= slo * ABOVE; power += 1) found.push(10 ** power);
  return found;
}

export class Scatter {
  constructor(model) {
    this.model = model;
    this.axes = svg("g");
    this.points = svg("g");
    const label = "TTFT and TPOT of the last requests, with the box of the SLO";
    this.node = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, this.axes, this.points);
    $("scatter").append(this.node);
    this.stale = false;
    setInterval(() => this.stale && this.draw(), REDRAWN);
  }

  show(change) {
    this.stale ||= change.whole || change.points.length > 0 || change.standing !== null;
  }

  draw() {
    const standing = this.model.standing;
    if (standing === null) return;
    this.stale = false;
    const x = axis(standing.ttft, LEFT, WIDTH - 6);
    const y = axis(standing.tpot, HEIGHT - BOTTOM, TOP);
    const promise = `${standing.ttft} ${standing.tpot}`;
    if (promise !== this.promise) this.frame(standing, x, y);
    this.promise = promise;
    const dots = this.model.points.map(([at, ttft, tpot, good]) => {
      const old = this.model.at - at > 60 ? " old" : "";
      return svg("circle", { class: `${good ? "kept" : "missed"}${old}`, cx: x(ttft).toFixed(1), cy: y(tpot).toFixed(1), r: 2.4 });
    });
    this.points.replaceChildren(...dots);
    const kept = this.model.points.filter((point) => point[3]).length;
    write($("times-note"), dots.length ? `${count(kept)} of ${count(dots.length)} in the box, last 5 min` : "nothing ended yet");
  }

  frame({ ttft, tpot }, x, y) {
    const [right, top, floor] = [x(ttft), y(tpot), HEIGHT - BOTTOM];
    const box = svg("rect", { class: "box", x: LEFT, y: top, width: right - LEFT, height: floor - top });
    const across = decades(ttft).map((value) => [
      svg("line", { class: "grid", x1: x(value), x2: x(value), y1: TOP, y2: floor }),
      svg("text", { x: x(value), y: floor + 13, "text-anchor": "middle" }, time(value)),
    ]);
    const up = decades(tpot).map((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 6, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, time(value)),
    ]);
    const names = [
      svg("text", { class: "name", x: WIDTH - 6, y: HEIGHT - 4, "text-anchor": "end" }, "TTFT"),
      svg("text", { class: "name", x: LEFT + 5, y: TOP + 10 }, "TPOT"),
    ];
    this.axes.replaceChildren(box, ...across.flat(), ...up.flat(), ...names);
  }
}
