// The wallet page: connects a wallet of the browser, shows what the contract holds, and walks through each operation.
import { decodeFunctionResult } from "viem";
import { connect, discoverWallets } from "./wallets.mjs";
import { BadInput, dollars } from "./wallet/amounts.mjs";
import { Chain, escrowAbi, same, toHex } from "./wallet/chain.mjs";
import { Problem, Reverted, codes, explain, rejected } from "./wallet/failures.mjs";
import { OPERATIONS, deposit, readAddress, readFields, readSignature } from "./wallet/operations.mjs";
import { alone, follow, forget, readDoubt, readPending, submit } from "./wallet/transactions.mjs";
import { element, fill, review, showSteps } from "./wallet/view.mjs";

const get = (id) => document.getElementById(id);
const facts = JSON.parse(get("wallet-page").dataset.facts);
const forms = [...document.querySelectorAll("form[data-call]")];
const CHOICE = "tallystick-wallet-choice";
const REFRESH_MS = 10_000;
const state = { wallet: null, chain: null, account: null, ready: false, busy: false, changed: "", stop: false, reading: 0, purse: null };
const looks = { key: facts.key, subject: facts.account, provider: null };

function say(text, kind = "") {
  get("progress").textContent = text;
  get("progress").className = kind;
}

// ------------------------------------------------------------------------------------------------------ the connection

function showConnection(text, wrongChain = false) {
  get("connection").textContent = text;
  get("switch").hidden = !wrongChain;
  document.body.dataset.ready = String(state.ready);
}

/** Looks at account, chain and contract of the connected wallet, and then at the state of the market. */
async function check() {
  const { chain } = state;
  state.ready = false;
  if (!state.account) {
    showConnection(`${state.wallet.name} lets this page use no account any more. Choose the wallet again.`);
    return render(null);
  }
  try {
    const id = await chain.chainId();
    if (id !== facts.chainId) {
      const wanted = `${facts.chainName} (chain ${facts.chainId})`;
      showConnection(`${state.wallet.name} is on chain ${id}, but this market is on ${wanted}. Nothing can be signed there.`, true);
      return render(null);
    }
    await chain.checkContract();
  } catch (error) {
    showConnection(explain(error, facts.decimals).message);
    return render(null);
  }
  state.ready = true;
  showConnection(`Connected: ${state.account}, by ${state.wallet.name}, on ${facts.chainName} (chain ${facts.chainId}).`);
  await refresh();
  return resume();
}

function onChange(text, account) {
  if (state.busy) {
    state.changed = text;
    get("review").close("changed");
  }
  if (account !== undefined) state.account = account;
  if (!state.busy) check();
}

function use(wallet, account) {
  if (state.wallet !== wallet) {
    wallet.provider.on?.("accountsChanged", ([now]) => {
      if (state.wallet === wallet && !same(now ?? "", state.account ?? "")) onChange("the wallet's account changed", now ?? null);
    });
    wallet.provider.on?.("chainChanged", () => state.wallet === wallet && onChange("the wallet's chain changed"));
    wallet.provider.on?.("disconnect", () => state.wallet === wallet && onChange("the wallet lost its connection"));
  }
  [state.wallet, state.account, state.chain] = [wallet, account, new Chain(wallet.provider, facts)];
  try {
    sessionStorage.setItem(CHOICE, wallet.rdns || wallet.name);
  } catch {
    // It is chosen again after a reload.
  }
  return check();
}

async function choose(wallet) {
  if (state.busy) return say("Wait for what is under way, or stop waiting for it.");
  showConnection(`Waiting for ${wallet.name}: choose the account that this page may use.`);
  try {
    return await use(wallet, await connect(wallet));
  } catch (error) {
    return showConnection(explain(error, facts.decimals).message);
  }
}

