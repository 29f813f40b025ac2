// Every live request as a dot: hollow while its prompt waits or is computed, full while it decodes. It flies to where
// its decode goes, and what is on its way while it still runs at its source has a ring.

import { svg } from "./element.js";
import { Motion } from "./motion.js";
import { Zone } from "./zone.js";

const ARRIVES = 350; // ms
const MOVES = 750;
const FADES = 400;
const REACH = 14; // pixels around a dot that count as on it

const accent = (kind) => (kind === "P-heavy" ? "p" : "d");

export class Dots {
  constructor(ground, air, trails) {
    this.ground = ground;
    this.air = air;
    this.trails = trails;
    this.motion = new Motion();
    this.dots = new Map();
    this.zones = new Map();
    this.pool = new Zone({ x: 0, y: 0, w: 1, h: 1 });
    this.boxes = new Map();
  }

  // The board has another shape: everything takes its place again, at once.
  arrange(layout) {
    this.boxes = layout.boxes;
    this.pool.rect = layout.pool;
    for (const [name, box] of layout.boxes) {
      for (const part of ["queue", "running"]) {
        const zone = this.zones.get(`${name} ${part}`) ?? new Zone(box[part]);
        zone.rect = box[part];
        this.zones.set(`${name} ${part}`, zone);
      }
    }
    for (const zone of [this.pool, ...this.zones.values()]) {
      zone.fit();
      this.settle(zone);
    }
  }

  clear() {
    for (const dot of this.dots.values()) {
      this.motion.stop(dot.id);
      dot.node.remove();
    }
    this.dots.clear();
    for (const zone of [this.pool, ...this.zones.values()]) zone.slots = [];
  }

  // Where a request belongs. One that is moving is still where it was, until its first token elsewhere.
  zoneOf(one) {
    if (one.instance === null) return this.pool;
    const part = one.state === "decoding" || (one.state === "moving" && one.first !== null) ? "running" : "queue";
    return this.zones.get(`${one.instance} ${part}`) ?? this.pool;
  }

  show(one, hop, at_once) {
    let dot = this.dots.get(one.id);
    const fresh = dot === undefined;
    if (fresh) {
      dot = { id: one.id, node: svg("circle", { r: 3 }), zone: null, slot: 0, x: 0, y: 0 };
      this.dots.set(one.id, dot);
      this.ground.append(dot.node);
    }
    dot.request = one;
    const zone = this.zoneOf(one);
    const from = fresh ? this.mouth(zone) : { x: dot.x, y: dot.y };
    if (zone !== dot.zone) {
      const before = dot.zone;
      if (before?.leave(dot)) this.settle(before);
      if (zone.enter(dot)) this.settle(zone, dot);
      this.travel(dot, from, hop, at_once, fresh);
    }
    this.dress(dot);
  }

  mouth(zone) {
    return { x: zone.rect.x + zone.rect.w / 2, y: this.pool.rect.y };
  }

  travel(dot, from, hop, at_once, fresh) {
    const to = dot.zone.place(dot);
    if (at_once) return this.put(dot, to);
    if (hop) this.trails.draw(hop.move, from, to, accent(this.boxes.get(dot.request.instance)?.kind));
    const far = hop || Math.hypot(to.x - from.x, to.y - from.y) > 120;
    if (hop) this.air.append(dot.node);
    this.motion.fly(dot.id, from, to, fresh || !far ? ARRIVES : MOVES, (point) => this.put(dot, point), () => {
      this.ground.append(dot.node);
      this.dress(dot);
    });
  }

  put(dot, point) {
    dot.x = point.x;
    dot.y = point.y;
    dot.node.setAttribute("cx", point.x.toFixed(1));
    dot.node.setAttribute("cy", point.y.toFixed(1));
  }

  dress(dot) {
    const { state, instance } = dot.request;
    const kind = accent(this.boxes.get(instance)?.kind);
    const flying = this.motion.flies(dot.id) && dot.node.parentNode === this.air;
    const form = state === "waiting" || state === "prefilling" ? "ring" : state === "moving" ? "leaving" : "full";
    dot.node.setAttribute("class", `dot ${kind} ${form}${dot.chosen ? " chosen" : ""}`);
    dot.node.setAttribute("r", flying ? 4.5 : dot.zone.radius.toFixed(2));
  }

  // Everything of a zone that does not fly goes to its slot.
  settle(zone, but = null) {
    for (const dot of zone.dots) {
      if (dot === but) continue;
      this.motion.stop(dot.id);
      this.put(dot, zone.place(dot));
      this.dress(dot);
    }
  }

  remove(id) {
    const dot = this.dots.get(id);
    if (dot === undefined) return;
    this.dots.delete(id);
    this.motion.stop(id);
    const zone = dot.zone;
    if (zone.leave(dot)) this.settle(zone);
    dot.node.classList.add("gone");
    setTimeout(() => dot.node.remove(), FADES);
  }

  // The dot next to this point, if one is near.
  near(x, y) {
    let [found, least] = [null, REACH];
    for (const dot of this.dots.values()) {
      const far = Math.hypot(dot.x - x, dot.y - y);
      if (far < least) [found, least] = [dot, far];
    }
    return found;
  }

  // All dots in the order in which a reader goes: box by box, the queue first.
  get inOrder() {
    return [this.pool, ...this.zones.values()].flatMap((zone) => zone.dots);
  }
}
