"use strict";
// Curves of the report, by uPlot: smoothed lines over faint raw ones, values under the pointer, zoom by dragging.
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PALETTE = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"];
const stroke = index => colour(PALETTE[index % PALETTE.length]);
const shortNumber = value => {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e4 || Number.isInteger(value)) return value.toLocaleString("en", {maximumFractionDigits: 0});
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
};

// Mean with weights that fade by `share` a point, freed of the start's pull; gaps stay gaps.
function smoothed(values, share) {
  let mean = 0, weight = 0;
  return values.map(value => {
    if (value == null) return null;
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return mean / weight;
  });
}

function faint(value) {
  return `color-mix(in srgb, ${value} 28%, transparent)`;
}

// What uPlot is given: a faint raw line and a smoothed one of each noisy series, points where there are few, dashed levels.
function chartOptions(chart, share, width, group) {
  const series = [{label: "step"}], data = [chart.x];
  chart.series.forEach((one, index) => {
    const known = one.values.filter(value => value != null).length;
    const dense = one.noisy && known > 20 && share > 0;
    const line = {spanGaps: true, points: {show: known <= 40, size: 5, fill: stroke(index)}, width: 1.8};
    if (dense) {
      series.push({...line, label: "", class: "raw", stroke: faint(stroke(index)), width: 1, points: {show: false}});
      data.push(one.values);
    }
    series.push({...line, label: one.name, stroke: stroke(index), value: (_, v) => shortNumber(v),
      points: dense ? {show: false} : line.points});
    data.push(dense ? smoothed(one.values, share) : one.values);
  });
  chart.levels.forEach(level => {
    series.push({label: level.name, stroke: colour("--soft"), dash: [5, 4], width: 1.2, points: {show: false},
      value: () => shortNumber(level.value)});
    data.push(chart.x.map(() => level.value));
  });
  const axis = {stroke: colour("--soft"), grid: {stroke: colour("--line"), width: 1}, ticks: {show: false},
    font: "11px system-ui, sans-serif"};
  const options = {
    width, height: 190, series, padding: [8, 10, 0, 0],
    scales: {x: {time: false, range: widened}, y: {range: (_, low, high) => apart(low, high)}},
    axes: [{...axis, size: 24, gap: 2, space: 60, values: (_, ticks) => ticks.map(shortNumber)},
      {...axis, size: 54, gap: 4, space: 34, values: (_, ticks) => ticks.map(shortNumber)}],
    cursor: {sync: {key: group}, y: false, points: {size: 6}, drag: {x: true, y: false}},
    legend: {live: true},
    hooks: {ready: [hideRaw]},
  };
  return {options, data};
}

// A single step has no width of its own.
function widened(_, low, high) {
  return low == null ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high];
}

// Room above and below, also for a line that is flat.
function apart(low, high) {
  if (low == null) return [0, 1];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.01;
  return [low >= 0 && low - margin < 0 ? Math.min(0, low) : low - margin, high + margin];
}

function hideRaw(plot) {
  plot.root.querySelectorAll(".u-legend .u-series.raw").forEach(row => { row.style.display = "none"; });
}

function drawChart(place, chart, share, group) {
  const {options, data} = chartOptions(chart, share, place.clientWidth, group);
  place.plot?.destroy();
  place.plot = new uPlot(options, data, place);
}
