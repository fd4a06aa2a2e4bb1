// Sampling and the NELBO as sample.py and diffusion.py have them, of one sequence at a time.
// uniform(stream, place) is a uniform number: stream 0 is for the order, 1 for tokens, or 2 + call
// where every call draws anew. Whoever brings the same numbers gets the same tokens.

// Each sampler: (masked places, options, uniform) -> {steps, expected calls, plan}. The plan lists
// the calls: {due: places} or, if the network has a say, {choose}, which gets what is drawn at all
// masked places and returns what of it is unmasked. A step is its call, if not said. If the network
// decides how many calls there are, expected is null, and steps the most there can be until then.
const SAMPLERS = {
  ancestral: byTime,
  euler: byTime,
  any_order: (masked, o, uniform) => oneByOne(ordered(masked, (place) => uniform(0, place))),
  left_to_right: (masked) => oneByOne(masked),
  right_to_left: (masked) => oneByOne(masked.toReversed()),
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

const callByCall = (plan) => ({ steps: plan.length, expected: plan.length, plan });
const ordered = (places, by) => places.toSorted((a, b) => by(a) - by(b));
const mostProbable = (drawn) => drawn.sort((a, b) => b.p - a.p);
const oneByOne = (places) => callByCall(places.map((place) => ({ due: [place] })));
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

/** The step of each position, drawn before the first call; a step that unmasks nothing has none. */
function byTime(masked, o, uniform) {
  const n = o.steps, at = (place) => Math.floor(uniform(0, place) * n); // log-linear: all alike
  const due = (step) => ({ step, due: masked.filter((place) => at(place) === step) });
  const plan = [...new Set(ordered(masked, at).map(at))].map(due);
  return { steps: n, expected: n * (1 - (1 - 1 / n) ** masked.length), plan, timed: true };
}

/** One sample on its way: `call` asks the network once and unmasks what is due. */
class Run {
  constructor(network, start, o, uniform) {
    const tokens = [...start], mask = network.config.vocab_size, draws = new Map(); // by place
    this.masked = () => range(start.length).filter((place) => tokens[place] === mask);
    const order = range(start.length).filter((place) => start[place] !== mask); // as they come
    Object.assign(this, { network, start, tokens, o, uniform, draws, order, calls: 0 });
    Object.assign(this, SAMPLERS[o.sampler](this.masked(), o, uniform)); // steps, expected, plan
  }

  call() {
    const { step = this.calls, due, choose } = this.plan[this.calls];
    const places = due ?? this.masked();
    const drawn = logits(this.network, this.tokens, places, this.order).map((row, i) => {
      const u = this.uniform(due ? 1 : 2 + this.calls, places[i]);
      const draw = { place: places[i], step, call: this.calls };
      return Object.assign(draw, categorical(row, u, this.o.temperature));
    });
    const unmasked = due ? drawn : choose(drawn);
    for (const draw of unmasked) this.tokens[draw.place] = draw.token;
    for (const draw of unmasked) this.draws.set(draw.place, draw);
    this.order.push(...unmasked.map(({ place }) => place).sort((a, b) => a - b));
    this.calls++;
    if (this.calls < this.plan.length && !this.masked().length) // sooner than it might have been
      this.steps = this.plan.length = this.calls;
  }
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
function* nelbo(network, tokens, places, draws, uniform) {
  const n = places.length, inOrder = network.config.attention === "order";
  const rest = range(tokens.length).filter((place) => !places.includes(place));
  for (let i = 0; i < draws; i++) {
    const pair = i >> 1, low = (pair + 1 - uniform(-1, pair)) / draws, u = i % 2 ? 1 - low : low;
    const k = inOrder ? n : Math.min(1 + Math.floor(u * n), n), x = [...tokens];
    const masked = ordered(places, (place) => uniform(-2 - i, place)).slice(0, k);
    if (!inOrder) for (const place of masked) x[place] = network.config.vocab_size;
    yield logits(network, x, masked, [...rest, ...masked]).map((row, j) => ({
      place: masked[j], weight: n / k, ce: -Math.log(softmax(row)[tokens[masked[j]]]),
    }));
  }
}

/** A small counter-based generator: each number is a hash of (seed, row, stream, place). */
function generator(seed, row) {
  const mix = (z) => {
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
  return (stream, place) => {
    const key = [seed, row, stream].reduce((state, z) => mix(state + z + 0x9e3779b9), 0);
    const bits = (i) => mix(key + Math.imul(i + 1, 0x9e3779b9));
    return ((bits(2 * place) >>> 5) * 2 ** 26 + (bits(2 * place + 1) >>> 6)) / 2 ** 53;
  };
}
