// The windows of tau as attention/schedule.py reads and weighs them; here too, because edges are dragged live.
// tests/browser/test_windows.py gives both the same lines.

// A number has one way to be read, and an entry begins at a colon: the time grows with the length of the line.
const NUMBER = "(\\d+(?:\\.\\d+)?|\\.\\d+)";
const ENTRY = new RegExp(`:\\s*(?:${NUMBER}\\s*-\\s*)?${NUMBER}\\s*(?:,|$)`, "g");

/** The windows of a line, `word: end` or `word: start-end` with commas between them; none if it cannot be read. */
export function parseLine(line) {
  const text = line.trim();
  const found = [];
  let at = 0;
  for (const entry of text.matchAll(ENTRY)) {
    found.push({ name: text.slice(at, entry.index).trim(), start: Number(entry[1] ?? 0), end: Number(entry[2]) });
    at = entry.index + entry[0].length;
  }
  return at === text.length && found.every(({ name }) => name) ? found : [];
}

/** Weight of a window at `progress`, 0 to 1: it acts from its start until before its end. */
export function weight({ start, end }, progress, fade) {
  if (progress < start || progress >= end) return 0;
  if (fade <= 0) return 1;
  const falling = end < 1 ? (end - progress) / fade : 1;
  const rising = start > 0 ? (progress - start) / fade : 1;
  return Math.min(1, falling, rising);
}
