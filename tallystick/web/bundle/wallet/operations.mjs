// What an owner can do, as steps that are shown before anything is signed: signatures, and transactions in their order.
import { encodeFunctionData, getAddress, isAddress } from "viem";
import { BadInput, dollars, parseAmount } from "./amounts.mjs";
import { PERMIT_TYPES, escrowAbi, same, tokenAbi } from "./chain.mjs";
import { Problem, Reverted } from "./failures.mjs";

/** How long a permit is valid, in seconds of the chain's time. */
const PERMIT_SECONDS = 20 * 60;
const ZERO = "0x0000000000000000000000000000000000000000";

/** Reads an address. One in mixed case must have the right checksum (EIP-55), which finds most typing errors. */
export function readAddress(text, name) {
  const trimmed = text.trim();
  if (!/^0x[0-9a-fA-F]{40}$/.test(trimmed)) throw new BadInput(`${name}: expected 0x and 40 hex digits, got "${trimmed.slice(0, 60)}".`);
  const digits = trimmed.slice(2);
  const mixed = digits !== digits.toLowerCase() && digits !== digits.toUpperCase();
  if (mixed && !isAddress(trimmed, { strict: true })) throw new BadInput(`${name}: the checksum of ${trimmed} is wrong; a letter may be mistyped.`);
  if (same(trimmed, ZERO)) throw new BadInput(`${name}: expected an account, got the zero address.`);
  return getAddress(trimmed.toLowerCase());
}

export function readSignature(text) {
  const trimmed = text.trim();
  if (!/^0x[0-9a-fA-F]{130}$/.test(trimmed)) throw new BadInput("Signature: expected 0x and 130 hex digits, as the key's program printed it.");
  return trimmed;
}

/** The parameters of a call as [name, text], from the ABI, so that nothing of what is sent stays unseen. */
function shown(abi, functionName, args, decimals) {
  const { inputs } = abi.find((entry) => entry.type === "function" && entry.name === functionName);
  return inputs.map(({ name, type }, index) => {
    const value = args[index];
    if (["amount", "value"].includes(name)) return [name, `${dollars(value, decimals)} (${value} base units)`];
    if (name === "deadline") return [name, new Date(Number(value) * 1000).toISOString()];
    return [name || type, String(value) || "(empty)"];
  });
}

/** A transaction. `again` tells what to do if the page was left after it. */
function send(facts, title, functionName, args, { token = false, again = "" } = {}) {
  const [abi, to] = token ? [tokenAbi, facts.token] : [escrowAbi, facts.escrow];
  return {
    kind: "send",
    title,
    again,
    to,
    data: encodeFunctionData({ abi, functionName, args }),
    rows: [
      ["Calls", `${functionName} of the ${token ? "token" : "escrow contract"} ${to}`],
      ...shown(abi, functionName, args, facts.decimals),
    ],
  };
}

/** Throws Problem unless the account holds the amount. */
async function requireTokens(chain, account, amount) {
  const held = await chain.token("balanceOf", account);
  const { decimals, token } = chain.facts;
  if (held < amount) {
    throw new Problem(`Your account holds ${dollars(held, decimals)} of the token ${token}, but ${dollars(amount, decimals)} are needed.`);
  }
}

/** The approvals before the contract can take an amount: none, one, or two for tokens that change no allowance but to 0. */
async function approvals(chain, account, amount, then) {
  const { facts } = chain;
  const allowance = await chain.token("allowance", account, facts.escrow);
  if (allowance >= amount) return [];
  const again = `The approval is there. ${then} again; it is used then.`;
  const approve = send(facts, `Allow exactly ${dollars(amount, facts.decimals)}`, "approve", [facts.escrow, amount], { token: true, again });
  try {
    await chain.call(approve.to, approve.data, { from: account });
    return [approve];
  } catch (error) {
    if (allowance === 0n || !(error instanceof Reverted)) throw error;
    const reset = send(facts, "Take back the old allowance first, as this token demands", "approve", [facts.escrow, 0n], { token: true, again });
    return [reset, approve];
  }
}

