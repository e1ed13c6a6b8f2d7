"use strict";
const $ = (id) => document.getElementById(id);
const metadata = JSON.parse($("metadata").textContent), count = metadata.images, live = "live" in document.documentElement.dataset;
const PER_PAGE = 60, MOST_SCENES = 80, KEY = "rs-prune " + metadata.selection;
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a900", "#7b5ea7"];
const REASONS = { kept: "kept", low_entropy: "low entropy", redundant: "redundant", not_drawn: "not drawn", unreadable: "unreadable", added_by_hand: "added by hand", removed_by_hand: "removed by hand" };
const number = (value, digits = 0) => Number(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (part, whole) => number(whole ? 100 * part / whole : 0, 1) + " %";

/* ---------------------------------------------------------------- data */

async function unpacked(text, header) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const block = await new Response(stream).arrayBuffer(), found = {};
  for (const { name, type, start, length } of header) {
    found[name] = type === "json"
      ? JSON.parse(new TextDecoder().decode(new Uint8Array(block, start, length)))
      : new globalThis[type](block, start, length);
  }
  return found;
}

let data, base; // data: what stays; base: the selection, with its names of scenes and reasons
const moved = new Map(); // row to 1, in, or 0, out: where it differs from the selection
let shown = [], mask, chosen = -1, page = 0, planeBox = null, order, total;
const width = {};
const isKept = (row) => (moved.size && moved.has(row) ? moved.get(row) : base.kept[row]);
const sceneOf = (row) => base.scenes[base.scene[row]] || "no scene";
const reasonOf = (row) => base.reasons[base.reason[row]];
const captionOf = (row) => !data.captions ? "" : data.captionCodes ? data.captions[data.captionCodes[row]] ?? "" : data.captions[row];
const place = (row) => "lon" in data && Number.isFinite(data.lon[row]);

function adopt(columns, scenes, reasons, settings) {
  base = { ...columns, scenes, reasons, ...settings };
  const numbers = new Map();
  base.dense = new Int32Array(count).fill(-1);
  for (let row = 0; row < count; row += 1) {
    if (base.cluster[row] < 0) continue;
    const key = base.scene[row] * 16777216 + base.cluster[row];
    if (!numbers.has(key)) numbers.set(key, numbers.size);
    base.dense[row] = numbers.get(key);
  }
  base.clusters = numbers.size;
  base.size = base.kept.reduce((sum, one) => sum + one, 0);
  for (const [row, value] of moved) if (base.kept[row] === value) moved.delete(row);
}

/* ---------------------------------------------------------------- filters */

const field = (id) => ($(id).value === "" ? null : Number($(id).value));

function refilter() {
  const state = $("state").value, scene = $("scene").value, reason = $("reason").value, group = $("group").value;
  const one = field("one-group"), low = field("entropy-low"), high = field("entropy-high"), text = $("search").value.toLowerCase();
  const [west, east, south, north] = ["west", "east", "south", "north"].map(field);
  const boxed = [west, east, south, north].some((value) => value !== null);
  const sceneCode = base.scenes.indexOf(scene === " " ? "" : scene), reasonCode = base.reasons.indexOf(reason);
  mask = new Uint8Array(count);
  shown = [];
  for (const row of order) {
    if (state !== "all" && (state === "moved" ? !moved.has(row) : (isKept(row) === 1) !== (state === "kept"))) continue;
    if (scene && base.scene[row] !== sceneCode) continue;
    if (reason && base.reason[row] !== reasonCode) continue;
    if (low !== null && !(data.entropy[row] >= low)) continue;
    if (high !== null && !(data.entropy[row] <= high)) continue;
    if (group && (data.group[row] >= 0) !== (group === "any")) continue;
    if (one !== null && data.group[row] !== one - 1) continue;
    if (boxed) {
      if (!place(row)) continue;
      const lon = data.lon[row], lat = data.lat[row];
      if ((west !== null && lon < west) || (east !== null && lon > east)) continue;
      if ((south !== null && lat < south) || (north !== null && lat > north)) continue;
    }
    if (planeBox) {
      const x = data.x[row], y = data.y[row];
      if (!(x >= planeBox[0] && x <= planeBox[1] && y >= planeBox[2] && y <= planeBox[3])) continue;
    }
    if (text && !data.ids[row].toLowerCase().includes(text) && !captionOf(row).toLowerCase().includes(text)) continue;
    mask[row] = 1;
    shown.push(row);
  }
  page = 0;
  $("clear-plane").hidden = !planeBox;
  draw();
}

/* ---------------------------------------------------------------- colours */

