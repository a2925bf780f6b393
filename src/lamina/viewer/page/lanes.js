// A zoomable map of one address space: lines of bytes, from left to right and from top to bottom, with one or more tracks each.
// It works by mouse, by touch and by keyboard.

const LINES = 16, GAP = 7, TRACK_GAP = 2, OVERVIEW = 14;
const LEAST_SPAN = 256;

class Lanes {
  // `length`: of the address space. `tracks()` gives what is drawn, the first one is that of the keyboard; `describe(track, row)`
  // one line of text; `select(track, row, position)` is called with what the reader chose.
  constructor({ name, length, tracks, describe, select, moved }) {
    Object.assign(this, { name, length, tracks, describe, select, moved, low: 0, span: length, chosen: null, hidden: new Set() });
    this.readout = element("span", { class: "readout" });
    this.bar = element("div", { class: "tools", role: "toolbar", "aria-label": `View of ${name}` },
      button("All", () => this.show(0, this.length), { title: "Show all (Home)" }),
      button("\u2212", () => this.zoom(2), { title: "Zoom out (\u2212)", "aria-label": "Zoom out" }),
      button("+", () => this.zoom(0.5), { title: "Zoom in (+)", "aria-label": "Zoom in" }),
      button("\u2039", () => this.step(-1), { title: "Previous extent (\u2190)", "aria-label": "Previous extent" }),
      button("\u203a", () => this.step(1), { title: "Next extent (\u2192)", "aria-label": "Next extent" }),
      this.readout);
    this.overview = element("canvas", { class: "overview", role: "img", "aria-label": `Overview of ${name}: drag to move the view` });
    this.canvas = element("canvas", {
      class: "map", tabindex: "0", role: "application", "aria-roledescription": "zoomable map", "aria-label":
        `${name}. Left and right arrow: previous and next extent. Plus and minus: zoom. Page up and down: move. ` +
        "Enter: zoom to the extent. Home: show all. The table below has the same as text.",
    });
    this.tip = element("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.root = element("div", { class: "lanes" }, this.bar, this.overview, element("div", { class: "canvas" }, this.canvas, this.tip));
    this.listen();
    this.repaint = () => this.draw();
    repaints.push(this.repaint);
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  listen() {
    const { canvas, overview } = this;
    let held = null, turned = 0;
    canvas.addEventListener("pointerdown", (event) => {
      held = { x: event.offsetX, y: event.offsetY, low: this.low, dragged: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held && (held.dragged || Math.hypot(event.offsetX - held.x, event.offsetY - held.y) > 4)) {
        held.dragged = true;
        this.tip.hidden = true;
        const lines = (event.offsetX - held.x) / this.width + Math.round((event.offsetY - held.y) / this.pitch);
        this.show(held.low - lines * this.span / LINES, this.span);
      } else this.hover(event);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (held && !held.dragged) this.choose(this.at(event.offsetX, event.offsetY));
      held = null;
    });
    canvas.addEventListener("pointercancel", () => { held = null; });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("dblclick", (event) => this.zoom(0.25, this.at(event.offsetX, event.offsetY)));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
      event.preventDefault();
      turned += event.deltaY;
      if (Math.abs(turned) < 40) return;
      this.zoom(turned > 0 ? 2 : 0.5, this.at(event.offsetX, event.offsetY));
      turned = 0;
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    const jump = (event) => this.show((event.offsetX - this.left) / this.width * this.length - this.span / 2, this.span);
    overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); jump(event); });
    overview.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  }

  key(event) {
    const move = { PageUp: -0.5, PageDown: 0.5, ArrowUp: -1 / LINES, ArrowDown: 1 / LINES }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (move) this.show(this.low + move * this.span, this.span);
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") this.step(event.key === "ArrowLeft" ? -1 : 1);
    else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "Home" || event.key === "0") this.show(0, this.length);
    else if (event.key === "End") this.show(this.length, this.span);
    else if (event.key === "Enter") this.zoomToChosen();
    else if (event.key === "Escape") this.choose(null);
    else return;
    event.preventDefault();
  }

  // Show `span` bytes from `low` on, as far as they are inside.
  show(low, span) {
    span = Math.max(Math.min(span, this.length), Math.min(LEAST_SPAN, this.length));
    const unit = span < this.length ? Math.max(1, 2 ** Math.floor(Math.log2(span / 64))) : 1;
    this.span = span;
    this.low = Math.max(0, Math.min(Math.round(low / unit) * unit, this.length - span));
    this.draw();
    this.moved(this);
  }

  zoom(factor, around) {
    const chosen = this.chosen && this.chosen.from < this.low + this.span && this.chosen.to > this.low ? Math.max(this.chosen.from, this.low) : null;
    const fixed = around ? around.position : chosen === null ? this.low + this.span / 2 : chosen;
    const span = Math.max(Math.min(this.span * factor, this.length), Math.min(LEAST_SPAN, this.length));
    this.show(fixed - (fixed - this.low) * (span / this.span), span);
  }

  zoomToChosen() {
    if (!this.chosen) return;
    const { from, to } = this.chosen, wanted = Math.max((to - from) * 4, LEAST_SPAN);
    const span = Math.min(2 ** Math.ceil(Math.log2(wanted)), this.length);
    this.show(from - Math.min((to - from) * 1.5, from), span);
  }

  // Choose the row before or after the chosen one.
  step(direction) {
    const track = this.tracks()[0];
    if (!track.count) return;
    let row = this.chosen && this.chosen.track === 0 ? rowAt(track, this.chosen.from) + direction : rowAt(track, this.low);
    row = Math.max(0, Math.min(row, track.count - 1));
    this.choose({ track: 0, position: track.start[row] });
    const { from, to } = this.chosen;
    if (from < this.low || from >= this.low + this.span || to > this.low + this.span && to - from <= this.span) {
      this.show(from - this.span / 4, this.span);
    }
  }

  choose(where) {
    if (!where) this.chosen = null;
    else {
      const track = this.tracks()[where.track], row = rowAt(track, where.position);
      this.chosen = { track: where.track, from: track.start[row], to: track.start[row + 1] };
      this.select(track, row, where.position);
    }
    this.draw();
  }

  // The byte and the track beneath a point of the map.
  at(x, y) {
    const line = Math.max(0, Math.min(Math.floor((y - 2) / this.pitch), LINES - 1));
    const part = Math.max(0, Math.min((x - this.left) / this.width, 1 - 1e-9));
    const position = Math.min(Math.floor(this.low + (line + part) * this.span / LINES), this.length - 1);
    let track = 0, top = 2 + line * this.pitch;
    this.tracks().forEach((one, index) => {
      if (y >= top) track = index;
      top += this.height(one) + TRACK_GAP;
    });
    return { track, position };
  }

  height(track) {
    return track.thin ? 5 : this.tracks().filter((one) => !one.thin).length > 1 ? 11 : 16;
  }

  hover(event) {
    const where = this.at(event.offsetX, event.offsetY), track = this.tracks()[where.track];
    if (event.offsetX < this.left || !track.count) {
      this.tip.hidden = true;
      return;
    }
    this.tip.textContent = this.describe(track, rowAt(track, where.position));
    this.tip.hidden = false;
    const room = this.canvas.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(0, Math.min(event.offsetX + 12, room))}px`;
    this.tip.style.top = `${event.offsetY + 18}px`;
  }

  draw() {
    const tracks = this.tracks(), wide = this.root.clientWidth;
    if (!wide || !tracks.length) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    this.left = wide < 520 ? 64 : 96;
    this.width = wide - this.left - 3;  // room for the frame
    this.pitch = tracks.reduce((sum, track) => sum + this.height(track) + TRACK_GAP, GAP);
    const total = LINES * this.pitch + 2;
    const context = prepared(this.canvas, wide, total, ratio), width = Math.round(this.width * ratio);
    let top = 2;
    for (const track of tracks) {
      const image = paint(track, this.low, this.low + this.span, LINES, width, this.hidden);
      drawLines(context, image, this.left * ratio, top * ratio, this.height(track) * ratio, this.pitch * ratio);
      top += this.height(track) + TRACK_GAP;
    }
    this.labels(context, ratio, tracks);
    this.edges(context, ratio, tracks[0]);
    this.mark(context, ratio, tracks);
    this.drawOverview(tracks[0], wide, ratio);
    this.readout.textContent = `${range(this.low, this.low + this.span)}  \u00b7  ${size(this.span)}, ${size(this.span / LINES)} a line`;
  }

  labels(context, ratio, tracks) {
    context.fillStyle = variable("--quiet");
    context.font = `${11 * ratio}px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace`;
    context.textBaseline = "top";
    for (let line = 0; line < LINES; line++) {
      const text = hex(Math.floor(this.low + line * this.span / LINES));
      context.fillText(text, 0, (2 + line * this.pitch + (this.height(tracks[0]) - 11) / 2) * ratio, (this.left - 8) * ratio);
    }
  }

  // Where rows begin, if they are wide enough to tell them apart.
  edges(context, ratio, track) {
    const first = rowAt(track, this.low), last = rowAt(track, this.low + this.span);
    const least = this.span / LINES / this.width * 5;  // five pixels
    if (last - first > 400) return;
    context.fillStyle = variable("--background");
    for (let row = first + 1; row <= last; row++) {
      if (track.start[row] - track.start[row - 1] < least || track.start[row + 1] - track.start[row] < least) continue;
      const [line, x] = this.point(track.start[row]);
      if (line < LINES) context.fillRect(Math.round(x * ratio), (2 + line * this.pitch) * ratio, Math.max(1, ratio), this.height(track) * ratio);
    }
  }

  point(position) {
    const lines = (position - this.low) / this.span * LINES, line = Math.floor(lines);
    return [line, this.left + (lines - line) * this.width];
  }

  // A frame around what is chosen.
  mark(context, ratio, tracks) {
    const chosen = this.chosen;
    if (!chosen || !tracks[chosen.track]) return;
    const from = Math.max(chosen.from, this.low), to = Math.min(chosen.to, this.low + this.span);
    if (from >= to) return;
    let top = 2;
    for (let index = 0; index < chosen.track; index++) top += this.height(tracks[index]) + TRACK_GAP;
    const high = this.height(tracks[chosen.track]), perLine = this.span / LINES;
    const frame = (x, y, wide, width, colour) => {
      context.strokeStyle = variable(colour);
      context.lineWidth = width * ratio;
      context.strokeRect((x - 1) * ratio, (y - 1) * ratio, (wide + 2) * ratio, (high + 2) * ratio);
    };
    for (let at = from; at < to;) {
      const line = Math.floor((at - this.low) / perLine + 1e-9), end = Math.min(this.low + (line + 1) * perLine, to);
      const x = this.left + ((at - this.low) / perLine - line) * this.width;
      const wide = Math.max((end - at) / perLine * this.width, 3);
      frame(x, top + line * this.pitch, wide, 5, "--background");
      frame(x, top + line * this.pitch, wide, 2, "--text");
      if (end <= at) break;
      at = end;
    }
  }

  drawOverview(track, wide, ratio) {
    this.overview.hidden = this.span >= this.length;
    if (this.overview.hidden) return;
    const context = prepared(this.overview, wide, OVERVIEW + 6, ratio), width = Math.round(this.width * ratio);
    drawLines(context, this.overviewImage(track, width), this.left * ratio, 3 * ratio, OVERVIEW * ratio, 0);
    const x = this.left + this.low / this.length * this.width, part = Math.max(this.span / this.length * this.width, 4);
    context.strokeStyle = variable("--text");
    context.lineWidth = 1.5 * ratio;
    context.strokeRect(Math.min(x, wide - part) * ratio, 1.5 * ratio, part * ratio - 1, (OVERVIEW + 3) * ratio);
  }

  // All of a track in one line: painted again only when something changes besides the view.
  overviewImage(track, width) {
    const key = [width, isDark(), ...this.hidden].join(" ");
    if (!this.painted || this.painted.track !== track || this.painted.key !== key) {
      this.painted = { track, key, image: paint(track, 0, this.length, 1, width, this.hidden) };
    }
    return this.painted.image;
  }
}

function prepared(canvas, wide, high, ratio) {
  canvas.width = Math.round(wide * ratio);
  canvas.height = Math.round(high * ratio);
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  return context;
}

// The classes of a track with their colours; each can be hidden. `bytes`: of each class, where known.
function legend(lanes, track, bytes) {
  const list = element("div", { class: "legend", role: "group", "aria-label": "Legend: press an entry to hide or show it" });
  if (track.classes.length > STEPS) {
    const scale = element("span", { class: "scale", "aria-hidden": "true" });
    for (const one of track.classes.slice(0, STEPS)) scale.append(swatch(one.colour));
    list.append(element("span", { class: "entry" }, "Start", scale, "End"));
    const rest = track.classes[STEPS];
    list.append(element("span", { class: "entry" }, swatch(rest.colour), rest.label));
    return list;
  }
  track.classes.forEach((one, index) => {
    if (bytes && !bytes[index]) return;
    const shown = !lanes.hidden.has(one.key);
    const entry = button([swatch(one.colour), one.label, bytes ? element("span", { class: "quiet" }, size(bytes[index])) : null], () => {
      if (!lanes.hidden.delete(one.key)) lanes.hidden.add(one.key);
      entry.setAttribute("aria-pressed", String(!lanes.hidden.has(one.key)));
      lanes.draw();
    }, { class: "entry", "aria-pressed": String(shown), "data-key": one.key });
    list.append(entry);
  });
  return list;
}
