"""What strangers can make a coordinator hold, read or spend, as numbers. A stranger is one address: an IPv4 address, or the /64
network of an IPv6 address (tallystick.runtime.connection_limiter.address_key). Keys are free, so a key alone gets no share,
except where that key's orders are paid. Lower-case names are settings of example.toml. [a] counts per address, [c] per
connection, node or payer, [all] over everything.

- Connections: [a] max_connections_per_address, 1,000; [all] max_connections, 10,000, or as many as open files allow.
- The head of a request: [c] 64 KiB, 15 s; up to 16 requests wait for an earlier one.
- Sent bytes that are not read: [c] aborted when 64 KiB of them are not taken within 45 s; fewer bytes stay.
- A request that continues after its response: [c] closed after 45 s.
- Refused connections that still read their error: [all] 256, 1 s each.
- Node links: [a] max_nodes_per_address, 64, before their HELLO too, which must arrive within 10 s to 13 s; [c] one per key;
  [all] 10,000.
- A link's frame, finished or not: [c] MAX_HELLO, 96 KiB, before the HELLO, MAX_LINK_FRAME, 128 KiB, after it, in at most 64
  fragments, the first of them at most 57 s old; [a] 64 x 128 KiB = 8 MiB.
- Client links: [a] CLIENT_LINKS, 256, whose HELLO must arrive within 10 s. A link's message, finished or not: [c] 4 KiB before
  the HELLO, 256 KiB after it; [a] 256 x 256 KiB = 64 MiB. A submission on a link: [c] 192 KiB. Frames of jobs that have ended
  count as those of nodes do, a refused job as 5 units. A client that does not read is not read.
- Frames that a client's link has not read: [c] 256 KiB and one frame a job. Jobs wait while the connection is full.
- Listed asks: [c] 16 KiB an ask, 64 KiB and 256 asks a node; [a] 64 x 64 KiB = 4 MiB of JSON.
- Asks whose signatures are checked: [a] 100 per second, burst 4,000; [c] changed twice per second, burst 60.
- Link frames that no running job asked for: [a] 1,000 units per second, burst 4,000. A frame costs one unit, one more per KiB,
  5 for a database lookup, and one per 16 asks of a node that reports its capacity. Frames beyond that are read later.
- Frames queued for nodes: [c] OUTBOX_FRAMES, 4,096 frames; [a] OUTBOX_BYTES, 128 MiB, beside frames of up to
  SMALL_FRAME_BYTES, 1 KiB.
- Chunks queued for a client: [c] UNREAD_BYTES, 80 x 128 KiB = 10 MiB an attempt, of which a hedged job has two, and 4 MiB of a
  buffered response. A client that takes nothing for 45 s to 57 s loses its job. [a] 256 jobs x 14 MiB = 3.5 GiB for that long,
  if its own nodes send as much.
- Running jobs, lingering ones too: [a] max_jobs_per_address, 256; [c] max_jobs_per_payer, 256, max_jobs_per_node, 1,024.
- Jobs that wait for a free slot: [all] max_waiting_jobs, 10,000, of one model max_waiting_jobs_per_model, 5,000, with bodies of
  max_waiting_mib, 256, among the running jobs of their payer and address, for at most max_wait_seconds, 600. The payer must have
  signed their orders and could pay when they entered. A slot is kept 15 s for the job that it was granted to.
- Hedged jobs: hedge_share of all and of each payer's jobs. Counts of payers and of providers for that: [all] 10,000 each.
- Ids of placed jobs, which detect replays: kept for max_order_seconds, 3,600, and an eighth
  of that longer at most.
- Bodies of jobs, complete or not, until their jobs end: [a] max_bodies_mib_per_address, 128; [all] max_bodies_mib, 1,024. When
  that is used up, the address that holds most loses its largest unfinished body. [c] max_body_mib, 32, within 15 s plus
  the transfer time at 64 KiB/s. Old responses that are read again count as bodies.
- Bodies of the control plane: [c] 64 KiB; [a] 32 x 64 KiB = 2 MiB, among the bodies of jobs.
- Responses of the control plane: [c] PAGE_BYTES, 1 MiB and one entry of 16 KiB; 200 explained asks, 3.3 MiB; [a] 32 at once,
  106 MiB.
- Proofs of the match log: [c] 16 leaves and 16 sizes a request, 256 leaves and 256 KiB a page. Leaves that wait for the
  database: [all] MAX_UNWRITTEN, 4,096; at more, orders are refused.
- Requests to the control plane: [a] requests_per_second, 100, burst 20 times that. 50 KiB of responses count as one more
  request, an unknown job as 5 more.
- Refusals: [a] refused_requests_per_second, 2, refused_requests_burst, 100: unreadable or badly signed input on every route and
  link, and refused orders; [c] orders that the signer's funds do not cover, 1 per second, burst 30.
- Buffered responses in memory: [c] response_mib, 4, responses_mib_per_payer, 32; [all] responses_mib, 256. The payer that holds
  most makes room.
- Stored responses on disk, for response_seconds: [all] responses_disk_mib, 1,024, and 15 more responses. The payer that holds
  most makes room.
- Logs: 4,000 characters a value; 200 lines of an event at once, 20 a second; errors are never left out.
"""