let ink;
function readInk() {
  const style = getComputedStyle(document.documentElement);
  ink = Object.fromEntries(["card", "ink", "muted", "line", "accent", "kept", "dropped", "moved", "faint"].map((name) => [name, style.getPropertyValue("--" + name).trim()]));
}
const hue = (index) => PALETTE[index] ?? `hsl(${Math.round(index * 137.5) % 360} 55% 50%)`;
const packed = new Map();
const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function pack(colour) { // as a pixel of ImageData, on little-endian machines
  if (!packed.has(colour)) {
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
    packed.set(colour, ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0);
  }
  return packed.get(colour);
}
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function ramp(fraction) {
  const at = Math.min(0.9999, Math.max(0, fraction)) * 4, index = Math.floor(at), part = at - index;
  return `rgb(${RAMP[index].map((value, axis) => Math.round(value + part * (RAMP[index + 1][axis] - value))).join(" ")})`;
}

function colouring() { // a function from row to pixel, and the legend
  const kind = $("colour").value;
  if (kind === "scene" || kind === "reason") {
    const names = kind === "scene" ? base.scenes : base.reasons, codes = base[kind], colours = names.map((_, index) => pack(hue(index)));
    const entries = names.map((name, index) => [(kind === "reason" ? REASONS[name] ?? name : name) || "no scene", hue(index)]);
    return [(row) => colours[codes[row]], entries.length > 40 ? entries.slice(0, 40) : entries];
  }
  if (kind === "entropy") {
    const [low, high] = data.range, colours = Array.from({ length: 64 }, (_, index) => pack(ramp(index / 63)));
    return [(row) => colours[Math.min(63, Math.max(0, Math.floor(64 * (data.entropy[row] - low) / (high - low || 1))))],
      [0, 0.25, 0.5, 0.75, 1].map((fraction) => [number(low + fraction * (high - low), 2) + " bits", ramp(fraction)])];
  }
  if (kind === "group") {
    const none = pack(ink.dropped), colours = PALETTE.map(pack);
    return [(row) => (data.group[row] < 0 ? none : colours[data.group[row] % colours.length]), [["in no group", ink.dropped], ["groups, in turn", PALETTE[0]], ["", PALETTE[1]], ["", PALETTE[2]]]];
  }
  const kept = pack(ink.kept), dropped = pack(ink.dropped), hand = pack(ink.moved);
  return [(row) => (moved.size && moved.has(row) ? hand : isKept(row) ? kept : dropped), [["kept", ink.kept], ["dropped", ink.dropped], ["moved by hand", ink.moved]]];
}

/* ---------------------------------------------------------------- plots */

const plots = {};
function plot(id, x, y, nice) {
  const canvas = $(id), own = { canvas, x, y, nice, drag: null };
  plots[id] = own;
  own.bounds = bounds(x, y, nice);
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => { own.drag = [...at(event), ...at(event)]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => { if (own.drag) { own.drag.splice(2, 2, ...at(event)); overlay(own); } });
  canvas.addEventListener("pointerup", () => {
    if (!own.drag) return;
    const [left, top, right, bottom] = own.drag;
    own.drag = null;
    if (Math.abs(right - left) + Math.abs(bottom - top) < 6) choose(nearest(own, left, top));
    else select(id, own, left, top, right, bottom);
  });
  canvas.addEventListener("pointercancel", () => { own.drag = null; overlay(own); });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    event.stopPropagation();
    choose(onward(own, way));
  });
}
function bounds(x, y, nice) {
  const found = [Infinity, -Infinity, Infinity, -Infinity];
  for (let row = 0; row < count; row += 1) {
    if (!Number.isFinite(x[row])) continue;
    found[0] = Math.min(found[0], x[row]); found[1] = Math.max(found[1], x[row]);
    found[2] = Math.min(found[2], y[row]); found[3] = Math.max(found[3], y[row]);
  }
  if (!nice) { // a few outliers would squeeze all others
    const cut = (values) => { const sorted = values.filter(Number.isFinite).sort(); return [sorted[Math.floor(sorted.length * 0.001)], sorted[Math.ceil(sorted.length * 0.999) - 1]]; };
    [found[0], found[1]] = cut(x); [found[2], found[3]] = cut(y);
  }
  const pads = [Math.max((found[1] - found[0]) * 0.04, 1e-3), Math.max((found[3] - found[2]) * 0.04, 1e-3)];
  return [found[0] - pads[0], found[1] + pads[0], found[2] - pads[1], found[3] + pads[1]];
}
const toX = (own, value) => (value - own.bounds[0]) / (own.bounds[1] - own.bounds[0]) * own.wide;
const toY = (own, value) => (1 - (value - own.bounds[2]) / (own.bounds[3] - own.bounds[2])) * own.high;
const fromX = (own, value) => own.bounds[0] + value / own.wide * (own.bounds[1] - own.bounds[0]);
const fromY = (own, value) => own.bounds[2] + (1 - value / own.high) * (own.bounds[3] - own.bounds[2]);

