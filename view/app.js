// The page: what is typed becomes runs of the sampler (class Run), what they draw coloured text.
// What is seen is a function of page.runs and of page.shown, the number of steps that were taken.

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent), MASK = DATA.mask_id;
const network = DATA.config && { config: DATA.config, weights: unpack(DATA) };
const page = {
  runs: [], boards: [], again: 0, shown: 0, shade: "step", seeking: null, playing: null,
  get steps() { return Math.max(1, ...this.runs.map((run) => run.steps)); }, // may yet be fewer
};
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const MOST = 4, DRAWS = 16; // nats at the end of the scale; draws of the NELBO

// ---- 1. Weights and text ------------------------------------------------------------------------
/** Matrices are 8-bit whole numbers times one bfloat16 number a row, vectors bfloat16. */
function unpack({ shapes, narrow, wide }) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const upper = Uint32Array.from(new Uint16Array(bytes(wide)), (z) => z << 16);
  const floats = new Float32Array(upper.buffer), small = new Int8Array(bytes(narrow));
  let i = 0, j = 0;
  return Object.fromEntries(Object.entries(shapes).map(([name, [n, D]]) => {
    const scales = Float64Array.from(floats.subarray(i, (i += n)));
    const row = (scale) => Float64Array.from(small.subarray(j, (j += D)), (q) => q * scale);
    return [name, D ? Array.from(scales, row) : scales];
  }));
}

const encode = (text) => DATA.tokenizer === "byte"
  ? [...new TextEncoder().encode(text)] : [...text].map((c) => DATA.table.indexOf(c));

/** Ids of a text with gaps, ___12 (___ alone is one of 8), and the problem with it, if any. */
function request(text) {
  const gap = /___(\d{0,4})/g, block = DATA.config.block_size;
  const ids = text.split(gap).flatMap((piece, i) => // text, the size of a gap, text, ...
    i % 2 ? Array(+(piece || 8)).fill(MASK) : encode(piece));
  const alien = [...text.replaceAll(gap, "")].find((c) => encode(c)[0] < 0);
  const problem = alien ? `‘${alien}’ is not among the ${MASK} characters of this model.`
    : ids.length > block ? `${ids.length} tokens, but the model reads ${block}.`
    : ids.includes(MASK) ? "" : "Nothing is masked: write ___12, or select and mask.";
  return { ids, problem };
}

// ---- 2. Runs ------------------------------------------------------------------------------------
/** New runs from cells, what each place shows: {token, and the draw of an earlier run, if any}. */
function begin(starts, again = 0) {
  const o = { sampler: $("sampler").value };
  for (const key of ["steps", "temperature", ...Object.keys(DATA.options)]) o[key] = +$(key).value;
  set(starts.map((past, i) => {
    const uniform = generator(+$("seed").value, i + 64 * again); // other numbers each time
    return Object.assign(new Run(network, past.map(({ token }) => token), o, uniform), { past });
  }), again);
}

function set(runs, again) {
  const shape = (runs) => runs.map((run) => run.start.length).join();
  if (shape(page.runs) !== shape(runs)) build(runs);
  Object.assign(page, { runs, again, shown: 0, seeking: null });
  playing(null);
  shade("step");
}

const next = ({ plan, calls }) => (calls < plan.length ? plan[calls].step ?? calls : Infinity);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const clamp = (z, low, high) => Math.max(low, Math.min(high, z));

/** Show what is there after so many steps; what is not yet known is asked of the network. */
async function seek(step) {
  const mine = (page.seeking = {}); // so a later one takes over
  for (;;) {
    const known = Math.min(...page.runs.map(next)), goal = clamp(step, 0, page.steps);
    page.shown = Math.min(goal, known); // what comes before `known` is drawn
    render();
    if (page.shown === goal) page.seeking = null;
    await sleep(0);
    if (page.seeking !== mine) return;
    page.runs.find((run) => next(run) === known).call();
  }
}

async function play() {
  const mine = playing({});
  if (page.shown === page.steps) page.shown = 0;
  while (page.playing === mine && page.shown < page.steps)
    await Promise.all([seek(page.shown + 1), sleep(clamp(8000 / page.steps, 30, 400))]);
  if (page.playing !== mine) return;
  playing(null);
  $("news").textContent = page.boards.map(({ text }) => text.textContent).join("; ");
}

/** Who plays: an object of its own, or null. */
function playing(by) {
  const [textContent, ariaLabel] = by ? ["❚❚", "Pause"] : ["▶\uFE0E", "Play"];
  Object.assign($("play"), { textContent, ariaLabel });
  return (page.playing = by);
}

/** What a place shows: a token, the mask where there is none yet, and the draw it is from. */
function shownAt(run, place) {
  if (run.start[place] !== MASK) return run.past[place];
  const draw = run.draws.get(place);
  if (!(draw?.step < page.shown)) return { token: MASK };
  return { token: draw.token, draw: { ...draw, steps: run.steps } };
}

