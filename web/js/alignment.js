// Prompt Pair and Add Target show which words share their attention maps: while the prompts are written, as the
// server reads them, and after a run, as the run read them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import {
  addPicture, clamp, follow, isLinked, make, nameTextBoxes, redraw, svg, text, textsLoaded, widget,
} from "./shared.js";

const ROUTE = "/prompt-to-prompt/alignment";
const PAUSE = 250; // ms without a change before the server is asked
const HEIGHT = 130; // px, at least
const TALLEST = 280; // px that the picture takes before the text boxes get more than they need
const FRAME = 44; // px of the picture's height around its words: the page's margin, padding, the sentence below
const LONG = 15; // words of a prompt up to which both prompts are written out
const FOLDED = 3; // shared words in a row from which a long prompt folds them
const CONTEXT = 2; // words of an edited tag that are shown beside what was edited

const CHOICES = /\{[^{}]*\|[^{}]*\}/; // the page draws one of them when a graph is queued
const COMMENTS = /\/\*[\s\S]*?\*\/|\/\/.*/g; // the page leaves them out of a prompt

/** The Prompt Pair that a node's edit begins at, if the graph says so. */
function start(node) {
  for (let steps = 0; node && steps < 100; steps++) {
    if (node.comfyClass === "P2PPromptPair") return node;
    const slot = node.inputs?.findIndex((input) => input.name === "edit") ?? -1;
    node = slot < 0 ? undefined : node.getInputNode(slot);
  }
}

/** What the node's widgets say: the two prompts and the mode; undefined where a link or a choice decides. */
function prompts(node) {
  const pair = start(node);
  const written = (owner, name) => {
    const value = owner && !isLinked(owner, name) ? widget(owner, name)?.value : undefined;
    return typeof value === "string" && !CHOICES.test(value) ? value.replace(COMMENTS, "") : undefined;
  };
  return { source: written(pair, "source"), target: written(node, "target"), mode: written(node, "mode") };
}

async function ask(values, signal) {
  const response = await api.fetchApi(ROUTE, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(values),
    signal,
  });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

/** Alignment data as pictures of words: for each, its kind, its partners on the other side, and a sentence. */
function read(data) {
  const sides = { source: [], target: [] };
  for (const side of ["source", "target"])
    for (const word of data[side].words)
      sides[side].push({ ...word, kind: side === "source" ? "removed" : "new", partners: [] });
  for (const { source, target, swapped } of data.pairings) {
    for (const [own, other, side] of [[source, target, "source"], [target, source, "target"]])
      for (const index of own) {
        sides[side][index].kind = swapped ? "swapped" : "shared";
        sides[side][index].partners = other;
      }
  }
  for (const [side, other] of [["source", "target"], ["target", "source"]])
    for (const word of sides[side]) {
      const partners = word.partners.map((index) => `"${sides[other][index].text}"`).join(" ");
      const tokens = word.text.startsWith("embedding:")
        ? text("embedding")
        : text(word.tokens === 1 ? "token" : "tokens", { count: word.tokens });
      word.sentence = `"${word.text}" (${tokens}): ${text(`${side}.${word.kind}`, { partners })}`;
    }
  return sides;
}