from __future__ import annotations

from tallystick.protocol.link import MAX_NODE_ASK_BYTES
from tallystick.protocol.wire import INITIAL_CREDIT

MAX_LINK_FRAME = 128 * 1024
"""Bytes of a node's frame. An honest node's largest is a padded, sealed chunk of 64 KiB; its claims have 64 rows."""
MAX_HELLO = MAX_NODE_ASK_BYTES + 32 * 1024
"""Bytes of a link's frame before its HELLO."""
OUTBOX_FRAMES = 4_096
"""Frames queued for one node."""
OUTBOX_BYTES = 128 << 20
"""Bytes queued for all nodes of one address."""
SMALL_FRAME_BYTES = 1_024
"""Bytes of a frame that is queued even if its address has used up OUTBOX_BYTES: credit, a cancel, an acknowledgement."""
INBOX_FRAMES = INITIAL_CREDIT + 16
"""Frames queued for one job: a node's whole credit, and the few frames that need no credit."""
UNREAD_BYTES = INBOX_FRAMES * MAX_LINK_FRAME
"""Bytes of one job queued for its client."""
CLIENT_LINKS = 256
"""Links of clients of one address."""
ASKS_PER_SECOND, ASKS_BURST = 100, 4_000
"""Asks of one address whose signatures are checked; a HELLO counts as one more."""
CHANGES_PER_SECOND, CHANGES_BURST = 2, 60
"""How often one node may change its asks, or ask for its receipts."""
ACCOUNT_READS_PER_SECOND, ACCOUNT_READS_BURST = 2, 60
"""How often one account may read its jobs and tabs."""
FRAMES_PER_SECOND, FRAMES_BURST = 1_000, 4_000
"""Units of link frames of one address that no running job asked for. A frame costs one unit, and one more per KiB."""
LOOKUP_UNITS = 5
"""Units that a database lookup costs."""
BEAT_ASKS = 16
"""Asks of a node whose places a report of its capacity changes for one unit."""
CONTROL_CONCURRENCY = 32
"""Requests of one address to the control plane that are served at the same time."""
CONTROL_BURST_SECONDS = 20
"""The burst of requests to the control plane, in seconds of its rate."""
KIB_COST = 0.02
"""Requests that one KiB of a response counts as."""
MAX_CONTROL_BODY = 64 * 1024
PAGE_BYTES = 1 << 20
"""Bytes of entries in one page."""
DEFAULT_PAGE_ENTRIES, MAX_PAGE_ENTRIES = 100, 256
MAX_LOG_ENTRIES = 256
"""Leaves of the match log in one page. A leaf has at most 2 KiB, which hex digits double."""
BODY_GRACE_SECONDS = 15.0
BODY_RATE = 64 * 1024
"""A body must arrive within the grace period plus the time that it takes at this rate, in bytes per second."""
SIGN_INS_PER_SECOND, SIGN_INS_BURST = 2, 60
"""Requests of one address to sign in or out, which may make the coordinator ask the chain and write to the database."""
UNFUNDED_ORDERS_PER_SECOND, UNFUNDED_ORDERS_BURST = 1, 30
"""Orders of one signer that are refused for lack of funds; each costs chain reads."""
