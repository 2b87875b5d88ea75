/* HTTP over TLS by whichever library of OpenSSL's interface is named, as its own file.
 *
 * `tls_any LIBRARY PORT` asks for each line of input, on a connection of its own, and prints the status; what it asks for
 * is the line. `fork COUNT PATH` has as many children ask, each on its own connection, which print and end with the
 * input. `leave` sends the first bytes of a handshake and ends at once. `tls_any LIBRARY PORT CERTIFICATE` answers.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PEM 1 /* SSL_FILETYPE_PEM */

/* Declared here, so that no headers need be there and one program is for all libraries. */
static void *(*TLS_method)(void), *(*SSL_CTX_new)(void *method), *(*SSL_new)(void *context);
static int (*SSL_CTX_use_certificate_file)(void *context, const char *path, int kind);
static int (*SSL_CTX_use_PrivateKey_file)(void *context, const char *path, int kind);
static int (*SSL_set_fd)(void *ssl, int descriptor), (*SSL_connect)(void *ssl), (*SSL_accept)(void *ssl);
static int (*SSL_read)(void *ssl, void *bytes, int count), (*SSL_write)(void *ssl, const void *bytes, int count);
static int (*SSL_shutdown)(void *ssl);
static void (*SSL_free)(void *ssl);

static void *context;
static int port;

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, dlerror());
	exit(1);
}

static void load(const char *path)
{
	void *library = dlopen(path, RTLD_NOW);

	if (!library)
		fail(path);
#define FIND(name)                                                                                                             \
	if (!(name = dlsym(library, #name)))                                                                                   \
	fail(#name)
	FIND(TLS_method);
	FIND(SSL_CTX_new);
	FIND(SSL_CTX_use_certificate_file);
	FIND(SSL_CTX_use_PrivateKey_file);
	FIND(SSL_new);
	FIND(SSL_set_fd);
	FIND(SSL_connect);
	FIND(SSL_accept);
	FIND(SSL_read);
	FIND(SSL_write);
	FIND(SSL_shutdown);
	FIND(SSL_free);
	context = SSL_CTX_new(TLS_method());
	if (!context)
		fail("SSL_CTX_new");
}

/* Until the end of the head, or of the connection. Returns the number of bytes. */
static int read_head(void *ssl, char *text, int room)
{
	int count = 0, got;

	do {
		got = SSL_read(ssl, text + count, room - 1 - count);
		if (got <= 0)
			break;
		count += got;
		text[count] = 0;
	} while (!strstr(text, "\r\n\r\n") && count < room - 1);
	return count;
}

static void ask(const char *path, int leaves)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int connection = socket(AF_INET, SOCK_STREAM, 0), status = 0;
	void *ssl = SSL_new(context);
	char text[4096];

	inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
	if (connect(connection, (void *)&address, sizeof(address)))
		fail("connect");
	SSL_set_fd(ssl, connection);
	if (leaves) {
		fcntl(connection, F_SETFL, O_NONBLOCK);
		SSL_connect(ssl);
		_exit(0);
	}
	if (SSL_connect(ssl) == 1) {
		snprintf(text, sizeof(text), "GET %s HTTP/1.1\r\nHost: localhost:%d\r\nConnection: close\r\n\r\n", path, port);
		SSL_write(ssl, text, strlen(text));
		if (read_head(ssl, text, sizeof(text)) > 0)
			sscanf(text, "HTTP/1.1 %d", &status);
		while (SSL_read(ssl, text, sizeof(text)) > 0)
			;
		SSL_shutdown(ssl);
	}
	SSL_free(ssl);
	close(connection);
	printf("%d\n", status);
	fflush(stdout);
}

static void ask_by_children(int count, const char *path)
{
	int ends[2], number;
	char byte, numbered[256];

	if (pipe(ends))
		fail("pipe");
	for (number = 0; number < count; number++) {
		if (fork())
			continue;
		close(ends[1]);
		snprintf(numbered, sizeof(numbered), "%s?id=%d", path, number);
		ask(numbered, 0);
		if (read(ends[0], &byte, 1) < 0) /* until the parent has ended */
			_exit(1);
		_exit(0);
	}
	close(ends[0]);
}

static void answer(const char *certificate)
{
	static const char response[] = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), connection, yes = 1;
	char text[4096];

	if (SSL_CTX_use_certificate_file(context, certificate, PEM) != 1 ||
	    SSL_CTX_use_PrivateKey_file(context, certificate, PEM) != 1)
		fail(certificate);
	inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (void *)&address, sizeof(address)) || listen(listener, 128))
		fail("listen");
	while ((connection = accept(listener, 0, 0)) >= 0) {
		void *ssl = SSL_new(context);

		SSL_set_fd(ssl, connection);
		if (SSL_accept(ssl) == 1 && read_head(ssl, text, sizeof(text)) > 0) {
			SSL_write(ssl, response, sizeof(response) - 1);
			SSL_shutdown(ssl);
		}
		SSL_free(ssl);
		close(connection);
	}
}

int main(int count, char **arguments)
{
	char line[256], path[128];
	int children;

	signal(SIGPIPE, SIG_IGN);
	load(arguments[1]);
	port = atoi(arguments[2]);
	if (count > 3)
		answer(arguments[3]);
	else
		while (fgets(line, sizeof(line), stdin)) {
			line[strcspn(line, "\n")] = 0;
			if (sscanf(line, "fork %d %127s", &children, path) == 2)
				ask_by_children(children, path);
			else
				ask(line, !strcmp(line, "leave"));
		}
	return 0;
}
