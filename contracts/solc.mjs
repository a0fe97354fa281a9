// The compiler as all scripts here use it: sources from this folder, packages from npm.
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import solc from "solc";

export const here = dirname(fileURLToPath(import.meta.url));

// The compiler's standing note on TSTORE: OpenZeppelin's guard clears what it sets.
const TRANSIENT_STORAGE_NOTE = "2394";

const find = (path) => [here, join(here, "node_modules")].map((base) => join(base, path)).find(existsSync);

// Compiles the named files and what they import; `changed` has the text of files that are to be read as other than they are.
// Returns {contracts, problems}; a warning is a problem.
export function compile(paths, { optimizer = { enabled: true, runs: 1_000_000 }, changed = {} } = {}) {
  const text = (path) => changed[path] ?? readFileSync(find(path), "utf8");
  const input = {
    language: "Solidity",
    sources: Object.fromEntries(paths.map((path) => [path, { content: text(path) }])),
    settings: {
      optimizer,
      viaIR: true,
      evmVersion: "cancun",
      metadata: { bytecodeHash: "none", appendCBOR: false },
      outputSelection: Object.fromEntries(paths.map((path) => [path, { "*": ["abi", "evm.bytecode.object"] }])),
    },
  };
  const read = (path) => (path in changed || find(path) ? { contents: text(path) } : { error: `no such file: ${path}` });
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: read }));
  const problems = (output.errors ?? []).filter((e) => e.errorCode !== TRANSIENT_STORAGE_NOTE);
  return { contracts: output.contracts ?? {}, problems };
}
