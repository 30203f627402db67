"use strict";
// Makes the static table a grid to walk through (WAI-ARIA grid pattern), with details of each cell, a threshold and
// layers for the exits, and a choice of what numbers and shading show. Arrays are [layer, column] or
// [layer, column, rank] in one row; layer 0 is the embeddings.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { depth, columns, kept, first, names } = data;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const floats = (text) => new Float32Array(bytes(text));
  const whole = (text) => new Uint32Array(bytes(text)); // indices of names
  const best = whole(data.best), bestProbability = floats(data.best_probability);
  const entropy = floats(data.entropy), finalProbability = floats(data.final_probability);
  const read = whole(data.read), agreesFrom = data.agreesFrom;
  const fused = data.fusion && { best: whole(data.fused_best), probability: floats(data.fused_probability) };

  const grid = byId("grid");
  const rows = [...grid.tBodies].flatMap((body) => [...body.rows]);
  const rowOf = (what) => rows.find((row) => row.dataset.what === String(what));
  const layerRows = Array.from({ length: depth + 1 }, (_, n) => rowOf(n));
  const at = (n, c) => n * columns + c;
  const top = (n, c) => best[at(n, c) * kept];
  const probability = (n, c) => bestProbability[at(n, c) * kept];
  const agrees = (n, c) => top(n, c) === top(depth, c);
  const layerName = (n) => (n === 0 ? "embeddings" : n === depth ? `layer ${n}, the last` : `layer ${n}`);
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  const percent = (p, digits = 0) => `${(100 * p).toFixed(digits)}%`;
  const quoted = (name) => `“\u2068${names[name]}\u2069”`; // isolated, should it run from right to left

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  // Exits: as sled.Lens.exits, in float32.
  let { exits, threshold, leaves } = data;

  function markExits() {
    const limit = Math.fround(threshold);
    const row = rowOf("leaves");
    const before = leaves;
    leaves = Array.from({ length: columns }, (_, c) => exits.find((n) => probability(n, c) > limit) ?? depth);
    leaves.forEach((n, c) => {
      if (before[c] === n) return;
      if (before[c] < depth) {
        const left = layerRows[before[c]].cells[c + 1];
        left.classList.remove("exit");
        left.querySelector("b").remove();
      }
      const cell = row.cells[c + 1];
      cell.textContent = n === depth ? "last layer" : `layer ${n} ${agrees(n, c) ? "✓" : "≠"}`;
      cell.classList.toggle("changed", n < depth && !agrees(n, c));
      if (n < depth) {
        layerRows[n].cells[c + 1].classList.add("exit");
        layerRows[n].cells[c + 1].append(element("b", { textContent: "exit" }));
      }
    });
    const early = leaves.map((n, c) => [n, c]).filter(([n]) => n < depth);
    const right = early.filter(([n, c]) => agrees(n, c)).length;
    const mean = leaves.reduce((sum, n) => sum + n, 0) / columns;
    byId("outcome").textContent = `At threshold ${threshold}, ${early.length} of ${columns} tokens leave early, after `
      + `${mean.toFixed(1)} of ${depth} layers on average; ${right} of these ${early.length} choices are the last `
      + "layer’s.";
    byId("chosen").textContent = exits.length === depth - 1 ? "all" : exits.join(", ") || "none";
    describe();
  }

  // What numbers and shading show: how sure it is (0 to 1), its text, and a step of the scale in words.
  const nats = Math.log(data.vocabulary);
  const tenth = (i) => `${10 * i}–${10 * i + 10}%`;
  const shadings = {
    confidence: {
      about: "Confidence: the probability that a layer gives to its own choice.",
      sure: probability, text: (n, c) => percent(probability(n, c)), step: tenth,
    },
    entropy: {
      about: `Entropy of the layer’s distribution, in nats; ${nats.toFixed(1)} is the most. Little is shaded strongly.`,
      sure: (n, c) => 1 - entropy[at(n, c)] / nats, text: (n, c) => entropy[at(n, c)].toFixed(2),
      step: (i) => `${((1 - i / 10) * nats).toFixed(1)}–${((0.9 - i / 10) * nats).toFixed(1)}`,
    },
    agreement: {
      about: "Agreement: the probability that a layer gives to the last layer’s choice.",
      sure: (n, c) => finalProbability[at(n, c)], text: (n, c) => percent(finalProbability[at(n, c)]),
      step: tenth,
    },
  };

  function shade(name) {
    const { about, sure, text, step } = shadings[name];
    byId("shown").textContent = about;
    [...byId("scale").children].forEach((item, i) => { item.textContent = step(i); });
    layerRows.forEach((row, n) => {
      for (let c = 0; c < columns; c++) {
        const cell = row.cells[c + 1];
        const level = Math.max(0, Math.min(9, Math.floor(10 * sure(n, c)))) || 0;
        cell.className = cell.className.replace(/\bs\d\b/, `s${level}`);
        cell.querySelector("small").textContent = text(n, c) + (agrees(n, c) ? " ✓" : "");
      }
    });
  }

  // Details of the current cell, seen and said.
  let current = null;

  function factsOf(n, c) {
    const choice = top(n, c), last = top(depth, c);
    const facts = [["Entropy", `${entropy[at(n, c)].toFixed(2)} nats of at most ${nats.toFixed(2)}`]];
    if (n < depth) {
      facts.push(["Last layer", choice === last ? "makes the same choice"
        : `says ${quoted(last)}, which has ${percent(finalProbability[at(n, c)], 2)} here`]);
    }
    facts.push(["Exit", leaves[c] < n ? `the token has left after layer ${leaves[c]}` : leaves[c] > n ? "not yet"
      : n === depth ? "the token goes through all layers" : `the token leaves here, at threshold ${threshold}`]);
    facts.push(["All agree", n >= agreesFrom[c] ? `yes, from ${layerName(agreesFrom[c])} on` : "not yet"]);
    return facts;
  }

  function factsOfFusion(c) {
    const last = top(depth, c);
    return [["Last layer", fused.best[c * kept] === last ? "makes the same choice"
      : `says ${quoted(last)}: ${data.fusion} corrects it`]];
  }

  function describe() {
    const what = current.parentElement.dataset.what, c = current.cellIndex - 1;
    const byFusion = what === "fused";
    const n = what === "leaves" ? leaves[c] : what === "agrees-from" ? agreesFrom[c] : Number(what);
    const [from, of, start] = byFusion ? [fused.best, fused.probability, c] : [best, bestProbability, at(n, c)];
    const ranks = Array.from({ length: kept }, (_, k) => start * kept + k).filter((i, k) => k === 0 || of[i] > 0);
    const speaker = byFusion ? data.fusion : layerName(n);
    const where = `after token ${first + c}, ${quoted(read[c])}`;
    const next = c + 1 < columns ? read[c + 1] : data.next;
    const facts = [...(byFusion ? factsOfFusion(c) : factsOf(n, c)),
      ["Text goes on", next === null ? "no further" : `with ${quoted(next)}`]];

    byId("where").textContent = capital(speaker);
    const bar = (i) => {
      const made = element("span", { className: "bar", ariaHidden: "true" });
      made.style.width = percent(of[i], 1);
      return made;
    };
    const heads = ["Token", "Probability"].map((textContent) => element("th", { scope: "col", textContent }));
    byId("about").replaceChildren(
      element("p", { textContent: capital(where) }),
      element("table", {},
        element("caption", { textContent: "Most likely next tokens" }),
        element("thead", {}, element("tr", {}, ...heads)),
        element("tbody", {}, ...ranks.map((i) => element("tr", {},
          element("td", {}, element("bdi", { textContent: names[from[i]] }), bar(i)),
          element("td", { textContent: percent(of[i], 2) }))))),
      element("dl", {}, ...facts.map(([term, fact]) => element("div", {},
        element("dt", { textContent: term }), element("dd", { textContent: fact })))));
    const likeliest = ranks.map((i) => `${quoted(from[i])} ${percent(of[i], 2)}`).join(", ");
    byId("said").textContent = `${speaker} ${where}: ${likeliest}. ${facts.map((pair) => pair.join(": ")).join(". ")}.`;
  }

  function choose(cell) {
    if (current) {
      current.removeAttribute("tabindex");
      for (const part of [current, ...headers(current)]) part.classList.remove("current", "here");
    }
    current = cell;
    current.tabIndex = 0;
    current.classList.add("current");
    for (const header of headers(current)) header.classList.add("here");
    describe();
  }
  const headers = (cell) => [cell.parentElement.cells[0], grid.tHead.rows[0].cells[cell.cellIndex]];

  // The grid: one tab stop, arrows within.
  const PAGE = 5;
  function target(event, r, c) {
    const far = event.ctrlKey || event.metaKey, lowest = rows.length - 1;
    switch (event.key) {
      case "ArrowLeft": return [r, c - 1];
      case "ArrowRight": return [r, c + 1];
      case "ArrowUp": return [r - 1, c];
      case "ArrowDown": return [r + 1, c];
      case "PageUp": return [Math.max(0, r - PAGE), c];
      case "PageDown": return [Math.min(lowest, r + PAGE), c];
      case "Home": return [far ? 0 : r, 1];
      case "End": return [far ? lowest : r, columns];
      default: return null;
    }
  }
  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell || event.altKey || event.shiftKey) return;
    const to = target(event, rows.indexOf(cell.parentElement), cell.cellIndex);
    if (!to) return;
    event.preventDefault();
    const next = to[1] > 0 && rows[to[0]]?.cells[to[1]];
    if (next) { choose(next); next.focus(); }
  });
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) { choose(cell); cell.focus(); }
  });
  grid.addEventListener("focusin", (event) => {
    if (event.target !== current && event.target.matches("td")) choose(event.target);
  });
  byId("corrections")?.addEventListener("click", (event) => {
    const c = event.target.closest("a")?.dataset.column;
    if (c === undefined) return;
    event.preventDefault();
    const cell = rowOf("fused").cells[Number(c) + 1];
    choose(cell);
    cell.focus();
  });

  // The controls.
  const number = byId("threshold"), slider = byId("slider");
  function setThreshold(input, other) {
    if (input.value === "" || !input.checkValidity()) return;
    other.value = input.value;
    threshold = Number(input.value);
    markExits();
  }
  number.addEventListener("input", () => setThreshold(number, slider));
  slider.addEventListener("input", () => setThreshold(slider, number));
  for (let n = 1; n < depth; n++) {
    const box = element("input", { type: "checkbox", value: n, checked: exits.includes(n) });
    byId("layers").append(element("label", {}, box, String(n)));
  }
  byId("layers").addEventListener("change", () => {
    exits = [...byId("layers").querySelectorAll("input:checked")].map((box) => Number(box.value));
    markExits();
  });
  byId("controls").addEventListener("change", (event) => {
    if (event.target.name === "shading") shade(event.target.value);
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  // On paper a wide table becomes several, one below the other.
  const SHEET = 9;
  addEventListener("beforeprint", () => {
    const sheets = element("div", { id: "sheets" });
    for (let c = 1; c <= columns; c += SHEET) {
      const part = grid.cloneNode(false);
      part.removeAttribute("id");
      part.className = "sheet";
      const shown = Math.min(SHEET, columns + 1 - c);
      const widths = element("colgroup", {}, element("col", { className: "head" }),
        element("col", { className: "cell", span: shown }));
      part.append(widths, ...[grid.tHead, ...grid.tBodies].map((section) => {
        const copy = section.cloneNode(false);
        for (const row of section.rows) {
          const cells = [row.cells[0], ...[...row.cells].slice(c, c + shown)].map((cell) => cell.cloneNode(true));
          cells.forEach((cell) => cell.removeAttribute("id"));
          copy.append(element("tr", {}, ...cells));
        }
        return copy;
      }));
      sheets.append(part);
    }
    byId("lens").append(sheets);
    document.body.classList.add("printing");
  });
  addEventListener("afterprint", () => {
    document.body.classList.remove("printing");
    byId("sheets")?.remove();
  });

  grid.setAttribute("role", "grid");
  grid.setAttribute("aria-readonly", "true");
  byId("frame").removeAttribute("tabindex");
  document.body.classList.add("explored");
  for (const hidden of [byId("controls"), byId("details"), document.querySelector(".keys")]) hidden.hidden = false;
  number.value = slider.value = threshold; // a browser may have kept what stood there before a reload
  document.querySelector("input[name=shading]").checked = true;
  choose(layerRows[depth].cells[1]);
  byId("said").textContent = ""; // nobody asked yet
})();
