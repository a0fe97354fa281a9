"""To which addresses a node sends its questions to coordinators."""

from __future__ import annotations

import asyncio

import pytest

from node.coordinator.coordinator_http import CoordinatorHttp
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.replicas import Reach
from tests.local_service import local_service


async def test_a_name_that_leads_to_this_machine_gets_no_request() -> None:
    """A coordinator elsewhere cannot have its nodes ask a service of their own machine, whatever its replicas' names lead to."""
    async with asyncio.timeout(60), local_service() as (port, got):
        url = f"http://localhost:{port}/v1/providers/x/why"
        for limit in (Reach.ANYWHERE, Reach.NETWORK, Reach.LINK):
            limits = {url: limit}
            with pytest.raises(Unavailable, match="nearer to this machine"):
                await CoordinatorHttp(limits.__getitem__).fetch_json(url)
        assert not got
        assert await CoordinatorHttp(lambda _url: Reach.MACHINE).fetch_json(url) == {}
