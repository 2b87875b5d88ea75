// Go's net/http: `go_http serve PORT` answers `/status/N` with N and anything else with 404; `go_http get URL...`
// requests each in turn and prints the statuses; `go_http between PORT NEXT_PORT` asks the next server for the same
// path, some milliseconds after the request came, and answers with what came back. It forwards `traceparent` where it
// got one. With H2C set, `serve` and `get` speak HTTP/2 without TLS by prior knowledge.
package main

import (
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func answer(writer http.ResponseWriter, request *http.Request) {
	status := 404
	if rest, found := strings.CutPrefix(request.URL.Path, "/status/"); found {
		status, _ = strconv.Atoi(rest)
	}
	writer.WriteHeader(status)
	if status != 204 && status != 304 {
		io.WriteString(writer, "as asked\n")
	}
}

func pass(writer http.ResponseWriter, request *http.Request) {
	time.Sleep(time.Duration(rand.Intn(5)) * time.Millisecond)
	onward, _ := http.NewRequest("GET", "http://127.0.0.1:"+os.Args[3]+request.URL.Path, nil)
	if context := request.Header.Get("traceparent"); context != "" {
		onward.Header.Set("traceparent", context)
	}
	response, err := http.DefaultClient.Do(onward)
	if err != nil {
		http.Error(writer, err.Error(), 502)
		return
	}
	defer response.Body.Close()
	io.Copy(writer, response.Body)
}

func main() {
	if os.Args[1] == "between" {
		fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Args[2], http.HandlerFunc(pass)))
		os.Exit(1)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(os.Getenv("H2C") == "")
	protocols.SetUnencryptedHTTP2(os.Getenv("H2C") != "")
	http.DefaultTransport.(*http.Transport).Protocols = protocols
	if os.Args[1] == "serve" {
		server := http.Server{Addr: "127.0.0.1:" + os.Args[2], Handler: http.HandlerFunc(answer), Protocols: protocols}
		fmt.Println(server.ListenAndServe())
		os.Exit(1)
	}
	for _, url := range os.Args[2:] {
		response, err := http.Get(url)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		fmt.Println(response.StatusCode)
	}
	// Its language is read from /proc while it runs, and a loaded machine may need a moment for that.
	time.Sleep(500 * time.Millisecond)
}
