"use strict";
// Helpers and pictures: the throughput as SVG, and a timeline of ranks' lanes on a canvas.

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};
const block = (id) => document.getElementById(id)?.textContent ?? null;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const duration = (s) => {
  if (s === null || s === undefined) return "-";
  if (s === 0) return "0 s";
  if (s < 1e-3) return `${(s * 1e6).toPrecision(3)} µs`;
  if (s < 1) return `${(s * 1e3).toPrecision(3)} ms`;
  if (s < 120) return `${s.toPrecision(3)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
};
const bytes = (n) => {
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (n >= factor) return `${(n / factor).toPrecision(3)} ${unit}`;
  return `${n} bytes`;
};
const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(1)} %` : "-");

// Videos an hour as bars; ends, starts: seconds since 1970.
function throughput(place, starts, ends) {
  if (ends.length < 2) {
    place.append(el("p", {}, ends.length ? "One video is done." : "No video is done yet."));
    return;
  }
  const first = starts.reduce((a, b) => Math.min(a, b));
  const last = ends.reduce((a, b) => Math.max(a, b));
  const count = Math.min(60, Math.max(4, Math.ceil(ends.length / 4)));
  const width = Math.max(last - first, 1e-3) / count;
  const bins = new Array(count).fill(0);
  for (const end of ends) bins[Math.min(count - 1, Math.floor((end - first) / width))]++;
  const most = bins.reduce((a, b) => Math.max(a, b));
  const [w, h, left, bottom] = [560, 180, 52, 22];
  const rate = (n) => { const r = (n / width) * 3600; return r >= 100 ? Math.round(r) : r.toPrecision(2); };
  const bars = bins.map((n, i) => {
    const [x, tall] = [left + (i * (w - left)) / count, (n / most) * (h - bottom - 12)];
    const title = `<title>${rate(n)} videos an hour (${n})</title>`;
    return `<rect x="${x}" y="${h - bottom - tall}" width="${(w - left) / count - 1}" height="${tall}" fill="${style("compute")}">${title}</rect>`;
  });
  const axis = `<text x="0" y="16">${rate(most)} / h</text><text x="0" y="${h - bottom}">0</text>
    <text x="${left}" y="${h - 6}">${new Date(first * 1e3).toLocaleString()}</text>
    <text x="${w}" y="${h - 6}" text-anchor="end">after ${duration(last - first)}</text>`;
  const label = `Videos an hour over ${duration(last - first)}: at most ${rate(most)}, ${rate(ends.length / count)} on average.`;
  place.innerHTML = `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="${label}">${bars.join("")}${axis}</svg>`;
  place.append(el("p", { class: "note" }, label));
}

const unpack = (text, type) => new type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const ROWS = [["step", 5], ["pass", 5], ["compute", 11], ["inter", 11], ["intra", 11], ["io", 7], ["predicted", 9]];
const GAP = 14, LABEL = 62, RULER = 20;

