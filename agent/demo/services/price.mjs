// The price list. There is no price for gold, and it fails when asked for one.
//
// Environment: LISTEN, host:port.

import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";

const [host, port] = process.env.LISTEN.split(":");

createServer(async (request, response) => {
  const article = request.url.split("?")[0].replace("/price/", "");
  const fails = article === "gold";
  await sleep(fails ? 6 : 12);
  const body = JSON.stringify(fails ? { error: "no price for gold today" } : { price: 1.9 }) + "\n";
  response.writeHead(fails ? 500 : 200, {
    "content-type": "application/json",
    "content-length": Buffer.byteLength(body),
  });
  response.end(body);
}).listen(Number(port), host);
