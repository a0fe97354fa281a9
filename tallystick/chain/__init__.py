"""Access to the chain: JSON-RPC, transactions, the escrow contract, and a local chain. Imports only tallystick.protocol."""
