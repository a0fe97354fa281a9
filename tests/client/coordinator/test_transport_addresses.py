"""To which addresses a client sends requests."""

from __future__ import annotations

import asyncio

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.transport import NotSent
from tests.local_service import local_service
from tests.runtime.test_replica_resolver import Names


async def test_a_client_sends_nothing_to_a_service_of_its_own_machine() -> None:
    """Neither requests nor the job link of a listed replica reach it; those of the configured URL do."""
    async with asyncio.timeout(60), local_service() as (port, got):
        seed = f"http://seed.test:{port}"
        async with CoordinatorClient(seed, ClientConfig()) as client:
            client._resolver._resolver = Names(seed=["127.0.0.1", "8.8.8.8"], replica=["127.0.0.1"])
            assert await client.fetch_at(seed, "GET", "/v1/info") == ({}, 2)
            with pytest.raises(NotSent):
                await client.fetch_at(f"http://replica.test:{port}", "GET", "/v1/info")
            assert await client._links_of(f"http://127.0.0.1:{port}").find(1) is None
            assert await client.fetch_at(seed, "GET", "/v1/info") == ({}, 2)
        assert [line for line in got if line] == [b"GET /v1/info HTTP/1.1\r\n"] * 2
