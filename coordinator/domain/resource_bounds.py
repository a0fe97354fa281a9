"""What strangers can make a coordinator hold, read or spend, as numbers. A stranger is one address: an IPv4 address, or the /64
network of an IPv6 address (tallystick.runtime.connection_limiter.address_key). Keys are free, so no share is given to a key
alone, except where that key's orders are paid. Names in lower case are settings of example.toml; [a] is of one address, [c] of
one connection, node or payer, [all] of all together.

- Connections: [a] max_connections_per_address, 1,000; [all] max_connections, 10,000, or what the open files allow.
- A request's head: [c] 64 KiB, 15 s; 16 requests wait for an earlier one.
- What is sent and not read: [c] aborted where 64 KiB of it are not taken in 45 s; less than that stays.
- A request that goes on after its answer: [c] closed after 45 s.
- Refused connections that still read why: [all] 256, 1 s each.
- Node links: [a] max_nodes_per_address, 64, also before their HELLO, which must come in 10 s; [c] one a key; [all] 10,000.
- A link's frame, also unfinished: [c] MAX_HELLO, 96 KiB, before the HELLO, MAX_LINK_FRAME, 128 KiB, after it, in at most 64
  fragments, of which the first bytes are at most 90 s old; [a] 64 x 128 KiB = 8 MiB.
- Standing asks: [c] 16 KiB an ask, 64 KiB and 256 asks a node; [a] 64 x 64 KiB = 4 MiB of JSON.
- Asks whose signatures are checked: [a] 100 a second, 4,000 at once; [c] changed twice a second, 60 times at once.
- Frames of links that no running job asked for: [a] 1,000 units a second, 4,000 at once, one a frame and one a KiB, and 5 for
  a look-up; what is more is read later.
- Frames that wait for nodes: [c] OUTBOX, 4,096 frames; [a] OUTBOX_BYTES, 128 MiB, beside those of at most SHORT_FRAME, 1 KiB.
- Chunks that wait for a client: [c] UNREAD_BYTES, 80 x 128 KiB = 10 MiB a job, and 4 MiB of an answer that is kept; a client
  that takes nothing for 45 s to 90 s loses its job; [a] 256 jobs x 14 MiB = 3.5 GiB for so long, if its own nodes send as much.
- Jobs under way, lingering ones too: [a] max_jobs_per_address, 256; [c] max_jobs_per_payer, 256, max_jobs_per_node, 1,024.
- Bodies of jobs, whole or not, until their jobs end: [a] max_bodies_mib_per_address, 128; [all] max_bodies_mib, 1,024: where
  that is used up, the address which holds most loses its largest unfinished one; [c] max_body_mib, 32, which may take 15 s and
  the time that it takes at 64 KiB a second. Old answers that are read again count as bodies.
- Bodies of the control plane: [c] 64 KiB; [a] 32 x 64 KiB = 2 MiB, among the bodies of jobs.
- Answers of the control plane: [c] PAGE_BYTES, 1 MiB and one entry of 16 KiB; 200 explained asks, 3.3 MiB; [a] 32 at once,
  106 MiB.
- Requests to the control plane: [a] requests_per_second, 100, 20 times that at once; 50 KiB of answers count as one more, a job
  that is not known as 5 more.
- Refusals that cost: [a] bad_requests_per_second, 2, bad_requests_burst, 100: what is unreadable or badly signed, on every route
  and link, and orders that are refused; [c] orders that a signer's funds do not cover, 1 a second, 30 at once.
- Kept answers in memory: [c] answer_mib, 4, answers_mib_per_payer, 32; [all] answers_mib, 256: the payer who has most gives room.
- Kept answers on disk, for answer_seconds: [all] answers_disk_mib, 1,024, and 15 answers more: the payer who has most gives room.
- Logs: 4,000 characters a value; 200 lines of an event at once, 20 a second; errors are never left out.
"""

from __future__ import annotations

from tallystick.protocol.link import MAX_NODE_ASK_BYTES
from tallystick.protocol.wire import INITIAL_CREDIT

MAX_LINK_FRAME = 128 * 1024
"""Bytes of a node's frame. The largest of an honest node is a chunk of 64 KiB, padded and sealed; its claims have 64 rows."""
MAX_HELLO = MAX_NODE_ASK_BYTES + 32 * 1024
"""Bytes of a link's frame before it has said who it is."""
OUTBOX = 4_096
OUTBOX_BYTES = 128 << 20
"""What waits to be sent: frames of one node, bytes of all nodes of one address."""
SHORT_FRAME = 1_024
"""Bytes of a frame that is let through where the bytes of its address are used up: credit, a cancel, an acknowledgement."""
INBOX = INITIAL_CREDIT + 16
"""Frames that may wait for a job: a node's whole credit, and the few frames that need none."""
UNREAD_BYTES = INBOX * MAX_LINK_FRAME
"""What of a job may wait for its client."""
ASKS_PER_SECOND, ASKS_AT_ONCE = 100, 4_000
"""Asks of one address whose signatures are checked; a HELLO counts as one more."""
CHANGES_PER_SECOND, CHANGES_AT_ONCE = 2, 60
"""How often one node may change its asks, or ask for its receipts."""
FRAMES_PER_SECOND, FRAMES_AT_ONCE = 1_000, 4_000
"""Units of link frames that no running job asked for, of one address: one a frame and one a KiB."""
LOOK_UP = 5
"""Units that a frame costs which is looked up in the database."""
CONTROL_AT_ONCE = 32
"""Requests of one address to the control plane that are answered at once."""
CONTROL_BURST = 20
"""Seconds' worth of requests that an address may make at once."""
KIB_COST = 0.02
"""What a KiB of an answer costs, in requests."""
MAX_CONTROL_BODY = 64 * 1024
PAGE_BYTES = 1 << 20
"""Bytes of asks in one answer; the rest is on the next page."""
PAGE, MAX_PAGE = 100, 256
"""Entries of a page, by default and at most."""
BODY_GRACE_SECONDS = 15.0
BODY_RATE = 64 * 1024
"""A body arrives within the grace and the time that it takes at this rate, in bytes a second."""
LOOK_UPS_PER_SECOND, LOOK_UPS_AT_ONCE = 1, 30
"""Orders of one signer that may be refused for its funds, which were read from the chain."""
