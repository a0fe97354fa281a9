// Sends one transaction and follows it to its end, also over a reload of the page: mined, failed, replaced, or dropped.
import { toHex, same } from "./chain.mjs";
import { Problem, Reverted, explain, rejected } from "./failures.mjs";

const KEY = "tallystick-wallet-transaction";
const LOCK = "tallystick-wallet";
const POLL_MS = 1_000;
const SLOW_POLL_MS = 4_000;
/** Polls in a row that must miss a transaction before the page says that it may be gone, and blocks searched for another one. */
const MISSING_POLLS = 15;
const SEARCHED_BLOCKS = 64;

/** What this tab has asked of the wallet and not seen the end of, or null. It survives a reload, not the tab. */
export function readPending() {
  try {
    const pending = JSON.parse(sessionStorage.getItem(KEY));
    return pending && typeof pending.title === "string" && typeof pending.account === "string" ? pending : null;
  } catch {
    return null;
  }
}

function keep(pending) {
  try {
    if (pending) sessionStorage.setItem(KEY, JSON.stringify(pending));
    else sessionStorage.removeItem(KEY);
  } catch {
    // Without storage (a private window that forbids it) a reload forgets what was sent; the wallet still shows it.
  }
}

export const forget = () => keep(null);

/** A transaction whose place another one took. */
class Replaced extends Problem {}

/** Runs `work` unless another tab of this page is at work. Throws Problem if one is. */
export async function alone(work) {
  if (!navigator.locks) return work(); // only pages over TLS and of this machine have locks
  return navigator.locks.request(LOCK, { ifAvailable: true }, (lock) => {
    if (!lock) throw new Problem("Another tab of this page is at work with your wallet. Finish there first, or close it.");
    return work();
  });
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Whether a transaction was sent is unknown: what to tell of it, or empty. */
export function readDoubt({ chainId, escrow }) {
  const pending = readPending();
  if (!pending || pending.hash || pending.chainId !== chainId || !same(pending.escrow, escrow)) return "";
  const before = typeof pending.problem === "string" ? pending.problem : "The page was left while the wallet asked.";
  return `${pending.title}: ${before} It may have been sent: look into the wallet's activity before you try again.`;
}

/**
 * Asks the wallet to send a transaction, of which it tells `asking`. Returns what is pending, with its hash. Any error but the
 * owner's refusal may come after the wallet sent it, so the attempt is remembered until a later transaction is mined.
 */
export async function submit(chain, account, step, data, asking) {
  const transaction = { from: account, to: step.to, data, value: "0x0", chainId: toHex(chain.facts.chainId) };
  const { number } = await chain.head();
  const nonce = Number(BigInt(await chain.request("eth_getTransactionCount", [account, "latest"])));
  const { chainId, escrow } = chain.facts;
  const pending = { title: step.title, again: step.again, account, to: step.to, data, chainId, escrow, nonce, block: number, hash: null };
  const earlier = readPending();
  keep(pending);
  asking();
  try {
    const hash = await chain.provider.request({ method: "eth_sendTransaction", params: [transaction] });
    if (typeof hash !== "string" || !/^0x[0-9a-fA-F]{64}$/.test(hash)) throw new Problem("The wallet gave no transaction hash.");
    keep({ ...pending, hash });
    return { ...pending, hash };
  } catch (error) {
    if (rejected(error)) {
      keep(earlier);
      throw error;
    }
    keep({ ...pending, problem: explain(error, chain.facts.decimals).message });
    throw new Problem(readDoubt(chain.facts));
  }
}

/** The nonce of a transaction that the wallet's node knows, else null. The wallet may have chosen another than the next. */
async function nonceOf(chain, hash) {
  const known = await chain.request("eth_getTransactionByHash", [hash]);
  return known ? Number(BigInt(known.nonce)) : null;
}

/** The transaction of this account that was mined with a nonce, searched from the last block back to `first`. Null if none. */
async function minedWith(chain, account, nonce, first) {
  const { number } = await chain.head();
  for (let block = number; block >= Math.max(first, number - SEARCHED_BLOCKS, 0); block -= 1) {
    const found = await chain.request("eth_getBlockByNumber", [toHex(block), true]);
    const match = found?.transactions?.find?.((entry) => same(entry.from, account) && Number(BigInt(entry.nonce ?? -1)) === nonce);
    if (match) return match;
  }
  return null;
}

/** Why a mined transaction failed, as Problem. */
async function failure(chain, pending, receipt) {
  try {
    await chain.call(pending.to, pending.data, { from: pending.account, block: receipt.blockNumber });
  } catch (error) {
    if (error instanceof Reverted) return new Problem(`It was mined, but failed, and moved no money. ${error.message}`);
  }
  return new Problem("It was mined, but failed, and moved no money. It may have run out of gas: try again with the gas that the wallet proposes.");
}

/**
 * Waits until a transaction is mined. Throws Problem if it failed or another one took its place. `tell` is called with what is
 * known meanwhile; `stopped` tells whether the owner no longer wants to wait.
 */
export async function follow(chain, pending, tell, stopped) {
  // The wallet may have chosen a later nonce than the next one, so only a node that knows the transaction makes sure of it.
  let [missing, polls, nonce, sure] = [0, 0, pending.nonce, false];
  for (;;) {
    if (stopped()) return false;
    let receipt = null;
    try {
      receipt = await chain.request("eth_getTransactionReceipt", [pending.hash]);
      if (!receipt) {
        const known = await nonceOf(chain, pending.hash);
        if (known !== null) [nonce, missing, sure] = [known, 0, true];
        else missing += 1;
        const next = Number(BigInt(await chain.request("eth_getTransactionCount", [pending.account, "latest"])));
        if (next > nonce && (sure || missing > MISSING_POLLS)) {
          receipt = await chain.request("eth_getTransactionReceipt", [pending.hash]); // it may have been mined in between
          const other = receipt ? null : await minedWith(chain, pending.account, nonce, pending.block);
          if (other && same(other.hash, pending.hash)) continue;
          if (other && same(other.to, pending.to) && same(other.input ?? other.data, pending.data)) {
            tell("The wallet sent it again, with another fee.");
            pending = { ...pending, hash: other.hash };
            keep(pending);
            continue;
          }
          if (!receipt) {
            forget();
            throw new Replaced(
              "It was replaced or cancelled in the wallet: another transaction" +
                `${other ? ` (${other.hash})` : ""} took its place. What is shown below is the state now.`,
            );
          }
        } else if (missing === MISSING_POLLS) {
          tell("The wallet's node does not know it any more. It may have been dropped; the wallet's activity tells. Still looking.");
        }
      }
    } catch (error) {
      if (error instanceof Replaced) throw error;
      tell(`No news: ${explain(error, chain.facts.decimals).message} Trying again.`);
    }
    if (receipt) {
      forget();
      if (BigInt(receipt.status ?? 1) === 0n) throw await failure(chain, pending, receipt);
      return true;
    }
    polls += 1;
    await pause(polls < 30 ? POLL_MS : SLOW_POLL_MS);
  }
}
