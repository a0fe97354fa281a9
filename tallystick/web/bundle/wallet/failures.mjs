// What went wrong, in words with what to do next: answers of wallets, answers of nodes, and the contract's own errors.
import { decodeErrorResult } from "viem";
import { describe } from "../wallets.mjs";
import { abi as escrowAbi } from "../../../chain/abi/Escrow.json";
import { abi as tokenAbi } from "../../../chain/abi/TestUSD.json";
import { dollars } from "./amounts.mjs";

/** A problem that is already in words. */
export class Problem extends Error {}

/** An account that cannot pay for gas. */
export class Poor extends Problem {}

/** A call that the chain refuses. `name` is the contract's error, or empty. */
export class Reverted extends Problem {
  constructor(message, name) {
    super(message);
    this.name = "Reverted";
    this.error = name;
  }
}

const PANICS = { 17: "a number is out of range", 18: "a division by zero" };
const MAX_DEPTH = 6;
const errors = [...escrowAbi, ...tokenAbi].filter((entry) => entry.type === "error");
const at = (seconds) => new Date(Number(seconds) * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });

/** The words for each error of the contract and its token that an owner can meet. */
const WORDS = {
  AmountTooLarge: () => "The amount is more than the contract can hold. Enter a smaller one.",
  BadPayee: ({ payee }) => `${payee} cannot be paid: it is the contract or its token. Enter another address.`,
  BadSignature: ({ signer }) => `The signature is not of ${signer}. Ask that key to sign for the account that is connected here.`,
  ERC20InsufficientAllowance: () => "The token does not allow the contract to take the amount yet. Approve it first.",
  ERC20InsufficientBalance: ({ balance, needed }, d) => `Your account holds ${dollars(balance, d)}, but ${dollars(needed, d)} are needed.`,
  ERC2612ExpiredSignature: () => "The permit has expired. Start again, and sign sooner.",
  Expired: () => "The time of this message is over. Start again.",
  InsufficientFree: ({ available, wanted }, d) =>
    `Only ${dollars(available, d)} are free, but you asked for ${dollars(wanted, d)}. Enter less, or release a reservation first.`,
  InsufficientStake: ({ available, wanted }, d) => `The whole stake is ${dollars(available, d)}, but you asked for ${dollars(wanted, d)}.`,
  NoCredit: ({ account }) => `${account} has no credit to cash out.`,
  NotOwner: ({ key, caller }) => `${caller} does not own the purse of ${key}. Connect the account that owns it.`,
  NotReleasing: () => "This reservation is not being released. Start the release first.",
  NotThawing: () => "Nothing is thawing in this purse. Start a thaw first.",
  NotUnstaking: () => "No stake is leaving. Start its withdrawal first.",
  NothingReserved: () => "Nothing is reserved for this provider.",
  PurseExists: ({ key }) => `${key} has a purse already. Its owner cannot be changed.`,
  Releasing: () => "This reservation is being released already. Wait for its end.",
  SafeERC20FailedOperation: () => "The token refused the transfer. It may be paused, or may have blocked this account.",
  SelfDealing: () => "A purse cannot reserve money for its own key.",
  ShortDelivery: ({ expected, received }, d) =>
    `The token delivered ${dollars(received, d)} of ${dollars(expected, d)}: it keeps a fee, so it cannot be used here.`,
  Thawing: () => "A thaw is running. Cancel it first.",
  TooEarly: ({ readyAt }) => `The wait is not over. It ends at ${at(readyAt)}.`,
  UnknownPurse: ({ key }) => `No purse was ever opened for ${key}. Open it first.`,
  ZeroAddress: () => "The address is zero. Enter another one.",
  ZeroAmount: () => "The amount is zero. Enter more.",
  Error: ({ message }) => `The contract refuses: ${String(message).slice(0, 200)}`,
  Panic: ({ code }) => `The contract fails: ${PANICS[code] ?? `panic ${code}`}.`,
};

/** Visits an error and what it wraps: nodes, libraries and wallets put the answer at different depths. */
function* layers(error, depth = 0) {
  if (error === null || typeof error !== "object" || depth > MAX_DEPTH) return;
  yield error;
  for (const name of ["data", "error", "cause", "originalError", "info"]) yield* layers(error[name], depth + 1);
}

/** The bytes with which a contract reverted, or null. */
export function revertData(error) {
  for (const layer of layers(error)) {
    for (const text of [layer.data, layer.result, layer.message]) {
      const match = typeof text === "string" ? /(?:^|\s|:|")(0x(?:[0-9a-fA-F]{2}){4,4096})(?:$|[\s",.])/.exec(text) : null;
      // An address in a message has 20 bytes; a revert has 4 bytes and whole words.
      if (match && (match[1].length - 10) % 64 === 0) return match[1];
    }
  }
  return null;
}

/** The contract's error in words, as Reverted. */
export function readRevert(data, decimals) {
  try {
    const { errorName, args = [], abiItem } = decodeErrorResult({ abi: errors, data });
    const values = Object.fromEntries(abiItem.inputs.map(({ name }, index) => [name || "message", args[index]]));
    if (errorName === "Panic") values.code = args[0];
    if (errorName === "Error") values.message = args[0];
    const text = WORDS[errorName]?.(values, decimals) ?? `The contract refuses: ${errorName}(${args.join(", ").slice(0, 200)}).`;
    return new Reverted(text, errorName);
  } catch {
    return new Reverted(`The contract refuses with an error that this page does not know: ${data.slice(0, 74)}`, "");
  }
}

export function codes(error) {
  return [...layers(error)].map((layer) => layer.code);
}

export const rejected = (error) => codes(error).some((code) => code === 4001 || code === "ACTION_REJECTED");

/** Any failure as a Problem in words. */
export function explain(error, decimals) {
  if (error instanceof Problem) return error;
  if (rejected(error)) return new Problem(describe({ code: 4001 }));
  const data = revertData(error);
  if (data) return readRevert(data, decimals);
  const text = [...layers(error)].map((layer) => layer.message).filter((message) => typeof message === "string").join(" ");
  if (/insufficient (funds|balance) for (gas|transfer)|insufficient funds|doesn't have enough funds|gas required exceeds allowance/i.test(text)) {
    return new Poor("The account has too little of the chain's coin to pay for gas. Send it some, and try again.");
  }
  if (/nonce too low|already known|replacement transaction underpriced|known transaction/i.test(text)) {
    return new Problem("The wallet has another transaction of this account under way. Wait for it, or cancel it in the wallet.");
  }
  if (/execution reverted|vm exception/i.test(text)) return new Reverted("The contract refuses, and the wallet does not say why.", "");
  const known = codes(error).find((code) => [4100, 4200, 4900, 4901, -32002].includes(code));
  return new Problem(known ? describe({ code: known }) : `The wallet answered: ${describe(error)}`);
}
