// Server-sent events over fetch, which can send a key as a header; EventSource cannot. It comes back by itself, and
// leaves while nobody sees the page.

import { askForKey, headers } from "./key.js";

const SILENT = 12000; // ms; the server says at least every five seconds that it lives
const SOON = 250;
const LATER = 3000;

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

const seen = () =>
  new Promise((done) => {
    if (!document.hidden) return done();
    document.addEventListener("visibilitychange", done, { once: true });
  });

export class Stream {
  // hear(update) gets every update, tell(link) how it stands: live, asleep, connecting or lost.
  constructor(hear, tell) {
    this.hear = hear;
    this.tell = tell;
    this.hidden = () => document.hidden && this.abort?.abort();
    document.addEventListener("visibilitychange", this.hidden);
  }

  async run() {
    let pause = SOON;
    for (;;) {
      await seen();
      try {
        await this.once();
        pause = SOON;
      } catch {
        this.tell(document.hidden ? "asleep" : "lost");
      }
      await wait(pause);
      pause = Math.min(LATER, pause * 1.6);
    }
  }

  async once() {
    this.abort = new AbortController();
    const answer = await fetch("events", { headers: headers(), signal: this.abort.signal, cache: "no-store" });
    if (answer.status === 401) return askForKey();
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    this.tell("live");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const late = setTimeout(() => this.abort.abort(), SILENT);
      const { value, done } = await reader.read().finally(() => clearTimeout(late));
      if (done) throw new Error("the server has ended the stream");
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) this.take(event);
    }
  }

  take(event) {
    if (event.startsWith("event: over")) this.tell("over");
    else if (event.startsWith("data: ")) this.hear(JSON.parse(event.slice(6)));
  }
}
