// The page: one stream of updates, one model, and the views of it.

import { Board } from "./board.js";
import { $, set, write } from "./element.js";
import { Logs } from "./logs.js";
import { Model } from "./model.js";
import { Scatter } from "./scatter.js";
import { Shares } from "./shares.js";
import { Sliders } from "./sliders.js";
import { Story } from "./story.js";
import { Stream } from "./stream.js";
import { Table } from "./table.js";
import { time } from "./words.js";

const LINKS = {
  live: "live",
  connecting: "connecting",
  asleep: "paused",
  lost: "no connection, trying again",
  over: "the server is ending",
};

const model = new Model();
const story = new Story(model);
const tell = (id) => story.open(id);
const views = [new Board(model, tell), new Shares(model), new Scatter(model), new Sliders(model), new Table(model), new Logs(model, tell), story];

function link(how) {
  set($("link"), "data-link", how);
  write($("link"), LINKS[how]);
  set(document.body, "class", how === "live" ? "" : "stale");
}

function hear(update) {
  const change = model.apply(update);
  if (change.standing) write($("promise"), `TTFT ≤ ${time(change.standing.ttft)} · TPOT ≤ ${time(change.standing.tpot)}`);
  for (const view of views) view.show(change);
}

new Stream(hear, link).run();
