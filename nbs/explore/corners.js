// Two weights between the corners of a grid, and the ellipses of equal loss through the nearest and the best corner.
(data, make) => {
  const least = (values) => values.indexOf(Math.min(...values));
  return {
    sliders: { correlation: "correlation of the inputs", second: "second weight" },
    digits: { correlation: 2, second: 2 },
    view: "-0.8 -1.7 2.6 2.5",
    width: "24rem",
    alt: "Four corners of the grid, the weight between them, and two ellipses of equal loss, one through the nearest and one through the best corner",
    caption: "The cross is the weight, the squares are the corners of the grid. The curves join all points that cost the same: dashed, as much as the nearest corner; solid, as much as the best.",
    draw: (at) => {
      const r = data.values.correlation[at.correlation], x = data.first, y = data.values.second[at.second];
      const loss = data.loss[at.correlation][at.second].map((v) => v / 1e4), best = least(loss);
      const apart = data.corners.map(([a, b]) => (a - x) ** 2 + (b - y) ** 2), closest = Math.min(...apart) + 1e-9;
      const near = least(loss.map((v, k) => (apart[k] <= closest ? v : Infinity)));  // of several, the better
      // the points with the same loss: eigenvalues 1 + r and 1 - r, axes at 45 degrees
      const contour = (k, more) => make("ellipse", { rx: Math.sqrt(loss[k] / (1 + r)), ry: Math.sqrt(loss[k] / (1 - r)),
        transform: `translate(${x} ${-y}) rotate(-45)`, fill: "none", "stroke-width": 2, ...more });
      const name = (k) => (k == near ? (loss[k] == loss[best] ? "nearest, and best" : "nearest") : k == best && loss[k] < loss[near] ? "best" : "");
      const marks = [
        contour(near, { class: "nearest", stroke: "#d55e00", "stroke-dasharray": "6 4" }),
        contour(best, { class: "best", stroke: "#009e73" }),
        ...data.corners.map(([a, b]) => make("rect", { x: a - 0.035, y: -b - 0.035, width: 0.07, height: 0.07, fill: "currentColor" })),
        make("path", { d: "M-.05-.05 .05 .05M-.05 .05 .05-.05", stroke: "currentColor", "stroke-width": 3, transform: `translate(${x} ${-y})` }),
        ...data.corners.map(([a, b], k) => make("text", { x: a + 0.07, y: -b - 0.06, "font-size": 0.1 }, `(${data.corners[k].join(", ")}) ${name(k)}`)),
      ];
      const say = (k) => `(${data.corners[k].join(", ")}) costs ${loss[k].toFixed(2)}`, ratio = loss[near] / loss[best];
      return [marks, loss[near] == loss[best] ? `The nearest corner ${say(near)}. None costs less.`
        : `The nearest corner ${say(near)}; the best one ${say(best)}, ${ratio < 1.05 ? "hardly less" : `${ratio < 9.95 ? ratio.toFixed(1) : ratio.toFixed(0)} times less`}.`];
    },
  };
}
