// Sampling and the NELBO as sample.py and diffusion.py have them, of one sequence at a time.
// uniforms(stream, n) brings the n uniform numbers of one stream: 0 for the order, 1 for tokens, or
// 2 + call where every call draws anew. Whoever brings the same numbers gets the same tokens.

// Each sampler: (masked places, options, uniforms) -> {steps, expected calls, plan}. The plan lists
// the calls: {step, due: places} or, where the network has a say in it, {step, choose}: choose gets
// what is drawn at all masked places and returns what of it is unmasked. Where the network decides
// how many calls there are, expected is null, and steps the most there can be until it is done.
const SAMPLERS = {
  ancestral: byTime,
  euler: byTime,
  any_order: (masked, o, uniforms) => {
    const u = uniforms(0, o.length);
    return callByCall(masked.toSorted((a, b) => u[a] - u[b]).map((place) => ({ due: [place] })));
  },
  left_to_right: (masked) => callByCall(masked.map((place) => ({ due: [place] }))),
  right_to_left: (masked) => callByCall(masked.toReversed().map((place) => ({ due: [place] }))),
  confidence: (masked, o) => mostConfident(evenly(masked.length, Math.min(masked.length, o.steps))),
  smdm_greedy: (masked, o) => mostConfident(smdmCounts(masked.length, o.steps)),
  threshold: (masked, o) => untilDone(masked, (drawn) =>
    mostProbable(drawn).filter(({ p }, i) => i === 0 || p >= o.threshold)),
  entropy_bound: (masked, o) => untilDone(masked, (drawn) => {
    let sum = 0; // of the entropies, the largest included
    return drawn.sort((a, b) => a.entropy - b.entropy)
      .filter(({ entropy }) => (sum += entropy) - entropy <= o.max_entropy);
  }),
};

const mostProbable = (drawn) => drawn.sort((a, b) => b.p - a.p);
const mostConfident = (counts) => callByCall(
  counts.map((n) => ({ choose: (drawn) => mostProbable(drawn).slice(0, n) })));
const untilDone = (masked, choose) =>
  ({ ...callByCall(masked.map(() => ({ choose }))), expected: null });
const evenly = (n, steps) => range(steps).map((i) => Math.ceil((n - i) / steps));

/** SMDM's rounding, in float32 as there. */
function smdmCounts(n, steps) {
  const f = Math.fround, end = f(1e-5), size = f((end - 1) / steps);
  const t = (i) => (i < (steps + 1) >> 1 ? f(1 + f(size * i)) : f(end - f(size * (steps - i))));
  return range(steps).map((i) => {
    const count = i < steps - 1 ? Math.trunc(f(n * f(1 - f(t(i + 1) / t(i))))) : n;
    n -= count;
    return count;
  }).filter((count) => count);
}

function callByCall(calls) {
  const plan = calls.map((call, step) => ({ step, ...call }));
  return { steps: plan.length, expected: plan.length, plan };
}

/** The step of each position, drawn before the first call; a step that unmasks nothing has none. */
function byTime(masked, o, uniforms) {
  const n = o.steps, u = uniforms(0, o.length); // log-linear: each step is as likely as the others
  const at = (place) => Math.floor(u[place] * n), steps = new Set(masked.map(at));
  const due = (step) => masked.filter((place) => at(place) === step);
  const plan = [...steps].sort((a, b) => a - b).map((step) => ({ step, due: due(step) }));
  return { steps: n, expected: n * (1 - (1 - 1 / n) ** masked.length), plan, timed: true };
}

/** One sample on its way: `call` asks the network once and unmasks what is due. */
class Run {
  constructor(network, start, options, uniforms) {
    const draws = new Map(), o = { ...options, length: start.length }; // draws: place -> its draw
    const tokens = [...start], mask = network.config.vocab_size;
    this.masked = () => range(start.length).filter((place) => tokens[place] === mask);
    const order = range(start.length).filter((place) => start[place] !== mask); // as they come
    Object.assign(this, { network, start, tokens, o, uniforms, draws, order, calls: 0 });
    Object.assign(this, SAMPLERS[o.sampler](this.masked(), o, uniforms)); // steps, expected, plan
  }

