// Bundles receipt_proof.mjs with the parts of viem that it needs. With --check: fails if the committed file is another one.
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const target = new URL("../static/receipt_proof.js", import.meta.url);
const license = "/*! Contains parts of viem (MIT, https://viem.sh), @noble/curves and @noble/hashes (MIT, Paul Miller). */\n";
const result = await build({
  entryPoints: [new URL("receipt_proof.mjs", import.meta.url).pathname],
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "none",
  write: false,
});
const text = license + result.outputFiles[0].text;
if (process.argv.includes("--check")) {
  if (readFileSync(target, "utf8") !== text) {
    console.error("tallystick/web/static/receipt_proof.js is not what its sources give; run scripts/build-pages");
    process.exit(1);
  }
} else {
  writeFileSync(target, text);
}
