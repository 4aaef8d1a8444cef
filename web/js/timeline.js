// tau Scheduler shows its windows over the run, from the first step to the last; their edges can be dragged.
import { app } from "../../../scripts/app.js";
import {
  addPicture, clamp, follow, isLinked, make, redraw, rememberChange, setWidget, svg, text, textsLoaded, widget,
} from "./shared.js";
import { parseLine, weight } from "./windows.js";

const NAMES = 78; // px for the names of the windows, left of the bars
const MARGIN = 10; // px right of them
const ROW = 22; // px from one bar to the next
const BAR = 14; // px, the height of a bar where the window acts fully
const AXIS = 16; // px below the last bar
const FRAME = 72; // px around the chart: the page's margin, padding, a sentence of two lines below
const SHOWN = 4; // windows that fit without scrolling

const FRACTIONS = ["cross_start", "cross_end", "self_start", "self_end", "fade"];

const round = (value) => Math.round(value * 100) / 100;

/** The windows of the words box, each with the number of its line. */
function wordWindows(words) {
  return words.split("\n").flatMap((line, number) => (
    parseLine(line).map((window) => ({ kind: "word", line: number, ...window }))
  ));
}

/** What the node's widgets say, and which of them a link overrides. */
function read(node) {
  const values = Object.fromEntries(FRACTIONS.map((name) => [name, Number(widget(node, name)?.value)]));
  values.words = String(widget(node, "words")?.value ?? "");
  values.self_mode = widget(node, "self_mode")?.value;
  values.measure = widget(node, "measure")?.value;
  values.linked = [...FRACTIONS, "words"].filter((name) => isLinked(node, name));
  return values;
}

/** All windows, as the widgets say. */
function windows(values) {
  const self = text(values.self_mode === "mutual" ? "mutual" : "self");
  return [
    { kind: "cross", name: text("cross"), start: values.cross_start, end: values.cross_end },
    { kind: "self", name: self, start: values.self_start, end: values.self_end },
    ...wordWindows(values.words),
  ];
}

/** Where an edge may go: windows begin before they end, and lie in the run. */
function limits(window, edge) {
  return edge === "start" ? [0, clamp(window.end, 0, 1)] : [clamp(window.start, 0, 1), 1];
}

const shortened = (name) => (name.length > 12 ? `${name.slice(0, 11)}\u2026` : name);

class Timeline {
  constructor() {
    this.drawing = svg("svg", {});
    this.status = make("div", { class: "p2p-status", role: "status" });
    this.element = make("div", { class: "p2p p2p-timeline", role: "group", "data-capture-wheel": "true" });
    this.element.append(make("div", { class: "p2p-scroll" }, this.drawing), this.status);
    new ResizeObserver(() => redraw(this.element)).observe(this.element);
  }

  show(values, node) {
    this.node = node;
    this.values = values;
    this.windows = windows(values);
    this.width = Math.max(60, this.element.clientWidth - NAMES - MARGIN - 16);
    const layout = JSON.stringify([this.width, values.linked, this.windows.map(({ kind, name }) => [kind, name])]);
    if (layout !== this.layout) this.build();
    this.layout = layout;
    this.windows.forEach((window, row) => this.update(window, this.rows[row]));
    this.say();
  }

  build() {
    this.element.setAttribute("aria-label", text("timeline"));
    this.drawing.setAttribute("width", NAMES + this.width + MARGIN);
    this.drawing.setAttribute("height", this.windows.length * ROW + AXIS);
    this.rows = this.windows.map((window, row) => this.row(window, row));
    this.drawing.replaceChildren(...this.axis(), ...this.rows.map((row) => row.group));
    app.canvas.setDirty(true, true); // the page then gives the node the height that the rows need
  }

  /** The sentence below the chart: what is wrong, else what the chart shows. */
  say() {
    const wrong = this.windows.find((window) => window.end < window.start || window.end > 1 || window.start > 1);
    const unread = this.values.words.split("\n").find((line) => line.trim() && !parseLine(line).length);
    const message = wrong
      ? text("wrong", { name: wrong.name })
      : unread ? text("unread", { line: unread.trim() })
      : this.values.linked.length ? text("linked", { names: this.values.linked.join(", ") })
      : this.values.measure === "percent" ? text("run.percent") : text("run");
    this.status.textContent = message;
    this.status.dataset.kind = wrong || unread ? "error" : "";
  }

  x(progress) {
    return NAMES + clamp(progress, 0, 1) * this.width;
  }

  axis() {
    const bottom = this.windows.length * ROW;
    return [0, 0.25, 0.5, 0.75, 1].flatMap((progress) => [
      svg("line", { class: "p2p-axis", x1: this.x(progress), x2: this.x(progress), y1: 0, y2: bottom + 3 }),
      svg("text", {
        class: "p2p-axis-text",
        x: this.x(progress),
        y: bottom + AXIS - 2,
        "text-anchor": "middle",
      }, String(progress)),
    ]);
  }

  row(window, row) {
    const top = (ROW - BAR) / 2;
    const name = svg("text", { x: 0, y: top + BAR - 3 }, shortened(window.name), svg("title", {}, window.name));
    const track = svg("rect", { class: "p2p-track", x: NAMES, y: top, width: this.width, height: BAR, rx: 2 });
    const bar = svg("polygon", { class: "p2p-window", "data-kind": window.kind });
    const edges = { start: this.edge(window, row, "start"), end: this.edge(window, row, "end") };
    const handles = Object.values(edges).flatMap(({ handle, grip }) => [handle, grip]);
    return { group: svg("g", { transform: `translate(0 ${row * ROW})` }, name, track, bar, ...handles), bar, edges };
  }