function fit(own) { // the canvas at the screen's pixels, and where every image lies on it
  const ratio = Math.min(2, devicePixelRatio || 1), wide = own.canvas.clientWidth, high = own.canvas.clientHeight;
  if (own.at && own.wide === wide && own.high === high && own.ratio === ratio) return;
  Object.assign(own, { wide, high, ratio });
  own.canvas.width = Math.round(wide * ratio); own.canvas.height = Math.round(high * ratio);
  own.at = new Int32Array(count).fill(-1);
  for (let row = 0; row < count; row += 1) {
    if (!Number.isFinite(own.x[row])) continue;
    const x = Math.min(own.canvas.width - 1, Math.max(0, Math.round(toX(own, own.x[row]) * ratio)));
    const y = Math.min(own.canvas.height - 1, Math.max(0, Math.round(toY(own, own.y[row]) * ratio)));
    own.at[row] = y * own.canvas.width + x;
  }
}

function paint(own, colour) {
  fit(own);
  const { canvas, at } = own, across = canvas.width, context = canvas.getContext("2d");
  const picture = context.createImageData(across, canvas.height), pixels = new Uint32Array(picture.data.buffer);
  pixels.fill(pack(ink.card));
  const side = Math.max(2, Math.round((count > 20000 ? 2 : count > 3000 ? 3 : 4) * own.ratio)), half = side >> 1;
  const dot = (row, value) => {
    const start = at[row] - half * across - half;
    for (let line = 0; line < side; line += 1) for (let step = 0; step < side; step += 1) {
      const index = start + line * across + step;
      if (index >= 0 && index < pixels.length) pixels[index] = value;
    }
  };
  const faint = pack(ink.faint), kept = [], hand = [];
  if (shown.length < count) for (let row = 0; row < count; row += 1) if (!mask[row] && at[row] >= 0) dot(row, faint);
  for (const row of shown) {
    if (at[row] < 0) continue;
    if (moved.size && moved.has(row)) hand.push(row); else if (isKept(row)) kept.push(row); else dot(row, colour(row));
  }
  for (const row of kept) dot(row, colour(row));
  for (const row of hand) dot(row, colour(row));
  own.picture = picture;
  overlay(own);
}

