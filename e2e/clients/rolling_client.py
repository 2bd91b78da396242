"""Load of a client that takes no failure, while relays and sidecars are restarted.

Usage: rolling_client.py CASE HOST PORT. Runs until its input ends, then prints how many exchanges were good, how
often it connected, and every failure, as one JSON object. What a client may do: connect again once it was told that
the connection ends (`Connection: close`, GOAWAY, close codes 1001 and 1012, UNAVAILABLE of a stream that has begun).
Whatever else happens to it is a failure.
"""

import asyncio
import http.client
import json
import sys
import threading
import time

HOST = "%s.localhost"
PAUSE_S = 0.005
LIFE_S = 110
TIMEOUT_S = 30
FAILURES_TOLD = 5

stop = threading.Event()
seen = {"good": 0, "connected": 0, "failed": 0, "failures": []}
lock = threading.Lock()


def count(what):
    with lock:
        seen[what] += 1


def fail(error):
    with lock:
        seen["failed"] += 1
        if len(seen["failures"]) < FAILURES_TOLD:
            seen["failures"].append(f"{time.time():.3f} {type(error).__name__}: {error}")


def http1(address):
    """Requests on a connection that is kept for as long as the server says; none is sent twice."""
    connection = None
    number = 0
    while not stop.is_set():
        number += 1
        try:
            if connection is None:
                connection = http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
                count("connected")
            method, body = ("POST", b"x" * 100) if number % 2 else ("GET", None)
            connection.request(method, f"/{number}", body=body, headers={"Host": HOST % "web"})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200 or text != b"ok":
                raise ValueError(f"{response.status} {text}")
            count("good")
            if response.will_close:
                connection.close()
                connection = None
        except Exception as error:
            fail(error)
            connection = None
        time.sleep(PAUSE_S)


def case_http1(address):
    threads = [threading.Thread(target=http1, args=(address,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def websocket(address):
    import websockets
    from websockets.asyncio.client import connect

    host, port = address
    number = 0
    while not stop.is_set():
        try:
            uri = f"ws://{HOST % 'web'}/ws"
            options = {"host": host, "port": port, "ping_interval": None, "proxy": None, "open_timeout": TIMEOUT_S}
            async with connect(uri, **options) as connection:
                count("connected")
                while not stop.is_set():
                    await connection.send(str(number))
                    answer = await asyncio.wait_for(connection.recv(), TIMEOUT_S)
                    if answer != str(number):
                        raise ValueError(f"{answer} is not {number}")
                    number += 1
                    count("good")
                    await asyncio.sleep(PAUSE_S)
        except websockets.ConnectionClosed as error:
            # What the service has not answered by then is sent again.
            if error.rcvd is None or error.rcvd.code not in (1001, 1012):
                fail(error)
        except Exception as error:
            fail(error)


async def many(task, address):
    await asyncio.gather(*(task(address) for _ in range(4)))


def case_websocket(address):
    asyncio.run(many(websocket, address))


def channel(address):
    import grpc

    host, port = address
    options = [
        ("grpc.default_authority", HOST % "rpc"),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    count("connected")
    return grpc.insecure_channel(f"{host}:{port}", options=options)


def unary(address):
    echo = channel(address).unary_unary("/e2e.Peer/Echo")
    number = 0
    while not stop.is_set():
        number += 1
        message = b"%d" % number
        try:
            if echo(message, timeout=TIMEOUT_S) != message:
                raise ValueError("another message came back")
            count("good")
        except Exception as error:
            fail(error)
        time.sleep(PAUSE_S)


def stream(address):
    import grpc
    import queue

    chat = channel(address).stream_stream("/e2e.Peer/Chat")
    number = 0
    while not stop.is_set():
        requests = queue.Queue()
        call = chat(iter(requests.get, None), timeout=LIFE_S)
        begun = 0
        try:
            while not stop.is_set():
                requests.put(b"%d" % number)
                if next(call) != b"%d" % number:
                    raise ValueError("another message came back")
                number += 1
                begun += 1
                count("good")
                time.sleep(PAUSE_S)
            requests.put(None)
            for _ in call:
                raise ValueError("a message too many")
        except grpc.RpcError as error:
            requests.put(None)
            # The stream was told that its end goes away; one that has not begun has nobody to lose.
            if error.code() != grpc.StatusCode.UNAVAILABLE or not begun:
                fail(error)
            else:
                count("connected")
        except Exception as error:
            requests.put(None)
            fail(error)


def threads_of(task, address):
    threads = [threading.Thread(target=task, args=(address,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def case_unary(address):
    threads_of(unary, address)


def case_stream(address):
    threads_of(stream, address)


def main():
    case, host, port = sys.argv[1:]
    end = threading.Timer(LIFE_S, stop.set)
    end.daemon = True
    end.start()
    watch = threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True)
    watch.start()
    globals()[f"case_{case}"]((host, int(port)))
    print(json.dumps(seen), flush=True)


main()
