"use strict";
// Plots of a sweep: points of seeds, means with their intervals, what is under the pointer told by name.
const sweep = JSON.parse(document.getElementById("drawings").textContent);

// Vertical bars from low to high of each interval, with a cap at each end.
function drawIntervals(plot, chart) {
  const pen = plot.ctx, cap = 5 * devicePixelRatio;
  pen.save();
  pen.strokeStyle = colour("--fg");
  pen.lineWidth = 1.4 * devicePixelRatio;
  pen.beginPath();
  chart.intervals.forEach((interval, at) => {
    if (!interval) return;
    const x = plot.valToPos(chart.x[at], "x", true);
    const [low, high] = interval.map(value => plot.valToPos(value, "y", true));
    pen.moveTo(x, low);
    pen.lineTo(x, high);
    [low, high].forEach(y => { pen.moveTo(x - cap, y); pen.lineTo(x + cap, y); });
  });
  pen.stroke();
  pen.restore();
}

function sweepOptions(chart, width) {
  const points = (index, size) => ({show: true, size, stroke: stroke(index), fill: stroke(index)});
  const told = (_, value) => shortNumber(value);
  const series = [
    {label: "setting", value: (_, x, __, at) => at == null ? "–" : chart.names[at]},
    {label: "mean", paths: () => null, points: {...points(0, 9), stroke: colour("--fg"), fill: colour("--fg")}, value: told},
    ...chart.series.map((one, index) => ({
      label: one.name, stroke: stroke(index), paths: () => null, points: points(index, 5), value: told})),
  ];
  const all = [...chart.means, ...chart.intervals.flat(), ...chart.series.flatMap(one => one.values)];
  const known = all.filter(value => value != null);
  const axis = {stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1}, ticks: {show: false},
    font: "11px system-ui, sans-serif"};
  const first = chart.x[0], last = chart.x[chart.x.length - 1];
  const span = last - first, side = chart.series.length ? Math.max(0.3, span * 0.05) : span * 0.08;
  const room = chart.log ? () => [first / 1.3, last * 1.3] : () => [first - side, last + side];
  const options = {
    width, height: 280, series, padding: [10, 12, 0, 0],
    scales: {
      x: {time: false, distr: chart.log ? 3 : 1, range: room},
      y: {range: () => known.length ? apart(Math.min(...known), Math.max(...known)) : [0, 1]},
    },
    axes: [
      {...axis, size: 26, gap: 3, ...(chart.series.length && chart.x.length <= 30 ? {splits: () => chart.x} : {}),
        values: (_, ticks) => ticks.map(tick => tick == null ? "" : shortNumber(tick))},
      {...axis, size: 60, gap: 4, values: (_, ticks) => ticks.map(shortNumber)},
    ],
    cursor: {y: false, points: {size: 8}, drag: {x: false, y: false}},
    hooks: {draw: [plot => drawIntervals(plot, chart)]},
  };
  return {options, data: [chart.x, chart.means, ...chart.series.map(one => one.values)]};
}

function drawSweep() {
  document.querySelectorAll(".plot").forEach(place => {
    const chart = sweep.charts[place.dataset.index];
    if (!chart.x.length || !place.clientWidth) return;
    const {options, data} = sweepOptions(chart, place.clientWidth);
    place.plot?.destroy();
    place.plot = new uPlot(options, data, place);
  });
}

let waiting = 0, drawnWidth = 0;
new ResizeObserver(() => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const width = document.querySelector("main").clientWidth;
    if (width !== drawnWidth) drawSweep();
    drawnWidth = width;
  }, 60);
}).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSweep);