function overlay(own) {
  if (!own.picture) return;
  const context = own.canvas.getContext("2d");
  context.putImageData(own.picture, 0, 0);
  context.save();
  context.scale(own.ratio, own.ratio);
  context.font = "11px system-ui, sans-serif";
  if (own.nice) graticule(own, context);
  const box = own.drag ?? boxOf(own);
  if (box) {
    context.strokeStyle = ink.ink; context.setLineDash([5, 3]); context.lineWidth = 1.5;
    context.strokeRect(Math.min(box[0], box[2]), Math.min(box[1], box[3]), Math.abs(box[2] - box[0]), Math.abs(box[3] - box[1]));
    context.setLineDash([]);
  }
  if (chosen >= 0) {
    const ring = (row, radius, colour) => { if (!Number.isFinite(own.x[row])) return; context.beginPath(); context.arc(toX(own, own.x[row]), toY(own, own.y[row]), radius, 0, 7); context.strokeStyle = ink.card; context.lineWidth = 4; context.stroke(); context.strokeStyle = colour; context.lineWidth = 2; context.stroke(); };
    for (const row of neighboursOf(chosen)) ring(row, 4, ink.muted);
    ring(chosen, 8, ink.ink);
  }
  context.restore();
}
function boxOf(own) {
  if (own !== plots.map) return planeBox && [toX(own, planeBox[0]), toY(own, planeBox[3]), toX(own, planeBox[1]), toY(own, planeBox[2])];
  const [west, east, south, north] = ["west", "east", "south", "north"].map(field);
  if ([west, east, south, north].every((value) => value === null)) return null;
  const [left, right, low, high] = own.bounds;
  return [toX(own, west ?? left), toY(own, north ?? high), toX(own, east ?? right), toY(own, south ?? low)];
}
function graticule(own, context) {
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60].find((value) => (own.bounds[1] - own.bounds[0]) / value <= 8) ?? 60;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  context.strokeStyle = ink.muted; context.globalAlpha = 0.25; context.lineWidth = 1;
  const lines = [[0, own.wide, toX], [2, own.high, toY]];
  for (const [axis, , to] of lines) {
    for (let value = Math.ceil(own.bounds[axis] / step) * step; value <= own.bounds[axis + 1]; value += step) {
      const at = Math.round(to(own, value)) + 0.5;
      context.beginPath();
      if (axis === 0) { context.moveTo(at, 0); context.lineTo(at, own.high); } else { context.moveTo(0, at); context.lineTo(own.wide, at); }
      context.stroke();
      context.globalAlpha = 1; context.lineWidth = 3; context.strokeStyle = ink.card; context.fillStyle = ink.ink;
      const text = number(Math.abs(value) < 1e-9 ? 0 : Math.abs(value), digits) + "°" + (Math.abs(value) < 1e-9 ? "" : axis === 0 ? (value < 0 ? "W" : "E") : value < 0 ? "S" : "N");
      const where = axis === 0 ? [at + 3, own.high - 4] : [3, at - 3];
      if (axis || at < own.wide - 40) { context.strokeText(text, ...where); context.fillText(text, ...where); }
      context.strokeStyle = ink.muted; context.globalAlpha = 0.25; context.lineWidth = 1;
    }
  }
  context.globalAlpha = 1;
}
function nearest(own, x, y) {
  let best = -1, least = 30 ** 2;
  for (const row of shown) {
    const away = (toX(own, own.x[row]) - x) ** 2 + (toY(own, own.y[row]) - y) ** 2;
    if (away < least) [best, least] = [row, away];
  }
  return best;
}
function onward(own, [right, down]) { // the nearest image shown in a direction
  if (chosen < 0 || !Number.isFinite(own.x[chosen])) return shown.find((row) => Number.isFinite(own.x[row])) ?? -1;
  const x = toX(own, own.x[chosen]), y = toY(own, own.y[chosen]);
  let best = chosen, least = Infinity;
  for (const row of shown) {
    const east = toX(own, own.x[row]) - x, south = toY(own, own.y[row]) - y, along = east * right + south * down;
    const aside = Math.abs(east * down) + Math.abs(south * right), cost = along + 2 * aside;
    if (along > 0.5 && aside <= along && cost < least) [best, least] = [row, cost];
  }
  return best;
}
function select(id, own, left, top, right, bottom) {
  const xs = [fromX(own, left), fromX(own, right)].sort((a, b) => a - b), ys = [fromY(own, top), fromY(own, bottom)].sort((a, b) => a - b);
  if (id === "plane") planeBox = [...xs, ...ys];
  else [["west", xs[0]], ["east", xs[1]], ["south", ys[0]], ["north", ys[1]]].forEach(([name, value]) => { $(name).value = value.toFixed(3); });
  refilter();
}

/* ---------------------------------------------------------------- thumbnails */

const inside = new Map(), drawn = new Map();
let beside = false;
function picture(row) { // a span with an image's thumbnail
  const span = document.createElement("span");
  if (live) span.style.background = `center / 100% 100% no-repeat url("image/${row}.png")`;
  else if (inside.has(row)) sheet(span, "var(--inside)", inside.get(row), inside.size);
  else if (beside && drawn.has(row)) {
    const index = drawn.get(row), size = metadata.side ** 2, file = Math.floor(index / size);
    sheet(span, `url("thumbs/${String(file).padStart(4, "0")}.jpg")`, index % size, Math.min(size, metadata.beside - file * size));
  } else span.className = "none";
  return span;
}
function sheet(span, source, index, size) {
  const columns = Math.min(metadata.side, size), lines = Math.ceil(size / columns), x = index % columns, y = Math.floor(index / columns);
  span.style.backgroundImage = source;
  span.style.backgroundSize = `${columns * 100}% ${lines * 100}%`;
  span.style.backgroundPosition = `${columns > 1 ? x / (columns - 1) * 100 : 0}% ${lines > 1 ? y / (lines - 1) * 100 : 0}%`;
}
function tile(row, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "tile" + (isKept(row) ? " kept" : "") + (moved.has(row) ? " moved" : "") + (row === chosen ? " chosen" : "");
  const text = `${data.ids[row]}, ${sceneOf(row)}, ${isKept(row) ? "kept" : "dropped"}${label ? ", " + label : ""}`;
  button.setAttribute("aria-label", text);
  button.title = text;
  button.dataset.row = row;
  button.append(picture(row));
  button.addEventListener("click", () => choose(row));
  return button;
}

/* ---------------------------------------------------------------- one image */

