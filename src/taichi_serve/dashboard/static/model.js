// What the page knows of the system: the updates so far, put together. Rows are those of dashboard/rows.py.

const REMEMBERED = 300; // seconds of the scatter
const POINTS = 1200;
const LOGGED = 60;

export function request(row) {
  const [id, state, instance, target, move, prompt, most, base, joined, arrived, first] = row;
  return { id, state, instance, target, move, prompt, most, base, joined, arrived, first };
}

export function hop(row) {
  const [at, id, move, source, target, kv, gap] = row;
  return { at, id, move, source, target, kv, gap };
}

export class Model {
  constructor() {
    this.forget();
  }

  forget() {
    this.at = 0;
    this.standing = null;
    this.instances = new Map();
    this.requests = new Map();
    this.points = [];
    this.notes = [];
    this.hops = [];
  }

  // Gives what changed, in the same form as the model: { whole, standing, instances, requests, gone, hops, points, notes }.
  apply(update) {
    const whole = update.whole ?? false;
    const hops = whole && this.at <= update.at ? this.hops : []; // of the same server: it was only a break
    if (whole) {
      this.forget();
      this.hops = hops;
    }
    this.at = update.at;
    this.standing = update.standing ?? this.standing;
    const change = { whole, standing: update.standing ?? null, gone: update.gone ?? [] };
    change.instances = update.instances ?? [];
    change.requests = (update.requests ?? []).map(request);
    change.hops = (update.hops ?? []).map(hop);
    change.points = update.points ?? [];
    change.notes = update.notes ?? [];
    for (const name of update.left ?? []) this.instances.delete(name);
    for (const instance of change.instances) this.instances.set(instance.name, instance);
    for (const one of change.requests) this.requests.set(one.id, one);
    for (const id of change.gone) this.requests.delete(id);
    this.hops = [...this.hops, ...change.hops].slice(-LOGGED);
    this.notes = [...this.notes, ...change.notes].slice(-LOGGED);
    this.points.push(...change.points);
    const old = this.points.findIndex(([at]) => at >= this.at - REMEMBERED);
    this.points = old < 0 ? [] : this.points.slice(Math.max(old, this.points.length - POINTS));
    return change;
  }

  kind(name) {
    return this.instances.get(name)?.kind ?? "D-heavy";
  }

  // Output tokens so far: a resident decode gets one in every step of its instance.
  output(one) {
    const here = this.instances.get(one.instance);
    const more = one.state === "decoding" && here ? here.ticks - one.joined : 0;
    return one.first === null ? 0 : one.base + more;
  }
}