async function switchChain() {
  const [{ provider }, chainId] = [state.wallet, toHex(facts.chainId)];
  try {
    try {
      await provider.request({ method: "wallet_switchEthereumChain", params: [{ chainId }] });
    } catch (error) {
      if (rejected(error) || !codes(error).includes(4902)) throw error; // 4902: the wallet does not know the chain (EIP-3085)
      if (!facts.rpc || !facts.coin) {
        throw new Problem(`The wallet does not know chain ${facts.chainId}. Add it there by hand, with an RPC address that you trust.`);
      }
      const nativeCurrency = { name: facts.coin, symbol: facts.coin, decimals: 18 };
      const chain = { chainId, chainName: facts.chainName, rpcUrls: [facts.rpc], nativeCurrency };
      await provider.request({ method: "wallet_addEthereumChain", params: [chain] });
      if ((await state.chain.chainId()) !== facts.chainId) {
        await provider.request({ method: "wallet_switchEthereumChain", params: [{ chainId }] });
      }
    }
    await check();
  } catch (error) {
    showConnection(explain(error, facts.decimals).message, true);
  }
}

/** Uses the wallet of before a reload again, if it still lets this page use an account without asking. */
async function reconnect(wallets) {
  let choice = null;
  try {
    choice = sessionStorage.getItem(CHOICE);
  } catch {
    return;
  }
  const wallet = wallets.find((known) => choice && choice === (known.rdns || known.name));
  if (state.wallet || !wallet) return;
  const [account] = await new Chain(wallet.provider, facts).accounts().catch(() => []);
  if (account && !state.wallet) await use(wallet, account);
}

function showWallets(wallets) {
  const items = wallets.map((wallet) => {
    const button = element("button", { type: "button" }, wallet.name);
    if (wallet.icon) button.prepend(element("img", { src: wallet.icon, alt: "", width: 20, height: 20 }), " ");
    button.addEventListener("click", () => choose(wallet));
    return element("li", {}, button);
  });
  get("wallets").replaceChildren(...items);
  get("no-wallet").hidden = wallets.length > 0;
  if (!state.wallet) showConnection(wallets.length ? "Choose a wallet." : "This browser has no wallet.");
  reconnect(wallets);
}

// ----------------------------------------------------------------------------------------------------------- the state

const decode = (functionName, data) => decodeFunctionResult({ abi: escrowAbi, functionName, data });

/** Reads what the page shows through the wallet, and has it put into words. */
async function refresh() {
  if (!state.ready) return;
  state.reading += 1;
  const [reading, { chain, account }] = [state.reading, state];
  const [key, subject, provider] = [looks.key ?? account, looks.subject ?? account, looks.provider];
  try {
    const [head, purse, credit, stakeOf, tab, held] = await Promise.all([
      chain.head(),
      chain.raw("purse", key),
      chain.raw("account", subject),
      chain.raw("stakeOf", subject),
      provider ? chain.raw("tab", key, provider) : null,
      chain.token("balanceOf", account),
    ]);
    const query = new URLSearchParams({ now: head.time, purse, account: credit, stakeOf, address: subject });
    if (tab) query.set("tab", tab);
    const answer = await fetch(`${facts.meaning}?${query}`, { headers: { accept: "application/json" } });
    const meaning = await answer.json().catch(() => null);
    if (!answer.ok || !meaning) throw new Problem(meaning?.error ?? `This page's server answered ${answer.status}. Reload the page.`);
    if (reading !== state.reading) return;
    const [owner] = decode("purse", purse);
    const [staked, unstaking] = decode("stakeOf", stakeOf);
    render({ meaning, key, subject, provider, account, owner, staked, unstaking, held, block: head.number });
  } catch (error) {
    if (reading === state.reading) get("stale").textContent = explain(error, facts.decimals).message;
  }
}

/** Shows the forms for what can be done by the connected account, and from when. */
function showForms(shown) {
  const { meaning, account, owner, subject } = shown;
  const owns = same(owner, account);
  const self = same(subject, account);
  const steps = new Map([meaning.purse, meaning.tab].flatMap((part) => part?.next ?? []).map((step) => [step.call, step]));
  for (const step of meaning.account.next) if (step.call !== "unstake" && step.call !== "stake") steps.set(step.call, step);
  if (self) {
    for (const call of ["stake", "setPayout"]) steps.set(call, { at: null });
    if (shown.staked + shown.unstaking > 0n) steps.set("unstake", { at: null });
    if (shown.unstaking > 0n) steps.set("cancelUnstake", { at: null });
  }
  for (const form of forms) {
    const { call } = form.dataset;
    const step = steps.get(call);
    const allowed = { owner: owns, self, anyone: true }[OPERATIONS[call].needs ?? "anyone"];
    form.hidden = !step || !allowed;
    const button = form.querySelector("button");
    button.disabled = state.busy || Boolean(step?.at);
    form.querySelector(".when").textContent = step?.at ? `Possible ${step.when}.` : "";
  }
  get("signature-field").hidden = same(shown.key, account) || Boolean(facts.bind && same(shown.key, facts.key ?? ""));
  const opened = meaning.purse.state !== "unopened";
  get("purse-note").textContent =
    opened && !owns ? `This purse belongs to ${owner}. Connect that account to move its money.` : "";
  get("account-note").textContent = self
    ? ""
    : `Stake belongs to the account that sends it, so only ${subject} can stake here. Connect that account, or use tally stake.`;
}