/** Mask a token again: what is shown is the new beginning, and the model redoes what is masked. */
function remask({ row, place }) {
  const shown = page.runs.map((run) => run.start.map((_, i) => shownAt(run, i)));
  if (!network || shown[row][place].token === MASK) return;
  shown[row][place] = { token: MASK };
  begin(shown, page.again + 1);
  const { runs } = page;
  sleep(900).then(() => runs === page.runs && play()); // time to mask another
}

/** The NELBO of what was filled, given the rest; of each token the weighted mean of its terms. */
async function evaluate() {
  const { runs } = page;
  playing(null);
  await seek(page.steps);
  if (page.shown < page.steps) return shade("step"); // the slider was moved meanwhile
  for (const [i, run] of runs.entries()) {
    const places = range(run.start.length).filter((i) => run.draws.get(i) ?? run.past[i].draw);
    const nats = run.start.map(() => 0), weights = [...nats];
    for (const terms of nelbo(network, run.tokens, places, DRAWS, generator(0, i))) {
      for (const { place, weight, ce } of terms) nats[place] += weight * ce;
      for (const { place, weight } of terms) weights[place] += weight;
      await sleep(0);
      if (runs !== page.runs) return;
    }
    run.bound = nats.reduce((a, b) => a + b) / DRAWS / places.length;
    run.nats = nats.map((sum, place) => sum / weights[place]); // NaN where it was never masked
    render();
  }
}

// ---- 3. What is seen ----------------------------------------------------------------------------
const gaps = ({ start }) => start.filter((token) => token === MASK).length;
const before = (run, step) => [...run.draws.values()].filter((draw) => draw.step < step);

/** One board a run, one span a token; from here on only what has changed is written. */
function build(runs) {
  const board = (_, i) => `<figure class="panel"><h2>Sample ${i + 1}</h2><div class="text"
    role="group" aria-label="Sample ${i + 1}"></div><figcaption></figcaption></figure>`;
  $("boards").innerHTML = runs.map(board).join("");
  page.boards = runs.map(({ start }, row) => {
    const [, text, note] = $("boards").children[row].children;
    const field = (place) => ({ row, place, role: "button", tabIndex: place ? -1 : 0 });
    const span = (_, place) => Object.assign(document.createElement("span"), field(place));
    text.classList.toggle("grid", !!DATA.tokenizer); // characters, all of one width
    text.append(...start.map(span));
    return { text, note, spans: [...text.children] };
  });
}

function render() {
  page.runs.forEach((run, row) => {
    const drawn = before(run, page.shown), { note, spans } = page.boards[row];
    const calls = Math.max(0, ...drawn.map(({ call }) => call + 1));
    const bound = run.nats ? ` · NELBO ${run.bound.toFixed(2)} nats a token (${DRAWS} draws)` : "";
    const expected = run.expected === null ? "" : `, expected ${run.expected.toFixed(1)}`;
    const left = gaps(run) - drawn.length;
    note.textContent = `${plural(calls, "network call")}${expected} · ${left} masked${bound}`;
    for (const span of spans) paint(span, run, shownAt(run, span.place));
  });
  const t = (1 - page.shown / page.steps).toFixed(2);
  $("clock").textContent = `step ${page.shown} of ${page.steps}, t = ${t}`;
  Object.assign($("slider"), { max: page.steps, value: page.shown });
  chart();
}

function paint(span, run, { token, draw }) {
  const mine = run.draws.get(span.place);
  const fresh = mine && draw?.step === page.shown - 1 && page.shown < page.steps;
  const name = token === MASK ? "hole" : !draw ? "given" : fresh ? "drawn fresh" : "drawn";
  const room = DATA.tokenizer ? "·" : DATA.table[mine?.token] ?? "·"; // that it will need
  const [raw, newline] = token === MASK ? [room, " "] : [DATA.table[token], "↵\n"];
  const nats = (run.nats?.[span.place] || 0) / MOST, late = (draw?.step + 1) / draw?.steps;
  const at = `${Math.round(100 * Math.min(1, page.shade === "nats" ? nats : late))}%`;
  const colour = draw ? `color-mix(in oklch decreasing hue, var(--least), var(--most) ${at})` : "";
  const text = raw.replaceAll("\n", newline);
  if (span.state === name + colour + text) return;
  Object.assign(span, { state: name + colour + text, className: name, textContent: text });
  span.style.setProperty("--c", colour);
}

function shade(name) {
  page.shade = document.body.className = name; // by which the stylesheet chooses the two colours
  document.querySelector(`[value=${name}]`).checked = true;
  $("ends").textContent = name === "nats" ? `0 to ${MOST} nats and more` : "unmasked early to late";
  render();
  if (name === "nats") evaluate();
}