function neighboursOf(row) {
  const found = [];
  for (let place = 0; place < width.neighbours; place += 1) {
    const other = data.neighbours[row * width.neighbours + place];
    if (other >= 0) found.push(other);
  }
  return found;
}
function clusterOf(row) { // images, kept ones, and this one's rank by distance to the centre
  const own = base.dense[row], found = { size: 0, kept: 0, rank: 1 };
  if (own < 0) return null;
  for (let other = 0; other < count; other += 1) if (base.dense[other] === own) {
    found.size += 1;
    found.kept += isKept(other);
    found.rank += base.distance[other] < base.distance[row];
  }
  return found;
}
function nearestKept(row) {
  const near = neighboursOf(row), at = near.findIndex((other) => isKept(other));
  if (at >= 0) return [near[at], data.cosines[row * width.neighbours + at]];
  const other = data.nearest_kept[row];
  return other >= 0 && isKept(other) ? [other, data.nearest_cosine[row]] : null;
}
function why(row, cluster) {
  const reason = reasonOf(row), bits = number(data.entropy[row], 2), limit = base.entropy_threshold, sentences = [];
  const among = cluster ? ` Its cluster has ${number(cluster.size)} images, of which ${number(cluster.kept)} are kept; by distance from the centre, it is image number ${number(cluster.rank)}.` : "";
  if (moved.has(row)) sentences.push(`Moved ${isKept(row) ? "in" : "out"} by hand; the selection ${base.kept[row] ? "keeps" : "drops"} it.`);
  if (reason === "kept") sentences.push("Kept: it represents similar images within the budget." + among);
  else if (reason === "low_entropy") sentences.push(limit == null ? `Dropped for its low entropy of ${bits} bits.` : `Dropped for its low entropy: ${bits} bits, the threshold is ${number(limit, 2)} bits.`);
  else if (reason === "redundant") sentences.push("Dropped because similar images fill the budget." + among);
  else if (reason === "not_drawn") sentences.push("Dropped: the random draw did not select it.");
  else if (reason === "unreadable") sentences.push("It cannot be read, so it is never kept.");
  else sentences.push(`Reason: ${REASONS[reason] ?? reason}.` + among);
  return sentences;
}
const made = (tag, text, kind) => { const element = document.createElement(tag); if (text !== undefined) element.textContent = text; if (kind) element.className = kind; return element; };

function detail() {
  const box = $("detail");
  if (chosen < 0) { box.replaceChildren(made("h2", "Image"), made("p", "Click a point or an image. Keys: ← → go through the images shown, m moves the chosen one in or out, Esc closes it.", "note")); return; }
  const row = chosen, cluster = clusterOf(row), nearestOne = nearestKept(row), list = made("dl"), near = neighboursOf(row);
  const entry = (name, value) => list.append(made("dt", name), made("dd", value));
  const button = made("button", isKept(row) ? "Move out" : "Move in", "main");
  button.type = "button"; button.id = "move"; button.disabled = reasonOf(row) === "unreadable";
  button.addEventListener("click", () => move(row));
  entry("state", (isKept(row) ? "kept" : "dropped") + (moved.has(row) ? ", moved by hand" : ""));
  entry("scene", sceneOf(row) + (Number.isFinite(base.similarity[row]) ? `, cosine ${number(base.similarity[row], 3)}` : ""));
  if (Number.isFinite(data.entropy[row])) entry("entropy", `${number(data.entropy[row], 2)} bits` + (base.entropy_threshold == null ? "" : `, threshold ${number(base.entropy_threshold, 2)}`));
  if (cluster) entry("cluster", `${base.cluster[row]}: ${number(cluster.kept)} of ${number(cluster.size)} kept, distance ${number(base.distance[row], 3)}, number ${number(cluster.rank)}`);
  if (nearestOne) entry("nearest kept", `${data.ids[nearestOne[0]]}, cosine ${number(nearestOne[1], 3)}`);
  else entry("nearest kept", "none among its neighbours");
  if (data.group[row] >= 0) entry("near-duplicates", `group ${data.group[row] + 1}`);
  if (place(row)) entry("place", `${number(data.lat[row], 3)}°, ${number(data.lon[row], 3)}°`);
  if (captionOf(row)) entry("caption", captionOf(row));
  const neighbours = made("div", undefined, "near");
  near.forEach((other, at) => {
    const cosine = number(data.cosines[row * width.neighbours + at], 3), one = made("div");
    one.append(tile(other, `cosine ${cosine}`), cosine);
    neighbours.append(one);
  });
  box.replaceChildren(made("h2", data.ids[row]), tile(row), ...why(row, cluster).map((text) => made("p", text, "why")), made("p"), list, made("h3", near.length ? `Its ${near.length} nearest images, by cosine` : "It has no neighbours"), neighbours);
  box.children[box.children.length - 4].append(button);
}
function choose(row) {
  chosen = row;
  detail();
  for (const own of Object.values(plots)) overlay(own);
  for (const element of $("grid").children) element.classList.toggle("chosen", Number(element.dataset.row) === row);
}
function move(row) {
  if (reasonOf(row) === "unreadable") return;
  const value = isKept(row) ? 0 : 1;
  if (value === base.kept[row]) moved.delete(row); else moved.set(row, value);
  keep();
  draw(false);
  const again = $("move");
  if (again) again.focus({ preventScroll: true });
}