function render(shown) {
  state.purse = shown;
  get("state").hidden = shown === null;
  if (shown === null) return;
  get("stale").textContent = "";
  const { meaning } = shown;
  for (const [id, part] of Object.entries({ purse: meaning.purse, tab: meaning.tab, account: meaning.account })) {
    get(`${id}-says`).replaceChildren(...(part ? part.says.map((text) => element("p", {}, text)) : []));
    get(`${id}-state`).textContent = part ? part.state : "";
    showSteps(get(`${id}-steps`), part?.next ?? []);
  }
  get("tab-part").hidden = !shown.provider;
  fill(get("held"), [
    ["Your account", shown.account],
    ["It holds", dollars(shown.held, facts.decimals)],
    ["As of block", String(shown.block)],
  ]);
  for (const [id, value] of Object.entries({ key: shown.key, subject: shown.subject })) {
    if (document.activeElement !== get(id)) get(id).value = value;
  }
  showForms(shown);
}

// ------------------------------------------------------------------------------------------------------ the operations

/** Throws Problem unless wallet, account and chain are those that the owner saw. */
async function guard() {
  const { chain, account, changed } = state;
  if (changed) throw new Problem(`Stopped, because ${changed}. Nothing more was signed or sent.`);
  const [id, [now]] = await Promise.all([chain.chainId(), chain.accounts()]);
  if (id !== facts.chainId) throw new Problem(`Stopped, because the wallet is on chain ${id} now. Nothing more was signed or sent.`);
  if (!same(now ?? "", account)) throw new Problem("Stopped, because the wallet's account changed. Nothing more was signed or sent.");
}

/** The key's signature that the connected account owns its purse: from this page's server, or from the form. */
async function readBind(form) {
  const [{ account }, key] = [state, state.purse.key];
  if (same(key, account)) return null;
  if (!get("signature-field").hidden) return readSignature(form.elements.signature.value);
  const headers = { "content-type": "application/json" };
  const answer = await fetch(facts.bind, { method: "POST", headers, body: JSON.stringify({ owner: account }) });
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw new Problem(body?.error ?? `This page's server answered ${answer.status}. Reload the page.`);
  return readSignature(body.signature);
}

/** Runs the steps that the owner has agreed to. Returns a Problem if the token's permit failed and an approval may do. */
async function run(steps) {
  const { chain, account } = state;
  let signature = null;
  for (const [index, step] of steps.entries()) {
    const place = steps.length > 1 ? ` (step ${index + 1} of ${steps.length})` : "";
    await guard();
    if (step.kind === "sign") {
      say(`Waiting for ${state.wallet.name}: read and sign the permit${place}.`);
      try {
        signature = await chain.provider.request({ method: "eth_signTypedData_v4", params: [account, step.typed] });
        step.result = readSignature(String(signature));
      } catch (error) {
        if (rejected(error)) throw error;
        return new Problem("The wallet gave no usable permit.");
      }
      continue;
    }
    const data = step.data ?? step.make(signature);
    try {
      await chain.call(step.to, data, { from: account });
    } catch (error) {
      const unusable = step.make && error instanceof Reverted && !["NotOwner", "UnknownPurse", "ERC20InsufficientBalance"].includes(error.error);
      if (!unusable) throw error;
      return new Problem("The token did not take the permit.");
    }
    const asking = () => say(`Waiting for ${state.wallet.name}: ${step.title}${place}. Compare what it shows with what you agreed to.`);
    await wait(await submit(chain, account, step, data, asking), place);
  }
  say("Done.", "good");
  return null;
}

