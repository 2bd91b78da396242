"""A WebSocket service by the `websockets` library, with permessage-deflate. Its path says what it does:

/echo     sends every message back, kind and bytes; takes the first of `v2`, `v1` that is offered
/refuse   refuses the handshake with 403, repeated fields and a body
/close    closes with 4321 and a reason after the first message
/push     sends 10,000 numbered messages, then closes with 1000
/silent   never reads
/wait     reads until the client closes

Usage: ws_server.py [CERT KEY]; with them by TLS. Prints {"port": …}; once its input ends, how each connection was closed.
"""

import asyncio
import json
import ssl
import sys

import websockets
from websockets.asyncio.server import serve

PUSHED = 10_000
LIFE_S = 120

closes = []
waits_for_ever = asyncio.Event()


def choose(_connection, offered):
    return next((name for name in ("v2", "v1") if name in offered), None)


def refuse(connection, request):
    if request.path != "/refuse":
        return None
    response = connection.respond(403, "not for you\n")
    response.headers["X-Why"] = "first"
    response.headers["X-Why"] = "second"
    response.headers["Set-Cookie"] = "a=1"
    response.headers["Set-Cookie"] = "b=2"
    return response


async def handle(connection):
    path = connection.request.path
    try:
        if path == "/echo":
            async for message in connection:
                await connection.send(message)
        elif path == "/close":
            await connection.recv()
            await connection.close(4321, "reason of the service: käse")
        elif path == "/push":
            for number in range(PUSHED):
                await connection.send(str(number))
            await connection.close()
        elif path == "/silent":
            await waits_for_ever.wait()
        else:
            async for _ in connection:
                pass
    except websockets.ConnectionClosed:
        pass
    await connection.wait_closed()
    closes.append({"path": path, "code": connection.close_code, "reason": connection.close_reason})


def tls():
    if len(sys.argv) < 3:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    context.set_alpn_protocols(["http/1.1"])
    return context


async def main():
    async with serve(
        handle,
        "127.0.0.1",
        0,
        ssl=tls(),
        process_request=refuse,
        subprotocols=["v2", "v1"],
        select_subprotocol=choose,
        max_size=None,
        ping_interval=None,
        close_timeout=2,
    ) as server:
        port = server.sockets[0].getsockname()[1]
        print(json.dumps({"port": port}), flush=True)
        end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait_for(end, LIFE_S)
    waits_for_ever.set()
    print(json.dumps({"closes": closes}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
