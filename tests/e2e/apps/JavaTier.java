// The JDK's HTTP server between two others: `java JavaTier.java PORT NEXT_PORT THREADS CLIENT` asks the next one for the
// same path and answers with what came back. THREADS is `pool` or `virtual` (JDK 21 and later), CLIENT `blocking`
// (HttpURLConnection) or `selecting` (HttpClient). It forwards `traceparent` where it got one.
import com.sun.net.httpserver.HttpServer;
import java.io.InputStream;
import java.net.HttpURLConnection;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

public class JavaTier {
    static final HttpClient CLIENT = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();

    static byte[] ask(URI target, String context, boolean blocking) throws Exception {
        if (blocking) {
            HttpURLConnection connection = (HttpURLConnection) target.toURL().openConnection();
            if (context != null) {
                connection.setRequestProperty("traceparent", context);
            }
            try (InputStream body = connection.getInputStream()) {
                return body.readAllBytes();
            }
        }
        HttpRequest.Builder request = HttpRequest.newBuilder(target);
        if (context != null) {
            request.header("traceparent", context);
        }
        return CLIENT.send(request.build(), HttpResponse.BodyHandlers.ofByteArray()).body();
    }

    public static void main(String[] arguments) throws Exception {
        String next = "http://127.0.0.1:" + arguments[1];
        boolean blocking = arguments[3].equals("blocking");
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0])), 256);
        if (arguments[2].equals("virtual")) {
            // By name: older compilers do not know it.
            server.setExecutor((ExecutorService) Executors.class.getMethod("newVirtualThreadPerTaskExecutor").invoke(null));
        } else {
            server.setExecutor(Executors.newFixedThreadPool(64));
        }
        server.createContext("/", exchange -> {
            try {
                exchange.getRequestBody().readAllBytes();
                Thread.sleep((long) (Math.random() * 5)); // others get their turn meanwhile
                URI target = URI.create(next + exchange.getRequestURI().getPath());
                byte[] body = ask(target, exchange.getRequestHeaders().getFirst("traceparent"), blocking);
                exchange.sendResponseHeaders(200, body.length);
                exchange.getResponseBody().write(body);
            } catch (Exception error) {
                error.printStackTrace();
            } finally {
                exchange.close();
            }
        });
        server.start();
    }
}
