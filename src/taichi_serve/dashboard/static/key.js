// The API key: asked for when the server wants one, kept for this tab only, sent as a header and never in a URL.

import { $, write } from "./element.js";

const PLACE = "taichi-key";
let asking = null;

export function headers() {
  const key = sessionStorage.getItem(PLACE);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Comes back when there is another key to try.
export function askForKey() {
  asking ??= new Promise((done) => {
    write($("key-wrong"), sessionStorage.getItem(PLACE) ? "That key is not the one." : "");
    $("key").showModal();
    $("key").addEventListener("cancel", stay);
    $("key").firstElementChild.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        sessionStorage.setItem(PLACE, $("key-word").value);
        $("key-word").value = "";
        $("key").removeEventListener("cancel", stay);
        $("key").close();
        asking = null;
        done();
      },
      { once: true },
    );
  });
  return asking;
}

// Without a key there is nothing behind the dialog to go back to.
const stay = (event) => event.preventDefault();

// An answer of the server: whether it was yes, and what it said. With the wrong key it is asked again.
export async function call(method, path, body) {
  for (;;) {
    const sent = body === undefined ? {} : { body: JSON.stringify(body) };
    const type = body === undefined ? {} : { "Content-Type": "application/json" };
    try {
      const answer = await fetch(path, { method, headers: { ...headers(), ...type }, cache: "no-store", ...sent });
      if (answer.status === 401) {
        await askForKey();
        continue;
      }
      const said = await answer.json().catch(() => ({}));
      return { ok: answer.ok, said, why: said?.error?.message ?? `HTTP ${answer.status}` };
    } catch (wrong) {
      return { ok: false, said: {}, why: `no answer: ${wrong.message}` };
    }
  }
}
