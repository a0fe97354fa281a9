// Compiles the contracts with the npm `solc` package and writes {abi, bytecode} files. With --check it writes nothing and fails
// if a committed file differs. The output depends on the sources and the locked packages only.
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { compile, here } from "./solc.mjs";

const root = dirname(here);
const PUBLIC = { folder: join(root, "tallystick/chain/abi"), names: ["Escrow", "TestUSD"] };
const TESTS = { folder: join(root, "tests/contracts/abi"), names: namesIn("test") };

function namesIn(folder) {
  return readdirSync(join(here, folder)).filter((f) => f.endsWith(".sol")).map((f) => f.slice(0, -4)).sort();
}

function compileAll() {
  const paths = [...PUBLIC.names.map((n) => `src/${n}.sol`), ...TESTS.names.map((n) => `test/${n}.sol`)];
  const { contracts, problems } = compile(paths);
  if (problems.length > 0) {
    console.error(problems.map((e) => e.formattedMessage).join("\n"));
    process.exit(1);
  }
  return contracts;
}

function render({ abi, evm }) {
  const entries = abi.map((entry) => "    " + JSON.stringify(entry)).join(",\n");
  return `{\n  "abi": [\n${entries}\n  ],\n  "bytecode": "0x${evm.bytecode.object}"\n}\n`;
}

const check = process.argv.includes("--check");
const contracts = compileAll();
let stale = 0;
for (const [source, { folder, names }] of [["src", PUBLIC], ["test", TESTS]]) {
  for (const name of names) {
    const path = join(folder, `${name}.json`);
    const text = render(contracts[`${source}/${name}.sol`][name]);
    if (check && (!existsSync(path) || readFileSync(path, "utf8") !== text)) {
      console.error(`${path} is not what the sources compile to: run scripts/build-contracts and commit the result`);
      stale = 1;
    } else if (!check) {
      mkdirSync(folder, { recursive: true });
      writeFileSync(path, text);
    }
    console.log(`${name}: ${contracts[`${source}/${name}.sol`][name].evm.bytecode.object.length / 2} bytes`);
  }
}
process.exit(stale);
