// The page: what is typed becomes runs of the sampler (class Run), what they draw coloured text.
// What is seen is a function of page.runs and of page.shown, the number of steps that were taken.

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent), MASK = DATA.mask_id;
const network = DATA.config && { config: DATA.config, weights: unpack(DATA) };
const page = { runs: [], boards: [], shown: 0, target: 0, steps: 0, turn: 0, shade: "step" };
const COLOURS = {
  step: [[68, 90, 190], [52, 138, 178], [92, 176, 138], [240, 200, 60]], // early to late
  nats: [[150, 150, 150], [226, 130, 60], [200, 30, 60]], // 0 to MOST
};
const MOST = 4, DRAWS = 16; // nats at the end of the scale; draws of the NELBO

// ---- 1. Weights and text ------------------------------------------------------------------------
/** Matrices are 8-bit whole numbers times one bfloat16 number a row, vectors bfloat16. */
function unpack({ shapes, narrow, wide }) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const upper = Uint32Array.from(new Uint16Array(bytes(wide)), (z) => z << 16);
  const floats = new Float32Array(upper.buffer), small = new Int8Array(bytes(narrow));
  let i = 0, j = 0;
  return Object.fromEntries(Object.entries(shapes).map(([name, shape]) => {
    const [n, D] = shape, scale = Float64Array.from(floats.subarray(i, (i += n)));
    const q = D && Float64Array.from(small.subarray(j, (j += n * D)));
    return [name, { shape, data: D ? q.map((z, k) => z * scale[Math.floor(k / D)]) : scale }];
  }));
}

const encode = (text) => DATA.tokenizer === "byte"
  ? [...new TextEncoder().encode(text)] : [...text].map((c) => DATA.table.indexOf(c));

/** Ids of a text with gaps, ___12 (___ alone is one of 8); an Error says what cannot be. */
function request(text) {
  const pieces = text.split(/___(\d{0,4})/), block = DATA.config.block_size; // text, gap, text, ...
  const gap = (size) => Array(+(size || 8)).fill(MASK);
  const ids = pieces.flatMap((piece, i) => (i % 2 ? gap(piece) : encode(piece)));
  const alien = [...pieces.filter((_, i) => i % 2 === 0).join("")].find((c) => encode(c)[0] < 0);
  if (alien) throw Error(`‘${alien}’ is not among the ${MASK} characters of this model.`);
  if (ids.length > block) throw Error(`${ids.length} tokens, but the model reads ${block}.`);
  if (!ids.includes(MASK)) throw Error("Nothing is masked: write ___12, or select and mask.");
  return ids;
}

// ---- 2. Runs ------------------------------------------------------------------------------------
/** New runs from cells, what each place shows: {token, and the draw of an earlier run, if any}. */
function begin(starts, again = 0) {
  const o = { sampler: $("sampler").value, temperature: +$("temperature").value };
  for (const key of ["steps", ...Object.keys(DATA.options)]) o[key] = +$(key).value;
  page.again = again; // so that other numbers are drawn
  const uniforms = (i) => generator(+$("seed").value, i + 64 * again);
  const run = (cells, i) => new Run(network, cells.map(({ token }) => token), o, uniforms(i));
  set(starts.map((cells, i) => Object.assign(run(cells, i), { past: cells })));
}

function set(runs) {
  const shape = (runs) => runs.map((run) => run.start.length).join();
  const isNew = shape(page.runs) !== shape(runs);
  clearTimeout(page.timer);
  Object.assign(page, { runs, shown: 0, target: 0, seeking: null, turn: page.turn + 1 });
  measure();
  if (isNew) build();
  playing(false);
  shade("step");
}

/** How many steps there are: some samplers know it only when they are done. */
function measure() {
  page.steps = $("slider").max = Math.max(1, ...page.runs.map((run) => run.steps));
  page.target = Math.min(page.target, page.steps);
}

const next = (run) => run.plan[run.calls]?.step ?? Infinity; // that of the next call
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const clamp = (z, low, high) => Math.max(low, Math.min(high, z));

