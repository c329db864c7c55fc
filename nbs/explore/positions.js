// G, turned back by the rotation of each position and averaged over the first of them.
(data, make) => {
  const d = data.matrices[0].length, cell = 280 / d;
  return {
    sliders: { positions: "positions in the mean" },
    view: "0 0 300 300",
    width: "20rem",
    alt: "Heat map of a matrix of a head; with more positions in the mean, what couples fast planes to others fades",
    caption: "Blue is positive, orange negative. Rows and columns are the features of a head: the first half and the second half of each plane of the rotation, from fast to slow.",
    draw: (at) => {
      const M = data.matrices[at.positions], marks = [];
      M.forEach((row, i) => row.forEach((v, j) => marks.push(make("rect", { x: 10 + j * cell, y: 10 + i * cell, width: cell, height: cell,
        fill: v > 0 ? "#0072b2" : "#d55e00", opacity: Math.sqrt(Math.abs(v) / 1000) }))));
      marks.push(make("path", { d: "M10 10H290V290H10ZM150 10V290M10 150H290", fill: "none", stroke: "currentColor", "stroke-width": 0.7 }));
      const all = M.flat().reduce((a, v) => a + v * v, 0), n = data.values.positions[at.positions];
      // in a plane, features i and i + d/2, a full turn leaves of any matrix the same number at both
      const turned = Array.from({ length: d / 2 }, (_, i) => (M[i][i] + M[i + d / 2][i + d / 2]) ** 2 / 2).reduce((a, v) => a + v);
      return [marks, `Mean over ${n} position${n > 1 ? "s" : ""}: ${(100 - (100 * turned) / all).toFixed(0)} % of the squared entries are left of what full turns of all planes would take away.`];
    },
  };
}