  edge(window, row, edge) {
    const [y, height] = [(ROW - BAR) / 2 - 2, BAR + 4];
    const fixed = this.values.linked.includes(window.kind === "word" ? "words" : `${window.kind}_${edge}`);
    const handle = svg("rect", {
      class: "p2p-edge",
      "data-edge": window.kind === "word" ? `${window.name}_${edge}` : `${window.kind}_${edge}`,
      role: "slider",
      tabindex: 0,
      y,
      height,
      width: 10,
      "aria-label": text(`${window.kind}.${edge}`, { name: window.name }),
      "aria-disabled": fixed ? "true" : undefined,
    }, svg("title"));
    if (!fixed) {
      handle.addEventListener("pointerdown", (event) => this.drag(event, row, edge));
      handle.addEventListener("keydown", (event) => this.press(event, row, edge));
    }
    return { handle, grip: svg("rect", { class: "p2p-grip", y, height, width: 2, rx: 1 }) };
  }

  /** Moves a row's bar and its edges to where the window is. */
  update(window, { bar, edges }) {
    bar.setAttribute("points", this.outline(window));
    for (const [edge, { handle, grip }] of Object.entries(edges)) {
      const x = this.x(window[edge]);
      const [low, high] = limits(window, edge);
      handle.setAttribute("x", x - (edge === "start" ? 9 : 1)); // side by side where a window is empty
      handle.setAttribute("aria-valuemin", low);
      handle.setAttribute("aria-valuemax", high);
      handle.setAttribute("aria-valuenow", window[edge]);
      handle.setAttribute("aria-valuetext", `${Math.round(window[edge] * 100)} %`);
      handle.firstChild.textContent = `${handle.getAttribute("aria-label")}: ${window[edge]}`;
      grip.setAttribute("x", x - 1);
    }
  }

  /** The window's weight over the run, as the corners of a filled shape. */
  outline(window) {
    const { start, end } = window;
    const { fade } = this.values;
    if (end <= start) return "";
    const top = (ROW - BAR) / 2;
    const corners = [start, start + fade, (start + end) / 2, end - fade, end]
      .filter((progress) => progress >= start && progress <= end)
      .sort((a, b) => a - b);
    const height = (progress) => BAR * weight(window, Math.min(progress, end - 1e-6), fade); // at the end: before it
    const edge = corners.map((progress) => [this.x(progress), top + BAR - height(progress)]);
    return [[this.x(start), top + BAR], ...edge, [this.x(end), top + BAR]].map((point) => point.join()).join(" ");
  }

  /** Moves an edge of the window in a row of the chart. */
  set(row, edge, progress) {
    const window = this.windows[row];
    const value = round(clamp(progress, ...limits(window, edge)));
    if (window.kind === "word") {
      const lines = this.values.words.split("\n");
      lines[window.line] = this.windows
        .filter((other) => other.kind === "word" && other.line === window.line)
        .map((other) => (other === window ? { ...window, [edge]: value } : other))
        .map(({ name, start, end }) => `${name}: ${start ? `${start}-` : ""}${end}`)
        .join(", ");
      setWidget(this.node, "words", lines.join("\n"));
    } else setWidget(this.node, `${window.kind}_${edge}`, value);
    this.show(read(this.node), this.node);
  }

  drag(event, row, edge) {
    if (event.button !== 0) return;
    event.stopPropagation();
    const move = (moved) => {
      const { left, width } = this.drawing.getBoundingClientRect(); // zoomed, as the pointer is
      const scale = width / (NAMES + this.width + MARGIN);
      this.set(row, edge, ((moved.clientX - left) / scale - NAMES) / this.width);
    };
    const stop = () => {
      globalThis.removeEventListener("pointermove", move, true);
      globalThis.removeEventListener("pointerup", stop, true);
      globalThis.removeEventListener("pointercancel", stop, true);
      rememberChange();
    };
    globalThis.addEventListener("pointermove", move, true);
    globalThis.addEventListener("pointerup", stop, true);
    globalThis.addEventListener("pointercancel", stop, true);
  }

  press(event, row, edge) {
    const step = event.shiftKey ? 0.1 : 0.01;
    const now = this.windows[row][edge];
    const next = {
      ArrowLeft: now - step, ArrowDown: now - step, PageDown: now - 0.1, Home: 0,
      ArrowRight: now + step, ArrowUp: now + step, PageUp: now + 0.1, End: 1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.set(row, edge, next);
    rememberChange();
  }
}

app.registerExtension({
  name: "prompt-to-prompt.timeline",
  nodeCreated(node) {
    if (node.comfyClass !== "P2PTauScheduler") return;
    const timeline = new Timeline();
    const rows = () => clamp(timeline.windows?.length ?? 2, 2, SHOWN);
    addPicture(node, "timeline", timeline.element, () => rows() * ROW + AXIS + FRAME);
    textsLoaded.then(() => redraw(timeline.element));
    follow(node, timeline.element, read, (...shown) => timeline.show(...shown));
  },
});
