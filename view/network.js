// The network of model.py once more, in plain JavaScript: one sequence, in float64, to be read.
//
//     h = embed(tokens)                          n rows (D,): every table is a list of its rows
//     h = h + proj(attention(norm1(h)))          in each block
//     h = h + mlp(norm2(h))
//     logits = unembed(norm(h))                  N rows (V,)

const range = (n) => Array.from({ length: n }, (_, i) => i);
const add = (a, b) => a.map((row, i) => row.map((z, j) => z + b[i][j]));

// Who sees whom. The rows that the network reads: the places (n,) and the ids (n,) of them, the
// rows that each row sees, and which rows are asked.
const ATTENTION = {
  full: (tokens, asked) => ({
    places: range(tokens.length), ids: tokens, sees: tokens.map(() => range(tokens.length)), asked,
  }),
  /** A start token, clean tokens in `order`, and queries: a token of the order sees what is before
   *  it, and so does a query of its place; a query of another place sees all of the order. */
  order: (tokens, positions, order, mask) => {
    const n = 1 + order.length, ids = order.map((place) => tokens[place]);
    const turn = new Map(order.map((place, i) => [place, 1 + i]));
    const before = [...range(n), ...positions.map((place) => turn.get(place) ?? n)];
    return {
      places: [0, ...order, ...positions], ids: [mask, ...ids, ...positions.map(() => mask)],
      sees: before.map((rows, i) => [...range(rows), i]), asked: positions.map((_, i) => n + i),
    };
  },
};

/** tokens (L,) of which some are masked, positions (N,) to predict -> N rows of V logits.
 *  order: the visible places as an `order` network reads them; left to right if it is not given. */
function logits(network, tokens, positions, order) {
  const { n_layer, vocab_size: V, attention } = network.config;
  order ??= range(tokens.length).filter((place) => tokens[place] !== V);
  const { asked, ids, ...layout } = ATTENTION[attention](tokens, positions, order, V);
  let h = ids.map((id) => network.weights["embed.weight"][id]);
  for (let b = 0; b < n_layer; b++) h = block(network, `blocks.${b}.`, h, layout);
  return linear(network, "unembed", norm(network, "norm", asked.map((row) => h[row])));
}

function block(network, name, h, layout) {
  const y = attention(network, name, norm(network, name + "norm1", h), layout);
  h = add(h, linear(network, name + "proj", y));
  return add(h, mlp(network, name + "mlp.", norm(network, name + "norm2", h)));
}

/** Each row reads those it sees: h, n rows (D,) -> n rows (D,). */
function attention(network, name, h, { places, sees }) {
  const { n_head, n_embd: D } = network.config, d = D / n_head;
  const qkv = linear(network, name + "qkv", h), y = h.map(() => new Float64Array(D)); // (3D,)
  for (let at = 0; at < D; at += d) { // each head
    const part = (start) => qkv.map((row) => row.subarray(start, start + d)); // (d,)
    const [q, k, v] = [part(at), part(D + at), part(2 * D + at)];
    places.forEach((place, i) => [q[i], k[i]].forEach((z) => put(network.config, z, place)));
    sees.forEach((seen, i) => {
      const p = softmax(seen.map((j) => dot(q[i], k[j]) / Math.sqrt(d))); // (seen,)
      const out = y[i].subarray(at, at + d); // (d,)
      p.forEach((weight, n) => {
        const value = v[seen[n]];
        for (let c = 0; c < d; c++) out[c] += weight * value[c];
      });
    });
  }
  return y;
}

/** A query or key (d,), normalised if it is to be, and turned to its place, in place. */
function put(config, z, place) {
  const half = z.length / 2, scale = config.qk_norm ? 1 / rootMeanSquare(z, 2 ** -23) : 1;
  for (let i = 0; i < half; i++) {
    const angle = place * 10000 ** (-i / half), cos = Math.cos(angle), sin = Math.sin(angle);
    const a = z[i] * scale, b = z[i + half] * scale;
    z[i] = a * cos - b * sin;
    z[i + half] = b * cos + a * sin;
  }
}

function mlp(network, name, h) {
  const up = linear(network, name + "up", h); // (width,)
  const gate = network.config.mlp === "swiglu" && linear(network, name + "gate", h); // (width,)
  const inside = {
    gelu: (z) => z / (1 + Math.exp(-Math.sqrt(8 / Math.PI) * (z + 0.044715 * z * z * z))), // tanh
    relu2: (z) => Math.max(z, 0) ** 2,
    swiglu: (z, g) => (z * g) / (1 + Math.exp(-g)),
  }[network.config.mlp];
  const wide = up.map((row, i) => row.map((z, j) => inside(z, gate[i]?.[j])));
  return linear(network, name + "down", wide);
}

/** RMSNorm or LayerNorm of each row. */
function norm({ config, weights }, name, h) {
  const w = weights[name + ".weight"], bias = weights[name + ".bias"]; // (D,)
  return h.map((row) => {
    const mean = config.norm === "layer" ? row.reduce((a, b) => a + b) / row.length : 0;
    const centred = row.map((z) => z - mean), scale = 1 / rootMeanSquare(centred, 1e-5);
    return centred.map((z, i) => z * scale * w[i] + (bias?.[i] ?? 0));
  });
}

/** W x + bias of each row x (in,) -> (out,). */
function linear({ weights }, name, h) {
  const W = weights[name + ".weight"], bias = weights[name + ".bias"]; // out rows (in,)
  return h.map((x) => new Float64Array(W.length).map((_, o) => dot(W[o], x) + (bias?.[o] ?? 0)));
}

const rootMeanSquare = (z, eps) => Math.sqrt(dot(z, z) / z.length + eps);

/** Four sums side by side, as a processor adds them faster than one long one. */
function dot(a, b) {
  let n = a.length, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (; n % 4; n--) s0 += a[n - 1] * b[n - 1];
  for (let i = 0; i < n; i += 4) {
    s0 += a[i] * b[i]; s1 += a[i + 1] * b[i + 1];
    s2 += a[i + 2] * b[i + 2]; s3 += a[i + 3] * b[i + 3];
  }
  return s0 + s1 + s2 + s3;
}

/** logits (V,) -> p (V,). */
function softmax(z, temperature = 1) {
  const most = z.reduce((a, b) => Math.max(a, b));
  const p = z.map((x) => Math.exp((x - most) / temperature)), sum = p.reduce((a, b) => a + b);
  return p.map((x) => x / sum);
}
