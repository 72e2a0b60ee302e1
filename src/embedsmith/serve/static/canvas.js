// Points on a canvas: drawn, moved, zoomed, pointed at with a mouse or a finger, and walked with the arrow keys.

const NEAR = 22; // pixels within which a point is meant
const ROOM = 28; // pixels left free around all points

export class Canvas {
  /** `look(place, held)` is called with the point in view; -1 for none. */
  constructor(node, { x, y, neighbours }, look) {
    Object.assign(this, { node, x, y, neighbours, look });
    this.far = [x, y].map((values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0.01));
    this.at = -1;
    this.held = false;
    this.kind = x.map(() => -1);
    this.smooth = false;
    this.dims = {};
    this.rings = [];
    this.view = { scale: 1, x: 0, y: 0 };
    this.fingers = new Map();
    this.listen();
    new ResizeObserver(() => this.size()).observe(node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("theme", () => this.draw());
  }

  colours(kind, smooth) {
    Object.assign(this, { kind, smooth });
    this.draw();
  }

  /** Points that stand back, for one `reason`; null for none. */
  dim(reason, which) {
    this.dims[reason] = which;
    this.draw();
  }

  ring(places) {
    this.rings = places;
    this.draw();
  }

  size() {
    const box = this.node.getBoundingClientRect();
    const dots = window.devicePixelRatio || 1;
    if (!box.width) return;
    [this.wide, this.high] = [box.width, box.height];
    [this.node.width, this.node.height] = [Math.round(box.width * dots), Math.round(box.height * dots)];
    const [right, up] = this.far;
    this.unit = Math.min((this.wide / 2 - ROOM) / right, (this.high / 2 - ROOM) / up);
    this.draw();
  }

  /** Where a point lies on the canvas. */
  place(number) {
    return [
      this.wide / 2 + (this.x[number] * this.unit + this.view.x) * this.view.scale,
      this.high / 2 - (this.y[number] * this.unit + this.view.y) * this.view.scale,
    ];
  }

  dimmed(number) {
    return Object.values(this.dims).some((which) => which?.[number]);
  }

  draw() {
    if (!this.wide || this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.paint();
    });
  }

  paint() {
    const pen = this.node.getContext("2d");
    const dots = this.node.width / this.wide;
    const style = getComputedStyle(this.node);
    const value = (name) => style.getPropertyValue(name).trim();
    const palette = [...Array(9).keys()].map((kind) => value(`--kind-${kind}`));
    const [low, middle, high] = ["--ramp-low", "--ramp-middle", "--ramp-high"].map((name) => rgb(value(name)));
    const [grey, ink, card] = [value("--kind-none"), value("--ink"), value("--card")];
    pen.setTransform(dots, 0, 0, dots, 0, 0);
    pen.clearRect(0, 0, this.wide, this.high);
    const radius = Math.max(1.8, Math.min(4.2, 90 / Math.sqrt(this.x.length))) * Math.min(2, this.view.scale ** 0.35);
    const colour = (number) => {
      const kind = this.kind[number];
      if (kind < 0) return grey;
      return this.smooth ? mixed(kind, low, middle, high) : palette[kind];
    };
    for (const back of [true, false])
      for (let number = 0; number < this.x.length; number++) {
        if (this.dimmed(number) !== back) continue;
        const [x, y] = this.place(number);
        if (x < -9 || y < -9 || x > this.wide + 9 || y > this.high + 9) continue;
        pen.globalAlpha = back ? 0.09 : 0.78;
        pen.fillStyle = colour(number);
        circle(pen, x, y, radius);
        pen.fill();
      }
    pen.globalAlpha = 1;
    this.paintRings(pen, radius, ink, card);
    if (this.at >= 0) this.paintView(pen, radius, ink, card, colour);
  }

  paintRings(pen, radius, ink, card) {
    pen.font = "600 11px system-ui, sans-serif";
    pen.lineWidth = 1.6;
    this.rings.forEach((number, rank) => {
      if (number < 0) return;
      const [x, y] = this.place(number);
      pen.strokeStyle = ink;
      circle(pen, x, y, radius + 3.5);
      pen.stroke();
      pen.lineWidth = 3;
      pen.strokeStyle = card;
      pen.strokeText(String(rank + 1), x + radius + 5, y - radius - 1);
      pen.fillStyle = ink;
      pen.fillText(String(rank + 1), x + radius + 5, y - radius - 1);
      pen.lineWidth = 1.6;
    });
  }

  /** The point in view, with lines to its neighbours. */
  paintView(pen, radius, ink, card, colour) {
    const [x, y] = this.place(this.at);
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    for (const other of this.neighbours[this.at]) {
      const [there, below] = this.place(other);
      pen.globalAlpha = 0.45;
      pen.beginPath();
      pen.moveTo(x, y);
      pen.lineTo(there, below);
      pen.stroke();
      pen.globalAlpha = 1;
      pen.fillStyle = colour(other);
      circle(pen, there, below, radius + 1.5);
      pen.fill();
      pen.stroke();
    }
    pen.fillStyle = colour(this.at);
    circle(pen, x, y, radius + 3);
    pen.fill();
    pen.lineWidth = this.held ? 3 : 2;
    pen.strokeStyle = card;
    pen.stroke();
    pen.strokeStyle = ink;
    circle(pen, x, y, radius + 4.5);
    pen.stroke();
  }

