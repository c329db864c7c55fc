// What one head attends to, and how much each token then counts for V: the diagonal of A^T A.
(data, make) => {
  const n = data.tokens.length, cell = 288 / n;
  return {
    sliders: { block: "block", head: "head" },
    view: "0 0 600 330",
    width: "38rem",
    alt: "Heat map of the attention of a head, and bars of what each token has of the diagonal of A-transposed times A",
    caption: "Left: attention, a row for each query, a stronger blue is more. Right: the diagonal of A-transposed times A, by token, as shares; the line is the identity of the layer-wise loss, for which all tokens are alike.",
    draw: (at) => {
      const A = data.attention[at.block][at.head], share = Array(n).fill(0), marks = [];
      A.forEach((row, m) => row.forEach((v, j) => {
        share[j] += v * v;
        if (v) marks.push(make("rect", { x: j * cell, y: 20 + m * cell, width: cell, height: cell, fill: "#0072b2", opacity: Math.sqrt(v / 1000) }));
      }));
      const total = share.reduce((a, b) => a + b), part = share.map((v) => v / total), top = Math.max(...part), at_top = part.indexOf(top);
      marks.push(make("path", { d: "M0 20H288V308H0Z", fill: "none", stroke: "currentColor" }));
      part.forEach((v, j) => {
        marks.push(make("rect", { class: "share", x: 385, y: 21 + j * cell, width: (205 * v) / top, height: cell - 2, fill: j == at_top ? "#d55e00" : "#e69f00" }));
        marks.push(make("text", { x: 380, y: 20 + (j + 0.8) * cell, "font-size": 11, "text-anchor": "end" }, data.tokens[j]));
      });
      const line = 385 + 205 / n / top;
      marks.push(make("path", { d: `M${line} 16V308`, stroke: "currentColor", "stroke-dasharray": "4 3" }));
      marks.push(make("text", { x: 144, y: 325, "font-size": 13, "text-anchor": "middle" }, "token looked at"));
      const effective = 1 / part.reduce((a, v) => a + v * v, 0);
      return [marks, `“${data.tokens[at_top]}”, token ${at_top + 1} of ${n}, has ${(100 * top).toFixed(0)} % of the diagonal; layer-wise each has ${(100 / n).toFixed(0)} %. Effective number of tokens: ${effective.toFixed(1)} of ${n}.`];
    },
  };
}