// Spans of every rank, zoomable. data: a timeline block; prediction: what the simulator says of a step, or null.
class Timeline {
  constructor(canvas, said, data, prediction) {
    Object.assign(this, { canvas, said, data, prediction });
    this.start = unpack(data.start, Float32Array);
    this.end = unpack(data.end, Float32Array);
    this.sizes = unpack(data.bytes, Float32Array);
    this.rank = unpack(data.rank, Uint16Array);
    this.name = unpack(data.name, Uint16Array);
    this.lane = unpack(data.lane, Uint8Array);
    this.ranks = [...new Set(this.rank)].sort((a, b) => a - b);
    this.whole = this.end.reduce((a, b) => Math.max(a, b), 1e-6);
    this.rows = this.sorted();
    this.steps = this.rows.get(`${this.ranks[0]} step`) ?? [];
    // A row that no rank has anything in only moves the prediction away from what it is about.
    this.shown = ROWS.filter(([name]) => (name === "predicted" ? prediction : this.ranks.some((rank) => this.rows.has(`${rank} ${name}`))));
    this.tall = this.shown.reduce((sum, [, h]) => sum + h + 1, GAP);
    this.fit();
    this.listen();
  }
  row(i) {
    const name = this.data.names[this.name[i]];
    return name === "step" || name === "pass" ? name : this.data.lanes[this.lane[i]];
  }
  sorted() {
    const rows = new Map();
    for (let i = 0; i < this.start.length; i++) {
      const key = `${this.rank[i]} ${this.row(i)}`;
      if (!rows.has(key)) rows.set(key, []);
      rows.get(key).push(i);
    }
    for (const row of rows.values()) row.sort((a, b) => this.start[a] - this.start[b]);
    return rows;
  }
  fit() { this.view(0, this.whole); }
  // Zooms to one step, where the spans of a layer can be told apart.
  step(n) {
    const i = this.steps[Math.min(n, this.steps.length - 1)];
    if (i !== undefined) this.view(this.start[i] - 0.02 * (this.end[i] - this.start[i]), this.end[i]);
  }
  view(from, to) {
    const wide = Math.min(Math.max(to - from, 1e-6), this.whole);
    this.from = Math.min(Math.max(from, 0), this.whole - wide);
    this.to = this.from + wide;
    this.draw();
  }
  zoom(factor, at = (this.from + this.to) / 2) { this.view(at - (at - this.from) * factor, at + (this.to - at) * factor); }
  pan(share) { const by = (this.to - this.from) * share; this.view(this.from + by, this.to + by); }
  x(time) { return LABEL + ((time - this.from) / (this.to - this.from)) * (this.width - LABEL); }
  time(x) { return this.from + ((x - LABEL) / (this.width - LABEL)) * (this.to - this.from); }
  draw() {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.canvas.clientWidth || 900;
    const height = RULER + this.ranks.length * this.tall;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = this.width * ratio;
    this.canvas.height = height * ratio;
    const c = this.canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = "11px system-ui, sans-serif";
    this.ruler(c, height);
    this.colours = { step: style("outside"), pass: style("other"), compute: style("compute"), inter: style("inter"), intra: style("intra"), io: style("io") };
    this.ranks.forEach((rank, at) => this.drawRank(c, rank, RULER + at * this.tall));
  }
  ruler(c, height) {
    c.fillStyle = style("soft");
    const rough = (this.to - this.from) / 8, power = 10 ** Math.floor(Math.log10(rough));
    const each = power * [1, 2, 5, 10].find((n) => n * power >= rough);
    for (let t = Math.ceil(this.from / each) * each; t <= this.to; t += each) {
      c.fillText(t === 0 ? "0" : duration(t), this.x(t) + 2, 12);
      c.fillRect(this.x(t), 0, 1, 16);
      c.globalAlpha = 0.12; c.fillRect(this.x(t), 16, 1, height); c.globalAlpha = 1;
    }
  }
  drawRank(c, rank, top) {
    c.fillStyle = style("ink");
    c.fillText(`rank ${rank}`, 2, top + 10);
    c.save();
    c.beginPath(); c.rect(LABEL, top, this.width - LABEL, this.tall); c.clip();
    let y = top;
    for (const [name, tall] of this.shown) {
      if (name === "predicted") this.drawPredicted(c, rank, y + 2, tall);
      else this.drawRow(c, this.rows.get(`${rank} ${name}`) ?? [], y, tall, this.colours[name]);
      y += tall + 1;
    }
    c.restore();
  }
  drawRow(c, row, y, tall, colour) {
    c.fillStyle = colour;
    let until = -1; // what is thinner than a pixel is drawn once
    for (const i of row) {
      if (this.end[i] < this.from || this.start[i] > this.to) continue;
      const left = Math.max(this.x(this.start[i]), LABEL), right = Math.min(this.x(this.end[i]), this.width);
      if (right <= until) continue;
      const wide = Math.max(right - left - (right - left > 3 ? 1 : 0), 0.8);
      c.fillRect(left, y, wide, tall);
      until = left + wide;
      if (wide > 50 && tall > 9) {
        c.fillStyle = "#fff"; c.fillText(this.data.names[this.name[i]], left + 3, y + 9, wide - 4); c.fillStyle = colour;
      }
    }
  }
  // The simulator's step from where the measured one begins: layer after layer, what is beside attention pale.
  drawPredicted(c, rank, y, tall) {
    const p = this.prediction, one = p.layer_s + p.rest_s;
    const period = Math.max(...p.spans.map((span) => span[0]), 0) + 1, twin = (this.ranks.indexOf(rank) % p.ranks) % period;
    const mine = p.spans.filter((span) => span[0] === twin), part = tall / 3;
    for (const i of this.rows.get(`${rank} step`) ?? []) {
      const begin = this.start[i], total = p.step_s ?? one * p.layers * p.passes;
      if (begin > this.to || begin + total < this.from) continue;
      c.fillStyle = style("outside"); c.globalAlpha = 0.5;
      c.fillRect(this.x(begin), y, Math.max(this.x(begin + total) - this.x(begin), 0.8), tall); c.globalAlpha = 1;
      if (this.x(begin + one) - this.x(begin) < 4) continue;
      for (let n = 0; n < p.layers * p.passes; n++) {
        const zero = begin + n * one;
        if (zero > this.to || zero + one < this.from) continue;
        for (const [, lane, , start, end] of mine) {
          c.fillStyle = this.colours[lane];
          const row = { compute: 0, inter: 1, intra: 2 }[lane];
          c.fillRect(this.x(zero + start), y + row * part, Math.max(this.x(zero + end) - this.x(zero + start) - 0.5, 0.8), part);
        }
        c.fillStyle = this.colours.pass;
        c.fillRect(this.x(zero + p.layer_s), y, Math.max(this.x(zero + one) - this.x(zero + p.layer_s) - 0.5, 0.8), part);
      }
    }
  }
  // The innermost span at a point, in words.
  under(x, y) {
    const rank = this.ranks[Math.floor((y - RULER) / this.tall)];
    let top = (y - RULER) % this.tall;
    for (const [name, tall] of this.shown) {
      if (top >= 0 && top <= tall) {
        if (name === "predicted") return rank === undefined ? "" : `rank ${rank}, predicted: the simulator's step, ${duration(this.prediction.step_s)}`;
        const time = this.time(x), found = (this.rows.get(`${rank} ${name}`) ?? []).findLast((i) => this.start[i] <= time && time <= this.end[i]);
        return found === undefined ? "" : this.words(found);
      }
      top -= tall + 1;
    }
    return "";
  }
  words(i) {
    const size = this.sizes[i] ? `, ${bytes(this.sizes[i])}` : "";
    return `rank ${this.rank[i]}, ${this.data.lanes[this.lane[i]]}: ${this.data.names[this.name[i]]}, ${duration(this.end[i] - this.start[i])} from ${duration(this.start[i])}${size}`;
  }
  listen() {
    const { canvas } = this;
    let held = null;
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.time(event.offsetX)); }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { held = event.offsetX; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointerup", () => { held = null; });
    canvas.addEventListener("pointermove", (event) => {
      if (held !== null) { this.pan((held - event.offsetX) / (this.width - LABEL)); held = event.offsetX; }
      else this.said.textContent = this.under(event.offsetX, event.offsetY);
    });
    const keys = { "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), ArrowLeft: () => this.pan(-0.25), ArrowRight: () => this.pan(0.25), Home: () => this.fit() };
    canvas.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
      this.said.textContent = `from ${duration(this.from)} to ${duration(this.to)}`;
    });
    this.resized = new ResizeObserver(() => { if (canvas.isConnected && canvas.clientWidth !== this.width) this.draw(); });
    this.resized.observe(canvas);
  }
}
