"use strict";
// Names come from the model and are only ever set as text.
(() => {
  const { groups, lines, names, reasons } = JSON.parse(document.getElementById("data").textContent);
  const map = document.getElementById("map");
  const box = document.getElementById("find");
  const said = document.getElementById("found");
  const list = document.getElementById("matches");
  const panel = document.getElementById("panel");
  const MOST = 40;
  if (!map) return;
  const items = [...map.querySelectorAll(".lines > li")];
  const chosen = document.getElementById("chosen");
  const tracks = new Map([...map.querySelectorAll(".track")].map((e) => [Number(e.dataset.g), e]));
  const joints = new Map([...map.querySelectorAll(".joint")].map((e) => [Number(e.dataset.l), e]));
  const place = new Map(items.map((item, k) => [item, k]));
  const touching = groups.map(() => []);
  lines.forEach((line, k) => {
    if (typeof line === "number") return;
    const [sums, makes, passes] = line;
    for (const g of new Set([...sums, ...makes, ...passes])) touching[g].push(k);
  });
  const label = (k) => items[k].querySelector(".head").textContent + items[k].querySelector(".tail").textContent;
  const operatorOf = (k) => items[k].querySelector("small").textContent;
  const entries = [
    ...groups.map((g, k) => ({ text: label(g.line), what: "group", tracks: [k], frozen: [] })),
    ...names.map(([text, what, found, frozen]) => ({ text, what, tracks: found, frozen })),
  ].map((e) => ({ ...e, low: e.text.toLowerCase() }));

  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const link = (text, action, parent) => {
    const button = make("button", text, parent);
    button.type = "button";
    button.addEventListener("click", action);
    return button;
  };

  let marked = [];
  const mark = (found, only) => {
    // All is faded at once and what is chosen drawn again above it: no style of thousands of elements changes.
    for (const element of marked) element.classList.remove("on");
    marked = [];
    chosen.replaceChildren();
    map.classList.toggle("picked", found.length > 0 || only !== undefined);
    const rows = new Set(only === undefined ? [] : [only]);
    for (const g of found) {
      chosen.append(tracks.get(g).cloneNode(true));
      rows.add(groups[g].line);
      for (const k of touching[g]) rows.add(k);
    }
    for (const k of rows) {
      marked.push(items[k]);
      if (joints.has(k)) chosen.append(joints.get(k).cloneNode(true));
    }
    for (const element of marked) element.classList.add("on");
  };
  const go = (k) => items[k].scrollIntoView({ block: "center" });

  const ROLES = [
    ["out", "These weights lose outputs"],
    ["in", "These weights lose inputs"],
    ["scale", "These lose the entries of the units"],
    ["index", "These lose slices as well"],
  ];
  const describe = (g) => {
    const group = groups[g];
    make("h3", label(group.line), panel);
    make("p", `${group.units} units of kind ${group.kind}; ${group.parameters} parameters touch it.`, panel);
    make("p", `The first unit that leaves saves ${group.saves}.`, panel);
    make("p", group.why ? `Statistic: ${group.why}; spa prune --scope all takes it.` : "Exact: removing a unit is setting its weights to zero.", panel);
    for (const [role, title] of ROLES) {
      const mine = group.parts.filter((part) => part[2] === role);
      if (!mine.length) continue;
      make("h4", `${title} (${mine.length})`, panel);
      const ul = make("ul", undefined, panel);
      for (const [n, axis, , node] of mine) {
        const li = make("li", undefined, ul);
        link(names[n][0], () => show(...names[n]), li);
        li.append(` axis ${axis}`);
        if (node >= 0) make("small", ` in ${names[node][0]}`, li);
      }
    }
    if (group.more) make("p", `... and ${group.more} more; spa inspect --json lists all.`, panel);
    if (touching[g].length) {
      make("h4", `Layers on this track (${touching[g].length})`, panel);
      const ul = make("ul", undefined, panel);
      for (const k of touching[g].slice(0, 200)) {
        const [sums, makes] = lines[k];
        const li = make("li", undefined, ul);
        link(label(k), () => go(k), li);
        li.append(` ${operatorOf(k)}, ${[sums.includes(g) && "reads", makes.includes(g) && "makes"].filter(Boolean).join(" and ") || "passes it on"}`);
      }
      if (touching[g].length > 200) make("p", `... and ${touching[g].length - 200} more layers.`, panel);
    }
  };
  const show = (title, what, found, frozen, line) => {
    panel.replaceChildren();
    panel.hidden = false;
    const close = link("×", () => { panel.hidden = true; mark([]); }, panel);
    close.id = "close";
    close.setAttribute("aria-label", "Close");
    make("h2", `${title}`, panel);
    make("p", found.length === 0
      ? `This ${what} is in no group: nothing of it can be pruned.`
      : `This ${what} drags along ${found.length === 1 ? "one group" : `${found.length} groups`}.`, panel);
    for (const r of frozen) make("p", `Frozen, ${reasons[r]}`, panel);
    for (const g of found.slice(0, 20)) describe(g);
    if (found.length > 20) make("p", `... and ${found.length - 20} more groups, marked on the left.`, panel);
    panel.scrollTop = 0;
    mark(found, line);
  };
  const choose = (k) => {
    const line = lines[k];
    if (typeof line === "number") return show(label(k), "group", [line], []);
    const [sums, makes, passes] = line;
    return show(`${operatorOf(k)} ${label(k)}`, "layer", [...new Set([...sums, ...makes, ...passes])], [], k);
  };

  map.querySelector(".lines").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(place.get(item));
  });
  map.querySelector("svg").addEventListener("click", (event) => {
    const track = event.target.closest(".track");
    const joint = event.target.closest(".joint");
    if (joint) choose(Number(joint.dataset.l));
    else if (track) choose(groups[Number(track.dataset.g)].line);
  });

  const search = () => {
    const text = box.value.trim().toLowerCase();
    list.replaceChildren();
    list.hidden = text === "";
    said.value = "";
    if (!text) return;
    const words = text.split(/\s+/);
    const hits = entries.filter((e) => words.every((word) => e.low.includes(word)));
    const rank = (e) => (e.low === text ? 0 : e.low.startsWith(text) ? 1 : 2);
    hits.sort((a, b) => rank(a) - rank(b) || a.low.length - b.low.length);
    said.value = `${hits.length} found`;
    for (const hit of hits.slice(0, MOST)) {
      const button = link(hit.text, () => {
        list.hidden = true;
        show(hit.text, hit.what, hit.tracks, hit.frozen);
        if (hit.tracks.length) go(groups[hit.tracks[0]].line);
      }, make("li", undefined, list));
      make("small", ` ${hit.what}${hit.tracks.length ? "" : ", in no group"}`, button);
    }
    if (hits.length > MOST) make("li", `... ${hits.length - MOST} more; write more of the name`, list);
    if (!hits.length) make("li", "no such name", list);
  };
  let waiting = 0;
  box.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 80); });
  box.addEventListener("focus", () => { if (box.value.trim()) list.hidden = false; });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { box.value = ""; search(); }
    if (event.key === "Enter") { clearTimeout(waiting); search(); list.querySelector("button")?.click(); }
    if (event.key === "ArrowDown") { event.preventDefault(); list.querySelector("button")?.focus(); }
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest("search")) list.hidden = true;
  });
  document.getElementById("search").hidden = false;
})();
