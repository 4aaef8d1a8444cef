// Prompt Pair and Add Target show which words share their attention maps: while the prompts are written, as the
// server reads them, and after a run, as the run read them.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addPicture, follow, isLinked, make, redraw, svg, text, textsLoaded, widget } from "./shared.js";

const ROUTE = "/prompt-to-prompt/alignment";
const PAUSE = 250; // ms without a change before the server is asked
const HEIGHT = 130; // px, at least

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
    this.status = make("div", { class: "p2p-status", role: "status" });
    this.words = make("div", { class: "p2p-words" });
    this.element = make("div", { class: "p2p p2p-alignment", role: "group", "data-capture-wheel": "true" });
    this.element.append(make("div", { class: "p2p-scroll" }, this.words), this.status);
    this.chips = { source: [], target: [] };
    this.element.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.drawLines()).observe(this.element);
  }

  say(message, kind = "") {
    this.element.setAttribute("aria-label", text("alignment"));
    this.status.textContent = message;
    this.status.dataset.kind = kind;
  }

  /** No alignment: only a message. */
  clear(message, kind) {
    this.words.replaceChildren();
    this.chips = { source: [], target: [] };
    this.sides = undefined;
    this.say(message, kind);
  }

  show(data) {
    this.sides = read(data);
    this.pairings = data.pairings;
    const rows = ["source", "target"].map((side) => this.row(side));
    this.lines = svg("svg", { class: "p2p-lines", "aria-hidden": "true" });
    this.words.replaceChildren(this.lines, ...rows);
    const count = (kind) => this.sides.target.filter((word) => word.kind === kind).length;
    const removed = this.sides.source.filter((word) => word.kind === "removed").length;
    this.summary = text("summary", {
      shared: count("shared"), swapped: count("swapped"), new: count("new"), removed,
    });
    this.say(this.summary);
    this.element.setAttribute("aria-description", data.description);
    this.drawLines();
  }

  row(side) {
    this.chips[side] = this.sides[side].map((word, index) => {
      const chip = make("span", {
        class: "p2p-word",
        role: "listitem",
        "data-kind": word.kind,
        "aria-label": word.sentence,
        title: word.sentence,
        tabindex: side === "source" && index === 0 ? 0 : -1,
      }, word.text);
      const choose = () => this.choose(side, index);
      const leave = () => this.choose();
      chip.addEventListener("focus", choose);
      chip.addEventListener("pointerenter", choose);
      chip.addEventListener("blur", leave);
      chip.addEventListener("pointerleave", leave);
      return chip;
    });
    return make("div", { class: "p2p-row", role: "list", "aria-label": text(side) },
      make("span", { class: "p2p-name", role: "presentation", "aria-hidden": "true" }, text(side)),
      ...this.chips[side]);
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
    const [side, index] = this.place(document.activeElement);
    if (side === undefined) return;
    const row = this.chips[side];
    const other = side === "source" ? "target" : "source";
    const partner = this.sides[side][index].partners[0] ?? Math.min(index, this.chips[other].length - 1);
    const next = {
      ArrowLeft: row[index - 1],
      ArrowRight: row[index + 1],
      Home: row[0],
      End: row.at(-1),
      ArrowUp: side === "target" ? this.chips.source[partner] : undefined,
      ArrowDown: side === "source" ? this.chips.target[partner] : undefined,
    };
    if (!(event.key in next)) return;
    event.preventDefault();
    event.stopPropagation();
    if (!next[event.key]) return;
    document.activeElement.tabIndex = -1;
    next[event.key].tabIndex = 0;
    next[event.key].focus();
  }

  place(chip) {
    for (const side of ["source", "target"]) {
      const index = this.chips[side].indexOf(chip);
      if (index >= 0) return [side, index];
    }
    return [];
  }

  drawLines() {
    if (!this.sides) return;
    const paths = [];
    for (const { source, target, swapped } of this.pairings)
      for (const from of source)
        for (const to of target) {
          const [a, b] = [this.chips.source[from], this.chips.target[to]];
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
  addPicture(node, "alignment", element, () => HEIGHT);
  let timer;
  let request;

  function update(values, current) {
    clearTimeout(timer);
    request?.abort();
    const { run, ...written } = values;
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
        const data = await ask(written, asked.signal);
        if (!asked.signal.aborted) picture.show(data);
      } catch (error) {
        if (!asked.signal.aborted) picture.clear(error.message, "error");
      }
    }, PAUSE);
  }

  textsLoaded.then(() => redraw(element));
  follow(node, element, (current) => ({ ...prompts(current), run: runs.get(current)?.count }), update);

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
