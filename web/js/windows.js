// The windows of tau as attention/schedule.py reads and weighs them; here too, because edges are dragged live.
// tests/browser/test_windows.py gives both the same lines.

// A number has one way to be read, so that the time grows with the length of the line.
const NUMBER = "((?:\\d*\\.)?\\d+)";
const WINDOW = new RegExp(`^\\s*(?:${NUMBER}\\s*-\\s*)?${NUMBER}\\s*$`);

/**
 * The windows of a line, `word: end` or `word: start-end` with commas between them; none if it cannot be read. A phrase
 * may hold commas and colons: its window stands behind its last colon.
 */
export function parseLine(line) {
  const found = [];
  let begun = []; // parts of a phrase that holds commas
  for (const part of line.trim().split(",")) {
    const colon = part.lastIndexOf(":");
    const entry = colon < 0 ? null : WINDOW.exec(part.slice(colon + 1));
    const name = entry ? [...begun, part.slice(0, colon)].join(",").trim() : "";
    if (name) {
      found.push({ name, start: Number(entry[1] ?? 0), end: Number(entry[2]) });
      begun = [];
    } else begun.push(part);
  }
  return begun.length > 1 || begun.join("").trim() ? [] : found;
}

/** Weight of a window at `progress`, 0 to 1: it acts from its start until before its end. */
export function weight({ start, end }, progress, fade) {
  if (progress < start || progress >= end) return 0;
  if (fade <= 0) return 1;
  const falling = end < 1 ? (end - progress) / fade : 1;
  const rising = start > 0 ? (progress - start) / fade : 1;
  return Math.min(1, falling, rising);
}
