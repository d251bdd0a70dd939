"use strict";
// The curves of the report. DATA has for each run its columns, thinned to rows that are in the log; what is missing is null.
const DATA = JSON.parse(document.getElementById("data").textContent);
const DARK = matchMedia("(prefers-color-scheme: dark)");
const SVG = "http://www.w3.org/2000/svg";
const PANELS = [
  {title: "loss, nats per token", columns: ["train_loss", "val_loss"], smooth: true, top: DATA.highest_loss},
  {title: "bits per byte, validation", columns: ["val_bits_per_byte"]},
  {title: "gradient norm before clipping", columns: ["grad_norm"], smooth: true},
  {title: "learning rate", columns: ["learning_rate"]},
  {title: "tokens per second", columns: ["tokens_per_second"], smooth: true},
];
const NAMES = {train_loss: "training", val_loss: "validation"};
const POINTS = new Set(["val_loss", "val_bits_per_byte"]);  // few, so that each is marked
const state = {axis: "step", smoothing: 30, log: false, view: null, off: new Set(), at: null};

function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function html(name, attributes, parent, text) {
  const element = Object.assign(document.createElement(name), attributes);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const colour = (run) => DARK.matches ? run.dark : run.light;
const shown = () => DATA.runs.filter((run) => !state.off.has(run.name));

// ---- numbers for people ----------------------------------------------------------------------------------------

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  return size >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m ${String(Math.round(seconds % 60)).padStart(2, "0")}s`;
  return `${Math.floor(seconds / 3600)}h ${String(Math.round(seconds % 3600 / 60)).padStart(2, "0")}m`;
}

function compact(value) {
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`;
  }
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}

const place = (value) => state.axis === "time" ? duration(value) : compact(value);

function ticks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((candidate) => candidate >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  if (inside.length < 3) return ticks(low, high, 4).filter((value) => value > 0);
  return inside.length > 8 ? inside.filter((value) => Number.isInteger(Math.log10(value) + 1e-12)) : inside;
}

// ---- curves ----------------------------------------------------------------------------------------------------

// [x, y] of a column, without what is missing.
function curve(run, column) {
  const xs = run.columns[state.axis], ys = run.columns[column], found = [];
  for (let i = 0; i < ys.length; i++) {
    if (ys[i] !== null && xs[i] !== null) found.push([xs[i], ys[i]]);
  }
  return found;
}

// The mean over a window that is centred on each point and never reaches farther to one side than to the other, so that
// an average lags nowhere: neither where the curve falls, nor at its ends.
function smoothed(points) {
  const half = Math.floor(points.length * state.smoothing / 1000);
  if (half < 1) return points;
  const sums = [0];
  for (const [, y] of points) sums.push(sums[sums.length - 1] + y);
  return points.map(([x], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    return [x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)];
  });
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

function range() {
  let low = Infinity, high = -Infinity;
  for (const run of DATA.runs) {
    for (const x of run.columns[state.axis]) {
      if (x !== null) { low = Math.min(low, x); high = Math.max(high, x); }
    }
  }
  return high > low ? [low, high] : [low - 1, low + 1];
}

class Panel {
  constructor(about, parent) {
    this.about = about;
    this.element = html("section", {className: "panel"}, parent);
    html("h3", {}, this.element, about.title);
    this.svg = make("svg", {role: "img", "aria-label": about.title}, this.element);
    this.tip = html("div", {className: "tip", hidden: true}, this.element);
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    this.svg.addEventListener("pointerleave", () => { if (this.from === undefined) read(null, null); });
    this.svg.addEventListener("pointerdown", (event) => { this.from = this.at(event); this.svg.setPointerCapture(event.pointerId); });
    this.svg.addEventListener("pointerup", (event) => this.release(event));
    this.svg.addEventListener("dblclick", () => zoom(null));
  }

  lines() {
    return shown().flatMap((run) => this.about.columns.map((column) => ({run, column, points: curve(run, column)})))
      .filter((line) => line.points.length);
  }

