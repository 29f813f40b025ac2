// Things that fly: one loop for all of them, which rests while nothing does. Who wants less motion gets none.

const less = matchMedia("(prefers-reduced-motion: reduce)");
const MOST = 160; // at once; beyond that nobody could follow any

const ease = (t) => (t < 0.5 ? 4 * t * t * t : 1 - (2 - 2 * t) ** 3 / 2);

// The point that a curve from here to there bends towards: downwards to the right, upwards to the left.
export function bend(from, to) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  return { x: (from.x + to.x) / 2 + dy * 0.22, y: (from.y + to.y) / 2 - dx * 0.22 };
}

export function curve(from, to) {
  const by = bend(from, to);
  return `M${from.x} ${from.y}Q${by.x} ${by.y} ${to.x} ${to.y}`;
}

function along(flight, t) {
  const { from, to, by } = flight;
  const [a, b, c] = [(1 - t) ** 2, 2 * t * (1 - t), t * t];
  return { x: a * from.x + b * by.x + c * to.x, y: a * from.y + b * by.y + c * to.y };
}

export class Motion {
  constructor() {
    this.flights = new Map();
    this.loop = (now) => this.step(now);
  }

  // put(point) is called on the way, landed() at the end. Another flight under the same name takes over.
  fly(name, from, to, ms, put, landed = () => {}) {
    if (less.matches || document.hidden || this.flights.size >= MOST) {
      this.flights.delete(name);
      put(to);
      landed();
      return;
    }
    const idle = this.flights.size === 0;
    this.flights.set(name, { from, to, by: bend(from, to), begun: performance.now(), ms, put, landed });
    if (idle) requestAnimationFrame(this.loop);
  }

  stop(name) {
    this.flights.delete(name);
  }

  flies(name) {
    return this.flights.has(name);
  }

  step(now) {
    for (const [name, flight] of this.flights) {
      const t = Math.min(1, Math.max(0, (now - flight.begun) / flight.ms));
      flight.put(along(flight, ease(t)));
      if (t === 1) {
        this.flights.delete(name);
        flight.landed();
      }
    }
    if (this.flights.size) requestAnimationFrame(this.loop);
  }
}
