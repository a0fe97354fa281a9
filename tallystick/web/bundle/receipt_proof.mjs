// Checks a proof file in the browser with a wallet library that is not the project's own: who signed what, and whether it adds up.
import { hashStruct, hashTypedData, recoverTypedDataAddress } from "viem";

const form = document.getElementById("proof");
const findings = document.getElementById("findings");
const types = JSON.parse(form.dataset.types);
const charges = JSON.parse(form.dataset.charges);
const TOKENS_PER_PRICE = 1_000_000n;

class Broken extends Error {}

function must(condition, text) {
  if (!condition) throw new Broken(text);
}

/** Numbers of a message as the library takes them: integers as BigInt or number, by their type. */
function read(primaryType, raw) {
  must(raw !== null && typeof raw === "object", `${primaryType}: expected an object`);
  return Object.fromEntries(
    types[primaryType].map(({ name, type }) => {
      must(name in raw, `${primaryType}.${name}: it is missing`);
      return [name, /^u?int/.test(type) ? BigInt(raw[name]) : raw[name]];
    }),
  );
}

const same = (left, right) => String(left).toLowerCase() === String(right).toLowerCase();

function dollars(units) {
  const text = units.toString().padStart(7, "0");
  return `${text.slice(0, -6)}.${text.slice(-6)}`.replace(/\.?0+$/, "");
}

/** The checks in order, each as [name, what was found]. Throws Broken at the first that fails. */
export async function check(text) {
  const proof = JSON.parse(text);
  must(proof?.tallystick === "proof/1", "this is no proof file of the format proof/1; `tally chat --save-proof FILE` writes one");
  const domain = { name: "Tallystick", version: "1", chainId: BigInt(proof.chainId), verifyingContract: proof.contract };
  const order = read("Order", proof.order.message);
  const receipt = read("Receipt", proof.receipt.message);
  const terms = read("Terms", proof.terms);
  const of = (primaryType, message) => ({ domain, types, primaryType, message });

  const payer = await recoverTypedDataAddress({ ...of("Order", order), signature: proof.order.signature });
  must(same(payer, order.payer), `order: signed by ${payer}, not by its payer ${order.payer}`);
  const found = [["Order", `signed by the payer ${order.payer}`]];
  must(same(order.termsHash, hashStruct({ data: terms, types, primaryType: "Terms" })), "terms: not those that the order commits to");
  found.push(["Terms", `of the order: ${terms.model}, at most ${dollars(terms.maxCost)} dollars`]);
  const provider = await recoverTypedDataAddress({ ...of("Receipt", receipt), signature: proof.receipt.signature });
  must(same(provider, receipt.provider), `receipt: signed by ${provider}, not by its provider ${receipt.provider}`);
  must(same(receipt.provider, order.provider), `receipt: of ${receipt.provider}, but the order is on ${order.provider}`);
  must(same(receipt.payer, order.payer), `receipt: for ${receipt.payer}, but the order is of ${order.payer}`);
  must(same(receipt.orderHash, hashTypedData(of("Order", order))), "receipt: of another order");
  found.push(["Receipt", `signed by the provider ${receipt.provider}, for this order`]);
  const cached = BigInt(receipt.cachedInputTokens);
  const input = BigInt(receipt.inputTokens) - cached;
  must(input >= 0n, "receipt: more cached input tokens than input tokens");
  const total = input * terms.inputPrice + cached * terms.cachedInputPrice + BigInt(receipt.outputTokens) * terms.outputPrice;
  const exact = (total + TOKENS_PER_PRICE - 1n) / TOKENS_PER_PRICE;
  const due = charges[Number(receipt.outcome)] === "nothing" ? 0n : exact < terms.maxCost ? exact : terms.maxCost;
  must(receipt.cost <= due, `receipt: costs ${dollars(receipt.cost)}, but the terms allow ${dollars(due)} for its tokens`);
  found.push(["Cost", `${dollars(receipt.cost)} dollars for ${receipt.inputTokens} + ${receipt.outputTokens} tokens, as the terms allow`]);
  must(receipt.cumulativeCost <= order.ceiling, "receipt: its total is above what the order allows");
  found.push(["Total", `${dollars(receipt.cumulativeCost)} dollars between these two, of ${dollars(order.ceiling)} signed for`]);
  found.push(["Contract", `${proof.contract} on chain ${proof.chainId}`]);
  return found;
}

function show(rows, kind) {
  findings.replaceChildren(
    ...rows.flatMap(([name, text]) => {
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      value.textContent = text;
      value.className = kind;
      return [term, value];
    }),
  );
}

async function run(text) {
  try {
    show(await check(text), "good");
    findings.dataset.result = "valid";
  } catch (error) {
    show([["Not valid", error instanceof SyntaxError ? "this is no JSON" : error.message]], "bad");
    findings.dataset.result = "invalid";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run(form.elements.text.value);
});
form.elements.file.addEventListener("change", async () => {
  const [file] = form.elements.file.files;
  if (!file) return;
  if (file.size > 64 * 1024 * 1024) {
    show([["Not read", "the file is larger than 64 MiB; `tally receipt verify` reads it"]], "bad");
    return;
  }
  form.elements.text.value = await file.text();
  await run(form.elements.text.value);
});
