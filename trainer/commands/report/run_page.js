// The curves, samples and filters of one run's page. It reads the JSON in #page-data and draws SVG; it needs nothing else.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const view = { x: "step", logX: false, smooth: 0.6, range: null }; // range: the zoomed part of the x axis
  const NAMES = { step: "optimiser steps", tokens: "training tokens", seconds: "seconds of training" };
  const MARGIN = { left: 58, right: 12, top: 8, bottom: 36 };
  const svgName = "http://www.w3.org/2000/svg";
  const charts = [];

  // -- small helpers ---------------------------------------------------------------------------------------------

  const node = (parent, tag, attributes = {}, text) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const draw = (parent, tag, attributes = {}, text) => {
    const made = document.createElementNS(svgName, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const colour = (series, i) => series.colour ?? i % 8; // validation looks the same in all charts
  const finite = (value) => typeof value === "number" && Number.isFinite(value);
  const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const short = (value) => {
    const size = Math.abs(value);
    for (const [unit, letter] of UNITS) if (size >= unit) return `${+(value / unit).toPrecision(4)}${letter}`;
    return size !== 0 && size < 1e-3 ? value.toExponential(1).replace(/\.0e/, "e") : `${+value.toPrecision(4)}`;
  };
  const exact = (value) => {
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toPrecision(5) : `${+value.toPrecision(6)}`;
  };
  const nearest = (values, wanted) => { // index in ascending values
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle; else high = middle;
    }
    return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
  };
  const smoothed = (values, weight) => { // an exponential mean without the bias of its beginning
    if (weight === 0) return values;
    let sum = 0, mass = 0;
    return values.map((value) => {
      if (!finite(value)) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  };

  // -- axes ------------------------------------------------------------------------------------------------------

  const scale = (low, high, from, to, log) => {
    const f = log ? Math.log : (value) => value;
    const a = f(low), b = f(high);
    const at = (value) => from + ((f(value) - a) / (b - a || 1)) * (to - from);
    at.back = (pixel) => {
      const value = a + ((pixel - from) / (to - from || 1)) * (b - a);
      return log ? Math.exp(value) : value;
    };
    return at;
  };
  const ticks = (low, high, most, log) => {
    if (!(high > low)) return [low];
    if (log && high / low > 3) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of [1, 2, 5]) found.push(m * 10 ** e);
      const inside = found.filter((value) => value >= low && value <= high);
      const tens = inside.filter((value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9);
      const kept = inside.length <= most ? inside : tens;
      const every = Math.ceil(kept.length / most);
      if (kept.length > 1) return kept.filter((_, i) => i % every === 0);
    }
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) found.push(i * step);
    return found;
  };

  // -- a chart ---------------------------------------------------------------------------------------------------

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.logY = false;
      this.hidden = new Set();
      this.figure = node(document.getElementById("charts"), "figure", { class: spec.wide ? "chart wide-chart" : "chart", id: `chart-${spec.id}` });
      const head = node(this.figure, "figcaption");
      const title = node(head, "div", { class: "chart-title" });
      node(title, "strong", {}, spec.title);
      node(title, "span", { class: "unit" }, spec.unit);
      const log = node(title, "button", { type: "button", class: "toggle", "aria-pressed": "false", title: "logarithmic y axis" }, "log y");
      log.addEventListener("click", () => {
        this.logY = !this.logY;
        log.setAttribute("aria-pressed", this.logY);
        this.render();
      });
      const legend = node(head, "div", { class: "legend" });
      spec.series.forEach((series, i) => {
        const button = node(legend, "button", { type: "button", class: `key c${colour(series, i)}`, "aria-pressed": "true", title: "show or hide" });
        node(button, "span", { class: "swatch" });
        node(button, "span", {}, series.label);
        button.addEventListener("click", () => {
          const hide = !this.hidden.has(series.key);
          if (hide) this.hidden.add(series.key); else this.hidden.delete(series.key);
          button.setAttribute("aria-pressed", !hide);
          this.render();
        });
      });
      this.box = node(this.figure, "div", { class: "plot" });
      this.svg = draw(this.box, "svg", { role: "img", tabindex: "0", "aria-label": this.summary() });
      this.tip = node(this.box, "div", { class: "tip", hidden: "" });
      this.listen();
      this.render();
      new ResizeObserver(() => {
        if (this.box.clientWidth !== this.width) requestAnimationFrame(() => this.render());
      }).observe(this.box);
    }

    summary() {
      const parts = this.spec.series.map((series) => {
        const values = data[series.from][series.key].filter(finite);
        return `${series.label} from ${exact(values[0])} to ${exact(values[values.length - 1])}`;
      });
      return `${this.spec.title}, ${this.spec.unit}: ${parts.join("; ")}`;
    }

    lines() { // the visible series with their points
      return this.spec.series.map((series, i) => ({ series, i })).filter(({ series }) => !this.hidden.has(series.key)).map(({ series, i }) => {
        const from = data[series.from];
        const raw = from[series.key];
        const x = from[view.x], y = series.smooth ? smoothed(raw, view.smooth) : raw;
        const known = x.map((_, k) => k).filter((k) => finite(y[k]) && finite(x[k]));
        return { series, i, x, steps: from.step, raw, y, known, knownX: known.map((k) => x[k]) };
      });
    }

    rangeX() {
      let low = Infinity, high = -Infinity;
      for (const x of [data.points[view.x], data.evaluations[view.x] || []])
        for (const value of x) if (finite(value) && (!view.logX || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
      if (!(low < Infinity)) return [0, 1];
      return view.range || [view.logX ? low : Math.min(low, 0), high > low ? high : low + 1];
    }

    rangeY(lines, [low, high]) {
      const start = this.spec.trim && !view.range ? low + (high - low) * 0.05 : low; // the steep beginning would flatten the rest
      let bottom = Infinity, top = -Infinity;
      const see = (x, value) => {
        if (!finite(value) || x < start || x > high || (this.logY && value <= 0)) return;
        bottom = Math.min(bottom, value);
        top = Math.max(top, value);
      };
      for (const { series, x, y, raw } of lines)
        y.forEach((value, k) => {
          see(x[k], value);
          if (series.smooth && !this.spec.trim) see(x[k], raw[k]);
        });
      if (!(bottom < Infinity)) return [0, 1];
      if (this.spec.zero && !this.logY) bottom = Math.min(0, bottom);
      if (bottom === top) { const pad = Math.abs(bottom) * 0.1 || 1; return this.logY ? [bottom / 1.1, top * 1.1] : [bottom - pad, top + pad]; }
      if (this.logY) { const pad = (top / bottom) ** 0.06; return [bottom / pad, top * pad]; }
      const pad = (top - bottom) * 0.06;
      return [this.spec.zero ? bottom : bottom - pad, top + pad];
    }

    render() {
      const width = this.width = this.box.clientWidth, height = this.spec.wide ? 340 : 220;
      if (!width) return;
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.setAttribute("height", height);
      const lines = this.drawn = this.lines(), rangeX = this.rangeX(), rangeY = this.rangeY(lines, rangeX);
      const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
      this.x = scale(...rangeX, MARGIN.left, right, view.logX);
      this.y = scale(...rangeY, bottom, MARGIN.top, this.logY);
      this.area = { left: MARGIN.left, right, top: MARGIN.top, bottom };
      const clip = draw(draw(this.svg, "defs"), "clipPath", { id: `clip-${this.spec.id}` });
      draw(clip, "rect", { x: MARGIN.left, y: MARGIN.top - 3, width: right - MARGIN.left, height: bottom - MARGIN.top + 6 });
      this.axes(rangeX, rangeY, width, height);
      const inside = draw(this.svg, "g", { "clip-path": `url(#clip-${this.spec.id})` });
      for (const line of lines) this.curve(inside, line);
      this.cursor = draw(this.svg, "g", { class: "cursor" });
      this.selection = draw(this.svg, "rect", { class: "selection", y: MARGIN.top, height: bottom - MARGIN.top, width: 0, visibility: "hidden" });
    }

    axes(rangeX, rangeY, width, height) {
      const { left, right, top, bottom } = this.area;
      const grid = draw(this.svg, "g", { class: "grid" });
      for (const value of ticks(...rangeY, this.spec.wide ? 7 : 5, this.logY)) {
        const at = this.y(value);
        draw(grid, "line", { x1: left, x2: right, y1: at, y2: at });
        draw(grid, "text", { x: left - 7, y: at + 4, "text-anchor": "end" }, short(value));
      }
      for (const value of ticks(...rangeX, Math.max(3, Math.floor(width / 110)), view.logX)) {
        const at = this.x(value);
        draw(grid, "line", { x1: at, x2: at, y1: top, y2: bottom });
        draw(grid, "text", { x: at, y: bottom + 16, "text-anchor": at > right - 16 ? "end" : "middle" }, short(value));
      }
      draw(grid, "text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle", class: "axis" }, NAMES[view.x]);
    }

    path(x, y, steps) {
      let text = "", pen = false;
      for (let k = 0; k < x.length; k++) {
        if (!finite(y[k]) || !finite(x[k]) || (this.logY && y[k] <= 0) || (view.logX && x[k] <= 0)) { pen = false; continue; }
        const px = this.x(x[k]).toFixed(1), py = this.y(y[k]).toFixed(1);
        text += pen ? (steps ? `H${px}V${py}` : `L${px} ${py}`) : `M${px} ${py}`;
        pen = true;
      }
      return text;
    }

    curve(parent, { series, i, x, y, raw, known }) {
      const group = draw(parent, "g", { class: `c${colour(series, i)}`, id: `curve-${series.key}` });
      if (series.band && data.every > 1) {
        const [low, high] = series.band.map((key) => data[series.from][key]);
        const there = x.map((_, k) => k).filter((k) => finite(low[k]) && finite(high[k]) && finite(x[k]) && !(view.logX && x[k] <= 0) && !(this.logY && low[k] <= 0));
        const forth = there.map((k) => `${this.x(x[k]).toFixed(1)} ${this.y(high[k]).toFixed(1)}`);
        const back = there.reverse().map((k) => `${this.x(x[k]).toFixed(1)} ${this.y(low[k]).toFixed(1)}`);
        if (forth.length > 1) draw(group, "path", { class: "band", d: `M${forth.join("L")}L${back.join("L")}Z` });
      }
      if (series.smooth && view.smooth > 0) draw(group, "path", { class: "raw", d: this.path(x, raw) });
      draw(group, "path", { class: "line", d: this.path(x, y, series.steps) });
      if ((series.from === "evaluations" && known.length <= 60) || known.length === 1)
        for (const k of known)
          if (!(this.logY && y[k] <= 0) && !(view.logX && x[k] <= 0)) draw(group, "circle", { cx: this.x(x[k]).toFixed(1), cy: this.y(y[k]).toFixed(1), r: 2.6 });
    }

    // -- the pointer and the keys ----------------------------------------------------------------------------------

    listen() {
      const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      const bounded = (pixel) => Math.min(Math.max(pixel, this.area.left), this.area.right);
      this.svg.addEventListener("pointermove", (event) => {
        if (this.drag !== undefined) {
          const to = bounded(place(event)), from = this.drag;
          this.selection.setAttribute("x", Math.min(from, to));
          this.selection.setAttribute("width", Math.abs(to - from));
          this.selection.setAttribute("visibility", "visible");
        }
        show(this, this.x.back(bounded(place(event))));
      });
      this.svg.addEventListener("pointerleave", () => { if (this.drag === undefined) hide(); });
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || event.pointerType === "touch") return; // a finger scrolls and taps
        this.drag = bounded(place(event));
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const from = this.drag, to = bounded(place(event));
        this.drag = undefined;
        if (from === undefined || Math.abs(to - from) < 6) { this.selection.setAttribute("visibility", "hidden"); return; }
        zoom([this.x.back(Math.min(from, to)), this.x.back(Math.max(from, to))]);
      });
      this.svg.addEventListener("pointercancel", () => { this.drag = undefined; hide(); });
      this.svg.addEventListener("dblclick", () => zoom(null));
      this.svg.addEventListener("blur", hide);
      this.svg.addEventListener("keydown", (event) => {
        if (event.key === "Escape") { zoom(null); return; }
        const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
        if (!by) return;
        event.preventDefault();
        const x = data.points[view.x];
        const now = this.at === undefined ? (by > 0 ? -1 : x.length) : nearest(x, this.at);
        show(this, x[Math.min(Math.max(now + by, 0), x.length - 1)]);
      });
    }

    mark(value) { // the cursor at a value of x; returns what each visible series has there
      this.at = value;
      this.cursor.replaceChildren();
      const at = this.x(value);
      if (!(at >= this.area.left - 1 && at <= this.area.right + 1)) return [];
      draw(this.cursor, "line", { x1: at, x2: at, y1: this.area.top, y2: this.area.bottom });
      const found = [];
      for (const { series, i, x, steps, raw, y, known, knownX } of this.drawn) {
        if (!known.length) continue;
        const k = known[nearest(knownX, value)];
        found.push({ label: series.label, i: colour(series, i), value: raw[k], smooth: series.smooth && view.smooth > 0 ? y[k] : null, step: steps[k] });
        if (!(this.logY && y[k] <= 0)) draw(this.cursor, "circle", { class: `c${colour(series, i)}`, cx: this.x(x[k]), cy: this.y(y[k]), r: 4, "clip-path": `url(#clip-${this.spec.id})` });
      }
      return found;
    }
  }

  // -- all charts together ---------------------------------------------------------------------------------------

  const show = (active, value) => {
    const x = data.points[view.x], k = nearest(x, value);
    for (const chart of charts) {
      const found = chart.mark(x[k]);
      chart.tip.hidden = chart !== active;
      if (chart !== active) continue;
      chart.tip.replaceChildren();
      const head = `step ${exact(data.points.step[k])}` + (view.x === "step" ? "" : `, ${exact(x[k])} ${view.x}`);
      node(chart.tip, "div", { class: "tip-head" }, data.every > 1 ? `${head} (mean of ${data.every} steps)` : head);
      for (const { label, i, value: own, smooth, step } of found) {
        const row = node(chart.tip, "div", { class: `tip-row c${i}` });
        node(row, "span", { class: "swatch" });
        node(row, "span", {}, step === data.points.step[k] ? label : `${label}, step ${exact(step)}`);
        node(row, "b", {}, exact(own));
        if (smooth !== null) node(row, "i", {}, `smoothed ${exact(+smooth.toPrecision(6))}`);
      }
      const at = chart.x(x[k]), room = chart.box.clientWidth, wide = chart.tip.offsetWidth;
      chart.tip.style.left = `${Math.max(0, at + 14 + wide > room ? at - 14 - wide : at + 14)}px`;
    }
  };
  const hide = () => charts.forEach((chart) => {
    chart.tip.hidden = true;
    chart.at = undefined;
    if (chart.cursor) chart.cursor.replaceChildren();
  });
  const renderAll = () => { charts.forEach((chart) => chart.render()); };
  const zoom = (range) => {
    view.range = range;
    document.getElementById("reset").hidden = range === null;
    hide();
    renderAll();
  };

  const controls = () => {
    for (const input of document.querySelectorAll('input[name="axis"]'))
      input.addEventListener("change", () => { view.x = input.value; zoom(null); });
    const log = document.getElementById("log-x");
    log.addEventListener("click", () => {
      view.logX = !view.logX;
      log.setAttribute("aria-pressed", view.logX);
      zoom(null);
    });
    const slider = document.getElementById("smooth"), said = document.getElementById("smooth-value");
    slider.addEventListener("input", () => {
      view.smooth = +slider.value;
      said.textContent = view.smooth.toFixed(2);
      renderAll();
    });
    document.getElementById("reset").addEventListener("click", () => zoom(null));
  };

  const samples = () => {
    const slider = document.getElementById("sample");
    if (!slider) return;
    const text = document.getElementById("sample-text"), name = document.getElementById("sample-name");
    const choose = (i) => {
      slider.value = i;
      const [header, body] = data.samples[+slider.value];
      text.textContent = body;
      name.textContent = `${header} (${+slider.value + 1} of ${data.samples.length})`;
      slider.setAttribute("aria-valuetext", header);
    };
    slider.addEventListener("input", () => choose(+slider.value));
    document.getElementById("sample-back").addEventListener("click", () => choose(+slider.value - 1));
    document.getElementById("sample-on").addEventListener("click", () => choose(+slider.value + 1));
    choose(data.samples.length - 1);
  };

  const filter = () => {
    const word = document.getElementById("filter"), every = document.getElementById("with-defaults"), told = document.getElementById("filter-count");
    const rows = [...document.querySelectorAll("#config-table tbody tr")];
    const apply = () => {
      const wanted = word.value.trim().toLowerCase();
      let count = 0;
      for (const row of rows) {
        const isDefault = row.children[2].textContent === "default";
        row.hidden = (isDefault && !every.checked) || !row.textContent.toLowerCase().includes(wanted);
        count += !row.hidden;
      }
      told.textContent = `${count} of ${rows.length} keys`;
    };
    word.addEventListener("input", apply);
    every.addEventListener("change", apply);
    apply();
  };

  document.documentElement.classList.add("live");
  if (data.charts.length) {
    for (const spec of data.charts) charts.push(new Chart(spec));
    controls();
  }
  samples();
  filter();
})();
