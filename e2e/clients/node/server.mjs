// A WebSocket service by npm's `ws`, with permessage-deflate: the same paths as ../ws_server.py.
//
// Usage: node server.mjs. Prints {"port": …}; once its input ends, how each connection was closed.

import { createServer } from "node:http";
import { WebSocketServer } from "ws";

const PUSHED = 10_000;
const LIFE_MS = 120_000;

const closes = [];
const server = createServer();
const sockets = new WebSocketServer({
  noServer: true,
  // Also messages that are shorter than the default's threshold.
  perMessageDeflate: { threshold: 0 },
  maxPayload: 1 << 30,
  handleProtocols: (offered) => ["v2", "v1"].find((name) => offered.has(name)) ?? false,
});

server.on("upgrade", (request, socket, head) => {
  if (request.url === "/refuse") {
    const body = "not for you\n";
    socket.end(
      "HTTP/1.1 403 Forbidden\r\nX-Why: first\r\nX-Why: second\r\nSet-Cookie: a=1\r\n" +
        `Set-Cookie: b=2\r\nContent-Length: ${body.length}\r\nConnection: close\r\n\r\n${body}`,
    );
    return;
  }
  sockets.handleUpgrade(request, socket, head, (connection) => handle(connection, request.url));
});

function handle(connection, path) {
  connection.on("error", () => {});
  connection.on("close", (code, reason) => closes.push({ path, code, reason: reason.toString() }));
  if (path === "/echo") {
    connection.on("message", (data, binary) => connection.send(data, { binary }));
  } else if (path === "/close") {
    connection.once("message", () => connection.close(4321, "reason of the service: käse"));
  } else if (path === "/push") {
    for (let number = 0; number < PUSHED; number++) connection.send(String(number));
    connection.close(1000);
  } else if (path === "/silent") {
    connection.pause();
  }
}

server.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: server.address().port })));
process.stdin.resume();
process.stdin.on("end", () => {
  console.log(JSON.stringify({ closes }));
  process.exit(0);
});
setTimeout(() => process.exit(1), LIFE_MS).unref();