/* ---------------------------------------------------------------- what is written */

function budget() {
  let inward = 0, outward = 0, kept = base.size;
  for (const value of moved.values()) if (value) { inward += 1; kept += 1; } else { outward += 1; kept -= 1; }
  const found = new Uint8Array(base.clusters);
  let covered = 0;
  for (let row = 0; row < count; row += 1) { const own = base.dense[row]; if (own >= 0 && !found[own] && isKept(row)) { found[own] = 1; covered += 1; } }
  total = { kept, inward, outward, covered };
  const hand = moved.size ? ` · by hand +${inward} −${outward}: ${kept === base.size ? "on budget" : Math.abs(kept - base.size).toLocaleString("en") + (kept > base.size ? " over budget" : " under budget")}` : "";
  const clusters = base.clusters ? ` · ${percent(covered, base.clusters)} of ${number(base.clusters)} clusters have a kept image` : "";
  $("budget").textContent = `${number(kept)} of ${number(count)} images kept, ${percent(count - kept, count)} removed${hand}${clusters}`;
  $("fraction").firstElementChild.style.width = `${100 * kept / count}%`;
  $("fraction").lastElementChild.style.left = `${100 * base.size / count}%`;
  $("hand-text").textContent = moved.size ? `${number(inward)} in, ${number(outward)} out. The changes stay in this browser until you undo them.` : "Nothing yet: choose an image and move it.";
  for (const id of ["save-edits", "undo"]) $(id).disabled = !moved.size;
}
function coverage() {
  const all = new Int32Array(base.scenes.length), kept = new Int32Array(base.scenes.length);
  const unreadable = base.reasons.indexOf("unreadable");
  for (let row = 0; row < count; row += 1) if (base.reason[row] !== unreadable) { all[base.scene[row]] += 1; kept[base.scene[row]] += isKept(row); }
  const codes = [...all.keys()].filter((code) => all[code]).sort((one, other) => all[other] - all[one]);
  const lines = codes.slice(0, MOST_SCENES).map((code) => {
    const line = made("tr"), cell = made("td"), track = made("span", undefined, "track"), part = made("i"), name = made("th", base.scenes[code] || "no scene");
    name.scope = "row";
    part.style.width = `${100 * kept[code] / all[code]}%`;
    track.append(part);
    track.setAttribute("aria-hidden", "true");
    const fraction = made("span", undefined, "fraction");
    fraction.append(track, percent(kept[code], all[code]));
    cell.append(fraction);
    line.append(name, made("td", number(kept[code]), "number"), made("td", number(all[code]), "number"), cell);
    return line;
  });
  $("scenes").tBodies[0].replaceChildren(...lines);
  const reached = codes.filter((code) => kept[code]).length;
  $("coverage").textContent = `${number(reached)} of ${number(codes.length)} scenes have a kept image` + (codes.length > MOST_SCENES ? `; the ${MOST_SCENES} largest are below.` : ".");
}
function histogram() {
  const canvas = $("histogram"), ratio = Math.min(2, devicePixelRatio || 1), wide = canvas.clientWidth, high = 44, bins = 50;
  canvas.width = wide * ratio; canvas.height = high * ratio;
  const [low, top] = data.range, all = new Int32Array(bins), kept = new Int32Array(bins), context = canvas.getContext("2d");
  for (let row = 0; row < count; row += 1) {
    const bin = Math.min(bins - 1, Math.floor(bins * (data.entropy[row] - low) / (top - low || 1)));
    if (bin >= 0) { all[bin] += 1; kept[bin] += isKept(row); }
  }
  const most = Math.max(...all, 1);
  context.scale(ratio, ratio);
  for (const [values, colour] of [[all, ink.dropped], [kept, ink.kept]]) {
    context.fillStyle = colour;
    values.forEach((value, bin) => { const size = value ? Math.max(1, value / most * (high - 2)) : 0; context.fillRect(bin * wide / bins, high - size, wide / bins - 1, size); });
  }
  if (base.entropy_threshold != null) { context.fillStyle = ink.ink; context.fillRect((base.entropy_threshold - low) / (top - low || 1) * wide, 0, 1.5, high); }
}
function grid() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  page = Math.min(pages - 1, Math.max(0, page));
  $("grid").replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((row) => tile(row)));
  $("page-text").textContent = `${number(page + 1)} of ${number(pages)}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
}
function draw(anew = true) {
  const [colour, legend] = colouring();
  budget();
  coverage();
  histogram();
  $("shown").textContent = `${number(shown.length)} of ${number(count)} images shown`;
  for (const own of Object.values(plots)) paint(own, colour);
  if (anew) $("legend").replaceChildren(...legend.map(([name, tint]) => { const item = made("li"), mark = made("i"); mark.style.background = tint; item.append(mark, name); return item; }));
  grid();
  detail();
}
function options(id, names, first, label) {
  const select = $(id), old = select.value;
  select.replaceChildren(new Option(first, ""), ...names.filter((name, index, all) => all.indexOf(name) === index).map((name) => new Option(label(name), name || " ")));
  select.value = [...select.options].some((option) => option.value === old) ? old : "";
}
function menus() {
  options("scene", base.scenes, "all scenes", (name) => name || "no scene");
  options("reason", base.reasons, "all reasons", (name) => REASONS[name] ?? name);
}

/* ---------------------------------------------------------------- moved by hand: kept in the browser, in a file */

const lists = () => ({ added: [...moved].filter(([, value]) => value).map(([row]) => row).sort((a, b) => a - b), removed: [...moved].filter(([, value]) => !value).map(([row]) => row).sort((a, b) => a - b) });
function keep() { try { localStorage.setItem(KEY, JSON.stringify(lists())); } catch { /* a browser that forgets */ } }
function take(given) {
  moved.clear();
  for (const [name, value] of [["added", 1], ["removed", 0]]) for (const row of given[name] ?? []) {
    if (Number.isInteger(row) && row >= 0 && row < count && base.kept[row] !== value && reasonOf(row) !== "unreadable") moved.set(row, value);
  }
}
function tell(text) { $("done").textContent = text; }
function saveEdits() {
  const { added, removed } = lists(), ids = (rows) => rows.map((row) => data.ids[row]);
  const text = JSON.stringify({ selection: metadata.selection, corpus: metadata.corpus, added, removed, added_ids: ids(added), removed_ids: ids(removed) }, null, 1);
  const link = made("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `moved-by-hand-${metadata.selection}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
