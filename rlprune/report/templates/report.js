"use strict";
// Sorting: a click on a header; a second one turns the order. Cells without a value stay last.
for (const table of document.querySelectorAll("table.short")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}
// What a mark stands for is told at once, and its row and its other marks are lit.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
const light = (key, on) => {
  for (const part of document.querySelectorAll("[data-key]")) if (key && part.dataset.key === key) part.classList.toggle("on", on);
};
for (const title of document.querySelectorAll("svg title")) {
  const mark = title.parentNode, text = title.textContent;
  title.remove();
  mark.setAttribute("aria-label", text);
  mark.addEventListener("pointerenter", (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 10) + "px";
    light(mark.dataset.key, true);
  });
  mark.addEventListener("pointerleave", () => { tip.hidden = true; light(mark.dataset.key, false); });
}
for (const row of document.querySelectorAll("tr[data-key]")) {
  row.addEventListener("pointerenter", () => light(row.dataset.key, true));
  row.addEventListener("pointerleave", () => light(row.dataset.key, false));
}
// A page on disk may not write to the clipboard everywhere; there the lines are selected instead.
for (const box of document.querySelectorAll(".command")) {
  const button = document.createElement("button"), code = box.querySelector("code");
  button.type = "button";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(code); button.textContent = "selected"; }
  });
  box.append(button);
}
