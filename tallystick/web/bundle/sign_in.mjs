// Signs in with a wallet (EIP-4361): with one of the browser, or by the link of `tally sign-in`, which a key signed elsewhere.
import { connect, describe, discoverWallets, signText } from "./wallets.mjs";

const page = document.getElementById("sign-in");
const list = document.getElementById("wallets");
const state = document.getElementById("state");
const linked = document.getElementById("linked");
let busy = false;

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new Error(answer?.error?.message ?? `${path}: ${response.status}`);
  return answer;
}

async function finish(message, signature) {
  await post("/sign-in", { message, signature });
  state.textContent = "Signed in.";
  location.replace(page.dataset.target);
}

/** Runs one attempt at a time, and shows what went wrong. */
async function attempt(step) {
  if (busy) return;
  busy = true;
  try {
    await step();
  } catch (error) {
    state.textContent = describe(error);
  } finally {
    busy = false;
  }
}

async function signIn(wallet) {
  state.textContent = `Waiting for ${wallet.name}: choose the account.`;
  const account = await connect(wallet);
  const { message } = await post("/sign-in/challenge", { account });
  if (!message.startsWith(`${location.host} wants you to sign in`)) throw new Error("The message is for another site.");
  state.textContent = `Waiting for ${wallet.name}: read the message, and sign it.`;
  const signature = await signText(wallet, account, message);
  state.textContent = "Checking the signature.";
  await finish(message, signature);
}

function show(wallets) {
  const buttons = wallets.map((wallet) => {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    if (wallet.icon) {
      const icon = document.createElement("img");
      [icon.src, icon.alt, icon.width, icon.height] = [wallet.icon, "", 20, 20];
      button.append(icon, " ");
    }
    button.type = "button";
    button.append(wallet.name);
    button.addEventListener("click", () => attempt(() => signIn(wallet)));
    item.append(button);
    return item;
  });
  list.replaceChildren(...buttons);
  state.textContent = wallets.length ? "Choose a wallet." : "This browser has no wallet.";
}

/** The signed message of the link that brought the browser here, or null. The fragment of an address is never sent to a server. */
function readLink() {
  const text = location.hash.slice(1);
  if (!text) return null;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
    const { message, signature } = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    const account = typeof message === "string" ? message.split("\n")[1] : "";
    return /^0x[0-9a-fA-F]{40}$/.test(account) && typeof signature === "string" ? { message, signature, account } : null;
  } catch {
    return null;
  }
}

const link = readLink();
if (link) {
  // A click is asked for: another site may have sent the browser here with a link of its own account.
  document.getElementById("linked-account").textContent = link.account;
  linked.hidden = false;
  document.getElementById("linked-button").addEventListener("click", () => attempt(() => finish(link.message, link.signature)));
}
discoverWallets(show);
