// Reads a JSON list of Mermaid sources from standard input and writes a JSON list of {svg} or {error}, in the same order.
import { renderMermaidSVG } from "beautiful-mermaid";
import { readFileSync } from "node:fs";

const colours = Object.fromEntries(
  ["background", "foreground", "accent", "muted", "line"].map((name) => [name, `var(--diagram-${name})`]),
);
const { background: bg, foreground: fg, accent, muted, line } = colours;
const style = { bg, fg, accent, muted, line, font: "inherit", transparent: true };
const render = (source) => {
  try {
    return { svg: renderMermaidSVG(source, style) };
  } catch (error) {
    return { error: String(error.message ?? error) };
  }
};
process.stdout.write(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(render)));
