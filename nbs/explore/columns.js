// A row of weights that GPTQ rounds from left to right: where each weight stands after some of the columns.
(data, make) => {
  const n = data.weights.length, step = 560 / n, x = (j) => 45 + step * (j + 0.5);
  const low = data.grid[0] - 0.3, high = data.grid[data.grid.length - 1] + 0.3, y = (w) => 230 - (220 * (w - low)) / (high - low);
  return {
    sliders: { rounded: "columns rounded", correlation: "correlation of the inputs" },
    digits: { correlation: 1 },
    view: "0 0 600 260",
    width: "36rem",
    alt: "Eight weights of a row between the lines of a grid; those that are rounded sit on lines, those after them have moved away from where they were",
    caption: "Lines: the values of the grid. Rings: the weights as they were. Squares: rounded. Dots: not yet rounded, and moved to make up for the errors so far. Any two inputs have the same correlation.",
    draw: (at) => {
      const now = data.steps[at.correlation][at.rounded], k = at.rounded, losses = data.losses[at.correlation];
      const marks = data.grid.map((v) => make("path", { d: `M45 ${y(v)}H605`, stroke: "currentColor", opacity: 0.35 }));
      marks.push(...data.grid.map((v) => make("text", { x: 38, y: y(v) + 5, "font-size": 14, "text-anchor": "end" }, v.toFixed(1))));
      data.weights.forEach((w, j) => {
        marks.push(make("circle", { cx: x(j), cy: y(w), r: 6, fill: "none", stroke: "currentColor" }));
        const moved = { class: j < k ? "rounded" : "free", fill: j < k ? "#d55e00" : "#0072b2" };
        marks.push(j < k ? make("rect", { x: x(j) - 6, y: y(now[j]) - 6, width: 12, height: 12, ...moved }) : make("circle", { cx: x(j), cy: y(now[j]), r: 4.5, ...moved }));
        marks.push(make("text", { x: x(j), y: 252, "font-size": 14, "text-anchor": "middle" }, j + 1));
      });
      const before = k && data.steps[at.correlation][k - 1], sum = `At the end the loss is ${losses[0].toFixed(3)}; of the nearest values it is ${losses[1].toFixed(3)}.`;
      if (!k) return [marks, `Nothing is rounded yet. ${sum}`];
      const by = (j) => Math.abs(now[j] - before[j]), way = (j) => (by(j) < 5e-4 ? "stayed" : `went ${now[j] < before[j] ? "down" : "up"} by ${by(j).toFixed(3)}`);
      return [marks, `Weight ${k} ${way(k - 1)}, to ${now[k - 1].toFixed(1)}${k < n ? `; those after it ${way(k)}` : ""}. ${sum}`];
    },
  };
}