/** Show what is there after so many steps; what is not yet known is asked of the network. */
function seek(step) {
  const turn = page.turn, here = () => turn === page.turn;
  const walk = async () => {
    while (here()) {
      const known = Math.min(...page.runs.map(next)); // all that is drawn before this step
      page.shown = Math.min(page.target, known);
      render();
      if (page.shown === page.target) return;
      page.runs.find((run) => next(run) === known).call();
      measure();
      await sleep(0);
    }
  };
  page.target = clamp(step, 0, page.steps);
  return (page.seeking ??= walk().finally(() => here() && (page.seeking = null)));
}

async function play() {
  const turn = page.turn;
  if (page.shown === page.steps) await seek(0);
  playing(true);
  while (page.playing && turn === page.turn && page.shown < page.steps)
    await Promise.all([seek(page.shown + 1), sleep(clamp(8000 / page.steps, 30, 400))]);
  if (turn !== page.turn) return;
  playing(false);
  $("news").textContent = page.boards.map(({ text }) => text.textContent).join("; ");
}

function playing(on) {
  page.playing = on;
  $("play").textContent = on ? "❚❚" : "▶\uFE0E";
  $("play").ariaLabel = on ? "Pause" : "Play";
}

/** What a place shows: a token, the mask where there is none yet, and the draw it is from. */
function shownAt(run, place) {
  if (run.start[place] !== MASK) return run.past[place];
  const draw = run.draws.get(place);
  return draw?.step < page.shown ? { token: draw.token, draw } : { token: MASK };
}

/** Mask a token again: what is shown is the new beginning, and the model redoes what is masked. */
function remask({ row, place }) {
  const shown = page.runs.map((run) => run.start.map((_, i) => shownAt(run, i)));
  if (!network || shown[row][place].token === MASK) return;
  shown[row][place] = { token: MASK };
  begin(shown, page.again + 1);
  page.timer = setTimeout(play, 900); // time to mask another
}

/** The NELBO of what was filled, given the rest; of each token the weighted mean of its terms. */
async function evaluate() {
  const turn = page.turn;
  playing(false);
  await seek(page.steps);
  for (const [i, run] of page.runs.entries()) {
    const cells = run.start.map((_, place) => shownAt(run, place)), weights = cells.map(() => 0);
    const places = range(cells.length).filter((place) => cells[place].draw), nats = [...weights];
    for (const terms of nelbo(network, run.tokens, places, DRAWS, generator(0, i))) {
      if (turn !== page.turn) return;
      for (const { place, weight, ce } of terms) nats[place] += weight * ce;
      for (const { place, weight } of terms) weights[place] += weight;
      await sleep(0);
    }
    run.bound = nats.reduce((a, b) => a + b) / DRAWS / places.length;
    run.nats = nats.map((sum, place) => sum / weights[place]); // NaN where it was never masked
    render();
  }
}

// ---- 3. What is seen ----------------------------------------------------------------------------
const make = (tag, fields = {}) => Object.assign(document.createElement(tag), fields);
const gaps = (run) => run.start.filter((token) => token === MASK).length;

/** One board a run, one span a token; from here on only what has changed is written. */
function build() {
  page.boards = page.runs.map((run, row) => {
    const board = make("figure", { className: "panel board" }), note = make("figcaption");
    const text = make("div", { className: "text", role: "group", ariaLabel: `Sample ${row + 1}` });
    text.classList.toggle("grid", !!DATA.tokenizer); // characters, all of one width
    const field = (place) => ({ row, place, role: "button", tabIndex: place ? -1 : 0 });
    const spans = run.start.map((_, place) => make("span", field(place)));
    text.append(...spans);
    board.append(make("h2", { textContent: text.ariaLabel }), text, note);
    return { board, text, spans, note };
  });
  $("boards").replaceChildren(...page.boards.map(({ board }) => board));
}

