import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Java's own client with its defaults, which offer HTTP/2 (Upgrade: h2c) on plain HTTP. Prints the protocol and each answer. */
public class JavaHttpClient {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws Exception {
        String question = "{\"model\": \"bench\", \"seed\": 7, \"messages\": [{\"role\": \"user\", \"content\": \"" + "hi ".repeat(9000) + "\"}]";
        for (String body : new String[] {question + "}", question + ", \"stream\": true}"}) {
            show(post(HttpRequest.BodyPublishers.ofString(body)));
            show(post(HttpRequest.BodyPublishers.fromPublisher(HttpRequest.BodyPublishers.ofString(body))));  // of unknown length
        }
        URI models = URI.create(System.getenv("OPENAI_BASE_URL") + "/models");
        show(CLIENT.send(HttpRequest.newBuilder(models).build(), HttpResponse.BodyHandlers.ofString()));
    }

    private static HttpResponse<String> post(HttpRequest.BodyPublisher body) throws Exception {
        URI address = URI.create(System.getenv("OPENAI_BASE_URL") + "/chat/completions");
        HttpRequest request = HttpRequest.newBuilder(address).header("Content-Type", "application/json").POST(body).build();
        return CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
    }

    private static void show(HttpResponse<String> answer) {
        System.out.println(answer.version() + " " + answer.statusCode() + " " + answer.body().replace("\n", "\\n"));
    }
}