  call() {
    const { step, due, choose } = this.plan[this.calls], places = due ?? this.masked();
    const u = this.uniforms(due ? 1 : 2 + this.calls, this.tokens.length);
    const drawn = logits(this.network, this.tokens, places, this.order).map((row, i) => {
      const when = { place: places[i], step, steps: this.steps, call: this.calls };
      return { ...when, ...categorical(row, u[places[i]], this.o.temperature) };
    });
    const unmasked = due ? drawn : choose(drawn);
    for (const draw of unmasked) this.tokens[draw.place] = draw.token;
    for (const draw of unmasked) this.draws.set(draw.place, draw);
    this.order.push(...unmasked.map(({ place }) => place).sort((a, b) => a - b));
    this.calls++;
    if (this.calls < this.plan.length && !this.masked().length) { // sooner than it might have been
      this.steps = this.plan.length = this.calls;
      for (const draw of this.draws.values()) draw.steps = this.steps;
    }
  }
}

/** Softmax in float64: logits (V,) -> p (V,). */
function softmax(row, temperature = 1) {
  const most = row.reduce((a, b) => Math.max(a, b));
  const p = row.map((z) => Math.exp((z - most) / temperature)), sum = p.reduce((a, b) => a + b);
  return p.map((z) => z / sum);
}

/** Invert the distribution function at u: {token, p, the entropy (nats, at temperature 1),
 *  alternatives: the five likeliest, [v, p]}. */
function categorical(row, u, temperature) {
  const p = softmax(row, temperature || 1), ranked = range(p.length).sort((a, b) => p[b] - p[a]);
  let sum = 0;
  const edges = p.map((z) => (sum += z)), drawn = edges.findIndex((edge) => edge > u * sum);
  const token = temperature === 0 ? ranked[0] : drawn < 0 ? p.length - 1 : drawn;
  const entropy = softmax(row).reduce((total, q) => total - (q && q * Math.log(q)), 0);
  return { token, p: p[token], entropy, alternatives: ranked.slice(0, 5).map((v) => [v, p[v]]) };
}

/** Yield, `draws` times, the terms of the any_order bound on -log p(tokens at places | rest). Each
 *  draw masks some of them or, for an `order` network, has the whole chain rule along one order. */
function* nelbo(network, tokens, places, draws, uniforms) {
  const inOrder = network.config.attention === "order", filled = new Set(places);
  const rest = range(tokens.length).filter((place) => !filled.has(place));
  const n = places.length, jitter = uniforms(-1, draws / 2);
  for (let i = 0; i < draws; i++) {
    const low = ((i >> 1) + 1 - jitter[i >> 1]) / draws, u = i % 2 ? 1 - low : low; // in pairs
    const noise = uniforms(-2 - i, tokens.length);
    const k = inOrder ? n : Math.min(1 + Math.floor(u * n), n), x = [...tokens];
    const masked = places.toSorted((a, b) => noise[a] - noise[b]).slice(0, k);
    if (!inOrder) for (const place of masked) x[place] = network.config.vocab_size;
    const rows = logits(network, x, masked, inOrder ? [...rest, ...masked] : undefined);
    const p = rows.map((row, j) => softmax(row)[tokens[masked[j]]]);
    yield masked.map((place, j) => ({ place, weight: n / k, ce: -Math.log(p[j]) }));
  }
}

/** A small counter-based generator: each number is a hash of (seed, row, stream, its place). */
function generator(seed, row) {
  const mix = (z) => {
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
  return (stream, n) => {
    const key = [seed, row, stream].reduce((state, z) => mix(state + z + 0x9e3779b9), 0);
    const bits = (i) => mix(key + Math.imul(i + 1, 0x9e3779b9));
    return range(n).map((i) => ((bits(2 * i) >>> 5) * 2 ** 26 + (bits(2 * i + 1) >>> 6)) / 2 ** 53);
  };
}