function render() {
  page.runs.forEach((run, row) => {
    const drawn = [...run.draws.values()].filter(({ step }) => step < page.shown);
    const calls = drawn.reduce((most, { call }) => Math.max(most, call + 1), 0);
    const bound = run.nats ? ` · NELBO ${run.bound.toFixed(2)} nats a token (${DRAWS} draws)` : "";
    const left = `${gaps(run) - drawn.length} masked${bound}`, { note, spans } = page.boards[row];
    const expected = run.expected === null ? "" : `, expected ${run.expected.toFixed(1)}`;
    note.textContent = `${calls} network calls${expected} · ${left}`;
    for (const span of spans) paint(span, run, shownAt(run, span.place));
  });
  const t = (1 - page.shown / page.steps).toFixed(2);
  $("clock").textContent = `step ${page.shown} of ${page.steps}, t = ${t}`;
  $("slider").value = page.shown;
  chart();
}

function paint(span, run, { token, draw }) {
  const mine = run.draws.get(span.place);
  const fresh = mine && draw?.step === page.shown - 1 && page.shown < page.steps;
  const name = token === MASK ? "hole" : !draw ? "given" : fresh ? "drawn fresh" : "drawn";
  const room = DATA.tokenizer ? "·" : DATA.table[mine?.token] ?? "·"; // that it will need
  const [raw, newline] = token === MASK ? [room, " "] : [DATA.table[token], "↵\n"];
  const nats = (run.nats?.[span.place] || 0) / MOST, late = (draw?.step + 1) / draw?.steps;
  const colour = draw ? colourAt(page.shade === "nats" ? nats : late) : "";
  const text = raw.replaceAll("\n", newline);
  if (span.state === name + colour + text) return;
  Object.assign(span, { state: name + colour + text, className: name, textContent: text });
  span.style.setProperty("--c", colour);
}

/** The colour at z, from 0 to 1 along the scale. */
function colourAt(z) {
  const scale = COLOURS[page.shade], at = clamp(z, 0, 1) * (scale.length - 1);
  const i = Math.min(Math.floor(at), scale.length - 2);
  return `rgb(${scale[i].map((a, k) => Math.round(a + (at - i) * (scale[i + 1][k] - a)))})`;
}

function shade(name) {
  page.shade = name;
  document.querySelector(`[value=${name}]`).checked = true;
  $("ramp").style.background = `linear-gradient(90deg, ${range(7).map((i) => colourAt(i / 6))})`;
  $("ends").textContent = name === "nats" ? `0 to ${MOST} nats and more` : "unmasked early to late";
  render();
}

/** The number still masked against the step, and where steps are drawn ahead what is expected. */
function chart() {
  const most = Math.max(1, ...page.runs.map(gaps)), isTimed = page.runs[0].timed;
  const at = (n, k) => `${30 + (380 * k) / page.steps} ${125 - (115 * n) / most}`;
  const line = (ys) => `<path class="run" d="M${ys.map(at).join("L")}"/>`;
  const left = (run, k) => gaps(run) - [...run.draws.values()].filter((d) => d.step < k).length;
  const runs = page.runs.map((run) => line(range(page.shown + 1).map((k) => left(run, k))));
  const mean = isTimed ? `<path class="mean" d="M30 10L410 125"/>` : "";
  const label = (x, y, text) => `<text x="${x}" y="${y}" text-anchor="end">${text}</text>`;
  const axes = label(24, 14, most) + label(24, 128, 0) + label(410, 144, `step ${page.steps}`);
  const legend = isTimed ? label(410, 14, "dashed: expected") : "";
  $("chart").innerHTML = `<path d="M30 10V125H410"/>${mean}${runs.join("")}${axes}${legend}`;
}

/** What a token is, and what else it could have been, beside it. */
function showCard(span) {
  const run = page.runs[span.row], { token, draw } = shownAt(run, span.place), card = $("card");
  const name = (v) => ({ " ": "space", "\n": "newline" })[DATA.table[v]] ?? DATA.table[v];
  const when = draw && `p = ${draw.p.toFixed(3)}, step ${draw.step + 1}, call ${draw.call + 1}`;
  const lines = [`${name(token)}: ${when ?? "given"}`], nats = run.nats?.[span.place];
  for (const [v, p] of draw?.alternatives ?? [])
    lines.push(`${name(v).padEnd(8)} ${p.toFixed(3)} ${"▇".repeat(12 * p)}`);
  if (nats) lines.push(`${nats.toFixed(2)} nats`);
  card.hidden = token === MASK;
  card.textContent = lines.join("\n");
  span.ariaLabel = card.textContent.replaceAll("▇", "");
  const box = span.getBoundingClientRect(), most = document.documentElement.clientWidth;
  const below = box.bottom + card.offsetHeight + 12 < innerHeight;
  card.style.left = `${scrollX + clamp(box.left - 20, 8, most - card.offsetWidth - 8)}px`;
  card.style.top = `${scrollY + (below ? box.bottom + 6 : box.top - card.offsetHeight - 6)}px`;
}

