"use strict";
// One box filters the rows of every table that is marked for it; folded tables open while they have a match.
(() => {
  const box = document.getElementById("find");
  const said = document.getElementById("found");
  const blocks = [...document.querySelectorAll(".search")];
  if (!blocks.length) return;
  const rows = blocks.flatMap((block) =>
    [...block.querySelectorAll("tbody tr")].map((row) => ({
      row,
      fold: row.closest("details"),
      text: row.textContent.toLowerCase(),
    })));
  const folds = new Map(rows.filter((r) => r.fold).map((r) => [r.fold, r.fold.open]));
  document.getElementById("search").hidden = false;

  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const open = new Set();
    let count = 0;
    for (const { row, fold, text } of rows) {
      const hit = words.every((word) => text.includes(word));
      row.classList.toggle("out", !hit);
      if (hit) count += 1;
      if (hit && fold) open.add(fold);
    }
    for (const [fold, was] of folds) fold.open = words.length ? open.has(fold) : was;
    said.value = words.length ? `${count} of ${rows.length} rows match` : "";
    if (words.length && count) {
      const first = rows.find((r) => !r.row.classList.contains("out")).row;
      const place = first.getBoundingClientRect();
      if (place.top < 0 || place.top > window.innerHeight) first.scrollIntoView({ block: "center" });
    }
  };
  let waiting = 0;
  box.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 80);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { box.value = ""; filter(); }
  });
})();
