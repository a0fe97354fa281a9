// Finds the wallets of a browser (EIP-6963, and EIP-1193's window.ethereum of older ones) and puts what they answer into words.

const SANE = /^[\x20-\x7e\u00a0-\uffff]{1,80}$/;

/** What a page may show of a wallet's announcement, or null if it is none (EIP-6963: uuid, name, icon as a data URI, rdns). */
function readAnnouncement(detail) {
  const { info, provider } = detail ?? {};
  const texts = [info?.uuid, info?.name, info?.rdns];
  if (!texts.every((text) => typeof text === "string" && SANE.test(text)) || typeof provider?.request !== "function") return null;
  const icon = typeof info.icon === "string" && /^data:image\/[a-z+.-]+[;,]/.test(info.icon) && info.icon.length < 100_000;
  return { id: info.uuid, name: info.name, rdns: info.rdns, icon: icon ? info.icon : "", provider };
}

/**
 * Calls `onChange` with all wallets each time that one announces itself. Wallets may come at any time, so pages keep listening.
 * Once `patience` milliseconds have passed without any, it is called with window.ethereum alone, or with none.
 */
export function discoverWallets(onChange, patience = 300) {
  const wallets = new Map();
  window.addEventListener("eip6963:announceProvider", (event) => {
    const wallet = readAnnouncement(event.detail);
    if (wallet === null || wallets.size >= 32) return;
    wallets.set(wallet.id, wallet);
    onChange([...wallets.values()]);
  });
  window.dispatchEvent(new Event("eip6963:requestProvider"));
  setTimeout(() => {
    if (wallets.size) return;
    const provider = window.ethereum;
    const old = typeof provider?.request === "function";
    onChange(old ? [{ id: "window.ethereum", name: "Browser wallet", rdns: "", icon: "", provider }] : []);
  }, patience);
}

/** The account that the wallet's owner lets this page use. Throws what the wallet answers, or Error without an account. */
export async function connect(wallet) {
  const accounts = await wallet.provider.request({ method: "eth_requestAccounts" });
  if (!Array.isArray(accounts) || !/^0x[0-9a-fA-F]{40}$/.test(accounts[0])) throw new Error(`${wallet.name} gave no account`);
  return accounts[0];
}

/** The signature of a text by EIP-191 (personal_sign), which a smart account may give in a form of its own (EIP-1271). */
export async function signText(wallet, account, text) {
  const bytes = Array.from(new TextEncoder().encode(text), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return wallet.provider.request({ method: "personal_sign", params: [`0x${bytes}`, account] });
}

const ANSWERS = {
  4001: "You declined in the wallet. Nothing was signed or sent.",
  4100: "The wallet does not let this page use the account. Connect it in the wallet, and try again.",
  4200: "The wallet cannot do this.",
  4900: "The wallet has no connection to any chain.",
  4901: "The wallet has no connection to this chain.",
  [-32002]: "The wallet is still asking about an earlier request. Open it and answer that first.",
};

/** What went wrong, for a person: the codes of EIP-1193, else the wallet's own words. */
export function describe(error) {
  return ANSWERS[error?.code] ?? String(error?.shortMessage ?? error?.message ?? error).slice(0, 300);
}
