// Writes the ABI and the NatSpec documents of IEscrow as JSON. Run in the folder contracts.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const solc = createRequire(join(process.cwd(), "package.json"))("solc");
const path = "src/interfaces/IEscrow.sol";
const find = (name) => [name, join("node_modules", name)].find(existsSync);
const read = (name) => (find(name) ? { contents: readFileSync(find(name), "utf8") } : { error: `no such file: ${name}` });
const input = {
  language: "Solidity",
  sources: { [path]: { content: readFileSync(path, "utf8") } },
  settings: { outputSelection: { [path]: { IEscrow: ["abi", "userdoc", "devdoc"] } } },
};
const output = JSON.parse(solc.compile(JSON.stringify(input), { import: read }));
const errors = (output.errors ?? []).filter((entry) => entry.severity === "error");
if (errors.length > 0) {
  console.error(errors.map((entry) => entry.formattedMessage).join("\n"));
  process.exit(1);
}
const { abi, userdoc, devdoc } = output.contracts[path].IEscrow;
process.stdout.write(JSON.stringify({ abi, userdoc, devdoc }));