  draw() {
    const width = Math.max(200, this.element.clientWidth - 16), height = Math.round(Math.min(320, Math.max(200, width * .55)));
    const box = {left: 52, right: 10, top: 8, bottom: 24};
    this.width = width;
    this.box = box;
    this.view = state.view || range();
    const [x0, x1] = this.view;
    this.found = this.lines();
    this.element.hidden = !DATA.runs.some((run) => this.about.columns.some((c) => run.columns[c].some((y) => y !== null)));
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const inside = this.found.flatMap((line) => line.points.filter(([x]) => x >= x0 && x <= x1).map(([, y]) => y));
    const kept = inside.filter((y) => (!state.log || y > 0) && (!this.about.top || y <= this.about.top));
    if (!kept.length) return;
    let low = kept.reduce((a, b) => Math.min(a, b)), high = kept.reduce((a, b) => Math.max(a, b));
    if (low === high) { low -= Math.abs(low) * .1 || 1; high += Math.abs(high) * .1 || 1; }
    if (state.log && low <= 0) low = high / 1e3;
    const up = state.log ? Math.log10 : (y) => y;
    const margin = (up(high) - up(low)) * .04, bottom = up(low) - margin, top = up(high) + margin;
    this.x = (x) => box.left + (x - x0) / (x1 - x0) * (width - box.left - box.right);
    this.y = (y) => height - box.bottom - (up(y) - bottom) / (top - bottom) * (height - box.top - box.bottom);
    this.grid(x0, x1, low, high, height);
    const clip = `clip-${this.about.columns[0]}`;
    make("rect", {x: box.left, y: box.top, width: width - box.left - box.right, height: height - box.top - box.bottom},
      make("clipPath", {id: clip}, make("defs", {}, this.svg)));
    const group = make("g", {"clip-path": `url(#${clip})`}, this.svg);
    for (const line of this.found) this.line(group, line);
    if (inside.some((y) => this.about.top && y > this.about.top)) {
      make("text", {x: width / 2, y: box.top + 12, "text-anchor": "middle", class: "note"}, this.svg).textContent =
        `losses above ${number(this.about.top)} are left out`;
    }
    this.reading = make("line", {class: "reading", y1: box.top, y2: height - box.bottom, visibility: "hidden"}, this.svg);
    this.selection = make("rect", {class: "selection", y: box.top, height: height - box.top - box.bottom, width: 0}, this.svg);
  }

  grid(x0, x1, low, high, height) {
    const {box, width} = this;
    for (const y of state.log ? decades(low, high) : ticks(low, high, 5)) {
      make("line", {class: "grid", x1: box.left, x2: width - box.right, y1: this.y(y), y2: this.y(y)}, this.svg);
      make("text", {x: box.left - 6, y: this.y(y) + 4, "text-anchor": "end"}, this.svg).textContent = compact(y);
    }
    for (const x of ticks(x0, x1, Math.max(2, width / 110))) {
      make("text", {x: this.x(x), y: height - 7, "text-anchor": "middle"}, this.svg).textContent = place(x);
    }
  }

  line(group, {run, column, points}) {
    const path = (some) => some.filter(([, y]) => !state.log || y > 0)
      .map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
    const style = {fill: "none", stroke: colour(run), "stroke-dasharray": run.dash};
    if (POINTS.has(column)) {
      make("path", {...style, d: path(points), "stroke-width": 1.6}, group);
      if (points.length <= 80) {
        for (const [x, y] of points) {
          if (!state.log || y > 0) {
            make("circle", {cx: this.x(x), cy: this.y(y), r: 2.6, fill: "var(--panel)", stroke: colour(run)}, group);
          }
        }
      }
    } else if (this.about.smooth && state.smoothing > 0) {
      make("path", {...style, d: path(points), "stroke-width": .7, opacity: .4, "stroke-dasharray": ""}, group);
      make("path", {...style, d: path(smoothed(points)), "stroke-width": 1.8}, group);
    } else {
      make("path", {...style, d: path(points), "stroke-width": 1.4}, group);
    }
  }

  at(event) {
    const frame = this.svg.getBoundingClientRect(), [x0, x1] = this.view;
    const share = ((event.clientX - frame.left) / frame.width * this.width - this.box.left) / (this.width - this.box.left - this.box.right);
    return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
  }

  move(event) {
    if (!this.x) return;
    const x = this.at(event);
    if (this.from !== undefined) {
      const [a, b] = [this.x(this.from), this.x(x)].sort((one, two) => one - two);
      this.selection.setAttribute("x", a);
      this.selection.setAttribute("width", b - a);
    }
    read(x, this);
  }

