// Parts of the wallet page. All text is text: nothing is parsed as HTML.
import { formatUnits } from "./amounts.mjs";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/** Fills a description list. */
export function fill(list, rows) {
  list.replaceChildren(...rows.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]));
}

/** Fills the table of what can be done next, by whom and when. */
export function showSteps(table, steps) {
  table.closest(".scroll").hidden = steps.length === 0;
  const rows = steps.map((step) => {
    const cells = [step.who, step.what, step.when].map((text) => element("td", {}, text));
    return element("tr", {}, ...cells);
  });
  table.replaceChildren(...rows);
}

/** Shows all that will be signed and sent, and returns whether the owner agrees. */
export function review(title, { steps, note, gas, account, facts }) {
  const dialog = document.getElementById("review");
  document.getElementById("review-title").textContent = title;
  document.getElementById("review-note").textContent = note;
  fill(document.getElementById("review-facts"), [
    ["From your account", account],
    ["On", `${facts.chainName} (chain ${facts.chainId})`],
    ["Sends coins", "none"],
    ["Gas", gas ? `about ${formatUnits(gas, 18).slice(0, 14)} ${facts.coin || "coins"}; the wallet decides` : "the wallet shows it"],
  ]);
  const parts = steps.map((step) => {
    const list = element("dl");
    fill(list, step.rows);
    return element("li", {}, element("strong", {}, step.title), list);
  });
  document.getElementById("review-steps").replaceChildren(...parts);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "agreed"), { once: true });
  });
}
