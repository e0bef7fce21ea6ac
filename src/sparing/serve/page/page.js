
// The page of `sparing serve`. Whatever comes from a text or from the model is put in as text, never as markup.
(() => {
  const at = (id) => document.getElementById(id);
  const SHOWN = 6000; // tokens that are drawn
  let model = "";
  let held = null; // what the server holds compressed: { text, key }
  let running = null; // the answer that is being written

  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  const number = (value) => value.toLocaleString("en");
  const bytes = (value) => {
    const units = ["bytes", "KiB", "MiB", "GiB"];
    let step = 0;
    while (value >= 1024 && step < 3) { value /= 1024; step += 1; }
    return `${step ? value.toFixed(1) : value} ${units[step]}`;
  };
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  async function call(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    if (at("token").value) headers.Authorization = `Bearer ${at("token").value}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const error = new Error(said && said.error ? said.error.message : `the server answered ${response.status}`);
    error.status = response.status;
    throw error;
  }
  const post = (path, body, signal) => call(path, { method: "POST", body: JSON.stringify(body), signal });

  function complain(error) {
    at("problem").textContent = error ? `That did not work: ${error.message}` : "";
    at("problem").hidden = !error;
    if (error && error.status === 401) { at("access").hidden = false; at("token").focus(); }
  }

  function drawNumbers(usage) {
    const kept = usage.sparing;
    const share = kept.bytes_full ? kept.bytes_kept / kept.bytes_full : 1;
    at("saved").textContent = percent(Math.max(0, 1 - share));
    at("bytes").textContent = bytes(kept.bytes_kept);
    at("ofbytes").textContent = `held instead of ${bytes(kept.bytes_full)}`;
    at("tokens").textContent = number(Math.round(kept.kept_tokens));
    at("oftokens").textContent = `of ${number(usage.prompt_tokens)} tokens kept, on average over heads`;
    at("share").style.setProperty("--part", `${Math.min(100, 100 * share)}%`);
  }

  function drawTokens({ tokens, kept }) {
    const parts = document.createDocumentFragment();
    tokens.slice(0, SHOWN).forEach((text, index) => {
      if (!text) return; // a part of a character, which stands at its last token
      const share = kept[index];
      const token = element("i", text, share === 0 ? "no" : "");
      token.style.setProperty("--share", share);
      token.dataset.say = share === 0 ? "dropped by all heads" : `kept by ${percent(share)} of the heads`;
      parts.append(token);
    });
    if (tokens.length > SHOWN) parts.append(element("em", `… ${number(tokens.length - SHOWN)} more tokens`));
    at("coloured").replaceChildren(parts);
  }

  async function read() {
    const text = at("text").value;
    if (!text.trim()) { at("text").focus(); throw new Error("there is no text yet"); }
    at("reading").textContent = "reading …";
    try {
      const found = await (await post("/v1/documents", { text })).json();
      drawNumbers(found.usage);
      drawTokens(await (await call(`/v1/documents/${found.cache_key}/tokens`)).json());
      held = { text, key: found.cache_key };
      at("kept").hidden = false;
    } finally {
      at("reading").textContent = "";
    }
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }

  async function answer(question, said, note) {
    const asked = {
      model, messages: [{ role: "user", content: question }], cache_key: held.key, temperature: 0, max_tokens: 128,
      stream: true, stream_options: { include_usage: true },
    };
    for await (const event of events(await post("/v1/chat/completions", asked, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices.length ? event.choices[0].delta.content || "" : "";
      said.textContent += said.textContent ? piece : piece.trimStart();
      if (event.usage) {
        const { sparing, prompt_tokens: prompt, completion_tokens: written } = event.usage;
        note.textContent = `answered from ${bytes(sparing.bytes_kept)} instead of ${bytes(sparing.bytes_full)}; `
          + `${number(prompt)} tokens read, ${number(written)} written`;
      }
    }
  }

  async function ask(question) {
    const item = element("li");
    const said = element("p");
    const note = element("p", "", "quiet");
    said.setAttribute("aria-busy", "true");
    item.append(element("b", question), said, note);
    at("answers").prepend(item);
    running = new AbortController();
    at("stop").hidden = false;
    try {
      await answer(question, said, note);
    } catch (error) {
      if (error.name === "AbortError") { note.textContent = "stopped"; return; }
      if (error.status === 404) held = null; // it gave way to others: the next question reads the text again
      if (!said.textContent) item.remove();
      throw error;
    } finally {
      said.removeAttribute("aria-busy");
      at("stop").hidden = true;
      running = null;
    }
  }

  async function busy(work) {
    const buttons = all("button[type=submit]");
    buttons.forEach((button) => { button.disabled = true; });
    complain(null);
    try { await work(); } catch (error) { complain(error); }
    buttons.forEach((button) => { button.disabled = false; });
  }

  at("access").addEventListener("submit", (event) => { event.preventDefault(); complain(null); });
  at("read").addEventListener("submit", (event) => {
    event.preventDefault();
    busy(async () => { await read(); at("keptname").focus(); });
  });
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = at("question").value.trim();
    if (!question || running) { at("question").focus(); return; }
    busy(async () => {
      if (!held || held.text !== at("text").value) await read();
      await ask(question);
    });
  });
  at("stop").addEventListener("click", () => { if (running) running.abort(); });

  call("/health").then((response) => response.json()).then((health) => {
    model = health.model;
    at("access").hidden = !health.token_required;
    const isCount = typeof health.keep === "number" && health.keep > 1;
    const keeps = typeof health.keep === "string" ? health.keep : isCount ? `${health.keep} tokens` : percent(health.keep);
    const facts = [["Model", health.model], ["Method", health.method], ["Keeps", keeps]];
    at("server").replaceChildren(...facts.map(([name, value]) => {
      const fact = element("div");
      fact.append(element("dt", name), element("dd", value));
      return fact;
    }));
  }).catch(complain);
})();
