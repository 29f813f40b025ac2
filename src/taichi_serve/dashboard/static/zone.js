// One place where dots gather: the queue of an instance, those that decode on it, or the pool of those that wait.
// A dot keeps its slot for as long as it is here, so that it can be followed with the eye.

import { cell, pitch } from "./layout.js";

export class Zone {
  constructor(rect) {
    this.rect = rect;
    this.slots = [];
    this.pitch = pitch(rect, 0);
  }

  // Says whether dots had to move closer together, or may spread again.
  enter(dot) {
    const free = this.slots.indexOf(null);
    dot.slot = free < 0 ? this.slots.length : free;
    this.slots[dot.slot] = dot;
    dot.zone = this;
    return this.fit();
  }

  leave(dot) {
    this.slots[dot.slot] = null;
    dot.zone = null;
    while (this.slots.length && this.slots.at(-1) === null) this.slots.pop();
    return this.fit();
  }

  fit() {
    const before = this.pitch;
    this.pitch = pitch(this.rect, this.slots.length);
    return this.pitch !== before;
  }

  get radius() {
    return Math.max(1.2, this.pitch * 0.36);
  }

  place(dot) {
    return cell(this.rect, this.pitch, dot.slot);
  }

  get dots() {
    return this.slots.filter((dot) => dot !== null);
  }
}
