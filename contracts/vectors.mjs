// Signs the messages of tests/vectors/messages.json with viem, an EIP-712 implementation that shares no code with ours, and
// writes what it found beside them: node vectors.mjs > ../tests/vectors/viem.json
import { readFileSync } from "node:fs";
import { hashTypedData } from "viem";
import { privateKeyToAccount } from "viem/accounts";

const input = JSON.parse(readFileSync(new URL("../tests/vectors/messages.json", import.meta.url), "utf8"));
const account = privateKeyToAccount(input.secret);
const found = [];
for (const { name, primaryType, message } of input.cases) {
  const data = { domain: input.domain, types: input.types[primaryType], primaryType, message };
  const [digest, signature] = [hashTypedData(data), await account.signTypedData(data)];
  found.push({ name, digest, signature });
}
console.log(JSON.stringify({ signer: account.address.toLowerCase(), vectors: found }, null, 2));
