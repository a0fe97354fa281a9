// Reads a JSON list of Mermaid sources from standard input and writes a JSON list of {svg} or {error}, in the same order.
import { renderMermaidSVG } from "beautiful-mermaid";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

// The layout engine breaks cycles where it likes, so a diagram of states may start at the bottom. In model order, arrows point down
// from the state that the source names first.
const Elk = createRequire(import.meta.url)("elkjs/lib/elk.bundled.js");
const Base = Object.getPrototypeOf(Elk);
class InModelOrder extends Base {
  constructor(...options) {
    super(...options);
    const { dispatcher } = this.worker.worker;
    const dispatch = dispatcher.saveDispatch;
    dispatcher.saveDispatch = (message) => {
      const { graph } = message.data;
      if (graph) graph.layoutOptions["elk.layered.cycleBreaking.strategy"] = "MODEL_ORDER";
      return dispatch.call(dispatcher, message);
    };
  }
}
Object.setPrototypeOf(Elk, InModelOrder);

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
