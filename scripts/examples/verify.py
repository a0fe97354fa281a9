"""Keeps the proof of an answer and verifies it without a network or a wallet."""

import os
import tempfile
from pathlib import Path

from tallystick import SyncMarket, TallyError, open_wallet, read_proof


def buy(file: Path) -> None:
    """Runs one chat and writes its proof. The proof contains the plaintext: share it only with readers of that."""
    wallet = open_wallet(os.environ.get("TALLYSTICK_WALLET", "default"))
    with SyncMarket(os.environ.get("TALLYSTICK_COORDINATOR", "http://127.0.0.1:8420"), wallet) as market:
        model = os.environ.get("TALLYSTICK_MODEL") or market.models()[0].id
        body = {"model": model, "messages": [{"role": "user", "content": "What is a tally stick?"}], "max_tokens": 200}
        with market.submit("/v1/chat/completions", body, keep=True) as job:
            proof = job.result().proof
    if proof is None:
        raise SystemExit("the answer is too long to keep its proof")
    file.write_bytes(proof.dumps())


def verify(file: Path) -> None:
    """Prints the result of each check. `tally receipt verify FILE` does the same."""
    try:
        for finding in read_proof(file.read_bytes()).check():
            print(f"{finding.check}: {finding.found}")
    except TallyError as error:
        print(f"not valid: {error}")


with tempfile.TemporaryDirectory() as folder:
    proof_file = Path(folder) / "proof.json"
    buy(proof_file)
    verify(proof_file)
    proof_file.write_bytes(proof_file.read_bytes().replace(b'"inputTokens":', b'"inputTokens":9', 1))
    verify(proof_file)