async function openEdits(file) {
  try {
    const given = JSON.parse(await file.text());
    if (given.corpus !== metadata.corpus) { tell("This file belongs to another corpus."); return; }
    take(given);
    keep();
    refilter();
    tell(`${moved.size} images moved according to the file.`);
  } catch { tell("This file contains no list of moved images."); }
}

/* ---------------------------------------------------------------- the server */

let asked = 0, settings = {};
async function post(path, body) {
  const answer = await fetch("api/" + path, { method: "POST", headers: { "Content-Type": "application/json", "X-Page": "1" }, body: JSON.stringify(body) });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}
async function busy(text, work) {
  const started = performance.now(), show = () => { $("busy-text").textContent = `${text}, ${number((performance.now() - started) / 1000, 1)} s`; };
  const clock = setInterval(show, 100);
  $("busy").hidden = false;
  show();
  try { return await work(); } finally { clearInterval(clock); $("busy").hidden = true; $("busy-text").textContent = ""; }
}
async function reselect() {
  const mine = (asked += 1), wanted = { ratio: Number($("ratio").value), uniformity: $("uniformity-label").hidden ? null : Number($("uniformity").value) };
  try {
    const found = await busy("selecting", () => post("select", wanted));
    if (mine !== asked) return;
    adopt(await unpacked(found.data, found.columns), found.scenes, found.reasons, { entropy_threshold: found.entropy_threshold });
    settings = wanted;
    menus();
    refilter();
    $("busy-text").textContent = `selected in ${number(found.seconds, 1)} s`;
  } catch (error) { if (mine === asked) $("busy-text").textContent = error.message; }
}
function serve() {
  const { ratio, uniformity, fixed, forms } = JSON.parse(document.documentElement.dataset.live);
  $("settings").hidden = $("server").hidden = false;
  $("ratio").value = ratio;
  $("uniformity-label").hidden = uniformity === null;
  if (uniformity !== null) $("uniformity").value = uniformity;
  $("ratio").disabled = $("uniformity").disabled = fixed !== "";
  $("fixed").hidden = fixed === "";
  $("fixed").textContent = fixed;
  $("form").replaceChildren(...forms.map((form) => new Option(form, form)));
  let timer;
  const say = () => { $("ratio-text").textContent = percent($("ratio").value, 1); $("uniformity-text").textContent = number($("uniformity").value, 2); };
  for (const id of ["ratio", "uniformity"]) $(id).addEventListener("input", () => { say(); clearTimeout(timer); timer = setTimeout(reselect, 250); });
  $("ratio-text").textContent = percent(ratio, 1); $("uniformity-text").textContent = number(uniformity ?? 0, 2);
  const act = (id, label, path, text) => $(id).addEventListener("click", async () => {
    tell(label + " …");
    try { tell(text(await busy(label, () => post(path, { ...settings, ...lists(), to: $("form").value })))); } catch (error) { tell(error.message); }
  });
  act("save", "saving", "save", (found) => `selection: ${found.selection}`);
  act("export", "exporting", "export", (found) => `export: ${found.export}`);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
}

