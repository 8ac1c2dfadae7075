"use strict";
(() => {
  const families = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("detail");
  const hint = panel.firstElementChild;
  const rows = new Map([...document.querySelectorAll("[data-family]")].map((row) => [Number(row.dataset.family), row]));
  const kinds = [...document.querySelectorAll("[data-kind]")].map((chip) => chip.dataset.kind);
  const groups = new Map(); // name -> [family, number of the group in it]
  const colour = (kind) => (kinds.includes(kind) ? `var(--kind-${kinds.indexOf(kind)})` : "var(--muted)");
  const number = (value) => value.toLocaleString("en-US");
  const filled = (pattern, place) => {
    let next = 0;
    return pattern.split(/([.:])/).map((part) => (part === "*" && next < place.length ? place[next++] : part)).join("");
  };
  families.forEach((family) => family.places.forEach((place, i) => groups.set(filled(family.name, place), [family, i])));

  // Elements are built from text, never from markup: names are data.
  const make = (name, attributes = {}, ...children) => {
    const svg = ["svg", "rect", "path"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  };

  // A name that may be broken behind its dots and underscores.
  const breakable = (name) => name.split(/(?<=[._:])/).flatMap((part) => [part, make("wbr")]);

  // Runs [start, length] on an axis: of one unit, or of all.
  const runs = (member, size, unit) => {
    const found = [];
    for (const piece of member.pieces) {
      for (let i = 0; i < piece.count; i++) {
        const start = piece.start + i * piece.stride;
        found.push(unit === null ? [start, piece.length * size] : [start + unit * piece.length, piece.length]);
      }
    }
    return found;
  };

  const bands = (member, size, unit, x, y, width, height, vertical, least) => {
    const drawn = [];
    for (const [state, list] of [["all", runs(member, size, null)], ["one", runs(member, size, unit)]]) {
      const path = list.map(([start, length]) => {
        const room = vertical ? height : width;
        const thick = Math.max(state === "one" ? least : 0, (length / member.size) * room);
        const at = Math.min((start / member.size) * room, room - thick);
        return vertical ? `M${x} ${y + at}h${width}v${thick}h${-width}z` : `M${x + at} ${y}h${thick}v${height}h${-thick}z`;
      });
      drawn.push(make("path", { class: state, d: path.join("") }));
    }
    return drawn;
  };

  // A parameter to scale: axis -2 downwards, axis -1 to the right, an axis before them as sheets behind each other.
  const sketch = (member, size, unit, scale) => {
    const shape = member.shape;
    const deep = shape.length > 2;
    const high = Math.max(5, scale(shape.length > 1 ? shape[shape.length - 2] : shape[0]));
    const wide = shape.length > 1 ? Math.max(5, scale(shape[shape.length - 1])) : 7;
    const sheets = deep ? 4 : 1;
    const off = 5;
    const width = wide + off * (sheets - 1) + 2;
    const height = high + off * (sheets - 1) + 2;
    const svg = make("svg", { class: "sketch", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const outer = deep && member.axis < shape.length - 2;
    const chosen = outer ? sheets - 1 - Math.floor((unit / size) * sheets) : -1;
    for (let sheet = 0; sheet < sheets; sheet++) {
      const x = 1 + off * (sheets - 1 - sheet);
      const y = 1 + off * sheet;
      svg.append(make("rect", { class: "body", x, y, width: wide, height: high }));
      if (outer) svg.append(make("rect", { class: sheet === chosen ? "one" : "all", x, y, width: wide, height: high }));
      else svg.append(...bands(member, size, unit, x, y, wide, high, shape.length < 2 || member.axis === shape.length - 2, 1.5));
    }
    return svg;
  };

  const strip = (member, size, unit) => {
    const svg = make("svg", { class: "strip", viewBox: "0 0 300 11", preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(make("rect", { class: "body", x: 0, y: 0, width: 300, height: 11 }), ...bands(member, size, unit, 0, 0, 300, 11, false, 2));
    return svg;
  };

  const scaleFor = (members) => {
    const sides = members.flatMap((member) => member.shape.slice(-2)).filter((side) => side > 1);
    const most = Math.max(...sides, 1);
    const linear = most / Math.min(...sides, most) <= 24;
    const scale = (side) => 88 * (linear ? side / most : Math.sqrt(side / most));
    return [scale, linear ? "Drawn to scale." : "Sides are drawn to the square root of their size."];
  };

  const owns = (member) => {
    const pieces = member.pieces.reduce((sum, piece) => sum + piece.count, 0);
    return `a unit owns ${number(member.per_unit)} of ${number(member.size)}${pieces > 1 ? `, in ${number(pieces)} pieces` : ""}`;
  };

  const layout = (member, kind) => {
    const tokens = member.layout.map((token) => {
      if (typeof token === "string") return token;
      return make("b", { class: token[1] === kind ? "own" : "", style: `--c: ${colour(token[1])}`, title: token[1].replaceAll("_", " ") }, number(token[0]));
    });
    return tokens.length > 1 ? make("p", { class: "code" }, `${number(member.size)} = `, ...tokens) : null;
  };

  const side = { consumes: "summed over", produces: "written along", carries: "carried along", selected: "shared, read in part along" };

  const shapeOf = (member) => member.shape.flatMap((size, axis) => [
    axis ? " × " : "", axis === member.axis ? make("b", { class: "own" }, number(size)) : number(size)]);

  const memberItem = (family, place, member, scale) => {
    const name = filled(member.parameter, place);
    const many = member.places.length > 1 ? make("span", { class: "muted" }, ` × ${number(member.places.length)}`) : null;
    const drawing = make("div", { class: "sketch" });
    const bar = make("div");
    const item = make("li", { style: `--c: ${colour(family.kind)}` }, drawing,
      make("div", {}, make("p", { class: "code" }, ...breakable(name), many),
        make("p", { class: "muted" }, ...shapeOf(member), `${member.role === "buffer" ? ", buffer" : ""}; ${side[member.side]} axis ${member.axis}`),
        bar, make("p", { class: "muted" }, owns(member)), layout(member, family.kind)));
    const show = (unit) => {
      drawing.replaceChildren(sketch(member, family.size, unit, scale));
      bar.replaceChildren(strip(member, family.size, unit));
    };
    return [item, show];
  };

  const fact = (title, value) => make("div", {}, make("dt", {}, title), make("dd", {}, value));

  const operators = (family, place) => {
    if (!family.operators.length) return make("p", { class: "muted" }, "No operator couples this axis with another.");
    const lines = family.operators.map(([target, module, count]) =>
      make("tr", {}, make("td", { class: "code" }, ...breakable(target)), make("td", { class: "code muted" }, ...breakable(filled(module, place) || "model")), make("td", { class: "n" }, count > 1 ? `× ${number(count)}` : "")));
    return make("table", { class: "operators" }, make("tbody", {}, ...lines));
  };

  const detail = (family, which) => {
    const place = family.places[which];
    const reason = family.reason_of[which] === null ? null : family.reasons[family.reason_of[which]];
    const [scale, note] = scaleFor(family.members);
    const count = family.members.reduce((sum, member) => sum + member.places.length, 0);
    const items = family.members.map((member) => memberItem(family, place, member, scale));
    const words = make("span", {});
    const slider = make("input", { type: "range", id: "unit", min: 0, max: family.size - 1, value: 0, step: 1 });
    const show = () => {
      const unit = Number(slider.value);
      words.textContent = `${number(unit)} of 0–${number(family.size - 1)}`;
      items.forEach(([, draw]) => draw(unit));
    };
    slider.addEventListener("input", show);
    const instances = make("select", { id: "instance", onchange: (event) => choose(family, Number(event.target.value), false) },
      ...family.places.map((numbers, i) => make("option", i === which ? { value: i, selected: "" } : { value: i }, numbers.join(", "))));
    const content = make("div", { class: "panel" },
      make("header", {}, make("span", { class: `swatch${family.prunable ? "" : " hollow"}`, style: `--c: ${colour(family.kind)}` }), make("h2", {}, family.title),
        make("button", { type: "button", class: "close", "aria-label": "Close", onclick: clear }, "×")),
      make("p", { class: "name code muted" }, ...breakable(filled(family.name, place))),
      family.count > 1 ? make("label", { class: "instance" }, `One of ${number(family.count)} alike; shown:`, instances) : null,
      make("p", { class: "verdict" }, make("span", { class: family.prunable ? "holds" : "stays" }, family.prunable ? "prunable" : "stays: "), reason || (family.minimum > 1 ? `; at least ${number(family.minimum)} units stay` : "")),
      make("dl", { class: "numbers" }, fact("units", number(family.size)), fact("parameters a unit frees", number(family.parameters_per_unit)), fact(count === 1 ? "member" : "members", number(count))),
      make("h3", {}, "Members"),
      make("div", { class: "unit" }, make("label", { for: "unit" }, "Unit ", words), slider, make("p", { class: "muted" }, `A unit is ${family.unit}. ${note}`)),
      make("ul", { class: "members" }, ...items.map(([item]) => item)),
      make("h3", {}, "Operators that couple them"), operators(family, place));
    show();
    return content;
  };

  const tabs = [...document.querySelectorAll("[data-picture]")];
  const figures = [...document.querySelectorAll(".picture")];
  const showPicture = (i) => {
    tabs.forEach((tab, j) => tab.setAttribute("aria-pressed", String(i === j)));
    figures.forEach((figure, j) => { figure.hidden = i !== j; });
  };
  tabs.forEach((tab, i) => tab.addEventListener("click", () => showPicture(i)));

  let chosen = null;
  const mark = (name) => {
    const family = name === null ? null : groups.get(name)[0];
    for (const picture of document.querySelectorAll(".picture svg")) {
      const hits = [...picture.querySelectorAll(".group")].map((group) => [group, family !== null && groups.get(group.dataset.group)?.[0] === family]);
      picture.classList.toggle("choosing", hits.some(([, hit]) => hit));
      hits.forEach(([group, hit]) => group.classList.toggle("chosen", hit));
      const met = new Set(hits.filter(([, hit]) => hit).flatMap(([group]) => (group.dataset.boxes || "").split(" ")));
      picture.querySelectorAll(".box").forEach((box) => box.classList.toggle("chosen", met.has(box.dataset.box)));
    }
    rows.forEach((row, id) => {
      const hit = family !== null && family.id === id;
      row.classList.toggle("chosen", hit);
      row.querySelector("button").setAttribute("aria-expanded", String(hit));
    });
  };

  function choose(family, which, move = true) {
    chosen = filled(family.name, family.places[which]);
    panel.replaceChildren(detail(family, which));
    panel.classList.add("open-panel");
    panel.scrollTop = 0;
    mark(chosen);
    const drawn = figures.map((figure) => figure.querySelector(".chosen") !== null);
    const showing = figures.findIndex((figure) => !figure.hidden);
    if (drawn.includes(true) && !drawn[showing]) showPicture(drawn.indexOf(true));
    if (move && location.hash !== `#${encodeURIComponent(chosen)}`) history.replaceState(null, "", `#${encodeURIComponent(chosen)}`);
  }

  function clear() {
    const row = chosen && rows.get(groups.get(chosen)[0].id);
    chosen = null;
    panel.replaceChildren(hint);
    panel.classList.remove("open-panel");
    mark(null);
    history.replaceState(null, "", location.pathname + location.search);
    if (row) row.querySelector("button").focus({ preventScroll: true });
  }

  rows.forEach((row, id) => row.addEventListener("click", () => choose(families[id], 0)));
  for (const group of document.querySelectorAll(".picture .group")) {
    const found = groups.get(group.dataset.group);
    if (!found) continue;
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "button");
    group.setAttribute("aria-label", group.querySelector("title").textContent);
    group.addEventListener("click", () => choose(...found));
    group.addEventListener("mouseenter", () => mark(group.dataset.group));
    group.addEventListener("mouseleave", () => mark(chosen));
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(...found);
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chosen !== null) clear();
  });

  const search = document.getElementById("search");
  const verdict = document.getElementById("verdict");
  const chips = [...document.querySelectorAll("[data-kind]")];
  const texts = families.map((family) => [family.name, ...family.members.map((member) => member.parameter), family.title].join(" ").toLowerCase());
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.kind);
    let count = 0;
    let total = 0;
    families.forEach((family, id) => {
      const fits = words.every((word) => texts[id].includes(word)) && (!wanted.length || wanted.includes(family.kind)) &&
        (!verdict.value || family.prunable === (verdict.value === "yes"));
      rows.get(id).hidden = !fits;
      total += family.count;
      if (fits) count += family.count;
    });
    document.querySelectorAll("table.groups").forEach((table) => { table.hidden = !table.querySelector("tbody tr:not([hidden])"); });
    document.getElementById("nothing").hidden = count > 0;
    document.getElementById("shown").textContent = count === total ? "" : `${number(count)} of ${number(total)} groups`;
  };
  search.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  chips.forEach((chip) => chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    filter();
  }));

  const start = groups.get(decodeURIComponent(location.hash.slice(1)));
  if (start) choose(...start);
})();
