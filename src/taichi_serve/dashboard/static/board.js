// The board: instances, the requests on them, and their moves as they happen. One tab stop; arrow keys choose a
// request, Enter tells its story.

import { $, html, svg, write } from "./element.js";
import { Dots } from "./dots.js";
import { lay } from "./layout.js";
import { Place } from "./place.js";
import { Trails } from "./trails.js";
import { ago, count, short } from "./words.js";

const FIGURES = 250; // ms between two looks at figures: dots move at once, numbers would flicker
const KINDS = ["hand-over", "degrade", "backflow", "operator", "drain", "rescue", "fetch"];
const LABEL = "Live requests by instance. Arrow keys choose one, Enter tells its story.";

export class Board {
  constructor(model, tell) {
    this.model = model;
    this.tell = tell; // story of a request
    this.hint = $("caption").textContent;
    this.places = new Map();
    this.shape = "";
    this.layers = Object.fromEntries(["places", "trails", "ground", "air"].map((name) => [name, svg("g", { class: name })]));
    this.node = svg("svg", { tabindex: 0, role: "application", "aria-label": LABEL, "aria-describedby": "caption" });
    this.node.append(...Object.values(this.layers));
    $("board").append(this.node);
    this.trails = new Trails(this.layers.trails);
    this.dots = new Dots(this.layers.ground, this.layers.air, this.trails);
    this.counts = new Map(KINDS.map((kind) => [kind, html("b", {}, "0")]));
    for (const [kind, node] of this.counts) $("counts").append(html("li", { "data-count": kind }, `${kind} `, node));
    this.node.addEventListener("click", (event) => this.click(event));
    this.node.addEventListener("pointermove", (event) => this.point(event));
    this.node.addEventListener("keydown", (event) => this.press(event));
    this.node.addEventListener("blur", () => this.choose(null));
    new ResizeObserver(() => this.arrange(true)).observe($("board"));
    setInterval(() => this.figures(), FIGURES);
  }

  show(change) {
    if (change.whole) this.dots.clear();
    this.arrange(false);
    const hops = new Map(change.hops.map((one) => [one.id, one]));
    for (const one of change.requests) {
      const hop = hops.get(one.id);
      this.dots.show(one, hop && hop.move !== "fetch" ? hop : null, change.whole);
    }
    for (const one of change.hops) if (one.move === "fetch") this.fetch(one);
    for (const id of change.gone) this.dots.remove(id);
    if (this.chosen && !this.model.requests.has(this.chosen.id)) this.choose(null);
  }

  // A prefix is copied: nothing leaves its place.
  fetch({ source, target }) {
    const [from, to] = [this.dots.boxes.get(source), this.dots.boxes.get(target)];
    if (from && to) this.trails.draw("fetch", from.middle, { x: to.middle.x, y: to.queue.y + 11 }, "fetch");
  }

  arrange(resized) {
    const instances = [...this.model.instances.values()];
    const shape = instances.map((one) => one.name + one.kind).join();
    if (shape === this.shape && !resized) return;
    this.shape = shape;
    const width = $("board").clientWidth || 320;
    const layout = lay(instances, width);
    this.node.setAttribute("viewBox", `0 0 ${width} ${layout.height}`);
    this.node.setAttribute("height", layout.height);
    for (const [name, box] of layout.boxes) {
      if (!this.places.has(name)) {
        this.places.set(name, new Place(name));
        this.layers.places.append(this.places.get(name).node);
      }
      this.places.get(name).arrange(box, this.model.standing?.watermark ?? 1);
    }
    for (const [name, place] of this.places) if (!layout.boxes.has(name)) this.drop(name, place);
    this.dots.arrange(layout);
    this.figures();
  }

  drop(name, place) {
    place.node.remove();
    this.places.delete(name);
  }

  figures() {
    for (const one of this.model.instances.values()) this.places.get(one.name)?.show(one);
    const { standing, requests } = this.model;
    if (standing === null) return;
    write($("live"), `${count(requests.size)} live, ${count(standing.accepted)} in all`);
    for (const [kind, node] of this.counts) {
      const now = count(standing.moves[kind] ?? 0);
      if (node.textContent === now) continue;
      write(node, now);
      node.parentNode.classList.add("moved");
      setTimeout(() => node.parentNode.classList.remove("moved"), 900);
    }
    if (this.chosen) this.caption(this.chosen);
  }

  at(event) {
    const to = this.node.getScreenCTM();
    return to && this.dots.near((event.clientX - to.e) / to.a, (event.clientY - to.f) / to.d);
  }

  click(event) {
    const dot = this.at(event);
    if (dot) this.tell(dot.id);
  }

  point(event) {
    const at = `${event.clientX} ${event.clientY}`;
    if (at === this.pointed) return; // the page moved below the pointer: whoever uses the keyboard keeps their choice
    this.pointed = at;
    const dot = this.at(event);
    this.node.style.cursor = dot ? "pointer" : "";
    if (dot !== (this.chosen ?? null)) this.choose(dot);
  }

  press(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" && this.chosen) {
      event.preventDefault(); // else the same stroke presses the button that has the focus next
      this.tell(this.chosen.id);
    } else if (event.key === "Escape") this.choose(null);
    else if (step) {
      const dots = this.dots.inOrder;
      const here = dots.indexOf(this.chosen);
      this.choose(dots[(here < 0 ? (step > 0 ? 0 : dots.length - 1) : here + step + dots.length) % dots.length] ?? null);
      event.preventDefault();
    }
  }

  choose(dot) {
    if (this.chosen) this.chosen.chosen = false;
    if (this.chosen?.zone) this.dots.dress(this.chosen);
    this.chosen = dot;
    if (dot) {
      dot.chosen = true;
      this.dots.dress(dot);
      this.caption(dot);
    } else write($("caption"), this.hint);
  }

  caption({ request }) {
    const where = request.state === "moving" ? `${request.move} to ${request.target}` : `${request.state} on ${request.instance}`;
    const age = ago(this.model.at - request.arrived);
    const tokens = `${count(request.prompt)} prompt tokens, ${count(this.model.output(request))} of at most ${count(request.most)} out`;
    write($("caption"), `${short(request.id)} · ${request.instance === null ? request.state : where} · ${tokens} · ${age}`);
  }
}