/* ---------------------------------------------------------------- start */

function listen() {
  let timer;
  $("filters").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refilter, 60); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => { planeBox = null; setTimeout(refilter); });
  $("clear-plane").addEventListener("click", () => { planeBox = null; refilter(); });
  $("colour").addEventListener("change", () => draw());
  $("previous").addEventListener("click", () => { page -= 1; grid(); });
  $("next").addEventListener("click", () => { page += 1; grid(); });
  $("save-edits").addEventListener("click", saveEdits);
  $("open-edits").addEventListener("change", (event) => { if (event.target.files[0]) openEdits(event.target.files[0]); event.target.value = ""; });
  $("undo").addEventListener("click", () => { moved.clear(); keep(); refilter(); });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest?.("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = shown.indexOf(chosen);
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const next = at + (event.key === "ArrowRight" ? 1 : -1);
      if (!shown.length || next >= shown.length) return;
      event.preventDefault();
      choose(shown[Math.max(0, next)]);
      const onPage = Math.floor(Math.max(0, next) / PER_PAGE);
      if (onPage !== page) { page = onPage; grid(); }
    } else if (event.key === "m" && chosen >= 0) move(chosen);
    else if (event.key === "Escape") choose(-1);
  });
  let sized;
  addEventListener("resize", () => { clearTimeout(sized); sized = setTimeout(() => draw(false), 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { packed.clear(); readInk(); draw(); });
}
function pictures() { // the order in which images are shown: mixed, and those with a picture first
  let next = 1;
  const mixed = Uint32Array.from({ length: count }, (_, row) => row);
  for (let row = count - 1; row > 0; row -= 1) { next = (Math.imul(next, 1664525) + 1013904223) >>> 0; const other = next % (row + 1); [mixed[row], mixed[other]] = [mixed[other], mixed[row]]; }
  order = live || beside ? mixed : [...mixed.filter((row) => inside.has(row)), ...mixed.filter((row) => !inside.has(row))];
  const without = count - inside.size;
  $("thumb-note").textContent = live || !without ? "" : beside ? "" : `This page contains the thumbnails of ${number(inside.size)} of ${number(count)} images, both kept and dropped. For the others, put the folder thumbs next to this file.`;
}
const loads = (address) => new Promise((done) => { const image = new Image(); image.onload = () => done(true); image.onerror = () => done(false); image.src = address; });

(async () => {
  data = await unpacked($("data").textContent, metadata.columns);
  $("data").remove();
  for (const { name, width: own } of metadata.columns) width[name] = own;
  for (const [index, row] of data.inside.entries()) inside.set(row, index);
  for (const [index, row] of (data.drawn ?? []).entries()) drawn.set(row, index);
  adopt(data, metadata.scenes, metadata.reasons, { entropy_threshold: metadata.entropy_threshold });
  let low = Infinity, high = -Infinity;
  const unreadable = base.reasons.indexOf("unreadable");
  data.entropy.forEach((value, row) => {
    if (base.reason[row] === unreadable) data.entropy[row] = NaN;
    else if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  });
  data.range = low <= high ? [low, high] : [0, 1];
  const atlas = Uint8Array.from(atob($("atlas").textContent.trim()), (letter) => letter.charCodeAt(0));
  document.documentElement.style.setProperty("--inside", `url("${URL.createObjectURL(new Blob([atlas], { type: "image/jpeg" }))}")`);
  beside = !live && metadata.beside > 0 && (await loads("thumbs/0000.jpg"));
  pictures();
  readInk();
  document.querySelector("main").hidden = false;
  try { take(JSON.parse(localStorage.getItem(KEY) ?? "{}")); } catch { /* nothing kept */ }
  if ("lon" in data) plot("map", data.lon, data.lat, true);
  else { $("map-figure").hidden = true; $("box").hidden = true; }
  plot("plane", data.x, data.y, false);
  menus();
  listen();
  if (live) serve();
  else tell("To change the ratio or uniformity, or to export, run make page SELECTION=DIR on the machine that has the corpus.");
  refilter();
  document.documentElement.dataset.ready = Math.round(performance.now());
})();
