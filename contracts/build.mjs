// Compiles the contracts with the npm `solc` package and writes {abi, bytecode} files. With --check it writes nothing and fails
// if a committed file differs. The output depends on the sources and the locked packages only.
import { createHash } from "node:crypto";
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

// The digest of all that the output depends on. The Python tests compare it with the sources (tests/contracts/freshness.py), so
// that they never run on stale bytecode: for each file, by path, its path and its content, each followed by a zero byte.
function digest() {
  const sources = ["src", "test"].flatMap((folder) =>
    readdirSync(join(here, folder), { recursive: true }).filter((f) => f.endsWith(".sol")).map((f) => `${folder}/${f.replaceAll("\\", "/")}`),
  );
  const hash = createHash("sha256");
  for (const path of [...sources, "package-lock.json", "solc.mjs"].sort()) {
    hash.update(`${path}\0`).update(readFileSync(join(here, path))).update("\0");
  }
  return hash.digest("hex") + "\n";
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
const built = join(here, "build.sha256");
if (!check) {
  writeFileSync(built, digest());
} else if (!existsSync(built) || readFileSync(built, "utf8") !== digest()) {
  console.error(`${built} is not of these sources: run scripts/build-contracts and commit the result`);
  stale = 1;
}
process.exit(stale);
