"""Runs the example notebook, then interrupts cells in mid-answer as Jupyter's stop button does; prints the outcome."""

import json
import sys
from pathlib import Path

import nbformat  # type: ignore[import-not-found]
from jupyter_client.manager import KernelManager, start_new_kernel  # type: ignore[import-not-found]
from nbclient import NotebookClient  # type: ignore[import-not-found]

OPEN = """
import os
from tallystick import Market, SyncMarket, open_wallet
wallet = open_wallet(os.environ["TALLYSTICK_WALLET"])
model, question = os.environ["TALLYSTICK_MODEL"], [{"role": "user", "content": "hi"}]
market = await Market(os.environ["TALLYSTICK_COORDINATOR"], wallet).open()
plain = SyncMarket(os.environ["TALLYSTICK_COORDINATOR"], wallet).open()
"""
ASYNC = """
stream = market.stream(model, question)
async for text in stream:
    print(text, flush=True)
"""
SYNC = ASYNC.replace("market", "plain").replace("async for", "for")
TOLD_ASYNC = """
known = await market.find(stream.job.id)
print(known.state.name, market.running, (await market.chat(model, question)).outcome.name)
"""
TOLD_SYNC = TOLD_ASYNC.replace("await ", "").replace("market", "plain")


class Kernel:
    """One Python kernel."""

    def __init__(self) -> None:
        self.manager: KernelManager
        self.manager, self.client = start_new_kernel()

    def run(self, code: str, *, stop: bool = False) -> tuple[str, str]:
        """Returns a cell's output and its error. With `stop`, the cell is interrupted at its first output."""
        asked = self.client.execute(code)
        printed, error = "", ""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
                if stop:
                    self.manager.interrupt_kernel()
                    stop = False
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, error


def main() -> None:
    """Prints one JSON object."""
    book = nbformat.read(sys.argv[1], as_version=4)
    NotebookClient(book, timeout=60, resources={"metadata": {"path": str(Path.cwd())}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    results: dict[str, object] = {"example": [output.get("name", "") + ": " + output.get("text", "") for output in outputs]}
    kernel = Kernel()
    results["open"] = kernel.run(OPEN)
    for name, cell, after in (("async", ASYNC, TOLD_ASYNC), ("sync", SYNC, TOLD_SYNC)):
        _, results[f"{name} error"] = kernel.run(cell, stop=True)
        results[name] = kernel.run(after)
    results["close"] = kernel.run("await market.close(); plain.close()")
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel()
    print(json.dumps(results))  # noqa: T201


main()
