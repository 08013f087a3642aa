"use strict";
// Heat maps of experts and the timeline of a step, on canvases of their own, with what is under the pointer told.
const tip = document.createElement("div");
tip.id = "tip";
document.body.append(tip);

function showTip(event, text) {
  tip.textContent = text || "";
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, x)}px`;
  tip.style.top = `${Math.max(8, event.clientY - 34)}px`;
}

// A canvas as wide as its place and sharp on every screen; `tell(x, y)` says what is at a point.
function canvasIn(place, height, tell) {
  const width = place.clientWidth, ratio = devicePixelRatio || 1;
  const canvas = document.createElement("canvas");
  canvas.className = "drawn";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    showTip(event, tell(event.clientX - box.left, event.clientY - box.top));
  });
  canvas.addEventListener("pointerleave", event => showTip(event, ""));
  place.replaceChildren(canvas);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  return {pen, width};
}

const LEFT = 30, BELOW = 18;

// Load of each expert over the mean: the paper's colour for none, the first colour for the mean, the second above.
function drawExperts(place, map) {
  const rows = map.rows.length, columns = map.steps.length;
  const high = Math.max(4, Math.min(14, Math.floor(170 / rows))), height = rows * high;
  const column = (x, wide) => Math.min(columns - 1, Math.floor((x - LEFT) / wide * columns));
  const {pen, width} = canvasIn(place, height + BELOW, (x, y) => {
    const row = Math.floor(y / high), at = column(x, width - LEFT);
    if (row >= rows || x < LEFT) return "";
    return `step ${map.steps[at]}, ${expertName(map, row)}: ${(map.rows[row][at] / 100).toFixed(2)}x the mean`;
  });
  const wide = (width - LEFT) / columns, below = colour("--c1"), above = colour("--c2");
  for (let row = 0; row < rows; row++) {
    for (let at = 0; at < columns; at++) {
      const load = map.rows[row][at] / 100;
      pen.globalAlpha = load <= 1 ? load * 0.6 : Math.min(1, 0.4 + (load - 1) * 0.6);
      pen.fillStyle = load <= 1 ? below : above;
      pen.fillRect(LEFT + at * wide, row * high, Math.ceil(wide), high - (high > 5 ? 1 : 0));
    }
  }
  pen.globalAlpha = 1;
  pen.fillStyle = colour("--soft");
  pen.fillText("0", 12, 10);
  pen.fillText(String(map.experts - 1), 4, height - 1);
  pen.fillText(`step ${map.steps[0]}`, LEFT, height + 13);
  pen.textAlign = "right";
  pen.fillText(String(map.steps[columns - 1]), width, height + 13);
}

function expertName(map, row) {
  const each = map.experts / map.rows.length;
  return each <= 1 ? `expert ${row}` : `experts ${Math.floor(row * each)} to ${Math.floor((row + 1) * each) - 1}`;
}

const ACTIONS = {F: "--c1", B: "--c2", I: "--c2", W: "--c3", wait: "--line", "optimizer step": "--c4"};

// What every rank did in one step; a row a rank, time to the right.
function drawStep(place, step, names) {
  const high = step.ranks.length > 16 ? 12 : 22, gap = 3;
  const end = Math.max(...step.ranks.map(rank => Math.max(...rank.spans.map(span => span[2]))));
  const label = 46, height = step.ranks.length * (high + gap);
  const {pen, width} = canvasIn(place, height + BELOW, (x, y) => {
    const rank = step.ranks[Math.floor(y / (high + gap))], at = (x - label) / (width - label) * end;
    if (!rank) return "";
    const span = rank.spans.find(one => one[1] <= at && at <= one[2] && one[0] !== "wait")
      || rank.spans.find(one => one[1] <= at && at <= one[2]);
    const what = span ? `${names[span[0]]}, ${(span[2] - span[1]).toFixed(1)} ms` : `idle ${Math.round(rank.bubble * 100)}%`;
    return `${rank.name} (${rank.place}): ${what}`;
  });
  const scale = (width - label) / end;
  step.ranks.forEach((rank, index) => {
    const top = index * (high + gap);
    pen.fillStyle = colour("--soft");
    pen.fillText(rank.name, 0, top + high / 2 + 4);
    rank.spans.forEach(([kind, start, stop]) => {
      pen.fillStyle = colour(ACTIONS[kind] || "--soft");
      pen.fillRect(label + start * scale, top, Math.max(0.7, (stop - start) * scale - 0.5), high);
    });
  });
  pen.fillStyle = colour("--soft");
  pen.fillText("0 ms", label, height + 13);
  pen.textAlign = "right";
  pen.fillText(`${end.toFixed(0)} ms`, width, height + 13);
}
