"""A WebSocket client by the `websockets` library.

Usage: ws_client.py CASE HOST PORT, where the service is ws_server.py or node/server.mjs, or something
before it. Prints what it saw as one JSON object and asserts nothing itself. Speaks TLS where
SIDELANE_E2E_CA names a file of authorities.
"""

import asyncio
import json
import os
import ssl
import sys

import websockets
from websockets.asyncio.client import connect

HOST = "api.localhost"
LIFE_S = 100


def opened(address, path, **options):
    host, port = address
    options = {"max_size": None, "ping_interval": None, "open_timeout": 60, "proxy": None, **options}
    ca = os.environ.get("SIDELANE_E2E_CA")
    if ca:
        options["ssl"] = ssl.create_default_context(cafile=ca)
    scheme = "wss" if ca else "ws"
    return connect(f"{scheme}://{HOST}{path}", host=host, port=port, **options)


def negotiated(connection):
    return {
        "subprotocol": connection.subprotocol,
        "extensions": connection.response.headers.get("Sec-WebSocket-Extensions"),
    }


async def same(connection, message):
    """Sends a message, or one in fragments, and says whether it came back."""
    await connection.send(message)
    whole = message if isinstance(message, (str, bytes)) else type(message[0])().join(message)
    return await connection.recv() == whole


async def echo(address, **options):
    """Messages of many kinds, each sent back; a ping; a close that the client begins."""
    async with opened(address, "/echo", **options) as connection:
        seen = {
            "text": await same(connection, "käse \u2713"),
            "binary": await same(connection, bytes(range(256))),
            "empty": await same(connection, "") and await same(connection, b""),
            "repetitive": await same(connection, "abc" * 400_000),
            "random": await same(connection, os.urandom(200_000)),
            "fragments": await same(connection, ["one ", "two ", "", "three"]),
            "large": await same(connection, os.urandom(1_000) * 16_000),
        }
        await (await connection.ping(b"are you there"))
        seen["pong"] = True
        seen.update(negotiated(connection))
        await connection.close(4000, "goodbye: käse")
        return {**seen, "code": connection.close_code, "reason": connection.close_reason}


async def case_echo(address):
    return await echo(address)


async def case_echo_plain(address):
    """The same without permessage-deflate."""
    return await echo(address, compression=None)


async def case_subprotocol(address):
    """Offers three subprotocols; the service's choice counts."""
    async with opened(address, "/echo", subprotocols=["v0", "v1", "v2"]) as connection:
        return {**negotiated(connection), "same": await same(connection, "chosen")}


async def case_refused(address):
    try:
        async with opened(address, "/refuse"):
            return {"status": 101}
    except websockets.InvalidStatus as error:
        response = error.response
        return {
            "status": response.status_code,
            "why": response.headers.get_all("X-Why"),
            "cookies": response.headers.get_all("Set-Cookie"),
            "body": response.body.decode(),
        }


async def case_closed(address):
    """The service closes with a code and a reason."""
    async with opened(address, "/close") as connection:
        await connection.send("close")
        try:
            await connection.recv()
        except websockets.ConnectionClosed:
            pass
        return {"code": connection.close_code, "reason": connection.close_reason}


async def case_pushed(address):
    """Messages that the service sends unasked, in order."""
    async with opened(address, "/push") as connection:
        messages = [message async for message in connection]
        await connection.wait_closed()
        in_order = messages == [str(number) for number in range(len(messages))]
        return {"messages": len(messages), "in_order": in_order, "code": connection.close_code}


async def case_pipelined(address):
    """20,000 small messages, sent without waiting for their echoes."""
    count = 20_000
    async with opened(address, "/echo") as connection:

        async def send():
            for number in range(count):
                await connection.send(f"message {number}")

        sending = asyncio.create_task(send())
        in_order = True
        for number in range(count):
            in_order &= await connection.recv() == f"message {number}"
        await sending
        return {"messages": count, "in_order": in_order}


async def case_many(address):
    """200 connections at once, each with its own messages."""

    async def one(number):
        async with opened(address, "/echo") as connection:
            rounds = [await same(connection, f"{number} {turn}") for turn in range(10)]
            return all(rounds)

    return {"same": sum(await asyncio.gather(*(one(number) for number in range(200))))}


CASES = {
    "echo": case_echo,
    "echo-plain": case_echo_plain,
    "subprotocol": case_subprotocol,
    "refused": case_refused,
    "closed": case_closed,
    "pushed": case_pushed,
    "pipelined": case_pipelined,
    "many": case_many,
}


async def main():
    case, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    seen = await asyncio.wait_for(CASES[case]((host, port)), LIFE_S)
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
