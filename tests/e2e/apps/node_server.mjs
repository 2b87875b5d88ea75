// A Node HTTP server: `node node_server.mjs PORT`. `/status/N` answers N, anything else 404.
import http from "node:http";

const server = http.createServer((request, response) => {
  const asked = /^\/status\/(\d+)/.exec(request.url);
  const status = asked ? Number(asked[1]) : 404;
  const body = status === 204 || status === 304 ? "" : "as asked\n";
  request.resume();
  request.on("end", () => {
    response.writeHead(status, body ? { "content-length": body.length } : {});
    response.end(body);
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1");
process.on("SIGTERM", () => process.exit(0));