class Picture {
  constructor() {
    this.open = new Set(); // texts of the runs of shared words that were unfolded
    this.height = 0; // px that the words and what surrounds them need
    this.status = make("div", { class: "p2p-status", role: "status" });
    this.words = make("div", { class: "p2p-words" });
    this.element = make("div", { class: "p2p p2p-alignment", role: "group", "data-capture-wheel": "true" });
    this.element.append(make("div", { class: "p2p-scroll" }, this.words), this.status);
    this.forget();
    this.element.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.arrange()).observe(this.element);
  }

  say(message, kind = "") {
    this.element.setAttribute("aria-label", text("alignment"));
    this.status.textContent = message;
    this.status.dataset.kind = kind;
  }

  /** No alignment: only a message. */
  clear(message, kind) {
    this.words.replaceChildren();
    this.forget();
    this.sides = undefined;
    this.height = 0;
    this.say(message, kind);
  }

  forget() {
    this.chips = { source: [], target: [] };
    this.stops = []; // rows of what the arrow keys walk along
    this.places = new Map(); // chip -> [side, index]
  }

  show(data) {
    this.sides = read(data);
    this.pairings = data.pairings;
    this.edits = data.edits;
    const count = (side, kind) =>
      this.sides[side].filter((word) => !word.comma && (!kind || word.kind === kind)).length;
    this.summary = text("summary", {
      shared: count("target", "shared"),
      swapped: count("target", "swapped"),
      new: count("target", "new"),
      removed: count("source", "removed"),
    });
    this.long = Math.max(count("source"), count("target")) > LONG;
    this.draw();
    this.say(this.summary);
    this.element.setAttribute("aria-description", data.description);
  }

  /** Two rows joined by lines; long prompts as one list of edits, with what they share folded away. */
  draw() {
    this.forget();
    this.lines = svg("svg", { class: "p2p-lines", "aria-hidden": "true" });
    const rows = this.long ? [this.list()] : [this.lines, this.row("source"), this.row("target")];
    this.words.replaceChildren(...rows);
    for (const row of this.stops) for (const stop of row) stop.tabIndex = -1;
    const first = this.stops.flat()[0];
    if (first) first.tabIndex = 0;
    this.arrange();
  }

  row(side) {
    this.stops.push([]);
    return make("div", { class: "p2p-row", role: "list", "aria-label": text(side) },
      make("span", { class: "p2p-name", role: "presentation", "aria-hidden": "true" }, text(side)),
      ...this.sides[side].map((word, index) => this.word(side, index)));
  }

  /** A word as a chip that says what becomes of it; commas are no more than that. */
  word(side, index) {
    const word = this.sides[side][index];
    if (word.comma) return make("span", { class: "p2p-comma", "aria-hidden": "true" }, word.text);
    const chip = make("span", {
      class: "p2p-word",
      role: "listitem",
      "data-side": side,
      "data-kind": word.kind,
      "aria-label": word.sentence,
      title: word.sentence,
    }, word.text);
    const choose = () => this.choose(side, index);
    const leave = () => this.choose();
    chip.addEventListener("focus", choose);
    chip.addEventListener("pointerenter", choose);
    chip.addEventListener("blur", leave);
    chip.addEventListener("pointerleave", leave);
    this.chips[side][index] = chip;
    this.places.set(chip, [side, index]);
    this.stops.at(-1).push(chip);
    return chip;
  }

  list() {
    this.stops.push([]);
    const parts = this.edits.flatMap(({ kind, source, target }, n) => {
      if (kind === "shared") return this.run(target, this.edits[n - 1], this.edits[n + 1]);
      const before = source.map((index) => this.word("source", index));
      const after = target.map((index) => this.word("target", index));
      if (kind !== "swapped") return [...before, ...after].filter((part) => this.places.has(part));
      const arrow = make("span", { class: "p2p-arrow", "aria-hidden": "true" }, "\u2192");
      return [make("span", { class: "p2p-swap", role: "presentation" }, ...before, arrow, ...after)];
    });
    return make("div", { class: "p2p-row p2p-list", role: "list", "aria-label": text("alignment") }, ...parts);
  }

  /** Shared words between two edits: folded, but for the rest of a tag that was edited. */
  run(indices, before, after) {
    const comma = (index) => this.sides.target[index].comma;
    const touches = (edit, end) => {
      const side = edit?.target.length ? "target" : "source";
      return edit && !this.sides[side][edit[side].at(end)].comma;
    };
    const rest = (words) => {
      const length = words.findIndex(comma);
      return length > 0 && length <= CONTEXT ? length : 0;
    };
    const from = touches(before, -1) ? rest(indices) : 0;
    const to = indices.length - (touches(after, 0) ? rest(indices.toReversed()) : 0);
    const show = (words) => words.map((index) => this.word("target", index));
    const middle = indices.slice(from, to);
    if (from >= to || middle.filter((index) => !comma(index)).length < FOLDED) return show(indices);
    return [...show(indices.slice(0, from)), ...this.fold(middle, show), ...show(indices.slice(to))];
  }

  /** A button that stands for words, and the words too once it was pressed. */
  fold(indices, show) {
    const words = indices.filter((index) => !this.sides.target[index].comma);
    const key = words.map((index) => this.sides.target[index].text).join(" ");
    const isOpen = this.open.has(key);
    const label = text("folded", { count: words.length });
    const button = make("button", {
      class: "p2p-fold", type: "button", "aria-expanded": String(isOpen), "data-words": key, title: key,
    }, isOpen ? label : `\u2026 ${label}`);
    button.addEventListener("pointerdown", (event) => event.stopPropagation());
    button.addEventListener("click", () => {
      if (!this.open.delete(key)) this.open.add(key);
      this.draw();
      const again = this.stops.flat().find((stop) => stop.dataset.words === key);
      this.stop(again);
    });
    this.stops.at(-1).push(button);
    return [make("span", { role: "listitem" }, button), ...(isOpen ? show(indices) : [])];
  }

  /** Brings out the lines of one word and says what becomes of it; of no word without arguments. */
  choose(side, index) {
    this.words.toggleAttribute("data-chosen", side !== undefined);
    for (const path of this.lines.children)
      path.toggleAttribute("data-chosen", side !== undefined && path.dataset[side] === String(index));
    this.say(side === undefined ? this.summary : this.sides[side][index].sentence);
  }

  /** Arrow keys walk along the words of a row and over to the other; one stop for the tabulator in all. */
  move(event) {
    const now = document.activeElement;
    const n = this.stops.findIndex((row) => row.includes(now));
    if (n < 0) return;
    const row = this.stops[n];
    const at = row.indexOf(now);
    const next = {
      ArrowLeft: row[at - 1],
      ArrowRight: row[at + 1],
      Home: row[0],
      End: row.at(-1),
      ArrowUp: this.partner(now, this.stops[n - 1]),
      ArrowDown: this.partner(now, this.stops[n + 1]),
    };
    if (!(event.key in next)) return;
    event.preventDefault();
    event.stopPropagation();
    if (next[event.key]) this.stop(next[event.key]);
  }

  stop(next) {
    for (const each of this.stops.flat()) each.tabIndex = each === next ? 0 : -1;
    next.focus();
  }

  /** What a chip belongs to in the other row, else what stands at its place there. */
  partner(chip, row) {
    if (!row) return;
    const [side, index] = this.places.get(chip);
    const found = this.sides[side][index].partners.map((other) => this.chips[side === "source" ? "target" : "source"][other]);
    return found.find((other) => row.includes(other)) ?? row[Math.min(index, row.length - 1)];
  }

  /** Follows the size that the page gave the words. */
  arrange() {
    if (!this.sides) return;
    const height = this.words.offsetHeight + this.status.offsetHeight + FRAME;
    if (height !== this.height) app.canvas.setDirty(true, true); // the page then lays the node out anew
    this.height = height;
    if (!this.long) this.drawLines();
  }

  drawLines() {
    const paths = [];
    const { source: sources, target: targets } = this.chips;
    const wraps = [sources, targets].some((row) => new Set(row.map((chip) => chip.offsetTop)).size > 1);
    this.words.toggleAttribute("data-wraps", wraps); // lines through words are shown for one word at a time
    for (const { source, target, swapped } of this.pairings)
      for (const from of source)
        for (const to of target) {
          const [a, b] = [sources[from], targets[to]];
          if (!a || !b) continue; // commas
          const [startX, startY] = [a.offsetLeft + a.offsetWidth / 2, a.offsetTop + a.offsetHeight];
          const [endX, endY] = [b.offsetLeft + b.offsetWidth / 2, b.offsetTop];
          const bend = Math.max(8, (endY - startY) / 2);
          paths.push(svg("path", {
            d: `M${startX} ${startY}C${startX} ${startY + bend} ${endX} ${endY - bend} ${endX} ${endY}`,
            "data-kind": swapped ? "swapped" : "shared",
            "data-source": from,
            "data-target": to,
          }));
        }
    this.lines.replaceChildren(...paths);
  }
}

