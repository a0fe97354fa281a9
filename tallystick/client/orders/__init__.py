"""The payer's view of a tab, and the orders that it signs. Pure: no clock, no store. Imports nothing of the client."""
