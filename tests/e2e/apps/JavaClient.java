// The JDK's own HTTP client: `java JavaClient.java URL...` requests each in turn and prints the statuses.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class JavaClient {
    // The client's own default is to upgrade by `Upgrade: h2c`.
    static final HttpClient.Version VERSION =
            System.getenv("H2C") == null ? HttpClient.Version.HTTP_1_1 : HttpClient.Version.HTTP_2;

    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newBuilder().version(VERSION).build();
        for (String url : arguments) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(url)).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
        }
    }
}
