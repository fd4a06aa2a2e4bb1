// The network of model.py once more, in plain JavaScript: one sequence, in float64, to be read.
//
//     h = embed(tokens)                          (n, D), one Float64Array, as are all tables
//     h = h + proj(attention(norm1(h)))          in each block
//     h = h + mlp(norm2(h))
//     logits = unembed(norm(h))                  (N, V)

const range = (n) => Array.from({ length: n }, (_, i) => i);

// Who sees whom. The rows that the network reads: the places (n,) and the ids (n,) of them, which
// rows are asked, and how many of the first rows each row sees beside itself.
const ATTENTION = {
  full: (tokens, asked) =>
    ({ places: range(tokens.length), ids: tokens, asked, seen: () => tokens.length }),
  /** A start token, clean tokens in `order`, and queries: a token of the order sees what is before
   *  it, and so does a query of its place; a query of another place sees all of the order. */
  order: (tokens, positions, order, mask) => {
    const n = 1 + order.length, ids = order.map((place) => tokens[place]);
    const turn = new Map(order.map((place, i) => [place, 1 + i]));
    return {
      places: [0, ...order, ...positions], ids: [mask, ...ids, ...positions.map(() => mask)],
      asked: positions.map((_, i) => n + i),
      seen: (row) => (row < n ? row : turn.get(positions[row - n]) ?? n),
    };
  },
};

/** tokens (L,) of which some are masked, positions (N,) to predict -> N arrays of V logits.
 *  order: the visible places as an `order` network reads them; left to right if it is not given. */
function logits(network, tokens, positions, order) {
  const { n_layer, n_embd: D, vocab_size: V, attention } = network.config;
  order ??= range(tokens.length).filter((place) => tokens[place] !== V);
  const { places, ids, asked, seen } = ATTENTION[attention](tokens, positions, order, V);
  const all = range(places.length);
  let h = take(network.weights["embed.weight"].data, D, ids);
  for (let b = 0; b < n_layer; b++) // of the last block only what is asked for matters
    h = block(network, `blocks.${b}.`, h, { places, seen, rows: b < n_layer - 1 ? all : asked });
  const out = linear(network, "unembed", norm(network, "norm", h)); // (N, V)
  return positions.map((_, i) => out.subarray(i * V, (i + 1) * V));
}

function block(network, name, h, layout) {
  const y = attention(network, name, norm(network, name + "norm1", h), layout); // (rows, D)
  h = add(take(h, network.config.n_embd, layout.rows), linear(network, name + "proj", y));
  return add(h, mlp(network, name + "mlp.", norm(network, name + "norm2", h)));
}

/** Each of layout.rows reads what it sees: z (n, D) -> (rows, D). */
function attention(network, name, z, { places, seen, rows }) {
  const { n_head, n_embd: D } = network.config, d = D / n_head, width = 3 * D;
  const qkv = linear(network, name + "qkv", z); // (n, 3, H, d)
  for (const [i, place] of places.entries())
    for (let at = i * width; at < i * width + 2 * D; at += d) // each head's query, then its key
      put(network.config, qkv.subarray(at, at + d), place);
  const y = new Float64Array(rows.length * D), p = new Float64Array(places.length);
  for (let head = 0; head < n_head; head++)
    for (const [i, row] of rows.entries()) {
      const first = seen(row), n = first + (row >= first); // a row sees itself, too
      const key = (j) => (j < first ? j : row) * width + D + head * d;
      let most = -Infinity, total = 0;
      for (let j = 0; j < n; j++) {
        let score = 0;
        for (let q = row * width + head * d, k = key(j), end = q + d; q < end; q++, k++)
          score += qkv[q] * qkv[k];
        p[j] = score / Math.sqrt(d);
        most = Math.max(most, p[j]);
      }
      for (let j = 0; j < n; j++) total += p[j] = Math.exp(p[j] - most);
      for (let j = 0; j < n; j++) {
        const weight = p[j] / total;
        for (let out = i * D + head * d, v = key(j) + D, end = out + d; out < end; out++, v++)
          y[out] += weight * qkv[v];
      }
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
  const kind = network.config.mlp, up = linear(network, name + "up", h); // (n, width)
  const gate = kind === "swiglu" && linear(network, name + "gate", h); // (n, width)
  const inside = {
    gelu: (z) => z / (1 + Math.exp(-Math.sqrt(8 / Math.PI) * (z + 0.044715 * z * z * z))), // tanh
    relu2: (z) => Math.max(z, 0) ** 2,
    swiglu: (z, i) => (z * gate[i]) / (1 + Math.exp(-gate[i])),
  };
  return linear(network, name + "down", up.map(inside[kind]));
}

const rootMeanSquare = (z, eps) => Math.sqrt(z.reduce((sum, x) => sum + x * x, 0) / z.length + eps);

/** RMSNorm or LayerNorm of each row: (n, D) -> (n, D). */
function norm({ config, weights }, name, h) {
  const D = config.n_embd, w = weights[name + ".weight"].data, out = new Float64Array(h.length);
  const bias = weights[name + ".bias"]?.data, isLayer = config.norm === "layer";
  for (let start = 0; start < h.length; start += D) {
    const row = h.subarray(start, start + D), mean = isLayer ? row.reduce((a, b) => a + b) / D : 0;
    const centred = row.map((z) => z - mean), scale = 1 / rootMeanSquare(centred, 1e-5);
    out.set(centred.map((z, i) => z * scale * w[i] + (bias?.[i] ?? 0)), start);
  }
  return out;
}

/** x W^T + bias: x (n, in) -> (n, out). Four rows at a time, as each weight that is read costs. */
function linear({ weights }, name, x) {
  const { shape, data: W } = weights[name + ".weight"], bias = weights[name + ".bias"]?.data;
  const [out, D] = shape, n = x.length / D, y = new Float64Array(n * out);
  for (let i = 0; i < n; i += 4) {
    const [r0, r1, r2, r3] = [0, 1, 2, 3].map((r) => Math.min(i + r, n - 1)); // the last one again
    const [x0, x1, x2, x3] = [r0 * D, r1 * D, r2 * D, r3 * D];
    for (let o = 0; o < out; o++) {
      let y0 = bias?.[o] ?? 0, y1 = y0, y2 = y0, y3 = y0;
      for (let k = 0, w = o * D; k < D; k++, w++) {
        y0 += W[w] * x[x0 + k]; y1 += W[w] * x[x1 + k];
        y2 += W[w] * x[x2 + k]; y3 += W[w] * x[x3 + k];
      }
      y[r0 * out + o] = y0; y[r1 * out + o] = y1;
      y[r2 * out + o] = y2; y[r3 * out + o] = y3;
    }
  }
  return y;
}

const add = (a, b) => a.map((z, i) => z + b[i]);

/** Some rows of a table (n, D): (rows, D). */
function take(table, D, rows) {
  const out = new Float64Array(rows.length * D);
  rows.forEach((row, i) => out.set(table.subarray(row * D, (row + 1) * D), i * D));
  return out;
}
