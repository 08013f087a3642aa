"use strict";
// Draws what the page's block of JSON holds: at the start, and again when width, colours or smoothing change.
const report = JSON.parse(document.getElementById("drawings").textContent);
const smoothing = document.getElementById("smoothing");
const live = document.getElementById("live");
const kept = {  // a page of a file may have no storage
  get: name => { try { return sessionStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* nothing is kept then */ } },
};

function share() {
  return smoothing.value / 100;
}

function draw(place) {
  const stage = report.stages[place.dataset.stage], index = place.dataset.index;
  if (!place.clientWidth) return;
  if (place.dataset.kind === "chart") drawChart(place, stage.charts[index], share(), `steps-${place.dataset.stage}`);
  else if (place.dataset.kind === "experts") drawExperts(place, stage.experts[index]);
  else drawStep(place, stage.step, report.actions);
  place.width = place.clientWidth;
}

const places = [...document.querySelectorAll(".plot")];
const drawAll = () => places.filter(place => place.drawn).forEach(draw);

// A chart is drawn when it comes near the screen: a run may have two hundred.
const near = new IntersectionObserver(seen => seen.filter(one => one.isIntersecting).forEach(({target}) => {
  near.unobserve(target);
  target.drawn = true;
  draw(target);
}), {rootMargin: "600px"});
places.forEach(place => near.observe(place));
let pause = 0;
new ResizeObserver(() => {
  clearTimeout(pause);
  pause = setTimeout(() => places.filter(p => p.drawn && p.width !== p.clientWidth).forEach(draw), 120);
}).observe(document.querySelector("main"));

smoothing.value = kept.get("smoothing") ?? smoothing.value;
smoothing.addEventListener("input", () => { kept.set("smoothing", smoothing.value); drawAll(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// On paper everything is open and drawn, in the colours of paper.
const closed = () => [...document.querySelectorAll("details:not([open])")];
let opened = [];
addEventListener("beforeprint", () => { opened = closed(); opened.forEach(one => { one.open = true; }); });
addEventListener("afterprint", () => { opened.forEach(one => { one.open = false; }); drawAll(); });
matchMedia("print").addEventListener("change", () => places.forEach(place => { place.drawn = true; draw(place); }));

if (report.reload) {
  live.checked = kept.get("live") !== "no";
  live.addEventListener("change", () => kept.set("live", live.checked ? "yes" : "no"));
  setInterval(() => { if (live.checked && !document.hidden) location.reload(); }, 1000 * report.reload);
}
