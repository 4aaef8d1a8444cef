// What the pictures in the pack's nodes share: elements, translations, and following a node's widgets.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("../css/pictures.css", import.meta.url).href;
document.head.append(sheet);

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; `svg` makes one of a drawing. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  element.append(...children);
  return element;
}

const KEY = "promptToPrompt"; // of this pack's texts in locales/LANGUAGE/main.json

async function translations() {
  try {
    const all = await (await api.fetchApi("/i18n")).json();
    const language = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? navigator.language ?? "en";
    const own = all[language] ?? all[language.split("-")[0]] ?? {};
    return { texts: { ...all.en?.[KEY], ...own[KEY] }, nodeDefs: own.nodeDefs ?? {} };
  } catch (error) {
    console.warn("prompt-to-prompt: no translations", error);
    return { texts: {}, nodeDefs: {} };
  }
}

let known = {};
const loaded = translations().then((found) => {
  known = found.texts;
  return found;
});

/** The text under a key in the page's language, with {name} replaced by values.name. */
export function text(key, values = {}) {
  return (known[key] ?? key).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Resolves when `text` knows the page's language. */
export const textsLoaded = loaded.then(() => undefined);

/** Names and tooltips of nodes in the page's language, as locales/LANGUAGE/nodeDefs.json has them. */
export const nodeTexts = loaded.then((found) => found.nodeDefs);

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export function widget(node, name) {
  return node?.widgets?.find((each) => each.name === name);
}

/** Whether the value of an input comes by a link. */
export function isLinked(node, name) {
  return node.inputs?.find((input) => input.name === name)?.link != null;
}

/** Sets a widget as if the user had, in either way of drawing nodes. */
export function setWidget(node, name, value) {
  const target = widget(node, name);
  if (!target || target.value === value) return;
  target.value = value;
  target.callback?.(value, app.canvas, node);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** Makes what was changed since the last time one step of undo. */
export function rememberChange() {
  app.canvas.emitBeforeChange?.();
  app.canvas.emitAfterChange?.();
}

const LOOK = 250; // ms from one look at the followed nodes to the next
const followed = new Map(); // element -> {node, read, show, last, wasThere}

/**
 * Calls show(values, node) when what read(node) returns has changed, while the element is on the page.
 *
 * Widgets change by typing, dragging, undo, paste, loading and scripts, and no event covers all of these in
 * every front end; comparing a handful of values four times a second, and before the element is used, does. Where the
 * page keeps the element of a node that undo has replaced by another with its id, the element follows the new one.
 */
export function follow(node, element, read, show) {
  const entry = { node, read, show };
  if (!followed.size) setTimeout(lookAtAll, LOOK);
  followed.set(element, entry);
  for (const use of ["pointerdown", "keydown"]) element.addEventListener(use, () => look(element, entry), true);
}

/** Makes what an element shows be drawn again in the next frame, values changed or not. */
export function redraw(element) {
  const entry = followed.get(element);
  if (!entry) return;
  entry.last = undefined;
  requestAnimationFrame(() => look(element, entry));
}

function lookAtAll() {
  for (const [element, entry] of followed) look(element, entry);
  if (followed.size) setTimeout(lookAtAll, LOOK);
}

function look(element, entry) {
  if (!isThere(entry.node)) succeed(entry);
  if (isThere(entry.node)) entry.wasThere = true;
  else if (entry.wasThere && !element.isConnected) followed.delete(element);
  if (!element.isConnected) return;
  const values = entry.read(entry.node);
  const now = JSON.stringify(values);
  if (now === entry.last) return;
  entry.last = now;
  try {
    entry.show(values, entry.node);
  } catch (error) {
    console.error("prompt-to-prompt", error);
  }
}

function isThere(node) {
  return node.graph?.getNodeById(node.id) === node;
}

function succeed(entry) {
  const found = app.canvas.graph?.getNodeById(entry.node.id);
  if (found?.comfyClass !== entry.node.comfyClass) return;
  entry.node = found;
  entry.last = undefined;
}

/**
 * Adds a picture to a node, below its widgets: not a value, so in no workflow and no prompt.
 *
 * height(room): px that it takes at least, where room is what the other widgets leave to it in a node that the page
 * draws on its canvas.
 */
export function addPicture(node, name, element, height) {
  let others = Infinity;
  const added = node.addDOMWidget(name, "prompt_to_prompt", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height(node.size[1] - others),
    getValue: () => "",
    setValue: () => {},
  });
  added.serialize = false;
  const [width, tall] = node.computeSize();
  others = tall - height(-Infinity);
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], tall)]);
  element.addEventListener("wheel", (event) => forward(element, event), { passive: false });
  return added;
}

/** Wheel events that the picture has no use for go to the canvas. */
function forward(element, event) {
  if (!element.closest(".dom-widget")) return; // nodes that the page draws itself hand them on
  const area = element.querySelector(".p2p-scroll");
  const scrolls = area.scrollHeight > area.clientHeight + 1;
  if (scrolls && !event.ctrlKey && Math.abs(event.deltaY) >= Math.abs(event.deltaX)) return;
  event.preventDefault();
  app.canvas.processMouseWheel(event);
}

/** Names text boxes that lie on the page's canvas: a filled one does not say what it is for. */
export function nameTextBoxes(node, names) {
  const { onDrawForeground } = node;
  node.onDrawForeground = function (context) {
    onDrawForeground?.apply(this, arguments);
    if (this.flags.collapsed || app.canvas.low_quality) return;
    context.save();
    context.font = "10px system-ui, sans-serif";
    context.fillStyle = globalThis.LiteGraph.WIDGET_SECONDARY_TEXT_COLOR;
    const drawn = names.map((name) => widget(this, name)).filter(Boolean).map((each) => [each, each.y]);
    for (const [each, y] of drawn)
      if (each.value && y && !isLinked(this, each.name)) context.fillText(each.label ?? each.name, 12, y + 8);
    context.restore();
    requestAnimationFrame(() => { // the page may have laid the widgets out anew in this drawing
      if (drawn.some(([each, y]) => each.y !== y)) app.canvas.setDirty(true, true);
    });
  };
}
