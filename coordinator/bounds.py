"""What strangers can make a coordinator hold, read or spend, as numbers. A stranger is one address: an IPv4 address, or the /64
network of an IPv6 address (tallystick.runtime.doors.address_key). Keys are free, so no share is given to a key alone, except
where that key's orders are paid. Settings are named as in example.toml.

| what | of one address | of one connection or key | of all together |
|---|---|---|---|
| connections | `max_connections_per_address` 1,000 | | `max_connections` 10,000, and what the system's open files allow |
| a request's head | | 64 KiB, 15 s, 16 requests that wait for an earlier one | |
| a response that is not read | | aborted where 64 KiB are not taken in 45 s; at most 64 KiB beyond that | |
| a request that goes on after its answer | | closed after 45 s | |
| node links | `max_nodes_per_address` 64 | one a key | 10,000 |
| a link's frame, also unfinished | 64 links x 128 KiB = 8 MiB | MAX_HELLO 96 KiB before the HELLO, MAX_LINK_FRAME 128 KiB after, 64 fragments | |
| standing asks | 64 nodes x 64 KiB = 4 MiB of JSON | 16 KiB an ask, 64 KiB and 256 asks a node | |
| asks that are checked | ASKS_PER_SECOND 100 a second, ASKS_AT_ONCE 4,000 | a node changes them twice a second, 60 times at once | |
| frames that a node's link sends unasked | FRAMES_PER_SECOND 1,000 units a second, 4,000 at once; then the link waits | a unit is a frame and a KiB | |
| frames that wait for nodes | OUTBOX_BYTES 128 MiB | OUTBOX 4,096 frames | |
| chunks that wait for a client | | INBOX 80 frames x 128 KiB = 10 MiB a job, until its client stalls for 45 s | |
| jobs under way, lingering ones too | `max_jobs_per_address` 512 | `max_jobs_per_payer` 256, `max_jobs_per_node` 1,024 | |
| bodies of jobs, whole or not | `max_bodies_mib_per_address` 128 | 32 MiB a job, 15 s and then 64 KiB a second | `max_bodies_mib` 1,024; where they are used up, the address that holds most loses its unfinished ones |
| bodies of the control plane | 64 requests x 64 KiB = 4 MiB, among the above | MAX_CONTROL_BODY 64 KiB | |
| responses of the control plane under way | CONTROL_AT_ONCE 64 x PAGE_BYTES 1 MiB = 64 MiB | | |
| requests of the control plane | `requests_per_second` 100, 20 times that at once; 10 listed entries count as one | | |
| refusals that cost a signature check or a look-up | `bad_requests_per_second` 2, `bad_requests_burst` 100 | funds of one signer: 1 a second, 30 at once | |
| kept answers, memory | | `answers_mib_per_payer` 32 | `answers_mib` 256; the payer that holds most gives room first |
| kept answers, disk | | the same order | `answers_disk_mib` 1,024, and 15 answers more |
| logs | | 4,000 characters a value | 200 lines of an event at once, 20 a second |
"""

from __future__ import annotations

from coordinator.live import INBOX
from tallystick.protocol.link import MAX_NODE_ASK_BYTES

MAX_LINK_FRAME = 128 * 1024
"""Bytes of a node's frame. The largest of an honest node is a chunk of 64 KiB, padded and sealed; its claims have 64 rows."""
MAX_HELLO = MAX_NODE_ASK_BYTES + 32 * 1024
"""Bytes of a link's frame before it has said who it is."""
OUTBOX = 4_096
OUTBOX_BYTES = 128 << 20
"""What waits to be sent: frames of one node, bytes of all nodes of one address."""
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
CONTROL_AT_ONCE = 64
"""Requests of one address to the control plane that are answered at once."""
CONTROL_BURST = 20
"""Seconds' worth of requests that an address may make at once."""
LISTED = 0.1
"""What an entry of a list costs, in requests."""
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
