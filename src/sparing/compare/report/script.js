(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // One mode at a time.
  const sections = all("[data-section]");
  const showMode = (value) => sections.forEach((part) => { part.hidden = part.dataset.section !== value; });
  all('input[name="mode"]').forEach((radio) => radio.addEventListener("change", () => showMode(radio.value)));
  const chosen = document.querySelector('input[name="mode"]:checked');
  if (chosen) showMode(chosen.value);

  // The legend draws and hides methods; hovering over a name brings its curve forward.
  sections.forEach((section) => {
    const apply = (box) => {
      all(`.m[data-m="${box.dataset.m}"]`, section).forEach((curve) => curve.toggleAttribute("hidden", !box.checked));
      all(".chart", section).forEach(giveOneTabStop);
    };
    all(".legend input", section).forEach((box) => {
      box.addEventListener("change", () => apply(box));
      apply(box);
      box.parentElement.addEventListener("mouseenter", () => forward(section, box.dataset.m));
      box.parentElement.addEventListener("mouseleave", () => forward(section, null));
    });
  });
  function forward(section, index) {
    all(".chart .m", section).forEach((curve) => {
      curve.style.opacity = index === null || curve.dataset.m === index ? "" : "0.15";
    });
  }

  const DARK = 65; // percent of colour above which text turns light

  // The layer × head maps.
  const make = (name, text, attributes = {}) => {
    const element = document.createElement(name);
    element.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    return element;
  };
  function drawMap(section, number) {
    const table = section.querySelector("table.map");
    if (!table) return;
    const { maps, keeps, tops } = data.maps[number];
    const method = section.querySelector('[data-pick="method"]').value;
    const keep = section.querySelector('[data-pick="keep"]').value;
    const layers = maps[`${method}|${keep}`];
    const note = section.querySelector("[data-mapnote]");
    table.hidden = !layers;
    if (!layers) {
      note.textContent = `${method} has no map at ${keeps[keep]}.`;
      return;
    }
    const widest = Math.max(1, ...layers.map((layer) => (layer ? layer.length : 0)));
    const head = make("tr", "");
    head.append(make("td", "KV head"));
    for (let index = 0; index < widest; index += 1) head.append(make("th", index, { scope: "col" }));
    head.append(make("th", "mean", { scope: "col", class: "mean" }));
    const body = layers.map((layer, index) => mapRow(layer, index, widest, tops[keep]));
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...body);
    section.querySelector("[data-top]").textContent = tops[keep];
    const values = layers.flatMap((layer) => layer || []);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    note.textContent = `${method}, keep ${keeps[keep]}: ` + (values.length === 0 ? "no layer is compressed."
      : least === most ? `every head keeps ${most} % of its tokens.`
      : `heads keep from ${least} % to ${most} % of their tokens.`);
  }
  function mapRow(layer, index, widest, top) {
    const row = make("tr", "");
    row.append(make("th", `layer ${index}`, { scope: "row" }));
    if (!layer) {
      row.append(make("td", "not compressed", { class: "none", colspan: widest + 1 }));
      return row;
    }
    layer.forEach((value) => {
      const depth = Math.min(100, Math.round((100 * value) / top));
      const cell = make("td", value, { class: depth > DARK ? "hi" : "" });
      cell.style.setProperty("--v", `${depth}%`);
      row.append(cell);
    });
    for (let extra = layer.length; extra < widest; extra += 1) row.append(make("td", ""));
    const mean = layer.reduce((sum, value) => sum + value, 0) / Math.max(layer.length, 1);
    row.append(make("td", mean.toFixed(0), { class: "mean" }));
    return row;
  }
  sections.forEach((section) => {
    const number = Number(section.dataset.section);
    all("[data-pick]", section).forEach((pick) => pick.addEventListener("change", () => drawMap(section, number)));
    drawMap(section, number);
  });

  // The example: how many of the chosen heads keep each token.
  if (data.example) startExample(data.example);
  function startExample(example) {
    const [method, layer, head] = ["ex-method", "ex-layer", "ex-head"].map((id) => document.getElementById(id));
    const spans = all("#ex-tokens i, #ex-tokens b");
    const answer = new Set(example.answer);
    let counts = [];
    let total = 0;
    const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    function draw() {
      const record = example.methods[method.selectedIndex];
      counts = new Array(example.shown).fill(0);
      total = 0;
      record.layers.forEach((heads, index) => {
        if (layer.value !== "" && Number(layer.value) !== index) return;
        if (!heads) {
          total += 1;
          counts = counts.map((count) => count + 1);
          return;
        }
        heads.forEach((bits, place) => {
          if (head.value !== "" && Number(head.value) !== place) return;
          total += 1;
          const bytes = unpack(bits);
          for (let at = 0; at < example.shown; at += 1) counts[at] += (bytes[at >> 3] >> (at & 7)) & 1;
        });
      });
      spans.forEach((span, at) => {
        const share = total ? counts[at] / total : 0;
        span.style.setProperty("--v", `${Math.round(100 * share)}%`);
        span.className = 100 * share > DARK ? "hi" : share === 0 ? "no" : "";
      });
      document.getElementById("ex-output").textContent = record.output.trim() || "(nothing)";
      document.getElementById("ex-note").textContent = describe(record);
    }
    function mean(places) {
      const sum = places.reduce((before, at) => before + counts[at], 0);
      return total && places.length ? Math.round((100 * sum) / (places.length * total)) : 0;
    }
    function describe(record) {
      if (!total) return "No such head in this layer.";
      const everywhere = counts.map((_, at) => at);
      const gone = counts.filter((count) => count === 0).length;
      const start = `${record.name}, keep ${record.keep}: of ${total} ${total === 1 ? "head" : "heads"}, a token stays in ${mean(everywhere)} % on average; ${gone} of ${example.shown} tokens are dropped everywhere.`;
      return answer.size ? `${start} The answer's tokens stay in ${mean([...answer])} % of them.` : `${start} The answer does not stand in the context word for word.`;
    }
    [method, layer, head].forEach((pick) => pick.addEventListener("change", draw));
    document.getElementById("ex-tokens").addEventListener("mouseover", (event) => {
      const at = spans.indexOf(event.target);
      if (at >= 0) showTip(`kept by ${counts[at]} of ${total} ${total === 1 ? "head" : "heads"}`, event.target.getClientRects()[0]);
    });
    draw();
  }
})();
