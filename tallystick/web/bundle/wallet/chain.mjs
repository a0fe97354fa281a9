// Reads of the chain through the wallet (EIP-1193), so that what is signed is judged by the wallet's own view.
import { decodeFunctionResult, encodeFunctionData, hashDomain, keccak256 } from "viem";
import { abi as escrowAbi } from "../../../chain/abi/Escrow.json";
import { abi as tokenAbi } from "../../../chain/abi/TestUSD.json";
import { Poor, Problem, Reverted, explain } from "./failures.mjs";

export { escrowAbi, tokenAbi };
const REQUEST_MS = 60_000;
const PERMIT_TYPEHASH = "0x6e71edae12b1b97f4d1f60370fef10105fa2faae0126114a169c64845d6126c9"; // of EIP-2612
const DOMAIN_TYPES = [
  { name: "name", type: "string" },
  { name: "version", type: "string" },
  { name: "chainId", type: "uint256" },
  { name: "verifyingContract", type: "address" },
];
const FURTHER = [
  { type: "function", name: "version", inputs: [], outputs: [{ type: "string" }], stateMutability: "view" },
  { type: "function", name: "PERMIT_TYPEHASH", inputs: [], outputs: [{ type: "bytes32" }], stateMutability: "view" },
];

export const same = (left, right) => String(left).toLowerCase() === String(right).toLowerCase();
export const toHex = (number) => `0x${BigInt(number).toString(16)}`;

/** The market's chain as one wallet shows it. */
export class Chain {
  constructor(provider, facts) {
    [this.provider, this.facts] = [provider, facts];
  }

  /** One request of the wallet. Reads have a deadline; what a person must answer has none. */
  async request(method, params = [], patience = REQUEST_MS) {
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Problem(`The wallet did not answer ${method} within ${patience / 1000} s.`)), patience);
    });
    try {
      return await Promise.race([this.provider.request({ method, params }), late]);
    } finally {
      clearTimeout(timer);
    }
  }

  async chainId() {
    return Number(BigInt(await this.request("eth_chainId")));
  }

  /** The accounts that this page may use, without asking for more. */
  async accounts() {
    const accounts = await this.request("eth_accounts");
    return Array.isArray(accounts) ? accounts.filter((account) => /^0x[0-9a-fA-F]{40}$/.test(account)) : [];
  }

  /** Runs a call without sending anything. Throws Reverted in words if the contract refuses it. */
  async call(to, data, { from, block = "latest" } = {}) {
    try {
      return await this.request("eth_call", [{ to, data, ...(from ? { from } : {}) }, block]);
    } catch (error) {
      throw explain(error, this.facts.decimals);
    }
  }

  async read(to, abi, functionName, args = []) {
    const data = await this.call(to, encodeFunctionData({ abi, functionName, args }));
    return decodeFunctionResult({ abi, functionName, data });
  }

  /** What the escrow returned, undecoded. */
  raw(functionName, ...args) {
    return this.call(this.facts.escrow, encodeFunctionData({ abi: escrowAbi, functionName, args }));
  }

  token(functionName, ...args) {
    return this.read(this.facts.token, tokenAbi, functionName, args);
  }

  /** Number and time of the last block. */
  async head() {
    const block = await this.request("eth_getBlockByNumber", ["latest", false]);
    if (!block) throw new Problem("The wallet's node has no block yet.");
    return { number: Number(BigInt(block.number)), time: Number(BigInt(block.timestamp)) };
  }

  /** Throws Problem unless the wallet's chain has the contract that the server has checked. */
  async checkContract() {
    const code = await this.request("eth_getCode", [this.facts.escrow, "latest"]);
    if (!code || code === "0x") {
      throw new Problem(
        `The wallet's node has no contract at ${this.facts.escrow}. It may follow another chain with the id ${this.facts.chainId}, ` +
          "or be behind. Correct the RPC address of this network in the wallet. Nothing can be signed here until then.",
      );
    }
    if (keccak256(code) !== this.facts.codeHash) {
      throw new Problem(
        `The contract at ${this.facts.escrow} on the wallet's chain is not the one of this market: its code differs. ` +
          "Nothing can be signed here.",
      );
    }
  }

  /** The token's EIP-712 domain if it takes EIP-2612 permits of this account, else null. */
  async permitDomain(account) {
    const { token, chainId } = this.facts;
    // A token need not have these functions; without them the deposit takes an approval, which is always safe.
    const optional = (abi, name, ...args) => this.read(token, abi, name, args).catch(() => null);
    const [described, separator, nonce, typehash] = await Promise.all([
      optional(tokenAbi, "eip712Domain"),
      optional(tokenAbi, "DOMAIN_SEPARATOR"),
      optional(tokenAbi, "nonces", account),
      optional(FURTHER, "PERMIT_TYPEHASH"),
    ]);
    if (separator === null || nonce === null || (typehash !== null && typehash !== PERMIT_TYPEHASH)) return null;
    const names = described
      ? [[described[1], described[2]]]
      : await Promise.all([optional(tokenAbi, "name"), optional(FURTHER, "version")]).then(([name, version]) =>
          name === null ? [] : [...new Set([version ?? "1", "1", "2"])].map((text) => [name, text]),
        );
    for (const [name, version] of names) {
      const domain = { name, version, chainId, verifyingContract: token };
      // A signature for any other domain could be used elsewhere, so the token's own word decides.
      if (hashDomain({ domain, types: { EIP712Domain: DOMAIN_TYPES } }) === separator) return { domain, nonce };
    }
    return null;
  }

  /**
   * About what a transaction will cost, in wei; null if the wallet's node does not tell. Throws Problem if the account has less.
   * Without `transaction`, what will be sent is not known yet, and an account without any coin is refused.
   */
  async gas(account, transaction) {
    const poor = `The account has too little ${this.facts.coin || "of the chain's coin"} to pay for gas. Send it some, and try again.`;
    try {
      const [gas, price, balance] = await Promise.all([
        transaction ? this.request("eth_estimateGas", [transaction]) : "0x1",
        this.request("eth_gasPrice"),
        this.request("eth_getBalance", [account, "latest"]),
      ]);
      const fee = BigInt(gas) * BigInt(price);
      if (BigInt(balance) < fee) throw new Poor(poor);
      return transaction ? fee : null;
    } catch (error) {
      const problem = explain(error, this.facts.decimals);
      if (problem instanceof Poor) throw problem;
      if (problem instanceof Reverted && problem.error) throw problem;
      return null;
    }
  }
}

export const PERMIT_TYPES = {
  EIP712Domain: DOMAIN_TYPES,
  Permit: [
    { name: "owner", type: "address" },
    { name: "spender", type: "address" },
    { name: "value", type: "uint256" },
    { name: "nonce", type: "uint256" },
    { name: "deadline", type: "uint256" },
  ],
};
