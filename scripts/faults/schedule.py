"""Schedules of faults: which fault strikes which process at which phase of a job. Pure; a seed and the processes determine it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

PAUSE_SECONDS = (1.0, 4.0)
"""How long a fault lasts that ends by itself: at least and at most."""
CLOCK_SECONDS = 240
"""How far a clock jumps, forwards or backwards."""
FAULTS_A_SEED, KILLS_A_SEED = 12, 9


class Phase(str, Enum):
    """A moment in the life of a job or of its money. `watching.py` says which message or row marks each of them."""

    BEFORE_MATCH = "before match"
    AFTER_DISPATCH = "after dispatch"
    FIRST_CHUNK = "after first chunk"
    LAST_CHUNK = "last chunk"
    RECEIPT_SENT = "receipt sent"
    RECEIPT_STORED = "receipt stored"
    ANSWER_KEPT = "answer kept"
    CLAIM_HANDED_IN = "claim handed in"
    BATCH_SENT = "batch sent"
    BATCH_MINED = "batch mined"


class Fault(str, Enum):
    """What happens to a process."""

    KILL = "kill"
    """SIGKILL. Of the RPC endpoint: its connections are reset, and its port is closed for a while."""
    CRASH = "crash"
    """SIGKILL as a machine that stops: what it has sent and nobody has got yet is lost."""
    PAUSE = "pause"
    """SIGSTOP, and SIGCONT later."""
    PARTITION = "partition"
    """Its packets vanish for a while, both ways; the connections stay open."""
    PACKET_LOSS = "packet loss"
    """As PARTITION, but the kernel drops them, so TCP gets no acknowledgement and sends again."""
    RESET = "reset"
    """Its connections are reset, and what is on its way in them is lost."""
    CLOCK = "clock"
    """Its clock is off by minutes for a while."""
    FULL_DISK = "full disk"
    """Its file system has no space for a while."""


class Process(str, Enum):
    """A process of the market. NODE, and COORDINATOR if it has replicas: the one whose message marks the phase, else any."""

    GATEWAY = "gateway"
    NODE = "node"
    COORDINATOR = "coordinator"
    POSTGRES = "postgres"
    NATS = "nats"
    RPC = "rpc"


POSSIBLE: dict[Fault, frozenset[Process]] = {
    Fault.KILL: frozenset(Process),
    Fault.CRASH: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR}),
    Fault.PAUSE: frozenset(Process),
    Fault.PARTITION: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR, Process.RPC}),
    Fault.PACKET_LOSS: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR, Process.RPC}),
    Fault.RESET: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR}),
    Fault.CLOCK: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR}),
    Fault.FULL_DISK: frozenset({Process.GATEWAY, Process.NODE, Process.COORDINATOR}),
}
"""The processes that each fault can strike."""


Strike = tuple[Process, Fault]


@dataclass(frozen=True, slots=True)
class Entry:
    """One fault of a schedule.

    `before`: whether it strikes while the message that marks the phase is still held back, or right after it was passed on.
    `seconds`: how long it lasts, if it ends by itself. `shift`: how far the clock is off, in seconds.
    """

    phase: Phase
    process: Process
    fault: Fault
    before: bool
    seconds: float
    shift: int = 0

    @property
    def cell(self) -> str:
        """PROCESS/PHASE, as `--only` takes it."""
        return f"{self.process.value}/{self.phase.value}"


def schedule(
    seed: int, processes: Sequence[Process], faults: Sequence[Fault], only: str = "", impossible: Sequence[Strike] = ()
) -> list[Entry]:
    """The faults of a seed, in order: KILLS_A_SEED kills, and other faults out of `faults` if there are any.

    Consecutive seeds strike all cells of processes and phases with a kill, and with each other fault. `only`: PROCESS/PHASE, or
    one of both. `impossible`: what this market does not have. Raises ValueError if nothing is left.
    """
    kills = _cells(processes, [Fault.KILL] if Fault.KILL in faults else [], only, impossible)
    others = _cells(processes, [fault for fault in faults if fault is not Fault.KILL], only, impossible)
    if not kills and not others:
        raise ValueError(f"--only {only}: expected PROCESS/PHASE, PROCESS or PHASE, out of the processes and faults of this run")
    number = KILLS_A_SEED if others else FAULTS_A_SEED
    chosen = _slice(seed, kills, number) + _slice(seed, others, FAULTS_A_SEED - number if kills else FAULTS_A_SEED)
    chance = random.Random(f"entries {seed}")
    chance.shuffle(chosen)
    return [_entry(chance, *cell) for cell in chosen]


def _entry(chance: random.Random, phase: Phase, process: Process, fault: Fault) -> Entry:
    shift = chance.choice((-1, 1)) * CLOCK_SECONDS if fault is Fault.CLOCK else 0
    seconds = round(chance.uniform(*PAUSE_SECONDS), 1)
    return Entry(phase, process, fault, before=chance.random() < 0.5, seconds=seconds, shift=shift)


Cell = tuple[Phase, Process, Fault]


def _cells(processes: Sequence[Process], faults: Sequence[Fault], only: str, impossible: Sequence[Strike]) -> list[Cell]:
    wanted = {part for part in only.split("/") if part}
    return [
        (phase, process, fault)
        for fault in faults
        for process in processes
        if process in POSSIBLE[fault] and (process, fault) not in impossible
        for phase in Phase
        if wanted <= {process.value, phase.value}
    ]


def _slice(seed: int, cells: list[Cell], size: int) -> list[Cell]:
    """`size` cells for this seed; the slices of consecutive seeds follow each other through a shuffled list of all cells."""
    if not cells or not size:
        return []
    chosen: list[Cell] = []
    at = seed * size
    while len(chosen) < size:
        turn, offset = divmod(at + len(chosen), len(cells))
        shuffled = list(cells)
        random.Random(f"cells {turn}").shuffle(shuffled)
        chosen += shuffled[offset : offset + size - len(chosen)]
    return chosen
