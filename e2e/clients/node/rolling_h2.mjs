// Load by HTTP/2, of Node's own client: the same as the cases of ../rolling_client.py.
//
// Usage: node rolling_h2.mjs HOST PORT. Runs until its input ends, then prints how many requests were good, how often it
// connected, and every failure, as one JSON object. It connects again once GOAWAY was said, and asks again what that says was not
// looked at (REFUSED_STREAM: RFC 9113 §8.7), as it must; whatever else happens to it is a failure.

import http2 from "node:http2";
import { setTimeout as pause } from "node:timers/promises";

const AUTHORITY = "web.localhost";
const PAUSE_MS = 5;
const LIFE_MS = 110_000;
const TIMEOUT_MS = 30_000;
const FAILURES_TOLD = 5;

const [host, port] = process.argv.slice(2);
const seen = { good: 0, connected: 0, again: 0, failed: 0, failures: [] };
let stopped = false;
setTimeout(() => (stopped = true), LIFE_MS).unref();
process.stdin.on("end", () => (stopped = true)).resume();

function fail(error) {
  seen.failed += 1;
  if (seen.failures.length < FAILURES_TOLD) seen.failures.push(`${Date.now() / 1000} ${error}`);
}

/// The session that takes requests. One that is told to go away takes none, and ends with those it has.
let session = null;

function connected() {
  if (session) return session;
  const fresh = http2.connect(`http://${host}:${port}`);
  seen.connected += 1;
  const gone = () => {
    if (session === fresh) session = null;
  };
  fresh.on("goaway", gone);
  fresh.on("close", gone);
  // Requests tell of it, each by itself.
  fresh.on("error", gone);
  session = fresh;
  return fresh;
}

function ask(number) {
  return new Promise((resolve, reject) => {
    const body = number % 2 ? "x".repeat(100) : null;
    const connection = connected();
    const stream = connection.request({
      ":method": body ? "POST" : "GET",
      ":path": `/${number}`,
      ":authority": AUTHORITY,
    });
    let status = 0;
    let text = "";
    stream.setTimeout(TIMEOUT_MS, () => reject(new Error("no answer in time")));
    stream.on("response", (headers) => (status = headers[":status"]));
    stream.on("data", (chunk) => (text += chunk));
    // The close tells of it, with its code.
    stream.on("error", () => {});
    stream.on("close", () => {
      if (stream.rstCode === http2.constants.NGHTTP2_REFUSED_STREAM) {
        // The stream may end before the connection says that it was told to go away.
        if (session === connection) session = null;
        seen.again += 1;
        resolve(ask(number));
        return;
      }
      if (status === 200 && text === "ok") resolve();
      else reject(new Error(`${status} ${text} (code ${stream.rstCode})`));
    });
    stream.end(body ?? undefined);
  });
}

async function load() {
  for (let number = 0; !stopped; number += 1) {
    try {
      await ask(number);
      seen.good += 1;
    } catch (error) {
      fail(error);
    }
    await pause(PAUSE_MS);
  }
}

await Promise.all([load(), load(), load(), load()]);
console.log(JSON.stringify(seen));
process.exit(0);