/** A deposit by permit: one signature without gas, and one transaction. Null if the token takes no permits. */
async function permitted(chain, account, key, amount) {
  const { facts } = chain;
  const permit = await chain.permitDomain(account);
  if (permit === null) return null;
  const deadline = BigInt((await chain.head()).time + PERMIT_SECONDS);
  const message = { owner: account, spender: facts.escrow, value: amount, nonce: permit.nonce, deadline };
  const typed = { types: PERMIT_TYPES, primaryType: "Permit", domain: permit.domain, message };
  const sign = {
    kind: "sign",
    title: `Permit the contract to take ${dollars(amount, facts.decimals)} once (EIP-2612, costs no gas)`,
    rows: [
      ["Signs", `a permit for the token "${permit.domain.name}" ${facts.token}`],
      ["owner", account],
      ["spender", facts.escrow],
      ["value", `${dollars(amount, facts.decimals)} (${amount} base units)`],
      ["nonce", String(permit.nonce)],
      ["deadline", new Date(Number(deadline) * 1000).toISOString()],
    ],
    typed: JSON.stringify(typed, (_, value) => (typeof value === "bigint" ? value.toString() : value)),
  };
  const title = `Deposit ${dollars(amount, facts.decimals)}`;
  return [
    sign,
    {
      kind: "send",
      title,
      again: "",
      to: facts.escrow,
      rows: [
        ["Calls", `depositWithPermit of the escrow contract ${facts.escrow}`],
        ["key", key],
        ["amount", `${dollars(amount, facts.decimals)} (${amount} base units)`],
        ["permit", "the signature of step 1"],
      ],
      make(signature) {
        const last = Number.parseInt(signature.slice(130), 16);
        const v = last < 27 ? last + 27 : last; // some hardware wallets give the parity alone
        const args = [key, amount, deadline, v, signature.slice(0, 66), `0x${signature.slice(66, 130)}`];
        return encodeFunctionData({ abi: escrowAbi, functionName: "depositWithPermit", args });
      },
    },
  ];
}

/** The steps of a deposit. `permits`: whether a permit may be tried. */
export async function deposit(chain, account, { key, amount }, permits = true) {
  const { facts } = chain;
  await requireTokens(chain, account, amount);
  const direct = await approvals(chain, account, amount, "Deposit");
  if (direct.length && permits) {
    const steps = await permitted(chain, account, key, amount);
    if (steps) return steps;
  }
  return [...direct, send(facts, `Deposit ${dollars(amount, facts.decimals)}`, "deposit", [key, amount])];
}

async function stake(chain, account, { amount }) {
  const { facts } = chain;
  await requireTokens(chain, account, amount);
  const steps = await approvals(chain, account, amount, "Stake");
  return [...steps, send(facts, `Stake ${dollars(amount, facts.decimals)}`, "stake", [amount])];
}

/** What each form does: its fields, whose account it needs ("owner", "self" or anyone), and the steps it takes. */
export const OPERATIONS = {
  open: {
    name: "Open the purse",
    steps: (chain, account, { key, signature }) => [
      send(chain.facts, "Open the purse", "open", [key, account, same(key, account) ? "0x" : signature]),
    ],
  },
  deposit: { name: "Deposit", fields: ["amount"], needs: "owner", steps: deposit },
  thaw: one("Start a withdrawal (thaw)", ["amount"], "owner", ({ key, amount }) => [key, amount]),
  cancelThaw: one("Cancel the thaw", [], "owner", ({ key }) => [key]),
  withdraw: one("Withdraw", [], "owner", ({ key }) => [key]),
  reserve: one("Reserve", ["amount"], "owner", ({ key, provider, amount }) => [key, provider, amount]),
  release: one("Start the release", [], "owner", ({ key, provider }) => [key, provider]),
  finishRelease: one("Take the reservation back", [], "owner", ({ key, provider }) => [key, provider]),
  cashOut: one("Cash out", [], "anyone", ({ account }) => [account]),
  setPayout: one("Set the payout address", ["payout"], "self", ({ payout }) => [payout]),
  stake: { name: "Stake", fields: ["amount"], needs: "self", steps: stake },
  unstake: one("Start the withdrawal of stake", ["amount"], "self", ({ amount }) => [amount]),
  cancelUnstake: one("Cancel the withdrawal of stake", [], "self", () => [0n], "unstake"),
  withdrawStake: one("Withdraw the stake that left", [], "self", () => []),
};

/** An operation that is one call of the escrow. */
function one(name, fields, needs, args, functionName) {
  return {
    name,
    fields,
    needs,
    steps: (chain, _account, values, _permits, call) => [send(chain.facts, name, functionName ?? call, args(values))],
  };
}

/** Reads the fields of a form. Throws BadInput that names the field. */
export function readFields(form, fields, decimals) {
  const readers = {
    amount: (text) => parseAmount(text, decimals),
    payout: (text) => readAddress(text, "Payout address"),
  };
  return Object.fromEntries((fields ?? []).map((name) => [name, readers[name](form.elements[name].value)]));
}
