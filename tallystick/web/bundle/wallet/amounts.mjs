// Amounts as people write them, and as the contract counts them: whole base units, never floating point.

/** The contract stores amounts in 96 bits. */
export const MOST = (1n << 96n) - 1n;

export class BadInput extends Error {}

/** Reads a decimal amount as base units. Throws BadInput, which says what was expected. */
export function parseAmount(text, decimals) {
  const trimmed = text.trim();
  if (trimmed === "") throw new BadInput("Amount: expected dollars, for example 12.50, got nothing.");
  const shown = trimmed.slice(0, 40);
  if (/^[0-9.,'\u2019\s_]+$/.test(trimmed) && /[,'\u2019\s_]/.test(trimmed)) {
    throw new BadInput(
      `Amount: expected digits with a point before the fraction, for example 1.5 or 1000.50, got "${shown}". ` +
        "Commas and spaces mean different things in different countries, so they are not accepted.",
    );
  }
  const match = /^([0-9]+)(?:\.([0-9]+))?$/.exec(trimmed);
  if (!match) throw new BadInput(`Amount: expected dollars as digits, for example 12.50, got "${shown}".`);
  const [, whole, fraction = ""] = match;
  const significant = fraction.replace(/0+$/, "");
  if (significant.length > decimals) throw new BadInput(`Amount: expected at most ${decimals} digits after the point, got "${shown}".`);
  if (whole.replace(/^0+/, "").length > 30) throw new BadInput(`Amount: "${shown}" is more than the contract can hold.`);
  const units = BigInt(whole) * 10n ** BigInt(decimals) + BigInt(significant.padEnd(decimals, "0") || "0");
  if (units === 0n) throw new BadInput("Amount: expected more than 0.");
  if (units > MOST) throw new BadInput(`Amount: "${shown}" is more than the contract can hold.`);
  return units;
}

/** Base units as a decimal number, without zeros at its end. */
export function formatUnits(units, decimals) {
  const text = units.toString().padStart(decimals + 1, "0");
  const [whole, fraction] = [text.slice(0, text.length - decimals), text.slice(text.length - decimals).replace(/0+$/, "")];
  return fraction ? `${whole}.${fraction}` : whole;
}

/** An amount for people, as the server writes it. */
export const dollars = (units, decimals) => `${formatUnits(units, decimals)} dollars`;
