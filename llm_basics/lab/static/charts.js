// Line charts on a canvas: min-max bands, linear or log, marks, zoom by dragging, a readout at the pointer.

import { h, clear, number, svg } from "./dom.js";

const PAD = { left: 52, right: 14, top: 12, bottom: 26 };
export const COLORS = 6;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  constructor({ height = 200, label = "", format = number, formatX = number } = {}) {
    Object.assign(this, { height, format, formatX, isLog: false, series: [], marks: [], levels: [], band: null, zoom: null, at: null });
    this.canvas = h("canvas", { role: "img", "aria-label": label, tabindex: "0" });
    this.readout = h("div", { class: "readout", hidden: true });
    this.legend = h("div", { class: "legend" });
    this.element = h("div", { class: "chart" }, this.legend, h("div", { class: "plot" }, this.canvas, this.readout));
    new ResizeObserver(() => this.later()).observe(this.element);
    // a chart out of view is drawn when it comes into view
    new IntersectionObserver((entries) => {
      this.isHidden = !entries.at(-1).isIntersecting;
      if (this.isDue) this.later();
    }).observe(this.element);
    const redraw = () => (this.element.isConnected ? this.later() : window.removeEventListener("themechange", redraw));
    window.addEventListener("themechange", redraw);
    this.listen();
  }

  // series: [{name, color (0..5), points: [{x, y, lo, hi}], isDashed}]; marks: [{x, text, kind}];
  // levels, across the chart: [{name, y}]; band, behind the curves: {name, points: [{x, lo, hi}]}
  set(series, marks = [], { levels = [], band = null } = {}) {
    Object.assign(this, { series, marks, levels, band });
    const names = series.filter((s) => s.name).map((s) => [s.name, `c${s.color}`]);
    if (band) names.push([band.name, "range"]);
    if (this.names !== String(names)) {
      clear(this.legend, names.map(([name, style]) => h("span", {}, h("i", { class: `swatch ${style}` }), name)));
      this.names = String(names);
    }
    // at once: a second frame for each update would cost as much again
    this.isDue = this.isHidden;
    if (!this.isDue) this.draw();
  }

  later() {
    this.isDue = false;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  listen() {
    const { canvas } = this;
    let start = null;
    const position = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", (event) => {
      start = position(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.at = position(event);
      this.drag = start === null ? null : [start, this.at];
      this.later();
    });
    canvas.addEventListener("pointerup", (event) => {
      const end = position(event);
      if (start !== null && Math.abs(end - start) > 8) {
        this.zoom = [this.value(Math.min(start, end)), this.value(Math.max(start, end))];
      }
      start = this.drag = null;
      this.later();
    });
    canvas.addEventListener("dblclick", () => this.unzoom());
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
      if (step) this.point(Math.min(this.width - PAD.right, Math.max(PAD.left, (this.at ?? PAD.left) + step)));
      if (event.key === "Escape") this.unzoom();
      if (step) event.preventDefault();
    });
  }

  point(at) {
    this.at = at;
    this.later();
  }

  unzoom() {
    this.zoom = null;
    this.later();
  }

  value(pixel) {
    const share = (pixel - PAD.left) / (this.width - PAD.left - PAD.right);
    return this.x0 + share * (this.x1 - this.x0);
  }

  pixelX(x) {
    return PAD.left + ((x - this.x0) / (this.x1 - this.x0)) * (this.width - PAD.left - PAD.right);
  }

  pixelY(y) {
    const scale = this.isLog ? Math.log10 : (v) => v;
    const share = (scale(y) - scale(this.y0)) / (scale(this.y1) - scale(this.y0));
    return this.height - PAD.bottom - share * (this.height - PAD.top - PAD.bottom);
  }

  isDrawn(y) {
    return y !== null && y !== undefined && Number.isFinite(y) && (!this.isLog || y > 0);
  }

  limits() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { points } of this.series) {
      for (const { x } of points) [x0, x1] = [Math.min(x0, x), Math.max(x1, x)];
    }
    if (this.zoom) [x0, x1] = this.zoom;
    for (const { points } of this.series) {
      for (const { x, y, lo = y, hi = y } of points) {
        if (x < x0 || x > x1) continue;
        if (this.isDrawn(lo)) y0 = Math.min(y0, lo);
        if (this.isDrawn(hi)) y1 = Math.max(y1, hi);
      }
    }
    if (!(x1 >= x0) || !(y1 >= y0)) return false;
    for (const { y } of this.zoom ? [] : this.levels) {
      if (this.isDrawn(y)) [y0, y1] = [Math.min(y0, y), Math.max(y1, y)];
    }
    if (x1 === x0) x1 = x0 + 1;
    const room = this.isLog ? 0 : (y1 - y0) * 0.06 || Math.abs(y0) * 0.1 || 1;
    if (this.isLog && y1 === y0) [y0, y1] = [y0 / 2, y1 * 2];
    Object.assign(this, { x0, x1, y0: y0 - room, y1: y1 + room });
    return true;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const width = (this.width = this.element.clientWidth);
    if (!width) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = this.height * ratio;
    this.canvas.style.height = `${this.height}px`;
    const c = (this.context = this.canvas.getContext("2d"));
    c.scale(ratio, ratio);
    c.font = `11px ${css("--mono")}`;
    if (!this.limits()) {
      this.readout.hidden = true;
      c.fillStyle = css("--faint");
      c.textAlign = "center";
      c.fillText("no values yet", width / 2, this.height / 2);
      return;
    }
    this.drawAxes(c);
    c.save();
    c.beginPath();
    c.rect(PAD.left, 0, width - PAD.left - PAD.right, this.height - PAD.bottom);
    c.clip();
    if (this.band) this.drawBand(c, this.band.points, css("--mark"), 0.28);
    this.drawMarks(c);
    for (const each of this.series) this.drawSeries(c, each);
    this.drawLevels(c);
    if (this.drag) {
      c.fillStyle = css("--accent-soft");
      c.fillRect(this.drag[0], PAD.top, this.drag[1] - this.drag[0], this.height);
    }
    c.restore();
    this.drawReadout(c);
  }

  drawAxes(c) {
    c.strokeStyle = css("--line");
    c.fillStyle = css("--faint");
    c.lineWidth = 1;
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const y of this.isLog ? logTicks(this.y0, this.y1) : ticks(this.y0, this.y1, this.height / 46)) {
      const at = Math.round(this.pixelY(y)) + 0.5;
      c.beginPath();
      c.moveTo(PAD.left, at);
      c.lineTo(this.width - PAD.right, at);
      c.stroke();
      c.fillText(this.format(y, 3), PAD.left - 8, at);
    }
    c.textAlign = "center";
    c.textBaseline = "top";
    let end = 0;
    for (const x of ticks(this.x0, this.x1, Math.max(3, this.width / 90))) {
      const [at, text] = [this.pixelX(x), this.formatX(x)];
      const half = c.measureText(text).width / 2;
      if (at - half < end || at < PAD.left - 1 || at + half > this.width) continue;
      c.fillText(text, at, this.height - PAD.bottom + 8);
      end = at + half + 10;
    }
  }

  drawMarks(c) {
    for (const { x, kind } of this.marks) {
      c.strokeStyle = css({ bad: "--bad", steered: "--accent" }[kind] ?? "--mark");
      c.setLineDash(kind === "steered" ? [] : [2, 3]);
      c.lineWidth = kind === "steered" ? 1.5 : 1;
      c.beginPath();
      c.moveTo(this.pixelX(x), PAD.top);
      c.lineTo(this.pixelX(x), this.height - PAD.bottom);
      c.stroke();
      c.setLineDash([]);
    }
  }

  drawLevels(c) {
    c.textBaseline = "middle";
    c.textAlign = "left";
    const taken = [];
    for (const { name, y } of this.levels.filter((level) => this.isDrawn(level.y))) {
      const at = Math.round(this.pixelY(y)) + 0.5;
      c.strokeStyle = c.fillStyle = css("--soft");
      c.setLineDash([6, 4]);
      c.lineWidth = 1;
      c.beginPath();
      c.moveTo(PAD.left, at);
      c.lineTo(this.width - PAD.right, at);
      c.stroke();
      c.setLineDash([]);
      const text = `${name} ${this.format(y)}`;
      const size = c.measureText(text).width;
      const corners = [-9, 10].flatMap((dy) => [this.width - PAD.right - size - 4, PAD.left + 4].map((x) => [x, at + dy]));
      const isFree = ([x, row]) => row > PAD.top && row < this.height - PAD.bottom - 6
        && !taken.some(([left, right, other]) => x < right && x + size > left && Math.abs(row - other) < 13) && !this.isCurveAt(x, x + size, row);
      const [x, row] = corners.find(isFree) ?? corners[0];
      taken.push([x, x + size, row]);
      c.strokeStyle = css("--card");
      c.lineWidth = 4;
      c.strokeText(text, x, row);
      c.fillText(text, x, row);
    }
  }

  // whether a curve runs through a row of text
  isCurveAt(left, right, row) {
    return this.series.some(({ points }) => points.some((p) => this.isDrawn(p.y) && Math.abs(this.pixelY(p.y) - row) < 11
      && this.pixelX(p.x) > left - 12 && this.pixelX(p.x) < right + 12));
  }

  drawBand(c, points, color, alpha) {
    const drawn = points.filter((p) => this.isDrawn(p.lo) && this.isDrawn(p.hi));
    c.globalAlpha = alpha;
    c.fillStyle = color;
    c.beginPath();
    drawn.forEach((p) => c.lineTo(this.pixelX(p.x), this.pixelY(p.hi)));
    drawn.reverse().forEach((p) => c.lineTo(this.pixelX(p.x), this.pixelY(p.lo)));
    c.fill();
    c.globalAlpha = 1;
  }

  drawSeries(c, { points, color, isDashed }) {
    const stroke = css(`--c${color}`);
    const wide = points.filter((p) => p.lo !== undefined && p.hi > p.lo);
    if (wide.length > 1) this.drawBand(c, wide, stroke, 0.18);
    c.strokeStyle = c.fillStyle = stroke;
    c.lineWidth = isDashed ? 2 : 1.75;
    c.lineJoin = "round";
    let isOpen = false;
    c.beginPath();
    for (const { x, y } of points) {
      if (!this.isDrawn(y)) isOpen = false;
      else if (isOpen) c.lineTo(this.pixelX(x), this.pixelY(y));
      else c.moveTo(this.pixelX(x), this.pixelY(y));
      if (this.isDrawn(y)) isOpen = true;
    }
    c.stroke();
    if (points.length > 40) return;
    for (const { x, y } of points.filter((p) => this.isDrawn(p.y))) {
      c.beginPath();
      c.arc(this.pixelX(x), this.pixelY(y), 2.6, 0, 7);
      c.fill();
    }
  }

  drawReadout(c) {
    const isInside = this.at !== null && this.at >= PAD.left && this.at <= this.width - PAD.right;
    this.readout.hidden = !isInside;
    if (!isInside) return;
    const x = this.value(this.at);
    c.strokeStyle = css("--faint");
    c.beginPath();
    c.moveTo(this.at, PAD.top);
    c.lineTo(this.at, this.height - PAD.bottom);
    c.stroke();
    const rows = this.series.map((each) => [each, nearest(each.points, x)]).filter(([, p]) => p);
    const mark = this.marks.find((m) => Math.abs(this.pixelX(m.x) - this.at) < 5);
    clear(this.readout, h("b", {}, this.formatX(rows.length ? rows[0][1].x : x)),
      rows.map(([each, p]) => h("span", {}, h("i", { class: `swatch c${each.color}` }), this.format(p.y))),
      mark ? h("em", {}, mark.text) : null);
    this.readout.classList.toggle("left", this.at > this.width / 2);
  }
}

function nearest(points, x) {
  let [low, high] = [0, points.length - 1];
  if (high < 0) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle].x < x) low = middle;
    else high = middle;
  }
  return Math.abs(points[low].x - x) < Math.abs(points[high].x - x) ? points[low] : points[high];
}

function ticks(low, high, most) {
  const raw = (high - low) / Math.max(2, Math.floor(most));
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= 0.7 * raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high && found.length < 50; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const m of high / low > 100 ? [1] : [1, 2, 3, 5, 7]) {
      if (m * 10 ** power >= low && m * 10 ** power <= high) found.push(m * 10 ** power);
    }
  }
  return found.length > 1 ? found : ticks(low, high, 4);
}

// a small curve without axes
export function sparkline(values, width = 120, height = 30) {
  const known = values.filter((v) => v !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const at = (v, i) => `${((i / Math.max(1, values.length - 1)) * (width - 4) + 2).toFixed(1)},${
    (height - 3 - ((v - low) / (high - low || 1)) * (height - 6)).toFixed(1)}`;
  const points = values.map((v, i) => (v === null ? null : at(v, i))).filter(Boolean).join(" ");
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "sparkline", "aria-hidden": "true" },
    svg("polyline", { points }));
}