/** The number still masked against the step, and where steps are drawn ahead what is expected. */
function chart() {
  const most = Math.max(1, ...page.runs.map(gaps)), steps = range(page.shown + 1);
  const at = (n, k) => `${30 + (380 * k) / page.steps} ${125 - (115 * n) / most}`;
  const left = (run) => steps.map((k) => at(gaps(run) - before(run, k).length, k)).join("L");
  const lines = page.runs.map((run) => `<path class="run" d="M${left(run)}"/>`);
  const label = (x, y, text) => `<text x="${x}" y="${y}" text-anchor="end">${text}</text>`;
  const axes = label(24, 14, most) + label(24, 128, 0) + label(410, 144, `step ${page.steps}`);
  const mean = '<path stroke-dasharray="4 4" d="M30 10L410 125"/>';
  if (page.runs[0].timed) lines.push(mean, label(410, 14, "dashed: expected"));
  $("chart").innerHTML = `<path d="M30 10V125H410"/>${lines.join("")}${axes}`;
}

/** What a token is, and what else it could have been, beside it. */
function showCard(span) {
  const run = page.runs[span.row], { token, draw } = shownAt(run, span.place), card = $("card");
  const name = (v) => ({ " ": "space", "\n": "newline" })[DATA.table[v]] ?? DATA.table[v];
  const when = draw && `p = ${draw.p.toFixed(3)}, step ${draw.step + 1}, call ${draw.call + 1}`;
  const line = ([v, p]) => `${name(v).padEnd(8)} ${p.toFixed(3)} ${"▇".repeat(12 * p)}`;
  const nats = run.nats?.[span.place], lines = draw?.alternatives.map(line) ?? [];
  if (nats) lines.push(`${nats.toFixed(2)} nats`);
  const text = [`${name(token)}: ${when ?? "given"}`, ...lines].join("\n");
  Object.assign(card, { span, hidden: token === MASK, textContent: text });
  span.ariaLabel = text.replaceAll("▇", "");
  const box = span.getBoundingClientRect(), most = document.documentElement.clientWidth;
  const below = box.bottom + card.offsetHeight + 12 < innerHeight;
  card.style.left = `${scrollX + clamp(box.left - 20, 8, most - card.offsetWidth - 8)}px`;
  card.style.top = `${scrollY + (below ? box.bottom + 6 : box.top - card.offsetHeight - 6)}px`;
}

// ---- 4. What is done ----------------------------------------------------------------------------
function listen() {
  const area = $("boards"), hide = () => ($("card").hidden = true);
  const on = (act) => (event) => event.target.place !== undefined && act(event.target, event);
  area.onpointerover = on((span, { pointerType }) => pointerType !== "touch" && showCard(span));
  area.onpointerleave = hide;
  // A click masks what the pointer or an earlier tap has shown.
  area.onclick = on((span) => ($("card").span === span ? (hide(), remask(span)) : showCard(span)));
  area.addEventListener("focusin", on((span) => span.matches(":focus-visible") && showCard(span)));
  area.addEventListener("focusout", hide);
  area.onkeydown = on((span, event) => {
    const { spans } = page.boards[span.row], i = span.place, last = spans.length - 1;
    const to = spans[{ ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: last }[event.key]];
    const masks = ["Enter", " ", "Delete", "Backspace"].includes(event.key);
    if (masks || event.key === "Escape") hide();
    if (masks) remask(span);
    if (masks || to) event.preventDefault();
    if (!to) return;
    [span.tabIndex, to.tabIndex] = [-1, 0];
    to.focus();
  });
  const step = (to) => (playing(null), seek(to));
  $("back").onclick = () => step(page.shown - 1);
  $("on").onclick = () => step(page.shown + 1);
  $("play").onclick = () => (page.playing ? playing(null) : play());
  $("slider").oninput = () => step(+$("slider").value);
  $("shades").onchange = ({ target }) => shade(target.value);
}

/** The form: what is to be filled. */
function form() {
  const text = $("text"), start = () => begin(Array(+$("samples").value).fill(text.cells));
  const check = () => {
    const { ids, problem } = request(text.value);
    text.cells = ids.map((token) => ({ token }));
    text.setCustomValidity(problem); // keeps it from being sent
    $("length").textContent = problem || `${plural(ids.length, "token")}, ${gaps({ start: ids })} masked`;
  };
  const fit = () => { // the fields that this sampler has
    for (const label of document.querySelectorAll("[data-of]")) {
      label.hidden = !label.dataset.of.split(" ").includes($("sampler").value);
      label.control.disabled = label.hidden; // so that it cannot keep the form back
    }
  };
  for (const name in SAMPLERS) $("sampler").append(new Option(name.replaceAll("_", " "), name));
  for (const [key, value] of Object.entries({ text: DATA.text, ...DATA.options }))
    $(key).value = value;
  $("mask").onclick = () => {
    const chosen = text.value.slice(text.selectionStart, text.selectionEnd);
    if (chosen) text.setRangeText(`___${encode(chosen).length}`);
    check();
  };
  [text.oninput, $("sampler").onchange] = [check, fit];
  $("request").onsubmit = (event) => (event.preventDefault(), start(), play());
  check();
  fit();
  start();
}

listen();
for (const id of ["request", "evaluation", "redo"]) $(id).hidden = !network;
$("about").textContent = DATA.about;
if (network) form();
else set(DATA.samples.map((run) => ({ // of watch.py: all is known
  ...run, draws: new Map(run.draws.map((draw) => [draw.place, draw])), plan: [],
  past: run.start.map((token) => ({ token })),
})));
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