/** Follows a transaction to its end. */
async function wait(pending, place = "") {
  const text = `Sent: ${pending.title}${place}, transaction ${pending.hash}.`;
  say(`${text} Waiting for a block.`);
  [get("stop").hidden, state.stop] = [false, false];
  try {
    const mined = await follow(state.chain, pending, (news) => say(`${text} ${news}`), () => state.stop);
    if (!mined) throw new Problem(`${text} You stopped waiting; it may still be mined. The wallet's activity tells.`);
    say(`Mined: ${pending.title}. ${pending.again ?? ""}`, "good");
  } finally {
    get("stop").hidden = true;
  }
}

/** Does one thing at a time, and says how it ended. */
async function busily(work, inTurn = alone) {
  if (state.busy) return;
  [state.busy, state.changed] = [true, ""];
  document.body.dataset.busy = "true";
  if (state.purse) showForms(state.purse);
  try {
    await inTurn(work);
  } catch (error) {
    const problem = error instanceof BadInput ? error : explain(error, facts.decimals);
    say(problem.message, "bad");
  } finally {
    state.busy = false;
    document.body.dataset.busy = "false";
    if (state.changed) await check();
    else await refresh();
  }
}

async function operate(form) {
  const { call } = form.dataset;
  const operation = OPERATIONS[call];
  const { key, subject, provider } = state.purse;
  say("Preparing.");
  const values = { key, account: subject, provider, ...readFields(form, operation.fields, facts.decimals) };
  await guard();
  if (call === "open") values.signature = await readBind(form);
  const { chain, account } = state;
  const agree = async (steps, note = "") => {
    const [first] = steps;
    if (first.data) await chain.call(first.to, first.data, { from: account });
    const gas = await chain.gas(account, first.data && { from: account, to: first.to, data: first.data, value: "0x0" });
    say("Check what will be signed.");
    if (await review(operation.name, { steps, note: `${readDoubt(facts)} ${note}`.trim(), gas, account, facts })) return true;
    say(state.changed ? `Stopped, because ${state.changed}. Nothing was signed or sent.` : "Nothing was signed or sent.");
    return false;
  };
  const steps = await operation.steps(chain, account, values, true, call);
  if (!(await agree(steps))) return;
  const unusable = await run(steps);
  if (!unusable) return form.reset();
  const other = await deposit(chain, account, values, false);
  const note = `${unusable.message} It can be approved instead, for exactly this amount.`;
  if (await agree(other, note)) {
    await run(other);
    form.reset();
  }
}

/** Goes on with a transaction that was under way when the page was left. */
async function resume() {
  const pending = readPending();
  if (!pending || state.busy || pending.chainId !== facts.chainId || !same(pending.escrow, facts.escrow)) return;
  if (!pending.hash) return say(readDoubt(facts), "bad");
  await busily(() => wait(pending), (work) => work()); // it only reads, so another tab may be at work
}

function lookUp(form, id, name, place) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const input = get(id);
    const problem = get(`${id}-problem`);
    try {
      looks[place] = input.value.trim() ? readAddress(input.value, name) : { key: facts.key, subject: facts.account, provider: null }[place];
      problem.textContent = "";
    } catch (error) {
      problem.textContent = error.message;
    }
    input.setAttribute("aria-invalid", String(Boolean(problem.textContent)));
    await refresh();
  });
}

for (const form of forms) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.ready && state.purse) busily(() => operate(form));
  });
}
lookUp(get("key-form"), "key", "Key", "key");
lookUp(get("subject-form"), "subject", "Account", "subject");
lookUp(get("provider-form"), "provider", "Provider", "provider");
get("switch").addEventListener("click", switchChain);
get("stop").addEventListener("click", () => {
  state.stop = true;
  forget();
});
setInterval(() => {
  if (state.ready && !state.busy && document.visibilityState === "visible") refresh();
}, REFRESH_MS);
const left = readPending();
if (left?.hash) say(`Under way: ${left.title}, transaction ${left.hash}. Choose the wallet to follow it.`);
discoverWallets(showWallets);
