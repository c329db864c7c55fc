// The histogram of a row of weights, the values of a grid that covers a share of its range, and the error for all shares.
(data, make) => {
  const ends = data.grids.flatMap((some, i) => some.flatMap(([first, scale]) => [first, first + (2 ** data.values.bits[i] - 1) * scale]));
  const low = Math.min(data.low, ...ends), high = Math.max(data.high, ...ends), most = Math.max(...data.counts);
  const x = (w) => 10 + (580 * (w - low)) / (high - low), bar = ((x(data.high) - x(data.low)) / data.counts.length);
  const shares = data.values.share, at_share = (j) => 50 + (520 * j) / (shares.length - 1);
  const percent = (v) => `${(100 * v).toFixed(1)} %`, whole = (v) => `${(100 * v).toFixed(0)} %`;
  return {
    sliders: { bits: "bits", share: "share of the range" },
    digits: { share: 2 },
    view: "0 0 600 330",
    width: "36rem",
    alt: "Histogram of a row of weights with the values of a grid as vertical lines; below, the error for each share of the range",
    caption: "Above: the row's weights, and the values that they may take. Below: the error for every share, for these bits (root mean square, relative to the standard deviation of the weights); the dot is where the slider stands, the ring the least.",
    draw: (at) => {
      const [first, scale] = data.grids[at.bits][at.share], n = 2 ** data.values.bits[at.bits];
      const errors = data.errors[at.bits], best = errors.indexOf(Math.min(...errors)), top = Math.max(...errors);
      const y = (v) => 305 - (70 * v) / top;
      const values = Array.from({ length: n }, (_, k) => first + k * scale);
      const marks = [
        ...data.counts.map((c, k) => make("rect", { x: x(data.low) + k * bar, y: 200 - (180 * c) / most, width: bar - 0.7, height: (180 * c) / most, fill: "#56b4e9" })),
        make("path", { d: "M10 200H590", stroke: "currentColor" }),
        ...values.map((v) => make("path", { class: "value", d: `M${x(v)} 8V206`, stroke: "#d55e00", "stroke-width": 2 })),
        make("text", { x: x(0), y: 222, "font-size": 14, "text-anchor": "middle" }, "0"),
        ...[0, 4, 8, 12, 16].filter((j) => j < shares.length).map((j) => make("text", { x: at_share(j), y: 322, "font-size": 13, "text-anchor": "middle" }, shares[j])),
        make("text", { x: 30, y: 275, "font-size": 13, "text-anchor": "end" }, "error"),
        make("polyline", { points: errors.map((v, j) => `${at_share(j)},${y(v)}`).join(" "), fill: "none", stroke: "currentColor" }),
        make("circle", { cx: at_share(best), cy: y(errors[best]), r: 7, fill: "none", stroke: "#009e73", "stroke-width": 2 }),
        make("circle", { class: "here", cx: at_share(at.share), cy: y(errors[at.share]), r: 4, fill: "#d55e00" }),
      ];
      const here = `${n} values on ${whole(shares[at.share])} of the range leave an error of ${percent(errors[at.share])}.`;
      return [marks, at.share == best ? `${here} No other share leaves less.`
        : `${here} The least, ${percent(errors[best])}, is left at ${whole(shares[best])}.`];
    },
  };
}
