/* Two TLS clients on stacks of their own in one thread, which are switched within the library's calls: each waits for its
 * bytes in a BIO by going on with the other. `tls_stacks PORT PAUSE_SECONDS REQUESTS` prints how many were answered.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <ucontext.h>
#include <unistd.h>

#define STACK_BYTES (1 << 20)

/* Declared here, so that the headers of OpenSSL need not be there. */
typedef struct ssl_st SSL;
typedef struct bio_st BIO;
void *TLS_client_method(void), *SSL_CTX_new(void *method), *BIO_meth_new(int type, const char *name);
SSL *SSL_new(void *context);
BIO *BIO_new(void *method);
int BIO_meth_set_read(void *method, int (*read)(BIO *, char *, int));
int BIO_meth_set_write(void *method, int (*write)(BIO *, const char *, int));
int BIO_meth_set_ctrl(void *method, long (*control)(BIO *, int, long, void *));
void BIO_set_init(BIO *bio, int init), SSL_set_bio(SSL *ssl, BIO *in, BIO *out);
int SSL_connect(SSL *ssl), SSL_read(SSL *ssl, void *bytes, int count), SSL_write(SSL *ssl, const void *bytes, int count);

static ucontext_t scheduler, clients[2];
static int current, sockets[2], ended[2], port, requests, answered, switches;

static int read_switching(BIO *bio, char *bytes, int count)
{
	int me = current;

	if (switches)
		swapcontext(&clients[me], &scheduler);
	return recv(sockets[me], bytes, count, 0);
}

static int write_plainly(BIO *bio, const char *bytes, int count)
{
	return send(sockets[current], bytes, count, 0);
}

static long control(BIO *bio, int command, long number, void *pointer)
{
	return command == 11; /* BIO_CTRL_FLUSH */
}

static void client(int me)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	void *method = BIO_meth_new(0x400, "switching");
	SSL *ssl = SSL_new(SSL_CTX_new(TLS_client_method()));
	BIO *bio;
	char text[4096];

	inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
	sockets[me] = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(sockets[me], (void *)&address, sizeof(address)))
		exit(2);
	BIO_meth_set_read(method, read_switching);
	BIO_meth_set_write(method, write_plainly);
	BIO_meth_set_ctrl(method, control);
	bio = BIO_new(method);
	BIO_set_init(bio, 1);
	SSL_set_bio(ssl, bio, bio);
	if (SSL_connect(ssl) != 1)
		exit(3);
	swapcontext(&clients[me], &scheduler); /* until both have made their handshakes */
	for (int i = 0; i < requests; i++) {
		int length = snprintf(text, sizeof(text), "GET /status/200?id=%d-%d HTTP/1.1\r\nHost: localhost:%d\r\n\r\n",
				      me, i, port);

		if (SSL_write(ssl, text, length) != length || SSL_read(ssl, text, sizeof(text)) < 12)
			exit(4);
		answered += !memcmp(text, "HTTP/1.1 200", 12);
	}
	ended[me] = 1;
}

int main(int count, char **arguments)
{
	port = atoi(arguments[1]);
	requests = atoi(arguments[3]);
	for (int i = 0; i < 2; i++) {
		getcontext(&clients[i]);
		clients[i].uc_stack.ss_size = STACK_BYTES;
		clients[i].uc_stack.ss_sp =
			mmap(0, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		clients[i].uc_link = &scheduler;
		makecontext(&clients[i], (void (*)(void))client, 1, i);
		current = i;
		swapcontext(&scheduler, &clients[i]);
	}
	sleep(atoi(arguments[2]));
	switches = 1;
	while (!ended[0] || !ended[1]) {
		for (int i = 0; i < 2; i++) {
			if (!ended[i]) {
				current = i;
				swapcontext(&scheduler, &clients[i]);
			}
		}
	}
	printf("%d answered\n", answered);
	return 0;
}
