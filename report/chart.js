"use strict";
// A line chart in place of each picture that carries its numbers. It is drawn again at every change: data are few.
const HEIGHT = 340;
const MARGIN = { top: 12, right: 14, bottom: 42, left: 52 };
const INK = "#1f2933", MUTED = "#5f6c7b", GRID = "#e3e8ee";

const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e15) return value.toExponential(1);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= 10 * unit || (unit > 1e3 && size >= unit)) return +(value / unit).toPrecision(3) + name;
  }
  return String(+value.toPrecision(4));
};

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((width) => width >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

function scale(low, high, from, to, log) {
  const place = log ? Math.log : (value) => value;
  const span = place(high) - place(low) || 1;
  return (value) => from + ((to - from) * (place(value) - place(low))) / span;
}

class Chart {
  constructor(box) {
    this.box = box;
    this.data = JSON.parse(box.querySelector("script").textContent);
    this.svg = box.querySelector("svg");
    this.hidden = new Set();
    const seen = this.data.axes.find((axis) => axis.key === "images_seen");
    this.axis = (seen ?? this.data.axes[0]).key;
    box.querySelector("img").hidden = true;
    this.svg.removeAttribute("hidden");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("tabindex", "0");
    this.svg.setAttribute("aria-label", `${this.data.title}, ${this.data.better}. Arrow keys step through the points.`);
    this.tip = this.element("div", "tip", "", box);
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.controls();
    this.svg.addEventListener("pointermove", (event) => this.near(event));
    this.svg.addEventListener("pointerdown", (event) => this.near(event));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    this.svg.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(box);
  }

  element(tag, name, text, parent) {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    parent.append(made);
    return made;
  }

  controls() {
    const bar = this.element("div", "controls", "", this.box);
    this.box.prepend(bar);
    this.element("p", "chart-title", `${this.data.title}, ${this.data.better}`, bar);
    const legend = this.element("div", "legend", "", bar);
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", "Lines shown");
    for (const line of this.data.series) {
      const button = this.element("button", "", line.name, legend);
      button.type = "button";
      button.style.setProperty("--colour", line.colour);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        this.hidden.has(line.name) ? this.hidden.delete(line.name) : this.hidden.add(line.name);
        button.setAttribute("aria-pressed", String(!this.hidden.has(line.name)));
        this.draw();
      });
    }
    const label = this.element("label", "", "over ", bar);
    const select = this.element("select", "", "", label);
    for (const axis of this.data.axes) select.add(new Option(axis.label, axis.key, false, axis.key === this.axis));
    select.addEventListener("change", () => {
      this.axis = select.value;
      this.draw();
    });
    if (this.data.band) this.element("p", "note", this.data.band, this.box);
  }

  make(tag, attributes, text) {
    const made = document.createElementNS(this.svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    this.svg.append(made);
    return made;
  }

  draw() {
    const width = Math.max(Math.floor(this.svg.parentNode.clientWidth), 260);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const shown = this.data.series.filter((line) => !this.hidden.has(line.name));
    const lines = shown.length ? shown : this.data.series;
    const points = lines.flatMap((line) => line.points).filter((point) => point.value !== null);
    if (!points.length) return;
    const across = points.map((point) => point[this.axis]);
    const up = points.flatMap((point) => [point.value, point.low ?? point.value, point.high ?? point.value]);
    up.push(...this.data.references.map((reference) => reference.value));
    let [low, high] = [Math.min(...up), Math.max(...up)];
    const log = this.data.log && low > 0;
    [low, high] = log ? [low / 1.1, high * 1.1] : [low - 0.05 * (high - low), high + 0.05 * (high - low)];
    const [left, right] = [Math.min(...across), Math.max(...across)];
    const room = 0.02 * (right - left) || 1;
    this.x = scale(left - room, right + room, MARGIN.left, width - MARGIN.right, false);
    this.y = scale(low, high, HEIGHT - MARGIN.bottom, MARGIN.top, log);
    this.frame(width, ticks(left, right, false), ticks(low, high, log));
    this.positions = [];
    for (const line of shown) this.line(line);
    this.mark = this.make("circle", { r: 8, fill: "none", stroke: INK, "stroke-width": 2, visibility: "hidden" });
    this.show(null);
  }

  frame(width, across, up) {
    const text = { fill: MUTED, "font-size": 12 };
    for (const value of up) {
      const y = this.y(value);
      this.make("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, stroke: GRID });
      this.make("text", { ...text, x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, short(value));
    }
    const base = HEIGHT - MARGIN.bottom;
    this.make("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: base, y2: base, stroke: MUTED });
    for (const value of across) {
      this.make("text", { ...text, x: this.x(value), y: base + 16, "text-anchor": "middle" }, short(value));
    }
    const label = this.data.axes.find((axis) => axis.key === this.axis).label;
    this.make("text", { ...text, x: (MARGIN.left + width) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, label);
    const halo = { "paint-order": "stroke", stroke: "#fff", "stroke-width": 3 };
    const references = this.data.references.map(({ name, value }) => ({ name, y: this.y(value) }));
    for (const { y } of references) {
      const ends = { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y };
      this.make("line", { ...ends, stroke: MUTED, "stroke-dasharray": "4 3" });
    }
    let above = Infinity;
    for (const { name, y } of references.sort((a, b) => b.y - a.y)) {
      above = Math.min(y - 4, above - 13); // labels of near lines do not cover each other
      this.make("text", { ...text, ...halo, x: width - MARGIN.right, y: above, "text-anchor": "end" }, name);
    }
  }

  line(line) {
    const points = line.points.filter((point) => point.value !== null && point[this.axis] !== null);
    const at = (point, key) => `${this.x(point[this.axis]).toFixed(1)},${this.y(point[key]).toFixed(1)}`;
    const banded = points.filter((point) => point.low !== null && point.high !== null);
    if (banded.length) {
      const outline = [...banded.map((point) => at(point, "low")), ...banded.reverse().map((point) => at(point, "high"))];
      this.make("polygon", { points: outline.join(" "), fill: line.colour, opacity: 0.16 });
    }
    const path = points.map((point) => at(point, "value")).join(" ");
    this.make("polyline", { points: path, fill: "none", stroke: line.colour, "stroke-width": 2.2 });
    for (const point of points) {
      const place = { x: this.x(point[this.axis]), y: this.y(point.value), point, line };
      this.make("circle", { cx: place.x, cy: place.y, r: 4, fill: line.colour, stroke: "#fff" });
      this.positions.push(place);
    }
  }

  near(event) {
    const bounds = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const away = (place) => Math.hypot(place.x - x, place.y - y);
    const nearest = this.positions.reduce((best, place) => (!best || away(place) < away(best) ? place : best), null);
    this.show(nearest && away(nearest) < 60 ? nearest : null);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.positions.length) return;
    event.preventDefault();
    const index = this.positions.indexOf(this.current);
    this.show(this.positions.at(index < 0 ? 0 : (index + step) % this.positions.length));
  }

  show(place) {
    this.current = place;
    this.tip.hidden = !place;
    this.mark?.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    this.mark.setAttribute("cx", place.x);
    this.mark.setAttribute("cy", place.y);
    const number = (value) => value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 3 : 1 });
    const { point, line } = place;
    const range = point.low === null || point.high === null ? "" : ` [${number(point.low)}, ${number(point.high)}]`;
    const where = this.data.axes.filter((axis) => point[axis.key] !== null);
    const rows = where.map((axis) => `${axis.label} ${number(point[axis.key])}`);
    this.tip.textContent = [line.name, number(point.value) + range, ...rows].join("\n");
    const [svg, box] = [this.svg.getBoundingClientRect(), this.box.getBoundingClientRect()];
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    const left = place.x + 14 + width < svg.width ? place.x + 14 : Math.max(place.x - 14 - width, 0);
    const top = Math.min(Math.max(place.y - height / 2, 0), svg.height - height);
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${svg.top - box.top + top}px`;
  }
}

for (const box of document.querySelectorAll(".chart")) new Chart(box);