// ---- 4. What is done ----------------------------------------------------------------------------
function listen() {
  const boards = $("boards"), hide = () => ($("card").hidden = true);
  const on = (act) => (event) => event.target.place !== undefined && act(event.target, event);
  let seen = null; // a click masks what the mouse or an earlier tap has shown
  const over = (span, { pointerType }) => (seen = pointerType === "mouse" ? span : seen);
  const click = (span) => (seen === span ? (hide(), remask(span)) : showCard((seen = span)));
  boards.onpointerover = on((span, event) => (over(span, event), showCard(span)));
  [boards.onpointerleave, boards.onclick] = [hide, on(click)];
  boards.addEventListener("focusin", on(showCard));
  boards.addEventListener("focusout", hide);
  boards.onkeydown = on((span, event) => {
    const { spans } = page.boards[span.row], i = span.place, by = { ArrowLeft: -1, ArrowRight: 1 };
    const to = spans[{ Home: 0, End: spans.length - 1 }[event.key] ?? i + by[event.key]];
    if (event.key === "Escape") hide();
    if (["Enter", "Delete", "Backspace"].includes(event.key)) remask(span);
    if (!to) return;
    event.preventDefault();
    [span.tabIndex, to.tabIndex] = [-1, 0];
    to.focus();
  });
  const step = (to) => (playing(false), seek(to));
  $("back").onclick = () => step(page.shown - 1);
  $("on").onclick = () => step(page.shown + 1);
  $("play").onclick = () => (page.playing ? playing(false) : play());
  $("slider").oninput = () => step(+$("slider").value);
  $("shades").onchange = ({ target }) => {
    shade(target.value);
    if (target.value === "nats") evaluate();
  };
}

/** The form: what is to be filled. */
function form() {
  const text = $("text"), start = () => begin(Array(+$("samples").value).fill(text.cells));
  const check = () => {
    text.setCustomValidity("");
    try {
      const ids = request(text.value);
      text.cells = ids.map((token) => ({ token }));
      $("length").textContent = `${ids.length} tokens, ${gaps({ start: ids })} masked`;
    } catch (error) {
      text.setCustomValidity(($("length").textContent = error.message)); // keeps it from being sent
    }
  };
  const fit = () => { // the fields that this sampler has
    for (const label of document.querySelectorAll("[data-of]")) {
      label.hidden = !label.dataset.of.split(" ").includes($("sampler").value);
      label.lastElementChild.disabled = label.hidden; // so that it cannot keep the form back
    }
  };
  for (const name in SAMPLERS) $("sampler").append(new Option(name.replaceAll("_", " "), name));
  for (const [key, value] of Object.entries(DATA.options)) $(key).value = value;
  $("sampler").onchange = fit;
  fit();
  $("mask").onclick = () => {
    const chosen = text.value.slice(text.selectionStart, text.selectionEnd);
    if (chosen) text.setRangeText(`___${encode(chosen).length}`);
    check();
  };
  [text.value, text.oninput] = [DATA.text, check];
  $("request").onsubmit = (event) => (event.preventDefault(), start(), play());
  check();
  start();
}

function recorded(run) { // one of trace.py: all is known
  const { steps } = run, draws = run.draws.map((draw) => [draw.place, { ...draw, steps }]);
  return { ...run, draws: new Map(draws), plan: [], past: run.start.map((token) => ({ token })) };
}

listen();
for (const id of ["request", "evaluation", "redo"]) $(id).hidden = !network;
$("about").textContent = DATA.about;
if (network) form();
else set(DATA.samples.map(recorded));
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
