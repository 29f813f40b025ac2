// The traces of moves: a curve from where a request was to where it is, with its kind, which fades.

import { svg } from "./element.js";
import { bend, curve } from "./motion.js";

const STAYS = 1800; // ms
const MOST = 48;
const APART = 900; // ms between two labels of one kind: more would cover each other

export class Trails {
  constructor(layer) {
    this.layer = layer;
    this.said = new Map();
  }

  draw(move, from, to, kind) {
    const trail = svg("g", { class: `trail ${kind}`, "data-move": move }, svg("path", { d: curve(from, to) }));
    const now = performance.now();
    if (now - (this.said.get(move) ?? -APART) >= APART) {
      this.said.set(move, now);
      const by = bend(from, to);
      const [x, y] = [(from.x + to.x + 2 * by.x) / 4, (from.y + to.y + 2 * by.y) / 4];
      trail.append(svg("text", { x, y, "text-anchor": "middle" }, move));
    }
    this.layer.append(trail);
    if (this.layer.childElementCount > MOST) this.layer.firstElementChild.remove();
    setTimeout(() => trail.remove(), STAYS);
  }
}
