// Bits for each kind of linear, what they are expected to cost in KL, and the best that the same size could have bought.
(data, make) => {
  const menu = data.menu, total = data.sizes.reduce((a, b) => a + b);
  const size = (pick) => pick.reduce((a, k, i) => a + data.sizes[i] * menu[k], 0) / total, cost = (pick) => pick.reduce((a, k, i) => a + data.losses[i][k], 0);
  const all = [[]];  // every choice, by size
  for (const _ of data.kinds) all.push(...all.splice(0).flatMap((pick) => menu.map((_, k) => [...pick, k])));
  const sorted = all.map((pick) => [size(pick), cost(pick), pick]).sort((a, b) => a[0] - b[0]);
  let least = [0, Infinity];
  const best = sorted.map((one) => (least = one[1] < least[1] ? one : least));
  const every = data.losses.flat(), least_one = Math.min(...every) / 2;
  const long = (v) => (430 * Math.log(v / least_one)) / Math.log(Math.max(...every) / least_one);  // a bar, on a logarithmic scale
  const name = (kind) => kind.replace("_proj", "");
  return {
    sliders: Object.fromEntries(data.kinds.map((kind) => [kind, `bits of ${name(kind)}`])),
    view: "0 0 600 215",
    width: "36rem",
    alt: "A bar for each kind of linear: the KL that its bits are expected to cost",
    caption: "Bars: the KL that each kind is expected to cost, rounded to nearest, all blocks together, on a logarithmic scale. Sizes count codes alone.",
    draw: (at) => {
      const pick = data.kinds.map((kind) => at[kind]), here = size(pick), spent = cost(pick);
      const marks = data.kinds.flatMap((kind, i) => [
        make("text", { x: 60, y: 22 + 28 * i, "font-size": 14, "text-anchor": "end" }, name(kind)),
        make("rect", { class: "price", x: 68, y: 9 + 28 * i, width: long(data.losses[i][pick[i]]), height: 18, fill: i < 4 ? "#0072b2" : "#d55e00" }),
        make("text", { x: 74 + long(data.losses[i][pick[i]]), y: 22 + 28 * i, "font-size": 13 }, data.losses[i][pick[i]].toPrecision(2)),
      ]);
      let low = 0, high = sorted.length - 1;  // the last choice that is no larger
      while (low < high) { const middle = (low + high + 1) >> 1; sorted[middle][0] <= here + 1e-9 ? (low = middle) : (high = middle - 1); }
      const [, lowest, ideal] = best[low], bits = ideal.map((k, i) => `${name(data.kinds[i])} ${menu[k]}`).join(", ");
      const sum = `${here.toFixed(2)} bits on average are expected to cost a KL of ${spent.toFixed(3)}.`;
      return [marks, spent < 1.005 * lowest ? `${sum} By kinds, no choice with as many bits costs less.` : `${sum} With no more bits it could be ${lowest.toFixed(3)}: ${bits}.`];
    },
  };
}