const runs = new WeakMap(); // node -> {count, data}: the alignment that its last run found

function attach(node) {
  const picture = new Picture();
  const { element } = picture;
  const tallest = (room) => Math.max(HEIGHT, Math.min(room, TALLEST));
  addPicture(node, "alignment", element, (room) => clamp(picture.height, HEIGHT, tallest(room)));
  if (node.comfyClass === "P2PPromptPair") nameTextBoxes(node, ["source", "target"]);
  let timer;
  let request;

  function update(values, current) {
    clearTimeout(timer);
    request?.abort();
    const { run, encoder, ...written } = values;
    if (Object.values(written).includes(undefined)) {
      if (run) picture.show(runs.get(current).data);
      else picture.clear(text("after_run"));
      return;
    }
    if (!written.source.trim() || !written.target.trim()) {
      picture.clear(text("write"));
      return;
    }
    timer = setTimeout(async () => {
      const asked = (request = new AbortController());
      try {
        const data = await ask({ ...written, encoder }, asked.signal);
        if (!asked.signal.aborted) picture.show(data);
      } catch (error) {
        if (!asked.signal.aborted) picture.clear(error.message, "error");
      }
    }, PAUSE);
  }

  textsLoaded.then(() => redraw(element));
  const watched = (current) => {
    const { count, data } = runs.get(current) ?? {};
    return { ...prompts(current), run: count, encoder: data?.encoder };
  };
  follow(node, element, watched, update);

  const { onExecuted } = node;
  node.onExecuted = function (message) {
    onExecuted?.apply(this, arguments);
    const data = message?.alignment?.[0];
    if (data) runs.set(this, { count: (runs.get(this)?.count ?? 0) + 1, data });
  };
}

app.registerExtension({
  name: "prompt-to-prompt.alignment",
  nodeCreated(node) {
    if (["P2PPromptPair", "P2PAddTarget"].includes(node.comfyClass)) attach(node);
  },
});
