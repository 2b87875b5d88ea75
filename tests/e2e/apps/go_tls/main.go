// Go's net/http over TLS, HTTP/1.1 only. `go_tls serve PORT PEM` answers `/status/N` with N and the query as the body;
// `go_tls ask PORT PEM COUNT WORKERS VERSION` asks for `/status/200?id=NAME-NUMBER` on a kept connection of each worker,
// checks every answer, and prints how many were right. With a further argument, the name, it waits for a line of its
// input before it asks once more and ends. `go_tls flood PORT PEM WORKERS` asks until its input ends. VERSION is 1.2 or
// 1.3. WRAPPED=1 in the environment puts the server's connections into a wrapper, as limiting listeners do.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

func fail(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func number(index int) int {
	value, err := strconv.Atoi(os.Args[index])
	fail(err)
	return value
}

type wrapped struct {
	net.Conn
	accepted time.Time
}

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &wrapped{conn, time.Now()}, nil
}

func answer(writer http.ResponseWriter, request *http.Request) {
	status := 404
	if rest, found := strings.CutPrefix(request.URL.Path, "/status/"); found {
		status, _ = strconv.Atoi(rest)
	}
	writer.WriteHeader(status)
	if status != 204 && status != 304 {
		io.WriteString(writer, request.URL.RawQuery)
	}
}

func serve() {
	listening, err := net.Listen("tcp", "127.0.0.1:"+os.Args[2])
	fail(err)
	if os.Getenv("WRAPPED") != "" {
		listening = listener{listening}
	}
	server := http.Server{
		Handler: http.HandlerFunc(answer),
	}
	if os.Getenv("HTTP2") == "" {
		// Not nil: no HTTP/2.
		server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	}
	fail(server.ServeTLS(listening, os.Args[3], os.Args[3]))
}

func client(workers int, version uint16) *http.Client {
	pem, err := os.ReadFile(os.Args[3])
	fail(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, MaxVersion: version},
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{},
		MaxIdleConnsPerHost: workers,
		MaxConnsPerHost:     workers,
	}}
}

// Whether the answer is the one to this request; what some other server answers only has its status.
func isRight(client *http.Client, name string, number int64) bool {
	query := fmt.Sprintf("id=%s-%d", name, number)
	response, err := client.Get("https://localhost:" + os.Args[2] + "/status/200?" + query)
	if err != nil {
		fmt.Println(err)
		return false
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		fmt.Println(err)
		return false
	}
	return response.StatusCode == 200 && (!strings.HasPrefix(string(body), "id=") || string(body) == query)
}

// Asks on many goroutines at a time, until `more` says no.
func ask(client *http.Client, name string, workers int, more func(int64) bool) (right, wrong int64) {
	var next atomic.Int64
	var good, bad atomic.Int64
	var all sync.WaitGroup
	for worker := 0; worker < workers; worker++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for {
				number := next.Add(1) - 1
				if !more(number) {
					return
				}
				if isRight(client, name, number) {
					good.Add(1)
				} else {
					bad.Add(1)
				}
			}
		}()
	}
	all.Wait()
	return good.Load(), bad.Load()
}

func main() {
	input := bufio.NewReader(os.Stdin)
	switch os.Args[1] {
	case "serve":
		serve()
	case "flood":
		var ended atomic.Bool
		go func() {
			input.ReadString('\n')
			ended.Store(true)
		}()
		asking := client(number(4), 0)
		right, wrong := ask(asking, "flood", number(4), func(int64) bool { return !ended.Load() })
		fmt.Println(right, "right", wrong, "wrong")
	case "ask":
		version := uint16(tls.VersionTLS13)
		if os.Args[6] == "1.2" {
			version = tls.VersionTLS12
		}
		asking := client(number(5), version)
		count := int64(number(4))
		few := func(number int64) bool { return number < count }
		right, wrong := ask(asking, "first", number(5), few)
		fmt.Println(right, "right", wrong, "wrong")
		if len(os.Args) > 7 {
			input.ReadString('\n')
			right, wrong = ask(asking, os.Args[7], number(5), few)
			fmt.Println(right, "right", wrong, "wrong")
		}
	}
}
