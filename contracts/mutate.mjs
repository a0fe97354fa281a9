// Compiles altered copies of the escrow: reads {"path", "text"} lines, answers each with a line {"bytecode"} or {"error"}.
// It optimizes just enough for the code to fit a contract, since there are hundreds of copies.
import { createInterface } from "node:readline";
import { compile } from "./solc.mjs";

const optimizer = { enabled: true, runs: 1, details: { yul: true, yulDetails: { optimizerSteps: "u:" } } };
for await (const line of createInterface({ input: process.stdin })) {
  const { path, text } = JSON.parse(line);
  const { contracts, problems } = compile(["src/Escrow.sol"], { optimizer, changed: { [path]: text } });
  const errors = problems.filter((e) => e.severity === "error").map((e) => e.message);
  const made = contracts["src/Escrow.sol"]?.Escrow?.evm.bytecode.object;
  console.log(JSON.stringify(made && errors.length === 0 ? { bytecode: made } : { error: errors.join("; ") || "no code" }));
}
