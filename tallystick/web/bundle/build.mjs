// Bundles what pages load, with the parts of viem that it needs. With --check: fails if a committed file is another one.
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const VIEM = "/*! Contains parts of viem (MIT, https://viem.sh), @noble/curves and @noble/hashes (MIT, Paul Miller). */\n";
/** The files of this folder that pages load, and what each must say of the libraries in it. */
const entries = { receipt_proof: VIEM, sign_in: "", wallet_page: VIEM };

for (const [name, license] of Object.entries(entries)) {
  const target = new URL(`../static/${name}.js`, import.meta.url);
  const result = await build({
    entryPoints: [new URL(`${name}.mjs`, import.meta.url).pathname],
    bundle: true,
    format: "esm",
    target: "es2022",
    minify: true,
    legalComments: "none",
    write: false,
  });
  const text = license + result.outputFiles[0].text;
  if (!process.argv.includes("--check")) {
    writeFileSync(target, text);
  } else if (readFileSync(target, "utf8") !== text) {
    console.error(`tallystick/web/static/${name}.js is not what its sources give; run scripts/build-pages`);
    process.exit(1);
  }
}