  release(event) {
    const from = this.from, to = this.at(event);
    this.from = undefined;
    if (from !== undefined && Math.abs(this.x(from) - this.x(to)) > 8) zoom([Math.min(from, to), Math.max(from, to)]);
  }

  // The values under the pointer, those of the rows of the log, not of their average; a line where it is in other panels.
  read(x, under) {
    if (!this.reading) return;
    this.tip.hidden = under !== this || !this.found.length;
    this.reading.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) return;
    this.reading.setAttribute("x1", this.x(x));
    this.reading.setAttribute("x2", this.x(x));
    this.tip.replaceChildren();
    for (const {run, column, points} of this.found) {
      const [at, value] = nearest(points, x), row = html("div", {}, this.tip);
      row.append(swatch(run));
      html("span", {className: "name"}, row, (NAMES[column] ? `${NAMES[column]}  ` : "") + run.name);
      const cell = html("span", {className: "value"}, row, `${number(value)} at ${state.axis === "step" ? at.toLocaleString("en") : place(at)}`);
      Object.assign(cell.dataset, {run: run.name, column, at, value});
    }
    const left = this.x(x) / this.width * this.element.clientWidth;
    const right = left > this.element.clientWidth / 2;
    this.tip.style.left = right ? "" : `${left + 14}px`;
    this.tip.style.right = right ? `${this.element.clientWidth - left + 14}px` : "";
    this.tip.style.top = "2.2rem";
  }
}

function swatch(run) {
  const svg = make("svg", {class: "swatch", viewBox: "0 0 26 12"});
  make("line", {x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour(run), "stroke-width": 3, "stroke-dasharray": run.dash}, svg);
  return svg;
}

// ---- the page --------------------------------------------------------------------------------------------------

const panels = PANELS.map((about) => new Panel(about, document.getElementById("panels")));

function draw() {
  for (const panel of panels) panel.draw();
}

function read(x, under) {
  for (const panel of panels) panel.read(x, under);
}

function zoom(view) {
  state.view = view;
  draw();
}

function legend() {
  const parent = document.getElementById("legend");
  parent.replaceChildren();
  for (const run of DATA.runs) {
    const button = html("button", {type: "button"}, parent);
    button.setAttribute("aria-pressed", String(!state.off.has(run.name)));
    button.append(swatch(run), run.name);
    if (run.label !== run.name) html("small", {}, button, run.label);
    button.addEventListener("click", () => {
      state.off.has(run.name) ? state.off.delete(run.name) : state.off.add(run.name);
      legend();
      draw();
      samples();
    });
  }
}

const steps = [...new Set(DATA.runs.flatMap((run) => run.samples.map(([step]) => step)))].sort((a, b) => a - b);

function samples() {
  if (!steps.length) return;
  const step = steps[Number(document.getElementById("sample-step").value)], parent = document.getElementById("samples");
  document.getElementById("sample-value").textContent = step.toLocaleString("en");
  parent.replaceChildren();
  for (const run of shown()) {
    const found = run.samples.filter(([at]) => at <= step).pop();
    const card = html("article", {className: "sample"}, parent), head = html("h3", {}, card);
    head.append(swatch(run), ` ${run.name}`);
    html("div", {className: "at"}, card, found ? `step ${found[0].toLocaleString("en")}` : "none up to here");
    if (found) html("pre", {}, card, found[1]);
  }
}

function control(id, event, action) {
  const element = document.getElementById(id);
  element.addEventListener(event, () => action(element));
  return element;
}

control("axis", "change", (element) => { state.axis = element.value; zoom(null); });
control("log", "change", (element) => { state.log = element.checked; draw(); });
control("whole", "click", () => zoom(null));
const smoothing = control("smoothing", "input", (element) => {
  state.smoothing = Number(element.value);
  document.getElementById("smoothing-value").textContent = state.smoothing ? `${state.smoothing / 5} % of the run` : "off";
  draw();
});
const slider = control("sample-step", "input", samples);
slider.max = steps.length - 1;
slider.value = steps.length - 1;
document.getElementById("controls").hidden = false;
document.getElementById("sample-controls").hidden = steps.length < 2;
new ResizeObserver(draw).observe(document.getElementById("panels"));
DARK.addEventListener("change", () => { legend(); draw(); samples(); });
legend();
samples();
smoothing.dispatchEvent(new Event("input"));
