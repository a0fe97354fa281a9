// Checks in the browser that a leaf is in the match log: hashes the leaf and its path (RFC 9162, 2.1.3.2) up to the root of the head.

const result = document.getElementById("result");

function bytesOf(hex) {
  if (typeof hex !== "string" || hex.length % 2 || /[^0-9a-f]/i.test(hex)) throw new Error("the answer is no hex");
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

async function hash(prefix, ...parts) {
  const data = new Uint8Array(1 + parts.reduce((length, part) => length + part.length, 0));
  data[0] = prefix;
  let at = 1;
  for (const part of parts) {
    data.set(part, at);
    at += part.length;
  }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", data));
}

const hexOf = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** The root that a leaf's hash and its path lead to, in a tree of `size` leaves. */
export async function rootOf(index, size, leafHash, path) {
  let [place, last, root] = [BigInt(index), BigInt(size) - 1n, leafHash];
  if (place > last) throw new Error("the leaf is beyond the head");
  for (const beside of path) {
    if (last === 0n) throw new Error("the path is too long");
    if (place & 1n || place === last) {
      root = await hash(1, beside, root);
      while (!(place & 1n) && place !== 0n) {
        place >>= 1n;
        last >>= 1n;
      }
    } else {
      root = await hash(1, root, beside);
    }
    place >>= 1n;
    last >>= 1n;
  }
  if (last !== 0n) throw new Error("the path is too short");
  return root;
}

async function verify(index) {
  const answer = await fetch(`/v1/log/inclusion?index=${encodeURIComponent(index)}`);
  const proof = await answer.json();
  if (!answer.ok) throw new Error(proof.error?.message ?? `status ${answer.status}`);
  const leaf = proof.leaf === null ? bytesOf(proof.hash) : await hash(0, bytesOf(proof.leaf));
  const root = hexOf(await rootOf(index, proof.size, leaf, proof.path.map(bytesOf)));
  const signed = proof.head.message.root.replace(/^0x/, "").toLowerCase();
  if (root !== signed) throw new Error(`its path leads to ${root}, but the head is signed for ${signed}`);
  return `leaf ${index} is in the log of ${proof.size} leaves with the root ${root}`;
}

async function show(button) {
  const index = button.dataset.leaf;
  button.disabled = true;
  try {
    result.textContent = `Verified: ${await verify(index)}.`;
    result.className = "good";
    button.textContent = "Included";
  } catch (error) {
    result.textContent = `NOT verified, leaf ${index}: ${error.message}.`;
    result.className = "error";
    button.textContent = "Failed";
  } finally {
    button.disabled = false;
    button.focus();
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-leaf]");
  if (button) show(button);
});
