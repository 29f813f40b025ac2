// A question before anything is changed in a system that serves.

import { $, html, write } from "./element.js";

// rows: [what, now, then]. True where the answer is yes.
export function confirm(title, rows, deed) {
  const dialog = $("confirm");
  const form = dialog.firstElementChild;
  write($("confirm-title"), title);
  const lines = rows.map(([what, now, then]) =>
    html("tr", {}, html("th", { scope: "row" }, what), html("td", {}, now), html("td", {}, "→"), html("td", {}, html("b", {}, then))),
  );
  $("confirm-what").replaceChildren(html("table", {}, html("tbody", {}, ...lines)));
  const [no, yes] = form.querySelectorAll("button");
  write(yes, deed);
  return new Promise((done) => {
    const answer = (is) => {
      form.onsubmit = no.onclick = dialog.oncancel = null;
      dialog.close();
      done(is);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      answer(true);
    };
    no.onclick = () => answer(false);
    dialog.oncancel = (event) => {
      event.preventDefault();
      answer(false);
    };
    dialog.showModal();
    no.focus();
  });
}