  /** The nearest point that does not stand back; -1 for none near. */
  under(x, y) {
    let [best, least] = [-1, NEAR ** 2];
    for (let number = 0; number < this.x.length; number++) {
      if (this.dimmed(number)) continue;
      const [there, below] = this.place(number);
      const far = (there - x) ** 2 + (below - y) ** 2;
      if (far < least) [best, least] = [number, far];
    }
    return best;
  }

  hold(number, held) {
    if (number === this.at && held === this.held) return;
    [this.at, this.held] = [number, held && number >= 0];
    if (number >= 0) this.reveal(number);
    this.look(this.at, this.held);
    this.draw();
  }

  /** Moves the view where a point lies outside of it. */
  reveal(number) {
    const [x, y] = this.place(number);
    const by = (value, most) => (value < ROOM ? ROOM - value : value > most - ROOM ? most - ROOM - value : 0);
    this.view.x += by(x, this.wide) / this.view.scale;
    this.view.y -= by(y, this.high) / this.view.scale;
  }

  zoom(by, x = this.wide / 2, y = this.high / 2) {
    const scale = Math.min(40, Math.max(1, this.view.scale * by));
    const change = 1 / scale - 1 / this.view.scale;
    this.view.x += (x - this.wide / 2) * change;
    this.view.y -= (y - this.high / 2) * change;
    this.view.scale = scale;
    if (scale === 1) this.view.x = this.view.y = 0;
    this.draw();
  }

  all() {
    this.view = { scale: 1, x: 0, y: 0 };
    this.hold(-1, false);
    this.draw();
  }

  listen() {
    const node = this.node;
    const here = (event) => [event.offsetX, event.offsetY];
    node.addEventListener("pointerdown", (event) => {
      node.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, here(event));
      this.walked = 0;
    });
    node.addEventListener("pointermove", (event) => this.drag(event, here(event)));
    node.addEventListener("pointerup", (event) => {
      if (this.fingers.size === 1 && this.walked < 6) this.hold(this.under(...here(event)), true);
      this.fingers.delete(event.pointerId);
    });
    node.addEventListener("pointercancel", (event) => this.fingers.delete(event.pointerId));
    node.addEventListener("pointerleave", () => {
      if (!this.held && !this.fingers.size && document.activeElement !== node) this.hold(-1, false);
    });
    node.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== node) return; // the page scrolls on
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 300), ...here(event));
    }, { passive: false });
    node.addEventListener("keydown", (event) => this.key(event));
  }

  drag(event, to) {
    const from = this.fingers.get(event.pointerId);
    if (from === undefined) {
      if (!this.held && event.pointerType === "mouse") this.hold(this.under(...to), false);
      return;
    }
    const [across, down] = [to[0] - from[0], to[1] - from[1]];
    this.walked += Math.abs(across) + Math.abs(down);
    if (this.fingers.size === 2) {
      const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
      const [before, after] = [from, to].map((each) => Math.hypot(each[0] - other[0], each[1] - other[1]));
      if (before > 0) this.zoom(after / before, (to[0] + other[0]) / 2, (to[1] + other[1]) / 2);
    } else if (this.walked >= 6) {
      this.view.x += across / this.view.scale;
      this.view.y -= down / this.view.scale;
      this.draw();
    }
    this.fingers.set(event.pointerId, to);
  }

  key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (way) this.walk(...way);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5, ...this.middle());
    else if (event.key === "-") this.zoom(1 / 1.5, ...this.middle());
    else if (event.key === "Enter" && this.at >= 0) this.hold(this.at, !this.held);
    else if (event.key === "Escape" || event.key === "0") this.all();
    else return;
    event.preventDefault();
  }

  middle() {
    return this.at >= 0 ? this.place(this.at) : [this.wide / 2, this.high / 2];
  }

  /** To the nearest point in a direction; from nothing to the point nearest the middle. */
  walk(right, down) {
    const [x, y] = this.middle();
    let [best, least] = [-1, Infinity];
    for (let number = 0; number < this.x.length; number++) {
      if (number === this.at || this.dimmed(number)) continue;
      const [there, below] = this.place(number);
      const along = (there - x) * right + (below - y) * down;
      const aside = Math.abs((there - x) * down) + Math.abs((below - y) * right);
      if (this.at >= 0 && along <= 0.5) continue;
      const far = this.at < 0 ? Math.hypot(there - x, below - y) : along + 2 * aside;
      if (far < least) [best, least] = [number, far];
    }
    if (best >= 0) this.hold(best, this.held);
  }
}

function circle(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
}

const rgb = (hex) => [1, 3, 5].map((from) => parseInt(hex.slice(from, from + 2), 16));

function mixed(share, low, middle, high) {
  const [from, to, part] = share < 0.5 ? [low, middle, 2 * share] : [middle, high, 2 * share - 1];
  return `rgb(${from.map((value, place) => Math.round(value + (to[place] - value) * part)).join(",")})`;
}
