"""The coordinator: matches orders to asks, relays ciphertext, checks receipts, batches claims. It holds no funds, and no keys
that decrypt anything.
"""
