// Reads a JSON list of Mermaid sources from standard input and writes a JSON list of {svg} or {error}, in the same order.
import { renderMermaidSVG } from "beautiful-mermaid";
import { readFileSync } from "node:fs";

const colours = { bg: "var(--diagram-background)", fg: "var(--diagram-foreground)", accent: "var(--diagram-accent)" };
const render = (source) => {
  try {
    return { svg: renderMermaidSVG(source, { ...colours, font: "inherit", transparent: true }) };
  } catch (error) {
    return { error: String(error.message ?? error) };
  }
};
process.stdout.write(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(render)));
